"""Evaluations a second: the search's objective against the released code's way of working.

    python benchmarks/search_throughput.py [--quick] [--device cuda] [--seed 0] [--json OUT]

Four sides take turns in every round:

- released: one image and one mask per forward, the tokenizer's codes of the canvas and the VQGAN's picture each time,
  float32, as the code of *Finding Visual Task Vectors* (ECCV 2024) works. It is written plainly here, with a hook a
  layer, on the same weights; it computes both losses at once, so one side serves for both.
- bare: the model's forward at the search's batch size and dtype, nothing patched and nothing scored.
- tokens, pixels: `search.Objective` with either loss, a mask a row.

The weights are made up: only sizes count here. Before the clock starts, the objective in float32 must give the released
side's losses, and in the dtype that is timed it must be near them. Ratios are medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from vtv_nnsight import MAEVQGAN, VisualPrompt, search, tasks
from vtv_nnsight.layouts import positions
from vtv_nnsight.model import MAEVQGANModel
from vtv_nnsight.patches import PatchSpace
from vtv_nnsight.pretraining import recipes
from vtv_nnsight.prompts import crop
from vtv_nnsight.vectors import TaskVectors

SIZES = {"embedded": "tiny", "vit-l": "published"}
"""Name → the size of `pretraining.recipes` whose shape it has; weights are made up."""
TASK = tasks.identity


class Released:
    """Patched evaluations one at a time."""

    def __init__(self, module: MAEVQGANModel, vector, space: PatchSpace) -> None:
        self.module, self.vector, self.space = module, vector, space

    @torch.no_grad()
    def __call__(self, choices: torch.Tensor, prompt: VisualPrompt) -> tuple[float, float]:
        """Token loss and pixel loss of one set [unit] on one prompt."""
        module, layout, mask = self.module, prompt.layout, self.space.mask(choices)
        output = layout.regions["output"]
        codes = module.vqgan.encode(prompt.canvas)[:, output]
        hooks = []
        for name, seen in (("encoder", prompt.visible), ("decoder", prompt.decoded)):
            at = positions(seen)
            for layer, block in enumerate(getattr(module, name).blocks):
                own = getattr(mask, name)[layer, at.cpu()].to(prompt.device)
                new = getattr(self.vector.mean, name)[layer, at]
                hooks.append(block.attn.proj.register_forward_pre_hook(patching(block.attn, own, new)))
        logits = module(prompt.canvas, prompt.visible, prompt.decoded).logits
        for hook in hooks:
            hook.remove()
        drawn = module.paint(logits.argmax(-1), prompt.canvas, prompt.visible, prompt.decoded)
        pixels = TASK.loss(crop(drawn, "output", layout), crop(prompt.canvas, "output", layout))
        at = layout.index(prompt.decoded, output.to(prompt.device)) - 1
        return F.cross_entropy(logits[0, at], codes[0]).item(), pixels.item()


def patching(attention, mask: torch.Tensor, new: torch.Tensor) -> Callable:
    """A hook that puts `new` [token, head, head_dim] where `mask` [token, head] says."""

    def hook(_, args):
        z = args[0].unflatten(-1, (attention.num_heads, attention.head_dim))
        return (torch.where(mask[..., None], new, z).flatten(-2),)

    return hook


def timed(run: Callable, device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(size: str, args: argparse.Namespace, seconds: float) -> dict:
    torch.manual_seed(args.seed)
    config, dtype = recipes.get(SIZES[size]).config, getattr(torch, args.dtype)
    module = MAEVQGANModel(config).eval().to(args.device)
    pictures = torch.rand(16, 3, config.image_size, config.image_size)
    one_shot = VisualPrompt.from_canvas(pictures, config.layout).to(args.device)
    single, prompts = MAEVQGAN(module), one_shot.query_only()
    vector = TaskVectors.collect(single, {TASK.name: one_shot}, batch_size=4, progress=False)[TASK.name]
    space = PatchSpace(single)
    choices = torch.rand(args.batch, len(space)) < torch.tensor(-1.0).sigmoid()
    released = Released(module, vector.to(args.device), space)

    def objectives(model: MAEVQGAN) -> dict[str, search.Objective]:
        options = dict(batch_size=args.batch, seed=args.seed)
        return {
            loss: search.Objective(model, vector, TASK, prompts, space, loss=loss, **options) for loss in search.LOSSES
        }

    exact = objectives(single)
    rows = exact["tokens"].train[torch.arange(args.batch) % len(exact["tokens"].train)]
    few = slice(0, args.checked)
    expected = [released(own, exact["tokens"].prompts[int(row)]) for own, row in zip(choices[few], rows[few])]
    expected = dict(zip(search.LOSSES, torch.tensor(expected, dtype=torch.float64).T))
    for loss, objective in exact.items():
        torch.testing.assert_close(objective(choices[few], rows[few]), expected[loss], rtol=1e-4, atol=1e-4)
    fast = MAEVQGAN(module, dtype=dtype) if dtype != torch.float32 else single
    timed_objectives = objectives(fast)
    error = (timed_objectives["tokens"](choices[few], rows[few]) - expected["tokens"]).abs().max().item()
    assert error < 0.1, f"the token loss in {args.dtype} is {error} off"
    del exact

    batch = timed_objectives["tokens"].prompts[rows.to(args.device)]
    own = fast._module

    @torch.no_grad()
    def bare() -> None:
        own(batch.canvas, batch.visible, batch.decoded)

    prompt = timed_objectives["tokens"].prompts[int(rows[0])]
    sides = {
        "released": (lambda: released(choices[0], prompt), 1),
        "bare": (bare, args.batch),
        **{loss: (lambda objective=o: objective(choices, rows), args.batch) for loss, o in timed_objectives.items()},
    }
    for run, _ in sides.values():
        run()
    names, rounds, start = list(sides), {name: [] for name in sides}, time.perf_counter()
    while len(rounds["bare"]) < args.rounds or time.perf_counter() - start < seconds:
        shift = len(rounds["bare"]) % len(names)
        for name in names[shift:] + names[:shift]:
            run, count = sides[name]
            rounds[name].append(count / timed(run, args.device))
    ratios = {
        f"{side} over {to}": statistics.median(a / b for a, b in zip(rounds[side], rounds[to]))
        for side, to in (("tokens", "released"), ("pixels", "released"), ("tokens", "bare"))
    }
    rates = {name: statistics.median(values) for name, values in rounds.items()}
    return {"size": size, "batch": args.batch, "rounds": len(rounds["bare"]), "rates": rates, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the embedded size only, a few seconds")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch", type=int, help="rows a trace (default: 16 on a CPU, 256 elsewhere)")
    parser.add_argument("--checked", type=int, default=4, help="evaluations that are compared before timing")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, at least")
    parser.add_argument("--seconds", type=float, default=120, help="time to spend on a size, at least")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of the search and of the bare forward")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number there")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.seconds = ["embedded"], min(args.seconds, 5)
    args.batch = args.batch or (16 if args.device == "cpu" else 256)

    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu"
    machine = {"where": where, "dtype": args.dtype, "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(", ".join(f"{name} {value}" for name, value in machine.items()), "- evaluations a second, medians")
    results = []
    for size in args.sizes:
        result = measure(size, args, args.seconds)
        print(f"{size}, {result['batch']} rows a batch, {result['rounds']} rounds:")
        for name, rate in result["rates"].items():
            print(f"  {name:<24}{rate:12.2f}")
        for name, ratio in result["ratios"].items():
            print(f"  {name:<24}{ratio:12.3f}x", flush=True)
        results.append(result)
    if args.json:
        args.json.write_text(json.dumps(machine | {"sizes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
