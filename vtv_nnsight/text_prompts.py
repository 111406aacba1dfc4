"""A batch of prompts of a language model: texts up to where the answer begins, and what the true answers are.

>>> prompts = tasks.words("antonym").prompts(train, n=24, shots=8, seed=0)
>>> prompts.texts[0], prompts.answers[0], prompts.query_only().texts[0]
('Q: hot\\nA: cold\\n\\n…Q: big\\nA:', ' small', 'Q: big\\nA:')
>>> TextPrompts("The opposite of hot is", " cold")           # running text that follows no template
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch

from vtv_nnsight.digests import bytes_digest, json_digest
from vtv_nnsight.finite import check_whole
from vtv_nnsight.prompts import Prompts
from vtv_nnsight.text import check_kind, quoted


@dataclass(frozen=True)
class TextLayout:
    """How the texts of a batch are made.

    Args:
        template: Of an example, such as "Q: {input}\\nA: {output}\\n\\n"; "" for running text.
        shots: Number of examples before the query.
        positions: How many tokens a vector and a set of units hold, counted from the end: 1 is the last token alone.
        stop: What ends an answer, such as "\\n\\n"; "" where nothing does.
    """

    template: str = ""
    shots: int = 0
    positions: int = 1
    stop: str = ""
    MODEL_FACTS: ClassVar[tuple[str, ...]] = ()
    """What of it belongs to the model: nothing."""
    REGION: ClassVar[str] = "token"
    """What units of granularity "quadrant" are by."""

    def __post_init__(self) -> None:
        check_whole(shots=self.shots, positions=self.positions)
        if self.shots < 0 or self.positions < 1:
            raise ValueError(f"shots={self.shots} and positions={self.positions}; expected 0 and 1, or more.")

    @property
    def num_positions(self) -> int:
        """Positions that a vector holds; 0 is the prompt's last token, 1 the one before it."""
        return self.positions

    @property
    def places(self) -> dict[str, torch.Tensor]:
        """Each position by its name."""
        positions = torch.arange(self.positions)
        return dict(zip(self.place_names(positions), positions[:, None]))

    @staticmethod
    def place_names(places: torch.Tensor) -> list[str]:
        """Positions [position] by name: "last token", or "token -2", as Python counts them."""
        return [f"token {-1 - place}" if place else "last token" for place in places.tolist()]


@dataclass(frozen=True, eq=False)
class TextPrompts(Prompts):
    """Texts that a language model is to go on from.

    Args:
        texts: Each prompt up to where the answer begins; a lone string is a batch of one.
        answers: The true continuation of each, with the space before it (" small"); None without a truth.
        layout: How the texts were made.
        query_texts: The same queries without an example, which `query_only` shows; by default the texts as they are.
        identifiers: LongTensor [row, examples + 1] with a number for each row of data that is shown, the query's last:
            equal rows have equal numbers. By default one of each query's text.
        wrong_answers: For a task of pairs, the continuation of each that the true one is weighed against.

    Raises:
        ValueError: when these are not as many, or a text or an answer is empty.
    """

    texts: tuple[str, ...]
    answers: tuple[str, ...] | None = None
    layout: TextLayout = TextLayout()
    query_texts: tuple[str, ...] = ()
    identifiers: torch.Tensor = None  # type: ignore[assignment]  # set below
    wrong_answers: tuple[str, ...] | None = None
    _few_shot: TextPrompts | None = None
    noun: ClassVar[str] = "prompts"

    def __post_init__(self) -> None:
        for name in ("texts", "answers", "query_texts", "wrong_answers"):
            if (value := getattr(self, name)) is not None:
                check_kind(value, Sequence, name, "a text or several")
                strings = (value,) if isinstance(value, str) else tuple(value)
                strings = strings or (self.texts if name == "query_texts" else ())
                object.__setattr__(self, name, strings)
                if len(strings) != len(self.texts):
                    raise ValueError(f"there are {len(strings)} {name} for {len(self.texts)} texts; give one for each.")
                if (other := next((string for string in strings if not isinstance(string, str)), None)) is not None:
                    raise TypeError(f"{quoted(other)} of {name} is no text; give texts.")
                if (empty := next((i for i, string in enumerate(strings) if not string.strip()), None)) is not None:
                    raise ValueError(f"number {empty} of {name} is empty; give each at least a word.")
        if self.identifiers is None:
            numbers = [[number_of(text)] for text in self.query_texts]
            object.__setattr__(self, "identifiers", torch.tensor(numbers, dtype=torch.long).view(len(self), 1))

    @classmethod
    def cat(cls, prompts: Sequence[TextPrompts]) -> TextPrompts:
        """Prompts of one layout, one after the other.

        Raises:
            ValueError: when there are none, or they differ in layout or in what is known of their answers.
        """
        if not prompts:
            raise ValueError("there are no prompts to concatenate; give at least one.")
        first, parts = prompts[0], dict[str, Any]()
        for name in ("texts", "answers", "query_texts", "wrong_answers"):
            values = [getattr(other, name) for other in prompts]
            if len({value is None for value in values}) > 1:
                raise ValueError(f"some of these prompts have {name} and some have none; run them apart.")
            parts[name] = None if values[0] is None else tuple(string for value in values for string in value)
        if other := next((other.layout for other in prompts if other.layout != first.layout), None):
            raise ValueError(f"prompts of {first.layout} and {other} cannot share a batch; run them apart.")
        few = [other._few_shot for other in prompts if other._few_shot is not None]
        few_shot = cls.cat(few) if len(few) == len(prompts) else None
        return cls(
            **parts, layout=first.layout, identifiers=torch.cat([p.identifiers for p in prompts]), _few_shot=few_shot
        )

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: int | slice | Sequence[int] | torch.Tensor) -> TextPrompts:
        """Some of the rows, always as a batch: an int gives a batch of one."""
        kept = torch.arange(len(self))[rows.cpu() if isinstance(rows, torch.Tensor) else rows].flatten().tolist()
        strings: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else tuple(value[i] for i in kept)
            for name in ("texts", "answers", "query_texts", "wrong_answers")
        }
        few_shot = None if self._few_shot is None else self._few_shot[kept]
        return replace(self, **strings, identifiers=self.identifiers[kept], _few_shot=few_shot)

    def to(self, *args: Any, **kwargs: Any) -> TextPrompts:
        """The same: texts lie on no device, the model moves their tokens."""
        return self

    def query_only(self) -> TextPrompts:
        """The zero-shot form: the same queries with no example before them."""
        if not self.layout.shots:
            return self
        return replace(
            self,
            texts=self.query_texts,
            layout=replace(self.layout, shots=0),
            identifiers=self.identifiers[:, -1:],
            _few_shot=self,
        )

    def one_shot(self) -> TextPrompts:
        """The form with examples, of prompts that `query_only` made; others as they are."""
        return self._few_shot or self

    @property
    def queries(self) -> torch.Tensor:
        """A number for each row's query, LongTensor [row]: rows of one number ask the same."""
        return self.identifiers[:, -1]

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        """What rows may share: their "query"."""
        return {"query": self.queries}

    @property
    def digest(self) -> str:
        """A name for all that the texts and answers say."""
        return json_digest([self.texts, self.answers, self.wrong_answers])

    def check_truth(self) -> None:
        """Refuse prompts without answers.

        Raises:
            ValueError: saying how they are given.
        """
        if self.answers is None:
            raise ValueError("these prompts have no answers to be scored by; give TextPrompts(texts, answers).")

    def same_queries(self, other: TextPrompts) -> bool:
        """Whether others ask the same and have the same answers, row for row."""
        return torch.equal(self.queries, other.queries) and self.answers == other.answers

    @property
    def facts(self) -> dict[str, Any]:
        """All but the identifiers, as JSON values."""
        names = ("texts", "answers", "query_texts", "wrong_answers")
        return {name: getattr(self, name) for name in names} | {"layout": asdict(self.layout)}

    @classmethod
    def of(cls, facts: Mapping[str, Any], identifiers: torch.Tensor) -> TextPrompts:
        """The prompts of `facts` and identifiers."""
        return cls(**{**facts, "layout": TextLayout(**facts["layout"])}, identifiers=identifiers)

    def shown(self) -> dict[str, Any]:
        """The texts and the answers."""
        return {"prompt": self.texts, "truth": self.answers or ()}

    def __repr__(self) -> str:
        if not len(self):
            return "TextPrompts(0 prompts)"
        answer = f" → {self.answers[0]!r}" if self.answers else ""
        text = self.texts[0] if len(self.texts[0]) <= 200 else f"{self.texts[0][:60]}…{self.texts[0][-130:]}"
        return f"TextPrompts({len(self)} prompts, {self.layout.shots} example(s), the first: {text!r}{answer})"


def number_of(text: str) -> int:
    """A number for a text, the same on every machine."""
    return int(bytes_digest(text.encode(), 7), 16)
