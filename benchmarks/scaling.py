"""What the search's objective costs by units, prompts and masks, and what more processes bring.

    python benchmarks/scaling.py [--quick] [--model tiny] [--processes 1 2] [--rounds 5]

Batches are as large as the objective chooses.

- units: seconds an evaluation (one set on one prompt) and a step of the default `search.reinforce` (16 evaluations and
  the search's own work), with units by head, quadrant and token. All units patched are the same patch in all three
  spaces, and so must their losses be.
- prompts: seconds an evaluation and seconds to set the objective up, on 1 to 256 distinct prompts. The losses on the
  first prompt must not depend on the others.
- masks: seconds an evaluation where 1 to 1024 are asked for in one call. Their losses must be those of a single call.
- processes: evaluations a second under `accelerate launch`, in calls that have work for all processes and in calls of
  a search step's 16 evaluations. On a CPU, each process gets an equal share of the cores as threads, and one process
  is measured with one thread and with all (`--quick` leaves the latter out); elsewhere there is one process a GPU.
  Launches take turns.

The objective promises the same batches whatever the number of processes. So losses must be equal within 1e-5 between
launches: threads split the sums inside a matrix product differently. Calls of other sizes run in batches of other
sizes, for which the kernels differ too: 1e-4.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from common import alternate, machine, options, ratio, save, table
from matplotlib.figure import Figure

from vtv_nnsight import MAEVQGAN, PatchSpace, TaskVectors, data, search, tasks
from vtv_nnsight.models.interface import QUERY_ONLY
from vtv_nnsight.progress import progress_bar

TASK = tasks.segmentation
STEP = 16
"""Evaluations of a step of the default `search.reinforce`: 4 prompts, 4 masks of each."""
COLUMNS = {
    "units": ["granularity", "units", "seconds_per_evaluation", "seconds_per_search_step"],
    "prompts": ["prompts", "seconds_per_evaluation", "seconds_to_set_up"],
    "masks": ["masks_in_a_call", "seconds_per_evaluation", "seconds_per_call"],
    "processes": ["processes", "threads_each", "evaluations_per_second", "evaluations_per_second_in_steps"]
    + ["times_as_fast", "times_as_fast_in_steps", "largest_difference_of_a_loss"],
}


def maker(args: Namespace, device: str, most: int) -> Callable[..., search.Objective]:
    """A function of granularity and number of prompts, `most` at most, that sets an objective up."""
    model = MAEVQGAN(args.model).to(device)
    prompts = TASK.prompts(data.scenes("train", n=100, seed=0), 1 + most, args.seed, model.layout)
    vector = TaskVectors.collect(model, {TASK.name: prompts[:16]}, progress=False)[TASK.name]
    judge, rest = prompts[:1].query_only(), prompts[1:].query_only()

    def make(granularity: str = "quadrant", count: int = most) -> search.Objective:
        space = PatchSpace(model, granularity=granularity)
        return search.Objective(model, vector, TASK, rest[:count], space, held_out=judge, seed=args.seed)

    return make


def draw(objective: search.Objective, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sets as a search begins with, on the training prompts in turn."""
    share = torch.rand(count, len(objective.space), generator=torch.Generator().manual_seed(seed))
    return share < torch.tensor(-1.0).sigmoid(), objective.train[torch.arange(count) % len(objective.train)]


def same(what: str, losses: Mapping[Any, torch.Tensor], tolerance: float) -> dict[Any, float]:
    """The largest difference of each side's losses to the first one's; stops where it is above the tolerance."""
    first = next(iter(losses))
    gaps = {side: (values - losses[first]).abs().max().item() for side, values in losses.items()}
    for side, gap in gaps.items():
        if not gap <= tolerance:
            raise SystemExit(f"{what}: the losses of {side} are up to {gap:.2g} off those of {first}.")
    return gaps


def medians(title: str, sides: Mapping[Any, Callable[[], Any]], args: Namespace) -> dict[Any, float]:
    """Seconds of each side, taking turns."""
    with progress_bar(total=args.rounds * len(sides), desc=title, unit="call") as bar:

        def counted(run: Callable[[], Any]) -> Callable[[], None]:
            return lambda: (run(), bar.update())

        rounds = alternate({side: counted(run) for side, run in sides.items()}, args.device, 0, args.rounds)
    return {side: statistics.median(values) for side, values in rounds.items()}


def by_units(make: Callable[..., search.Objective], args: Namespace) -> list[dict[str, Any]]:
    objectives = {name: make(name) for name in QUERY_ONLY}
    few = 16
    for of in (torch.zeros, torch.ones):
        losses = {g: o(of(few, len(o.space), dtype=torch.bool), o.train[:few]) for g, o in objectives.items()}
        same("nothing or everything patched, by granularity", losses, 1e-5)

    def steps(objective: search.Objective) -> search.SearchResult:
        whole = dict(budget=args.steps * STEP, prune=False, progress=False)
        return search.reinforce.on(objective, seed=args.seed, **whole)

    sides, counts = {}, {}
    for g, o in objectives.items():
        pairs, result = draw(o, args.evaluations, args.seed), steps(o)
        counts[g] = (result.evaluations - len(result.history)) // STEP  # one held-out prompt for each of the history
        sides |= {(g, "call"): lambda o=o, pairs=pairs: o(*pairs), (g, "search"): lambda o=o: steps(o)}
    seconds = medians("units", sides, args)
    values = [
        (g, len(o.space), seconds[g, "call"] / args.evaluations, seconds[g, "search"] / counts[g])
        for g, o in objectives.items()
    ]
    return [dict(zip(COLUMNS["units"], row)) for row in values]


def by_prompts(make: Callable[..., search.Objective], args: Namespace) -> list[dict[str, Any]]:
    objectives = {count: make(count=count) for count in args.prompts}
    pairs = {count: draw(o, args.evaluations, args.seed) for count, o in objectives.items()}
    few = 16
    first = {n: o(pairs[n][0][:few], o.train[:1].expand(few)) for n, o in objectives.items()}
    same("the first prompt, by the number of prompts", first, 1e-5)
    calls = {(n, "call"): lambda n=n: objectives[n](*pairs[n]) for n in args.prompts}
    medians_of = medians("prompts", calls | {(n, "set up"): lambda n=n: make(count=n) for n in args.prompts}, args)
    values = [(n, medians_of[n, "call"] / args.evaluations, medians_of[n, "set up"]) for n in args.prompts]
    return [dict(zip(COLUMNS["prompts"], row)) for row in values]


def by_masks(make: Callable[..., search.Objective], args: Namespace) -> list[dict[str, Any]]:
    objective = make()
    choices, rows = draw(objective, max(args.masks), args.seed)
    whole = objective(choices, rows)
    for n in args.masks:
        same("masks", {"one call": whole[:n], f"a call of {n}": objective(choices[:n], rows[:n])}, 1e-4)
    medians_of = medians("masks", {n: lambda n=n: objective(choices[:n], rows[:n]) for n in args.masks}, args)
    return [dict(zip(COLUMNS["masks"], (n, seconds / n, seconds))) for n, seconds in medians_of.items()]


def by_processes(args: Namespace) -> list[dict[str, Any]]:
    cores, cpu = machine("cpu")["cores"], args.device == "cpu"
    alone = [(1, 1)] * cpu + [(1, cores)] * (not (cpu and args.quick))
    sides = list(dict.fromkeys(alone + [(n, max(1, cores // n)) for n in args.processes if n > 1]))
    launches = {side: [] for side in sides}
    medians("launches", {s: lambda s=s: launches[s].append(launch(args, *s)) for s in sides}, args)
    every = {(s, i): torch.tensor(one["losses"]) for s, several in launches.items() for i, one in enumerate(several)}
    gaps = same("processes", every, 1e-5)
    seconds = {
        call: {s: [statistics.median(one["seconds"][call]) for one in several] for s, several in launches.items()}
        for call in ("large", "step")
    }
    sizes = {"large": len(next(iter(every.values()))), "step": STEP}
    rows = []
    for side in sides:
        rates = [size / statistics.median(seconds[call][side]) for call, size in sizes.items()]
        gains = [ratio(seconds[call], sides[0], side) for call in sizes]
        gap = max(gap for (s, _), gap in gaps.items() if s == side)
        rows.append(dict(zip(COLUMNS["processes"], (*side, *rates, *gains, gap))))
    return rows


def launch(args: Namespace, processes: int, threads: int) -> dict[str, Any]:
    """What `work` writes, run in several processes. (`--cpu` starts one whatever is asked for, unless there is MPI;
    `--multi_gpu` starts as many, which may then use the CPU.)"""
    where = ["--multi_gpu"] if processes > 1 else ["--cpu"] if args.device == "cpu" else []
    options = ["--num_processes", processes, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    with tempfile.TemporaryDirectory() as folder:
        settings = {name: value for name, value in vars(args).items() if name not in ("out", "name")}
        task = Path(folder) / "task.json"
        task.write_text(json.dumps(settings | {"threads": threads}))
        command = [sys.executable, "-m", "accelerate.commands.launch", *where, *options]
        command += ["--main_process_port", 0, "--num_cpu_threads_per_process", threads, __file__, "--worker", task]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{processes} processes with {threads} threads each failed:\n{done.stderr[-2000:]}")
        report = json.loads((Path(folder) / "found.json").read_text())
    if (report["processes"], report["threads"]) != (processes, threads):
        came = f"{report['processes']} with {report['threads']}"
        raise SystemExit(f"{processes} processes with {threads} threads each were asked for, and {came} came.")
    return report


def work(task: Path) -> None:
    """Each process of a launch: the losses, and the seconds of calls."""
    args = Namespace(**json.loads(task.read_text()))
    state = PartialState(cpu=args.device == "cpu")
    torch.set_num_threads(args.threads)
    objective = maker(args, str(state.device), min(64, max(args.prompts)))()
    choices, rows = draw(objective, args.batches * objective.batch_size * max(args.processes), args.seed)
    losses = objective(choices, rows)
    calls = {"large": lambda: objective(choices, rows), "step": lambda: objective(choices[:STEP], rows[:STEP])}
    seconds = alternate(calls, str(state.device), 0, args.calls)
    if state.is_main_process:
        report = {"processes": state.num_processes, "threads": torch.get_num_threads()}
        report |= {"losses": losses.tolist(), "seconds": seconds}
        (task.parent / "found.json").write_text(json.dumps(report))
    state.destroy_process_group()


def figure(parts: Mapping[str, Sequence[dict[str, Any]]]) -> Figure:
    drawn = Figure(figsize=(13, 3.4), layout="constrained")
    units, prompts, masks, processes = drawn.subplots(1, 4)
    curve(units, parts["units"], "units", "seconds_per_evaluation", "an evaluation")
    curve(units, parts["units"], "units", "seconds_per_search_step", f"a search step ({STEP} evaluations)")
    curve(prompts, parts["prompts"], "prompts", "seconds_per_evaluation", "an evaluation")
    curve(prompts, parts["prompts"], "prompts", "seconds_to_set_up", "setting up")
    curve(masks, parts["masks"], "masks_in_a_call", "seconds_per_evaluation", "an evaluation")
    curve(masks, parts["masks"], "masks_in_a_call", "seconds_per_call", "a call")
    for row in parts["units"]:
        at, below = (row["units"], row["seconds_per_evaluation"]), dict(xytext=(0, -8), textcoords="offset points")
        units.annotate(row["granularity"], at, **below, rotation=-45, va="top", fontsize=8)
    for shift, key, label in ((-0.2, "", "calls with work for all"), (0.2, "_in_steps", f"calls of {STEP}")):
        rates = [row["evaluations_per_second" + key] for row in parts["processes"]]
        places = [place + shift for place in range(len(rates))]
        processes.bar(places, rates, 0.4, label=label)
    names = [f"{row['processes']} × {row['threads_each']}" for row in parts["processes"]]
    processes.set_xticks(range(len(names)), labels=names)
    processes.set_xlabel("processes × threads each")
    processes.set_ylabel("evaluations a second")
    processes.margins(y=0.3)
    for panel, title in zip(drawn.axes, parts):
        panel.set_title(title, fontsize=10)
        panel.legend(fontsize=8)
    return drawn


def curve(panel: Any, rows: Sequence[dict[str, Any]], x: str, y: str, label: str) -> None:
    panel.loglog([row[x] for row in rows], [row[y] for row in rows], "o-", markersize=4, label=label)
    panel.set_xlabel(x.replace("_", " "))
    panel.set_ylabel("seconds")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.margins(x=0.15, y=0.35)


def main() -> None:
    parser = options(__file__, __doc__, "few prompts and masks, one round")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--processes", nargs="+", type=int, default=None, help="beside one (default: 2, 4 … that fit)")
    parser.add_argument("--rounds", type=int, default=5, help="in which the sides take turns")
    parser.add_argument("--worker", type=Path, help=SUPPRESS)
    parser.set_defaults(evaluations=64, steps=24, calls=10, batches=4)
    parser.set_defaults(prompts=[1, 4, 16, 64, 256], masks=[2**i for i in range(11)])
    args = parser.parse_args()
    if args.worker:
        return work(args.worker)
    if args.quick:
        args.rounds, args.evaluations, args.steps, args.calls, args.batches = 1, 16, 3, 2, 1
        args.prompts, args.masks = [1, 4, 16], [1, 4, 16, 64]
    fit, what = (machine("cpu")["cores"], "cores") if args.device == "cpu" else (torch.cuda.device_count(), "GPUs")
    args.processes = args.processes or [n for n in (1, 2, 4, 8) if n <= fit]
    if args.rounds < 1 or not 1 <= min(args.processes) <= max(args.processes) <= fit:
        parser.error(f"--rounds and --processes count from 1, and there are {fit} {what} for processes.")

    parts = {"processes": by_processes(args)}
    make = maker(args, args.device, max(args.prompts))
    parts = {"units": by_units(make, args), "prompts": by_prompts(make, args), "masks": by_masks(make, args)} | parts
    for title, rows in parts.items():
        print(f"\n{title}\n" + table([name.replace("_", " ") for name in COLUMNS[title]], [r.values() for r in rows]))
    save(args, parts, figure(parts))


if __name__ == "__main__":
    main()
