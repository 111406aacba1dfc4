"""How much training data a model needs, and of what kind: 1, 10 and 100 % of it, for equal steps (NeurIPS 2022).

    python benchmarks/data_size.py [--quick] [--size smoke] [--steps 400] [--kinds prompts figures pictures]

prompts   Canvases as the embedded model learned from, which hide what a prompt hides (`training.stream`).
figures   Parts of composed figures, hidden at random (`training.figures`): VP's figures of papers.
pictures  Parts of single photographs, hidden at random: VP's ImageNet.

All learn from a stream of canvases that never repeats; a share of the data is the stream's beginning, again and again,
so that 1 % shows every canvas a hundred times. One tokenizer, trained first on the whole stream of prompts, serves all.
Every model answers the same test prompts of scenes; intervals are 95 % over them (bootstrap). "Seen" and "unseen" are
the losses of canvases of the model's own kind that it learned from, and of the stream's next: where they differ, it
knows canvases by heart.

What is trained lies in OUT/data_size, and is gone on with where it stopped, or not trained again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from common import options, save, table
from matplotlib.figure import Figure

from vtv_nnsight import MAEVQGAN, Condition, Layout, VisualPrompt, data, evaluate, tasks
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.training import recipes
from vtv_nnsight.training.corpus import Corpus
from vtv_nnsight.training.figures import composed, cropped
from vtv_nnsight.training.mae import averaged_model, draw_mask, masked_loss, random_mask, train_mae
from vtv_nnsight.training.recipes import Recipe
from vtv_nnsight.training.stream import training_prompts
from vtv_nnsight.training.tokenizer import load_tokenizer, train_tokenizer

JUDGED = 8
"""Steps with canvases that a model is judged on."""
CONDITIONS = {"one-shot": Condition("one"), "zero-shot": Condition("zero")}


def prompts(step: int, n: int, layout: Layout, seed: int, corpus: Corpus) -> torch.Tensor:
    return training_prompts(step, n, layout, seed, corpus).canvas


def figures(step: int, n: int, layout: Layout, seed: int, corpus: Corpus) -> torch.Tensor:
    return composed(step, n, layout.canvas_size, seed, corpus)


def pictures(step: int, n: int, layout: Layout, seed: int, corpus: Corpus) -> torch.Tensor:
    return cropped(step, n, layout.canvas_size, seed, corpus)


KINDS: dict[str, tuple[Callable[..., torch.Tensor], Callable]] = {
    "prompts": (prompts, draw_mask),
    "figures": (figures, random_mask),
    "pictures": (pictures, random_mask),
}
"""Name → the canvases of a step of the stream, and what they hide."""


def trained(
    args: argparse.Namespace, recipe: Recipe, corpus: Corpus, folder: Path, kind: str, share: float
) -> tuple[MAEVQGAN, dict[str, float]]:
    """A model that learned from a share of a kind of data, and its losses of canvases seen and unseen."""
    config = recipes.get(args.size).config
    draw, mask = KINDS[kind]
    distinct = max(1, round(share * recipe.steps))
    stream = partial(draw, layout=config.layout, seed=args.seed, corpus=corpus)
    out = folder / f"{kind}-{share:g}"
    model = train_mae(
        config,
        load_tokenizer(config, folder / "tokenizer"),
        recipe,
        out,
        resume=True,
        seed=args.seed,
        device=args.device,
        canvases=lambda step, n: stream(step % distinct, n),
        mask=mask,
    )
    some = {"seen": range(distinct)[:JUDGED], "unseen": range(recipe.steps, recipe.steps + JUDGED)}
    module, losses = averaged_model(config, out).to(args.device), {}
    for name, steps in some.items():
        generator = torch.Generator(args.device).manual_seed(args.seed)
        values = []
        for step in steps:
            canvas = stream(step, recipe.batch_size).to(args.device)
            hidden = mask(config.layout, len(canvas), generator)
            with torch.no_grad():
                values.append(masked_loss(module, canvas, module.vqgan.encode(canvas), *hidden).item())
        losses[name] = statistics.mean(values)
    return MAEVQGAN(model).to(args.device), losses


def measured(model: MAEVQGAN, by_task: dict[str, VisualPrompt]) -> dict[str, dict]:
    """Task → score and token loss, each by condition as [mean, low, high], and the score's floor and ceiling."""
    scores: dict[str, dict] = {}
    for name, prompts in by_task.items():
        task = tasks.get(name)
        for line in evaluate(model, task, prompts, CONDITIONS, keep=0).lines():
            measure = "score" if line.measure == task.metric.name else "loss"
            of_task = scores.setdefault(name, {"metric": task.metric.label, "score": {}, "loss": {}})
            of_task[measure][line.condition] = [line.mean, line.low, line.high]
    return scores


def mean_loss(row: dict, condition: str) -> float:
    """The token loss over all tasks."""
    return statistics.mean(of_task["loss"][condition][0] for of_task in row["tasks"].values())


def draw(rows: list[dict], names: list[str]) -> Figure:
    """A panel for the loss over all tasks, those of canvases seen and unseen, and one for each task's metric."""
    figure = Figure(figsize=(3.1 * (1 + len(names)), 3.2), layout="constrained")
    panels = figure.subplots(1, 1 + len(names))
    for colour, kind in enumerate(dict.fromkeys(row["kind"] for row in rows)):
        of_kind = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["share"])
        shares, style = [100 * row["share"] for row in of_kind], dict(color=f"C{colour}", marker="o", markersize=4)
        panels[0].plot(shares, [mean_loss(row, "one-shot") for row in of_kind], label=kind, **style)
        panels[0].plot(shares, [row["unseen"] for row in of_kind], linestyle="--", **style)
        panels[0].plot(shares, [row["seen"] for row in of_kind], linestyle=":", **style)
        for panel, name in zip(panels[1:], names):
            means, lows, highs = zip(*(row["tasks"][name]["score"]["one-shot"] for row in of_kind))
            errors = [[m - low for m, low in zip(means, lows)], [high - m for m, high in zip(means, highs)]]
            panel.errorbar(shares, means, yerr=errors, capsize=2, **style)
            panel.set_title(f"{name}, {of_kind[0]['tasks'][name]['metric']}", fontsize=9)
    panels[0].set_title("token loss: prompts, unseen (--), seen (··)", fontsize=9)
    panels[0].legend(fontsize=8)
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xlabel("share of the data (%)")
        panel.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = options(__file__, __doc__, "figures, 10 and 100 %, few steps")
    parser.add_argument("--size", default="smoke", help="one of vtv pretrain's: smoke, tiny, small, published")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.01, 0.1, 1.0], help="of the data")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="a corpus or pictures, as for vtv pretrain")
    parser.add_argument("--steps", type=int, default=400, help="of each model")
    parser.add_argument("--batch", type=int, help="canvases a step; the size's by default")
    parser.add_argument("--tokenizer-steps", type=int, default=400, help="of the tokenizer that all share")
    parser.add_argument("--test", type=int, default=64, help="test prompts of each task")
    args = parser.parse_args()
    if args.quick:
        args.kinds, args.shares, args.steps, args.tokenizer_steps, args.test = ["figures"], [0.1, 1.0], 10, 10, 4
    if not all(0 < share <= 1 for share in args.shares):
        parser.error(f"--shares {args.shares}: expected shares of the data, above 0 and up to 1.")

    size = recipes.get(args.size)
    batch = args.batch or size.mae.batch_size
    recipe = replace(size.mae, steps=args.steps, batch_size=batch, decay=args.steps // 5, validate=args.steps)
    folder = args.out / args.name / f"{args.size}-{args.steps}x{batch}-seed{args.seed}"
    drawing = replace(size.tokenizer, steps=args.tokenizer_steps, decay=args.tokenizer_steps // 5, validate=10**9)
    corpus, shared = Corpus.read(args.images), dict(resume=True, seed=args.seed, device=args.device)
    train_tokenizer(size.config, drawing, folder / "tokenizer", corpus=corpus, **shared)
    scenes, names = data.scenes("test", n=4 * args.test, seed=args.seed), [task.name for task in tasks.VTV]
    test_prompts = {name: tasks.get(name).prompts(scenes, args.test, args.seed, size.config.layout) for name in names}

    rows = []
    for kind, share in progress_bar([(k, s) for k in args.kinds for s in args.shares], desc="models"):
        model, losses = trained(args, recipe, corpus, folder, kind, share)
        distinct = max(1, round(share * args.steps)) * batch
        scores = measured(model, {name: prompts.to(args.device) for name, prompts in test_prompts.items()})
        rows.append({"kind": kind, "share": share, "canvases": distinct, **losses, "tasks": scores})

    labels = [f"{name}, {rows[0]['tasks'][name]['metric']}" for name in names]
    print(f"\n{args.size}, {args.steps} steps of {batch} canvases, {args.test} test prompts of each task, one-shot")
    head = ["data", "share (%)", "canvases", "seen", "unseen", "prompts", "zero-shot", *labels]
    cells = [
        [row["kind"], f"{100 * row['share']:g}", row["canvases"], row["seen"], row["unseen"]]
        + [mean_loss(row, condition) for condition in CONDITIONS]
        + [row["tasks"][name]["score"]["one-shot"][0] for name in names]
        for row in rows
    ]
    print(table(head, cells))
    save(args, {"rows": rows}, draw(rows, names))


if __name__ == "__main__":
    main()
