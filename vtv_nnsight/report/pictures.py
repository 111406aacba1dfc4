"""Pictures of prompts and answers for the pages: as data URIs, so that a page is one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from vtv_nnsight.evaluation.conditions import PATCHED
from vtv_nnsight.images import png_of, to_pil
from vtv_nnsight.prompts import crop
from vtv_nnsight.report.labels import CONDITIONS, PICTURES, cell_label
from vtv_nnsight.report.reading import RunResults
from vtv_nnsight.tasks import Task

MAX_ROWS = 4
"""Rows of pictures per task."""


def data_uri(content: bytes, kind: str = "png") -> str:
    """A picture's file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture(pixels: torch.Tensor) -> Image.Image:
    """Pixels, uint8 [3, height, width], as a picture."""
    return to_pil(pixels.float() / 255)


def cell_uri(pixels: torch.Tensor) -> str:
    """A cell, uint8 [3, height, width], as a data URI, without loss."""
    return data_uri(png_of(picture(pixels)))


def sprite(pictures: torch.Tensor, across: bool = False) -> str:
    """Pictures, uint8 [n, 3, height, width], as one below (or beside) the other: a data URI."""
    buffer = io.BytesIO()
    joined = rearrange(pictures, "n c h w -> c h (n w)" if across else "n c h w -> c (n h) w")
    picture(joined).save(buffer, "WEBP", quality=85, method=4)
    return data_uri(buffer.getvalue(), "webp")


def strip(pictures: Mapping[str, torch.Tensor], side: int = 224, title: str = "") -> Image.Image:
    """Pictures beside one another, `side` pixels wide and of the first one's proportions, with their names above and a
    title over all: label → pixels [3, height, width] in [0, 1]."""
    margin, line = side // 14, max(side // 8, 20)
    above = line + line * bool(title)
    *_, rows, columns = next(iter(pictures.values())).shape
    size = side, round(side * rows / columns)
    sheet = Image.new("RGB", (margin + (side + margin) * len(pictures), size[1] + above + margin), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(10, side // 15))
    pen.text((margin, line // 2), title, "#1c2126", font, anchor="lm")
    for i, (label, pixels) in enumerate(pictures.items()):
        left = margin + i * (side + margin)
        sheet.paste(to_pil(pixels).resize(size, Image.Resampling.BICUBIC), (left, above))
        pen.text((left + side // 2, above - line // 2), label, "#1c2126", font, anchor="mm")
    return sheet


def prompt_cells(run: RunResults, size: float = 92.0) -> list[dict[str, Any]] | str:
    """The cells of the run's first prompt, where and how large the page's diagram of a prompt shows it; or its text."""
    if run.of_texts:
        return str(run.table.pictures[run.tasks[0].name]["prompt"][0])
    across = sorted({columns.start for _, columns in run.layout.cells.values()})
    down = sorted({rows.start for rows, _ in run.layout.cells.values()})
    canvas = run.table.pictures[run.tasks[0].name]["prompt"][0]
    scale = 2 / len(across)
    return [
        {
            "uri": cell_uri(crop(canvas, name, run.layout)),
            "x": 4 + across.index(columns.start) * (size + 16) * scale,
            "y": 2 + down.index(rows.start) * (size + 16) * scale,
            "size": size * scale,
            "label": cell_label(name),
        }
        for name, (rows, columns) in run.layout.cells.items()
    ]


def first_pictures(run: RunResults, task: Task) -> dict[str, list[dict[str, Any]]]:
    """`PICTURES` of the first prompts, or texts, at most `MAX_ROWS`: each with its score, where it is an answer."""
    cells = run.cells(task)
    pictures: dict[str, list[dict[str, Any]]] = {
        name: [
            {"uri": "" if run.of_texts else cell_uri(cell), "text": cell, "score": None}
            for cell in cells[name][:MAX_ROWS]
        ]
        for name in PICTURES
        if name in cells
    }
    for name in CONDITIONS.keys() & PICTURES:
        for answer, score in zip(pictures[name], run.table.values(task.name, name)):
            answer["score"] = float(score)
    return pictures


def overview(run: RunResults) -> Figure:
    """A row of pictures for every task: example, query, answers, truth. Of the prompts with kept answers, the one
    that has the median score with the vector in the first task."""
    first = run.tasks[0]
    scores = run.table.values(first.name, PATCHED)[: len(run.cells(first)[PATCHED])]
    row = np.argsort(scores)[(len(scores) - 1) // 2]
    figure = Figure(figsize=(1.5 * len(PICTURES), 1.65 * len(run.tasks)), layout="constrained")
    panels = figure.subplots(len(run.tasks), len(PICTURES), squeeze=False)
    for task, across in zip(run.tasks, panels):
        cells = run.cells(task)
        for panel, name in zip(across, PICTURES):
            panel.imshow(cells[name][row].permute(1, 2, 0).numpy())
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        across[0].set_ylabel(task.name, fontsize=8)
    for panel, label in zip(panels[0], PICTURES.values()):
        panel.set_title(label, fontsize=8)
    return figure
