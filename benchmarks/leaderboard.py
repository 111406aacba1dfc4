"""What sets of units are worth: those in files, or those that searches find now, side by side on the same prompts.

    >>> options = Leaderboard(algorithms=("reinforce", "gates"), tasks=("segmentation", "lowlight"))
    >>> rows = measure_sets(options, ["runs/scenes/search/segmentation.safetensors"])
    >>> print(markdown(rows)); draw(rows).savefig("patch_sets.png")

`vtv bench patch_sets` is a thin script over this; its help tells what the columns are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations, cycle
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vtv_nnsight import data, metrics, search, tasks
from vtv_nnsight.evaluation import CONTROL, Condition, bootstrap, evaluate, random_units
from vtv_nnsight.evaluation.conditions import BASELINE, CEILING, FLOOR, ZERO_SHOT
from vtv_nnsight.evaluation.random_controls import DRAWS
from vtv_nnsight.evaluation.table import intervals
from vtv_nnsight.files import file_name
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import HEADS, InContextModel
from vtv_nnsight.patching import PatchSet, PatchSpace
from vtv_nnsight.plots import label_decades
from vtv_nnsight.progress import progress_bar, quiet
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.report.labels import plain_label
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.runs.steps import collect, load_model, read_vectors
from vtv_nnsight.runs.steps import search as search_units
from vtv_nnsight.search.budget import prefixes, sizes
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import TaskVectors
from vtv_nnsight.vectors.compatibility import check_compatible, fingerprint, layout_of

MAX_IMAGES = 500
"""The most pictures to draw prompts to collect and search on from."""
FEW = 24
"""Prompts per task on which each draw of random units is measured."""
UNSEEN = "unseen scenes"
EVERYTHING = "everything patched"
REFERENCES = (BASELINE, ZERO_SHOT, EVERYTHING)

Found = search.SearchResult | PatchSet
Measured = dict[Any, dict[str, Any]]
Sets = dict[str, dict[str, list[Found]]]
"""Name → task → what was found, one for each seed."""


class Bench(NamedTuple):
    """What sets are measured with; prompts are one-shot, by task."""

    model: InContextModel
    vectors: TaskVectors
    here: dict[str, VisualPrompt]
    elsewhere: dict[str, VisualPrompt]
    seed: int
    batch_size: int | None


@dataclass(frozen=True)
class Leaderboard:
    """What sets are measured on.

    Args:
        algorithms: Searches to run now, of `search.ALGORITHMS`.
        model, vqgan, embedding_type, dtype: As for `Settings`.
        data: As for `vtv run`; searched on and measured on apart.
        transfer_data: Other data to measure on; None is `UNSEEN`, scenes of other classes, beside scenes.
        tasks: Names.
        vectors: A file of `vtv collect`; None collects them now.
        budget: Evaluations that a search may spend.
        seeds: Searches of each algorithm per task.
        prompts: Prompts per task to collect and to search on.
        test_prompts: Prompts per task to measure on.
        batch_size: Prompts per forward; by default as evaluate and the searches have it.
        seed: Of all that is random.
        device: Where the model runs.
        resume: A folder that keeps every search's journal.

    Raises:
        ValueError: naming the option that makes no sense.
    """

    algorithms: tuple[str, ...] = ()
    model: str = "tiny"
    vqgan: str | None = None
    embedding_type: str | None = None
    dtype: str | None = None
    data: str = "scenes"
    transfer_data: str | None = None
    tasks: tuple[str, ...] = tuple(task.name for task in tasks.VTV)
    vectors: Path | None = None
    budget: int = 4000
    seeds: int = 3
    prompts: int = 100
    test_prompts: int = 96
    batch_size: int | None = None
    seed: int = 0
    device: str | None = None
    resume: Path | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "seeds", "prompts", "test_prompts", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} leaves nothing to do; give 1 or more.")
        if unknown := [name for name in self.algorithms if name not in search.ALGORITHMS]:
            raise ValueError(f"{unknown[0]!r} is not an algorithm; choose from {', '.join(search.ALGORITHMS)}.")
        self.chosen  # noqa: B018  which refuses what is no task

    @property
    def chosen(self) -> dict[str, Task]:
        """The tasks, by name."""
        return {task.name: task for task in map(tasks.get, self.tasks)}


def measure_sets(options: Leaderboard, files: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row for every reference and set, in the order of the tasks, the lowest loss of a task first.

    Args:
        files: [TASK=]FILE of patch sets (.json) or search results (.safetensors). One that is named after a task, as
            `vtv run` names them, or given as TASK=FILE, is measured on that task, any other on all.

    Raises:
        ValueError, FileNotFoundError: when a file cannot be read, or does not fit the others or the model.
    """
    found = read(files, options.chosen, (*REFERENCES, *options.algorithms))
    bench, train = prepare(options, found)
    return measure_all(bench, options.chosen, found | run_searches(options, bench, train))


def read(files: Sequence[str], chosen: Mapping[str, Task], taken: Sequence[str] = REFERENCES) -> Sets:
    """The sets in files, by name and task. One is called as its file, or its folder if the file is called as a task."""
    found: Sets = {}
    for text in files:
        owner, _, file = text.rpartition("=")
        path = Path(file if is_task(owner) else text)
        owner = next(filter(is_task, (owner, path.stem)), None)
        if owner and owner not in chosen:
            raise ValueError(f"{path} is of {owner!r} and --tasks is {','.join(chosen)}; add it, or omit the file.")
        name = str(path.parent) if path.stem == owner else path.stem
        if name in taken:
            raise ValueError(f"{path} would be called {name!r}, as another row is; rename it.")
        content = search.SearchResult.load(path) if path.suffix == ".safetensors" else PatchSet.load(path)
        for task in [owner] if owner else chosen:
            if task in found.setdefault(name, {}):
                raise ValueError(f"{path} is a second set of {task!r} that is called {name!r}; rename it.")
            found[name][task] = [content]
    return found


def is_task(name: str) -> bool:
    try:
        tasks.get(name)
    except ValueError:
        return False
    return True


def patches(found: Found) -> PatchSet:
    return found if isinstance(found, PatchSet) else found.patches


def prepare(options: Leaderboard, found: Sets) -> tuple[Bench, Dataset]:
    """What sets are measured with, and the pictures to search on."""
    with quiet():
        model = load_model(
            options.model, options.vqgan, options.device, embedding_type=options.embedding_type, dtype=options.dtype
        )
    if not model.losses:
        raise ValueError(f"sets are compared by the model's own loss, and {options.model} has none; give it `losses`.")
    sites = {site for own in found.values() for (one,) in own.values() for site in patches(one).space.sites}
    vectors = read_vectors(options.vectors, options.tasks, sorted(sites)) if options.vectors else None
    owners = {f"the set {name!r}": patches(one) for name, own in found.items() for (one,) in own.values()}
    owners |= {str(options.vectors): next(iter(vectors.values()))} if vectors else {}
    known = next((owner.fingerprint for owner in owners.values()), {})
    layout = layout_of(known) if known else model.layout
    for name, owner in owners.items():
        expected = f"{options.model} and {next(iter(owners))}"
        check_compatible(name, owner.fingerprint, expected, fingerprint(model, layout))

    train, test = data.split_data(options.data, MAX_IMAGES, 2 * options.test_prompts, options.seed)
    for task in options.chosen.values():
        if task.needs not in train.column_names:
            raise ValueError(f"{task.name!r} needs a column {task.needs!r} and {options.data} has none; omit the task.")

    def ask(rows: Dataset, which: Mapping[str, Task], n: int) -> dict[str, VisualPrompt]:
        able = {name: task for name, task in which.items() if task.needs in rows.column_names}
        return {name: task.prompts(rows, n, options.seed, layout) for name, task in able.items()}

    if vectors is None:
        several = options.chosen | {task.name: task for task in tasks.VTV}
        prompts = ask(train, several, options.prompts)
        vectors = collect(model, prompts, options.batch_size, sites=sorted(sites | {HEADS}))
    if len(vectors) < 2:
        raise ValueError(f"there is a vector of {', '.join(vectors)} only; the mean over tasks needs two or more.")
    spec = options.transfer_data or (UNSEEN if options.data == "scenes" else None)
    if spec == UNSEEN:
        other = data.scenes("test", 2 * options.test_prompts, options.seed, folds=(3,))
    else:
        other = data.load(spec, "test", 2 * options.test_prompts, options.seed) if spec else None
    here = ask(test, options.chosen, options.test_prompts)
    elsewhere = ask(other, options.chosen, options.test_prompts) if other else {}
    device = device_of(model)
    return Bench(model, vectors.to(device), here, elsewhere, options.seed, options.batch_size), train


def run_searches(options: Leaderboard, bench: Bench, train: Dataset) -> Sets:
    """What every algorithm finds for every task, one result for each seed."""
    layout = next(iter(bench.here.values())).layout
    space, seeds = PatchSpace(bench.model, layout), range(options.seed + 1, options.seed + 1 + options.seeds)
    chosen = options.chosen
    found: Sets = {name: {task: [] for task in chosen} for name in options.algorithms}
    plan = [(task, seed, name) for task in chosen.values() for seed in seeds for name in options.algorithms]
    with progress_bar(plan, desc="searching", unit="search", disable=not plan) as bar:
        for task, seed, name in bar:
            bar.set_postfix_str(f"{name}, {task.name}")
            prompts = task.prompts(train, options.prompts, seed, layout)
            result = search_units(
                bench.model, bench.vectors, [task], [prompts], space,
                Settings(search=name, budget=options.budget, seed=seed),
                batch_size=options.batch_size, resume=journal(options, task, name, seed), progress=False,
            )  # fmt: skip
            found[name][task.name].append(result)
    return found


def journal(options: Leaderboard, task: Task, algorithm: str, seed: int) -> Path | None:
    """Where a search keeps what it learns, if anywhere."""
    if options.resume is None:
        return None
    options.resume.mkdir(parents=True, exist_ok=True)
    return options.resume / f"{file_name(task.name, algorithm, options.budget, seed)}.jsonl"


def measure_all(bench: Bench, chosen: Mapping[str, Task], found: Sets) -> list[dict[str, Any]]:
    """A row for every reference and set, in the order of the tasks, the lowest loss of a task first."""
    rows, steps = [], [(t, name) for t in chosen.values() for name in ("", *found) if not name or t.name in found[name]]
    with progress_bar(steps, desc="measuring", unit="set") as bar:
        for task, name in bar:
            bar.set_postfix_str(f"{name or 'references'}, {task.name}")
            if not name:
                here, there = references(bench, task, found)
                new = [here[what] | {"set": what, "other_data": there.get(what)} for what in here]
            else:
                new = [{"set": name} | measure_set(bench, task, name, found, here, there)]
            rows += [{"task": task.name, "metric_name": task.metric.name} | row for row in new]
    losses = {(row["set"], row["task"]): row["loss"][0] for row in rows}
    for row in rows:
        abroad = row.get("loss_on_other_tasks", {})
        row["cost_to_other_tasks"] = {task: loss - losses[row["set"], task] for task, loss in abroad.items()}
    return sorted(rows, key=lambda row: (list(chosen).index(row["task"]), row["loss"][0]))


def references(bench: Bench, task: Task, found: Sets) -> tuple[Measured, Measured]:
    """What one-shot, zero-shot and everything patched come to, here and on the other data."""
    spaces = [patches(by_task[task.name][0]).space for by_task in found.values() if task.name in by_task]
    space = spaces[0] if spaces else PatchSpace(bench.model, bench.here[task.name].layout)
    everything = bench.vectors[task.name], PatchSet(space, torch.ones(len(space)))
    plans = {BASELINE: [BASELINE], ZERO_SHOT: [ZERO_SHOT], EVERYTHING: [everything]}
    here, there = (measure(bench, task, prompts, plans) for prompts in (bench.here, bench.elsewhere))
    here[BASELINE] |= bounds(bench, task)
    return here, there


def bounds(bench: Bench, task: Task) -> dict[str, list[float]]:
    """The metric, [mean, low, high], of copying the query (floor) and of the best that the model could paint (ceiling,
    where there is one)."""
    names = {FLOOR: "floor", CEILING: "ceiling"}
    table = evaluate(
        bench.model, task, bench.here[task.name], {name: name for name in names}, batch_size=bench.batch_size, keep=0,
        progress=False,
    )  # fmt: skip
    queries = bench.here[task.name].queries.numpy()
    found = table.frame.condition.unique()
    return {names[one]: list(bootstrap(table.values(task.name, one), queries=queries)) for one in found}


def measure_set(bench: Bench, task: Task, name: str, found: Sets, here: Measured, there: Measured) -> dict[str, Any]:
    """The row of a set, or of an algorithm's sets, given the references here and on the other data."""
    results = found[name][task.name]
    sets = [patches(one) for one in results]
    random = [PatchSet.random(one.space, len(one), CONTROL + bench.seed + i) for i, one in enumerate(sets)]
    vector, average, curve = bench.vectors[task.name], bench.vectors.mean(), best_scored(results[0])
    own = {"own": [(vector, one) for one in sets]}
    others = {
        "mean_ablated_one_shot": [(average, one, BASELINE) for one in sets],
        "random_units_mean_ablated_one_shot": [(average, one, BASELINE) for one in random],
    }
    foreign = {f"vector of {t}": [(bench.vectors[t], one) for one in sets] for t in bench.here if t != task.name}
    best = {k: [(vector, one)] for k, one in curve.items()}
    measured = measure(bench, task, bench.here, own | others | foreign | best, here, against="own")
    drawn = measure_draws(bench, task, sets)

    groups = [[one, *prunings(one, bench.seed)] for one in sets]
    losses = own_losses(bench, task, [one for group in groups for one in group]).split([len(g) for g in groups])
    by_seed = [part[0].item() for part in losses]
    agree(mean(by_seed), measured["own"]["loss"][0], f"{name}, {task.name}")
    costs = torch.cat([part[1:] - part[0] for part in losses]).tolist()
    abroad = [other for other, theirs in found[name].items() if theirs[0] is not results[0]]
    return measured["own"] | {
        "units": [len(one) for one in sets],
        "of_units": len(sets[0].space),
        "loss_by_seed": by_seed,
        **drawn,
        **{what: measured[what] for what in others},
        "other_vectors": {what.removeprefix("vector of "): measured[what] for what in foreign},
        "cost_of_pruning_a_tenth": {"mean": mean(costs), "least": min(costs), "most": max(costs)} if costs else None,
        "jaccard_over_seeds": stability(sets),
        "other_data": measure(bench, task, bench.elsewhere, own, there).get("own"),
        "loss_on_other_tasks": {t: own_losses(bench, tasks.get(t), sets).mean().item() for t in abroad},
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
    found: Measured = {}
    queries = prompts[task.name].queries.numpy()
    scores: dict[Any, np.ndarray] = {}
    for what, several in plans.items():
        values = {
            label: np.mean([table.values(task.name, f"{what} {i}", column) for i in range(len(several))], axis=0)
            for label, column in (("metric", "score"), ("loss", "loss"))
        }
        found[what] = {label: list(bootstrap(value, queries=queries)) for label, value in values.items()}
        found[what]["loss_name"] = table.frame.loss_name.iloc[0]
        scores[what] = values["metric"]
    for what in found if against else ():
        found[what]["difference"] = list(bootstrap(scores[what] - scores[against], queries=queries))
    for measured in found.values():
        measured["gap_closed"] = gap_closed(measured, references or found)
    return found


def measure_draws(bench: Bench, task: Task, sets: Sequence[PatchSet]) -> dict[str, dict[str, Any]]:
    """Random units of the sets' sizes, uniform and matched by stage and region, 16 draws in all or more: metric and
    loss, [mean, low, high] over draws and prompts, the gap closed, and where the sets' mean stands among the
    draws. On the first `FEW` prompts."""
    prompts, vector = bench.here[task.name][:FEW], bench.vectors[task.name]
    plans: dict[str, Any] = {BASELINE: [Condition("one")], ZERO_SHOT: [Condition("zero")]}
    plans["own"] = [Condition("zero", vector, one) for one in sets]
    names = {"random_units": False, "matched_random_units": True}
    for what, matched in names.items():
        each = -(-DRAWS // len(sets))
        several = [random_units(one, each, matched=matched, seed=bench.seed + i) for i, one in enumerate(sets)]
        plans[what] = [Condition("zero", vector, one) for draws in several for one in draws]
    table = evaluate(bench.model, task, prompts, plans, batch_size=bench.batch_size, keep=0, progress=False)
    found: Measured = {}
    queries = prompts.queries.numpy()
    for what in plans:
        rows = table.frame[table.frame.condition == what]
        found[what] = {}
        for label, column in (("metric", "score"), ("loss", "loss")):
            values = rows.pivot(index="image", columns="draw", values=column).to_numpy()
            found[what][label] = list(intervals([values], queries=queries)[0])
    for what in names:
        found[what]["gap_closed"] = gap_closed(found[what], found)
        means = table.draws(task.name, what).tolist()
        found[what] |= {
            "draws": len(means),
            "beaten": sum(task.metric.better(found["own"]["metric"][0], one) for one in means),
            "least": min(means),
            "most": max(means),
            "prompts": len(prompts),
        }
    return {what: found[what] for what in names}


def own_losses(bench: Bench, task: Task, sets: Sequence[PatchSet]) -> torch.Tensor:
    """The mean loss of every set, the model's own, all of one space, zero-shot on the task's prompts: [set]."""
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


def gap_closed(own: Mapping, bounds: Mapping[str, Mapping]) -> float | None:
    """How far the loss gets from zero-shot (0) to one-shot (1); None where one-shot is no better."""
    loss, zero, one = (measured["loss"][0] for measured in (own, bounds[ZERO_SHOT], bounds[BASELINE]))
    return (zero - loss) / (zero - one) if zero > one else None


def prunings(whole: PatchSet, seed: int = 0, share: float = 0.1) -> Iterator[PatchSet]:
    """The set without each tenth of its units in turn, drawn at random; the last takes some again to be as large."""
    members = whole.choices.nonzero()[:, 0]
    members = members[torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))]
    size = math.ceil(share * len(members))
    for start in range(0, len(members), max(size, 1)):
        kept = whole.choices.clone()
        kept[members.roll(-start)[:size]] = False
        yield PatchSet(whole.space, kept)


def stability(sets: Sequence[PatchSet]) -> dict[str, float] | None:
    """Mean Jaccard similarity of pairs of sets, and about that of random sets of their sizes."""
    pairs = list(combinations(sets, 2))
    if not pairs:
        return None

    def by_chance(a: PatchSet, b: PatchSet) -> float:
        shared = len(a) * len(b) / len(a.space)
        return shared / (len(a) + len(b) - shared) if len(a) + len(b) else 1.0

    return {"mean": mean(a.jaccard(b) for a, b in pairs), "by_chance": mean(by_chance(a, b) for a, b in pairs)}


def best_scored(found: Found, count: int = 8) -> dict[int, PatchSet]:
    """The k units of a search that it scores best, for several k; chosen units first among equals."""
    if isinstance(found, PatchSet):
        return {}
    chosen, space = found.patches.choices, found.patches.space
    order = (~chosen).int().argsort(stable=True)
    scores = found.scores.nan_to_num(nan=-torch.inf)[order]
    lengths = sizes(1, len(space), count)
    sets = prefixes(order[scores.argsort(descending=True, stable=True)], len(space), lengths)
    return {k: PatchSet(space, choices) for k, choices in zip(lengths, sets)}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, and under it what floor, ceiling, random units and other vectors say of each task's sets."""
    return "\n\n".join([_markdown(rows), *sentences(rows)])


def sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each task: its floor and ceiling, how many random draws each set beats, and whether the task's own vector is
    better there than every other."""
    said = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        metric = metrics.get(own[0]["metric_name"])
        ends = next((row for row in own if "floor" in row), {})
        words = [f"{what} {ends[what][0]:.3f}" for what in ("floor", "ceiling") if what in ends]
        text = f"{task} ({metric.label}): {', '.join(words)}." if words else f"{task} ({metric.label})."
        for row in (row for row in own if "matched_random_units" in row):
            drawn = [row["random_units"], row["matched_random_units"]]
            uniform, matched = (
                f"{{}} of {{}} {what} draws ({{:.3f}} to {{:.3f}})".format(
                    *(one[key] for key in ("beaten", "draws", "least", "most"))
                )
                for what, one in zip(("random", "matched"), drawn)
            )
            text += f" {row['set']} beats {uniform} and {matched}"
            best = best_other(row, metric)
            if best:
                name, other = best
                _, low, high = other["difference"]
                specific = high < 0 if metric.higher_is_better else low > 0
                text += f"; {'specific' if specific else 'not specific'}: {name}'s vector has {other['metric'][0]:.3f}"
            text += "."
        said.append(text)
    return said


def best_other(row: Mapping[str, Any], metric: metrics.Metric) -> tuple[str, Mapping[str, Any]] | None:
    """The vector of another task that does best at a row's sets, by metric."""
    others = {name: own for name, own in row.get("other_vectors", {}).items() if "difference" in own}
    sign = 1 if metric.higher_is_better else -1
    return max(others.items(), key=lambda item: sign * item[1]["metric"][0], default=None)


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["task", "set", "units", "metric", rows[0]["loss_name"], "gap closed (random)", "other vector"]
    head += ["less a tenth (most)", "Jaccard (chance)", "other data", "other tasks", "ablated (random)"]

    def pick(row: Mapping[str, Any], form: str, *paths: str) -> str:
        """The first value, and the second in brackets; nothing of what a row has not."""
        values = [reduce(lambda at, key: (at or {}).get(key), path.split("."), row) for path in paths]
        first, *more = [f"{value:{form}}" for value in values if value is not None] or [""]
        return f"{first} ({more[0]})" if more else first

    def cells(row: Mapping[str, Any]) -> list[str]:
        abroad = list(row["cost_to_other_tasks"].values())
        return [
            row["task"],
            row["set"],
            f"{mean(row['units']):.3g}" if "units" in row else "",
            *("{:.3f} [{:.3f}, {:.3f}]".format(*row[measure]) for measure in ("metric", "loss")),
            pick(row, ".0%", "gap_closed", "random_units.gap_closed"),
            nearest(row),
            pick(row, "+.3f", "cost_of_pruning_a_tenth.mean", "cost_of_pruning_a_tenth.most"),
            pick(row, ".2f", "jaccard_over_seeds.mean", "jaccard_over_seeds.by_chance"),
            pick(row, ".0%", "other_data.gap_closed"),
            f"{mean(abroad):+.3f}" if abroad else "",
            pick(row, ".0%", "mean_ablated_one_shot.gap_closed", "random_units_mean_ablated_one_shot.gap_closed"),
        ]

    def nearest(row: Mapping[str, Any]) -> str:
        closed = {t: own["gap_closed"] for t, own in row.get("other_vectors", {}).items() if own["gap_closed"]}
        best = max(closed, key=closed.get, default=None)
        return f"{closed[best]:.0%} ({best})" if best else ""

    return pd.DataFrame(map(cells, rows), columns=head).to_markdown(index=False, disable_numparse=True)


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Metric and sufficiency of every task; below, one algorithm's transfer between tasks, and everyone's stability."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    found = list(dict.fromkeys(row["set"] for row in rows if "units" in row))
    labels = [plain_label(name) for name in found]
    figure = Figure(figsize=(max(10, 2.6 * len(names) + 1.5), 10), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2, 1))
    panels = above.subplots(2, len(names), squeeze=False)
    for task, (top, bottom) in zip(names, panels.T):
        draw_task(top, bottom, [row for row in rows if row["task"] == task], found)
        top.set_yticks(range(len(found)), labels if task == names[0] else [])
    above.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    left, right = below.subplots(1, 2)
    draw_transfer(left, rows, names)
    for task, marker in zip(names, cycle("osD^vP*X")):
        right.plot([], [], marker, color="0.4", label=task)
        for row in (row for row in rows if row["task"] == task and row.get("jaccard_over_seeds")):
            place = found.index(row["set"])
            for value, fill in zip(row["jaccard_over_seeds"].values(), ("full", "none")):
                right.plot(value, place, marker, color=f"C{place % 10}", fillstyle=fill, alpha=0.8)
    right.set_yticks(range(len(found)), labels)
    right.set(title="Jaccard over seeds (hollow: by chance)", xlim=(-0.03, 1.03))
    right.set_ylim(len(found) - 0.5, -0.5)
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def draw_task(top: Axes, bottom: Axes, rows: Sequence[Mapping[str, Any]], found: Sequence[str]) -> None:
    for row in rows:
        value, low, high = row["metric"]
        if row["set"] in REFERENCES:
            style = dict(color="0.4", linewidth=1, linestyle=("-", "--", ":")[REFERENCES.index(row["set"])])
            top.axvline(value, label=row["set"], **style)
            bottom.axhline(value, **style)
            continue
        place = found.index(row["set"])
        top.plot(row["random_units"]["metric"][0], place, "o", color="0.4", fillstyle="none", zorder=1,
                 label="as many random units" if row["set"] == found[0] else None)  # fmt: skip
        if matched := row.get("matched_random_units"):
            top.plot([row["random_units"]["least"], row["random_units"]["most"]], [place] * 2, color="0.6", linewidth=1)
            top.plot([matched["least"], matched["most"]], [place + 0.2] * 2, color="0.6", linewidth=1, linestyle=":",
                     label="their draws (dotted: matched)" if row["set"] == found[0] else None)  # fmt: skip
        top.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=f"C{place % 10}", capsize=3)
        curve = [(point["units"], point["metric"][0]) for point in row["sufficiency"]]
        bottom.plot(*np.reshape(curve, (-1, 2)).T, ".-", color=f"C{place % 10}")
        bottom.plot(mean(row["units"]), value, "o", color=f"C{place % 10}")
    metric = metrics.get(rows[0]["metric_name"])
    higher = metric.higher_is_better
    label = f"{metric.label.split()[0]} ({'higher' if higher else 'lower'} is better)"
    top.set(title=rows[0]["task"], xlabel=label, ylim=(len(found) - 0.5, -0.5))
    bottom.set_xscale("log", base=2)
    bottom.xaxis.set_major_formatter("{x:.0f}")
    bottom.set(xlabel="best-scored units (dot: the set)", ylabel=label)
    if not higher:
        top.set_xscale("log")
        bottom.set_yscale("log")
        for axis in (top.xaxis, bottom.yaxis):
            label_decades(axis)


def draw_transfer(panel: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """What a task's sets cost the others: of the name that has sets of most tasks, the one of lowest loss."""
    able = [row for row in rows if row["cost_to_other_tasks"]]
    if not able:
        panel.set_axis_off()
        return
    losses = {name: [row["loss"][0] for row in able if row["set"] == name] for name in {r["set"] for r in able}}
    best = min(losses, key=lambda name: (-len(losses[name]), mean(losses[name]), name))
    matrix = np.full((len(names), len(names)), np.nan)
    for row in able:
        for other, cost in ({row["task"]: 0.0} | row["cost_to_other_tasks"]).items() if row["set"] == best else ():
            at = names.index(row["task"]), names.index(other)
            matrix[at] = cost
            panel.text(at[1], at[0], f"{cost:+.2f}" if at[0] != at[1] else "0", ha="center", va="center", fontsize=8)
    limit = 1.5 * max(np.nanmax(np.abs(matrix)), 1e-9)
    panel.imshow(matrix, cmap="coolwarm", vmin=-limit, vmax=limit, aspect="auto")
    panel.set_xticks(range(len(names)), names, rotation=15)
    panel.set_yticks(range(len(names)), names)
    title = f"{plain_label(best)}: {rows[0]['loss_name']} over that of the task's own set"
    panel.set(title=title, xlabel="task done", ylabel="set of task")
