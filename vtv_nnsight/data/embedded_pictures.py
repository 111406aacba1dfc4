"""Real pictures that the package carries: nothing is downloaded.

Each row shows one thing of a named class, with its exact mask. Some are photographs as they were taken; most are
objects cut out of one picture and put over another: photographs (about two thirds of the rows), and renderings of
furniture and of emoji, over photographs of landscapes, cities, rooms and the sea. Object and background are lit alike,
edges are soft, and things cast a shadow.

There are fewer sources than rows: an object serves up to six times, each time at another size and place on another
background. `credits` lists every source picture, with its licence and author: all are in the public domain or under
CC0, CC BY or MIT. Train and test share none, and no picture of "test" is in what the embedded model was trained on.

The rows were composed of what `credits` lists, by the script docs/compose_pictures.py of the repository.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow.parquet as parquet
from datasets import ClassLabel, Dataset, Features, Image, Value

from vtv_nnsight.data.checks import at_most
from vtv_nnsight.progress import quiet
from vtv_nnsight.text import check_choice

SPLITS = ("train", "test")
SIZE = 112
"""Height and width of a picture, in pixels."""

EMBEDDED = Path(__file__).with_name("embedded")
"""The folder of the files: one of rows for each split, credits.csv, and a photograph to try."""
SAMPLE = EMBEDDED / "sample.jpg"
"""Tulips by riaphotographs, from wesaturate (CC0); the embedded model has not learned from it."""


def pictures(split: str = "train", n: int | None = None, seed: int = 0) -> Dataset:
    """The pictures of a split, with the columns image (RGB, `SIZE` on a side), mask ("L", 0 or 255), label, name (what
    the source calls the thing), licence, source (the package and file of the object, then of the background) and each
    of the two apart: object and background, which are the same of a photograph as it was taken.

    Each label has at least two rows of different objects in a split that has it. The two splits know the same labels,
    but have not all of them: `set(rows["label"])`.

    Args:
        split: "train" (about 600 rows) or "test" (about 300).
        n: At most so many rows, drawn at random; all of them without.
        seed: Of what is drawn.

    Raises:
        ValueError: for another split.
    """
    check_choice(SPLITS, split=split)
    with quiet():
        rows = Dataset(parquet.read_table(EMBEDDED / f"{split}.parquet")).cast(features())
    parts = [source.split("; ") for source in rows["source"]]
    for name, part in (("object", 0), ("background", -1)):
        rows = rows.add_column(name, [names[part] for names in parts])
    return at_most(rows, n, seed)


def credits() -> list[dict[str, str]]:
    """The source pictures, a dict each: split, label (empty for a background), look ("photograph", "render" or
    "drawing"), licence, author, client (the package manager), package, version, file (its path in the package) and
    title; cut and scene say how docs/compose_pictures.py treats it."""
    with open(EMBEDDED / "credits.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def features() -> Features:
    """Of the data set; labels are the classes of the credits, in alphabetical order."""
    names = sorted({row["label"] for row in credits()} - {""})
    text = {"name": Value("string"), "source": Value("string"), "licence": Value("string")}
    return Features({"image": Image(mode="RGB"), "mask": Image(mode="L"), "label": ClassLabel(names=names), **text})
