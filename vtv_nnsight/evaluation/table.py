"""The values of an evaluation, and how sure that is: means, intervals, differences, in every form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as arrow
import torch
from pyarrow.parquet import write_table as write_parquet

from vtv_nnsight import metrics
from vtv_nnsight.evaluation.conditions import BASELINE, FEW_SHOT, PATCHED
from vtv_nnsight.evaluation.resampling import intervals
from vtv_nnsight.files import UNSEALED, check_seal, replacing, seal, write_text
from vtv_nnsight.tasks.base import SOURCES

COLUMNS = ("task", "metric", "condition", "fold", "image", "score")
"""What every file of values has."""
IDENTIFIERS = ("query", "example", *SOURCES, "seed")
"""Columns of numbers: rows that have one in common share a picture, or the seed of all that was drawn."""
ENOUGH = 8
"""Different query pictures, at least, for a verdict."""


class Line(NamedTuple):
    """One measure of one condition: its mean, and its mean difference to one-shot on the same images, with 95 %
    bootstrap intervals, over its draws too where it has several; NaN where there is none. `images` are the prompts, and
    `pictures` their different queries; `beside` is the task vector's mean on the same images, where those are
    fewer than its own."""

    task: str
    condition: str
    measure: str
    images: int
    mean: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    draws: int = 1
    pictures: int = 0
    beside: float = np.nan
    noun: str = "images"

    @property
    def asked(self) -> str:
        """What was asked: "128 images", or "2 pictures, 16 prompts" where query pictures repeat; of texts "128
        prompts", or "2 queries, 16 prompts"."""
        if self.pictures == self.images:
            return f"{self.images} {self.noun}"
        return f"{self.pictures} {self.queries}, {self.images} prompts"

    @property
    def queries(self) -> str:
        """What different queries are called."""
        return "pictures" if self.noun == "images" else "queries"

    @property
    def title(self) -> str:
        """The condition, and how often it was drawn."""
        name = titled(self.condition, self.noun)
        return name if self.draws == 1 else f"{name}, {self.draws} draws"

    @property
    def fewer(self) -> str:
        """What was asked where that is less than what the task vector was, and what the vector has there."""
        return "" if np.isnan(self.beside) else f"{self.asked}; the {PATCHED} has {self.beside:.3f} there"


@dataclass(eq=False)
class Table:
    """What `evaluate` returns. `print` it; in a notebook it is a table.

    Args:
        frame: One row for each image and condition: task, metric (its name), label (of the metric, for people),
            condition, draw (0, or the number of a condition's draw), fold, image, score, loss (the model's own),
            loss_name, noun ("images", or "prompts" of texts), and `IDENTIFIERS` as far as they are known: of `query`,
            images of one number ask about the same picture.
        pictures: Task → name → uint8 [image, 3, height, width]: "prompt" (canvases, their outputs grey), "truth" and
            every condition's answers for the first images.
    """

    frame: pd.DataFrame
    pictures: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    _lines: dict[str, list[Line]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        frame = self.frame
        if missing := [name for name in COLUMNS if name not in frame]:
            raise ValueError(f"these values have no column {missing[0]!r}; expected {', '.join(COLUMNS)}, ….")
        labels = frame.metric.replace({name: metric.label for name, metric in metrics.METRICS.items()})
        default: dict[str, Any] = {
            "label": labels,
            "query": frame.groupby(["fold", "image"]).ngroup(),
            "draw": 0,
            "loss": np.nan,
            "loss_name": "loss",
            "noun": "images",
        }
        self.frame = frame.assign(**{name: values for name, values in default.items() if name not in frame})

    @classmethod
    def cat(cls, tables: Iterable[Table]) -> Table:
        """Tables of several tasks or folds as one."""
        tables = list(tables)
        pictures = {task: answers for table in reversed(tables) for task, answers in table.pictures.items()}
        return cls(pd.concat([table.frame for table in tables], ignore_index=True), pictures)

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """The per-image values that `to_parquet` wrote.

        Raises:
            FileNotFoundError, ValueError: when there is no such file, or it holds something else.
        """
        check_seal(path)
        try:
            return cls(pd.read_parquet(path))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} does not hold the values of an evaluation ({error}); evaluate again.") from error

    @property
    def tasks(self) -> list[str]:
        """Their names, in order."""
        return list(self.frame.task.unique())

    def values(self, task: str, condition: str, measure: str = "score") -> np.ndarray:
        """Per-image values [image], folds one after the other; means over the draws of a condition that has several.

        Args:
            task, condition: Their names.
            measure: "score", or "loss" or the loss's own name ("token loss", "token_loss").

        Raises:
            ValueError: when there is no such task, condition or measure.
        """
        frame = self._rows(task, condition)
        name = frame.loss_name.iloc[0]
        columns = {"score": "score", "loss": "loss", name: "loss", name.replace(" ", "_"): "loss"}
        if measure not in columns:
            raise ValueError(f"the table has no {measure!r} of {task!r}; choose from {', '.join(columns)}.")
        key = ["fold", "image", "repeat"]
        frame = frame.assign(repeat=frame.groupby(["draw", "fold", "image"]).cumcount())
        return frame.groupby(key)[columns[measure]].mean().to_numpy()

    def identifiers(self, task: str, condition: str) -> np.ndarray:
        """What the images of `values` share, [image, identifier], for `bootstrap`.

        Raises:
            ValueError: when there is no such task or condition.
        """
        rows = self._rows(task, condition).drop_duplicates(["fold", "image"]).sort_values(["fold", "image"])
        return rows[_known(rows)].to_numpy()

    def draws(self, task: str, condition: str, same_images_as: str | None = None) -> np.ndarray:
        """The mean score of every draw of a condition [draw]: of folds, the mean of their means.

        Args:
            task, condition: Their names.
            same_images_as: Count only the images that this other condition was asked, too.

        Raises:
            ValueError: when there is no such task or condition.
        """
        rows, other = self._rows(task, condition), self._rows(task, same_images_as or condition)
        rows = rows.merge(other[["fold", "image"]].drop_duplicates())
        return rows.groupby(["draw", "fold"]).score.mean().groupby("draw").mean().to_numpy()

    def _rows(self, task: str, condition: str) -> pd.DataFrame:
        rows = self.frame[(self.frame.task == task) & (self.frame.condition == condition)]
        if not len(rows):
            raise ValueError(f"the table has no {condition!r} of {task!r}.")
        return rows

    def lines(self, baseline: str = BASELINE) -> list[Line]:
        """Means and intervals of all conditions: the task's metric, then the model's loss. With several folds, a mean
        is the mean of the folds' means. Intervals resample the pictures that images share, within folds (see
        `resampling`), and draws where a condition has several.

        Args:
            baseline: The condition that differences are to.
        """
        if baseline not in self._lines:
            self._lines[baseline] = [
                line for _, part in self.frame.groupby("task", sort=False) for line in _lines(part, baseline)
            ]
        return list(self._lines[baseline])

    def markdown(self) -> str:
        """A Markdown table for each task."""
        return self._text("pipe")

    def to_csv(self, path: str | Path) -> None:
        """Write one line for each task, condition and measure."""
        write_text(path, pd.DataFrame(self.lines()).to_csv(index=False, na_rep="nan", lineterminator="\n"))

    def to_parquet(self, path: str | Path) -> None:
        """Write the per-image values."""
        with replacing(path) as temporary:
            table = arrow.Table.from_pandas(self.frame, preserve_index=False)
            write_parquet(table.replace_schema_metadata({**table.schema.metadata, "digest": UNSEALED}), temporary)
            seal(temporary)

    def summary(self, task: str) -> pd.DataFrame:
        """The table of a task as people read it: a row of text for each condition, differences to one-shot, or to the
        first condition where no one is called so."""
        frame = self.frame[self.frame.task == task]
        names = frame.condition.unique()
        baseline = BASELINE if BASELINE in names else names[0]
        lines = [line for line in self.lines(baseline) if line.task == task]
        most, title = max(lines, key=lambda line: line.images), titled(baseline, frame.noun.iloc[0])
        head = f"{task}, {most.asked}"
        columns = {frame.label.iloc[0]: frame.metric.iloc[0], f"{frame.loss_name.iloc[0]} ↓": frame.loss_name.iloc[0]}
        rows: dict[str, dict[str, str]] = {
            line.condition: {head: line.title + (f", {line.fewer or line.asked}" if line.images < most.images else "")}
            for line in lines
            if line.measure == frame.metric.iloc[0]
        }
        for i, (label, measure) in enumerate(columns.items()):
            for line in (line for line in lines if line.measure == measure):
                rows[line.condition][label] = _interval(line.mean, line.low, line.high)
                change = _interval(line.difference, line.difference_low, line.difference_high, sign="+")
                rows[line.condition][f"− {title}{' ' * i}"] = change
        return pd.DataFrame(rows.values())

    def __repr__(self) -> str:
        return self._text("simple")

    def _repr_html_(self) -> str:
        return "".join(self.summary(task).to_html(index=False, border=0) for task in self.tasks)

    def _text(self, form: str) -> str:
        options: dict[str, Any] = {"disable_numparse": True, "colalign": ("left", *["right"] * 4), "tablefmt": form}
        return "\n\n".join(self.summary(task).to_markdown(index=False, **options) for task in self.tasks)


def _lines(frame: pd.DataFrame, baseline: str) -> list[Line]:
    """The lines of one task's rows."""
    key = ["fold", "image", "repeat"]
    frame = frame.assign(repeat=frame.groupby(["condition", "draw", "fold", "image"]).cumcount(), there=True)
    wide: Any = frame.pivot(index=key, columns=["condition", "draw"], values=["score", "loss", "there"])
    identifiers = frame.groupby(key)[_known(frame)].first().loc[wide.index].to_numpy()
    folds = wide.index.get_level_values("fold").to_numpy()
    there = wide["there"].notna()
    names = list(frame.condition.unique())
    measures = {"score": frame.metric.iloc[0], "loss": frame.loss_name.iloc[0]}
    series: dict[tuple[str, str, str], np.ndarray] = {}
    for column in measures:
        values = wide[column].astype(float)
        base = values[baseline].mean(axis=1) if baseline in names else np.nan
        series |= {(column, name, "mean"): values[name].to_numpy() for name in names}
        series |= {(column, name, "change"): values[name].sub(base, axis=0).to_numpy() for name in names}
    numbers: dict[tuple[str, str, str], tuple[float, float, float]] = {}
    for group in [names] if there.all(axis=None) else [[name] for name in names]:  # those of the same images
        rows = there[group[0]].iloc[:, 0].to_numpy()
        part = {place: values[rows] for place, values in series.items() if place[1] in group}
        numbers |= dict(zip(part, intervals(list(part.values()), folds[rows], identifiers[rows])))
    lines = []
    for column, measure in measures.items():
        for name in names:
            mean = numbers[column, name, "mean"]
            change = numbers[column, name, "change"] if name != baseline else (np.nan, np.nan, np.nan)
            asked = there[name].iloc[:, 0].to_numpy()
            facts: dict[str, Any] = {"draws": there[name].shape[1], "noun": frame.noun.iloc[0]}
            facts["pictures"] = len(np.unique(identifiers[asked, 0]))
            if PATCHED in names and asked.sum() < there[PATCHED].iloc[:, 0].sum():
                own = pd.Series(series[column, PATCHED, "mean"][asked, 0]).groupby(folds[asked]).mean()
                facts["beside"] = float(own.mean())
            lines.append(Line(frame.task.iloc[0], name, measure, int(asked.sum()), *mean, *change, **facts))
    return lines


def titled(condition: str, noun: str) -> str:
    """A condition as people read it: of texts, with "few-shot" for "one-shot"."""
    return condition if noun == "images" else condition.replace(BASELINE, FEW_SHOT)


def _known(frame: pd.DataFrame) -> list[str]:
    """The identifiers that all rows have."""
    return [name for name in IDENTIFIERS if name in frame and frame[name].notna().all()]


def _interval(mean: float, low: float, high: float, sign: str = "") -> str:
    return "" if np.isnan(mean) else f"{mean:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"
