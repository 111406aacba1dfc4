"""The answers that a search was given, on disk, so that a search that died can be given them again.

A search is a function of its seed and of the answers to what it asked: the losses of masks on prompts, or gradients. So
its answers are all the state there is to keep, whatever the algorithm. Resuming runs the algorithm from its start; it
asks the same questions, and the journal answers those that were answered before. The end is that of an unbroken run.

A journal is text: a line of facts about the run, then a line for every answer. Lines are appended whole, and a line
that a kill cut short is dropped, with nothing before it touched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

SYNC_EVERY = 5.0
"""Seconds between two times that the system is told to put the journal on the disk itself."""


class Answer(NamedTuple):
    """One line.

    Args:
        query: Digest of what was asked.
        count: How many rows were asked about.
        seconds: When in the run it was answered.
        values: Float64 [value].
    """

    query: str
    count: int
    seconds: float
    values: torch.Tensor


class Journal:
    """Reads the answers of an earlier run, then appends.

    Args:
        path: The file; None keeps nothing.
        facts: What the run is. A journal of another run is refused.
        writes: Whether this process is the one that writes.

    Raises:
        ValueError: naming the fact that differs, or the file when it is no journal.
    """

    def __init__(self, path: str | os.PathLike | None, facts: dict[str, Any], writes: bool = True) -> None:
        self.path = Path(path) if path is not None else None
        self.answers: list[Answer] = []
        self._next = 0
        self._file = None
        facts = json.loads(json.dumps(facts))
        size = self._read(facts) if self.path is not None and self.path.exists() else 0
        if self.path is None or not writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("r+b" if size else "wb")
        self._file.truncate(size)
        self._file.seek(size)
        self._synced = time.monotonic()
        if not size:
            self._append({"vtv search": facts})

    def peek(self) -> Answer | None:
        """The answer to the next question, when it was answered before."""
        return self.answers[self._next] if self._next < len(self.answers) else None

    def take(self, query: str) -> Answer:
        """The next answer.

        Raises:
            ValueError: when it answers another question.
        """
        answer = self.answers[self._next]
        if answer.query != query:
            raise ValueError(
                f"{self.path} answers other questions than this search asks, from answer {self._next + 1} on; it was "
                "written with another version of the library or of torch: start afresh with another file."
            )
        self._next += 1
        return answer

    def write(self, answer: Answer) -> None:
        if self._file is None:
            return
        values = base64.b64encode(answer.values.numpy().astype("<f8").tobytes()).decode()
        self._append({"query": answer.query, "count": answer.count, "seconds": answer.seconds, "values": values})
        if time.monotonic() - self._synced > SYNC_EVERY:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def _read(self, facts: dict[str, Any]) -> int:
        """Take in the whole lines of the file, and tell how long they are."""
        lines, size = self.path.read_bytes().splitlines(keepends=True), 0
        for number, line in enumerate(lines):
            if not line.endswith(b"\n"):
                break
            try:
                content = json.loads(line)
                if number:
                    values = np.frombuffer(base64.b64decode(content.pop("values")), "<f8")
                    self.answers.append(Answer(**content, values=torch.from_numpy(values.astype(np.float64))))
                else:
                    _compare(content["vtv search"], facts, self.path)
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} is not the journal of a search (line {number + 1}).") from error
            size += len(line)
        if lines and not size and not lines[0].startswith(b'{"vtv search"'):
            raise ValueError(f"{self.path} is not the journal of a search (line 1).")
        return size


def digest(*arrays: torch.Tensor) -> str:
    """A name for what was asked: 16 hexadecimal digits."""
    hasher = hashlib.blake2b(digest_size=8)
    for array in arrays:
        hasher.update(str(tuple(array.shape)).encode())
        hasher.update(np.ascontiguousarray(array.detach().cpu().numpy()).tobytes())
    return hasher.hexdigest()


def _compare(found: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{path} is of another search: its {name} is {found.get(name)!r}, this one's {expected.get(name)!r}; "
                "give another file, or the settings it was begun with."
            )
