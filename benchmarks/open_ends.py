"""Open ends of the paper: vectors of position and of what is shown, vector arithmetic, units across layouts.

    python benchmarks/open_ends.py [--quick] [--budget 2000]

carried      Prompts of one task that differ only in where the square lies (inpainting, left or right), or only in the
             class of the pictures (segmentation): do heads tell them apart as they tell tasks apart? The mean and the
             largest ratio of between-group to within-group variance over units, and the Jaccard index of the top tenth
             of the units with that of tasks (by chance 0.05).
transfer     Does the vector of squares on the left serve queries with the square on the right?
arithmetic   Is lowlight + inpainting - identity the vector of inpainting+lowlight?
layouts      Do the units that serve one order of cells serve the other? Vectors are the order's own.
geometry     Cosine of every pair of tasks' vectors, less their mean, and how far a head's vectors lie apart.

Losses are token losses of test prompts, query only, patched at the units that `search.gates` finds for the task's own
vector; intervals are 95 % over prompts and what they share (bootstrap).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from common import options, save, table
from matplotlib.figure import Figure

from vtv_nnsight import MAEVQGAN, Layout, PatchSet, PatchSpace, TaskVectors, VisualPrompt, data, search, tasks
from vtv_nnsight.evaluation import bootstrap
from vtv_nnsight.models.interface import ByStage
from vtv_nnsight.vectors import TaskVector


@dataclass(frozen=True)
class Square(tasks.Inpainting):
    """Inpainting with the square at one side."""

    side: str = "left"

    def corrupt(self, cell: torch.Tensor, place) -> torch.Tensor:
        return super().corrupt(cell, (place[0], 0.1 if self.side == "left" else 0.8))


class Bench:
    """The model, and prompts to collect, to search and to test on, from three splits."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = MAEVQGAN(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
        self.images = {name: data.scenes(name, n=400, seed=0) for name in ("train", "validation")}
        self.space = PatchSpace(self.model)

    def prompts(self, task: tasks.Task, split: str = "train", count: int | None = None, layout: Layout | None = None):
        """One-shot prompts of a task."""
        count, seed = count or self.args.collected, self.args.seed
        return task.prompts(self.images[split], count, seed, layout or self.model.layout).to(self.args.device)

    def vectors(self, by_name: Mapping[str, tasks.Task], layout: Layout | None = None) -> TaskVectors:
        prompts = {name: self.prompts(task, layout=layout) for name, task in by_name.items()}
        return TaskVectors.collect(self.model, prompts)

    def units(self, task: tasks.Task, vector: TaskVector, space: PatchSpace) -> PatchSet:
        """What a search finds for a task's vector."""
        rows = self.prompts(task, layout=space.layout).query_only()
        shared = dict(budget=self.args.budget, seed=self.args.seed)
        return search.gates(self.model, vector, task, rows, space, **shared).patches

    def loss(self, task: tasks.Task, vector: TaskVector, units: PatchSet | None, shot: str = "zero") -> tuple:
        """Mean token loss on the task's test prompts, and half of its interval."""
        space = self.space if units is None else units.space
        rows: VisualPrompt = self.prompts(task, "validation", self.args.test, space.layout)
        rows = rows if shot == "one" else rows.query_only()
        judge = search.Objective(self.model, vector, task, rows[:1], space, held_out=rows)
        choices = torch.zeros(len(space), dtype=torch.bool) if units is None else units.choices
        losses = judge(choices.expand(len(rows), -1), judge.held_out).numpy()
        shared = torch.stack(list(rows.factors.values()), dim=1).numpy()
        mean, low, high = bootstrap(losses, identifiers=shared)
        return mean, (high - low) / 2


def carried(bench: Bench) -> list[dict]:
    by_class = bench.images["train"]["label"]
    classes = sorted(set(by_class), key=by_class.count)[-2:]
    parts = {}
    for label in classes:
        rows = bench.images["train"].select([i for i, other in enumerate(by_class) if other == label])
        parts[f"class {label}"] = tasks.segmentation.prompts(
            rows, bench.args.collected, bench.args.seed, bench.model.layout
        ).to(bench.args.device)
    groups = {
        "tasks": bench.vectors({task.name: task for task in tasks.VTV}),
        "position": bench.vectors({side: Square(side=side) for side in ("left", "right")}),
        "pictures": TaskVectors.collect(bench.model, parts),
    }
    tops, rows = {}, []
    for name, vectors in groups.items():
        scores = bench.space.average(vectors.score())
        tops[name] = PatchSet(
            bench.space, scores >= scores.nan_to_num(-1).sort(descending=True).values[len(scores) // 10]
        )
        values = scores[~scores.isnan()]
        rows.append(
            {
                "groups": name,
                "mean ratio": float(values.mean()),
                "largest": float(values.max()),
                "at": bench.space.names[int(scores.nan_to_num(-1).argmax())],
                "Jaccard with tasks": tops[name].jaccard(tops["tasks"]),
            }
        )
    return rows


def transfer(bench: Bench) -> list[dict]:
    task = Square(side="right")
    vectors = bench.vectors({"right": task, "left": Square(side="left"), "anywhere": tasks.inpainting})
    return compared(bench, task, vectors["right"], {f"vector of squares {name}": vectors[name] for name in vectors})


def arithmetic(bench: Bench) -> list[dict]:
    task = tasks.get("inpainting+lowlight")
    parts = bench.vectors({one.name: one for one in (task, tasks.inpainting, tasks.lowlight, tasks.identity)})
    whole, a, b, neutral = parts.values()
    made = {
        "its own": whole,
        "lowlight + inpainting - identity": b + a - neutral,
        "their mean": 0.5 * (a + b),
        "inpainting": a,
        "lowlight": b,
        "identity": neutral,
    }
    rows = compared(bench, task, whole, made)
    for row in rows:
        if row["vector"] in made:
            row["cosine to its own"] = cosine(made[row["vector"]] - neutral, whole - neutral)
    return rows


def compared(bench: Bench, task: tasks.Task, whole: TaskVector, vectors: Mapping[str, TaskVector]) -> list[dict]:
    """Vectors at the units of a task's own, beside one-shot and nothing patched."""
    units = bench.units(task, whole, bench.space)
    losses = {"one-shot": bench.loss(task, whole, None, "one"), "nothing": bench.loss(task, whole, None)}
    losses |= {name: bench.loss(task, vector, units) for name, vector in vectors.items()}
    return [{"vector": name, "token loss": mean, "±": half} for name, (mean, half) in losses.items()]


def layouts(bench: Bench) -> list[dict]:
    task, rows = tasks.segmentation, []
    orders = {order: replace(bench.model.layout, order=order) for order in ("vertical", "horizontal")}
    spaces = {order: PatchSpace(bench.model, layout) for order, layout in orders.items()}
    vectors = {order: bench.vectors({task.name: task}, layout)[task.name] for order, layout in orders.items()}
    units = {order: bench.units(task, vectors[order], spaces[order]) for order in orders}
    for order, space in spaces.items():
        for source, names in units.items():
            moved = PatchSet.named(space, names)
            mean, half = bench.loss(task, vectors[order], moved)
            rows.append({"prompts": order, "units of": source, "units": len(moved), "token loss": mean, "±": half})
        drawn = PatchSet.random(space, len(units[order]), bench.args.seed)
        nothing = PatchSet.random(space, 0)
        for name, patches, shot in (
            ("chance", drawn, "zero"),
            ("nothing", nothing, "zero"),
            ("one-shot", nothing, "one"),
        ):
            mean, half = bench.loss(task, vectors[order], patches, shot)
            rows.append({"prompts": order, "units of": name, "units": len(patches), "token loss": mean, "±": half})
    return rows


def cosine(a: TaskVector, b: TaskVector) -> float:
    """Of all activations that both have."""
    flat = [torch.cat([v.mean[stage].nan_to_num().flatten() for stage in a.mean]) for v in (a, b)]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


def geometry(bench: Bench) -> tuple[list[dict], ByStage]:
    """Cosines of pairs of tasks, and by stage [layer, head] the root mean square distance of a head's vectors."""
    vectors = bench.vectors({task.name: task for task in tasks.VTV})
    mean = vectors.mean()
    centred = {name: vector - mean for name, vector in vectors.items()}
    rows = [{"task": a} | {b: cosine(centred[a], centred[b]) for b in centred} for a in centred]
    squares = [v.mean.map(lambda x: x.nan_to_num().square().sum(-1).mean(1)) for v in centred.values()]
    spread = ByStage({stage: torch.stack([square[stage] for square in squares]).mean(0).sqrt() for stage in mean.mean})
    return rows, spread


def draw(rows: list[dict], spread: ByStage) -> Figure:
    """The cosines, and a heat map of layers and heads for each stage."""
    figure = Figure(figsize=(4.5 + 2.6 * len(spread), 4), layout="constrained")
    panels = figure.subplots(1, 1 + len(spread), width_ratios=[1.6, *[1] * len(spread)])
    names = [row["task"] for row in rows]
    cosines = torch.tensor([[row[name] for name in names] for row in rows])
    panels[0].imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    for i, row in enumerate(cosines):
        for j, value in enumerate(row):
            panels[0].text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7)
    panels[0].set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].set_title("cosine of centred vectors", fontsize=9)
    for panel, (stage, values) in zip(panels[1:], spread.items()):
        picture = panel.imshow(values, vmin=0, vmax=max(float(distances.max()) for distances in spread.values()))
        panel.set(xlabel="head", ylabel="layer", xticks=range(values.shape[1]), yticks=range(values.shape[0]))
        panel.set_title(f"{stage}: distance of tasks", fontsize=9)
    figure.colorbar(picture, ax=panels[1:])
    return figure


PARTS = {"carried": carried, "transfer": transfer, "arithmetic": arithmetic, "layouts": layouts}


def main() -> None:
    parser = options(__file__, __doc__, "few prompts and evaluations, arithmetic only")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--budget", type=int, default=2000, help="evaluations of a search")
    parser.add_argument("--collected", type=int, default=64, help="prompts per group that vectors are the mean of")
    parser.add_argument("--test", type=int, default=64, help="test prompts")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if args.quick:
        args.parts, args.budget, args.collected, args.test = ["arithmetic"], 300, 12, 8

    bench, results = Bench(args), {}
    for name in args.parts:
        results[name] = PARTS[name](bench)
        head = list(dict.fromkeys(key for row in results[name] for key in row))
        print(f"\n{args.model}, {name}")
        print(table(head, [[row.get(key, "") for key in head] for row in results[name]]))
    results["geometry"], spread = geometry(bench)
    print(f"\n{args.model}, cosine of centred vectors")
    print(table(list(results["geometry"][0]), [list(row.values()) for row in results["geometry"]]))
    results["distance"] = {str(stage): values.tolist() for stage, values in spread.items()}
    save(args, results, draw(results["geometry"], spread))


if __name__ == "__main__":
    main()
