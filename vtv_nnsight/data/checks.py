"""What every source refuses in the same words, and how some of its rows are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from vtv_nnsight.text import join_words, quoted

SPLITS = ("train", "validation", "test")
"""Of the sources that are divided in three."""


def check_split(split: str | None, splits: Sequence[str | None]) -> None:
    """Refuse a split that is not one of those.

    Raises:
        ValueError: naming those that there are.
    """
    if split not in splits:
        known = join_words([repr(name) for name in splits if name is not None], "or")
        raise ValueError(f"split={quoted(split)} is unknown; choose {known}.")


def at_most(rows: Dataset, n: int | None, seed: int) -> Dataset:
    """At most `n` rows, drawn at random and in their order; all of them where `n` is None."""
    if n is None or n >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).choice(len(rows), n, replace=False)))
