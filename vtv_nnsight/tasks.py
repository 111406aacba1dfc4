"""What is asked of the model: how a picture becomes an input and a target, and how an answer is scored.

A task is a value. The papers' own are instances in this module, and `+` asks for two at once:

    >>> tasks.get("inpainting+lowlight") == tasks.inpainting + tasks.lowlight
    True
    >>> prompt = tasks.segmentation.prompt(example=images[0], query=images[1], layout=model.layout)

A row of data is a mapping with "image" (PIL) and, where the task needs them, "mask" (PIL "L", 0 or 255) and "label".
To write a new task, subclass `Task` and say what it does to the input (`corrupt`) or what it wants (`target`).

Sources: VP is *Visual Prompting via Image Inpainting* (NeurIPS 2022), VTV *Finding Visual Task Vectors* (ECCV 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor

from vtv_nnsight import metrics
from vtv_nnsight.images import as_rgb, resize, to_tensor, upright_size
from vtv_nnsight.layouts import Layout
from vtv_nnsight.prompts import VisualPrompt

Row = Mapping[str, Any]
Place = tuple[float, float]
"""A random point of the unit square, drawn once a prompt: what the example and the query share."""

CENTER: Place = (0.5, 0.5)
PURPLE, YELLOW = "#440154", "#fde725"
"""The colours of VP's other segmentation masks, (68, 1, 84) and (253, 231, 37)."""


@dataclass(frozen=True)
class Task:
    """The identity task, and the base of the others: input and target are the image.

    Class attributes:
        metric: "mse" (lower is better) or "iou" (higher is better).
    """

    metric = "mse"

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        """The input that is made of a clean cell [3, size, size] in [0, 1]."""
        return cell

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor | None:
        """The answer [3, size, size] for a row, its clean cell and the input as shown; None where the row lacks what
        the answer is made of."""
        return cell

    def score(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The task's metric of output cells [batch, 3, size, size] in [0, 1]: [batch]."""
        return metrics.mse(prediction, target)

    def loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The score, negated where higher is better: [batch]."""
        score = self.score(prediction, target)
        return -score if self.higher_is_better else score

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "iou"

    def __add__(self, other: Task) -> Task:
        parts = [part for task in (self, other) for part in (task.parts if isinstance(task, Sum) else (task,))]
        return Sum(tuple(parts))

    def cells(self, row: Row, size: int, place: Place = CENTER) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The input and the target of one row, [3, size, size] in [0, 1] each."""
        if "image" not in row:
            raise ValueError(f"a row with {', '.join(row) or 'nothing'} has no 'image'; give a PIL image of that name.")
        cell = to_tensor(resize(as_rgb(row["image"]), size))
        shown = self.corrupt(cell, place)
        return shown, self.target(row, cell, shown)

    def prompt(
        self, example: Row | Sequence[Row], query: Row, layout: Layout | None = None, place: Place = CENTER
    ) -> VisualPrompt:
        """One one-shot prompt: the example(s) solved, the query, and the truth in the output cell where it is known.

        Raises:
            ValueError: when the number of examples is not the layout's, or an example lacks what its answer needs.
        """
        layout = layout or Layout()
        examples = [example] if isinstance(example, Mapping) else list(example)
        if len(examples) != layout.examples:
            raise ValueError(f"{len(examples)} examples were given for a layout of {layout.examples}; give as many.")
        names = iter(layout.cells)
        cells = {}
        for row in (*examples, query):
            shown, target = self.cells(row, layout.cell_size, place)
            cells[next(names)] = shown
            answer = next(names)
            if target is not None:
                cells[answer] = target
            elif row is not query:
                raise ValueError(f"an example of {self.name} has no 'mask'; give one (PIL 'L', 0 or 255).")
        return VisualPrompt.from_cells(cells, layout)

    def prompts(self, images: Any, n: int = 100, seed: int = 0, layout: Layout | None = None) -> VisualPrompt:
        """`n` one-shot prompts of random rows; the same seed gives the same prompts.

        Where the rows have labels, examples are of the query's class. A query is never its own example.

        Args:
            images: A datasets.Dataset or a sequence of rows.
            n: Number of prompts; rows may serve in several.
        """
        layout = layout or Layout()
        generator = np.random.default_rng(seed)
        rows, places = draw_rows(images, n, layout.examples, generator), generator.random((n, 2))
        prompts = [
            self.prompt([images[i] for i in examples], images[query], layout, (place[0], place[1]))
            for (*examples, query), place in zip(rows.tolist(), places)
        ]
        return VisualPrompt.cat(prompts)


@dataclass(frozen=True)
class Identity(Task):
    """Image → image."""


@dataclass(frozen=True)
class Segmentation(Task):
    """Image → mask of the row's class.

    Args:
        foreground, background: Colours of the mask, in any form that PIL knows ("white", "#440154").
    """

    foreground: str = "white"
    background: str = "black"
    metric = "iou"

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor | None:
        if row.get("mask") is None:
            return None
        mask = _binary(row)
        colours = Image.new("RGB", mask.size, self.background)
        colours.paste(self.foreground, mask=mask)
        return to_tensor(resize(colours, cell.shape[-1]))

    def score(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return metrics.iou(
            prediction, target, ImageColor.getrgb(self.foreground)[:3], ImageColor.getrgb(self.background)[:3]
        )


@dataclass(frozen=True)
class Lowlight(Task):
    """Darkened image → image.

    Args:
        brightness: What is left of the light.
    """

    brightness: float = 0.5

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        return self.brightness * cell


@dataclass(frozen=True)
class Inpainting(Task):
    """Image with a black square, a quarter of its side → image.

    Args:
        position: "random" draws a place for each prompt, the same in example and query; "center".
    """

    position: str = "random"

    def __post_init__(self) -> None:
        if self.position not in ("random", "center"):
            raise ValueError(f"position={self.position!r} is not a place for the square; choose 'random' or 'center'.")

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        size = cell.shape[-1]
        side = size // 4
        if self.position == "center":
            top = left = (size - side) // 2
        else:
            top, left = (int(p * (size - side + 1)) for p in place)
        cell = cell.clone()
        cell[:, top : top + side, left : left + side] = 0
        return cell


@dataclass(frozen=True)
class Colorization(Task):
    """Luma of the image (ITU-R 601-2, as PIL's "L") in three channels → image."""

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        red, green, blue = (cell * 255).round().long()
        luma = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
        return (luma / 255).expand(3, -1, -1).to(cell.dtype)


@dataclass(frozen=True)
class Sum(Task):
    """Several tasks at once: the input suffers all their corruptions in turn; the target and the metric are those of
    the first task that wants something else than the clean image."""

    parts: tuple[Task, ...]

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    @property
    def _wanted(self) -> Task:
        return next((part for part in self.parts if type(part).target is not Task.target), self.parts[0])

    @property
    def metric(self) -> str:
        return self._wanted.metric

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        return reduce(lambda shown, part: part.corrupt(shown, place), self.parts, cell)

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor | None:
        return self._wanted.target(row, cell, shown)

    def score(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self._wanted.score(prediction, target)


segmentation = Segmentation()
lowlight = Lowlight()
identity = Identity()
inpainting = Inpainting()
colorization = Colorization()

VTV = (segmentation, lowlight, identity, inpainting, colorization)
"""The five tasks whose vectors VTV finds."""

_REGISTRY = {task.name: task for task in VTV}


def get(name: str) -> Task:
    """The task of a name, or of several joined by "+".

    Raises:
        ValueError: naming the tasks there are.
    """
    unknown = [part for part in name.split("+") if part not in _REGISTRY]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is not a task; choose from {', '.join(_REGISTRY)}, or join several with '+'."
        )
    return reduce(add, (_REGISTRY[part] for part in name.split("+")))


def names() -> list[str]:
    """The names that `get` knows."""
    return list(_REGISTRY)


def draw_rows(images: Any, n: int, examples: int, generator: np.random.Generator) -> np.ndarray:
    """Draw rows for prompts: [n, examples + 1] row numbers, the query last.

    The rows of a prompt are distinct and of one class where the data has labels.

    Raises:
        ValueError: when no class has enough images.
    """
    if n < 1:
        raise ValueError(f"n={n} prompts were asked for; expected 1 or more.")
    labels = _column(images, "label")
    groups = [np.arange(len(images))] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
    groups = [group for group in groups if len(group) > examples]
    if not groups:
        what = "images" if labels is None else "images of a class"
        raise ValueError(f"a prompt needs {examples + 1} different {what}, more than there are in these data.")
    sizes = np.array([len(group) for group in groups])
    choice = generator.choice(len(groups), size=n, p=sizes / sizes.sum())
    return np.stack([generator.choice(groups[c], size=examples + 1, replace=False) for c in choice])


def _column(images: Any, name: str) -> np.ndarray | None:
    if hasattr(images, "column_names"):
        return np.asarray(images[name]) if name in images.column_names else None
    return np.asarray([row[name] for row in images]) if len(images) and name in images[0] else None


def _binary(row: Row) -> Image.Image:
    """The row's mask as PIL "L", 0 or 255; refused without foreground or in another size than its image."""
    mask = row["mask"].convert("L")
    size = upright_size(row["image"])
    if mask.size != size:
        raise ValueError(f"a mask of {mask.size} pixels belongs to an upright image of {size}; give equal sizes.")
    low, high = mask.getextrema()
    if high == 0:
        raise ValueError("a mask is black all over; give one with some foreground (255), or leave the row out.")
    if set(mask.getcolors(256) and [value for _, value in mask.getcolors(256)]) - {0, 255}:
        raise ValueError(f"a mask holds values from {low} to {high}; expected 0 (background) and 255 (foreground).")
    return mask
