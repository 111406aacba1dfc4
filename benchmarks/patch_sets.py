"""What sets of units are worth: those in files, or those that searches find now, side by side on the same prompts.

    python benchmarks/patch_sets.py --quick
    python benchmarks/patch_sets.py --algorithms reinforce,gates --tasks segmentation,lowlight
    python benchmarks/patch_sets.py runs/scenes/search/*.safetensors --vectors runs/scenes/vectors.safetensors

SETS are patch sets (.json) or search results (.safetensors). A file named after a task, as `vtv run` names them, or
given as TASK=FILE is judged on that task, any other on all of --tasks. With neither SETS nor --algorithms every
algorithm is run. An algorithm's numbers are means over its seeds, each with training prompts of its own; intervals are
95 %, by bootstrap over prompts. Costs are differences in token loss (nats a patch) on the same prompts. The columns:

- gap closed: the way from zero-shot with nothing patched (0) to one-shot (1), in token loss; and by random units.
- other vector: the gap closed by the vector of another task at the same units: that of the task that closes most.
- less a tenth: the set is cut at random into tenths and each is left out: the mean cost, and the greatest. A minimal
  set loses from every one.
- Jaccard: of two seeds' sets, and what random sets of their sizes would have.
- other data: the gap closed there with the same sets and vectors.
- other tasks: with another task's vector on its prompts, the mean cost over the sets found for that task.
- ablated: what one-shot loses when the units take the mean over tasks, and when as many random units do. A set that the
  task needs costs more. Units lie at CLS, query and output: what reads the example is never touched.

In JSON and picture only: sufficiency, the k best-scored units of an algorithm's first seed for several k.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import combinations, cycle
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import common
import numpy as np
import torch
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from vtv_nnsight import (
    MAEVQGAN,
    Layout,
    PatchSet,
    PatchSpace,
    TaskVectors,
    VisualPrompt,
    data,
    evaluate,
    metrics,
    search,
    tasks,
)
from vtv_nnsight.evaluation import CONTROL, Condition, bootstrap
from vtv_nnsight.experiment import halves
from vtv_nnsight.experiment.settings import Settings
from vtv_nnsight.progress import quiet, tqdm
from vtv_nnsight.search.algorithm import prefixes, sizes
from vtv_nnsight.stages import check_compatible, fingerprint
from vtv_nnsight.tasks import Task

UNSEEN = "unseen scenes"
ONE_SHOT, ZERO_SHOT, EVERYTHING = REFERENCES = ("one-shot", "zero-shot", "everything patched")

Found = search.SearchResult | PatchSet
Measured = dict[Any, dict[str, Any]]
Sets = dict[str, dict[str, list[Found]]]
"""Name → task → what was found, one a seed."""


class Bench(NamedTuple):
    """What sets are judged with; prompts are one-shot, by task."""

    model: MAEVQGAN
    vectors: TaskVectors
    here: dict[str, VisualPrompt]
    elsewhere: dict[str, VisualPrompt]
    seed: int
    batch_size: int | None


def main() -> None:
    parser = common.options(__file__, __doc__, "2 tasks, 2 algorithms, 2 seeds and few prompts")
    parser.add_argument("sets", nargs="*", metavar="SETS", help="[TASK=]FILE")
    parser.add_argument("--algorithms", help=f"to run now, commas between them: {', '.join(search.ALGORITHMS)}")
    parser.add_argument("--model", default="tiny", help="as for MAEVQGAN")
    parser.add_argument("--data", default="scenes", help="as for `vtv run`; trained on and judged on apart")
    parser.add_argument("--transfer-data", help=f"other data to judge on; beside scenes {UNSEEN!r} (of other classes)")
    parser.add_argument("--tasks", default=",".join(task.name for task in tasks.VTV), help="commas between them")
    parser.add_argument("--vectors", type=Path, metavar="FILE", help="of `vtv collect`; collected now by default")
    parser.add_argument("--budget", type=int, default=4000, help="evaluations a search")
    parser.add_argument("--seeds", type=int, default=3, help="searches of each algorithm, a task")
    parser.add_argument("--prompts", type=int, default=100, help="to collect and to search on, a task")
    parser.add_argument("-n", type=int, default=96, help="prompts to judge on, a task")
    parser.add_argument(
        "--batch-size", type=int, help="rows a forward; by default as evaluate and the searches have it"
    )
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="keep every search's journal there")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.budget, args.seeds, args.prompts, args.n = "segmentation,lowlight", 80, 2, 16, 4
    if args.algorithms is None and not args.sets:
        args.algorithms = "attribution,ranking" if args.quick else ",".join(search.ALGORITHMS)
    try:
        chosen = check(args)
        found = read(args.sets, chosen, (*REFERENCES, *args.algorithms))
        bench, train = prepare(args, chosen, found)
        found |= run_searches(args, bench, chosen, train)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    rows = judge_all(bench, chosen, found)
    print(leaderboard(rows))
    common.save(args, {"leaderboard": rows}, draw(rows))


def check(args: argparse.Namespace) -> dict[str, Task]:
    """The tasks that are asked for; refuses options that make no sense."""
    for name in ("budget", "seeds", "prompts", "n", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"{name}={value} leaves nothing to do; give 1 or more.")
    args.algorithms = args.algorithms.split(",") if args.algorithms else []
    if unknown := [name for name in args.algorithms if name not in search.ALGORITHMS]:
        raise ValueError(f"{unknown[0]!r} is not an algorithm; choose from {', '.join(search.ALGORITHMS)}.")
    return {task.name: task for task in map(tasks.get, args.tasks.split(","))}


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
    return set(name.split("+")) <= set(tasks.names())


def patches(found: Found) -> PatchSet:
    return found if isinstance(found, PatchSet) else found.patches


def prepare(args: argparse.Namespace, chosen: Mapping[str, Task], found: Sets) -> tuple[Bench, Dataset]:
    """What sets are judged with, and the pictures to search on."""
    with quiet():
        model = MAEVQGAN(args.model, dispatch=True).to(args.device)
    vectors = TaskVectors.load(args.vectors) if args.vectors else None
    owners = {f"the set {name!r}": patches(one) for name, own in found.items() for (one,) in own.values()}
    owners |= {str(args.vectors): next(iter(vectors.values()))} if vectors else {}
    facts = next((owner.fingerprint for owner in owners.values()), {})
    layout = Layout(**{name: facts[name] for name in Layout.__dataclass_fields__}) if facts else model.layout
    for name, owner in owners.items():
        check_compatible(name, owner.fingerprint, f"{args.model} and {next(iter(owners))}", fingerprint(model, layout))

    train, test = halves(args.data, Settings(data=args.data, images=500, evaluations=args.n, seed=args.seed))
    for task in chosen.values():
        if task.needs not in train.column_names:
            raise ValueError(f"{task.name!r} needs a column {task.needs!r} and {args.data} has none; omit the task.")
        if vectors and task.name not in vectors:
            raise ValueError(f"{args.vectors} has no vector of {task.name!r}; it has {', '.join(vectors)}.")

    def ask(rows: Dataset, which: Mapping[str, Task], n: int) -> dict[str, VisualPrompt]:
        able = {name: task for name, task in which.items() if task.needs in rows.column_names}
        return {name: task.prompts(rows, n, args.seed, layout) for name, task in able.items()}

    if vectors is None:
        several = dict(chosen) | {task.name: task for task in tasks.VTV}
        vectors = TaskVectors.collect(model, ask(train, several, args.prompts), batch_size=args.batch_size or 32)
    if len(vectors) < 2:
        raise ValueError(f"there is a vector of {', '.join(vectors)} only; the mean over tasks needs two or more.")
    spec = args.transfer_data or (UNSEEN if args.data == "scenes" else None)
    if spec == UNSEEN:
        other = data.scenes("test", 2 * args.n, args.seed, folds=(3,))
    else:
        other = data.load(spec, "test", 2 * args.n, args.seed) if spec else None
    here, elsewhere = ask(test, chosen, args.n), ask(other, chosen, args.n) if other else {}
    return Bench(model, vectors.to(args.device), here, elsewhere, args.seed, args.batch_size), train


def run_searches(args: argparse.Namespace, bench: Bench, chosen: Mapping[str, Task], train: Dataset) -> Sets:
    """What every algorithm finds for every task, one result a seed."""
    layout = next(iter(bench.here.values())).layout
    space, seeds = PatchSpace(bench.model, layout), range(args.seed + 1, args.seed + 1 + args.seeds)
    found: Sets = {name: {task: [] for task in chosen} for name in args.algorithms}
    plan = [(task, seed, name) for task in chosen.values() for seed in seeds for name in args.algorithms]
    with tqdm(plan, desc="searching", unit="search", disable=not plan) as bar:
        for task, seed, name in bar:
            bar.set_postfix_str(f"{name}, {task.name}")
            queries = task.prompts(train, args.prompts, seed, layout).query_only()
            options = {"scores": bench.vectors.score()} if name == "ranking" else {}
            options |= {"resume": common.journal(args.resume, task.name, name, args.budget, seed)}
            options |= {"budget": args.budget, "batch_size": args.batch_size, "seed": seed, "progress": False}
            search_now, vector = search.ALGORITHMS[name], bench.vectors[task.name]
            found[name][task.name].append(search_now(bench.model, vector, task, queries, space, **options))
    return found


def judge_all(bench: Bench, chosen: Mapping[str, Task], found: Sets) -> list[dict[str, Any]]:
    """A row for every reference and set, in the order of the tasks, the lowest token loss of a task first."""
    rows, steps = [], [(t, name) for t in chosen.values() for name in ("", *found) if not name or t.name in found[name]]
    with tqdm(steps, desc="judging", unit="set") as bar:
        for task, name in bar:
            bar.set_postfix_str(f"{name or 'references'}, {task.name}")
            if not name:
                here, there = references(bench, task, found)
                new = [here[what] | {"set": what, "other_data": there.get(what)} for what in here]
            else:
                new = [{"set": name} | judge(bench, task, name, found, here, there)]
            rows += [{"task": task.name, "metric_name": task.metric.name} | row for row in new]
    losses = {(row["set"], row["task"]): row["token_loss"][0] for row in rows}
    for row in rows:
        abroad = row.get("token_loss_on_other_tasks", {})
        row["cost_to_other_tasks"] = {task: loss - losses[row["set"], task] for task, loss in abroad.items()}
    return sorted(rows, key=lambda row: (list(chosen).index(row["task"]), row["token_loss"][0]))


def references(bench: Bench, task: Task, found: Sets) -> tuple[Measured, Measured]:
    """What one-shot, zero-shot and everything patched come to, here and on the other data."""
    spaces = [patches(by_task[task.name][0]).space for by_task in found.values() if task.name in by_task]
    space = spaces[0] if spaces else PatchSpace(bench.model, bench.here[task.name].layout)
    everything = bench.vectors[task.name], PatchSet(space, torch.ones(len(space)))
    plans = {ONE_SHOT: [ONE_SHOT], ZERO_SHOT: [ZERO_SHOT], EVERYTHING: [everything]}
    return measure(bench, task, bench.here, plans), measure(bench, task, bench.elsewhere, plans)


def judge(bench: Bench, task: Task, name: str, found: Sets, here: Measured, there: Measured) -> dict[str, Any]:
    """The row of a set, or of an algorithm's sets, given the references here and on the other data."""
    results = found[name][task.name]
    sets = [patches(one) for one in results]
    random = [PatchSet.random(one.space, len(one), CONTROL + bench.seed + i) for i, one in enumerate(sets)]
    vector, average, curve = bench.vectors[task.name], bench.vectors.mean(), best_scored(results[0])
    own = {"own": [(vector, one) for one in sets]}
    others = {
        "random_units": [(vector, one) for one in random],
        "mean_ablated_one_shot": [(average, one, ONE_SHOT) for one in sets],
        "random_units_mean_ablated_one_shot": [(average, one, ONE_SHOT) for one in random],
    }
    foreign = {f"vector of {t}": [(bench.vectors[t], one) for one in sets] for t in bench.here if t != task.name}
    best = {k: [(vector, one)] for k, one in curve.items()}
    measured = measure(bench, task, bench.here, own | others | foreign | best, here)

    groups = [[one, *prunings(one, bench.seed)] for one in sets]
    losses = token_losses(bench, task, [one for group in groups for one in group]).split([len(g) for g in groups])
    by_seed = [part[0].item() for part in losses]
    agree(mean(by_seed), measured["own"]["token_loss"][0], f"{name}, {task.name}")
    costs = torch.cat([part[1:] - part[0] for part in losses]).tolist()
    abroad = [other for other, theirs in found[name].items() if theirs[0] is not results[0]]
    return measured["own"] | {
        "units": [len(one) for one in sets],
        "of_units": len(sets[0].space),
        "token_loss_by_seed": by_seed,
        **{what: measured[what] for what in others},
        "other_vectors": {what.removeprefix("vector of "): measured[what] for what in foreign},
        "cost_of_pruning_a_tenth": {"mean": mean(costs), "least": min(costs), "most": max(costs)} if costs else None,
        "jaccard_over_seeds": stability(sets),
        "other_data": measure(bench, task, bench.elsewhere, own, there).get("own"),
        "token_loss_on_other_tasks": {t: token_losses(bench, tasks.get(t), sets).mean().item() for t in abroad},
        "sufficiency": [{"units": k} | measured[k] for k in curve],
    }


def measure(
    bench: Bench, task: Task, prompts: Mapping[str, VisualPrompt], plans: Mapping[Any, Sequence[Condition]],
    references: Measured | None = None,
) -> Measured:  # fmt: skip
    """Metric and token loss of every plan, [mean, low, high] of the mean over its conditions, and the gap closed;
    nothing where there are no prompts of the task."""
    if task.name not in prompts:
        return {}
    conditions = {f"{what} {i}": one for what, several in plans.items() for i, one in enumerate(several)}
    size = bench.batch_size or 32
    table = evaluate(bench.model, task, prompts[task.name], conditions, batch_size=size, keep=0, progress=False)
    found: Measured = {}
    for what, several in plans.items():
        values = {
            label: np.mean([table.values(task.name, f"{what} {i}", column) for i in range(len(several))], axis=0)
            for label, column in (("metric", "score"), ("token_loss", "token_loss"))
        }
        found[what] = {label: list(bootstrap(value)) for label, value in values.items()}
    for measured in found.values():
        measured["gap_closed"] = gap_closed(measured, references or found)
    return found


def token_losses(bench: Bench, task: Task, sets: Sequence[PatchSet]) -> torch.Tensor:
    """The mean token loss of every set, all of one space, zero-shot on the task's prompts: [set]."""
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
        raise RuntimeError(f"{what}: the token loss is {searched} to a search and {evaluated} to an evaluation.")


def gap_closed(own: Mapping, bounds: Mapping[str, Mapping]) -> float | None:
    """How far token loss gets from zero-shot (0) to one-shot (1); None where one-shot is no better."""
    loss, zero, one = (measured["token_loss"][0] for measured in (own, bounds[ZERO_SHOT], bounds[ONE_SHOT]))
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


def leaderboard(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["task", "set", "units", "metric", "token loss", "gap closed (random)", "other vector"]
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
            *("{:.3f} [{:.3f}, {:.3f}]".format(*row[measure]) for measure in ("metric", "token_loss")),
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

    return common.table(head, map(cells, rows))


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Metric and sufficiency of every task; below, one algorithm's transfer between tasks, and everyone's stability."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    found = list(dict.fromkeys(row["set"] for row in rows if "units" in row))
    figure = Figure(figsize=(max(10, 2.6 * len(names) + 1.5), 10), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2, 1))
    panels = above.subplots(2, len(names), squeeze=False)
    for task, (top, bottom) in zip(names, panels.T):
        draw_task(top, bottom, [row for row in rows if row["task"] == task], found)
        top.set_yticks(range(len(found)), found if task == names[0] else [])
    above.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    left, right = below.subplots(1, 2)
    draw_transfer(left, rows, names)
    for task, marker in zip(names, cycle("osD^vP*X")):
        right.plot([], [], marker, color="0.4", label=task)
        for row in (row for row in rows if row["task"] == task and row.get("jaccard_over_seeds")):
            place = found.index(row["set"])
            for value, fill in zip(row["jaccard_over_seeds"].values(), ("full", "none")):
                right.plot(value, place, marker, color=f"C{place % 10}", fillstyle=fill, alpha=0.8)
    right.set_yticks(range(len(found)), found)
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
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")


def draw_transfer(panel: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """What a task's sets cost the others: of the name that has sets of most tasks, the one of lowest loss."""
    able = [row for row in rows if row["cost_to_other_tasks"]]
    if not able:
        panel.set_axis_off()
        return
    losses = {name: [row["token_loss"][0] for row in able if row["set"] == name] for name in {r["set"] for r in able}}
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
    panel.set(title=f"{best}: token loss over that of the task's own set", xlabel="task done", ylabel="set of task")


if __name__ == "__main__":
    main()
