"""Canvases that look like figures of papers: what MAE-VQGAN learns from where there are no prompts.

VP trains on figures of papers with random masks, and solves prompts since figures set pictures side by side that belong
together. `composed` makes such figures of a corpus, `cropped` takes those of a folder (`listed`: VP's own figures):

- Changes: a row shows a picture before and after, each column changed in another way (`curriculum.draw_task`), or
  rows and columns change places. Parts of a task that is held out never stand in one figure.
- Galleries: a grid of pictures that have nothing to do with one another.
- Plots: panels of curves, bars, points or a heat map.

All have gutters, margins and white space in which captions may stand. Of either kind of figure a part is cut, squashed
and mirrored as in VP's released code (20 to 100 % of the area, at 3 : 4 to 4 : 3).
"""

from __future__ import annotations

import os
import string
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont

from vtv_nnsight.data.drawn_scenes import render
from vtv_nnsight.images import as_rgb, to_pil
from vtv_nnsight.tasks import Row, Task
from vtv_nnsight.training.corpus import PHOTO, Corpus, Picture
from vtv_nnsight.training.curriculum import draw_task, is_held_out
from vtv_nnsight.training.stream import SCENES, as_batch, draw_rows

KINDS = {"changes": 0.5, "gallery": 0.25, "plots": 0.25}
"""How often a figure is of each kind."""
SHEET = 2.0
"""The longer side of a composed figure over that of the canvas: most parts that are cut are not enlarged."""
MAX_PANELS = 4
"""Rows and columns of a figure."""
AREA, ASPECT = (0.2, 1.0), (3 / 4, 4 / 3)
"""Share of a figure that is cut out, and its width over its height."""
INK = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189), (0, 0, 0), (127, 127, 127))
MAPS = np.array(
    [[[68, 1, 84], [33, 145, 140], [253, 231, 37]], [[0, 0, 0], [230, 60, 30], [255, 255, 220]],
     [[30, 60, 180], [240, 240, 240], [180, 20, 40]], [[255, 255, 255], [128, 128, 128], [0, 0, 0]]], float
)  # fmt: skip
"""Three colours of each of the heat maps' scales."""

Generator = np.random.Generator


def composed(step: int, n: int, size: int, seed: int, corpus: Corpus) -> torch.Tensor:
    """The `n` canvases of a training step, parts of figures of a corpus's pictures and of scenes: float
    [n, 3, size, size] in [0, 1]."""
    generator = np.random.default_rng([seed, step, size, 1])
    return as_batch([fitted(compose_figure(corpus, round(SHEET * size), generator), size, generator) for _ in range(n)])


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


def compose_figure(corpus: Corpus, longest: int, generator: Generator, kind: str | None = None) -> Image.Image:
    """A figure of one of `KINDS`, by default any; its longer side has `longest` pixels or a few less."""
    kind = kind or str(generator.choice(list(KINDS), p=list(KINDS.values())))
    rows, columns = generator.integers(1, MAX_PANELS + 1, 2).tolist()
    if kind == "changes":
        columns = max(2, columns)
    pitch = longest / max(rows, columns)
    gap, below, margin = (round(pitch * share) for share in _spaces(generator))
    across = round(pitch) - gap
    down = max(8, across - below)
    if kind == "changes":  # its pictures are square, as tasks change them
        across = down
        grid = _changed(corpus, rows, columns, across, generator)
        if generator.random() < 0.5:
            grid = [list(line) for line in zip(*grid)]
    elif kind == "gallery":
        grid = [[_picture(corpus, (across, down), generator) for _ in range(columns)] for _ in range(rows)]
    else:
        down = max(8, round(down * generator.uniform(0.6, 1.0)))
        grid = [[_plot((across, down), generator) for _ in range(columns)] for _ in range(rows)]
    return _laid_out(grid, gap, below, margin, generator)


def _spaces(generator: Generator) -> tuple[float, float, float]:
    """The gutter, the room below each picture, and the margin, as shares of a picture's pitch."""
    gap = generator.choice([0.0, generator.uniform(0.01, 0.12)], p=[0.1, 0.9])
    below = generator.choice([0.0, generator.uniform(0.08, 0.25)])
    return float(gap), float(below), generator.uniform(0.0, 0.15)


def _laid_out(
    grid: Sequence[Sequence[Image.Image]], gap: int, below: int, margin: int, generator: Generator
) -> Image.Image:
    """Pictures in rows on white, most with captions where there is room for one: a letter or words."""
    across, down = grid[0][0].size
    width = 2 * margin + len(grid[0]) * (across + gap) - gap
    height = 2 * margin + len(grid) * (down + below + gap) - gap
    sheet = Image.new("RGB", (max(8, width), max(8, height)), "white")
    pen, words = ImageDraw.Draw(sheet), generator.random() < 0.75
    font = ImageFont.load_default(max(6, round(0.8 * below)))
    for i, line in enumerate(grid):
        for j, picture in enumerate(line):
            left, top = margin + j * (across + gap), margin + i * (down + below + gap)
            sheet.paste(picture, (left, top))
            if words and below >= 6:
                text = _words(generator)
                if font.getlength(text) > across:
                    text = f"({string.ascii_lowercase[i * len(line) + j]})"
                pen.text((left + across // 2, top + down + below // 2), text, "black", font, anchor="mm")
    return sheet


def _words(generator: Generator) -> str:
    lengths = generator.integers(1, 8, generator.integers(1, 4))
    return " ".join("".join(generator.choice(list(string.ascii_letters), length)) for length in lengths)


def _changed(corpus: Corpus, rows: int, columns: int, side: int, generator: Generator) -> list[list[Image.Image]]:
    """In each row a picture as a task corrupts it, as that task wants it, and as others do."""
    pictures = _rows(corpus, rows, generator)
    masks, place = all("mask" in row for row in pictures), tuple(generator.random(2))
    first, others = draw_task(generator, masks), list[Task]()
    while len(others) < columns - 2:
        if not is_held_out(sum([*others, other := draw_task(generator, masks)], start=first)):
            others.append(other)
    grid = []
    for row in pictures:
        cells: list[Any] = [*first.cells(row, side, place), *(other.cells(row, side, place)[1] for other in others)]
        grid.append([to_pil(cell) for cell in cells])
    return grid


def _rows(corpus: Corpus, n: int, generator: Generator) -> list[Row]:
    """`n` pictures of one kind, as the prompts' stream shows them: scenes, or of the corpus."""
    if generator.random() >= SCENES:
        return draw_rows(corpus, n, generator)
    images, masks, _ = render("train", generator.integers(2**31, size=n).tolist())
    return [{"image": Image.fromarray(image), "mask": Image.fromarray(mask)} for image, mask in zip(images, masks)]


def _picture(corpus: Corpus, size: tuple[int, int], generator: Generator) -> Image.Image:
    (row,) = _rows(corpus, 1, generator)
    return row["image"].resize(size, Image.Resampling.BICUBIC)


def _plot(size: tuple[int, int], generator: Generator) -> Image.Image:
    """A panel with axes and what one sees between them; drawn at twice its size."""
    width, height = 2 * size[0], 2 * size[1]
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    left, right, top, bottom = (
        round(s * side) for s, side in zip((0.16, 0.94, 0.06, 0.86), (width, width, height, height))
    )
    x, y = np.linspace(left, right, 33), lambda value: bottom - value * (bottom - top)
    if generator.random() < 0.4:
        for share in np.linspace(0, 1, 5)[1:-1]:
            pen.line([(left, y(share)), (right, y(share))], (215, 215, 215), 2)
    colours = [INK[i] for i in generator.permutation(len(INK))[: generator.integers(1, 5)]]
    kind = generator.choice(["curves", "bars", "points", "map"])
    if kind == "map":
        scale, values = MAPS[generator.integers(len(MAPS))], generator.random((generator.integers(3, 12),) * 2)
        tones = np.stack([np.interp(values, (0, 0.5, 1), scale[:, channel]) for channel in range(3)], -1)
        filled = Image.fromarray(tones.astype(np.uint8))
        sheet.paste(filled.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
    for i, colour in enumerate(colours):
        if kind == "curves":
            rising = generator.choice([-1, 1]) * np.exp(-np.linspace(0, generator.uniform(1, 6), len(x)))
            walk = rising + generator.uniform(0, 0.15) * np.cumsum(generator.normal(size=len(x)))
            values = (walk - walk.min()) / max(np.ptp(walk), 1e-6) * generator.uniform(0.4, 0.95)
            pen.line([(a, y(b)) for a, b in zip(x, values)], colour, 3)
        elif kind == "bars":
            room = (right - left) / 4
            for group, value in enumerate(generator.uniform(0.1, 0.95, 4)):
                start = left + room * (group + 0.1 + 0.8 * i / len(colours))
                pen.rectangle((start, y(value), start + 0.75 * room / len(colours), bottom), colour)
        elif kind == "points":
            centre, spread = generator.uniform(0.2, 0.8, 2), generator.uniform(0.03, 0.15, 2)
            for across, up in (centre + spread * generator.normal(size=(25, 2))).clip(0.02, 0.98):
                spot = left + across * (right - left), y(up)
                pen.ellipse((spot[0] - 3, spot[1] - 3, spot[0] + 3, spot[1] + 3), colour)
    pen.line([(left, top), (left, bottom), (right, bottom)], "black", 2)
    font = ImageFont.load_default(max(8, round(0.09 * height)))
    most = generator.integers(1, 10, 2)
    for share in (0, 0.5, 1):
        pen.text((left - 4, y(share)), f"{share * most[0]:g}", "black", font, anchor="rm")
        pen.text((left + share * (right - left), bottom + 3), f"{share * most[1]:g}", "black", font, anchor="mt")
    return sheet.reduce(2)
