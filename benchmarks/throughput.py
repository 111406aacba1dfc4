"""Evaluations and collected prompts a second, and peak memory, against the released code's way of working.

    python benchmarks/throughput.py [--quick] [--sizes embedded vit-l] [--batches 1 16 256] [--dtypes bfloat16]

The sides of a case (a size, a dtype, a batch size) take turns in every round:

- released: one image and one mask per forward, the tokenizer's codes of the canvas and the VQGAN's picture each time,
  float32, as the code of *Finding Visual Task Vectors* (ECCV 2024) works. It is written plainly here, with a hook a
  layer, on the same weights; it computes both losses at once, so one side serves for both.
- bare: the model's forward at the case's dtype and batch size, nothing patched and nothing scored.
- tokens, pixels: `search.Objective` with either loss, a mask a row.
- released collection: one prompt per forward, float32, every head's share of the residual stream kept for the mean.
- collection: `TaskVectors.collect`.

The weights are made up: only sizes count here. Before the clock starts, objective and collection must give what the
released sides give. Ratios are medians of the rounds' own ratios. Peak memory is what a call takes on top of what was
there before it: of the process, sampled, or of the GPU's allocator. With a single size, its name is added to those of
the files.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch
from common import SIZES, alternate, made_up, options, ratio, save, table
from matplotlib.figure import Figure
from torch.nn import functional as F

from vtv_nnsight import MAEVQGAN, VisualPrompt, search, tasks
from vtv_nnsight.layouts import positions
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.models.painting import paint_canvas
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import crop
from vtv_nnsight.vectors import TaskVectors

TASK = tasks.identity
LOSSES = ("tokens", search.PIXELS)
STAGES = (("encoder", "visible"), ("decoder", "decoded"))
COMPARED = 4
"""Evaluations, and prompts, on which both ways of working must agree."""
GOALS = {"cpu": {"tokens": 15, "pixels": 3}, "cuda": {"tokens": 200, "pixels": 30}}
"""Times the released rate that is asked for, at the published size in bfloat16."""
OF_BARE = 0.9
"""Share of the bare forward's rate that is asked for, with either size."""


class Released:
    """Patched evaluations one at a time."""

    def __init__(self, module: MAEVQGANModel, vector: Any, space: PatchSpace) -> None:
        self.module, self.vector, self.space = module, vector, space

    @torch.no_grad()
    def __call__(self, choices: torch.Tensor, prompt: VisualPrompt) -> tuple[float, float]:
        """Token loss and pixel loss of one set [unit] on one prompt."""
        module, layout, mask = self.module, prompt.layout, self.space.mask(choices)
        output = layout.regions["output"]
        codes = module.vqgan.encode(prompt.canvas)[:, output]
        hooks = []
        for name, seen in STAGES:
            at = positions(getattr(prompt, seen))
            for layer, block in enumerate(getattr(module, name).blocks):
                inserted = mask[name][layer, at.cpu()].to(prompt.device)
                new = self.vector.mean[name][layer, at]
                hooks.append(block.attn.proj.register_forward_pre_hook(patching(block.attn, inserted, new)))
        logits = module(prompt.canvas, prompt.visible, prompt.decoded).logits
        for hook in hooks:
            hook.remove()
        drawn = paint_canvas(module.vqgan.decode, logits.argmax(-1), prompt, layout, paste=True)
        pixels = TASK.loss(crop(drawn, "output", layout), crop(prompt.canvas, "output", layout))
        at = layout.index(prompt.decoded, output.to(prompt.device)) - 1
        return F.cross_entropy(logits[0, at], codes[0]).item(), pixels.item()


def patching(attention, mask: torch.Tensor, new: torch.Tensor) -> Callable:
    """A hook that puts `new` [token, head, head_dim] where `mask` [token, head] says."""

    def hook(_, args):
        return (torch.where(mask[..., None], new, heads(attention, args[0])).flatten(-2),)

    return hook


def keeping(attention, seen: list) -> Callable:
    """A hook that adds the heads' shares to a list."""
    return lambda _, args: seen.append(shares(attention, heads(attention, args[0])))


def heads(attention, z: torch.Tensor) -> torch.Tensor:
    return z.unflatten(-1, (attention.num_heads, attention.head_dim))


def shares(attention, z: torch.Tensor) -> torch.Tensor:
    """What each head adds to the residual stream, the bias included each time: [..., head, width]."""
    weight = heads(attention, attention.proj.weight)
    return torch.einsum("...hd,whd->...hw", z, weight) + attention.proj.bias


@torch.no_grad()
def released_collection(module: MAEVQGANModel, prompts: VisualPrompt) -> dict[str, torch.Tensor]:
    """Stack → mean of every head's share [layer, token, head, width], one prompt at a time."""
    total = {name: torch.zeros(()) for name, _ in STAGES}
    for prompt in prompts.split(1):
        seen = {name: [] for name, _ in STAGES}
        hooks = [
            block.attn.proj.register_forward_pre_hook(keeping(block.attn, seen[name]))
            for name, _ in STAGES
            for block in getattr(module, name).blocks
        ]
        module(prompt.canvas, prompt.visible, prompt.decoded)
        for hook in hooks:
            hook.remove()
        for name, layers in seen.items():
            total[name] = total[name] + torch.cat(layers).cpu()
    return {name: value / len(prompts) for name, value in total.items()}


def same_collection(module: MAEVQGANModel, single: MAEVQGAN, prompts: VisualPrompt) -> None:
    """Both ways of collecting give the same means."""
    vector = TaskVectors.collect(single, {TASK.name: prompts}, batch_size=len(prompts), progress=False)[TASK.name]
    for (name, seen), theirs in zip(STAGES, released_collection(module, prompts).values()):
        mean = vector.mean[name][:, positions(getattr(prompts, seen)).cpu()].to(prompts.device)
        blocks = getattr(module, name).blocks
        ours = torch.stack([shares(block.attn, expected) for block, expected in zip(blocks, mean)]).cpu()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def peak(run: Callable, device: str) -> float:
    """MiB that a call takes at its highest, on top of what was there."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "malloc_trim"):  # glibc: give back what earlier calls left unused
        libc.malloc_trim(0)
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return (highest - before) / 2**20


def cases(size: str, args: argparse.Namespace) -> list[dict]:
    """Every dtype and batch size of one size, measured."""
    module, one_shot = made_up(size, 8, args.seed, args.device)
    single, prompts = MAEVQGAN(module), one_shot.query_only()
    vector = TaskVectors.collect(single, {TASK.name: one_shot}, batch_size=4, progress=False)[TASK.name]
    space = PatchSpace(single)
    released, alone = Released(module, vector.to(args.device), space), prompts[:1]
    chance = torch.Generator().manual_seed(args.seed)
    choices = torch.rand(max(COMPARED, *args.batches), len(space), generator=chance) < torch.tensor(-1.0).sigmoid()

    def objectives(model: MAEVQGAN, batch: int) -> dict[str, search.Objective]:
        shared = dict(batch_size=batch, seed=args.seed)
        return {loss: search.Objective(model, vector, TASK, prompts, space, loss=loss, **shared) for loss in LOSSES}

    exact = objectives(single, COMPARED)
    train = exact["tokens"].train
    rows = train[torch.arange(len(choices)) % len(train)]
    few = choices[:COMPARED], rows[:COMPARED]
    expected = [released(choice, exact["tokens"].prompts[int(row)]) for choice, row in zip(*few)]
    expected = dict(zip(LOSSES, torch.tensor(expected, dtype=torch.float64).T))
    for loss, objective in exact.items():
        torch.testing.assert_close(objective(*few), expected[loss], rtol=1e-4, atol=1e-4)
    same_collection(module, single, one_shot[:COMPARED])

    measured = []
    for dtype in args.dtypes:
        model = single if dtype == "float32" else MAEVQGAN(module, dtype=getattr(torch, dtype))
        error = (objectives(model, COMPARED)["tokens"](*few) - expected["tokens"]).abs().max().item()
        assert error < 0.1, f"the token loss in {dtype} is {error} off"
        for batch in args.batches:
            ours = objectives(model, batch)
            many = VisualPrompt.cat([one_shot] * -(-batch // len(one_shot)))[:batch]
            query, bare = ours["tokens"].prompts[rows[:batch].to(args.device)], model._module
            sides = {
                "released": lambda: released(choices[0], alone),
                "bare": torch.no_grad()(partial(bare, query.canvas, query.visible, query.decoded)),
                **{loss: partial(one, choices[:batch], rows[:batch]) for loss, one in ours.items()},
                "released collection": lambda: released_collection(module, one_shot[:1]),
                "collection": partial(TaskVectors.collect, model, {TASK.name: many}, batch_size=batch, progress=False),
            }
            memory = {name: peak(run, args.device) for name, run in sides.items()}
            rounds = alternate(sides, args.device, args.seconds, args.rounds)
            measured.append(
                {"size": size, "dtype": dtype, "batch": batch, **summary(rounds, batch), "peak MiB": memory}
            )
            print(f"{size}, {dtype}, batch {batch}: {measured[-1]['ratios']}", flush=True)
    return measured


def summary(rounds: dict[str, list], batch: int) -> dict:
    """Rates and their ratios, from seconds in rounds."""
    counts = {name: 1 if name.startswith("released") else batch for name in rounds}
    rates = {name: counts[name] / statistics.median(times) for name, times in rounds.items()}
    pairs = (("tokens", "released"), ("pixels", "released"), ("tokens", "bare"), ("collection", "released collection"))
    ratios = {f"{a} over {b}": counts[a] / counts[b] * ratio(rounds, b, a) for a, b in pairs}
    return {"rounds": len(rounds["bare"]), "a second": rates, "ratios": ratios}


def verdicts(cases: list[dict], device: str) -> list[dict]:
    """The goals and what was measured at the best batch size."""
    lines = []
    for size in dict.fromkeys(case["size"] for case in cases):
        of_size = [case for case in cases if case["size"] == size]
        best = {name: max(case["ratios"][name] for case in of_size) for name in of_size[0]["ratios"]}
        goals = {"tokens over bare": OF_BARE}
        if size == "vit-l":
            goals |= {f"{loss} over released": goal for loss, goal in GOALS[device.partition(":")[0]].items()}
        lines += [
            {"size": size, "ratio": name, "goal": goal, "measured": best[name], "met": best[name] >= goal}
            for name, goal in goals.items()
        ]
    return lines


def draw(measured: list[dict]) -> Figure:
    """Rates above, peak memory below, against the batch size; a column a size."""
    names = list(dict.fromkeys(case["size"] for case in measured))
    figure = Figure(figsize=(5 * len(names), 7), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False, sharex=True)
    sides = {"bare": "0.6", "tokens": "tab:blue", "pixels": "tab:orange", "collection": "tab:green"}
    for column, size in enumerate(names):
        of_size = [case for case in measured if case["size"] == size]
        for row, quantity in enumerate(("a second", "peak MiB")):
            panel = axes[row, column]
            for dtype in dict.fromkeys(case["dtype"] for case in of_size):
                part = [case for case in of_size if case["dtype"] == dtype]
                style = "-" if dtype == "bfloat16" else "--"
                for name, colour in sides.items():
                    values = [case[quantity][name] for case in part]
                    x = [case["batch"] for case in part]
                    panel.plot(x, values, style, color=colour, marker=".", label=f"{name}, {dtype}")
            for name, colour in (("released", "black"), ("released collection", "darkgreen")):
                panel.axhline(
                    statistics.median(case[quantity][name] for case in of_size), color=colour, lw=0.8, label=name
                )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_ylabel({"a second": "evaluations or prompts a second", "peak MiB": "peak memory (MiB)"}[quantity])
        axes[0, column].set_title(size)
        axes[1, column].set_xlabel("batch size")
    axes[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=4)  # dashes show
    return figure


def main() -> None:
    parser = options(__file__, __doc__, "the embedded size, float32, batches of 1 and 16, 3 rounds")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["embedded", "vit-l"])
    parser.add_argument("--batches", nargs="+", type=int, help="rows a trace (1 to 512; to 16 for vit-l on a CPU)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3, help="rounds a case, at least")
    parser.add_argument("--seconds", type=float, default=20, help="time to spend on a case, at least")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.batches, args.dtypes, args.rounds, args.seconds = ["embedded"], [1, 16], ["float32"], 3, 0
    elif len(args.sizes) == 1:
        args.name += f"_{args.sizes[0]}"
    measured, batches = [], args.batches
    for size in progress_bar(args.sizes, desc="sizes"):
        args.batches = batches or ([1, 4, 16] if (size, args.device) == ("vit-l", "cpu") else [1, 4, 16, 64, 256, 512])
        measured += cases(size, args)
    for quantity in ("a second", "ratios", "peak MiB"):
        names = list(measured[0][quantity])
        rows = [[case["size"], case["dtype"], case["batch"], *case[quantity].values()] for case in measured]
        print(f"\n{quantity}\n{table(['size', 'dtype', 'batch', *names], rows)}")
    goals = verdicts(measured, args.device)
    print(f"\ngoals\n{table(list(goals[0]), [list(line.values()) for line in goals])}")
    save(args, {"cases": measured, "goals": goals}, draw(measured))


if __name__ == "__main__":
    main()
