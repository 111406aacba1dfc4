"""The reasoning study of VP (*Visual Prompting via Image Inpainting*, NeurIPS 2022, §4.3): circles that change.

    >>> images = reasoning("color+shape", n=100, seed=0)       # datasets.Dataset: image, answer
    >>> prompts = tasks.get("color+shape").prompts(images, n=100, seed=0, layout=layouts.REASONING)

A picture is a filled green circle on white, its centre anywhere but within 10 pixels of the border; its answer is the
same circle in blue ("color"), the square around it ("shape"), or both. Radii are from 10 to 49, and 30 where the answer
is smaller ("size": 20). Splits are told apart by the centre (the sum of its coordinates, modulo 3), so that no picture
is in two of them.
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from vtv_nnsight import tasks
from vtv_nnsight.data.checks import SPLITS, check_count, check_split
from vtv_nnsight.metrics import Colour

SIZE = 224
MARGIN = 10
RADII = (10, 50)
LARGE, SMALL = 30, 20


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
    rows = [_row(named.changes, np.random.default_rng([seed, i]), SPLITS.index(split)) for i in range(n)]
    return Dataset.from_list(rows, Features(image=Image(), answer=Image()))


def _row(changes: tuple[str, ...], generator: np.random.Generator, split: int) -> dict[str, PILImage.Image]:
    x, y = generator.integers(MARGIN, SIZE - MARGIN, 2).tolist()
    while (x + y) % len(SPLITS) != split:
        x, y = generator.integers(MARGIN, SIZE - MARGIN, 2).tolist()
    radius = LARGE if "size" in changes else int(generator.integers(*RADII))
    shape = "rectangle" if "shape" in changes else "circle"
    colour = tasks.BLUE if "color" in changes else tasks.GREEN
    answer = draw(x, y, SMALL if "size" in changes else radius, shape, colour)
    return {"image": draw(x, y, radius), "answer": answer}


def draw(x: int, y: int, radius: int, shape: str = "circle", colour: Colour = tasks.GREEN) -> PILImage.Image:
    """A filled circle, or the square around it, on white; what lies beyond the border is cut off."""
    across, down = np.arange(SIZE)[None, :] - x, np.arange(SIZE)[:, None] - y
    circle = across**2 + down**2 <= radius**2
    square = np.maximum(np.abs(across), np.abs(down)) <= radius
    inside = circle if shape == "circle" else square
    return PILImage.fromarray(np.where(inside[..., None], np.array(colour, np.uint8), np.uint8(255)))
