"""How much training data a model needs, and of what kind: 1, 10 and 100 % of it, for equal steps (NeurIPS 2022).

    python benchmarks/data_size.py [--quick] [--size smoke] [--steps 400] [--kinds prompts figures pictures]

prompts   Canvases as the embedded model learned from, which hide what a prompt hides (`training.stream`).
figures   Parts of composed figures, hidden at random, in the place of VP's figures of papers: rows that show a picture
          before and after, each column changed in another way (`curriculum.draw_task`), or rows and columns change
          places; galleries of pictures that have nothing to do with one another; panels of curves, bars, points or a
          heat map. All have gutters, margins and white space in which captions may stand. Parts of a task that is held
          out never stand in one figure.
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
import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import options, save, table
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from vtv_nnsight import MAEVQGAN, Condition, Layout, VisualPrompt, data, evaluate, tasks
from vtv_nnsight.data.drawn_scenes import render
from vtv_nnsight.images import to_pil
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.tasks import Row, Task
from vtv_nnsight.training import recipes
from vtv_nnsight.training.corpus import Corpus
from vtv_nnsight.training.curriculum import draw_task, is_held_out
from vtv_nnsight.training.figures import Generator, cropped, fitted
from vtv_nnsight.training.loop import Job
from vtv_nnsight.training.mae import averaged_model, draw_mask, masked_loss, random_mask, train_mae
from vtv_nnsight.training.recipes import Recipe
from vtv_nnsight.training.stream import SCENES, as_batch, draw_rows, training_prompts
from vtv_nnsight.training.tokenizer import load_tokenizer, train_tokenizer

JUDGED = 8
"""Steps with canvases that a model is judged on."""
CONDITIONS = {"one-shot": Condition("one"), "zero-shot": Condition("zero")}

FIGURES = {"changes": 0.5, "gallery": 0.25, "plots": 0.25}
"""How often a figure is of each kind."""
SHEET = 2.0
"""The longer side of a composed figure over that of the canvas: most parts that are cut are not enlarged."""
MAX_PANELS = 4
"""Rows and columns of a figure."""
INK = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189), (0, 0, 0), (127, 127, 127))
MAPS = np.array(
    [[[68, 1, 84], [33, 145, 140], [253, 231, 37]], [[0, 0, 0], [230, 60, 30], [255, 255, 220]],
     [[30, 60, 180], [240, 240, 240], [180, 20, 40]], [[255, 255, 255], [128, 128, 128], [0, 0, 0]]], float
)  # fmt: skip
"""Three colours of each of the heat maps' scales."""


def composed(step: int, n: int, size: int, seed: int, corpus: Corpus) -> torch.Tensor:
    """The `n` canvases of a training step, parts of figures of a corpus's pictures and of scenes: float
    [n, 3, size, size] in [0, 1]."""
    generator = np.random.default_rng([seed, step, size, 1])
    return as_batch([fitted(compose_figure(corpus, round(SHEET * size), generator), size, generator) for _ in range(n)])


def compose_figure(corpus: Corpus, longest: int, generator: Generator, kind: str | None = None) -> Image.Image:
    """A figure of one of `FIGURES`, by default any; its longer side has `longest` pixels or a few less."""
    kind = kind or str(generator.choice(list(FIGURES), p=list(FIGURES.values())))
    rows, columns = generator.integers(1, MAX_PANELS + 1, 2).tolist()
    if kind == "changes":
        columns = max(2, columns)
    pitch = longest / max(rows, columns)
    gap, below, margin = (round(pitch * share) for share in _spaces(generator))
    across = round(pitch) - gap
    down = max(8, across - below)
    if kind == "changes":  # its pictures are square, as tasks change them
        across = down
        grid = _changed(corpus, rows, columns, across, generator)
        if generator.random() < 0.5:
            grid = [list(line) for line in zip(*grid)]
    elif kind == "gallery":
        grid = [[_picture(corpus, (across, down), generator) for _ in range(columns)] for _ in range(rows)]
    else:
        down = max(8, round(down * generator.uniform(0.6, 1.0)))
        grid = [[_plot((across, down), generator) for _ in range(columns)] for _ in range(rows)]
    return _laid_out(grid, gap, below, margin, generator)


def _spaces(generator: Generator) -> tuple[float, float, float]:
    """The gutter, the room below each picture, and the margin, as shares of a picture's pitch."""
    gap = generator.choice([0.0, generator.uniform(0.01, 0.12)], p=[0.1, 0.9])
    below = generator.choice([0.0, generator.uniform(0.08, 0.25)])
    return float(gap), float(below), generator.uniform(0.0, 0.15)


def _laid_out(
    grid: Sequence[Sequence[Image.Image]], gap: int, below: int, margin: int, generator: Generator
) -> Image.Image:
    """Pictures in rows on white, most with captions where there is room for one: a letter or words."""
    across, down = grid[0][0].size
    width = 2 * margin + len(grid[0]) * (across + gap) - gap
    height = 2 * margin + len(grid) * (down + below + gap) - gap
    sheet = Image.new("RGB", (max(8, width), max(8, height)), "white")
    pen, words = ImageDraw.Draw(sheet), generator.random() < 0.75
    font = ImageFont.load_default(max(6, round(0.8 * below)))
    for i, line in enumerate(grid):
        for j, picture in enumerate(line):
            left, top = margin + j * (across + gap), margin + i * (down + below + gap)
            sheet.paste(picture, (left, top))
            if words and below >= 6:
                text = _words(generator)
                if font.getlength(text) > across:
                    text = f"({string.ascii_lowercase[i * len(line) + j]})"
                pen.text((left + across // 2, top + down + below // 2), text, "black", font, anchor="mm")
    return sheet


def _words(generator: Generator) -> str:
    lengths = generator.integers(1, 8, generator.integers(1, 4))
    return " ".join("".join(generator.choice(list(string.ascii_letters), length)) for length in lengths)


def _changed(corpus: Corpus, rows: int, columns: int, side: int, generator: Generator) -> list[list[Image.Image]]:
    """In each row a picture as a task corrupts it, as that task wants it, and as others do."""
    pictures = _rows(corpus, rows, generator)
    masks, place = all("mask" in row for row in pictures), tuple(generator.random(2))
    first, others = draw_task(generator, masks), list[Task]()
    while len(others) < columns - 2:
        if not is_held_out(sum([*others, other := draw_task(generator, masks)], start=first)):
            others.append(other)
    grid = []
    for row in pictures:
        cells: list[Any] = [*first.cells(row, side, place), *(other.cells(row, side, place)[1] for other in others)]
        grid.append([to_pil(cell) for cell in cells])
    return grid


def _rows(corpus: Corpus, n: int, generator: Generator) -> list[Row]:
    """`n` pictures of one kind, as the prompts' stream shows them: scenes, or of the corpus."""
    if generator.random() >= SCENES:
        return draw_rows(corpus, n, generator)
    images, masks, _ = render("train", generator.integers(2**31, size=n).tolist())
    return [{"image": Image.fromarray(image), "mask": Image.fromarray(mask)} for image, mask in zip(images, masks)]


def _picture(corpus: Corpus, size: tuple[int, int], generator: Generator) -> Image.Image:
    (row,) = _rows(corpus, 1, generator)
    return row["image"].resize(size, Image.Resampling.BICUBIC)


def _plot(size: tuple[int, int], generator: Generator) -> Image.Image:
    """A panel with axes and what one sees between them; drawn at twice its size."""
    width, height = 2 * size[0], 2 * size[1]
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    left, right, top, bottom = (
        round(s * side) for s, side in zip((0.16, 0.94, 0.06, 0.86), (width, width, height, height))
    )
    x, y = np.linspace(left, right, 33), lambda value: bottom - value * (bottom - top)
    if generator.random() < 0.4:
        for share in np.linspace(0, 1, 5)[1:-1]:
            pen.line([(left, y(share)), (right, y(share))], (215, 215, 215), 2)
    colours = [INK[i] for i in generator.permutation(len(INK))[: generator.integers(1, 5)]]
    kind = generator.choice(["curves", "bars", "points", "map"])
    if kind == "map":
        scale, values = MAPS[generator.integers(len(MAPS))], generator.random((generator.integers(3, 12),) * 2)
        tones = np.stack([np.interp(values, (0, 0.5, 1), scale[:, channel]) for channel in range(3)], -1)
        filled = Image.fromarray(tones.astype(np.uint8))
        sheet.paste(filled.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
    for i, colour in enumerate(colours):
        if kind == "curves":
            rising = generator.choice([-1, 1]) * np.exp(-np.linspace(0, generator.uniform(1, 6), len(x)))
            walk = rising + generator.uniform(0, 0.15) * np.cumsum(generator.normal(size=len(x)))
            values = (walk - walk.min()) / max(np.ptp(walk), 1e-6) * generator.uniform(0.4, 0.95)
            pen.line([(a, y(b)) for a, b in zip(x, values)], colour, 3)
        elif kind == "bars":
            room = (right - left) / 4
            for group, value in enumerate(generator.uniform(0.1, 0.95, 4)):
                start = left + room * (group + 0.1 + 0.8 * i / len(colours))
                pen.rectangle((start, y(value), start + 0.75 * room / len(colours), bottom), colour)
        elif kind == "points":
            centre, spread = generator.uniform(0.2, 0.8, 2), generator.uniform(0.03, 0.15, 2)
            for across, up in (centre + spread * generator.normal(size=(25, 2))).clip(0.02, 0.98):
                spot = left + across * (right - left), y(up)
                pen.ellipse((spot[0] - 3, spot[1] - 3, spot[0] + 3, spot[1] + 3), colour)
    pen.line([(left, top), (left, bottom), (right, bottom)], "black", 2)
    font = ImageFont.load_default(max(8, round(0.09 * height)))
    most = generator.integers(1, 10, 2)
    for share in (0, 0.5, 1):
        pen.text((left - 4, y(share)), f"{share * most[0]:g}", "black", font, anchor="rm")
        pen.text((left + share * (right - left), bottom + 3), f"{share * most[1]:g}", "black", font, anchor="mt")
    return sheet.reduce(2)


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
    job = Job(config, recipe, out, resume=True, seed=args.seed, device=args.device)
    vqgan = load_tokenizer(config, folder / "tokenizer")
    model = train_mae(job, vqgan, canvases=lambda step, n: stream(step % distinct, n), mask=mask)
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
    folder.mkdir(parents=True, exist_ok=True)
    drawing = replace(size.tokenizer, steps=args.tokenizer_steps, decay=args.tokenizer_steps // 5, validate=10**9)
    corpus, shared = Corpus.read(args.images), dict(resume=True, seed=args.seed, device=args.device)
    train_tokenizer(Job(size.config, drawing, folder / "tokenizer", corpus, **shared))
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
