"""What a trace costs: the same reads and edits of every head, by nnsight and by hand-written forward hooks.

    python benchmarks/tracing_overhead.py [--quick] [--sizes embedded] [--dtype bfloat16]

Five sides take turns in every round, in an order that rotates: a bare forward, hooks that read every head, a trace that
does, hooks that zero a head of every layer in place, a trace that does. All share one set of weights; the bare forward
and the hooks run on a module that nnsight never touched. Hooks are registered and removed inside the timed call, as a
trace is. Ratios are medians of the rounds' own ratios, so that a slow spell of the machine hits both sides of one.
Before the clock starts, both sides must agree to the bit.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import torch
from common import SIZES, alternate, made_up, options, ratio, save, table
from matplotlib.figure import Figure

from vtv_nnsight import MAEVQGAN, VisualPrompt
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.progress import progress_bar

GOAL = 1.03
"""The most that a trace may take of the time of the same hooks."""
HEAD = 1
"""The head that the edits silence."""


def attentions(model) -> list:
    return [block.attn for stage in (model.encoder, model.decoder) for block in stage.blocks]


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


def draw(cases: list[dict]) -> Figure:
    """Trace over hooks, a pair of bars a case."""
    figure = Figure(figsize=(1.5 + 1.5 * len(cases), 3.5), layout="constrained")
    axes = figure.add_subplot(ylabel="time of a trace / time of hooks")
    for i, what in enumerate(("read", "edit")):
        places = [place + 0.4 * i for place in range(len(cases))]
        axes.bar(places, [case["trace over hooks"][what] for case in cases], 0.4, label=f"{what} every layer's heads")
    axes.axhline(GOAL, color="black", linestyle="--", linewidth=0.8, label=f"goal, {GOAL}")
    axes.set_xticks([i + 0.2 for i in range(len(cases))], [f"{case['size']}\nbatch {case['batch']}" for case in cases])
    axes.set_ylim(bottom=0.9)
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = options(__file__, __doc__, "the embedded size only, 2 seconds a case")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["embedded", "vit-l"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5, help="rounds a case, at least")
    parser.add_argument("--seconds", type=float, default=30, help="time to spend on a case, at least")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.seconds = ["embedded"], min(args.seconds, 2)
    cases = []
    for size in progress_bar(args.sizes, desc="sizes"):
        for batch in args.batches:
            module, prompt = made_up(size, batch, args.seed, args.device)
            with torch.no_grad():
                sides = make_sides(module.to(getattr(torch, args.dtype)), prompt)
                check(sides)
                rounds = alternate(sides, args.device, args.seconds, args.rounds)
            median = {name: 1e3 * statistics.median(times) for name, times in rounds.items()}
            ratios = {what: ratio(rounds, f"trace, {what}", f"hooks, {what}") for what in ("read", "edit")}
            case = {"size": size, "batch": batch, "rounds": len(rounds["bare"]), "milliseconds": median}
            cases.append(case | {"trace over hooks": ratios, "met": max(ratios.values()) <= GOAL})
    head = ["size", "batch", "rounds", *(f"{name} (ms)" for name in cases[0]["milliseconds"])]
    head += ["trace / hooks, read", "trace / hooks, edit", f"at most {GOAL}"]
    rows = [
        [case["size"], case["batch"], case["rounds"], *case["milliseconds"].values()]
        + [*case["trace over hooks"].values(), case["met"]]
        for case in cases
    ]
    print(table(head, rows))
    save(args, {"cases": cases}, draw(cases))


if __name__ == "__main__":
    main()
