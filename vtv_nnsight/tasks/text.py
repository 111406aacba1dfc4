"""Tasks of language models: rows of words or texts, and a template that makes prompts of them.

>>> task = tasks.words("antonym")                            # one of the lists that the package carries, see `WORDS`
>>> task = tasks.Words("mine", {"hot": "cold", "big": "small", ...}, template="{input} -> {output}\\n")
>>> train, test = task.split(seed=0)                         # no input of one is in the other
>>> task.prompts(train, n=100, shots=8, seed=0)
TextPrompts(100 prompts, 8 example(s), the first: 'Q: …\\n\\nQ: big\\nA:' → ' small')
>>> tasks.Text("mood", rows, "Review: {review}\\nMood: {good}\\n\\n", answer=("good", "bad"))
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from vtv_nnsight import metrics
from vtv_nnsight.finite import check_whole
from vtv_nnsight.tasks.base import AnyTask, Row
from vtv_nnsight.text import check_kind, join_names, quoted
from vtv_nnsight.text_prompts import TextLayout, TextPrompts, number_of

TEMPLATE = "Q: {input}\nA: {output}\n\n"
"""Of Todd et al., *Function Vectors in Large Language Models* (ICLR 2024)."""
TEST_SHARE = 0.3
"""The part of a task's rows that `split` keeps for tests."""
SEVERAL = (Mapping, list, tuple, set, np.ndarray)
"""Kinds of what is no single text."""
_LISTS: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
WORDS = tuple(_LISTS)
"""The lists of words that the package carries: "capital", "antonym", …"""


@dataclass(frozen=True)
class Text(AnyTask):
    """Rows of any columns, a template over them, and the column that is to be said.

    Args:
        name: What tables and files call it: letters, digits, "_", "-", "." and spaces.
        rows: Mappings with a text, or what becomes one, in every column of the template; a `datasets.Dataset`, too.
        template: How one row is written, such as "Q: {input}\\nA: {output}\\n\\n": the answer comes last, and what
            stands after it ends an answer.
        answer: The column of the answer; or a pair of columns, of the right answer (which the template has) and of one
            that it is weighed against. The loss is then the difference of their log-probabilities.
        metric: How answers are scored; by default the accuracy of the first token, of a pair how often the right one is
            the likelier.

    Raises:
        ValueError: naming what is wrong with the template or a row; also when two rows ask the same.
    """

    name: str
    rows: tuple[Row, ...] = field(hash=False, repr=False)
    template: str = TEMPLATE
    answer: str | tuple[str, str] = "output"
    metric: metrics.Metric | str = ""  # type: ignore[assignment]
    reads = ("logits", "text")
    layout_type = TextLayout

    def __post_init__(self) -> None:
        if not isinstance(self.answer, str):
            object.__setattr__(self, "answer", tuple(self.answer))
            if len({*self.answer}) != 2 or len(self.answer) != 2:
                raise ValueError(f"answer={self.answer!r} is no pair of columns; give one column, or two that differ.")
        default = metrics.FIRST_TOKEN if len(self.outputs) == 1 else metrics.PREFERENCE
        object.__setattr__(self, "metric", self.metric or default)
        super().__post_init__()
        check_kind(self.name, str, f"name={quoted(self.name)}", "a text")
        check_kind(self.rows, Iterable, "rows", "rows, or pairs")
        if not re.fullmatch(r"[\w.-]([\w. -]*[\w.-])?", self.name):
            raise ValueError(f"name={self.name!r} cannot be a file's; take letters, digits, '_', '-', '.' and spaces.")
        placeholder, columns = f"{{{self.needs}}}", _columns(self.template)
        once = columns.count(self.needs) == self.template.count(placeholder) == 1 and columns[-1] == self.needs
        if not once or len(columns) < 2 or not self.stop:
            raise ValueError(f"template={self.template!r} must hold a column, {placeholder} once, and an end of it.")
        rows = [dict(row) if isinstance(row, Mapping) else row for row in self.rows]
        kinds = {row.get("task", "") for row in rows if isinstance(row, dict) and "task" not in self.inputs}
        if len(kinds) > 1:
            raise ValueError(f"rows of {self.name!r} are of {join_names(sorted(kinds))}; give those of one task.")
        rows = [{**row, "task": self.name} if kinds - {""} and isinstance(row, dict) else row for row in rows]
        object.__setattr__(self, "rows", self.read(rows))
        if len(self.rows) < 2:
            raise ValueError(f"{self.name!r} has {len(self.rows)} row(s); a prompt needs an example and a query.")
        seen: set[str] = set()
        for row in self.rows:
            if (query := self._query(row)) in seen:
                raise ValueError(f"{self.name!r} asks {query[-80:]!r} twice; give each question once.")
            seen.add(query)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The column of the answer, or the pair of them."""
        return (self.answer,) if isinstance(self.answer, str) else self.answer

    @property
    def needs(self) -> str:
        """The column of the true answer."""
        return self.outputs[0]

    @property
    def _parts(self) -> tuple[str, str]:
        """The template before the answer, and after it."""
        question, _, stop = self.template.partition(f"{{{self.needs}}}")
        return question, stop

    @property
    def stop(self) -> str:
        """What ends an answer, as prompts have it: "}" where the template has "}}"."""
        return self._parts[1].format()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns of a query."""
        return tuple(dict.fromkeys(_columns(self._parts[0])))

    def read(self, rows: Iterable[Row], answered: bool = True) -> tuple[Row, ...]:
        """The task's columns of some rows, as texts; of rows with a column "task", those that are this task's.

        Raises:
            ValueError: naming the row and the column that is missing or empty, or an answer that holds what ends it.
        """
        texts, inputs, stop = [], self.inputs, self.stop
        columns = (*inputs, *self.outputs) if answered else inputs
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ValueError(f"row {number} of {self.name!r} is {row!r:.80}; expected {{column: text}}.")
            if "task" not in inputs and row.get("task", self.name) != self.name:
                continue
            texts.append({name: _text(row.get(name)) for name in columns})
            if several := [name for name in columns if isinstance(row.get(name), SEVERAL)]:
                raise ValueError(f"row {number} of {self.name!r} is {_short(row)}; give one text as {several[0]!r}.")
            if empty := [name for name in columns if not texts[-1][name]]:
                raise ValueError(f"row {number} of {self.name!r} has no {empty[0]!r}; it has {_short(row)}.")
            if answered and any(stop in texts[-1][name] for name in self.outputs):
                raise ValueError(f"the answer in row {number} of {self.name!r} holds {stop!r}, which ends it.")
        return tuple(texts)

    def split(self, seed: int = 0) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
        """Rows to learn from and, three in ten, rows to test on: no input of one is in the other. Where an answer of
        one row is another's input, as in lists of antonyms, rows that share any word are on one side.

        Raises:
            ValueError: when all rows hang together.
        """
        check_whole(seed=seed)
        groups = self._groups(self.rows)
        order = np.random.default_rng(seed).permutation(groups.max() + 1)
        sizes = np.bincount(groups)[order]
        wanted, held = max(1, round(TEST_SHARE * len(groups))), np.zeros(len(groups), dtype=bool)
        for group, size in zip(order, sizes):
            if held.sum() + size <= wanted:
                held |= groups == group
        if not held.any():
            raise ValueError(f"the rows of {self.name!r} share words so that no part can be kept for tests; give more.")
        return tuple(np.array(self.rows)[~held]), tuple(np.array(self.rows)[held])

    def prompts(
        self,
        rows: Iterable[Row],
        n: int = 100,
        seed: int = 0,
        layout: TextLayout | None = None,
        *,
        shots: int = 8,
        positions: int = 1,
    ) -> TextPrompts:
        """`n` prompts of random examples; the same seed gives the same prompts, and all rows are asked equally often.

        Args:
            rows: One side of `split`, or rows with the same columns. No example shares a word with its query where
                `split` would keep them together.
            n: Number of prompts.
            seed: Of what is drawn.
            layout: A model's, for its positions; the template is the task's own.
            shots: Examples in each.
            positions: How many of the last tokens vectors and sets hold.

        Raises:
            ValueError: when the rows are too few for so many examples.
        """
        drawn, positions = self.draw(rows, n, seed, shots=shots), layout.positions if layout else positions
        return TextPrompts.cat([self.prompt(examples, query, positions=positions) for examples, query in drawn])

    def draw(
        self, rows: Iterable[Row], n: int, seed: int = 0, *, shots: int = 8
    ) -> Iterator[tuple[tuple[Row, ...], Row]]:
        """The examples and the query of each of the `prompts` that these arguments make."""
        check_whole(n=n, shots=shots, seed=seed)
        rows, generator = self.read(rows), np.random.default_rng(seed)
        if n < 1 or not 0 <= shots < len(rows):
            raise ValueError(f"n={n} prompts of {self.name!r} with shots={shots} cannot be made of {len(rows)} rows.")
        groups = self._groups(rows)
        for query in np.concatenate([generator.permutation(len(rows)) for _ in range(-(-n // len(rows)))])[:n]:
            others = np.flatnonzero(groups != groups[query])
            if len(others) < shots:
                raise ValueError(f"{rows[query]} of {self.name!r} shares words with all but {len(others)} other rows.")
            yield tuple(rows[i] for i in generator.choice(others, shots, replace=False)), rows[query]

    def prompt(self, examples: Row | Sequence[Row], query: Row | str, *, positions: int = 1) -> TextPrompts:
        """One prompt: the examples solved, and the query, with its answer where that is known.

        Args:
            examples: Rows, or one; [] for a zero-shot prompt.
            query: A row; a text where the template has one column beside the answer.
            positions: As for `prompts`.
        """
        examples = self.read([examples] if isinstance(examples, Mapping) else examples)
        query = {self.inputs[0]: query} if isinstance(query, str) else query
        check_kind(query, Mapping, f"query={quoted(query)}", "a row, or a text")
        answered = all(query.get(name) is not None for name in self.outputs)
        (query,) = self.read([{name: query.get(name) for name in (*self.inputs, *self.outputs)}], answered)
        asked = self._query(query)
        space = asked[len(asked.rstrip()) :]
        answers: list[Any] = [(space + query[name],) if answered else None for name in self.outputs]
        numbers = [[number_of("\n".join(row[name] for name in self.inputs)) for row in (*examples, query)]]
        return TextPrompts(
            ("".join(self.template.format_map(row) for row in examples) + asked.rstrip(),),
            answers[0],
            TextLayout(self.template, len(examples), positions, self.stop),
            (asked.rstrip(),),
            torch.tensor(numbers),
            answers[1] if len(answers) > 1 else None,
        )

    def _query(self, row: Row) -> str:
        """A row's text up to its answer, with the space before it."""
        return self._parts[0].format_map(row)

    def _groups(self, rows: Sequence[Row]) -> np.ndarray:
        """A number for each row [row]: rows of one number are to stay together."""
        asked = ["\n".join(row[name] for name in self.inputs).casefold() for row in rows]
        answers = [row[self.needs].casefold() for row in rows]
        first = {text: number for number, text in reversed(list(enumerate(asked)))}
        of_one_kind = any(first.get(answer, number) != number for number, answer in enumerate(answers))
        words = [{text, answer} if of_one_kind else {text} for text, answer in zip(asked, answers)]
        numbers = {word: number for number, word in enumerate(sorted(set().union(*words)))}
        pairs = np.array([(row, numbers[word]) for row, part in enumerate(words) for word in part]).reshape(-1, 2)
        holds = csr_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(rows), len(numbers)))
        groups: np.ndarray = connected_components(holds @ holds.T, directed=False)[1]
        return groups


class Words(Text):
    """Pairs of words, such as "hot" and "cold".

    Args:
        name, template, metric: As of `Text`; the template has {input} and {output}.
        pairs: Input → output; or pairs; or rows with "input" and "output", as function_vectors' data sets have them.

    Raises:
        ValueError: as `Text`.
    """

    def __init__(
        self,
        name: str,
        pairs: Mapping[str, str] | Iterable[Row | Sequence[str]],
        template: str = TEMPLATE,
        metric: metrics.Metric | str = "",
    ) -> None:
        rows: list[Row] = []
        check_kind(pairs, Iterable, "pairs", "{input: output}, pairs or rows")
        for pair in pairs.items() if isinstance(pairs, Mapping) else pairs:
            two = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
            if not two and not isinstance(pair, Mapping):
                raise ValueError(f"{pair!r} is not a pair of {name!r}; give an input and an output.")
            rows.append(pair if isinstance(pair, Mapping) else dict(zip(("input", "output"), pair)))
        super().__init__(name, tuple(rows), template, metric=metric)


def words(name: str, template: str = TEMPLATE) -> Words:
    """The task of a list that the package carries (see `WORDS`).

    Raises:
        ValueError: naming the lists there are.
    """
    if not isinstance(name, str) or name not in _LISTS:
        raise ValueError(f"{name!r} is not a list of words; choose from {', '.join(WORDS)}, or give tasks.Words yours.")
    return Words(name, _LISTS[name], template)


def _columns(template: str) -> tuple[str, ...]:
    """The columns that a template asks for.

    Raises:
        TypeError, ValueError: naming the template, when it is none.
    """
    check_kind(template, str, f"template={quoted(template)}", f"a text such as {TEMPLATE!r}")
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template={template!r}: {error}; write {{column}}, and {{{{ or }}}} for a brace.") from error
    if any(form or kind or name == "" for _, name, form, kind in parts):
        raise ValueError(f"template={template!r} has more or less than a name between braces; write {{column}}.")
    return tuple(name for _, name, _, _ in parts if name is not None)


def _text(value: Any) -> str:
    """A cell as a text, stripped; "" for one that is missing, also as pandas has it."""
    missing = value is None or not isinstance(value, str) and str(value) in ("nan", "<NA>")
    return "" if missing else str(value).strip()


def _short(row: Row) -> str:
    return repr(dict(row))[:120]
