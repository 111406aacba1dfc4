"""Are vectors task identities? Tasks that training never showed go through the same table as those that it did.

    python benchmarks/held_out_tasks.py [--quick] [--data pictures] [--seeds 3]

The embedded model was trained on prompts of VTV's five tasks and of others; inpainting + lowlight, segmentation +
inpainting, masks of yellow on purple, and pictures upside down were held out (`training.curriculum.HELD_OUT`). Each is
given a vector, a search and an evaluation, as `vtv run` gives them: one-shot, zero-shot, the task vector, the
tokenizer's own picture of the truth. Each seed is a separate run, and all seeds make one table.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from common import options, save, table
from matplotlib.figure import Figure

from vtv_nnsight import runs, tasks
from vtv_nnsight.evaluation import Table
from vtv_nnsight.evaluation.conditions import BASELINE, CEILING, FLOOR, PATCHED, ZERO_SHOT
from vtv_nnsight.runs import QUICK, Settings
from vtv_nnsight.training.curriculum import HELD_OUT

SHOWN = (FLOOR, BASELINE, ZERO_SHOT, PATCHED, CEILING)


def main() -> None:
    parser = options(__file__, __doc__, "two tasks, one seed, short searches")
    parser.add_argument("--model", default=Settings.model, help="as SOURCE of `vtv info`")
    parser.add_argument("--data", default=Settings.data, help="as for `vtv run`")
    parser.add_argument("--seeds", type=int, default=3, help="as many, from --seed on")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="of the seeds' runs; by default in --out")
    args = parser.parse_args()
    for task in HELD_OUT:
        if "+" not in task.name:
            tasks.register(task)
    names = tuple(task.name for task in HELD_OUT)
    given = dict(model=args.model, data=args.data, tasks=names, draws=1, control_prompts=8)
    if args.quick:
        short = dict(tasks=names[:2], budget=200, prompts=8, candidates=8, test_prompts=8)
        args.seeds, given = 1, QUICK | given | short
        given.pop("most_tasks", None)
    began, found = time.perf_counter(), []
    for seed in range(args.seed, args.seed + args.seeds):
        folder = (args.runs or args.out / "held_out_tasks") / f"seed{seed}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        runs.run(folder, Settings(**given, seed=seed), device=args.device, redo=True)
        tables = [Table.load(path) for path in sorted((folder / "evaluation").glob("*.parquet"))]
        found += [Table(one.frame.assign(seed=seed)) for one in tables]
    merged = Table.cat(found)
    lines = [line for line in merged.lines() if line.condition in SHOWN and line.measure in ("iou", "mse")]
    body = []
    for name in given["tasks"]:
        own = {line.condition: line for line in lines if line.task == name}
        body.append([name, *(f"{own[c].mean:.3f} [{own[c].low:.3f}, {own[c].high:.3f}]" for c in SHOWN if c in own)])
    print(f"\n{args.model}, {args.data}, {args.seeds} seeds\n{table(['task', *SHOWN], body)}")
    seconds = time.perf_counter() - began
    save(args, {"lines": [line._asdict() for line in lines], "seconds": seconds}, draw(lines, given["tasks"]))


def draw(lines: list, names: tuple[str, ...]) -> Figure:
    """Every condition's mean and interval, a panel a task."""
    figure = Figure(figsize=(3 * len(names) + 1, 2.6), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names):
        own = [line for line in lines if line.task == name][::-1]
        means = np.array([line.mean for line in own])
        bars = np.abs([[line.low for line in own] - means, [line.high for line in own] - means])
        panel.errorbar(means, range(len(own)), xerr=bars, fmt="o", capsize=2)
        panel.set_yticks(range(len(own)), [line.condition for line in own])
        panel.set_title(name, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
