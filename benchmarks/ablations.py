"""The paper's ablations: what the stages, the units' size, the numbers of prompts and the search itself are worth.

    python benchmarks/ablations.py [--quick] [--tasks segmentation lowlight] [--budget 4000] [--seeds 3] [-n 128]
    python benchmarks/ablations.py --model mae-vqgan --data pascal:VOCdevkit     # over the four folds of Pascal-5i

The base patches units of both stages by quadrant, is searched for on 100 prompts, uses a vector averaged over 100, and
has a set of units a task. Each variation changes one thing and has its own search, with the same budget and seed:

- stages: the encoder only, the decoder only, both.
- granularity: units that are whole heads, quadrants, or single tokens (of which there are many more).
- training prompts: those that the search trains on, the first few of the same hundred. When it stops is judged by 32
  held-out prompts more, the same for all; with fewer than 4 to train on, no unit is pruned.
- averaged prompts: those that the vector is the mean of, the first few of the same hundred.
- masks: one set for all of VTV's tasks, which one search with the budget of them all looks for, against one each; as
  many units as the base has, drawn at random; and no search at all: everything patched, at all positions at once.

Each seed draws its own prompts to average and to train on; the test prompts are the same for all, of scenes that
nothing else has seen. Other data (`--data`, as for `vtv run`) are divided likewise: a fifth of the pictures to learn
from is for the held-out prompts. Of "pascal:ROOT" each fold has its own search, and values are means over the folds.
Values are means over the seeds and 95 % bootstrap intervals over the test prompts; a difference
to the base is paired. Every search's own held-out loss must be what `evaluate` finds for the same prompts.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import journal, label_decades, options, save, table
from datasets import Dataset
from matplotlib.figure import Figure

from vtv_nnsight import (
    MAEVQGAN,
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
from vtv_nnsight.evaluation import Table, bootstrap
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.vectors import TaskVector

REFERENCES = ("one-shot", "zero-shot")
EACH, SHARED, RANDOM, EVERYTHING = MASKS = ("one each", "one for all", "random units", "all positions")


class Setting(NamedTuple):
    """What a task's own search is given."""

    stages: str = "both"
    granularity: str = "quadrant"
    training_prompts: int = 100
    averaged_prompts: int = 100


class Found(NamedTuple):
    """A set of units, and what it took; 0 evaluations where nothing was searched for."""

    vector: TaskVector
    patches: PatchSet
    evaluations: int = 0
    held_out_loss: float = float("nan")


def plan(numbers: Sequence[int]) -> dict[tuple[str, Any], Setting | str]:
    """All that is compared: (what varies, its value) → a setting to search with, or one of `MASKS`. The base stands
    under everything that varies. `numbers` are those of prompts."""
    base, numbers = Setting(training_prompts=max(numbers), averaged_prompts=max(numbers)), sorted(set(numbers))
    levels = (("encoder", "decoder", "both"), ("head", "quadrant", "token"), numbers, numbers)
    varied = zip(Setting._fields, levels)
    settings = {(field, value): base._replace(**{field: value}) for field, values in varied for value in values}
    return settings | {("masks", EACH): base} | {("masks", name): name for name in MASKS[1:]}


def find(
    model: MAEVQGAN,
    plan: Mapping[tuple[str, Any], Setting | str],
    held_out: Mapping[str, VisualPrompt],
    args: Namespace,
    seed: int,
    bar: progress_bar,
    images: Dataset,
    fold: str = "",
) -> dict[str, dict[Setting | str, Found]]:
    """One seed's sets of every task. The held-out prompts are those of all tasks that share a set."""
    most, base = max(args.prompts), plan["masks", EACH]
    averaged, training = (
        {name: tasks.get(name).prompts(images, most, first + seed, model.layout) for name in held_out}
        for first in (0, 1000)
    )

    @functools.cache
    def vector(name: str, count: int) -> TaskVector:
        return TaskVectors.collect(model, {name: averaged[name][:count]}, progress=False)[name]

    def look(names: Sequence[str], setting: Setting) -> dict[str, Found]:
        bar.set_postfix_str(f"seed {seed}, {', '.join([*names, *map(str, setting)])}")
        vectors = {name: vector(name, setting.averaged_prompts) for name in names}
        stages = None if setting.stages == "both" else setting.stages
        result = search.reinforce(
            model,
            list(vectors.values()),
            [tasks.get(name) for name in names],
            [training[name][: setting.training_prompts].query_only() for name in names],
            PatchSpace(model, granularity=setting.granularity, stages=stages),
            budget=args.budget * len(names),
            held_out=[held_out[name].query_only() for name in names],
            seed=seed,
            resume=journal(args.resume, *[fold] * bool(fold), *names, *setting, args.budget, seed),
            progress=False,
        )
        bar.update()
        return {name: Found(v, result.patches, result.evaluations, result.held_out_loss) for name, v in vectors.items()}

    settings = dict.fromkeys(key for key in plan.values() if isinstance(key, Setting))
    sets = {name: {setting: look([name], setting)[name] for setting in settings} for name in args.tasks}
    together = look(list(held_out), base)
    for name, of_task in sets.items():
        agree(name, of_task, judge(model, name, held_out[name], of_task))
        best, space = of_task[base], of_task[base].patches.space
        of_task[SHARED] = together[name]
        of_task[RANDOM] = Found(best.vector, PatchSet.random(space, len(best.patches), seed))
        of_task[EVERYTHING] = Found(best.vector, PatchSet(space, torch.ones(len(space))))
    return sets


def judge(model: MAEVQGAN, name: str, prompts: VisualPrompt, sets: Mapping[Any, Found], fold: int = 0) -> Table:
    """`evaluate` the references and what was found, under the names of its keys."""
    conditions = {name: name for name in REFERENCES} | {str(k): (one.vector, one.patches) for k, one in sets.items()}
    return evaluate(model, tasks.get(name), prompts, conditions, fold=fold, keep=0, progress=False)


def agree(name: str, sets: Mapping[Any, Found], judged: Table) -> None:
    """Stop where `evaluate` does not find the loss that a search ended with."""
    for key, one in sets.items():
        loss = judged.values(name, str(key), "token_loss").mean()
        if not np.isclose(loss, one.held_out_loss, rtol=1e-4, atol=1e-4):
            raise SystemExit(
                f"{name}, {key}: the search ended with a held-out loss of {one.held_out_loss:.6f} and evaluate finds "
                f"{loss:.6f} for the same units and prompts; they do not compute the same."
            )


def pictures(spec: str, n: int) -> dict[str, tuple[Dataset, Dataset, Dataset]]:
    """Name of each fold ("" where there are none) → pictures to average and train on, to hold out, and to test on."""
    if spec == "scenes":
        return {"": (data.scenes("train", 500, 0), data.scenes("validation", 200, 0), data.scenes("test", 500, 0))}
    specs, parts = {"": spec}, {}
    if spec.startswith("pascal:"):
        root, fold, published = data.pascal_argument(spec.removeprefix("pascal:"))
        specs = {
            f"fold{f}": f"pascal:{root}:{f}" + ":masks" * (not published)
            for f in (range(4) if fold is None else (fold,))
        }
    for name, source in specs.items():
        train, test = data.split_data(source, None, 4 * n)
        keys = np.array(data.identities(train))
        held = np.isin(keys, np.unique(keys)[::5])
        parts[name] = train.select(np.flatnonzero(~held)), train.select(np.flatnonzero(held)), test
    return parts


def summary(values: np.ndarray, base: np.ndarray, *shared: np.ndarray | None) -> dict[str, Any]:
    """Of values [seed, image]: mean and interval, those of the paired difference to the base, and the seeds' means.
    What images share are the folds and identifiers of `bootstrap`."""
    parts = {"": bootstrap(values.mean(0), *shared), "difference_": bootstrap((values - base).mean(0), *shared)}
    numbers = {prefix + end: x for prefix, three in parts.items() for end, x in zip(("mean", "low", "high"), three)}
    return numbers | {"of_seeds": values.mean(1).tolist()}


def lines(name: str, plan: Mapping, searched: Sequence[Mapping[Any, Found]], judged: Sequence[Table]) -> list[dict]:
    """One task's rows; `found` are the seeds' and folds', `judged` the seeds', of all folds."""
    task, base, rows = tasks.get(name), plan["masks", EACH], []
    for (varies, value), key in ({("reference", name): name for name in REFERENCES} | dict(plan)).items():
        row = {"task": name, "metric": task.metric.name, "varies": varies, "value": value, "is_base": key == base}
        of_key = [sets[key] for sets in searched if key in sets]
        row["units_patched"] = [len(one.patches) for one in of_key]
        row["units_to_choose_from"] = len(of_key[0].patches.space) if of_key else 0
        row["evaluations"] = [one.evaluations for one in of_key]
        for measure in ("score", "token_loss"):
            values = [np.stack([t.values(name, str(k), measure) for t in judged]) for k in (key, base)]
            one = judged[0].frame[(judged[0].frame.condition == str(base)) & (judged[0].frame.task == name)]
            row[measure] = summary(*values, np.sort(one.fold.to_numpy()), judged[0].identifiers(name, str(base)))
        rows.append(row)
    return rows


def label(row: dict[str, Any]) -> str:
    return metrics.get(row["metric"]).label


def show(rows: Sequence[dict[str, Any]]) -> str:
    """One task's rows as a table."""

    def cells(row: dict[str, Any]) -> list[str]:
        texts = []
        for numbers in (row["score"], row["token_loss"]):
            gap = "{difference_mean:+.3f} [{difference_low:+.3f}, {difference_high:+.3f}]".format(**numbers)
            texts += ["{mean:.3f} [{low:.3f}, {high:.3f}]".format(**numbers), "base" if row["is_base"] else gap]
        units = f"{np.mean(row['units_patched']):.4g} of {row['units_to_choose_from']}" if row["units_patched"] else ""
        spent = f"{np.mean(row['evaluations']):.0f}" if any(row["evaluations"]) else ""
        return [row["varies"].replace("_", " "), str(row["value"]), units, spent, *texts]

    first = rows[0]
    head = [first["task"], "", "units", "evaluations", label(first), "− base", "token loss ↓", "− base"]
    return table(head, map(cells, rows))


def figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """A row of panels for each task and a column for each thing that varies."""
    names, columns = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "varies"))
    columns.remove("reference")
    drawn = Figure(figsize=(14, 0.7 + 2.7 * len(names)), layout="constrained")
    panels = drawn.subplots(len(names), len(columns), sharey="row", squeeze=False)
    for i, name in enumerate(names):
        of_task = [row for row in rows if row["task"] == name]
        for varies, panel in zip(columns, panels[i]):
            for row, style in zip(of_task, (("black", (0, (5, 3))), ("grey", (0, (1, 2))))):
                panel.axhline(row["score"]["mean"], color=style[0], linestyle=style[1], label=row["value"])
            points(panel, [row for row in of_task if row["varies"] == varies], f"C{i}")
            panel.set_title(varies.replace("_", " ") if i == 0 else "", fontsize=10)
        bounded = metrics.get(of_task[0]["metric"]).higher_is_better
        first = panels[i, 0]
        first.set_ylabel(f"{name}\n{label(of_task[0])}" + ("" if bounded else ", log scale"), color=f"C{i}")
        if not bounded:
            first.set_yscale("log")
            label_decades(first.yaxis)
        first.tick_params(axis="y", labelsize=8)
    panels[0, 0].plot([], [], "o", color="C0", label="the base")
    handles = dict(reversed(list(zip(*reversed(panels[0, 0].get_legend_handles_labels())))))
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9)
    return drawn


def points(panel: Any, rows: Sequence[dict[str, Any]], colour: str) -> None:
    """Means with their intervals, the base's filled, and the seeds' means; numbers on a log axis."""
    values = [row["value"] for row in rows]
    numeric = all(isinstance(value, int) for value in values)
    places = values if numeric else range(len(values))
    for place, row in zip(places, rows):
        score, face = row["score"], colour if row["is_base"] else "white"
        seeds = score["of_seeds"] if len(score["of_seeds"]) > 1 else []
        panel.plot([place] * len(seeds), seeds, "_", color=colour, alpha=0.5, markersize=9, label="a seed")
        ends = [[score["mean"] - score["low"]], [score["high"] - score["mean"]]]
        panel.errorbar(place, score["mean"], ends, fmt="o", color=colour, markerfacecolor=face, capsize=3)
    if numeric:
        panel.plot(places, [row["score"]["mean"] for row in rows], color=colour, linewidth=1, zorder=0)
        panel.set_xscale("log")
        panel.minorticks_off()
    else:
        panel.set_xlim(-0.5, len(rows) - 0.5)
    panel.set_xticks(places, labels=[str(value).replace(" ", "\n") for value in values], fontsize=8)


def main() -> None:
    parser = options(__file__, __doc__, "one task and one seed, few prompts, a tiny budget")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", default="scenes", help="as for `vtv run`; pascal:ROOT is done fold by fold")
    parser.add_argument("--tasks", nargs="+", default=["segmentation", "lowlight"])
    parser.add_argument("--budget", type=int, default=4000, help="patched evaluations that a task's search may spend")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", nargs="+", type=int, default=[1, 3, 10, 30, 100], help="to train on, to average")
    parser.add_argument("-n", type=int, default=128, help="test prompts")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="keep every search's journal there")
    parser.set_defaults(held_out=32)
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.budget, args.seeds, args.prompts = args.tasks[:1], 160, 1, [1, 16]
        args.n, args.held_out = 8, 4
    if min(args.seeds, args.n, *args.prompts) < 1:
        parser.error("--seeds, -n and --prompts count from 1.")

    model, varied = MAEVQGAN(args.model).to(args.device), plan(args.prompts)
    names = dict.fromkeys(args.tasks + [task.name for task in tasks.VTV])
    folds = pictures(args.data, args.n)
    seeds, settings = range(args.seed, args.seed + args.seeds), {s for s in varied.values() if isinstance(s, Setting)}
    searched: list[dict[str, dict]] = []
    judged: dict[str, list[list[Table]]] = {name: [[] for _ in seeds] for name in args.tasks}
    with progress_bar(total=len(folds) * args.seeds * (len(args.tasks) * len(settings) + 1), unit="search") as bar:
        for number, (fold, (images, fresh, unseen)) in enumerate(folds.items()):
            able = [name for name in names if tasks.get(name).needs in images.column_names]
            held_out = {name: tasks.get(name).prompts(fresh, args.held_out, 0, model.layout) for name in able}
            for seed, tables in zip(seeds, zip(*judged.values())):
                sets = find(model, varied, held_out, args, seed, bar, images, fold)
                searched.append(sets)
                for name, of_task in zip(args.tasks, tables):
                    test = tasks.get(name).prompts(unseen, args.n, 0, model.layout)
                    of_task.append(judge(model, name, test, sets[name], number))
    rows = []
    print(f"{args.model}, {args.n} test prompts; units and evaluations are means over {args.seeds} seeds")
    for name in args.tasks:
        of_task = [sets[name] for sets in searched]
        rows += lines(name, varied, of_task, [Table.cat(tables) for tables in judged[name]])
        print("\n" + show([row for row in rows if row["task"] == name]), flush=True)
    save(args, {"rows": rows}, figure(rows))


if __name__ == "__main__":
    main()
