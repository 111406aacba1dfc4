"""How well a model does a task under several conditions, on the same prompts, and how sure that is.

    >>> table = evaluate(model, task, prompts, comparison(vectors["segmentation"], result.patches, vectors))
    >>> print(table)                                    # means, 95 % intervals, paired differences to one-shot
    >>> table.parquet("values.parquet")                 # one row an image and condition

The metric is the task's own, of the output cell; beside it stands the token loss, the mean cross-entropy of the
output's logits against the tokenizer's codes of the true canvas. Also here: `select_prompts`, VTV's first step.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from vtv_nnsight import metrics
from vtv_nnsight.files import replacing, write_text
from vtv_nnsight.layouts import Layout
from vtv_nnsight.patches import PatchSet, patch
from vtv_nnsight.progress import tqdm
from vtv_nnsight.prompts import VisualPrompt, crop
from vtv_nnsight.stages import device_of
from vtv_nnsight.tasks import Task, draw_rows
from vtv_nnsight.vectors import TaskVector

UNPATCHED = ("one-shot", "zero-shot", "tokenizer", "copy")
BASELINE = "one-shot"
"""The condition, by its name in a table, that the others are compared with."""
RESAMPLES = 2000
CONTROL = 104_729
"""Added to the seed of the control's units, so that a user's own random set of the same seed is another one."""

Condition = str | None | tuple
"""One of `UNPATCHED` (None is "one-shot"), or (vector, patches), zero-shot, or (vector, patches, "one-shot")."""


def comparison(
    vector: TaskVector, patches: PatchSet, others: Mapping[str, TaskVector] | None = None, seed: int = 0
) -> dict[str, Condition]:
    """The conditions that tell what a vector and its patches are worth.

    One-shot; zero-shot; zero-shot and one-shot with patches; the vector at as many units drawn at random; the vector of
    another task (the next of `others`) at the same units; the tokenizer's own picture of the truth (the ceiling); the
    query as its own answer (the floor).
    """
    conditions: dict[str, Condition] = {
        "one-shot": "one-shot",
        "zero-shot": "zero-shot",
        "task vector": (vector, patches),
        "one-shot + task vector": (vector, patches, "one-shot"),
        "random units": (vector, PatchSet.random(patches.space, len(patches), CONTROL + seed)),
    }
    names = list(others or ())
    if rest := [name for name in names if name != vector.task]:
        after = names[(names.index(vector.task) + 1) % len(names)] if vector.task in names else rest[0]
        conditions[f"vector of {after}"] = (others[after], patches)
    return conditions | {"tokenizer": "tokenizer", "copy": "copy"}


def evaluate(
    model: Any,
    task: Task,
    prompts: VisualPrompt,
    conditions: Mapping[str, Condition] | None = None,
    *,
    fold: int = 0,
    batch_size: int = 32,
    keep: int = 6,
    progress: bool = True,
) -> Table:
    """Run a model on the same prompts under every condition.

    Args:
        model: A MAEVQGAN, on its device and in its dtype.
        task: What the prompts ask, and how answers are scored.
        prompts: With the truth in their output cells; every condition shows the stacks what it needs of them.
        conditions: Name → "one-shot" or None, "zero-shot", "tokenizer" (the tokenizer's own picture of the truth),
            "copy" (the query), (vector, patches) for zero-shot with patches, or (vector, patches, "one-shot"). By
            default the four without patches; `comparison` gives them all. Differences are to the one named "one-shot".
        fold: A number to tell parts of the data apart. `Table.cat` of several folds averages the folds' means, as is
            done for Pascal-5i (NeurIPS 2022, §4.2).
        batch_size: Rows a trace.
        keep: Answers to keep for `plots.answers`.
        progress: Show a progress bar.

    Raises:
        ValueError: when there are no prompts or no conditions, or a condition is none of those above.
    """
    if not len(prompts):
        raise ValueError(f"there are no prompts of {task.name!r} to evaluate on; give at least one.")
    if conditions is None:
        conditions = {name: name for name in UNPATCHED}
    if not conditions:
        raise ValueError("there are no conditions to compare; give {name: condition}.")
    device = device_of(model)
    plans = {name: _plan(name, condition, device) for name, condition in conditions.items()}
    values: dict[str, list[torch.Tensor]] = {name: [] for name in plans}
    pictures: dict[str, list[torch.Tensor]] = {name: [] for name in ("prompt", "truth", *plans)}
    kept = 0
    with torch.no_grad(), tqdm(total=len(prompts) * len(plans), unit="answer", disable=not progress) as bar:
        for batch in prompts.split(batch_size):
            batch = VisualPrompt.from_canvas(batch.canvas.to(device), batch.layout)
            codes = model._module.vqgan.encode(batch.canvas.to(model._module.dtype))
            truth, more = batch.region("output"), min(len(batch), keep - kept)
            asked = batch.canvas[:more].clone()
            crop(asked, "output", batch.layout)[:] = 0.5
            shown = {"prompt": asked, "truth": truth}
            for name, plan in plans.items():
                bar.set_postfix_str(f"{task.name}, {name}")
                shown[name], loss = _answer(model, batch, codes, plan)
                values[name].append(torch.stack([task.score(shown[name], truth).double(), loss.double()], 1).cpu())
                bar.update(len(batch))
            for name, cells in shown.items():
                pictures[name].append(cells[:more].mul(255).round().byte().cpu())
            kept += more
    rows = [
        {"task": task.name, "metric": task.metric, "condition": name, "fold": fold, "image": i, "score": score}
        | {"token_loss": loss}
        for name, parts in values.items()
        for i, (score, loss) in enumerate(torch.cat(parts).tolist())
    ]
    return Table(Dataset.from_list(rows), {task.name: {name: torch.cat(parts) for name, parts in pictures.items()}})


class _Plan(NamedTuple):
    """A condition, spelled out."""

    shot: str
    vector: TaskVector | None = None
    patches: PatchSet | None = None


def _plan(name: str, condition: Condition, device: torch.device) -> _Plan:
    if condition is None or isinstance(condition, str):
        plan = _Plan(condition or "one-shot")
        allowed = UNPATCHED
    else:
        vector, patches, shot = (*condition, "zero-shot")[:3]
        plan = _Plan(shot, vector.to(device), patches)
        allowed = ("one-shot", "zero-shot")
    if plan.shot not in allowed:
        raise ValueError(f"condition {name!r} is {plan.shot!r}; choose one of {', '.join(allowed)}.")
    return plan


def _answer(model: Any, prompts: VisualPrompt, codes: torch.Tensor, plan: _Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """The output cells [batch, 3, cell, cell] and the token losses [batch] (NaN where there are no logits) of one-shot
    prompts with the tokenizer's codes [batch, patch] of their canvases."""
    layout, none = prompts.layout, torch.full((len(prompts),), torch.nan, device=prompts.device)
    if plan.shot == "copy":
        return prompts.region("query"), none
    if plan.shot == "tokenizer":
        drawn = model._module.paint(codes, prompts.canvas, prompts.visible, prompts.decoded, paste=False)
        return crop(drawn, "output", layout), none
    prompts = prompts.query_only() if plan.shot == "zero-shot" else prompts
    with model.trace(prompts):
        if plan.vector is not None:
            patch(model, plan.vector, plan.patches)
        logits = model.output.logits.save()
    output = layout.regions["output"].to(prompts.device)
    loss = metrics.token_loss(logits[:, layout.index(prompts.decoded, output) - 1], codes[:, output])
    drawn = model._module.paint(logits.argmax(-1), prompts.canvas, prompts.visible, prompts.decoded)
    return crop(drawn, "output", layout), loss


class Line(NamedTuple):
    """One measure of one condition: its mean, and its mean difference to one-shot on the same images, with 95 %
    bootstrap intervals; NaN where there is none."""

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


@dataclass(eq=False)
class Table:
    """What `evaluate` found. `print` it; in a notebook it is a table.

    Args:
        rows: One row an image and condition: task, metric, condition, fold, image, score, token_loss.
        pictures: Task → name → uint8 [image, 3, height, width]: "prompt" (canvases, their outputs grey), "truth" and
            every condition's answers for the first images.
    """

    rows: Dataset
    pictures: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def cat(cls, tables: Iterable[Table]) -> Table:
        """Tables of several tasks or folds as one."""
        tables = list(tables)
        pictures = {task: shown for table in reversed(tables) for task, shown in table.pictures.items()}
        return cls(concatenate_datasets([table.rows for table in tables]), pictures)

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """The per-image values that `parquet` wrote."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}.")
        return cls(Dataset.from_parquet(str(path)))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(self.rows["task"]))

    def values(self, task: str, condition: str, measure: str = "score") -> np.ndarray:
        """Per-image values [image] of "score" or "token_loss", folds one after the other.

        Raises:
            ValueError: when there is no such task or condition.
        """
        return self._select(task, condition)[measure].to_numpy()

    def lines(self) -> list[Line]:
        """Means and intervals of all conditions: the task's metric, then the token loss. With several folds, a mean is
        the mean of the folds' means, and images are resampled within folds."""
        lines = []
        for task in self.tasks:
            frame = self._frame[self._frame.task == task]
            names = frame.condition.unique()
            for measure, column in ((frame.metric.iloc[0], "score"), ("token loss", "token_loss")):
                base = self.values(task, BASELINE, column) if BASELINE in names else None
                for name in names:
                    part = self._select(task, name)
                    values, folds = part[column].to_numpy(), part.fold.to_numpy()
                    paired = base is not None and name != BASELINE
                    change = bootstrap(values - base, folds) if paired else (np.nan,) * 3
                    lines.append(Line(task, name, measure, len(values), *bootstrap(values, folds), *change))
        return lines

    def markdown(self) -> str:
        """A Markdown table for each task."""
        return "\n\n".join(
            "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] + ["---:"] * (len(head) - 1), *body))
            for _, head, body in self._cells()
        )

    def csv(self, path: str | Path) -> None:
        """Write one line a task, condition and measure."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Line._fields)
        writer.writerows(self.lines())
        write_text(path, text.getvalue())

    def parquet(self, path: str | Path) -> None:
        """Write the per-image values."""
        with replacing(path) as temporary:
            self.rows.to_parquet(temporary)

    def __repr__(self) -> str:
        parts = []
        for _, head, body in self._cells():
            widths = [max(map(len, column)) for column in zip(head, *body)]
            for row in (head, ["─" * width for width in widths], *body):
                first, *others = (
                    cell.ljust(width) if i == 0 else cell.rjust(width)
                    for i, (cell, width) in enumerate(zip(row, widths))
                )
                parts.append("  ".join([first, *others]).rstrip())
            parts.append("")
        return "\n".join(parts[:-1])

    def _repr_html_(self) -> str:
        tables = []
        for _, head, body in self._cells():
            top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
            rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body)
            tables.append(f"<table><tr>{top}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
        return "".join(tables)

    def _cells(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Of each task: name, header and rows of text."""
        tables = []
        for task in self.tasks:
            lines = [line for line in self.lines() if line.task == task]
            scores, losses = lines[: len(lines) // 2], lines[len(lines) // 2 :]
            metric = scores[0].measure
            name = "mIoU ↑" if metric == "iou" else f"{metric.upper()} ↓"
            head = [f"{task}, {scores[0].images} images", name, f"− {BASELINE}", "token loss ↓", f"− {BASELINE}"]
            body = [
                [
                    s.condition,
                    *(text for line in (s, t) for text in (_interval(*line[4:7]), _interval(*line[7:], sign="+"))),
                ]
                for s, t in zip(scores, losses)
            ]
            tables.append((task, head, body))
        return tables

    @property
    def _frame(self) -> Any:
        return self.rows.to_pandas()

    def _select(self, task: str, condition: str) -> Any:
        frame = self._frame
        frame = frame[(frame.task == task) & (frame.condition == condition)]
        if not len(frame):
            raise ValueError(f"the table has no {condition!r} of {task!r}.")
        return frame.sort_values(["fold", "image"])


def _interval(mean: float, low: float, high: float, sign: str = "") -> str:
    return "" if np.isnan(mean) else f"{mean:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"


def bootstrap(
    values: np.ndarray, folds: np.ndarray | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """The mean and its 95 % percentile interval: images are resampled within folds, and the folds' means averaged."""
    folds = np.zeros(len(values)) if folds is None else folds
    generator = np.random.default_rng(seed)
    parts = [values[folds == fold] for fold in np.unique(folds)]
    means = [part[generator.integers(len(part), size=(resamples, len(part)))].mean(1) for part in parts]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    return float(np.mean([part.mean() for part in parts])), float(low), float(high)


def select_prompts(
    model: Any,
    task: Task,
    images: Any,
    n: int = 100,
    *,
    candidates: int = 1000,
    seed: int = 0,
    layout: Layout | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> VisualPrompt:
    """Prompts that work: random pairs are run one-shot and the best `n` kept, each image used once (ECCV 2024, §4.1).

    Args:
        images: A datasets.Dataset or a sequence of rows.
        n: Prompts to keep.
        candidates: Random prompts to try.
        seed: Of the candidates, which are those of `task.prompts(images, candidates, seed)`.

    Raises:
        ValueError: when the candidates hold fewer than `n` prompts that share no image.
    """
    layout = layout or model.layout
    device = device_of(model)
    generator = np.random.default_rng(seed)
    rows = draw_rows(images, candidates, layout.examples, generator)
    places = generator.random((candidates, 2))

    def make(chosen: Iterable[int]) -> VisualPrompt:
        made = []
        for i in chosen:
            *examples, query = rows[i].tolist()
            made.append(task.prompt([images[j] for j in examples], images[query], layout, tuple(places[i])))
        return VisualPrompt.cat(made)

    losses = []
    starts = range(0, candidates, batch_size)
    for start in tqdm(starts, desc=f"{task.name} candidates", unit="batch", disable=not progress):
        prompts = make(range(start, min(start + batch_size, candidates))).to(device)
        with torch.no_grad():
            drawn = crop(model.generate(prompts), "output", layout)
        losses.append(task.loss(drawn, prompts.region("output")).double().cpu())
    best, used = [], set()
    for i in torch.cat(losses).argsort(stable=True).tolist():
        if len(best) < n and used.isdisjoint(rows[i].tolist()):
            best.append(i)
            used.update(rows[i].tolist())
    if len(best) < n:
        raise ValueError(
            f"{candidates} candidates of {task.name!r} hold {len(best)} prompts that share no image and {n} were asked "
            "for; give more images or more candidates, or ask for fewer."
        )
    return make(best)
