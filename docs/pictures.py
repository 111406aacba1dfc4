"""Draw the six pictures of "What a task vector is" from a model and data.

    python docs/pictures.py --model tiny --data scenes --task segmentation --out docs/pictures

The query shown has the median score, with the vector, of those tried. The same arguments draw the same pictures.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from vtv_nnsight import MAEVQGAN, PatchSpace, TaskVectors, data, patch, search, tasks
from vtv_nnsight.images import to_pil
from vtv_nnsight.prompts import crop

SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
GREY = 0.75


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="as for MAEVQGAN")
    parser.add_argument("--data", default="scenes", help="as for `vtv run`")
    parser.add_argument("--task", default="segmentation")
    parser.add_argument("--prompts", type=int, default=64, help="to collect and to search on")
    parser.add_argument("--queries", type=int, default=33, help="the median of which is shown")
    parser.add_argument("--budget", type=int, default=2000, help="evaluations that the search may spend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    args = parser.parse_args(arguments)

    model, task = MAEVQGAN(args.model), tasks.get(args.task)
    images, unseen = data.split_data(args.data, 4 * args.prompts, 2 * args.queries, args.seed)
    prompts = task.prompts(images, args.prompts, args.seed, model.layout)
    vector = TaskVectors.collect(model, {task.name: prompts})[task.name]
    space = PatchSpace(model)
    found = search.gates(model, vector, task, prompts.query_only(), space, budget=args.budget, seed=args.seed)
    test = task.prompts(unseen, args.queries, args.seed, model.layout)

    scores = task.score(
        crop(generate_with_gates(model, test, vector, found.patches), "output", test.layout), test.region("output")
    )
    middle = int(scores.argsort()[len(scores) // 2])
    shown = test[middle]
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = {
        "prompt": prompt(shown),
        "one_shot": one_shot(model, shown),
        "query_only": query_only(model, shown),
        "averaging": averaging(model, prompts, space, found),
        "patching": patching(space, found),
        "scale": scale(model, shown, vector, found.patches),
    }
    for name, figure in drawn.items():
        size = save(figure, args.out / f"{name}.png")
        print(f"{name}.png: {size / 1000:.0f} kB")
    print(f"median of {len(scores)} queries: {task.metric.label} {scores[middle]:.3f}, {len(found.patches)} units")


@torch.no_grad()
def generate_with_gates(
    model, prompts, vector=None, patches=None, scale: float = 1.0, example: bool = False
) -> torch.Tensor:
    """Completed canvases [batch, 3, height, width]."""
    with model.generate(prompts if example else prompts.query_only()) as tracer:
        if vector is not None:
            patch(model, vector, patches, scale=scale)
        canvas = tracer.result.save()
    return canvas


def prompt(shown) -> Figure:
    figure, panel = panels(1, 4.6, 3.6)
    show(panel[0], asked(shown))
    names = {
        "example_input": "example input", "example_output": "example output", "query": "query",
        "output": "output:\nto be painted",
    }  # fmt: skip
    for name, (rows, columns) in shown.layout.cells.items():
        left = columns.start < shown.layout.canvas_size / 2
        x, y = (columns.start if left else columns.stop), (rows.start + rows.stop) / 2
        panel[0].annotate(
            names[name], (x, y), (-8 if left else 8, 0), textcoords="offset points", va="center",
            ha="right" if left else "left", fontsize=10, annotation_clip=False,
        )  # fmt: skip
    return figure


def one_shot(model, shown) -> Figure:
    figure, (left, middle, right) = panels(3)
    show(left, asked(shown), "the prompt")
    show(middle, crop(generate_with_gates(model, shown, example=True), "output", shown.layout)[0], "one-shot answer")
    show(right, shown.region("output")[0], "the truth")
    return figure


def query_only(model, shown) -> Figure:
    figure, (left, middle, right) = panels(3)
    canvas = torch.full_like(shown.canvas[0], GREY)
    crop(canvas, "query", shown.layout)[:] = shown.region("query")[0]
    show(left, canvas, "the query alone")
    show(middle, crop(generate_with_gates(model, shown), "output", shown.layout)[0], "answer: no idea")
    show(right, shown.region("output")[0], "the truth")
    return figure


@torch.no_grad()
def averaging(model, prompts, space, found) -> Figure:
    """What the best found unit's head says at one place of the answer: six prompts, and the mean of all."""
    unit = best_unit(space, found)
    stage = model.stages[unit["stage"]]
    layout = prompts.layout
    region = layout.regions["output" if "output" in layout.regions else "query"]
    with model.trace(prompts):
        values = model.attention(stage.name, unit["layer"]).heads[:, :, unit["head"]].save()
    places = model.positions(stage.name, prompts)
    at = int((places == 1 + int(region[len(region) // 2])).nonzero()[0]) if len(places) else 0
    rows = values[:, at].float()
    bound = float(rows.abs().max())
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    grid = figure.add_gridspec(7, 2, width_ratios=(1, 9))
    for row in range(6):
        show(figure.add_subplot(grid[row, 0]), prompts.canvas[row])
        strip(figure.add_subplot(grid[row, 1]), rows[row], bound)
    label = figure.add_subplot(grid[6, 0])
    label.set_axis_off()
    label.text(0.5, 0.5, f"mean of\n{len(rows)}", ha="center", va="center", fontsize=9)
    strip(figure.add_subplot(grid[6, 1]), rows.mean(0), bound)
    title = f"{stage.name}, layer {unit['layer']}, head {unit['head']}, in the middle of the answer"
    figure.suptitle(title, fontsize=10)
    return figure


def patching(space, found) -> Figure:
    chosen = space.split(found.patches.choices)
    regions = [(stage, i, name) for stage, groups in space.groups.items() for i, name in enumerate(groups)]
    figure, row = panels(len(regions), 1.5 * len(regions), 2.5)
    for panel, (stage, i, name) in zip(row, regions):
        values = chosen[stage][..., i].float()
        panel.imshow(values.numpy(), vmin=0, vmax=1.3, cmap="GnBu", aspect="equal")
        layers, heads = values.shape
        panel.set_xticks(range(heads))
        panel.set_yticks(range(layers))
        panel.set_xticks([h + 0.5 for h in range(heads - 1)], minor=True)
        panel.set_yticks([layer + 0.5 for layer in range(layers - 1)], minor=True)
        panel.grid(which="minor", color="0.7", linewidth=0.6)
        panel.tick_params(which="both", length=0, labelsize=7)
        panel.set_title(f"{stage}\n{name}", fontsize=9)
        panel.set_xlabel("head", fontsize=8)
    row[0].set_ylabel("layer", fontsize=8)
    figure.suptitle(f"{len(found.patches)} of {len(space)} units take the vector (dark)", fontsize=10)
    return figure


def scale(model, shown, vector, patches) -> Figure:
    figure, row = panels(len(SCALES) + 2, 1.15 * (len(SCALES) + 2), 1.6)
    show(row[0], shown.region("query")[0], "query")
    for panel, value in zip(row[1:], SCALES):
        show(
            panel,
            crop(generate_with_gates(model, shown, vector, patches, value), "output", shown.layout)[0],
            f"{value:g}",
        )
    show(row[-1], shown.region("output")[0], "truth")
    return figure


def best_unit(space, found) -> dict[str, int]:
    """The found unit of the greatest score, one that sees the answer before others."""
    units = space.units
    names = [list(groups) for groups in space.groups.values()]
    sees = torch.tensor([names[s][g] == "output" for s, g in zip(units.stage.tolist(), units.group.tolist())])
    scores = found.scores.masked_fill(~found.patches.choices, -torch.inf)
    if bool((sees & found.patches.choices).any()):
        scores = scores.masked_fill(~sees, -torch.inf)
    at = int(scores.argmax())
    return {name: int(getattr(units, name)[at]) for name in ("stage", "layer", "head")}


def asked(shown) -> torch.Tensor:
    """A canvas with its answer greyed out."""
    canvas = shown.canvas[0].clone()
    crop(canvas, "output", shown.layout)[:] = GREY
    return canvas


def panels(count: int, width: float = 7, height: float = 2.6) -> tuple[Figure, list]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def show(panel, pixels: torch.Tensor, title: str = "") -> None:
    panel.imshow(to_pil(pixels.cpu()), interpolation="nearest")
    panel.set_title(title, fontsize=10)
    panel.set_xticks([])
    panel.set_yticks([])


def strip(panel, values: torch.Tensor, bound: float) -> None:
    panel.imshow(values[None].cpu().numpy(), vmin=-bound, vmax=bound, cmap="RdBu", aspect="auto")
    panel.set_xticks([])
    panel.set_yticks([])


def save(figure: Figure, path: Path) -> int:
    """Write a PNG of 256 colours; its size in bytes."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    picture = Image.open(buffer).convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    return path.stat().st_size


if __name__ == "__main__":
    main()
