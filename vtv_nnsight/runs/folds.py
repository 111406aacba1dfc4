"""The pictures of a run: of one fold, or of each of several."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from vtv_nnsight import data
from vtv_nnsight.runs.protocol import VECTOR_FOLDS
from vtv_nnsight.runs.settings import Settings

PICTURES_PER_PROMPT = 4
"""Pictures per prompt, at least, for prompts to be selected: each serves in one only."""


FOLD_DRAWS = (
    "Each fold is tested with units drawn for it from the search's probabilities; figures show the best sample."
)


class Fold(NamedTuple):
    """The pictures of one fold, or of all data where there are no folds.

    Args:
        search: Pictures to search on, in the published protocol; else searches have the prompts that were collected on.
        shares: The folder with the prompts, vectors and sets that are this fold's, too, in the published protocol.
    """

    name: str
    folder: Path
    number: int
    train: Dataset
    test: Dataset
    search: Dataset | None = None
    shares: Path | None = None


def load_folds(out: Path, settings: Settings) -> tuple[list[Fold], list[str]]:
    """The data of every fold, pictures to learn from and to test on apart; and what loading them had to say."""
    names, test = {"": settings.data}, None if is_published_detection(settings) else 2 * settings.test_prompts
    if settings.data.startswith("pascal:"):
        root, fold, published = data.pascal_argument(settings.data.removeprefix("pascal:"))
        numbers = settings.folds or (range(4) if fold is None else (fold,))
        if is_published_pascal(settings):
            return published_folds(out, settings, root, published, numbers), [FOLD_DRAWS] * settings.fold_draws
        names = {f"fold{fold}": f"pascal:{root}:{fold}" + ":masks" * (not published) for fold in numbers}
    elif settings.folds:
        raise ValueError(f"{settings.data!r} has no folds; they go with data='pascal:ROOT'.")
    folds: list[Fold] = []
    most: int | None = settings.max_images
    if settings.data == "words":  # the rows are of all lists, each of which has few
        most = test = None
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        for name, spec in names.items():
            number = int(name.removeprefix("fold") or 0)
            parts = data.split_data(spec, most, test, settings.seed)
            folds.append(Fold(name, out / name, number, *parts))
    notes = list(dict.fromkeys(str(warning.message) for warning in heard if warning.category is UserWarning))
    fewest = min(len(fold.train) for fold in folds)
    if "image" in folds[0].train.column_names and fewest < PICTURES_PER_PROMPT * settings.prompts:
        notes.append(
            f"{fewest} pictures to learn from are few: prompts are drawn at random, and pictures serve in several."
        )
    return folds, notes


def is_published_detection(settings: Settings) -> bool:
    """Whether VP's released list of detection is followed; see `runs.protocol.detection_prompts`."""
    return settings.protocol == "published" and settings.data.startswith("detection:")


def is_published_pascal(settings: Settings) -> bool:
    """Whether the released protocol on Pascal-5i is followed; see `runs.protocol`."""
    return settings.protocol == "published" and settings.data.startswith("pascal:")


def published_folds(out: Path, settings: Settings, root: str, published: bool, numbers: Sequence[int]) -> list[Fold]:
    """The folds of the released protocol: each is tested on, the first finds vectors and sets for all of them."""
    read = partial(data.pascal, root, published=published)
    train, search = read(VECTOR_FOLDS, "trn"), read(settings.search_fold, "trn")
    first = out / f"fold{numbers[0]}"
    return [
        Fold(f"fold{n}", out / f"fold{n}", n, train, read(n, "val"), search, first if n != numbers[0] else None)
        for n in numbers
    ]


def selects(settings: Settings, rows: Dataset) -> bool:
    """Whether there are enough pictures for prompts to be selected among candidates; texts are not."""
    return "image" in rows.column_names and len(rows) >= PICTURES_PER_PROMPT * settings.prompts
