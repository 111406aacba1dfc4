"""Figures of papers, which MAE-VQGAN learns from where there are no prompts: those of a folder, or VP's own (`listed`).

VP trains on figures of papers with random masks, and solves prompts since figures set pictures side by side that belong
together. A part of a figure is cut, squashed and mirrored as in VP's released code (20 to 100 % of the area, at 3 : 4
to 4 : 3). (benchmarks/data_size.py composes figures of a corpus of pictures.)
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from vtv_nnsight.images import as_rgb
from vtv_nnsight.training.corpus import PHOTO, Corpus, Picture
from vtv_nnsight.training.stream import as_batch

AREA, ASPECT = (0.2, 1.0), (3 / 4, 4 / 3)
"""Share of a figure that is cut out, and its width over its height."""
Generator = np.random.Generator


@dataclass(frozen=True)
class ListedFigures:
    """Figures that are read when they are drawn, all alike: decoded, those of VP do not fit in memory."""

    files: tuple[Path, ...]

    def draw(self, kind: str, generator: Generator) -> Picture:
        """One of them; one that cannot be read is passed over."""
        for number in generator.integers(len(self.files), size=100):
            try:
                with Image.open(self.files[number]) as image:
                    return Picture(as_rgb(image), kind, "")
            except (OSError, ValueError, Image.DecompressionBombError):
                continue
        raise ValueError(f"100 figures of {len(self.files)} cannot be read, such as {self.files[0]}; make them again.")


def listed(root: str | os.PathLike[str], split: str = "train") -> ListedFigures:
    """The Computer Vision Figures (NeurIPS 2022, §3.3) of one split that are in a folder.

    Args:
        root: Where the released `download_links.py` wrote (ROOT/train/PAPER/NAME, of a NAME.pdf
            NAME.pdf_PAPER_0.png; all may be in ROOT/train), with the released lists df_train.csv and df_val.csv beside:
            columns paper_id and img_name.
        split: "train" or "val".

    Raises:
        FileNotFoundError: when there is no such list.
        ValueError: when it is no list of figures, or none of them is there.

    Warns:
        UserWarning: saying how many are missing: papers are withdrawn, and PDFs of several pages are left out.
    """
    root = Path(root).expanduser()
    path = root / f"df_{split}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; put the released lists df_train.csv and df_val.csv there.")
    rows = pd.read_csv(path, dtype=str)
    if missing := {"paper_id", "img_name"} - set(rows):
        raise ValueError(f"{path} has no column {min(missing)}; expected the released list of figures.")
    names = [n if n[-4:].lower() != ".pdf" else f"{n}_{p}_0.png" for p, n in zip(rows.paper_id, rows.img_name)]
    places = [Path(paper) / name for paper, name in zip(rows.paper_id, names)]
    found = [next((f for f in (root / split / at, root / "train" / at) if f.is_file()), None) for at in places]
    files = tuple(file for file in found if file)
    if not files:
        raise ValueError(f"none of the {len(rows)} figures of {path} is in {root / split}; download them first.")
    if len(files) < len(rows):
        warnings.warn(f"{len(rows) - len(files)} of the {len(rows)} figures of {path} are not there.", stacklevel=2)
    return ListedFigures(files)


def cropped(step: int, n: int, size: int, seed: int, corpus: Corpus | ListedFigures) -> torch.Tensor:
    """The `n` canvases of a training step, parts of figures that are the corpus's photographs (as those of a folder
    are): float [n, 3, size, size] in [0, 1]."""
    generator = np.random.default_rng([seed, step, size, 2])
    return as_batch([fitted(corpus.draw(PHOTO, generator).image, size, generator) for _ in range(n)])


def fitted(figure: Image.Image, size: int, generator: Generator) -> Image.Image:
    """A part of a figure as a square of `size` pixels, mirrored half of the time."""
    area = generator.uniform(*AREA) * figure.width * figure.height
    aspect = np.exp(generator.uniform(*np.log(ASPECT)))
    width, height = min(figure.width, (area * aspect) ** 0.5), min(figure.height, (area / aspect) ** 0.5)
    left, top = generator.random() * (figure.width - width), generator.random() * (figure.height - height)
    part = figure.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else part
