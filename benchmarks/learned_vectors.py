"""What is searched, and what is trained? Averaged and learned vectors at equal budgets, and ones from a bad start.

    python benchmarks/learned_vectors.py [--quick] [--data pictures] [--tasks segmentation colorization] [--seeds 3]

A gradient of one prompt counts as three evaluations. Every row spends `--budget`:

- averaged: all of it on finding units for the mean over prompts (gates).
- learned: half of it on units for the mean, the other half on learning the vector there (`learning.learn_vector`).
- learned from noise: the same units; the vector starts from noise of the mean's norm at every head and position.
- learned at another task's units: those that the same search finds for the next task, with this task's vector.
- learned at random units: as many, drawn at random.
- noise, not learned: noise of the mean's norm at the averaged row's units.

If a vector that is learned from noise, or at units that were found for something else, is as good, then the search and
the mean are not what does the task. Scores are the task's metric on test prompts that nothing else has seen; a seed
draws prompts, search and noise, and is a row of the file. Intervals are 95 % over seeds (Student's t).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from common import interval, options, save, table
from matplotlib.figure import Figure
from search_efficiency import LEARNED_AT_ONCE, cost_of, steps_for

from vtv_nnsight import PatchSet, PatchSpace, TaskVectors, data, evaluate, search, tasks
from vtv_nnsight.evaluation import noise_vector
from vtv_nnsight.models import load_model
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.studies.learning import learn_vector
from vtv_nnsight.vectors import TaskVector

ROWS = ("averaged", "learned", "learned from noise", "learned at another task's units", "learned at random units")
NOISE = "noise, not learned"


class Bench:
    """The model, the data and the vectors of one seed."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.model: Any = load_model(args.model, dispatch=True).to(args.device)
        self.space, layout = PatchSpace(self.model), self.model.layout
        train, test = data.split_data(args.data, 1000, 2 * args.test, seed)
        self.prompts = {t.name: t.prompts(train, args.prompts, seed, layout) for t in tasks.VTV}
        self.test = {name: tasks.get(name).prompts(test, args.test, seed, layout) for name in args.tasks}
        self.vectors = TaskVectors.collect(self.model, self.prompts, progress=False)

    def units(self, task: str, budget: int) -> PatchSet:
        """What gates find for a task's mean."""
        rest = (tasks.get(task), self.prompts[task].query_only(), self.space, budget)
        return search.gates(self.model, self.vectors[task], *rest, seed=self.seed, progress=False).patches

    def learn(self, task: str, start: TaskVector, patches: PatchSet, budget: int) -> TaskVector:
        """The vector that is learned at some units for a budget."""
        steps = max(1, steps_for(budget, round(0.25 * self.args.prompts)))
        shared = dict(steps=steps, batch_size=LEARNED_AT_ONCE, seed=self.seed, progress=False)
        return learn_vector(self.model, start, patches, self.prompts[task].query_only(), **shared)

    def conditions(self, task: str) -> dict[str, Any]:
        """Name → (vector, units) of every row of a task."""
        half, mean = self.args.budget // 2, self.vectors[task]
        names = list(self.vectors)
        other = names[(names.index(task) + 1) % len(names)]
        whole, found, others = self.units(task, 2 * half), self.units(task, half), self.units(other, half)
        chance = PatchSet.random(self.space, max(1, len(found)), self.seed)
        noise = noise_vector(mean, self.seed)
        starts = [(mean, found), (noise, found), (mean, others), (mean, chance)]
        learned = {n: (self.learn(task, *start, half), start[1]) for n, start in zip(ROWS[1:], starts)}
        return {"one-shot": None, ROWS[0]: (mean, whole)} | learned | {NOISE: (noise, whole)}


def main() -> None:
    parser = options(__file__, __doc__, "one task, one seed, a short search")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", default="pictures")
    parser.add_argument("--tasks", nargs="+", default=["segmentation", "inpainting", "colorization"])
    parser.add_argument("--budget", type=int, default=8000, help="evaluations of every row")
    parser.add_argument("--seeds", type=int, default=3, help="as many, from --seed on")
    parser.add_argument("--prompts", type=int, default=100, help="per task, to collect, to search and to learn on")
    parser.add_argument("--test", type=int, default=128, help="prompts")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.budget, args.seeds, args.prompts, args.test = ["segmentation"], 400, 1, 16, 8
    rows, began = [], time.perf_counter()
    for seed in progress_bar(range(args.seed, args.seed + args.seeds), desc="seeds"):
        bench = Bench(args, seed)
        for name in args.tasks:
            conditions, task = bench.conditions(name), tasks.get(name)
            found = evaluate(bench.model, task, bench.test[name], conditions, keep=0, progress=False)
            for line in found.lines():
                if line.measure == task.metric.name:
                    units = 0 if conditions[line.condition] is None else len(conditions[line.condition][1])
                    rows.append(dict(task=name, row=line.condition, seed=seed, units=units, score=line.mean))
                    rows[-1] |= dict(metric=task.metric.label, low=line.low, high=line.high)
    held_out = round(0.25 * args.prompts)
    steps = steps_for(args.budget // 2, held_out)
    spent = cost_of(steps, held_out) if steps else 0
    print(f"\n{args.model}, {args.data}; {args.budget} evaluations a row, {steps} steps of learning cost {spent}")
    names = ("one-shot", *ROWS, NOISE)
    for name in args.tasks:
        own = {row: [r for r in rows if (r["task"], r["row"]) == (name, row)] for row in names}
        body = [
            [row, *interval(r["score"] for r in found), float(np.mean([r["units"] for r in found]))]
            for row, found in own.items()
        ]
        print(f"\n{table([f'{name}, {args.seeds} seeds', own[names[0]][0]['metric'], '±', 'units'], body)}")
    seconds = {"seconds": time.perf_counter() - began, "steps of learning": steps}
    save(args, {"rows": rows} | seconds, draw(rows, args.tasks, names))


def draw(rows: list[dict], listed: list[str], names: tuple[str, ...]) -> Figure:
    """Every row's score, a point a seed; a panel for each task."""
    figure = Figure(figsize=(3.4 * len(listed) + 2.4, 3.2), layout="constrained")
    for panel, task in zip(figure.subplots(1, len(listed), squeeze=False, sharey=True)[0], listed):
        for place, name in enumerate(reversed(names)):
            scores = torch.tensor([row["score"] for row in rows if (row["task"], row["row"]) == (task, name)])
            panel.plot(scores, torch.full_like(scores, place), "o", markersize=4)
        label = next(row["metric"] for row in rows if row["task"] == task)
        panel.set_yticks(range(len(names)), list(reversed(names)))
        panel.set(title=task, xlabel=label)
    return figure


if __name__ == "__main__":
    main()
