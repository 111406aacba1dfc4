"""What a trace costs: the same reads and edits of every head, by nnsight and by hand-written forward hooks.

    python benchmarks/tracing_overhead.py [--quick] [--device cuda] [--dtype bfloat16] [--json OUT]

Five sides take turns in every round, in an order that rotates: a bare forward, hooks that read every head, a trace that
does, hooks that zero a head of every layer in place, a trace that does. All share one set of weights; the bare forward
and the hooks run on a module that nnsight never touched. Hooks are registered and removed inside the timed call, as a
trace is. Ratios are medians of the rounds' own ratios, so that a slow spell of the machine hits both sides of one.
Before the clock starts, both sides must agree to the bit.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vtv_nnsight import MAEVQGAN, VisualPrompt
from vtv_nnsight.model import MAEVQGANConfig, MAEVQGANModel

SIZES = {
    "small": dict(
        image_size=112,
        patch_size=8,
        hidden_size=192,
        num_hidden_layers=8,
        num_attention_heads=6,
        decoder_hidden_size=128,
        decoder_num_hidden_layers=4,
        decoder_num_attention_heads=4,
        vqgan_fold=2,
        vqgan_channels=32,
        vqgan_channel_multipliers=(1, 1, 1),
        vqgan_attention_levels=(),
    ),
    "vit-l": dict(vqgan_channels=32, vqgan_channel_multipliers=(1, 1, 1, 1, 1)),
}
HEAD = 1
"""The head that the edits silence."""


def attentions(model) -> list:
    return [block.attn for stack in (model.encoder, model.decoder) for block in stack.blocks]


def make_sides(module: MAEVQGANModel, prompt: VisualPrompt) -> dict[str, Callable]:
    """Each side's name → a function that runs it and returns the logits and the heads that it read."""
    plain = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    model = MAEVQGAN(module)
    inputs = (prompt.canvas, prompt.visible, prompt.decoded)

    def bare():
        return plain(*inputs).logits, []

    def hooked(hook: Callable, heads: list):
        handles = [a.proj.register_forward_pre_hook(hook(a, heads)) for a in attentions(plain)]
        try:
            return plain(*inputs).logits, heads
        finally:
            for handle in handles:
                handle.remove()

    def read(attention, heads: list):
        def hook(_, args):
            heads.append(args[0].unflatten(-1, (attention.num_heads, attention.head_dim)))

        return hook

    def edit(attention, heads: list):
        def hook(_, args):
            args[0].unflatten(-1, (attention.num_heads, attention.head_dim))[:, :, HEAD] = 0

        return hook

    def trace_read():
        with model.trace(prompt):
            heads = [attention.heads for attention in attentions(model)].save()
            logits = model.output.logits.save()
        return logits, heads

    def trace_edit():
        with model.trace(prompt):
            for attention in attentions(model):
                attention.heads[:, :, HEAD] = 0
            logits = model.output.logits.save()
        return logits, []

    return {
        "bare": bare,
        "hooks, read": lambda: hooked(read, []),
        "trace, read": trace_read,
        "hooks, edit": lambda: hooked(edit, []),
        "trace, edit": trace_edit,
    }


def check(sides: dict[str, Callable]) -> None:
    """Both ways of reading, and of editing, give the same values; an edit changes the logits and a read does not."""
    results = {name: run() for name, run in sides.items()}
    for what in ("read", "edit"):
        (logits, heads), (traced, traced_heads) = results[f"hooks, {what}"], results[f"trace, {what}"]
        assert torch.equal(logits, traced), f"{what}: trace and hooks disagree on the logits"
        assert len(heads) == len(traced_heads) and all(map(torch.equal, heads, traced_heads)), f"{what}: heads differ"
    assert torch.equal(results["bare"][0], results["trace, read"][0]), "a read changed the logits"
    assert not torch.equal(results["bare"][0], results["trace, edit"][0]), "an edit left the logits as they were"


def timed(run: Callable, device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(sides: dict[str, Callable], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of every side in every round; rounds go on until `seconds` have passed, and there are at least 5."""
    names, rounds, start = list(sides), {name: [] for name in sides}, time.perf_counter()
    while len(rounds["bare"]) < 5 or time.perf_counter() - start < seconds:
        shift = len(rounds["bare"]) % len(names)
        for name in names[shift:] + names[:shift]:
            rounds[name].append(timed(sides[name], device))
    return rounds


def ratio(rounds: dict[str, list[float]], side: str, to: str) -> float:
    return statistics.median(a / b for a, b in zip(rounds[side], rounds[to]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small size only, a few seconds a case")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--seconds", type=float, default=60, help="time to spend on a case, at least")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number there")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.seconds = ["small"], min(args.seconds, 5)

    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu"
    machine = {"where": where, "dtype": args.dtype, "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(", ".join(f"{name} {value}" for name, value in machine.items()), "- milliseconds, medians")
    columns = "size batch rounds bare hooks,read trace,read ratio hooks,edit trace,edit ratio"
    print(" ".join(f"{column:>10}" for column in columns.split()))
    results = []
    for size in args.sizes:
        torch.manual_seed(0)
        config = MAEVQGANConfig(**SIZES[size])
        module = MAEVQGANModel(config).eval().to(args.device, getattr(torch, args.dtype))
        for batch in args.batches:
            canvas = torch.rand(batch, 3, config.image_size, config.image_size)
            prompt = VisualPrompt.from_canvas(canvas, config.layout).to(args.device)
            with torch.no_grad():
                sides = make_sides(module, prompt)
                check(sides)
                rounds = measure(sides, args.device, args.seconds)
            median = {name: 1e3 * statistics.median(times) for name, times in rounds.items()}
            ratios = {what: ratio(rounds, f"trace, {what}", f"hooks, {what}") for what in ("read", "edit")}
            row = [size, batch, len(rounds["bare"]), f"{median['bare']:.2f}"]
            for what in ("read", "edit"):
                row += [f"{median[f'{side}, {what}']:.2f}" for side in ("hooks", "trace")] + [f"{ratios[what]:.3f}"]
            print(" ".join(f"{cell!s:>10}" for cell in row), flush=True)
            results.append({"size": size, "batch": batch, "median_ms": median, "trace_over_hooks": ratios})
    if args.json:
        args.json.write_text(json.dumps(machine | {"cases": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
