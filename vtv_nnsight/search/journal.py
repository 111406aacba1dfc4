"""The answers that a search was given, on disk, so that a search that died can be given them again.

A search is a function of its seed and of the answers to what it asked: the losses of masks on prompts, or gradients. So
its answers are all the state there is to keep, whatever the algorithm. Resuming runs the algorithm from its start; it
asks the same questions, and the journal answers those that were answered before. The end is that of an unbroken run.

A journal is text, a JSON object on every line: first the settings of the search, then its answers. Lines are appended
whole, and a last line that a kill cut short is dropped, with nothing before it touched. An answer's checksum tells
values that were damaged on the disk.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vtv_nnsight.digests import tensor_digest
from vtv_nnsight.files import check_place, naming


class Answer(NamedTuple):
    """One line.

    Args:
        query: Digest of the question.
        rows: How many rows the question has.
        seconds: When in the search it was answered.
        values: Float64 [value].
    """

    query: str
    rows: int
    seconds: float
    values: torch.Tensor


class Journal:
    """Reads the answers of an earlier run of a search, then appends. It keeps the time, too.

    Args:
        path: The file; None keeps nothing.
        settings: What the search is. The journal of another is refused.

    Raises:
        ValueError: naming the setting that differs, or the line that is damaged.
        OSError: naming the file, when it cannot be written.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.answers: list[Answer] = []
        self._next = 0
        self._started = time.perf_counter()
        if self.path is None:
            return
        settings = json.loads(json.dumps(settings))
        check_place(self.path)
        size = self._read(self.path, settings) if self.path.exists() else 0
        with naming(self.path), self.path.open("ab") as file:
            file.truncate(size)
        if not size:
            self._append({"vtv search": settings})

    @property
    def seconds(self) -> float:
        """Time spent, that of interrupted runs before this one included."""
        return time.perf_counter() - self._started

    @property
    def next_rows(self) -> int | None:
        """How many rows the next question has, when it was answered before."""
        return self.answers[self._next].rows if self._next < len(self.answers) else None

    def answer(self, question: tuple[torch.Tensor, ...], evaluate: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The answer to the next question: as it was given before, or `evaluate(*question)`, which is written down.

        Args:
            question: Tensors; the first one has as many rows as the answer.
            evaluate: Answers it: float64 [row, value] on the CPU.

        Returns:
            Float64 [row, value].

        Raises:
            ValueError: when the next line answers another question.
        """
        query, rows = tensor_digest(*question), len(question[0])
        if self.next_rows is None:
            values = evaluate(*question)
            encoded = base64.b64encode(values.numpy().astype("<f8").tobytes()).decode()
            line = {"query": query, "count": rows, "seconds": self.seconds, "values": encoded}
            self._append(line | {"checksum": tensor_digest(values.flatten())})
            return values
        known = self.answers[self._next]
        if (known.query, known.rows) != (query, rows):
            number = self._next + 1
            raise ValueError(f"{self.path} answers other questions than this search asks, from answer {number} on.")
        self._next += 1
        self._started = time.perf_counter() - known.seconds
        return known.values.view(rows, -1)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.path is not None:
            with naming(self.path), self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")

    def _read(self, path: Path, settings: Mapping[str, Any]) -> int:
        """Take in the whole lines of the file, and tell how many bytes they are."""
        content = path.read_bytes()
        if content and not content.startswith(b'{"vtv search": {'):
            raise ValueError(f"{path} is not the journal of a search (line 1).")
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                if number > 1:
                    self.answers.append(_answer(line))
                else:
                    written = json.loads(line)["vtv search"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{path} is damaged at line {number}; remove it, or cut it there.") from error
            if number == 1:
                _compare(written, settings, path)
        return len(whole)


def _answer(line: bytes) -> Answer:
    """The answer in a line; raises where it is none."""
    content = json.loads(line)
    query, count, seconds = content["query"], content["count"], float(content["seconds"])
    numbers = np.frombuffer(base64.b64decode(content["values"], validate=True), "<f8")
    values = torch.from_numpy(numbers.astype(np.float64))
    whole = type(query) is str and type(count) is int and count > 0 and len(values) and len(values) % count == 0
    whole = whole and math.isfinite(seconds) and bool(values.isfinite().all())
    if not whole or content["checksum"] != tensor_digest(values):
        raise ValueError("the answer is not whole")
    return Answer(query, count, seconds, values)


def _compare(written: Mapping[str, Any], expected: Mapping[str, Any], path: Path, within: str = "") -> None:
    """Refuse the settings of another search, naming one that differs."""
    for name in sorted(written.keys() | expected.keys()):
        ours, theirs = expected.get(name), written.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            _compare(theirs, ours, path, f"{within}{name} ")
        elif ours != theirs:
            raise ValueError(f"{path} is of another search: its {within}{name} is {theirs!r}, this one's {ours!r}.")
