"""Which vectors carry their task? Every vector on every task, at fixed units and at units searched for it, over seeds.

    python benchmarks/specificity.py [--quick] [--data pictures] [--budget 800] [--seeds 5] [--runs FOLDER]

Each seed is a `vtv run` with its matrix: its own prompts, searches and queries. *Transfer at fixed units* is every
vector at the units that were found for a task; *searched for each pair* is every vector at units searched for it, the
task's own too, with `--budget` evaluations each (gates, or reinforce where the loss has no gradient). A task is
specific in a seed where its vector's paired difference to each other, at units searched for that one, leaves out zero
(Holm over the others). `--runs` reads the seeds of a `vtv run --seeds N --matrix` that is there, or keeps them there.
"""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd
from common import options, save, table

from vtv_nnsight import plots, runs
from vtv_nnsight.evaluation import Table
from vtv_nnsight.evaluation.searched_anew import BUDGET
from vtv_nnsight.report.reading import load_run
from vtv_nnsight.report.verdicts import specific_tasks, vector_pairs
from vtv_nnsight.runs import QUICK, Settings

WAYS = {"fixed": "transfer at fixed units", "anew": "units searched for each pair"}


def main() -> None:
    parser = options(__file__, __doc__, "two tasks, one seed, short searches")
    parser.add_argument("--model", default=Settings.model, help="as SOURCE of `vtv info`")
    parser.add_argument("--data", default=Settings.data, help="as for `vtv run`")
    parser.add_argument("--budget", type=int, default=BUDGET, help="evaluations of each search of the matrix")
    parser.add_argument("--seeds", type=int, default=5, help="as many, from --seed on")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="of the seeds' runs; by default in --out")
    args = parser.parse_args()
    given = dict(model=args.model, data=args.data, matrix=args.budget)
    if args.quick:
        args.seeds, given = 1, given | QUICK | dict(matrix=200, budget=200, prompts=8, candidates=8, test_prompts=8)
    folder, began = args.runs or args.out / "specificity", time.perf_counter()
    tables, specific = {way: [] for way in WAYS}, {}
    for seed in range(args.seed, args.seed + args.seeds):
        place = folder / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (place / "report.html").is_file():
            runs.run(place, Settings(**given, seed=seed), device=args.device, redo=True)
        results = load_run(place)
        for way, found in {"fixed": results.table, "anew": results.anew}.items():
            tables[way].append(Table(found.frame.assign(seed=seed)))
        specific[seed] = specific_tasks(vector_pairs(results.anew))
    pairs = {way: vector_pairs(Table.cat(found)) for way, found in tables.items()}
    print(f"\n{args.model}, {args.data}, {args.seeds} seeds, {given['matrix']} evaluations a search")
    for way, title in WAYS.items():
        wide = pairs[way].pivot(index="task", columns="vector", values="mean")
        wide = wide.loc[pairs[way].task.unique(), pairs[way].vector.unique()]
        print(f"\n{table([title, *wide.columns], [[task, *map(float, row)] for task, row in wide.iterrows()])}")
    counts = pd.DataFrame(specific).sum(axis=1)
    for task, count in counts.items():
        print(f"{task}: no other vector does as well in {count} of {args.seeds} seeds")
    rows = [row | {"units": way} for way, found in pairs.items() for row in found.to_dict("records")]
    facts = {"pairs": rows, "specific": specific, "seconds": time.perf_counter() - began}
    save(args, facts, plots.matrix({title: pairs[way] for way, title in WAYS.items()}))


if __name__ == "__main__":
    main()
