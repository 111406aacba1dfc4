"""What the benchmarks share: their options, the clock, intervals, tables, and the files that they leave."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from scipy.stats import t as student
from tabulate import tabulate

from vtv_nnsight import MAEVQGAN, VisualPrompt
from vtv_nnsight.files import write_picture, write_text
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.training import recipes

SIZES = {
    "embedded": lambda: MAEVQGAN("tiny").config,
    "small": lambda: recipes.get("small").config,
    "vit-l": lambda: recipes.get("published").config,
}
"""Name → what makes the configuration of that size: the model in the package, and two of `training.recipes`."""


def label_decades(axis: Axis) -> None:
    """Labels of a logarithmic axis at 1, 2 and 5 of every decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def options(file: str, doc: str, quick: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; `quick` tells what `--quick` leaves of it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(name=Path(file).stem)
    parser.add_argument("--quick", action="store_true", help=f"{quick}: under a minute")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("bench"), metavar="FOLDER", help="for NAME.json and NAME.png")
    return parser


def file_name(*parts: Any) -> str:
    """Words with hyphens between them, of letters, digits, dots and underscores."""
    return re.sub(r"[^\w.]+", "-", "-".join(map(str, parts)))


def journal(folder: Path | None, *parts: Any) -> Path | None:
    """Where a search of that name keeps what it learns (`resume=`), if anywhere."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{file_name(*parts)}.jsonl"


def machine(device: str) -> dict[str, Any]:
    """Where the numbers come from."""
    libraries = {name: version(name) for name in ("torch", "nnsight", "transformers")}
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(device), **libraries}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device": _processor(), "cores": cores, "threads": torch.get_num_threads(), **libraries}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def made_up(size: str, rows: int, seed: int, device: str) -> tuple[MAEVQGANModel, VisualPrompt]:
    """A model of one of `SIZES` and one-shot prompts, of chance weights and pixels: where only sizes count."""
    generator = torch.Generator().manual_seed(seed)
    config = SIZES[size]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = MAEVQGANModel(config).eval()
    pixels = torch.rand(rows, 3, config.image_size, config.image_size, generator=generator)
    return module.to(device), VisualPrompt.from_canvas(pixels, config.layout).to(device)


def seconds(run: Callable[[], Any], device: str) -> float:
    """How long a call takes, the work that it leaves on a GPU included."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def alternate(sides: Mapping[str, Callable[[], Any]], device: str, spend: float, least: int = 5) -> dict[str, list]:
    """Seconds of every side in every round. The sides take turns in an order that rotates; rounds go on until `spend`
    seconds have passed, and there are at least `least`."""
    names, rounds, start = list(sides), {name: [] for name in sides}, time.perf_counter()
    while len(rounds[names[0]]) < least or time.perf_counter() - start < spend:
        shift = len(rounds[names[0]]) % len(names)
        for name in names[shift:] + names[:shift]:
            rounds[name].append(seconds(sides[name], device))
    return rounds


def ratio(rounds: Mapping[str, Sequence[float]], side: str, to: str) -> float:
    """The median over rounds of one side's time over the other's: a slow spell of the machine hits both."""
    return statistics.median(a / b for a, b in zip(rounds[side], rounds[to]))


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval (Student's t); NaN for a single value."""
    values = np.asarray(list(values), dtype=float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    quantile = student.ppf(0.975, len(values) - 1)
    return float(values.mean()), float(quantile * values.std(ddof=1) / math.sqrt(len(values)))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown that is aligned to be read as it is; floats to four digits."""
    body = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return tabulate(body, head, tablefmt="github", disable_numparse=True)


def save(args: argparse.Namespace, results: Mapping[str, Any], figure: Figure) -> None:
    """Write NAME.json, with the machine and the options (of paths the name alone), and NAME.png."""
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: v.name if isinstance(v, Path) else v for name, v in vars(args).items() if name != "out"}
    content = {"machine": machine(args.device), "settings": settings, **results}
    write_text(args.out / f"{args.name}.json", json.dumps(content, indent=1) + "\n")
    write_picture(args.out / f"{args.name}.png", figure.savefig, dpi=120)
    print(f"wrote {args.out / args.name}.json and .png")
