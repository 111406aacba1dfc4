"""Data by a short name, as the command line takes it, and their division into pictures to learn from and to test on.

    >>> images = data.load("pascal:/data:0", "train")
    >>> train, test = data.split_data("photos/holiday", train=500, test=100)

A source is declared once, in `SOURCES`; the command line, its help and the tests read it there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, get_dataset_split_names

from vtv_nnsight import tasks
from vtv_nnsight.data.checks import SPLITS, at_most
from vtv_nnsight.data.drawn_scenes import scenes
from vtv_nnsight.data.embedded_pictures import pictures
from vtv_nnsight.data.folders import folder, pairs
from vtv_nnsight.data.hub_datasets import hub
from vtv_nnsight.data.pascal_voc import detection, pascal
from vtv_nnsight.digests import bytes_digest, json_digest
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.text import check_choice, check_kind, quoted

DRAWN = 500
"""Rows of a generated source by default."""


Load = Callable[[str, "str | None", int, int], Dataset]


class Source(NamedTuple):
    """Where pictures come from.

    Args:
        name: Its name.
        argument: What stands after the name and a colon, as people read it: "ROOT[:FOLD]"; "" where nothing does.
        help: What it is, in a sentence without a full stop.
        load: `load(argument, split, n, seed)` → rows of a split ("train", "validation", "test", or None for all rows of
            a source that is not divided and else for "train"): `n` that are drawn for them, or all that there are. No
            picture of "train" is in the others.
    """

    name: str
    argument: str
    help: str
    load: Load

    @property
    def usage(self) -> str:
        """How it is written: "pascal:ROOT[:FOLD]"."""
        return f"{self.name}:{self.argument}" if self.argument else self.name


SOURCES: dict[str, Source] = {}
"""What `load` takes: name → Source."""


def _source(name: str, argument: str = "") -> Callable[[Load], Load]:
    """Declare the source that a function loads; the function's docstring says what it is."""

    def declare(load: Load) -> Load:
        SOURCES[name] = Source(name, argument, " ".join((load.__doc__ or "").rstrip(".").split()), load)
        return load

    return declare


@_source("scenes")
def _scenes(_: str, split: str | None, n: int, seed: int) -> Dataset:
    """generated scenes with masks and classes"""
    return scenes(split or "train", n, seed)


@_source("pictures")
def _pictures(_: str, split: str | None, n: int, seed: int) -> Dataset:
    """real things that the package carries, with masks and classes"""
    return pictures(_half(split, "train", "test"))


@_source("pascal", "ROOT[:FOLD][:masks]")
def _pascal(argument: str, split: str | None, n: int, seed: int) -> Dataset:
    """Pascal VOC with masks, all classes or one fold of Pascal-5i; of the published lists, or with :masks at its end of
    all masks that are there"""
    root, fold, published = pascal_argument(argument)
    return pascal(root, fold, _half(split, "trn", "val"), published=published)


@_source("detection", "ROOT[:LARGEST]")
def _detection(argument: str, split: str | None, n: int, seed: int) -> Dataset:
    """single objects of Pascal VOC with boxes of at most LARGEST of the picture: 0.5 (the paper's, the default) or
    0.2 (the released code's)"""
    root, largest = detection_argument(argument)
    return detection(root, _half(split, "trn", "val"), largest=largest)


@_source("hub", "NAME[:SPLIT]")
def _hub(argument: str, split: str | None, n: int, seed: int) -> Dataset:
    """a data set of the Hub, divided as it is or one split of it divided here"""
    name, _, part = argument.partition(":")
    if part:
        return _divided(hub(name, part), split, argument)
    if split and split not in SPLITS:
        return hub(name, split)
    parts = get_dataset_split_names(name)
    first = "train" if "train" in parts else parts[0]
    held_out = [part for part in (split, "test", "validation") if part and part in parts and part != first]
    if not held_out:
        return _divided(hub(name, first), split, name)
    return hub(name, _half(split, first, held_out[0]))


@_source("words")
def _words(_: str, split: str | None, n: int, seed: int) -> Dataset:
    """lists of words for language models, each a task"""
    check_choice((None, *SPLITS), split=split)
    side = 0 if split in (None, "train") else 1
    return Dataset.from_list([{"task": name, **row} for name in tasks.WORDS for row in tasks.words(name).split()[side]])


@_source("pairs", "PATH")
def _pairs(path: str, split: str | None, n: int, seed: int) -> Dataset:
    """pictures in PATH/inputs and what becomes of them in PATH/answers"""
    return _divided(pairs(path), split, path)


@_source("folder", "PATH")
def _folder(path: str, split: str | None, n: int, seed: int) -> Dataset:
    """a folder of pictures; its path alone will do, unless it is a source's name"""
    return _divided(folder(path), split, path)


def _half(split: str | None, train: str, test: str) -> str:
    """The name of a split in a source of two parts; one that `load` does not know is left for the source to refuse."""
    if split is None or split == "train":
        return train
    return test if split in SPLITS else split


def detection_argument(argument: str) -> tuple[str, float]:
    """Root and the largest share of "ROOT[:LARGEST]"."""
    root, _, share = argument.rpartition(":")
    return (root, float(share)) if root and share.replace(".", "", 1).isdecimal() else (argument, 0.5)


def pascal_argument(argument: str) -> tuple[str, int | None, bool]:
    """Root, fold (None for all), and whether the lists are the published ones, of "ROOT[:FOLD][:masks]"."""
    place = argument.removesuffix(":masks")
    root, _, fold = place.rpartition(":")
    numbered = root and fold.isdecimal()
    return root if numbered else place, int(fold) if numbered else None, place == argument


def load(spec: str, split: str | None = None, n: int | None = None, seed: int = 0) -> Dataset:
    """Rows for tasks.

    No picture of "train" is in "validation" or "test", whatever the seeds. Where a source has two parts, these two are
    the same part. A source that is not divided (a folder; one split of a Hub data set) keeps a quarter of its pictures
    for them, always the same ones, by their contents.

    Args:
        spec: "scenes", "pascal:ROOT:0", … (see `SOURCES`), or the path of a folder of pictures. The names of sources
            come first: a folder called scenes is "./scenes".
        split: "train", "validation" or "test". None is every row of a source that is not divided, else "train".
        n: Rows wanted: as many generated ones (500 by default), or at most as many of the others, drawn at random.
        seed: Of what is drawn.

    Raises:
        ValueError, FileNotFoundError: when it is none of those, or what it names cannot be read.
    """
    check_kind(spec, str, "a source of data", "a name such as 'scenes', or the path of a folder")
    source, argument = _find(spec)
    return at_most(source.load(argument, split, DRAWN if n is None else n, seed), n, seed)


def split_data(spec: str, train: int | None = None, test: int | None = None, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Rows to learn from and rows to test on, which share no picture.

    Args:
        spec: As for `load`.
        train, test: The most rows of each, or as many generated ones.
        seed: Of what is drawn.

    Raises:
        ValueError: also when fewer than two pictures are left on a side: a prompt needs an example and a query.

    Warns:
        UserWarning: when a data set has pictures in both of its splits; they are not tested on.
    """
    parts = load(spec, "train", train, seed), load(spec, "test", test, seed)
    known = set(identities(parts[0]))
    new = [i for i, identity in enumerate(identities(parts[1])) if identity not in known]
    if (repeated := len(parts[1]) - len(new)) > 0:
        warnings.warn(
            f"{repeated} test pictures of {spec} are among its training pictures, too; they are left out.", stacklevel=2
        )
        parts = parts[0], parts[1].select(new)
    many, few = map(len, parts)
    if min(many, few) < 2:
        raise ValueError(f"{spec} leaves {many} pictures to learn from and {few} to test on; give more.")
    return parts


def identities(rows: Dataset) -> list[str]:
    """A digest of each row's picture, of the bytes of its file: equal pictures have equal ones, wherever they lie. Of
    texts, of the row."""
    if "image" not in rows.column_names:
        return [json_digest(row) for row in rows]
    digests = []
    with progress_bar(total=len(rows), desc="telling pictures apart", unit="picture", disable=len(rows) < 2000) as bar:
        for batch in rows.select_columns("image").with_format("arrow").iter(100):
            for cell in batch["image"].to_pylist():
                content = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
                digests.append(bytes_digest(content))
            bar.update(len(batch))
    return digests


def _find(spec: str) -> tuple[Source, str]:
    """The source that a user means, and its argument."""
    name, _, argument = spec.partition(":")
    source = SOURCES.get(name)
    if source and bool(argument) == bool(source.argument):
        return source, argument
    if spec and not source and Path(spec).expanduser().is_dir():
        return SOURCES["folder"], spec
    known = ", ".join(source.usage for source in SOURCES.values())
    raise ValueError(f"{quoted(spec)} is not a source of data; give {known}, or a folder by its path (./scenes).")


def _divided(rows: Dataset, split: str | None, name: str) -> Dataset:
    """A split of rows that have none: a quarter of the pictures, at least two, is for "validation" and "test"."""
    check_choice((None, *SPLITS), split=split)
    if split is None:
        return rows
    keys = np.array(identities(rows))
    pictures = np.unique(keys)
    if len(pictures) < 4:
        raise ValueError(f"{name} holds {len(pictures)} different pictures and some are for tests; give 4 or more.")
    held_out = np.random.default_rng(0).permutation(pictures)[: max(2, len(pictures) // 4)]
    return rows.select(np.flatnonzero(np.isin(keys, held_out) == (split != "train")))
