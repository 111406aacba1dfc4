"""A moving picture of what a task vector does: a query, and its answer as the vector comes in.

>>> frames = animation(QueryExplorer.load("runs/scenes/shown/segmentation.safetensors"))
>>> save_animation(frames, "hero.gif")
"""

from __future__ import annotations

import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from vtv_nnsight.files import replacing
from vtv_nnsight.report.explorer import QueryExplorer
from vtv_nnsight.report.pictures import picture

INK, SOFT, PAPER, ACCENT, RAIL = "#1c2126", "#5d6670", "#ffffff", "#0b7a5c", "#d9dde1"
WIDTH, HEIGHT = 660, 320
LARGE, SMALL, EDGE, TOP, STRIP = 176, 52, 16, 34, 252
"""Pixels: sides of the pictures above and of those of the strip, the margin, and where both rows begin."""
STEP, HOLD_FIRST, HOLD_LAST = 110, 900, 2200
"""Milliseconds that a frame stays."""


def animation(explorer: QueryExplorer) -> list[Image.Image]:
    """Frames: the query, its answer at one scale after the other, the truth; below, answers as a strip in which a mark
    moves."""
    query, truth = (_sized(explorer.pictures[name][0], LARGE) for name in ("query", "truth"))
    middle = (WIDTH - LARGE) // 2
    strip = explorer.pictures["scale"][::2]
    lefts = [EDGE + round(i * (WIDTH - 2 * EDGE - SMALL) / (len(strip) - 1)) for i in range(len(strip))]
    background = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen = ImageDraw.Draw(background)
    for image, left, label in ((query, EDGE, "query"), (truth, WIDTH - EDGE - LARGE, "truth")):
        background.paste(image, (left, TOP))
        _write(pen, (left + LARGE // 2, TOP - 9), label)
    _write(pen, (middle + LARGE // 2, TOP - 9), "answer, no example shown")
    pen.line([(EDGE + LARGE + 10, TOP + LARGE // 2 + 24), (middle - 12, TOP + LARGE // 2 + 24)], SOFT, 2)
    tip = (middle - 10, TOP + LARGE // 2 + 24)
    pen.polygon([tip, (tip[0] - 8, tip[1] - 5), (tip[0] - 8, tip[1] + 5)], SOFT)
    for left, pixels in zip(lefts, strip):
        background.paste(_sized(pixels, SMALL), (left, STRIP))
    frames = []
    for at, scale in enumerate(explorer.scales):
        frame = background.copy()
        pen = ImageDraw.Draw(frame)
        frame.paste(_sized(explorer.pictures["scale"][at], LARGE), (middle, TOP))
        between = (EDGE + LARGE + middle) // 2
        _write(pen, (between, TOP + LARGE // 2 - 10), "task")
        _write(pen, (between, TOP + LARGE // 2 + 6), "vector")
        _write(pen, (between, TOP + LARGE // 2 + 46), f"{scale:.2f}", ACCENT, 16)
        left = lefts[at // 2]
        pen.rectangle([left - 3, STRIP - 3, left + SMALL + 2, STRIP + SMALL + 2], outline=ACCENT, width=3)
        across = EDGE + SMALL // 2 + round((WIDTH - 2 * EDGE - SMALL) * at / (len(explorer.scales) - 1))
        pen.line([(EDGE, STRIP - 16), (WIDTH - EDGE, STRIP - 16)], RAIL, 4)
        pen.line([(EDGE, STRIP - 16), (across, STRIP - 16)], ACCENT, 4)
        pen.ellipse([across - 6, STRIP - 22, across + 6, STRIP - 10], ACCENT)
        frames.append(frame)
    return frames


def save_animation(frames: list[Image.Image], path: str | Path | io.BytesIO, kind: str = "gif") -> None:
    """Write frames that repeat for ever, the first and the last of which stay longer.

    Args:
        kind: "gif" (256 colours, for any page), or "webp" (a third of the size).
    """
    options: dict[str, Any] = {"duration": [HOLD_FIRST, *[STEP] * (len(frames) - 2), HOLD_LAST], "loop": 0}
    if kind == "webp":
        options |= {"quality": 80, "method": 4}
    else:
        three = [np.asarray(frame) for frame in (frames[0], frames[len(frames) // 2], frames[-1])]
        palette = Image.fromarray(np.concatenate(three)).quantize(256, method=Image.Quantize.MEDIANCUT)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        options |= {"optimize": False, "disposal": 1}
    with nullcontext(path) if isinstance(path, io.BytesIO) else replacing(path) as file:
        frames[0].save(file, kind.upper(), save_all=True, append_images=frames[1:], **options)


def _sized(pixels: torch.Tensor, side: int) -> Image.Image:
    return picture(pixels).resize((side, side), Image.Resampling.BICUBIC)


def _write(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, ink: str = SOFT, size: int = 13) -> None:
    pen.text(at, text, ink, ImageFont.load_default(size), anchor="mm")
