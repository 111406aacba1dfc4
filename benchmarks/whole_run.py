"""How long `vtv run` takes: seconds, memory and scores of several installed versions, which take turns.

    python benchmarks/whole_run.py --sides new=/path/to/python old=/path/to/other/python [--runs default quick busy]
        [--rounds 1] [--seeds 0] [--budget 8000]

Each side is a Python that has a version of this package. "default" is `vtv run`, "quick" is `vtv run --quick`, "busy"
the same while a loop keeps each core busy, "equal" is `vtv run --budget`, with the same budget for all sides. Memory is
the sum over all processes, each page counted once where the system tells (proportional set size). Scores are those of
the task vector, means over test prompts.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from common import options, save, table
from matplotlib.figure import Figure

LOOP = "while True: pass"


def watched(command: list[str], environment: dict[str, str], place: str) -> dict[str, float]:
    """Run a command in a folder without the package: its seconds, those of all its processors, peak memory in MiB."""
    before, start, peak = os.times(), time.perf_counter(), 0
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = psutil.Popen(command, env=environment, cwd=place, **silent)
    while process.poll() is None:
        with suppress(psutil.Error):
            peak = max(peak, sum(memory(one) for one in (process, *process.children(recursive=True))))
        time.sleep(0.25)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}; run it by itself to see why.")
    wall, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": wall, "processor seconds": used, "MiB": peak / 2**20}


def memory(process: psutil.Process) -> int:
    info = process.memory_full_info()
    return getattr(info, "pss", info.rss)


def scores(folder: Path) -> dict[str, float]:
    """Task → mean score of the task vector on the test prompts; and its mean token loss."""
    frames = [pd.read_parquet(path) for path in sorted((folder / "evaluation").glob("*.parquet"))]
    rows = pd.concat(frames).query("condition == 'task vector'").groupby("task")
    return rows.score.mean().to_dict() | {f"{task}, loss": value for task, value in rows.loss.mean().items()}


def run_once(python: str, kind: str, seed: int, budget: int) -> dict[str, Any]:
    """One run of one side, in a new folder. User settings of threads are left out."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "VTV_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    loops = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(os.cpu_count() or 1) if kind == "busy"]
    try:
        with tempfile.TemporaryDirectory() as place:
            command = [python, "-m", "vtv_nnsight", "run", "--out", f"{place}/run", "--seed", str(seed)]
            command += ["--quick"] if kind in ("quick", "busy") else ["--budget", str(budget)] * (kind == "equal")
            return watched(command, environment, place) | {"scores": scores(Path(place) / "run")}
    finally:
        for loop in loops:
            loop.kill()


def main() -> None:
    parser = options(__file__, __doc__, "one quick run")
    parser.add_argument("--sides", nargs="+", default=[f"this={sys.executable}"], metavar="NAME=PYTHON")
    parser.add_argument(
        "--runs", nargs="+", default=["default", "quick"], choices=["default", "equal", "quick", "busy"]
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budget", type=int, default=8000, help='of searches, for "equal"')
    args = parser.parse_args()
    sides = dict(side.split("=", 1) for side in args.sides)
    kinds, cases = ["quick"] if args.quick else args.runs, []
    for kind in kinds:
        for number in range(args.rounds * len(args.seeds)):
            for name in list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]:
                seed = args.seeds[number % len(args.seeds)]
                case = {"run": kind, "side": name, "seed": seed} | run_once(sides[name], kind, seed, args.budget)
                print(case, flush=True)
                cases.append(case)
    head, rows = ["run", "side", "runs", "seconds", "to the last side", "processor seconds", "MiB"], []
    for kind in kinds:
        of = {name: [case for case in cases if (case["run"], case["side"]) == (kind, name)] for name in sides}
        for name, own in of.items():
            ratios = [a["seconds"] / b["seconds"] for a, b in zip(own, of[list(sides)[-1]])]
            middle = [statistics.median(case[what] for case in own) for what in ("seconds", "processor seconds")]
            most = max(case["MiB"] for case in own)
            rows.append([kind, name, len(own), middle[0], statistics.median(ratios), middle[1], most])
    print("\n" + table(head, rows))
    figure = Figure(figsize=(6, 0.5 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds")
    axes.barh([f"{row[0]}, {row[1]}" for row in rows], [row[3] for row in rows])
    save(args, {"cases": cases}, figure)


if __name__ == "__main__":
    main()
