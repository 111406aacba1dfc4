"""What a found set of units must beat before it means anything: units drawn at random, and the vectors of other tasks.

>>> conditions = comparison(vector, result) | controls(vector, result, vectors)
>>> print(evaluate(model, task, prompts, conditions))       # intervals over draws and queries
>>> pairs = specificity(model, results, vectors, prompts)   # every vector on every task
>>> plots.matrix(pairs)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

from vtv_nnsight import tasks as registry
from vtv_nnsight.evaluation.conditions import CONTROL, Condition, found_sets
from vtv_nnsight.evaluation.evaluate import evaluate
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.patches import PatchSet
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.vectors import TaskVector

DRAWS = 16
"""One draw says little: with 16, the mIoU of segmentation at random units of the embedded model went from 0.12 to
0.74."""
_STRIDE = 1_000_003


def random_units(patches: Any, draws: int = DRAWS, *, matched: bool = False, seed: int = 0) -> list[PatchSet]:
    """As many units as a set has, drawn at random, several times.

    Args:
        patches: A PatchSet or a SearchResult.
        draws: How often.
        matched: Take as many units of each stage and group of positions (such as the decoder's output) as the set has;
            else all units are as likely.
        seed: Of what is drawn.

    Raises:
        ValueError: when draws is less than 1.
    """
    if draws < 1:
        raise ValueError(f"draws={draws} draws nothing; give 1 or more.")
    found = found_sets(patches)
    seeds = [CONTROL + seed + _STRIDE * i for i in range(draws)]
    if not matched:
        return [PatchSet.random(found.space, len(found), one) for one in seeds]
    units = found.space.units
    _, kind = torch.stack([units.stack, units.group]).unique(dim=1, return_inverse=True)
    counts = torch.bincount(kind[found.choices], minlength=int(kind.max()) + 1)
    sets = []
    for one in seeds:
        order = torch.randperm(len(found.space), generator=torch.Generator().manual_seed(one))
        choices = torch.zeros(len(found.space), dtype=torch.bool)
        for number, count in enumerate(counts.tolist()):
            choices[order[kind[order] == number][:count]] = True
        sets.append(PatchSet(found.space, choices))
    return sets


def controls(
    vector: TaskVector,
    patches: Any,
    others: Mapping[str, TaskVector] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Condition | list[Condition]]:
    """Conditions for `evaluate`: the vector at random units and at units matched by stage and region (see
    `random_units`; several draws each), and the vector of every other task at the units that were found.

    Args:
        vector: The task's.
        patches: A PatchSet or a SearchResult.
        others: Vectors of all tasks by name.
        draws: Of the random units.
        seed: Of the random units; the first draw is the one of `comparison`.
    """
    found = found_sets(patches)
    conditions: dict[str, Condition | list[Condition]] = {}
    for name, matched in (("random units", False), ("matched random units", True)):
        sets = random_units(found, draws, matched=matched, seed=seed)
        conditions[name] = [Condition("zero", vector, one) for one in sets]
    for name, other in (others or {}).items():
        if name != vector.task:
            conditions[f"vector of {name}"] = Condition("zero", other, found)
    return conditions


def specificity(
    model: InContextModel,
    patches: Mapping[str, Any],
    vectors: Mapping[str, TaskVector],
    prompts: Mapping[str, VisualPrompt],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> pd.DataFrame:
    """Is it the task's vector that does the task, or any vector at these units? Every vector, zero-shot, at the units
    that were found for every task.

    Args:
        model: The model.
        patches: Task name → its units, a PatchSet or a SearchResult.
        vectors: Task name → vector.
        prompts: Task name → prompts to evaluate on.
        batch_size: Rows in a trace.
        progress: Show a progress bar.

    Returns:
        A row for each task and vector: task, vector, metric, label, higher_is_better; mean, low and high of the score
        with its 95 % interval; difference, difference_low and difference_high: the vector's score minus the task's own
        vector's on the same prompts (NaN for its own).

    Raises:
        ValueError: when a task lacks its vector or its prompts.
    """
    rows = []
    for name, found in patches.items():
        if name not in vectors or name not in prompts:
            raise ValueError(f"{name!r} has units and no {'vector' if name not in vectors else 'prompts'}; give both.")
        task = registry.get(name)
        conditions = {other: Condition("zero", vector, found) for other, vector in vectors.items()}
        table = evaluate(model, task, prompts[name], conditions, batch_size=batch_size, keep=0, progress=progress)
        about = {"metric": task.metric.name, "label": task.metric.label}
        about["higher_is_better"] = task.higher_is_better
        for line in table.lines(baseline=name):
            if line.measure == task.metric.name:
                rows.append({"task": name, "vector": line.condition} | about | _numbers(line))
    return pd.DataFrame(rows)


def best_others(pairs: pd.DataFrame) -> pd.DataFrame:
    """Of each task in what `specificity` returned, the best vector of another task, and whether the task's own is
    better: specific is True where the interval of the difference leaves no doubt."""
    others = pairs[pairs.vector != pairs.task].copy()
    higher = others.higher_is_better
    others["specific"] = (others.difference_high < 0).where(higher, others.difference_low > 0)
    goodness = others["mean"].where(higher, -others["mean"])
    return others.loc[goodness.groupby(others.task, sort=False).idxmax()].reset_index(drop=True)


def _numbers(line: Any) -> dict[str, float]:
    names = ("mean", "low", "high", "difference", "difference_low", "difference_high")
    return {name: getattr(line, name) for name in names}
