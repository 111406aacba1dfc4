"""Words about values, for errors and captions."""

from __future__ import annotations

from collections.abc import Iterable


def join_names(names: Iterable[str], most: int = 4) -> str:
    """Some of the names, and how many more there are."""
    names = [name if len(name) <= 80 else f"{name[:77]}..." for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "no tensors at all"
