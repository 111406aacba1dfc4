"""What every source refuses in the same words, and how some of its rows are drawn."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

SPLITS = ("train", "validation", "test")
"""Of the sources that are divided in three."""


def at_most(rows: Dataset, n: int | None, seed: int) -> Dataset:
    """At most `n` rows, drawn at random and in their order; all of them where `n` is None."""
    if n is None or n >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).choice(len(rows), n, replace=False)))
