"""The values of an evaluation, and how sure that is: means, intervals, differences, in every form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as arrow
import torch
from pyarrow.parquet import write_table as write_parquet

from vtv_nnsight import metrics
from vtv_nnsight.evaluation.conditions import BASELINE
from vtv_nnsight.files import UNSEALED, check_seal, replacing, seal, write_text

RESAMPLES = 2000
COLUMNS = ("task", "metric", "condition", "fold", "image", "score")
"""What every file of values has."""


class Line(NamedTuple):
    """One measure of one condition: its mean, and its mean difference to one-shot on the same images, with 95 %
    bootstrap intervals, over its draws too where it has several; NaN where there is none."""

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

    @property
    def title(self) -> str:
        """The condition, and how often it was drawn."""
        return self.condition if self.draws == 1 else f"{self.condition}, {self.draws} draws"


@dataclass(eq=False)
class Table:
    """What `evaluate` returns. `print` it; in a notebook it is a table.

    Args:
        frame: One row for each image and condition: task, metric (its name), label (of the metric, for people),
            condition, draw (0, or the number of a condition's draw), fold, image, query (a number; images of one number
            ask about the same picture), score, loss (the model's own), loss_name.
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
            "query": frame.image,
            "draw": 0,
            "loss": np.nan,
            "loss_name": "loss",
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
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}.")
        try:
            check_seal(path)
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
        is the mean of the folds' means. Intervals resample query pictures, within folds, and draws where a condition
        has several.

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
        """The table of a task as people read it: a row of text for each condition."""
        lines = [line for line in self.lines() if line.task == task]
        frame = self.frame[self.frame.task == task]
        most = max(line.images for line in lines)
        head = f"{task}, {most} images"
        columns = {frame.label.iloc[0]: frame.metric.iloc[0], f"{frame.loss_name.iloc[0]} ↓": frame.loss_name.iloc[0]}
        rows: dict[str, dict[str, str]] = {
            line.condition: {head: line.title + (f", {line.images} images" if line.images < most else "")}
            for line in lines
        }
        for i, (label, measure) in enumerate(columns.items()):
            for line in (line for line in lines if line.measure == measure):
                rows[line.condition][label] = _interval(line.mean, line.low, line.high)
                change = _interval(line.difference, line.difference_low, line.difference_high, sign="+")
                rows[line.condition][f"− {BASELINE}{' ' * i}"] = change
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
    queries = frame.groupby(key)["query"].first().loc[wide.index].to_numpy()
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
        numbers |= dict(zip(part, intervals(list(part.values()), folds[rows], queries[rows])))
    lines = []
    for column, measure in measures.items():
        for name in names:
            mean = numbers[column, name, "mean"]
            change = numbers[column, name, "change"] if name != baseline else (np.nan, np.nan, np.nan)
            images, draws = int(there[name].iloc[:, 0].sum()), there[name].shape[1]
            lines.append(Line(frame.task.iloc[0], name, measure, images, *mean, *change, draws))
    return lines


def _interval(mean: float, low: float, high: float, sign: str = "") -> str:
    return "" if np.isnan(mean) else f"{mean:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"


def bootstrap(
    values: np.ndarray, folds: np.ndarray | None = None, queries: np.ndarray | None = None, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of values [image] and its 95 % percentile interval; see `intervals`."""
    return intervals([np.asarray(values)], folds, queries, seed)[0]


def intervals(
    series: Sequence[np.ndarray], folds: np.ndarray | None = None, queries: np.ndarray | None = None, seed: int = 0
) -> list[tuple[float, float, float]]:
    """The mean of each of several series of values and its 95 % percentile interval, from the same
    `RESAMPLES` resamples.

    Images are resampled within folds, and the folds' means averaged. Images of one query are not independent: they are
    drawn or left out together. Where a series has draws, these are resampled as well.

    Args:
        series: [image] or [image, draw] each.
        folds: [image]; one fold by default.
        queries: [image]: images of one number belong together; by default each stands alone.
        seed: Of what is drawn.

    Returns:
        (mean, low, high) of each series.
    """
    columns = [one[:, None] if one.ndim == 1 else one for one in series]
    values = np.hstack(columns)
    folds = np.zeros(len(values)) if folds is None else np.asarray(folds)
    queries = np.arange(len(values)) if queries is None else np.asarray(queries)
    generator = np.random.default_rng(seed)
    means, resampled = [], []
    for fold in np.unique(folds):
        part = values[folds == fold]
        query, _ = pd.factorize(queries[folds == fold])  # numbered as they first come
        counts = np.bincount(query)
        sums = np.zeros((len(counts), part.shape[1]))
        np.add.at(sums, query, part)
        drawn = generator.integers(len(counts), size=(RESAMPLES, len(counts)))
        offsets = len(counts) * np.arange(RESAMPLES)[:, None]
        weights = np.bincount((drawn + offsets).ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)
        means.append(part.mean(0))
        resampled.append((weights @ sums) / (weights @ counts)[:, None])
    mean, again = np.mean(means, axis=0), np.mean(resampled, axis=0)
    numbers, ends = [], np.cumsum([column.shape[1] for column in columns])[:-1]
    for part, draws in zip(np.split(mean, ends), np.split(again, ends, axis=1)):
        if draws.shape[1] > 1:
            drawn = np.random.default_rng(seed).integers(draws.shape[1], size=draws.shape)
            draws = np.take_along_axis(draws, drawn, axis=1)
        low, high = np.quantile(draws.mean(1), [0.025, 0.975])
        numbers.append((float(part.mean()), float(low), float(high)))
    return numbers
