"""Loss against budget: what each search finds, and how soon it matches the published REINFORCE.

    python benchmarks/search_efficiency.py [--quick] [--task segmentation] [--ablations] [--resume FOLDER]

Every algorithm is run from the start at every budget and seed; a seed draws the prompts to train on. The held-out
prompts, by which searches choose, and the test prompts, which no search sees, are the same for all. All sets are scored
by token loss on the test prompts, and so are nothing patched, everything patched, random sets of the published search's
sizes, and the one-shot prompts. Budgets count held-out evaluations too, and a gradient as three.

The published REINFORCE runs its 500 steps of 320 masks once a seed. What an algorithm needs to reach it is the smallest
budget at which its mean loss over seeds is no higher: by held-out loss, and by test loss. The published search is held
against the same target, its own mean test loss at the end: after how many of its evaluations it is there, by the best
sample so far, as published, and by the units of probability over one half, which it would not have to draw; by
the mean over seeds, which the factors are to, and seed by seed. It looks after every 50th step, so these are known to
16 000 evaluations. The area is that under the mean test loss over the logarithm of the budget, divided by the width: a
mean loss over budgets. Intervals are 95 % over seeds (Student's t).

Beside units for the mean over prompts, "gates, bank of 3" chooses for each unit one of three vectors (k-means over the
same prompts: `BankObjective`), and "gates, learned vector" spends half of its budget on finding units and the other
half on the vector itself (`learning.learn_vector`: a step costs three evaluations a prompt, a look at the held-out
prompts one). "ranking, nearest centroid" takes the units that tell tasks apart (`circuits.centroid_accuracy`).
`--ablations` adds the default REINFORCE with one of its parts taken away at a time (and writes
search_efficiency_ablations).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import interval, journal, options, save, table
from matplotlib.figure import Figure
from scipy.cluster.vq import kmeans2

from vtv_nnsight import MAEVQGAN, VisualPrompt, data, search, tasks
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.patching import PatchSet, PatchSpace, patch
from vtv_nnsight.patching.forward import Edit
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.search.budget import GRADIENT_COST, Search
from vtv_nnsight.search.objective import Objective
from vtv_nnsight.search.result import NamedUnits
from vtv_nnsight.search.score_function import PUBLISHED, published
from vtv_nnsight.studies.circuits import centroid_accuracy
from vtv_nnsight.studies.learning import learn_vector
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import Activations, TaskVector, TaskVectors

PAPER = "reinforce, published"
ABLATIONS = {
    "reinforce, not pruned": dict(prune=False),
    "reinforce, 4 masks of 4 prompts": dict(masks=4, images=4),
    "reinforce, constant rate": dict(decay=0.0, lr=0.15),
    "reinforce, same 10 prompts": dict(prompts=10),
}
CENTROIDS = "ranking, nearest centroid"
"""The search table's second ranking that asks for no loss."""
BEYOND = {"gates, bank of 3": dict(bank=3), "gates, learned vector": dict(learned=True)}
"""What chooses or makes vectors, too."""
LEARNED_AT_ONCE = 16
"""Prompts in a step of learning a vector."""


def cluster_vectors(run: Activations, space: PatchSpace, count: int, seed: int = 0) -> list[TaskVector]:
    """The centres of every unit's activations on single prompts, by k-means: `count` vectors, the i-th of which has
    every unit's i-th centre, from the largest cluster to the smallest, and the mean over prompts outside the units.

    Args:
        run: The activations of the task's prompts.
        space: The units.
        count: Clusters of a unit.
        seed: Of k-means.

    Raises:
        ValueError: with fewer prompts than clusters.
    """
    if not 1 <= count <= len(run):
        raise ValueError(f"count={count} clusters cannot be made of {len(run)} prompts; give 1 to {len(run)}.")
    means = [run.values.map(lambda values: values.float().mean(0)) for _ in range(count)]
    for stage in space.stages:
        values = run.values[stage.key].float()
        for places in space.groups[stage.key].values():
            at = places[run.present[stage.key][places]]
            for layer in range(stage.layers):
                for head in range(stage.heads):
                    rows = values[:, layer, at, head].flatten(1)
                    for mean, centre in zip(means, _centres(rows, count, seed)):
                        mean[stage.key][layer, at, head] = centre.view(len(at), -1)
    return [TaskVector(f"cluster {i + 1}", mean, None, len(run), run.fingerprint) for i, mean in enumerate(means)]


def _centres(rows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """The centres of rows [row, dim], those of the most rows first: [count, dim]. Where rows are too alike for so many
    clusters, some centres are the mean."""
    mean = rows.mean(0).expand(count, -1).clone()
    if count == 1 or len(rows.unique(dim=0)) < count:
        return mean
    _, labels = kmeans2(rows.double().numpy(), count, minit="++", seed=seed, missing="warn")
    labels = torch.from_numpy(labels).long()
    sizes = torch.bincount(labels, minlength=count)
    for place, label in enumerate(sizes.argsort(descending=True, stable=True).tolist()):
        if sizes[label]:
            mean[place] = rows[labels == label].mean(0)
    return mean


class BankObjective(Objective):
    """The loss of sets of (unit, vector) pairs, of which a search picks one of a unit's centres, or none: a mean over
    prompts may lie between what a head says of two kinds of prompts, and be neither (after Ma et al., *Where and What
    Matters: Sensitivity-Aware Task Vectors*, AAAI 2026, arXiv 2511.08246). Where a unit is chosen with several vectors,
    the last one stands.

    Args:
        model, task, prompts, space, **settings: As for `Objective`, of one task.
        bank: The vectors.

    Attributes:
        units: The space given; `space` has its units once for each vector.

    Raises:
        ValueError: as `Objective` does, and when the bank is empty.
    """

    def __init__(
        self,
        model: InContextModel,
        bank: Sequence[TaskVector],
        task: Task,
        prompts: VisualPrompt,
        space: PatchSpace,
        **settings: Any,
    ) -> None:
        if not bank:
            raise ValueError("there are no vectors in this bank; give at least one.")
        super().__init__(model, bank[0], task, prompts, space, **settings)
        self.vectors = [vector.to(self._truth.device) for vector in bank]
        self.units, self.late = space, None
        self._prefixes.before = {}  # which knows units, not pairs
        names = [f"{name} = {vector.task}" for vector in bank for name in space.names]
        self.space = NamedUnits(names, space.fingerprint | {"bank": [vector.task for vector in bank]})

    def sets(self, pairs: PatchSet) -> list[PatchSet]:
        """A set of pairs as a set of units for each vector, no unit twice: what goes with the bank in a `Condition`."""
        choices = self._split(pairs.choices)
        later = choices.flip(-2).cumsum(-2).flip(-2) - choices.long() > 0
        return [PatchSet(self.units, one) for one in choices & ~later]

    def _split(self, choices: torch.Tensor) -> torch.Tensor:
        """[..., pair] → [..., vector, unit]."""
        return choices.unflatten(-1, (len(self.vectors), len(self.units)))

    def _edit(self, choices: torch.Tensor, rows: torch.Tensor, left: Any = None) -> Edit:
        masks = [self.units.mask(part) for part in self._split(choices).unbind(-2)]
        return partial(patch, vector=self.vectors, patches=masks)


class Outcome(NamedTuple):
    """What a search came to."""

    test_loss: float
    held_out_loss: float
    evaluations: int
    seconds: float
    units: int


class Bench:
    """The model, the vectors and the prompts that all searches share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.task = args, tasks.get(args.task)
        self.model = MAEVQGAN(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
        layout = self.model.layout
        self.images = data.scenes("train", n=500, seed=0)
        collected = {t.name: t.prompts(self.images, args.collected, 0, layout) for t in tasks.VTV}
        self.vectors = TaskVectors.collect(self.model, collected)
        self.collected = collected[self.task.name]
        self.space = PatchSpace(self.model, layout, args.granularity)
        single = {n: Activations.collect(self.model, rows, progress=False) for n, rows in collected.items()}
        self.accuracy = centroid_accuracy(single, self.space)
        fresh = self.task.prompts(data.scenes("validation", n=500, seed=0), args.held_out + args.test, 1, layout)
        self.held_out, self.test = fresh[: args.held_out].query_only(), fresh[args.held_out :]

    def loss(
        self, choices: torch.Tensor, prompts: VisualPrompt | None = None, vector: TaskVector | list | None = None
    ) -> float:
        """Mean token loss of a set [unit] on the test prompts, zero-shot by default, with the task's vector or another;
        of a bank, its pairs [pair]."""
        prompts = self.test.query_only() if prompts is None else prompts
        vector = self.vectors[self.task.name] if vector is None else vector
        kind = BankObjective if isinstance(vector, list) else search.Objective
        judge = kind(self.model, vector, self.task, prompts[:1], self.space, held_out=prompts)
        return judge(choices.expand(len(prompts), -1), judge.held_out).mean().item()

    def prompts(self, seed: int) -> VisualPrompt:
        """The prompts to train on."""
        return self.task.prompts(self.images, self.args.prompts, 100 + seed, self.model.layout).query_only()

    def run(self, label: str, seed: int, budget: int, **own) -> Outcome:
        """A search of its algorithm's own options; "prompts" of them says how many to train on, and "bank" and
        "learned" what is done about vectors."""
        name, prompts = label.split(",")[0], self.prompts(seed)[: own.pop("prompts", None)]
        file = journal(self.args.resume, label, budget, seed)
        if count := own.pop("bank", None):
            return self.run_bank(search.ALGORITHMS[name], count, prompts, budget, seed, file)
        learned = own.pop("learned", False)
        own |= {"scores": self.accuracy} if label == CENTROIDS else {}
        vector = self.vectors[self.task.name]
        shared = dict(held_out=self.held_out, seed=seed, vectors=self.vectors, resume=file)
        shared["budget"] = budget // 2 if learned else budget
        result = search.ALGORITHMS[name](self.model, vector, self.task, prompts, self.space, **shared, **own)
        if learned:
            return self.learn(result, prompts, budget - result.evaluations)
        return self.outcome(result)

    def outcome(self, result: search.SearchResult, vector: TaskVector | list | None = None) -> Outcome:
        """That of a search, on the test prompts."""
        test_loss = self.loss(result.patches.choices, vector=vector)
        seconds = result.history[-1].seconds
        return Outcome(test_loss, result.held_out_loss, result.evaluations, seconds, len(result.patches))

    def run_bank(
        self, algorithm: Any, count: int, prompts: VisualPrompt, budget: int, seed: int, file: Path | None
    ) -> Outcome:
        """A search that chooses from a bank of vectors of the prompts that were collected on."""
        bank = cluster_vectors(Activations.collect(self.model, self.collected, progress=False), self.space, count)
        objective = BankObjective(self.model, bank, self.task, prompts, self.space, held_out=self.held_out, seed=seed)
        result = algorithm.on(objective, budget=budget, seed=seed, resume=file)
        units = sum(map(len, objective.sets(result.patches)))
        return self.outcome(result, bank)._replace(units=units)

    def learn(self, result: search.SearchResult, prompts: VisualPrompt, budget: int) -> Outcome:
        """A search, and then the vector that is learned at its units for what is left of the budget."""
        start, steps = time.perf_counter(), steps_for(budget, len(self.held_out))
        if not steps or not len(result.patches):
            return self.outcome(result)
        vector = learn_vector(
            self.model, self.vectors[self.task.name], result.patches, prompts, steps=steps,
            batch_size=LEARNED_AT_ONCE, held_out=self.held_out, seed=result.seed, progress=False,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        found = self.outcome(result, vector)
        return found._replace(
            held_out_loss=self.loss(result.patches.choices, self.held_out, vector),
            evaluations=found.evaluations + cost_of(steps, len(self.held_out)),
            seconds=found.seconds + seconds,
        )

    def run_published(self, seed: int, budget: int) -> tuple[Outcome, list[dict]]:
        """The published search, and its curve: at each set that it tried, the test losses of the best sample so far
        (by held-out loss) and of the units of probability over one half."""
        prompts = self.prompts(seed)
        objective = search.Objective(
            self.model, self.vectors[self.task.name], self.task, prompts, self.space, held_out=self.held_out, seed=seed
        )
        file = journal(self.args.resume, PAPER, budget, seed)
        follower = Search("reinforce", objective, budget, seed, {"recipe": "published"}, self.vectors, file)
        try:
            result = follower.result(*published(follower))
        finally:
            follower.close()
        curve, best, held_out = [], float("nan"), float("inf")
        for step, (evaluations, chosen, probabilities) in zip(follower.history, follower.trajectory):
            if step.held_out_loss < held_out:
                held_out, best = step.held_out_loss, self.loss(chosen)
            likely = self.loss(probabilities > 0.5)
            curve.append({"evaluations": evaluations, "sample": best, "thresholded": likely})
        return self.outcome(result), curve


def cost_of(steps: int, held_out: int) -> int:
    """Evaluations that learning a vector takes: a gradient as three, and looks at the held-out prompts."""
    looks = 1 + (steps // (every := max(1, steps // 10))) + (steps % every > 0)
    return GRADIENT_COST * LEARNED_AT_ONCE * steps + looks * held_out


def steps_for(budget: int, held_out: int) -> int:
    """The steps of learning that a budget allows."""
    most = budget // (GRADIENT_COST * LEARNED_AT_ONCE)
    return next((steps for steps in range(most, 0, -1) if cost_of(steps, held_out) <= budget), 0)


def plan(args: argparse.Namespace) -> Iterator[tuple[str, int, dict]]:
    """Label, budget and options of every search: the published one first."""
    rounds = -(-args.published_steps // PUBLISHED.validate_every)
    yield PAPER, args.published_steps * PUBLISHED.masks + rounds * args.held_out, dict(recipe="published")
    labels = {name: {} for name in args.algorithms} | (BEYOND if "gates" in args.algorithms else {})
    labels |= {CENTROIDS: {}} if "ranking" in args.algorithms else {}
    labels |= ABLATIONS if args.ablations else {}
    for label, own in labels.items():
        for budget in args.budgets:
            yield label, budget, own


def summarise(rows: list[dict]) -> list[dict]:
    """Of every algorithm: the area, the budgets at which it reaches the published search, and how many times fewer,
    by test loss, these are than what the published search needs by each of its curves, and than its whole budget."""
    paper, lines = rows[0], []
    spent = {name: need["mean"] for name, need in reached_by_itself(paper).items()} | {"whole budget": paper["budget"]}
    for label in dict.fromkeys(row["label"] for row in rows[1:]):
        own = [row for row in rows if row["label"] == label]
        line = {"label": label, "area": area([r["budget"] for r in own], [np.mean(r["test loss"]) for r in own])}
        for measure in ("held-out loss", "test loss"):
            target = np.mean(paper[measure])
            reached = [row["budget"] for row in own if np.mean(row[measure]) <= target]
            line[f"needed by {measure}"] = min(reached, default=None)
        needed = line["needed by test loss"]
        factors = {name: need / needed if need and needed else None for name, need in spent.items()}
        lines.append(line | {f"times fewer, {name}": factor for name, factor in factors.items()})
    return lines


def reached_by_itself(paper: dict) -> dict[str, dict]:
    """After how many evaluations the published search is at its final mean test loss, by its best sample so far and by
    its probabilities over one half: the "mean" over seeds, and each of its "seeds". None where never, or where no curve
    was kept."""
    target, seeds = np.mean(paper["test loss"]) + 1e-9, paper.get("curves", [])
    spent = [moment["evaluations"] for moment in seeds[0]] if seeds else []

    def first(losses: Sequence[float]) -> int | None:
        return next((evaluations for evaluations, loss in zip(spent, losses) if loss <= target), None)

    found = {}
    for curve in ("sample", "thresholded"):
        losses = [[moment[curve] for moment in seed] for seed in seeds]
        found[curve] = {"mean": first(np.mean(losses, 0)) if seeds else None, "seeds": [first(own) for own in losses]}
    return found


def area(budgets: list[int], losses: list[float]) -> float:
    """Mean loss over the logarithm of the budget (trapezoids)."""
    if len(budgets) == 1:
        return float(losses[0])
    x = np.log(budgets)
    return float(np.sum(np.diff(x) * (np.array(losses[1:]) + losses[:-1]) / 2) / (x[-1] - x[0]))


def draw(rows: list[dict], references: dict[str, float]) -> Figure:
    """Test loss against evaluations spent, and against seconds."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, measure in zip(axes, ("evaluations", "seconds")):
        for label in dict.fromkeys(row["label"] for row in rows):
            own = [row for row in rows if row["label"] == label]
            x = [statistics.mean(row[measure]) for row in own]
            means, halves = zip(*(interval(row["test loss"]) for row in own))
            style = dict(fmt="*k", markersize=12) if label == PAPER else dict(fmt="o-", markersize=4)
            axis.errorbar(x, means, np.nan_to_num(halves), label=label, capsize=2, **style)
        for curve, line in (("sample", "-"), ("thresholded", "--")) if measure == "evaluations" else ():
            moments = list(zip(*rows[0].get("curves", [])))
            means = [np.mean([seed[curve] for seed in moment]) for moment in moments]
            axis.plot([moment[0]["evaluations"] for moment in moments], means, f"k{line}", linewidth=1, label=curve)
        axis.axhline(np.mean(rows[0]["test loss"]), color="black", linewidth=0.8, linestyle=":")
        axis.axhline(references["one-shot"], color="tab:gray", linewidth=0.8, linestyle="--", label="one-shot")
        axis.set_xscale("log")
        axis.set_xlabel({"evaluations": "patched evaluations spent", "seconds": "seconds"}[measure])
    shown = [np.mean(row["test loss"]) for row in rows] + [references["one-shot"]]
    pad = (max(shown) - min(shown)) / 10  # long intervals, and the curves' beginnings, run out of the picture
    axes[0].set(ylabel="token loss on test prompts", ylim=(min(shown) - pad, max(shown) + pad))
    axes[1].legend(fontsize=8)
    return figure


def main() -> None:
    parser = options(
        __file__, __doc__, "three algorithms, a bank, a learned vector, one budget, one seed, 2 published steps"
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--task", default="segmentation")
    parser.add_argument("--algorithms", nargs="+", default=list(search.ALGORITHMS), choices=search.ALGORITHMS)
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--budgets", nargs="+", type=int, default=[1000, 2000, 4000, 8000])
    parser.add_argument("--published-steps", type=int, default=PUBLISHED.steps)
    parser.add_argument("--seeds", type=int, default=5, help="as many, from --seed on")
    parser.add_argument("--collected", type=int, default=100, help="prompts per task that vectors are the mean of")
    parser.add_argument("--prompts", type=int, default=96, help="to train on, each seed its own")
    parser.add_argument("--held-out", type=int, default=32, help="prompts, the same for all")
    parser.add_argument("--test", type=int, default=128, help="prompts, the same for all")
    parser.add_argument("--granularity", default="quadrant")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="keep every search's journal there")
    args = parser.parse_args()
    if args.quick:
        args.algorithms, args.budgets, args.seeds, args.published_steps = ["reinforce", "gates", "ranking"], [240], 1, 2
        args.collected, args.prompts, args.held_out, args.test = 16, 16, 8, 16

    args.name += "_ablations" if args.ablations else ""
    bench = Bench(args)
    nothing, everything = torch.zeros(len(bench.space)), torch.ones(len(bench.space))
    references = {
        "one-shot": bench.loss(nothing.bool(), bench.test),
        "nothing patched": bench.loss(nothing.bool()),
        "everything patched": bench.loss(everything.bool()),
    }
    seeds, searches, rows = range(args.seed, args.seed + args.seeds), list(plan(args)), []
    for label, budget, own in progress_bar(searches, desc="searches"):
        if label == PAPER:
            outcomes, curves = zip(*(bench.run_published(seed, budget) for seed in seeds))
        else:
            outcomes, curves = [bench.run(label, seed, budget, **own) for seed in seeds], ()
        of_seeds = Outcome(*map(list, zip(*outcomes)))
        rows.append(
            {
                "label": label,
                "budget": budget,
                "test loss": of_seeds.test_loss,
                "held-out loss": of_seeds.held_out_loss,
                "evaluations": of_seeds.evaluations,
                "seconds": of_seeds.seconds,
                "units": of_seeds.units,
            }
            | ({"curves": curves} if curves else {})
        )
    sizes = zip(seeds, rows[0]["units"])
    references["random sets of the published sizes"] = statistics.mean(
        bench.loss(PatchSet.random(bench.space, size, seed).choices) for seed, size in sizes
    )

    print(f"\n{args.model}, {args.task}, {bench.space}\n{table(['reference', 'test loss'], references.items())}\n")
    head = ["search", "budget", "spent", "seconds", "units", "held-out loss", "test loss", "±"]
    body = [
        [row["label"], row["budget"]]
        + [float(np.mean(row[name])) for name in ("evaluations", "seconds", "units", "held-out loss")]
        + list(interval(row["test loss"]))
        for row in rows
    ]
    print(table(head, body))
    summary = summarise(rows)
    print(f"\nto reach {PAPER} ({rows[0]['budget']} evaluations)")
    needs = reached_by_itself(rows[0])
    for name, need in needs.items():
        print(f"it is there itself, {name}, after {need['mean']}; seed by seed: {', '.join(map(str, need['seeds']))}")
    print()
    print(table(list(summary[0]), [list(line.values()) for line in summary]))
    found = {"references": references, "searches": rows, "summary": summary, "reached by itself": needs}
    save(args, found, draw(rows, references))


if __name__ == "__main__":
    main()
