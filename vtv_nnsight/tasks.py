"""What is asked of the model: how a picture becomes an input and a target, and how an answer is scored.

A task is a value. The papers' own are instances in this module, and `+` asks for two at once:

    >>> tasks.get("inpainting+lowlight") == tasks.inpainting + tasks.lowlight
    True
    >>> prompt = tasks.segmentation.prompt(example=images[0], query=images[1], layout=model.layout)

A row of data is a mapping with "image" (PIL) and, where the task needs them, "mask" (PIL "L", 0 or 255), "label" and
"answer" (PIL: the output itself).
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
from einops import rearrange
from PIL import Image, ImageColor, ImageFilter
from torch.nn import functional as F

from vtv_nnsight import metrics
from vtv_nnsight.images import as_rgb, luma, resize, to_tensor, upright_size
from vtv_nnsight.layouts import Layout
from vtv_nnsight.prompts import VisualPrompt

Row = Mapping[str, Any]
Place = tuple[float, float]
"""A random point of the unit square, drawn once a prompt: what the example and the query share."""

_COLUMNS = {"image": "PIL", "mask": "PIL 'L', 0 or 255", "answer": "PIL: the output itself"}
CENTER: Place = (0.5, 0.5)
PURPLE, YELLOW = "#440154", "#fde725"
"""The colours of VP's other segmentation masks, (68, 1, 84) and (253, 231, 37)."""
GREEN, BLUE = (0, 255, 0), (0, 0, 255)
"""The colours of VP's reasoning study."""
_PALETTES = {
    ("color",): (BLUE, GREEN, metrics.WHITE),
    ("shape",): (GREEN, metrics.WHITE),
    ("size",): (BLUE, GREEN, metrics.WHITE),
    ("color", "shape"): (GREEN, BLUE, metrics.WHITE),
    ("color", "size"): (GREEN, BLUE, metrics.WHITE),
    ("shape", "size"): (GREEN, metrics.WHITE),
}
"""The colours that the reasoning study (released code) allows an answer's pixels, nearest first on a tie."""


def _choose(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}.")


@dataclass(frozen=True)
class Task:
    """The identity task, and the base of the others: input and target are the image.

    Class attributes:
        metric: "mse" or "lpips" (lower is better), or "iou" (higher is better).
        needs: The column of a row that the answer is made of, if it is not the image.
    """

    metric = "mse"
    needs = "image"

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
                raise ValueError(f"an example of {self.name} has no {self.needs!r}; give one ({_COLUMNS[self.needs]}).")
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
        fill: "solid"; "edges" shows the outline of the mask only; "texture" fills it with checks of two tones, both
            nearer to the foreground's colour (VP §4.4).
    """

    foreground: str = "white"
    background: str = "black"
    fill: str = "solid"
    metric = "iou"
    needs = "mask"

    def __post_init__(self) -> None:
        _choose("fill", self.fill, "solid", "edges", "texture")

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor | None:
        if row.get("mask") is None:
            return None
        size = cell.shape[-1]
        mask = self.mask(row)
        if self.fill == "edges":
            mask = _outline(resize(mask, size))
        colours = Image.new("RGB", mask.size, self.background)
        colours.paste(self.foreground, mask=mask)
        target = to_tensor(resize(colours, size))
        if self.fill == "texture":
            near, far = (target.new_tensor(colour).view(3, 1, 1) / 255 for colour in self.colours)
            dimmed = (target == near).all(0) & _checks(size)
            target = torch.where(dimmed, 0.65 * near + 0.35 * far, target)
        return target

    def mask(self, row: Row) -> Image.Image:
        """The mask of a row that has one, PIL "L" of its image's size, 0 or 255."""
        return _binary(row)

    @property
    def colours(self) -> tuple[metrics.Colour, metrics.Colour]:
        """Foreground and background as RGB, 0 to 255."""
        return ImageColor.getrgb(self.foreground)[:3], ImageColor.getrgb(self.background)[:3]

    def score(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return metrics.iou(prediction, target, *self.colours)


@dataclass(frozen=True)
class Detection(Segmentation):
    """Image → the filled box around the mask; an answer is squared off before it is scored (VP §4.2)."""

    def mask(self, row: Row) -> Image.Image:
        mask = _binary(row)
        mask.paste(255, mask.getbbox())
        return mask

    def score(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().score(metrics.squared_off(prediction, *self.colours), target)


@dataclass(frozen=True)
class Edges(Task):
    """Image → its edges, white on black: Sobel's gradient of the luma, in steps of 1/255."""

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        across = cell.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
        kernels = rearrange([across, across.T], "k h w -> k 1 h w")
        gradient = F.conv2d(F.pad(luma(cell)[None, None], (1, 1, 1, 1), mode="replicate"), kernels)[0]
        magnitude = gradient.square().sum(0).sqrt().clamp(max=1)
        return magnitude.mul(255).round().div(255).expand(3, -1, -1)


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
        _choose("position", self.position, "random", "center")

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
    """Luma of the image (ITU-R 601-2, as PIL's "L") in three channels → image.

    Args:
        metric: "mse", or "lpips" (an optional package; see `metrics.lpips`).
    """

    metric: str = "mse"

    def __post_init__(self) -> None:
        _choose("metric", self.metric, "mse", "lpips")

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        return luma(cell).expand(3, -1, -1)

    def score(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return getattr(metrics, self.metric)(prediction, target)


@dataclass(frozen=True)
class Reasoning(Task):
    """A green circle on white → the same, changed (VP §4.3). `data.reasoning` draws the rows; `+` joins changes:

        >>> (tasks.color + tasks.shape).name
        'color+shape'

    An answer is scored by its colour-aware IoU: every pixel goes to the nearest of black and the colours that the
    study allows its answers.

    Args:
        changes: Some of "color" (to blue), "shape" (to a rectangle) and "size" (to a radius of 20 from 30).
    """

    changes: tuple[str, ...]
    metric = "iou"
    needs = "answer"

    def __post_init__(self) -> None:
        object.__setattr__(self, "changes", tuple(sorted(set(self.changes))))
        if self.changes not in _PALETTES:
            known = ", ".join("+".join(changes) for changes in _PALETTES)
            raise ValueError(f"{'+'.join(self.changes) or 'nothing'!r} is not among the reasoning tasks: {known}.")

    @property
    def name(self) -> str:
        return "+".join(self.changes)

    def __add__(self, other: Task) -> Task:
        return Reasoning(self.changes + other.changes) if isinstance(other, Reasoning) else super().__add__(other)

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor | None:
        return to_tensor(resize(as_rgb(row["answer"]), cell.shape[-1])) if row.get("answer") is not None else None

    def score(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        foreground = BLUE if "color" in self.changes else GREEN
        return metrics.colour_iou(prediction, target, foreground, (*_PALETTES[self.changes], metrics.BLACK))


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

    @property
    def needs(self) -> str:
        return self._wanted.needs

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
detection = Detection()
edges = Edges()
color = Reasoning(("color",))
shape = Reasoning(("shape",))
size = Reasoning(("size",))

VTV = (segmentation, lowlight, identity, inpainting, colorization)
"""The five tasks whose vectors VTV finds."""

REASONING = (color, shape, size, color + shape, color + size, shape + size)
"""VP's reasoning study: three changes and their pairs."""

_REGISTRY = {task.name: task for task in (*VTV, detection, edges, color, shape, size)}


def get(name: str) -> Task:
    """The task of a name, or of several joined by "+".

    Raises:
        ValueError: naming the tasks there are.
    """
    unknown = [part for part in name.split("+") if part not in _REGISTRY]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a task; choose from {', '.join(_REGISTRY)}, or join several with '+'.")
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


def _outline(mask: Image.Image) -> Image.Image:
    """The edge of a mask, PIL "L", a thirtieth of its side thick."""
    mask = mask.point(lambda value: 255 * (value > 127))
    thick = 2 * max(1, round(mask.width / 60)) + 1
    inner = np.asarray(mask.filter(ImageFilter.MinFilter(thick)))
    return Image.fromarray(np.where(inner == 0, np.asarray(mask), np.uint8(0)))


def _checks(size: int) -> torch.Tensor:
    """A checkerboard, bool [size, size], fourteen checks across."""
    stripes = torch.arange(size) * 14 // size % 2
    return stripes[:, None] != stripes[None, :]


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
