"""Which vectors carry their task? Every vector on a task, each at units that were searched for it, at equal budgets.

A vector that fails at the units of another may do the task at others: it is compared with its best.

>>> results = {"identity": search_each(model, tasks.identity, prompts, vectors, space, budget=800)}
>>> table = evaluate(model, tasks.identity, test, each_vector("identity", vectors, results["identity"]))
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtv_nnsight.evaluation.conditions import OTHER, PATCHED, Condition
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.patching.forward import find_loss
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.search import SearchResult, gates, reinforce
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import TaskVector

BUDGET = 800
"""Evaluations of each search, by default."""


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
