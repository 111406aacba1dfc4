"""VP's reasoning study: circles that change in colour, shape or size (NeurIPS 2022, §4.3).

    python benchmarks/reasoning.py [--quick] [--model tiny] [--tasks color shape size color+shape color+size shape+size]

A picture is a filled green circle on white, its centre anywhere but within 10 pixels of the border; its answer is the
same circle in blue ("color"), the square around it ("shape"), or both. Radii are from 10 to 49, and 30 where the answer
is smaller ("size": 20). Splits are told apart by the centre (the sum of its coordinates, modulo 3), so that no picture
is in two of them. Prompts show two examples.

Answers are scored by the colour-aware IoU: every pixel goes to the nearest of black and the colours that the released
code allows; beside it stand the IoU of all that is not white, and how often the answer is a square where the truth is
one. "views" is the mean of the answers to two views of each prompt, the released code's test-time ensemble.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from common import options, save, table
from datasets import Dataset, Features, Image
from matplotlib.figure import Figure
from PIL import Image as PILImage

from vtv_nnsight import MAEVQGAN, Layout, VisualPrompt, evaluate, metrics, tasks
from vtv_nnsight.layouts import ORDERS
from vtv_nnsight.metrics import BLACK, WHITE, Colour, Metric
from vtv_nnsight.models import load_model
from vtv_nnsight.patching.forward import forward
from vtv_nnsight.prompts import crop
from vtv_nnsight.tasks.base import answer_target

GREEN, BLUE = (0, 255, 0), (0, 0, 255)
PALETTES = {
    ("color",): (BLUE, GREEN, WHITE),
    ("shape",): (GREEN, WHITE),
    ("size",): (BLUE, GREEN, WHITE),
    ("color", "shape"): (GREEN, BLUE, WHITE),
    ("color", "size"): (GREEN, BLUE, WHITE),
    ("shape", "size"): (GREEN, WHITE),
}
"""The colours that the released code allows an answer's pixels, nearest first on a tie."""
SPLITS = ("train", "validation", "test")
SIZE, MARGIN, RADII, LARGE, SMALL = 224, 10, (10, 50), 30, 20
LAYOUT = Layout(examples=2, background="black", gap=(1, 2))
"""Three rows of cells of 74 pixels on black. In the released code, which paints it by way of its test-time ensembles,
inputs are at columns 37 to 110 and outputs at 113 to 186."""
VIEWS = ("plain", "transposed", "swapped", "swapped transposed")
"""Ways to show a prompt: as it is, its canvas transposed, with each answer in the place of its input, or both."""


def rounded(pixels: torch.Tensor, palette: Sequence[Colour]) -> torch.Tensor:
    """Every pixel as the nearest colour of a palette."""
    colours = pixels.new_tensor(palette) / 255
    return colours[metrics.nearest(pixels, palette)].permute(0, 3, 1, 2)


def color_blind_iou(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Intersection over union of all that is not white, whatever its colour."""
    return metrics.overlap(_not_white(prediction), _not_white(target))


def shape_accuracy(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 where the largest piece of what is not white has the target's shape, 0 where it has the other or nothing is
    painted: whichever of the square and the circle in its place fits it better. The released code looks at a contour of
    OpenCV's in the place of the largest piece, and counts squares whatever the target: where the answer is a square, as
    in its shape tasks, that is the same."""
    a, b = _squares(_not_white(prediction)), _squares(_not_white(target))
    return ((a == b) & (a >= 0)).double()


def _not_white(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [batch, 3, height, width] → bool [batch, height, width]."""
    return (pixels.double().mul(255).round() != 255).any(1)


def _squares(inside: torch.Tensor) -> torch.Tensor:
    """Bool [batch, height, width] → 1 for a square, 0 for a circle, -1 for nothing, [batch]."""
    shapes = []
    for row in inside:
        box = metrics.largest_box(row).nonzero()
        if not len(box):
            shapes.append(-1)
            continue
        (top, left), (bottom, right) = box.amin(0).tolist(), box.amax(0).tolist()
        high, wide = bottom - top + 1, right - left + 1
        radius, y, x = max(high, wide) // 2, int(top + high / 2), int(left + wide / 2)
        down = torch.arange(row.shape[0], device=row.device)[:, None] - y
        across = torch.arange(row.shape[1], device=row.device)[None, :] - x
        circle = down**2 + across**2 <= radius**2
        square = (down >= -radius) & (down < radius) & (across >= -radius) & (across < radius)
        fits = [(shape & row).sum() / (shape | row).sum() for shape in (circle, square)]
        shapes.append(int(fits[1] > fits[0]))
    return torch.tensor(shapes, device=inside.device)


COLOR_BLIND_IOU = metrics.register(Metric("color_blind_iou", color_blind_iou, True, "colour-blind IoU ↑"))
SHAPE_ACCURACY = metrics.register(Metric("shape_accuracy", shape_accuracy, True, "shape accuracy ↑"))


@dataclass(frozen=True)
class Reasoning(tasks.Task):
    """A green circle on white → the same, changed. Cells are bilinear, as in the released code.

    Args:
        changes: Some of "color" (to blue), "shape" (to a rectangle) and "size" (to a radius of 20 from 30).
        metric: `metrics.IOU`, which is aware of colours here, or one of the study's other two.
    """

    changes: tuple[str, ...] = ("color",)
    metric: Metric | str = metrics.IOU
    needs = "answer"
    fit = "bilinear"
    target = answer_target

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "changes", tuple(sorted(set(self.changes))))
        if self.changes not in PALETTES:
            known = ", ".join("+".join(changes) for changes in PALETTES)
            raise ValueError(f"{'+'.join(self.changes) or 'nothing'!r} is not among the reasoning tasks: {known}.")

    @property
    def name(self) -> str:
        """The changes, joined by "+"."""
        return "+".join(self.changes)

    @property
    def palette(self) -> tuple[Colour, ...]:
        """The colours that pixels go to, nearest first on a tie."""
        return (*PALETTES[self.changes], BLACK)

    def score(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The colour-aware IoU, or the other metric of pixels that went to the palette: [batch]."""
        if self.metric != metrics.IOU:
            return super().score(rounded(prediction, self.palette), rounded(target, self.palette))
        foreground = self.palette.index(BLUE if "color" in self.changes else GREEN)
        inside = (metrics.nearest(pixels, self.palette) == foreground for pixels in (prediction, target))
        return metrics.overlap(*inside)


REASONING = tuple(map(Reasoning, PALETTES))


def reasoning(task: Reasoning, n: int = 100, seed: int = 0, split: str = "train") -> Dataset:
    """`n` pictures and their answers, columns image and answer (RGB, 224x224). Row i does not depend on `n`."""
    rows = [_row(task.changes, np.random.default_rng([seed, i]), SPLITS.index(split)) for i in range(n)]
    return Dataset.from_list(rows, Features(image=Image(), answer=Image()))


def _row(changes: tuple[str, ...], generator: np.random.Generator, split: int) -> dict[str, PILImage.Image]:
    x, y = generator.integers(MARGIN, SIZE - MARGIN, 2).tolist()
    while (x + y) % len(SPLITS) != split:
        x, y = generator.integers(MARGIN, SIZE - MARGIN, 2).tolist()
    radius = LARGE if "size" in changes else int(generator.integers(*RADII))
    shape = "rectangle" if "shape" in changes else "circle"
    colour = BLUE if "color" in changes else GREEN
    answer = draw(x, y, SMALL if "size" in changes else radius, shape, colour)
    return {"image": draw(x, y, radius), "answer": answer}


def draw(x: int, y: int, radius: int, shape: str = "circle", colour: Colour = GREEN) -> PILImage.Image:
    """A filled circle, or the square around it, on white; what lies beyond the border is cut off."""
    across, down = np.arange(SIZE)[None, :] - x, np.arange(SIZE)[:, None] - y
    circle = across**2 + down**2 <= radius**2
    square = np.maximum(np.abs(across), np.abs(down)) <= radius
    inside = circle if shape == "circle" else square
    return PILImage.fromarray(np.where(inside[..., None], np.array(colour, np.uint8), np.uint8(255)))


@torch.no_grad()
def average(model: Any, prompts: VisualPrompt, views: Sequence[str] = ("swapped transposed", "plain")) -> torch.Tensor:
    """The mean of a MAEVQGAN's answers to several views of the same one-shot prompts, turned back: [batch, 3, cell,
    cell] in [0, 1]. The released code has "plain", "swapped transposed", both, these with "transposed", and
    "transposed" alone."""
    answers = []
    for name in views:
        turned, cell = view(prompts, name)
        output, _ = forward(model, turned)
        answer = crop(model.paint(output, turned.to(model.device)), cell, turned.layout)
        answers.append(answer.transpose(2, 3) if name.endswith("transposed") else answer)
    return reduce(add, answers) / len(answers)


def view(prompts: VisualPrompt, name: str) -> tuple[VisualPrompt, str]:
    """Prompts in one of `VIEWS`, and the name of the cell that is then to be painted."""
    layout, canvas, hidden = prompts.layout, prompts.canvas.clone(), "output"
    if name.startswith("swapped"):
        hidden, cells = "query", list(layout.cells.values())
        for question, answer in zip(cells[::2], cells[1::2]):
            canvas[(..., *question)] = prompts.canvas[(..., *answer)]
            canvas[(..., *answer)] = prompts.canvas[(..., *question)]
    if name.endswith("transposed"):
        canvas = canvas.transpose(2, 3)
        layout = replace(layout, order=next(order for order in ORDERS if order != layout.order))
    patches = layout.all_patches
    visible = patches[~torch.isin(patches, layout.regions[hidden])]
    return VisualPrompt(canvas, visible.to(canvas.device), patches.to(canvas.device), layout), hidden


def measured(args: argparse.Namespace, model: Any, task: Reasoning) -> dict[str, Any]:
    """The means of a task's three measures under every condition, and of the answers to views."""
    layout = replace(LAYOUT, canvas_size=model.layout.canvas_size, patch_size=model.layout.patch_size)
    images, means = reasoning(task, max(2 * args.test, 3), args.seed, "test"), {}
    for metric in (metrics.IOU, COLOR_BLIND_IOU, SHAPE_ACCURACY):
        scored = replace(task, metric=metric)
        prompts = scored.prompts(images, args.test, args.seed, layout).to(args.device)
        scores = evaluate(model, scored, prompts, keep=0, progress=False)
        means[metric.name] = {str(name): float(rows.score.mean()) for name, rows in scores.frame.groupby("condition")}
        if isinstance(model, MAEVQGAN):
            answers = torch.cat([average(model, batch).cpu() for batch in prompts.split(16)])
            means[metric.name]["views"] = float(scored.score(answers, prompts.region("output").cpu()).mean())
    return {"task": task.name, "means": means}


def main() -> None:
    parser = options(__file__, __doc__, "one task, few prompts")
    parser.add_argument("--model", default="tiny", help="as SOURCE of `vtv info`")
    parser.add_argument("--tasks", nargs="+", default=[task.name for task in REASONING], metavar="TASK")
    parser.add_argument("--test", type=int, default=32, help="prompts of each task")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.test = args.tasks[:1], 4
    model = load_model(args.model, dispatch=True).to(args.device)
    rows = [measured(args, model, Reasoning(tuple(name.split("+")))) for name in args.tasks]
    conditions = list(rows[0]["means"]["iou"])
    for metric in rows[0]["means"]:
        body = [[row["task"], *(row["means"][metric][name] for name in conditions)] for row in rows]
        print(f"\n{metric}, {args.model}, {args.test} prompts\n{table(['task', *conditions], body)}")
    figure = Figure(figsize=(1 + 1.2 * len(rows), 2.6), layout="constrained")
    panel = figure.subplots()
    for i, name in enumerate(conditions):
        heights = [row["means"]["iou"][name] for row in rows]
        panel.bar(np.arange(len(rows)) + i / (1 + len(conditions)), heights, 1 / (1 + len(conditions)), label=name)
    panel.set_xticks(range(len(rows)), args.tasks, fontsize=7)
    panel.set_ylabel("colour-aware IoU")
    panel.legend(fontsize=7)
    save(args, {"rows": rows}, figure)


if __name__ == "__main__":
    main()
