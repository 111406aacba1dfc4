"""Circuits: how much of the model do the first units of a ranking carry, patched in and ablated out?

    python benchmarks/circuits.py [--quick] [--task segmentation] [--other identity] [--resume FOLDER]

For every ranking of `vtv_nnsight.studies.circuits.RANKINGS` and every seed (which draws the prompts that are searched
on), the first share k of the units is kept, at MIB's ten sizes (arXiv 2504.13151): f(k) is (m_k - m_nothing) over
(m_whole - m_nothing).

in                   The query alone; the task vector at the first units of the "quadrant" space.
out, zero            The whole prompt; all but the first units of the "cell" space ablated by zeros,
out, mean            by the mean over tasks,
out, counterfactual  or by what the units say of the same query under the other task's example.

m is minus the token loss, the task's metric, and log p(answer) - log p(the other task's answer to the same query), on
test prompts that no search saw. CPR is the integral of f over k (higher is better), CMD that of |1 - f| (0 is best), on
linear and on log k, each over the range of k, by which MIB does not divide; a star marks the order that MIB takes each
of. Intervals are 95 % over prompts, what they share, and seeds (bootstrap). Rankings search at equal budgets;
random units stand beside them. The folder circuits/ holds the curves of every direction and measure (`Curves.load`),
and the heads as MIB's nodes, in a graph that EAP-IG reads.

The last table is of models with a circuit known by construction, another one for each seed: the chance that a ranking
puts a head of the circuit before another head (AUROC), direction "out, counterfactual", at the same budget.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import file_name, interval, journal, options, save, table

from vtv_nnsight import MAEVQGAN, Activations, PatchSpace, TaskVectors, data, search, tasks
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.studies.circuits import (
    RANKINGS,
    KnownCircuit,
    answer_loss,
    answer_metric,
    auroc,
    by_head,
    counterfactual,
    faithfulness,
    log_ratio,
    plots,
    rank_units,
    write_nodes,
)
from vtv_nnsight.studies.circuits.curves import MIB
from vtv_nnsight.studies.circuits.faithfulness_curves import ORDERS
from vtv_nnsight.vectors import zero_vector

ABLATIONS = ("zero", "mean", "counterfactual")
MEASURES = ("loss", "metric", "log ratio")


class Bench:
    """The model, the vectors and the prompts that all rankings share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.task, self.other = args, tasks.get(args.task), tasks.get(args.other)
        self.model = MAEVQGAN(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
        self.images = data.scenes("train", n=500, seed=0)
        collected = {t.name: self.draw(t, self.images, args.collected, 0) for t in {*tasks.VTV, self.task}}
        self.vectors = TaskVectors.collect(self.model, collected)
        self.activations = {n: Activations.collect(self.model, rows, progress=False) for n, rows in collected.items()}
        fresh, count = data.scenes("validation", n=500, seed=0), args.held_out + args.test
        prompts, others = (self.draw(task, fresh, count, 1) for task in (self.task, self.other))
        self.held_out, self.test = prompts[: args.held_out], prompts[args.held_out :]
        self.held_out_others, self.test_others = others[: args.held_out], others[args.held_out :]
        self.spaces = {
            "in": PatchSpace(self.model, granularity="quadrant"),
            "out": PatchSpace(self.model, granularity="cell"),
        }
        self.measures = {
            "loss": lambda: answer_loss(self.model, self.test),
            "metric": lambda: answer_metric(self.model, self.task, self.test),
            "log ratio": lambda: log_ratio(self.model, self.test, self.test_others),
        }

    def draw(self, task: tasks.Task, images, count: int, seed: int):
        """One-shot prompts of a task."""
        return task.prompts(images, count, seed, self.model.layout).to(self.args.device)

    def objective(self, direction: str, ablation: str | None, seed: int) -> search.Objective:
        """What a ranking searches by: this seed's prompts and the held-out ones."""
        train = self.draw(self.task, self.images, self.args.prompts, 100 + seed)
        held_out, vector = self.held_out, self.vectors[self.task.name]
        if direction == "in":
            train, held_out = train.query_only(), held_out.query_only()
        elif ablation == "zero":
            vector = zero_vector(self.model)
        elif ablation == "mean":
            vector = self.vectors.mean()
        else:
            others = self.draw(self.other, self.images, self.args.prompts, 100 + seed)
            counterfactuals = [counterfactual(train, others), counterfactual(held_out, self.held_out_others)]
            vector = Activations.collect(self.model, type(train).cat(counterfactuals), progress=False)
        return search.Objective(self.model, vector, self.task, train, self.spaces[direction], held_out=held_out)

    def replacement(self, direction: str, ablation: str | None):
        """What is patched on the test prompts."""
        if direction == "in":
            return self.vectors[self.task.name]
        if ablation == "zero":
            return zero_vector(self.model)
        if ablation == "mean":
            return self.vectors.mean()
        return Activations.collect(self.model, counterfactual(self.test, self.test_others), progress=False)

    def scores(self, direction: str, ablation: str | None) -> dict[str, list[torch.Tensor]]:
        """Ranking → the scores of every seed."""
        scores, seeds = {name: [] for name in self.args.rankings}, range(self.args.seeds)
        for seed in progress_bar(seeds, desc=f"rankings, {way(direction, ablation)}"):
            objective = self.objective(direction, ablation, self.args.seed + seed)
            for name in self.args.rankings:
                file = journal(self.args.resume, name, way(direction, ablation), seed)
                shared = dict(budget=self.args.budget, seed=self.args.seed + seed, vectors=self.vectors, resume=file)
                shared |= dict(activations=self.activations, progress=False)
                scores[name].append(rank_units(name, objective, direction, **shared))
        return scores


def known_circuits(args: argparse.Namespace) -> list[dict]:
    """Every ranking's AUROC on models with a known circuit: a value for each seed."""
    rows = [{"ranking": name, "signed": [], "absolute": []} for name in args.rankings if name in BLIND]
    images = data.scenes("train", n=100, seed=0)
    for seed in progress_bar(range(args.seed, args.seed + args.seeds), desc="known circuits"):
        model = KnownCircuit(seed=seed)
        prompts, others = (tasks.get(t).prompts(images, 24, seed, model.layout) for t in ("segmentation", "identity"))
        space = PatchSpace(model, granularity="head")
        replaced = Activations.collect(model, counterfactual(prompts, others), progress=False)
        objective = search.Objective(model, replaced, tasks.segmentation, prompts[:16], space, held_out=prompts[16:])
        for row in rows:
            scores = rank_units(row["ranking"], objective, "out", budget=args.budget, seed=seed, progress=False)
            row["signed"].append(auroc(scores, model.circuit(space)))
            row["absolute"].append(auroc(scores.abs(), model.circuit(space)))
    return rows


BLIND = [name for name, ranking in RANKINGS.items() if ranking.algorithm != "ranking"]
"""Rankings that need no vectors of other tasks, which a model of random weights has not."""


def way(direction: str, ablation: str | None) -> str:
    """The name of a direction in tables and files."""
    return f"{direction}, {ablation}" if ablation else direction


def main() -> None:
    parser = options(__file__, __doc__, "three rankings, one seed, in and out by counterfactual")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--task", default="segmentation")
    parser.add_argument("--other", default="identity", help="the task of the counterfactual examples and answers")
    parser.add_argument("--rankings", nargs="+", default=list(RANKINGS), choices=RANKINGS)
    parser.add_argument("--ablations", nargs="*", default=list(ABLATIONS), choices=ABLATIONS)
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=MEASURES)
    parser.add_argument("--budget", type=int, default=1000, help="patched evaluations of a ranking")
    parser.add_argument("--seeds", type=int, default=3, help="as many, from --seed on")
    parser.add_argument("--collected", type=int, default=100, help="prompts per task that vectors are the mean of")
    parser.add_argument("--prompts", type=int, default=32, help="to search on, each seed its own")
    parser.add_argument("--held-out", type=int, default=16, help="prompts, the same for all")
    parser.add_argument("--test", type=int, default=32, help="prompts, the same for all")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="keep what was measured there, and go on")
    args = parser.parse_args()
    if args.quick:
        args.rankings, args.ablations, args.seeds = ["attribution", "mediation", "random"], ["counterfactual"], 1
        args.budget, args.collected, args.prompts, args.held_out, args.test = 200, 8, 8, 4, 8

    bench, folder = Bench(args), args.out / args.name
    folder.mkdir(parents=True, exist_ok=True)
    rows, panels, titles = [], [], []
    for direction, ablation in [("in", None), *(("out", one) for one in args.ablations)]:
        name, space = way(direction, ablation), bench.spaces[direction]
        scores = bench.scores(direction, ablation)
        measured = faithfulness(
            bench.model,
            bench.replacement(direction, ablation),
            bench.test,
            space,
            scores,
            [bench.measures[measure]() for measure in args.measures],
            direction=direction,
            resume=journal(args.resume, "curves", name),
        )
        for measure, curves in zip(args.measures, measured):
            curves.save(folder / f"{file_name(name, measure)}.json")
            rows += [{"way": name, "measure": measure} | row for row in curves.summary().to_dict("records")]
            panels.append(curves)
            titles.append(f"{name}; m: {measure}")
        heads = PatchSpace(bench.model, granularity="head")
        for ranking, of_seeds in scores.items():
            file = folder / f"nodes-{file_name(name, ranking)}.json"
            write_nodes(file, heads, by_head(space, torch.stack(of_seeds).nanmean(0)))

    columns = [f"{name} {scale}" for scale in ("linear", "log") for name in ("CPR", "CMD")]
    for name in dict.fromkeys(row["way"] for row in rows):
        for measure in args.measures:
            listed = [
                row for row in rows if (row["way"], row["measure"]) == (name, measure) and not is_repeated(row, rows)
            ]
            body = [
                [row["ranking"], row["order"], *(cell(row, name, rows) for name in columns)]
                for row in sorted(listed, key=lambda row: -row["CPR log"])
            ]
            print(f"\n{args.model}, {args.task}; {name}; m: {measure}")
            print(table(["ranking", "order", *columns], body) + "\n* as MIB takes it")
    known = known_circuits(args)
    print(f"\nAUROC on {args.seeds} known circuits")
    body = [[row["ranking"], *(value for name in ORDERS for value in interval(row[name]))] for row in known]
    print(table(["ranking", "signed", "±", "absolute", "±"], body))
    units = {direction: len(space) for direction, space in bench.spaces.items()}
    save(
        args,
        {"units": units, "curves": rows, "known": known},
        plots.draw(panels, columns=len(args.measures), titles=titles),
    )


def is_repeated(row: dict, rows: list[dict]) -> bool:
    """Whether a ranking by absolute scores is the one by signed scores, as where none is below zero."""
    signed = row | {"order": "signed"}
    return row["order"] == "absolute" and signed in rows


def cell(row: dict, name: str, rows: list[dict]) -> str:
    """A value with its interval, and a star where MIB takes it from that order, or from one that is equal."""
    orders = [order for order in ORDERS if row | {"order": order} in rows]
    star = "*" if any((name.split()[0], order) in MIB for order in orders) else ""
    return f"{row[name]:.3f} [{row[f'{name} low']:.3f}, {row[f'{name} high']:.3f}]{star}"


if __name__ == "__main__":
    main()
