"""What is asked of the model: how a picture becomes an input and a target, and how an answer is scored.

A task is a value. The papers' own are instances in this module, and `+` asks for two at once. A task's name says all
that it is, so that `get` makes an equal one of it:

    >>> tasks.get("inpainting+lowlight") == tasks.inpainting + tasks.lowlight
    True
    >>> tasks.Lowlight(0.1).name, tasks.get("lowlight(0.1)") == tasks.Lowlight(0.1)
    ('lowlight(0.1)', True)
    >>> prompt = tasks.segmentation.prompt(example=images[0], query=images[1], layout=model.layout)

A row of data is a mapping with "image" (PIL, or the path of a picture) and, where the task needs them, "mask" (PIL "L",
0 or 255), "label" and "answer" (the output itself). A picture alone, or its path, is a row with nothing else.

A new task is a frozen dataclass, a subclass of `Task` that says what is done to the input (`corrupt`), or what is
wanted (`target`), or how it is scored (`metric`). `register` lets `get` and the command line find it:

    @tasks.register
    @dataclass(frozen=True)
    class Negative(tasks.Task):
        def target(self, row, cell, shown):
            return 1 - cell

Sources: VP is *Visual Prompting via Image Inpainting* (NeurIPS 2022), VTV *Finding Visual Task Vectors* (ECCV 2024).
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, fields, replace
from functools import reduce
from numbers import Real
from operator import add
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageColor, ImageFilter
from torch.nn import functional as F

from vtv_nnsight import metrics
from vtv_nnsight.images import FITS, as_cell, digest, luma, open_picture, resize, to_tensor, upright_size
from vtv_nnsight.layouts import Layout
from vtv_nnsight.prompts import VisualPrompt

Row = Mapping[str, Any]
Picture = Image.Image | str | os.PathLike
Place = tuple[float, float]
"""A random point of the unit square, drawn once for each prompt: what the example and the query share."""

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
        metric: How answers are scored.
        needs: The column of a row that the answer is made of, if it is not the image.
    """

    metric = metrics.MSE
    needs = "image"
    fit = "bicubic"
    """How pictures become cells: one of `images.FITS`, or "crop"."""

    @property
    def name(self) -> str:
        """What the task is called, with the settings that are not the defaults: "lowlight", "lowlight(0.1)",
        "segmentation(black, white)", "segmentation(fill=edges)". `get` makes an equal task of it. It can be the name of
        a file: characters that cannot are written as in a URL ("%2F")."""
        given, skipped = [], False
        for field in fields(self):
            value = getattr(self, field.name)
            if _default(field) == value:
                skipped = True
            else:
                given.append(f"{field.name}={_written(value)}" if skipped else _written(value))
        kind = type(self).__name__.lower()
        return f"{kind}({', '.join(given)})" if given else kind

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        """The input that is made of a clean cell [3, size, size] in [0, 1]."""
        return cell

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor | None:
        """The answer [3, size, size] for a row, its clean cell and the input as shown; None where the row lacks what
        the answer is made of."""
        return cell

    def score(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The task's metric of output cells [batch, 3, size, size] in [0, 1]: [batch]."""
        return self.metric(prediction, target)

    def loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The score, negated where higher is better: [batch]."""
        score = self.score(prediction, target)
        return -score if self.higher_is_better else score

    @property
    def higher_is_better(self) -> bool:
        return self.metric.higher_is_better

    def __add__(self, other: Task) -> Task:
        return Sum((self, other))

    def cells(self, row: Row | Picture, size: int, place: Place = CENTER) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The input and the target of one row, [3, size, size] in [0, 1] each."""
        _, shown, target = self._cells(row, size, place)
        return shown, target

    def prompt(
        self,
        example: Row | Picture | Sequence[Row | Picture],
        query: Row | Picture,
        layout: Layout | None = None,
        place: Place = CENTER,
    ) -> VisualPrompt:
        """One one-shot prompt: the example(s) solved, the query, and the truth in the output cell where it is known.

        Args:
            example: A row, or a picture (PIL or its path) where the task makes the answer of the picture alone; a list
                of them for a layout of several examples.
            query: The same.
            layout: The published one by default.
            place: See `Place`.

        Raises:
            ValueError: when the number of examples is not the layout's, or an example lacks what its answer needs.
        """
        layout = layout or Layout()
        examples = [example] if isinstance(example, (Mapping, Image.Image, str, os.PathLike)) else list(example)
        if len(examples) != layout.examples:
            raise ValueError(f"{len(examples)} examples were given for a layout of {layout.examples}; give as many.")
        names = iter(layout.cells)
        cells, pictures = {}, []
        for number, row in enumerate((*examples, query)):
            clean, shown, target = self._cells(row, layout.cell_size, place)
            pictures.append(digest(clean))
            cells[next(names)] = shown
            answer = next(names)
            if target is not None:
                cells[answer] = target
            elif number < len(examples):
                what = f"{_COLUMNS[self.needs]}" if self.needs in _COLUMNS else "as the task wants it"
                raise ValueError(
                    f"an example of {self.name} has no {self.needs!r}; give a row with one: "
                    f"{{'image': …, {self.needs!r}: …}} ({what})."
                )
        return VisualPrompt.from_cells(cells, layout)._with(pictures=torch.tensor([pictures]))

    def prompts(self, images: Any, n: int = 100, seed: int = 0, layout: Layout | None = None) -> VisualPrompt:
        """`n` one-shot prompts of random rows; the same seed gives the same prompts.

        Where the rows have labels, examples are of the query's class. A query is never its own example.

        Args:
            images: A datasets.Dataset or a sequence of rows.
            n: Number of prompts; rows may serve in several.
            seed: Of what is drawn.
            layout: The published one by default.
        """
        layout = layout or Layout()
        return self.compose(images, draw(images, n, layout.examples, seed), layout)

    def compose(self, images: Any, drawn: Draw, layout: Layout | None = None) -> VisualPrompt:
        """The one-shot prompts of drawn rows (see `draw`), all of them or a part: `task.compose(images, drawn[:8])`."""
        prompts = [
            self.prompt([images[i] for i in examples], images[query], layout, (across, down))
            for (*examples, query), (across, down) in zip(drawn.rows.tolist(), drawn.places.tolist())
        ]
        return VisualPrompt.cat(prompts)

    def _cells(self, row: Row | Picture, size: int, place: Place) -> tuple[torch.Tensor, ...]:
        """The picture, the input that is made of it, and the target or None: [3, size, size] each."""
        row = _opened(row)
        clean = as_cell(row["image"], size, self.fit)
        shown = self.corrupt(clean, place)
        return clean, shown, self.target(row, clean, shown)


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
    metric = metrics.IOU
    needs = "mask"

    def __post_init__(self) -> None:
        _choose("fill", self.fill, "solid", "edges", "texture")
        for colour in (self.foreground, self.background):
            if not isinstance(colour, str):
                raise ValueError(f"{colour!r} is not a colour; give one as PIL knows it, as 'white' or '#440154'.")
            ImageColor.getrgb(colour)

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor | None:
        if row.get("mask") is None:
            return None
        size = cell.shape[-1]
        mask = self.mask(row)
        if self.fill == "edges":
            mask = _outline(resize(mask, size, self.fit))
        colours = Image.new("RGB", mask.size, self.background)
        colours.paste(self.foreground, mask=mask)
        target = to_tensor(resize(colours, size, self.fit))
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
    """Image → the filled box around the mask; an answer is squared off before it is scored (VP §4.2).

    Args:
        fit: How pictures and masks are resized: "bicubic", or "bilinear" as in VP's released code of this study.
    """

    fit: str = "bicubic"

    def __post_init__(self) -> None:
        super().__post_init__()
        _choose("fit", self.fit, *FITS)

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

    def __post_init__(self) -> None:
        if not isinstance(self.brightness, Real) or not 0 <= self.brightness <= 1:
            raise ValueError(f"brightness={self.brightness!r} is not a share of the light; give a number from 0 to 1.")

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
        metric: A `Metric` or its name: "mse", "lpips" (an optional package; see `metrics.lpips`), ….
        fit: "bicubic" resizes pictures, as VTV does; "crop" takes their middle in its own pixels, as VP does.
    """

    metric: metrics.Metric | str = metrics.MSE
    fit: str = "bicubic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", metrics.get(self.metric))
        _choose("fit", self.fit, *FITS, "crop")

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        return luma(cell).expand(3, -1, -1)


@dataclass(frozen=True)
class Pairs(Task):
    """Image → the row's answer, whatever that is; `data.pairs` reads a folder of them.

    Args:
        metric: A `Metric` or its name: "mse", "iou" (white on black), "lpips", ….
    """

    metric: metrics.Metric | str = metrics.MSE
    needs = "answer"

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", metrics.get(self.metric))

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor | None:
        return _answer(row, cell)


@dataclass(frozen=True)
class Reasoning(Task):
    """A green circle on white → the same, changed (VP §4.3). `data.reasoning` draws the rows; `+` joins changes:

        >>> (tasks.color + tasks.shape).name
        'color+shape'

    An answer is scored by its colour-aware IoU: every pixel goes to the nearest of black and the colours that the
    study allows its answers. The study's other measures are metrics, too: `metrics.COLOR_BLIND_IOU`, of all that is
    not white, and `metrics.SHAPE_ACCURACY`. Cells are bilinear, as in its released code.

    Args:
        changes: Some of "color" (to blue), "shape" (to a rectangle) and "size" (to a radius of 20 from 30).
        metric: `metrics.IOU`, or one of the two others, or their names.
    """

    changes: tuple[str, ...]
    metric: metrics.Metric | str = metrics.IOU
    needs = "answer"
    fit = "bilinear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", metrics.get(self.metric))
        object.__setattr__(self, "changes", tuple(sorted(set(self.changes))))
        if self.changes not in _PALETTES:
            known = ", ".join("+".join(changes) for changes in _PALETTES)
            raise ValueError(f"{'+'.join(self.changes) or 'nothing'!r} is not among the reasoning tasks: {known}.")

    @property
    def name(self) -> str:
        return "+".join(self.changes)

    @property
    def palette(self) -> tuple[metrics.Colour, ...]:
        """The colours that pixels go to, nearest first on a tie."""
        return (*_PALETTES[self.changes], metrics.BLACK)

    def __add__(self, other: Task) -> Task:
        return Reasoning(self.changes + other.changes) if isinstance(other, Reasoning) else super().__add__(other)

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor | None:
        return _answer(row, cell, self.fit)

    def score(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.metric != metrics.IOU:
            return self.metric(metrics.rounded(prediction, self.palette), metrics.rounded(target, self.palette))
        foreground = BLUE if "color" in self.changes else GREEN
        return metrics.colour_iou(prediction, target, foreground, self.palette)


@dataclass(frozen=True)
class Sum(Task):
    """Several tasks at once: the input suffers all their corruptions in turn; the target and the metric are those of
    the first task that wants something else than the clean image.

    Args:
        parts: The tasks. Sums among them count part by part, and neighbouring changes of `Reasoning` are one.
    """

    parts: tuple[Task, ...]

    def __post_init__(self) -> None:
        parts: list[Task] = []
        for part in (inner for task in self.parts for inner in (task.parts if isinstance(task, Sum) else (task,))):
            if parts and isinstance(part, Reasoning) and isinstance(parts[-1], Reasoning):
                parts[-1] += part
            else:
                parts.append(part)
        object.__setattr__(self, "parts", tuple(parts))

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    @property
    def _wanted(self) -> Task:
        return next((part for part in self.parts if type(part).target is not Task.target), self.parts[0])

    @property
    def metric(self) -> metrics.Metric:
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
pairs = Pairs()
color = Reasoning(("color",))
shape = Reasoning(("shape",))
size = Reasoning(("size",))

VTV = (segmentation, lowlight, identity, inpainting, colorization)
"""The five tasks whose vectors VTV finds."""

REASONING = (color, shape, size, color + shape, color + size, shape + size)
"""VP's reasoning study: three changes and their pairs."""

_REGISTRY: dict[str, Task] = {}
_KINDS: dict[str, type[Task]] = {}
_OUTSIDE_BRACKETS = r"(?![^(]*\))"
_Registered = TypeVar("_Registered", bound=Task | type[Task])


def register(task: _Registered) -> _Registered:
    """Let `get`, and with it the command line, find a task by its name, and its kind with any settings.

    Args:
        task: A task, or a class of tasks whose settings have defaults (so that it decorates a class).

    Returns:
        What was given.

    Raises:
        TypeError: when it is no task.
        ValueError: when the name belongs to one of this module's tasks. One of your own is replaced.
    """
    one = task() if isinstance(task, type) and issubclass(task, Task) else task
    if not isinstance(one, Task):
        raise TypeError(f"{task!r} is not a task; give an instance or a subclass of tasks.Task.")
    if isinstance(one, Sum):
        raise ValueError(f"{one.name!r} is a sum; register its parts, and get finds the sum.")
    kind = one.name.partition("(")[0]
    other = _KINDS.get(kind, type(one))
    if other is not type(one) and other.__module__ == __name__:
        raise ValueError(f"{kind!r} is the name of another task; choose a name of its own.")
    _REGISTRY[one.name], _KINDS[kind] = one, type(one)
    return task


def get(name: str) -> Task:
    """The task of a name such as "lowlight" or "lowlight(0.1)", or of several joined by "+".

    Raises:
        ValueError: naming the tasks there are, or what is wrong with the settings.
    """
    return reduce(add, map(_read, re.split(r"\+" + _OUTSIDE_BRACKETS, name)))


def get_all(names: str) -> list[Task]:
    """The tasks of names with commas between them, as the command line takes them."""
    return [get(name) for name in re.split("," + _OUTSIDE_BRACKETS, names)]


def names() -> list[str]:
    """The names that `get` knows; settings in brackets make others of them."""
    return list(_REGISTRY)


def _read(name: str) -> Task:
    """The task of a name without "+"."""
    name = name.strip()
    if name in _REGISTRY:
        return _REGISTRY[name]
    kind, bracket, rest = name.partition("(")
    if kind not in _KINDS or (bracket and not rest.endswith(")")):
        raise ValueError(
            f"{name!r} is not a task; choose from {', '.join(_REGISTRY)}, with settings in brackets as in "
            "'lowlight(0.1)', or join several with '+'."
        )
    values: list[Any] = []
    named: dict[str, Any] = {}
    for part in rest.removesuffix(")").split(",") if bracket else []:
        key, equals, text = part.strip().partition("=")
        if equals:
            named[key] = _value(text)
        else:
            values.append(_value(key))
    try:
        return _KINDS[kind](*values, **named)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name!r} is not a {kind} task: {error}") from error


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _written(value: Any) -> str:
    """A setting in a task's name: words and numbers as they are, all else as in a URL."""
    if isinstance(value, metrics.Metric):
        value = value.name
    value = value.item() if hasattr(value, "item") else value
    return quote(value if isinstance(value, str) and _value(value) == value else repr(value), safe="#")


def _value(text: str) -> Any:
    """What `_written` wrote: a Python literal, or else a word."""
    text = unquote(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@dataclass(frozen=True, eq=False)
class Draw:
    """Which rows make which prompt, and where their random places are; a part of it by indexing.

    Args:
        rows: Row numbers [prompt, examples + 1], the query's last.
        places: A `Place` for each prompt, [prompt, 2].
    """

    rows: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, prompts: slice | Sequence[int] | np.ndarray) -> Draw:
        return Draw(self.rows[prompts], self.places[prompts])


def draw(images: Any, n: int, examples: int = 1, seed: int | np.random.Generator = 0) -> Draw:
    """Draw rows and places for `n` prompts of so many examples; see `draw_rows`."""
    generator = np.random.default_rng(seed)
    return Draw(draw_rows(images, n, examples, generator), generator.random((n, 2)))


def draw_queries(images: Any, queries: Sequence[int], examples: int = 1, seed: int | np.random.Generator = 0) -> Draw:
    """Draw the examples of given queries at random, of the query's class where the data has labels; and the places.

    Args:
        images: A datasets.Dataset or a sequence of rows.
        queries: Row numbers, one for each prompt.
        examples: For each prompt.
        seed: Of what is drawn.

    Raises:
        ValueError: when a query has too few others of its class.
    """
    generator = np.random.default_rng(seed)
    labels = labels_of(images)
    labels = np.zeros(len(images)) if labels is None else labels
    groups = {label: np.flatnonzero(labels == label) for label in np.unique(labels[list(queries)])}
    rows = []
    for query in queries:
        others = groups[labels[query]][groups[labels[query]] != query]
        if len(others) < examples:
            raise ValueError(f"row {query} has {len(others)} others of its class and a prompt needs {examples}.")
        rows.append([*generator.choice(others, size=examples, replace=False), query])
    return Draw(np.array(rows, dtype=np.int64).reshape(len(rows), examples + 1), generator.random((len(rows), 2)))


def draw_rows(images: Any, n: int, examples: int, generator: np.random.Generator) -> np.ndarray:
    """Draw rows for prompts: [n, examples + 1] row numbers, the query last.

    The rows of a prompt are distinct and of one class where the data has labels.

    Raises:
        TypeError: when the data cannot be asked for a row by its number, such as a streaming data set.
        ValueError: when no class has enough images.
    """
    if n < 1:
        raise ValueError(f"n={n} prompts were asked for; expected 1 or more.")
    if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        raise TypeError(
            f"{type(images).__name__} has no rows that can be drawn by number; give a Dataset or a list: of a "
            "streaming data set, list(images.take(1000))."
        )
    labels = labels_of(images)
    groups = [np.arange(len(images))] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
    groups = [group for group in groups if len(group) > examples]
    if not groups:
        what = "images" if labels is None else "images of a class"
        raise ValueError(f"a prompt needs {examples + 1} different {what}, more than there are in these data.")
    sizes = np.array([len(group) for group in groups])
    choice = generator.choice(len(groups), size=n, p=sizes / sizes.sum())
    return np.stack([generator.choice(groups[c], size=examples + 1, replace=False) for c in choice])


def labels_of(images: Any) -> np.ndarray | None:
    """The label of every row of data [row]; None where rows have none."""
    if hasattr(images, "column_names"):
        if "label" not in images.column_names:
            return None
        return np.asarray(images.with_format(None)["label"])  # whatever the format is: a transform reads all of a row
    named = len(images) and isinstance(images[0], Mapping) and "label" in images[0]
    return np.asarray([row["label"] for row in images]) if named else None


def scored_by(task: Task, metric: metrics.Metric | str) -> Task:
    """The task with another metric.

    Raises:
        ValueError: when there is no such metric, or the task's score is its own, as a mask's is.
    """
    metric = metrics.get(metric)
    if metric == task.metric:
        return task
    if any(field.name == "metric" for field in fields(task)):
        return replace(task, metric=metric)
    if type(task).score is not Task.score:
        raise ValueError(f"{task.name!r} is scored by {task.metric.label} in a way of its own, not by {metric.name}.")
    other = copy(task)
    object.__setattr__(other, "metric", metric)
    return other


def _answer(row: Row, cell: torch.Tensor, fit: str = "bicubic") -> torch.Tensor | None:
    """The row's answer at a cell's size; None where it has none."""
    return as_cell(row["answer"], cell.shape[-1], fit) if row.get("answer") is not None else None


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


def _opened(row: Row | Picture) -> Row:
    """A row whose pictures are PIL images, not paths."""
    if not isinstance(row, Mapping):
        return {"image": open_picture(row)}
    if "image" not in row:
        raise ValueError(f"a row with {', '.join(row) or 'nothing'} has no 'image'; give a PIL image of that name.")
    paths = {name: open_picture(row[name]) for name in _COLUMNS if isinstance(row.get(name), (str, os.PathLike))}
    return {**row, **paths}


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


for _task in (*VTV, detection, edges, pairs, color, shape, size):
    register(_task)
