"""The rows of the board: metric and loss of every reference and set, and what each set is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np
import torch

from leaderboard.sets import (
    DRAW_PROMPTS,
    EVERYTHING,
    REFERENCES,
    Bench,
    Leaderboard,
    Measured,
    Sets,
    best_scored,
    patches,
    prepare,
    prunings,
    read,
    run_searches,
    stability,
)
from vtv_nnsight import search, tasks
from vtv_nnsight.evaluation import CONTROL, Condition, bootstrap, evaluate, random_units
from vtv_nnsight.evaluation.conditions import BASELINE, CEILING, FLOOR, ZERO_SHOT
from vtv_nnsight.evaluation.random_controls import DRAWS
from vtv_nnsight.evaluation.resampling import intervals
from vtv_nnsight.patching import PatchSet, PatchSpace
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.tasks import Task


def measure_sets(options: Leaderboard, files: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row for every reference and set, in the order of the tasks, the lowest loss of a task first.

    Args:
        files: [TASK=]FILE of patch sets (.json) or search results (.safetensors). One that is named after a task, as
            `vtv run` names them, or given as TASK=FILE, is measured on that task, any other on all.

    Raises:
        ValueError, FileNotFoundError: when a file cannot be read, or does not fit the others or the model.
    """
    sets = read(files, options.by_name, (*REFERENCES, *options.algorithms))
    bench, train = prepare(options, sets)
    return measure_all(bench, options.by_name, sets | run_searches(options, bench, train))


def measure_all(bench: Bench, by_name: Mapping[str, Task], sets: Sets) -> list[dict[str, Any]]:
    """A row for every reference and set, in the order of the tasks, the lowest loss of a task first."""
    rows, steps = [], [(t, name) for t in by_name.values() for name in ("", *sets) if not name or t.name in sets[name]]
    with progress_bar(steps, desc="measuring", unit="set") as bar:
        for task, name in bar:
            bar.set_postfix_str(f"{name or 'references'}, {task.name}")
            if not name:
                here, there = references(bench, task, sets)
                new = [here[what] | {"set": what, "other_data": there.get(what)} for what in here]
            else:
                new = [{"set": name} | measure_set(bench, task, name, sets, here, there)]
            rows += [{"task": task.name, "metric_name": task.metric.name} | row for row in new]
    losses = {(row["set"], row["task"]): row["loss"][0] for row in rows}
    for row in rows:
        abroad = row.get("loss_on_other_tasks", {})
        row["cost_to_other_tasks"] = {task: loss - losses[row["set"], task] for task, loss in abroad.items()}
    return sorted(rows, key=lambda row: (list(by_name).index(row["task"]), row["loss"][0]))


def references(bench: Bench, task: Task, sets: Sets) -> tuple[Measured, Measured]:
    """What one-shot, zero-shot and everything patched come to, here and on the other data."""
    spaces = [patches(by_task[task.name][0]).space for by_task in sets.values() if task.name in by_task]
    spaces = spaces or [PatchSpace(bench.model, bench.here[task.name].layout)]
    plans: dict[str, list[Any]] = {BASELINE: [BASELINE], ZERO_SHOT: [ZERO_SHOT]}
    for name, space in everything(spaces).items():
        plans[name] = [(bench.vectors[task.name], PatchSet(space, torch.ones(len(space), dtype=torch.bool)))]
    here, there = (measure(bench, task, prompts, plans) for prompts in (bench.here, bench.elsewhere))
    here[BASELINE] |= bounds(bench, task)
    return here, there


def everything(spaces: Sequence[PatchSpace]) -> dict[str, PatchSpace]:
    """Name → a space of each kind that there is: all of its units patched are a reference."""
    kinds = {(space.granularity, *space.sites, *map(str, space.stages)): space for space in spaces}
    if len(kinds) == 1:
        return {EVERYTHING: spaces[0]}
    return {f"{EVERYTHING}, {len(s)} units by {s.granularity} of {', '.join(s.sites)}": s for s in kinds.values()}


def bounds(bench: Bench, task: Task) -> dict[str, list[float]]:
    """The metric, [mean, low, high], of copying the query (floor) and of the best that the model could paint (ceiling,
    where there is one)."""
    names = {FLOOR: "floor", CEILING: "ceiling"}
    table = evaluate(
        bench.model, task, bench.here[task.name], {name: name for name in names}, batch_size=bench.batch_size, keep=0,
        progress=False,
    )  # fmt: skip
    return {
        names[condition]: list(
            bootstrap(table.values(task.name, condition), None, table.identifiers(task.name, condition))
        )
        for condition in table.frame.condition.unique()
    }


def measure_set(bench: Bench, task: Task, name: str, board: Sets, here: Measured, there: Measured) -> dict[str, Any]:
    """The row of a set, or of an algorithm's sets, given the references here and on the other data."""
    results = board[name][task.name]
    sets = [patches(one) for one in results]
    random = [PatchSet.random(one.space, len(one), CONTROL + bench.seed + i) for i, one in enumerate(sets)]
    vector, average, curve = bench.vectors[task.name], bench.vectors.mean(), best_scored(results[0])
    plain = {"own": [(vector, one) for one in sets]}
    others = {
        "mean_ablated_one_shot": [(average, one, BASELINE) for one in sets],
        "random_units_mean_ablated_one_shot": [(average, one, BASELINE) for one in random],
    }
    foreign = {f"vector of {t}": [(bench.vectors[t], one) for one in sets] for t in bench.vectors if t != task.name}
    best = {k: [(vector, one)] for k, one in curve.items()}
    measured = measure(bench, task, bench.here, plain | others | foreign | best, here, against="own")
    drawn = measure_draws(bench, task, sets)

    groups = [[one, *prunings(one, bench.seed)] for one in sets]
    losses = model_losses(bench, task, [one for group in groups for one in group]).split([len(g) for g in groups])
    by_seed = [part[0].item() for part in losses]
    agree(mean(by_seed), measured["own"]["loss"][0], f"{name}, {task.name}")
    costs = torch.cat([part[1:] - part[0] for part in losses]).tolist()
    abroad = [other for other, theirs in board[name].items() if theirs[0] is not results[0]]
    return measured["own"] | {
        "units": [len(one) for one in sets],
        "of_units": len(sets[0].space),
        "pictures": len(bench.here[task.name].queries.unique()),
        "loss_by_seed": by_seed,
        **drawn,
        **{what: measured[what] for what in others},
        "other_vectors": {what.removeprefix("vector of "): measured[what] for what in foreign},
        "cost_of_pruning_a_tenth": {"mean": mean(costs), "least": min(costs), "most": max(costs)} if costs else None,
        "jaccard_over_seeds": stability(sets),
        "other_data": measure(bench, task, bench.elsewhere, plain, there).get("own"),
        "loss_on_other_tasks": {t: model_losses(bench, tasks.get(t), sets).mean().item() for t in abroad},
        "sufficiency": [{"units": k} | measured[k] for k in curve],
    }


def measure(
    bench: Bench, task: Task, prompts: Mapping[str, VisualPrompt], plans: Mapping[Any, Sequence[Condition]],
    references: Measured | None = None, against: str | None = None,
) -> Measured:  # fmt: skip
    """Metric and loss (the model's own) of every plan, [mean, low, high] of the mean over its conditions, and the gap
    closed; with `against`, the difference in metric to that plan, too. Nothing where there are no prompts of the task.
    """
    if task.name not in prompts:
        return {}
    conditions = {f"{what} {i}": one for what, several in plans.items() for i, one in enumerate(several)}
    table = evaluate(
        bench.model, task, prompts[task.name], conditions, batch_size=bench.batch_size, keep=0, progress=False
    )
    measured: Measured = {}
    shared = table.identifiers(task.name, table.frame.condition.iloc[0])
    scores: dict[Any, np.ndarray] = {}
    for what, several in plans.items():
        values = {
            label: np.mean([table.values(task.name, f"{what} {i}", column) for i in range(len(several))], axis=0)
            for label, column in (("metric", "score"), ("loss", "loss"))
        }
        measured[what] = {label: list(bootstrap(value, identifiers=shared)) for label, value in values.items()}
        measured[what]["loss_name"] = table.frame.loss_name.iloc[0]
        scores[what] = values["metric"]
    for what in measured if against else ():
        measured[what]["difference"] = list(bootstrap(scores[what] - scores[against], identifiers=shared))
    for numbers in measured.values():
        numbers["gap_closed"] = gap_closed(numbers, references or measured)
    return measured


def measure_draws(bench: Bench, task: Task, sets: Sequence[PatchSet]) -> dict[str, dict[str, Any]]:
    """Random units of the sets' sizes, uniform and matched by stage and region, 16 draws in all or more: metric and
    loss, [mean, low, high] over draws and prompts, the gap closed, and where the sets' mean stands among the
    draws. On the first `DRAW_PROMPTS` prompts."""
    prompts, vector = bench.here[task.name][:DRAW_PROMPTS], bench.vectors[task.name]
    plans: dict[str, Any] = {BASELINE: [Condition("one")], ZERO_SHOT: [Condition("zero")]}
    plans["own"] = [Condition("zero", vector, one) for one in sets]
    names = {"random_units": False, "matched_random_units": True}
    for what, matched in names.items():
        each = -(-DRAWS // len(sets))
        several = [random_units(one, each, matched=matched, seed=bench.seed + i) for i, one in enumerate(sets)]
        plans[what] = [Condition("zero", vector, one) for draws in several for one in draws]
    table = evaluate(bench.model, task, prompts, plans, batch_size=bench.batch_size, keep=0, progress=False)
    measured: Measured = {}
    shared = table.identifiers(task.name, BASELINE)
    for what in plans:
        rows = table.frame[table.frame.condition == what]
        measured[what] = {}
        for label, column in (("metric", "score"), ("loss", "loss")):
            values = rows.pivot(index="image", columns="draw", values=column).to_numpy()
            measured[what][label] = list(intervals([values], identifiers=shared)[0])
    for what in names:
        measured[what]["gap_closed"] = gap_closed(measured[what], measured)
        means = table.draws(task.name, what).tolist()
        measured[what] |= {
            "draws": len(means),
            "beaten": sum(task.metric.better(measured["own"]["metric"][0], one) for one in means),
            "least": min(means),
            "most": max(means),
            "prompts": len(prompts),
            "pictures": len(prompts.queries.unique()),
        }
    return {what: measured[what] for what in names}


def model_losses(bench: Bench, task: Task, sets: Sequence[PatchSet]) -> torch.Tensor:
    """The mean loss of every set, all of one space, zero-shot on the task's prompts: [set]."""
    prompts = bench.here[task.name].query_only()
    objective = search.Objective(
        bench.model, bench.vectors[task.name], task, prompts[:1], sets[0].space, held_out=prompts,
        batch_size=bench.batch_size,
    )  # fmt: skip
    choices = torch.stack([one.choices for one in sets]).repeat_interleave(len(prompts), 0)
    return objective(choices, objective.held_out.repeat(len(sets))).view(len(sets), -1).mean(1)


def agree(searched: float, evaluated: float, what: str) -> None:
    """Refuse to go on if what searches minimise is not what the table shows."""
    if not math.isclose(searched, evaluated, rel_tol=1e-3, abs_tol=1e-3):
        raise RuntimeError(f"{what}: the loss is {searched} to a search and {evaluated} to an evaluation.")


def gap_closed(numbers: Mapping[str, Any], bounds: Mapping[str, Mapping[str, Any]]) -> float | None:
    """How far the loss gets from zero-shot (0) to one-shot (1); None where one-shot is no better."""
    loss, zero, one = (measured["loss"][0] for measured in (numbers, bounds[ZERO_SHOT], bounds[BASELINE]))
    return (zero - loss) / (zero - one) if zero > one else None
