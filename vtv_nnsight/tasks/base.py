"""What a task is: the base of all of them, and the sum of several."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

import torch
from PIL import Image

from vtv_nnsight import metrics
from vtv_nnsight.digests import text_number
from vtv_nnsight.files import physical_memory
from vtv_nnsight.finite import check_whole
from vtv_nnsight.images import as_cell, digest, open_picture
from vtv_nnsight.layouts import Layout
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.tasks.sampling import Draw, draw
from vtv_nnsight.text import check_kind

Row = Mapping[str, Any]
Picture = Image.Image | str | os.PathLike[str]
AnyRow = Row | Picture
Place = tuple[float, float]
"""A random point of the unit square, drawn once for each prompt: what the example and the query share."""

CENTER: Place = (0.5, 0.5)
SOURCES = ("object", "background", "source")
"""Columns that tell what a row's picture was made of: rows that share it are not independent."""
_COLUMNS = {"image": "PIL", "mask": "PIL 'L', 0 or 255", "answer": "PIL: the output itself"}


Scored = TypeVar("Scored", bound="AnyTask")


class AnyTask:
    """What every task has, of pictures or of texts.

    Class attributes:
        metric: How answers are scored; given by its name, it becomes the metric.
        reads: What kinds of metric there may be (see `metrics.Metric.reads`).
        layout_type: Of what kind the layout of its prompts is.
    """

    metric: metrics.Metric
    reads: tuple[str, ...] = ("pixels",)
    layout_type: type = Layout
    if TYPE_CHECKING:

        @property
        def name(self) -> str:
            """What the task is called."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", metrics.get(self.metric, self.reads))

    def check_model(self, model: Any) -> None:
        """Refuse a model that is asked otherwise: with texts, or with pictures.

        Raises:
            ValueError: saying which goes with which.
        """
        if not isinstance(model.layout, self.layout_type):
            raise ValueError(f"{self.name!r} does not go with a {type(model).__name__}; words are for language models.")

    def score(self, prediction: Any, target: Any) -> torch.Tensor:
        """The task's metric of answers, of which it says what they are (see `metrics.Metric.reads`): [batch]."""
        return self.metric(prediction, target)

    def loss(self, prediction: Any, target: Any) -> torch.Tensor:
        """The score, negated where higher is better: [batch]."""
        score = self.score(prediction, target)
        return -score if self.higher_is_better else score

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher score is a better one, as the metric says."""
        return self.metric.higher_is_better


@dataclass(frozen=True)
class Task(AnyTask):
    """The identity task, and the base of the others of pictures: input and target are the image.

    Class attributes:
        metric: How answers are scored.
        needs: The column of a row that the answer is made of, if it is not the image.
        change: How `images.carry_over` brings an answer to a photograph at full resolution; "" where it cannot.
    """

    metric = metrics.MSE
    needs = "image"
    change = ""
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
            if field.default == value:
                skipped = True
            else:
                given.append(f"{field.name}={_write_setting(value)}" if skipped else _write_setting(value))
        kind = type(self).__name__.lower()
        return f"{kind}({', '.join(given)})" if given else kind

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        """The input that is made of a clean cell [3, size, size] in [0, 1]."""
        return cell

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor | None:
        """The answer [3, size, size] for a row, its clean cell and its corrupted one; None where the row lacks what the
        answer is made of."""
        return cell

    def __add__(self, other: Task) -> Task:
        return Sum((self, other))

    def cells(self, row: AnyRow, size: int, place: Place = CENTER) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The input and the target of one row, [3, size, size] in [0, 1] each."""
        return self._cells(row, size, place)[1:]

    def prompt(
        self, example: AnyRow | Sequence[AnyRow], query: AnyRow, layout: Layout | None = None, place: Place = CENTER
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
        check_kind(layout, Layout, "layout", "a Layout, such as model.layout")
        examples = [example] if isinstance(example, (Mapping, Image.Image, str, os.PathLike)) else list(example)
        if len(examples) != layout.examples:
            raise ValueError(f"{len(examples)} examples were given for a layout of {layout.examples}; give as many.")
        names = iter(layout.cells)
        cells, pictures = {}, []
        for number, row in enumerate((*examples, query)):
            clean, corrupted, target = self._cells(row, layout.cell_size, place)
            pictures.append(digest(clean))
            cells[next(names)] = corrupted
            answer = next(names)
            if target is not None:
                cells[answer] = target
            elif number < len(examples):
                raise ValueError(
                    f"an example of {self.name} has no {self.needs!r}; give a row with one: "
                    f"{{'image': …, {self.needs!r}: …}} ({_COLUMNS.get(self.needs, 'as the task wants it')})."
                )
        columns = query if isinstance(query, Mapping) else {}
        sources = {
            name: torch.tensor([text_number(columns[name])]) for name in SOURCES if columns.get(name) is not None
        }
        return VisualPrompt.from_cells(cells, layout)._with(pictures=torch.tensor([pictures]), sources=sources)

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
        check_kind(layout, Layout, "layout", "a Layout, such as model.layout")
        check_whole(n=n, seed=seed)
        if (needed := 12 * n * layout.canvas_size**2) > (memory := physical_memory()):
            raise ValueError(f"n={n:,} prompts take {needed:,} bytes and this machine has {memory:,}; ask for fewer.")
        return self.compose(images, draw(images, n, layout.examples, seed), layout)

    def compose(self, images: Any, drawn: Draw, layout: Layout | None = None) -> VisualPrompt:
        """The one-shot prompts of drawn rows (see `draw`), all of them or a part: `task.compose(images, drawn[:8])`."""
        prompts = [
            self.prompt([images[i] for i in examples], images[query], layout, (across, down))
            for (*examples, query), (across, down) in zip(drawn.rows.tolist(), drawn.places.tolist())
        ]
        return VisualPrompt.cat(prompts)

    def _cells(self, row: AnyRow, size: int, place: Place) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The picture, the input that is made of it, and the target or None: [3, size, size] each."""
        row = _open_row(row)
        clean = as_cell(row["image"], size, self.fit)
        corrupted = self.corrupt(clean, place)
        return clean, corrupted, self.target(row, clean, corrupted)


@dataclass(frozen=True)
class Sum(Task):
    """Several tasks at once: the input suffers all their corruptions in turn; the target and the metric are those of
    the first task that wants something else than the clean image.

    Args:
        parts: The tasks; sums among them count part by part.
    """

    parts: tuple[Task, ...]

    def __post_init__(self) -> None:
        parts = (part for task in self.parts for part in (task.parts if isinstance(task, Sum) else (task,)))
        object.__setattr__(self, "parts", tuple(parts))
        object.__setattr__(self, "metric", self._asking.metric)
        object.__setattr__(self, "needs", self._asking.needs)

    @property
    def name(self) -> str:
        """The names of the parts, joined by "+"."""
        return "+".join(part.name for part in self.parts)

    @property
    def _asking(self) -> Task:
        """The first part that wants something else than the clean image, or else the first."""
        return next((part for part in self.parts if type(part).target is not Task.target), self.parts[0])

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        """The input that all parts have corrupted in turn: [3, size, size]."""
        return reduce(lambda corrupted, part: part.corrupt(corrupted, place), self.parts, cell)

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor | None:
        """The answer that the first part with another one than the clean image wants: [3, size, size], or None."""
        return self._asking.target(row, cell, corrupted)

    def score(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The scores of the part that says what is wanted: [batch]."""
        return self._asking.score(prediction, target)


def scored_by(task: Scored, metric: metrics.Metric | str) -> Scored:
    """The task with another metric.

    Raises:
        ValueError: when there is no such metric, or the task does not score by its metric alone, as of masks.
    """
    metric = metrics.get(metric, task.reads)
    if metric == task.metric:
        return task
    if type(task).score is not AnyTask.score and not any(
        field.name == "metric"
        for field in fields(task)  # type: ignore[arg-type]  # all tasks are dataclasses
    ):
        raise ValueError(f"{task.name!r} is scored by {task.metric.label} in its own way, not by {metric.name}.")
    other = copy(task)
    object.__setattr__(other, "metric", metric)
    return other


def answer_target(task: Task, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor | None:
    """The row's answer [3, size, size]; None where it has none. The method `target` of tasks that need it."""
    return as_cell(row["answer"], cell.shape[-1], task.fit) if row.get("answer") is not None else None


def _open_row(row: AnyRow) -> Row:
    """A row with PIL images, not paths."""
    if not isinstance(row, Mapping):
        return {"image": open_picture(row)}
    if "image" not in row:
        raise ValueError(f"a row with {', '.join(row) or 'nothing'} has no 'image'; give a PIL image of that name.")
    paths = {name: open_picture(row[name]) for name in _COLUMNS if isinstance(row.get(name), (str, os.PathLike))}
    return {**row, **paths}


def _write_setting(value: Any) -> str:
    """A setting in a task's name: words and numbers as they are, all else as in a URL."""
    if isinstance(value, metrics.Metric):
        value = value.name
    value = value.item() if hasattr(value, "item") else value
    return quote(value if isinstance(value, str) and read_setting(value) == value else repr(value), safe="#")


def read_setting(text: str) -> Any:
    """What `_write_setting` wrote: a Python literal, or else a word."""
    text = unquote(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
