"""Data by a short name, as the command line takes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import Dataset

from vtv_nnsight.data.folder import folder
from vtv_nnsight.data.hub import hub
from vtv_nnsight.data.pascal import detection, pascal
from vtv_nnsight.data.pictures import pictures
from vtv_nnsight.data.reasoning import reasoning
from vtv_nnsight.data.scenes import scenes

SOURCES = {
    "pictures": "real things that the package carries, with masks and labels",
    "scenes": "generated",
    "reasoning:TASK": "generated, for color, shape, size or two of them joined by '+'",
    "pascal:ROOT": "all classes of Pascal VOC; pascal:ROOT:FOLD for one fold",
    "detection:ROOT": "single objects of Pascal VOC",
    "hf:NAME": "a Hub data set; hf:NAME:SPLIT for a split by its own name",
    "FOLDER": "a folder of pictures",
}
"""What `load` takes, and what it gives."""

PASCAL_SPLITS = {"train": "trn", "validation": "val", "test": "val"}


def load(spec: str, split: str = "train", n: int | None = None, seed: int = 0) -> Dataset:
    """Rows for tasks.

    Args:
        spec: One of `SOURCES`.
        split: "train", "validation" or "test", where the source has splits. Pascal's are trn and, for the
            other two, val; pictures have no validation.
        n: Rows wanted: as many generated ones (500 by default), or at most as many of the others, drawn at random.
        seed: Of what is drawn.

    Raises:
        ValueError, FileNotFoundError: when it is none of those, or what it names cannot be read.
    """
    kind, _, rest = spec.partition(":")
    if spec == "scenes":
        return scenes(split, 500 if n is None else n, seed)
    if spec == "pictures":
        return pictures(split, n, seed)
    if kind == "reasoning" and rest:
        return reasoning(rest, 500 if n is None else n, seed)
    rows = _stored(kind, rest, spec, split)
    if n is None or n >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).choice(len(rows), n, replace=False)))


def _stored(kind: str, rest: str, spec: str, split: str) -> Dataset:
    if kind in ("pascal", "detection") and rest:
        half = PASCAL_SPLITS.get(split, split)
        if kind == "detection":
            return detection(rest, half)
        root, _, fold = rest.rpartition(":")
        return pascal(root, int(fold), half) if root and fold.isdecimal() else pascal(rest, None, half)
    if kind == "hf" and rest:
        name, _, own = rest.partition(":")
        return hub(name, own or split)
    if Path(spec).expanduser().is_dir():
        return folder(spec)
    raise ValueError(f"{spec!r} is not a source of data; give {', '.join(SOURCES)}.")
