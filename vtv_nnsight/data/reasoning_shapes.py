"""The reasoning study of VP (*Visual Prompting via Image Inpainting*, NeurIPS 2022, §4.3): circles that change.

    >>> images = reasoning("color+shape", n=100, seed=0)       # datasets.Dataset: image, answer
    >>> prompts = tasks.get("color+shape").prompts(images, n=100, seed=0, layout=layouts.REASONING)

A picture is a filled green circle on white, its centre anywhere but within 10 pixels of the border; its answer is the
same circle in blue ("color"), the square around it ("shape"), or both. Radii are from 10 to 49, and 30 where the answer
is smaller ("size": 20). Splits are told apart by the centre (the sum of its coordinates, modulo 3), so that no picture
is in two of them.
"""

from __future__ import annotations

import datasets
import numpy as np
from datasets import Dataset, Features
from PIL import Image

from vtv_nnsight import tasks
from vtv_nnsight.data.checks import check_count, check_split
from vtv_nnsight.metrics import Colour

SIZE = 224
MARGIN = 10
RADII = (10, 50)
LARGE, SMALL = 30, 20
SPLITS = ("train", "validation", "test")


def reasoning(task: str | tasks.Reasoning = "color", n: int = 100, seed: int = 0, split: str = "train") -> Dataset:
    """`n` pictures and their answers, columns image and answer (RGB, 224x224). Row i does not depend on `n`.

    Args:
        task: "color", "shape", "size", or two of them joined by "+"; or the task itself.
        n: Number of rows.
        seed: Of what is drawn.
        split: "train", "validation" or "test", which share no picture whatever their seeds.

    Raises:
        ValueError: when it is not a reasoning task, `n` is not positive, or the split is unknown.
    """
    named = tasks.get(task) if isinstance(task, str) else task
    if not isinstance(named, tasks.Reasoning):
        raise ValueError(f"{named.name!r} is not a reasoning task; join some of color, shape and size by '+'.")
    check_count(n, "pictures")
    check_split(split, SPLITS)
    rows = [_pair(named.changes, np.random.default_rng([seed, i]), SPLITS.index(split)) for i in range(n)]
    images, answers = zip(*rows)
    columns = {"image": list(images), "answer": list(answers)}
    return Dataset.from_dict(columns, Features(image=datasets.Image(), answer=datasets.Image()))


def _pair(changes: tuple[str, ...], generator: np.random.Generator, split: int) -> tuple[Image.Image, Image.Image]:
    x, y = generator.integers(MARGIN, SIZE - MARGIN, 2).tolist()
    while (x + y) % len(SPLITS) != split:
        x, y = generator.integers(MARGIN, SIZE - MARGIN, 2).tolist()
    radius = LARGE if "size" in changes else int(generator.integers(*RADII))
    answer = draw(
        x,
        y,
        SMALL if "size" in changes else radius,
        "rectangle" if "shape" in changes else "circle",
        tasks.BLUE if "color" in changes else tasks.GREEN,
    )
    return draw(x, y, radius), answer


def draw(x: int, y: int, radius: int, shape: str = "circle", colour: Colour = tasks.GREEN) -> Image.Image:
    """A filled circle, or the square around it, on white; what lies beyond the border is cut off."""
    across, down = np.arange(SIZE)[None, :] - x, np.arange(SIZE)[:, None] - y
    circle = across**2 + down**2 <= radius**2
    square = np.maximum(np.abs(across), np.abs(down)) <= radius
    inside = circle if shape == "circle" else square
    return Image.fromarray(np.where(inside[..., None], np.array(colour, np.uint8), np.uint8(255)))
