"""The pictures that training draws from, decoded once and kept in memory, by kind and by what they show.

A corpus is a folder with a `manifest.csv` (columns file, kind, package, source and split, as `docs/gather_corpus.py`
writes it), or any folder of pictures, all of which then count as photographs. Rare kinds are drawn more often: a
picture weighs one over the root of the number of pictures of its package, and `EMPHASIS` times that.
"""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from vtv_nnsight import data
from vtv_nnsight.images import MIN_SIDE, as_rgb

PHOTO, TEXTURE, CUTOUT = "photo", "texture", "cutout"
LONGEST = {PHOTO: 480, TEXTURE: 240, CUTOUT: 160}
SHORTEST = {PHOTO: 200, TEXTURE: 160, CUTOUT: 160}
"""Pictures are kept at no more than this on their longer and their shorter side: several cells of a canvas."""
EMPHASIS = {"tuxpaint-stamps-default": 3.0, "scratch": 3.0, "gcompris-qt-data": 3.0}
"""Packages with cut-outs of photographs, among many that are drawn."""
MANIFEST = "manifest.csv"
PACKAGED = {
    ("skimage", "scikit-image"): [
        "data/astronaut.png",  # public domain (NASA)
        "data/hubble_deep_field.jpg",  # public domain (NASA)
        "data/ihc.png",  # no known restrictions (CMMI)
        "data/retina.jpg",  # CC0 (Mikael Häggström)
        "data/rocket.jpg",  # public domain (SpaceX)
    ],
    ("sklearn", "scikit-learn"): [
        "datasets/images/china.jpg",  # CC BY 2.0 (danielbuechele, Flickr)
        "datasets/images/flower.jpg",  # CC BY 2.0 (vultilion, Flickr)
    ],
}
"""Photographs inside the wheels of other packages: (module, package) → files."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture, RGB, or RGBA for a cut-out; `label` says what it shows, as far as its name tells."""

    image: Image.Image
    kind: str
    label: str
    weight: float = 1.0


class Corpus:
    """Pictures by kind, to be drawn from by weight."""

    def __init__(self, pictures: Iterable[Picture]) -> None:
        self.kinds: dict[str, list[Picture]] = {PHOTO: [], TEXTURE: [], CUTOUT: []}
        for picture in pictures:
            self.kinds[picture.kind].append(picture)
        self._sums = {kind: np.cumsum([p.weight for p in listed]) for kind, listed in self.kinds.items()}
        self._classes: dict[str, list[Picture]] = defaultdict(list)
        for picture in self.kinds[CUTOUT]:
            self._classes[picture.label].append(picture)

    def __len__(self) -> int:
        return sum(map(len, self.kinds.values()))

    def has(self, kind: str) -> bool:
        """Whether there are pictures of a kind."""
        return bool(self.kinds[kind])

    def draw(self, kind: str, generator: np.random.Generator) -> Picture:
        """A picture of a kind, by weight."""
        sums = self._sums[kind]
        return self.kinds[kind][int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))]

    def another(self, cutout: Picture, generator: np.random.Generator) -> Picture:
        """A cut-out of the same class, now and then the same one."""
        alike = self._classes[cutout.label]
        return alike[generator.integers(len(alike))]

    @classmethod
    def read(cls, folder: str | os.PathLike | None = None, split: str = "train") -> Corpus:
        """A folder's pictures of a split; a folder without a manifest has "train" only. None is the photographs that
        scikit-image and scikit-learn carry.

        Raises:
            FileNotFoundError: when there is no such folder.
            ValueError: when it holds no picture of the split.
        """
        path = None if folder is None else Path(folder).expanduser()
        listed = path is not None and (path / MANIFEST).is_file()
        if split != "train" and not listed:
            raise ValueError(f"{folder or 'the photographs'} has no {MANIFEST}, and so no split {split!r}.")
        if path is None:
            return cls(_photographs(_packaged()))
        if not listed:
            return cls(_photographs(row["image"] for row in data.folder(path)))
        with open(path / MANIFEST, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == split]
        many = Counter((row["kind"], row["package"]) for row in rows)
        corpus = cls(
            Picture(image, row["kind"], _label(row["package"], row["source"]), _weight(row, many))
            for row in rows
            if (image := _decode(path / row["file"], row["kind"])) is not None
        )
        if not len(corpus):
            raise ValueError(f"{path / MANIFEST} lists no picture of split {split!r} that can be read.")
        return corpus


def _packaged() -> Iterator[Image.Image]:
    """The photographs of `PACKAGED`."""
    for (module, package), files in PACKAGED.items():
        spec = find_spec(module)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"The photographs need {package}: pip install vtv-nnsight[pretraining]")
        for file in files:
            with Image.open(Path(spec.submodule_search_locations[0], file)) as image:
                yield image


def _photographs(images: Iterable[Image.Image]) -> list[Picture]:
    return [Picture(_shrink(as_rgb(image), PHOTO), PHOTO, "") for image in images]


def _weight(row: dict[str, str], many: Counter[tuple[str, str]]) -> float:
    emphasis = EMPHASIS.get(row["package"], 1.0) if row["kind"] == CUTOUT else 1.0
    return emphasis * many[row["kind"], row["package"]] ** -0.5


def _decode(path: Path, kind: str) -> Image.Image | None:
    """The picture in a file, or None where it is missing, or too small for what it is."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        if min(image.size) < MIN_SIDE:
            return None
        if kind != CUTOUT:
            return _shrink(as_rgb(image), kind)
        cutout = image.convert("RGBA")
        box = cutout.getchannel("A").getbbox()
        return None if box is None else _shrink(cutout.crop(box), kind)


def _shrink(image: Image.Image, kind: str) -> Image.Image:
    scale = min(1.0, SHORTEST[kind] / min(image.size), LONGEST[kind] / max(image.size))
    width, height = (max(1, round(scale * side)) for side in image.size)
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.LANCZOS)


def _label(package: str, source: str) -> str:
    """What a picture shows, from where it lay: the last word of a piece of furniture or of an emoji's name, the folder
    of all others."""
    path = PurePosixPath(source.rpartition("!")[2])
    if "emoji" in package:
        first = re.search(r"[0-9A-Fa-f]{4,5}", path.stem.removeprefix("u"))
        name = unicodedata.name(chr(int(first.group(), 16)), "") if first else ""
        return name.split()[-1].lower() if name else package
    if package == "sweethome3d-furniture":
        words = re.findall(r"[A-Z]?[a-z]+", path.stem)
        return words[-1].lower() if words else package
    folder = path.parent.name
    return f"{package}/{folder}"
