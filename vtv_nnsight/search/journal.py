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
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from vtv_nnsight.digests import tensor_digest

SYNC_EVERY = 5.0
"""Seconds between two times that the journal is flushed to the disk itself."""


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
    """Reads the answers of an earlier run of a search, then appends.

    Args:
        path: The file; None keeps nothing.
        settings: What the search is. The journal of another is refused.

    Raises:
        ValueError: naming the setting that differs, or the line that is damaged, or why the file cannot be used.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.answers: list[Answer] = []
        self._next = 0
        self._file: BinaryIO | None = None
        self._synced = time.monotonic()
        if path is None:
            return
        self.path = Path(path)
        settings = json.loads(json.dumps(settings))
        try:
            size = self._read(settings) if self.path.exists() else 0
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if size else "wb")
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be a search's journal ({error.strerror}); give another file."
            ) from error
        self._file.truncate(size)
        self._file.seek(size)
        if not size:
            self._append(self._file, {"vtv search": settings})

    def peek(self) -> Answer | None:
        """The answer to the next question, when it was answered before."""
        return self.answers[self._next] if self._next < len(self.answers) else None

    def take(self, query: str, rows: int, values: int) -> Answer:
        """The next answer.

        Args:
            query, rows: The question's digest, and how many rows it has.
            values: How many values the answer has.

        Raises:
            ValueError: when it answers another question.
        """
        answer = self.answers[self._next]
        if (answer.query, answer.rows, answer.values.numel()) != (query, rows, values):
            raise ValueError(
                f"{self.path} answers other questions than this search asks, from answer {self._next + 1} on; it was "
                "written for other scores, or with another version of the library or of torch: start afresh with "
                "another file."
            )
        self._next += 1
        return answer

    def write(self, answer: Answer) -> None:
        """Append an answer."""
        if self._file is None:
            return
        values = base64.b64encode(answer.values.numpy().astype("<f8").tobytes()).decode()
        line = {"query": answer.query, "count": answer.rows, "seconds": answer.seconds, "values": values}
        self._append(self._file, line | {"checksum": tensor_digest(answer.values)})
        if time.monotonic() - self._synced > SYNC_EVERY:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    @staticmethod
    def _append(file: BinaryIO, line: dict[str, Any]) -> None:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()

    def _read(self, settings: Mapping[str, Any]) -> int:
        """Take in the whole lines of the file, and tell how many bytes they are."""
        lines, size = self.path.read_bytes().splitlines(keepends=True), 0
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            if number == 1:
                _compare(_header(line, self.path), settings, self.path)
            else:
                try:
                    self.answers.append(_answer(line))
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise ValueError(
                        f"{self.path} is damaged at line {number}; remove it to search from the start, or cut it there."
                    ) from error
            size += len(line)
        if lines and not size and not lines[0].startswith(b'{"vtv search"'):
            raise ValueError(f"{self.path} is not the journal of a search (line 1).")
        return size


def _header(line: bytes, path: Path) -> dict[str, Any]:
    """The settings in a journal's first line."""
    try:
        settings: dict[str, Any] = json.loads(line)["vtv search"]
        settings.items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not the journal of a search (line 1).") from error
    return settings


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
            raise ValueError(
                f"{path} is of another search: its {within}{name} is {theirs!r}, this one's {ours!r}; "
                "give another file, or the settings it was begun with."
            )
