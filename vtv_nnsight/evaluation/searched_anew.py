"""Which vectors carry their task? Every vector on a task, each at units that were searched for it, at equal budgets.

A vector that fails at the units of another may do the task at others: it is compared with its best.

>>> results = {"identity": search_each(model, tasks.identity, prompts, vectors, space, budget=800)}
>>> table = evaluate(model, tasks.identity, test, each_vector("identity", vectors, results["identity"]))
>>> specific_tasks(vector_pairs(table))                    # does no other vector do as well?
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from vtv_nnsight.evaluation.conditions import OTHER, PATCHED, Condition
from vtv_nnsight.evaluation.random_controls import best_others
from vtv_nnsight.evaluation.table import ENOUGH
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.patching.forward import find_loss
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.search import SearchResult, gates, reinforce
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import TaskVector

BUDGET = 800
"""Evaluations of each search, by default."""
LEVEL = 0.05
_INTERVAL = 2 * NormalDist().inv_cdf(0.975)
"""Standard errors in a 95 % interval."""


def search_each(
    model: InContextModel,
    task: Task,
    prompts: VisualPrompt,
    vectors: Mapping[str, TaskVector],
    space: PatchSpace,
    *,
    budget: int = BUDGET,
    resume: Path | None = None,
    **options: Any,
) -> dict[str, SearchResult]:
    """Vector's name → the units that are found for it on one task, by `gates`, or `reinforce` where the loss has no
    gradient: as many evaluations for each, the task's own included.

    Args:
        prompts: One-shot, to search on; their examples are not shown.
        resume: A folder for the journals.
        **options: Of every search, such as loss and seed.
    """
    search = gates if find_loss(model, options.get("loss"), task).differentiable else reinforce
    queries, results = prompts.query_only(), {}
    for name, vector in vectors.items():
        journal = resume and resume / f"{task.name}-{name}.journal"
        results[name] = search(model, vector, task, queries, space, budget=budget, resume=journal, **options)
    return results


def each_vector(
    task: str, vectors: Mapping[str, TaskVector], results: Mapping[str, SearchResult]
) -> dict[str, Condition]:
    """The conditions that compare them, as `vector_pairs` reads their table."""
    names = {name: PATCHED if name == task else f"{OTHER}{name}" for name in results}
    return {names[name]: Condition("zero", vectors[name], result) for name, result in results.items()}


def specific_tasks(pairs: pd.DataFrame) -> dict[str, bool]:
    """Task → whether its vector is better than every other: the paired differences leave out zero at 5 %, by Holm's
    correction over the others.

    Args:
        pairs: What `vector_pairs` returns of a table of `each_vector`; p-values are those of a normal distribution of
            the width of the bootstrap interval.
    """
    specific = {}
    for task, others in pairs[pairs.vector != pairs.task].groupby("task", sort=False):
        worse = -others.difference.where(others.higher_is_better, -others.difference)
        errors = (others.difference_high - others.difference_low) / _INTERVAL
        z = [max(0.0, d) / e if e else np.inf * (d > 0) for d, e in zip(worse, errors)]
        p = sorted(2 * NormalDist().cdf(-value) for value in z)
        specific[str(task)] = all(value <= LEVEL / (len(p) - i) for i, value in enumerate(p))
    return specific


def specificity_sentences(pairs: pd.DataFrame) -> list[str]:
    """Which tasks need their own vector, and for each of the others a vector that does as well; nothing of tasks that
    fewer than `ENOUGH` different pictures were asked of."""
    pairs = pairs[pairs.pictures >= ENOUGH]
    if pairs.empty:
        return []
    specific = specific_tasks(pairs)
    sure = [task for task, alone in specific.items() if alone]
    sentences = [f"Of units searched anew for each pair, no other vector does as well: {', '.join(sure) or 'no task'}."]
    rows: Any = best_others(pairs).itertuples()
    for row in rows:
        if not specific[row.task]:
            change = f"{row.difference:+.3f} [{row.difference_low:+.3f}, {row.difference_high:+.3f}]"
            sentences.append(f"{row.task}: the vector of {row.vector} is not surely worse ({change}).")
    return sentences
