"""Words about values, for errors, captions and progress."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def join_names(names: Iterable[str], most: int = 4) -> str:
    """Some of the names, and how many more there are."""
    names = [name if len(name) <= 80 else f"{name[:77]}..." for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "no tensors at all"


def join_words(words: Iterable[str], by: str = "and") -> str:
    """One word or more as a sentence has them: "a, b and c"."""
    *others, last = words
    return f"{', '.join(others)} {by} {last}" if others else last


def in_words(value: Any) -> str:
    """A setting, as JSON holds it: a list's items with commas between them."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def printable(text: str) -> str:
    """Text with names of files in it: bytes that are not UTF-8 as "\\xe9"."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def shortened(text: str, most: int = 200) -> str:
    """Text in which no word is longer: of one that is, its two ends."""
    return re.sub(rf"\S{{{most + 1},}}", lambda word: f"{word[0][: most // 2]}…{word[0][-most // 4 :]}", text)


def quoted(value: Any) -> str:
    """A value as an error shows it: its repr, shortened."""
    return shortened(repr(value), 80)


def check_kind(value: Any, kind: type | tuple[type, ...], what: str, instead: str) -> None:
    """Refuse what is of another kind.

    Raises:
        TypeError: saying what it is, and what to give.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{what} is a {type(value).__name__}; give {instead}.")


def check_choice(choices: Iterable[Any], **given: Any) -> None:
    """Refuse arguments, by their names, that are none of the choices that there are.

    Raises:
        ValueError: naming the first such argument, and the choices but None.
    """
    known = list(choices)
    for name, value in given.items():
        if not any(value is choice or value == choice for choice in known):
            offered = ", ".join(str(choice) for choice in known if choice is not None)
            raise ValueError(f"{name}={quoted(value)} is unknown; choose from {offered}.")


def duration(seconds: float) -> str:
    """Such as "0.4 s", "12 s" or "3 min 20 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
