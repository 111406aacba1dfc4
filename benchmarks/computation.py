"""What it saves to leave the example out: FLOPs and seconds of a zero-shot answer over a one-shot one.

    python benchmarks/computation.py [--quick] [--sizes embedded vit-l] [--batch 4]

*Finding Visual Task Vectors* (ECCV 2024) gives 22.5 % as the saving of a patched zero-shot answer. Counted here on
weights of chance: the transformer with the tokens that each way shows it, then with the VQGAN, which draws the same
number of patches either way. Patching a head costs no FLOPs (it copies); the seconds are with all heads patched.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from common import SIZES, alternate, made_up, options, ratio, save, table
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, TaskVectors, VisualPrompt, patch
from vtv_nnsight.progress import progress_bar


@torch.no_grad()
def transformer(model: MAEVQGAN, prompts: VisualPrompt) -> None:
    model._module(prompts.canvas, prompts.visible, prompts.decoded)


@torch.no_grad()
def answer(model: MAEVQGAN, prompts: VisualPrompt) -> None:
    model.generate(prompts)


@torch.no_grad()
def patched(model: MAEVQGAN, prompts: VisualPrompt, vector, units: PatchSet) -> None:
    with model.generate(prompts):
        patch(model, vector, units)


def flops(run) -> int:
    """Floating-point operations of the matrix products and convolutions of a call, a multiply-add as two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def draw(cases: list[dict]) -> Figure:
    figure = Figure(figsize=(2 + 2.2 * len(cases), 3.5), layout="constrained")
    axes = figure.add_subplot(ylabel="zero-shot in place of one-shot saves (%)", ylim=(0, 100))
    bars = ("FLOPs of the transformer", "FLOPs", "seconds")
    for i, name in enumerate(bars):
        bars = axes.bar([j + 0.27 * (i - 1) for j in range(len(cases))], [c["saved"][name] for c in cases], 0.25)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
        bars.set_label(name)
    axes.axhline(22.5, color="black", linewidth=0.8, linestyle=":", label="ECCV 2024: 22.5 %")
    axes.set_xticks(range(len(cases)), [case["size"] for case in cases])
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = options(__file__, __doc__, "the embedded size only, 3 rounds")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["embedded", "vit-l"])
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="rounds, at least")
    parser.add_argument("--seconds", type=float, default=10, help="time to spend on a size, at least")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.rounds, args.seconds = ["embedded"], 3, 0
    cases = []
    for size in progress_bar(args.sizes, unit="size"):
        module, prompts = made_up(size, args.batch, args.seed, args.device)
        model = MAEVQGAN(module.to(getattr(torch, args.dtype)))
        prompts = prompts.to(dtype=module.dtype)
        vector = TaskVectors.collect(model, {"task": prompts}, batch_size=args.batch, progress=False)["task"]
        space = PatchSpace(model)
        everything = PatchSet(space, torch.ones(len(space), dtype=torch.bool))
        ways = {"one-shot": prompts, "zero-shot": prompts.query_only()}
        sides = {name: partial(answer, model, form) for name, form in ways.items()}
        sides["zero-shot, patched"] = partial(patched, model, ways["zero-shot"], vector, everything)
        counted = {name: flops(partial(transformer, model, form)) for name, form in ways.items()}
        whole = {name: flops(sides[name]) for name in ways}
        rounds = alternate(sides, args.device, args.seconds, args.rounds)
        saved = {
            "FLOPs of the transformer": 100 * (1 - counted["zero-shot"] / counted["one-shot"]),
            "FLOPs": 100 * (1 - whole["zero-shot"] / whole["one-shot"]),
            "seconds": 100 * (1 - ratio(rounds, "zero-shot, patched", "one-shot")),
        }
        case = {"size": size, "dtype": args.dtype, "batch": args.batch, "saved": saved}
        case["GFLOPs of the transformer a canvas"] = {n: f / 1e9 / args.batch for n, f in counted.items()}
        case["GFLOPs a canvas"] = {name: value / 1e9 / args.batch for name, value in whole.items()}
        case["seconds a canvas"] = {name: statistics.median(times) / args.batch for name, times in rounds.items()}
        cases.append(case)
    head = ["size", "what", "one-shot", "zero-shot", "saved (%)"]
    rows = []
    for case in cases:
        for name in ("FLOPs of the transformer", "FLOPs"):
            what = f"G{name} a canvas"
            rows.append([case["size"], what, *case[what].values(), case["saved"][name]])
        one, _, zero = case["seconds a canvas"].values()
        rows.append([case["size"], "seconds a canvas, patched", one, zero, case["saved"]["seconds"]])
    print(table(head, rows))
    save(args, {"cases": cases}, draw(cases))


if __name__ == "__main__":
    main()
