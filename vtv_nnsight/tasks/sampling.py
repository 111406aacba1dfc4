"""Which rows make which prompt: drawn at random, the same for a seed, of one class where the data has labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Draw:
    """Which rows make which prompt, and where their random places are; a part of it by indexing.

    Args:
        rows: Row numbers [prompt, examples + 1], the query's last.
        places: A `Place` for each prompt, [prompt, 2].
    """

    rows: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, prompts: slice | Sequence[int] | np.ndarray) -> Draw:
        return Draw(self.rows[prompts], self.places[prompts])


def draw(images: Any, n: int, examples: int = 1, seed: int | np.random.Generator = 0) -> Draw:
    """Draw rows and places for `n` prompts of so many examples; see `draw_rows`."""
    generator = np.random.default_rng(seed)
    return Draw(draw_rows(images, n, examples, generator), generator.random((n, 2)))


def draw_queries(images: Any, queries: Sequence[int], examples: int = 1, seed: int | np.random.Generator = 0) -> Draw:
    """Draw the examples of given queries at random, of the query's class where the data has labels; and the places.

    Args:
        images: A datasets.Dataset or a sequence of rows.
        queries: Row numbers, one for each prompt.
        examples: For each prompt.
        seed: Of what is drawn.

    Raises:
        ValueError: when a query has too few others of its class.
    """
    generator = np.random.default_rng(seed)
    rows = _with_examples(_classes(images), np.asarray(queries, dtype=np.int64), examples, generator)
    return Draw(rows, generator.random((len(rows), 2)))


def draw_rows(images: Any, n: int, examples: int, generator: np.random.Generator) -> np.ndarray:
    """Draw rows for prompts: [n, examples + 1] row numbers, the query last.

    Queries are drawn without replacement, from all rows again where there are fewer than `n`: each row is the query as
    often as any other, give or take one. The rows of a prompt are distinct and of one class where the data has labels.

    Raises:
        TypeError: when the data have no rows by number, such as a streaming data set.
        ValueError: when no class has enough images.
    """
    if n < 1:
        raise ValueError(f"n={n} prompts were asked for; expected 1 or more.")
    if isinstance(images, str) or not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        raise TypeError(f"{type(images).__name__} has no rows by number; give a Dataset, or list(images.take(1000)).")
    classes = _classes(images)
    able = np.flatnonzero(np.bincount(classes)[classes] > examples)
    if not len(able):
        what = "images" if labels_of(images) is None else "images of a class"
        raise ValueError(f"a prompt needs {examples + 1} different {what}; take more rows (--max-images).")
    turns = [generator.permutation(able) for _ in range(-(-n // len(able)))]
    return _with_examples(classes, np.concatenate(turns)[:n], examples, generator)


def _classes(images: Any) -> np.ndarray:
    """A number for the class of every row [row], the same for all where there are no labels."""
    labels = labels_of(images)
    return np.zeros(len(images), np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]


def _with_examples(
    classes: np.ndarray, queries: np.ndarray, examples: int, generator: np.random.Generator
) -> np.ndarray:
    """Row numbers [query, examples + 1]: other rows of each query's class, drawn at random, and the query."""
    groups = {number: np.flatnonzero(classes == number) for number in np.unique(classes[queries])}
    rows = np.empty((len(queries), examples + 1), np.int64)
    for row, query in zip(rows, queries):
        others = groups[classes[query]][groups[classes[query]] != query]
        if len(others) < examples:
            raise ValueError(f"row {query} has {len(others)} others of its class and a prompt needs {examples}.")
        row[:] = *generator.choice(others, size=examples, replace=False), query
    return rows


def labels_of(images: Any) -> np.ndarray | None:
    """The label of every row of data [row]; None where rows have none."""
    if hasattr(images, "column_names"):
        if "label" not in images.column_names:
            return None
        return np.asarray(images.with_format(None)["label"])  # whatever the format is: a transform reads all of a row
    named = len(images) and isinstance(images[0], Mapping) and "label" in images[0]
    return np.asarray([row["label"] for row in images]) if named else None
