"""What a better prompt does, beside the task vector: retrieved examples, a learned border, several examples.

    python benchmarks/prompt_side.py [--quick] [--tasks segmentation lowlight] [--steps 200] [--data pictures]

one-shot, zero-shot     An example by chance, of the query's class; none.
retrieved example       The most similar one by the model's own features (arXiv 2301.13670, unsupervised).
learned border          Pixels around the example's cells, learned by gradient (InMeMo, arXiv 2311.03648); with the
                        retrieved example, too, as there.
k examples, one canvas  In a layout of more and smaller cells (NeurIPS 2022, §4.4); scored on its own smaller cells.
k examples, mean answer The answers to one-shot prompts with an example each, averaged.
task vector             No example: the mean over training prompts, at the units that `search.gates` finds for it; and
                        the vector learned by gradient at these units, in as many steps as the border.

All rows ask the same test queries, with examples from the test split; what is learned, averaged or searched is of the
training split. Intervals are 95 % over query pictures (bootstrap), differences are paired.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from common import file_name, options, save, table
from matplotlib.figure import Figure

from vtv_nnsight import MAEVQGAN, Condition, PatchSpace, TaskVectors, data, evaluate, search, tasks
from vtv_nnsight.evaluation import Table
from vtv_nnsight.studies.learning import learn_vector
from vtv_nnsight.studies.prompting.border import learn_border
from vtv_nnsight.studies.prompting.retrieval import retrieve
from vtv_nnsight.tasks import Draw

VECTOR = "task vector"
"""The row that the others are compared with."""
MEASURES = ("score", "score_difference", "loss", "loss_difference")


def compared(args: argparse.Namespace, model: MAEVQGAN, task: tasks.Task) -> Table:
    """Every way to tell the model the task, on the same queries."""
    layout, k, learning = model.layout, args.examples, dict(steps=args.steps, seed=args.seed)
    train, test = data.split_data(args.data, args.images, args.images)
    collected = task.prompts(train, args.collected, args.seed, layout).to(args.device)
    vector = TaskVectors.collect(model, {task.name: collected})[task.name]
    searched = dict(budget=args.budget, seed=args.seed)
    units = search.gates(model, vector, task, collected.query_only(), PatchSpace(model), **searched).patches
    better = learn_vector(model, vector, units, collected.query_only(), **learning)
    border = learn_border(model, collected, **learning)

    drawn = tasks.draw(test, args.test, k, args.seed)
    singly = [task.compose(test, Draw(drawn.rows[:, [i, -1]], drawn.places), layout) for i in range(k)]
    together = task.compose(test, drawn, replace(layout, examples=k))
    nearest = task.compose(test, retrieve(model, task, test, drawn), layout)
    conditions = {
        "one-shot": Condition("one"),
        "zero-shot": Condition("zero"),
        "retrieved example": Condition(prompts_override=nearest),
        "learned border": Condition(prompts_override=border(singly[0])),
        "retrieved example + border": Condition(prompts_override=border(nearest)),
        f"{k} examples, one canvas": Condition(prompts_override=together),
        f"{k} examples, mean answer": Condition(prompts_override=singly),
        VECTOR: Condition(vectors=vector, patches=units),
        "task vector, learned": Condition(vectors=better, patches=units),
    }
    return evaluate(model, task, singly[0], conditions, keep=0)


def summarise(table: Table) -> list[dict]:
    """A row for each task and condition: score and loss, each as [mean, low, high], and their differences to the task
    vector's."""
    rows: dict[tuple, dict] = {}
    for line in table.lines(baseline=VECTOR):
        task = tasks.get(line.task)
        row = rows.setdefault(
            (line.task, line.condition),
            {"task": line.task, "prompts": line.condition, "metric": task.metric.label, "images": line.images},
        )
        name = "score" if line.measure == task.metric.name else "loss"
        row[name] = [line.mean, line.low, line.high]
        changed = line.condition != VECTOR
        row[f"{name}_difference"] = [line.difference, line.difference_low, line.difference_high] if changed else None
    return list(rows.values())


def written(values: list[float] | None, sign: str = "") -> str:
    return "" if values is None else "{:{s}.3f} [{:{s}.3f}, {:{s}.3f}]".format(*values, s=sign)


def draw(rows: list[dict]) -> Figure:
    """A panel for each task: the score under each condition, with its interval."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(2.2 + 3 * len(names), 3.4), layout="constrained")
    for i, (name, panel) in enumerate(zip(names, figure.subplots(1, len(names), squeeze=False)[0])):
        of_task = [row for row in rows if row["task"] == name][::-1]
        for place, row in enumerate(of_task):
            mean, low, high = row["score"]
            colour = "C1" if row["prompts"].startswith(VECTOR) else "C0"
            panel.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
        panel.set_yticks(range(len(of_task)), [row["prompts"] if i == 0 else "" for row in of_task], fontsize=8)
        panel.set_xlabel(of_task[0]["metric"])
        panel.set_title(name, fontsize=9)
        panel.grid(axis="x", alpha=0.3)
    return figure


def main() -> None:
    parser = options(__file__, __doc__, "segmentation alone, few prompts, steps and evaluations")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tasks", nargs="+", default=["segmentation", "lowlight"], metavar="TASK")
    parser.add_argument("--data", default="scenes", help="as for `vtv run`; other data have files named after them")
    parser.add_argument("--images", type=int, default=400, help="pictures of each split")
    parser.add_argument("--examples", type=int, default=3, help="of the rows with several")
    parser.add_argument("--budget", type=int, default=2000, help="evaluations of the search for units")
    parser.add_argument("--steps", type=int, default=200, help="of learning the border, and the vector")
    parser.add_argument("--collected", type=int, default=64, help="training prompts")
    parser.add_argument("--test", type=int, default=128, help="test prompts")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.images, args.budget, args.steps = args.tasks[:1], 80, 300, 4
        args.collected, args.test, args.examples = 12, 8, 2

    if args.data != "scenes":
        args.name += f"_{file_name(args.data)}"
    model = MAEVQGAN(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    rows = [row for name in args.tasks for row in summarise(compared(args, model, tasks.get(name)))]
    for name in args.tasks:
        of_task = [row for row in rows if row["task"] == tasks.get(name).name]
        print(f"\n{args.model}, {args.data}, {name}, {of_task[0]['images']} queries")
        head = ["prompts", of_task[0]["metric"], f"− {VECTOR}", "loss ↓", f"− {VECTOR}"]
        cells = [
            [row["prompts"]] + [written(row[key], sign) for key, sign in zip(MEASURES, ("", "+", "", "+"))]
            for row in of_task
        ]
        print(table(head, cells))
    save(args, {"rows": rows}, draw(rows))


if __name__ == "__main__":
    main()
