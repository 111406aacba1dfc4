"""`vtv prompt`: one prompt of picture files; `vtv layouts`: what the look of prompts is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from PIL import Image
from typer.core import TyperCommand

from vtv_nnsight import tasks
from vtv_nnsight.cli import options
from vtv_nnsight.cli.group import app
from vtv_nnsight.cli.output import say, wrote
from vtv_nnsight.data import load
from vtv_nnsight.files import write_picture, write_text
from vtv_nnsight.images import read_picture, strip, to_pil
from vtv_nnsight.layouts import Layout
from vtv_nnsight.models import load_model
from vtv_nnsight.patching.forward import generate_with_gates
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.runs import bundles, steps
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.studies.prompting import ensembles, prompt_engineering

Examples = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="IN [OUT]",
        help="Two files fill the example's cells as they are, and the query its cell. With one file the task makes "
        "input and output of it, and corrupts the query alike. With --vectors there need be no example.",
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        help="A task, or several joined by '+'.", show_default="identity; with --vectors the first that they have"
    ),
]
Mask = Annotated[
    Path | None, typer.Option(help="The mask of a single example (0 and 255), for tasks that ask for masks.")
]
Painter = Annotated[
    str | None,
    typer.Option(
        help="Paint the output with this model (as SOURCE of `vtv info`).",
        metavar="SOURCE",
        show_default="with --vectors the model of the run",
    ),
]
Run = Annotated[
    str | None,
    typer.Option(
        help='Answer with task vectors, too: "tiny" for those in the package, or a folder that `vtv run` wrote.',
        metavar="RUN",
    ),
]
Scale = Annotated[float, typer.Option(help="How far the vector goes: 0 changes nothing, 1 is the vector itself.")]
Colours = Annotated[
    str,
    typer.Option(
        help="Looks of the masks, with commas between them: segmentation tasks, such as "
        "'segmentation(black, white)' or 'segmentation(fill=edges)'.",
        show_default="white on black, and yellow on purple",
    ),
]


class ExampleCommand(TyperCommand):
    """Reads `--example IN OUT` as `--example IN --example OUT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The second file of an example gets an option's name before it."""
        spread: list[str] = []
        for arg in args:
            follows = len(spread) > 1 and spread[-2] == "--example" and not arg.startswith("-")
            spread += ["--example", arg] if follows else [arg]
        return super().parse_args(ctx, spread)


@app.command(
    cls=ExampleCommand,
    epilog="Examples: vtv prompt --vectors tiny --task segmentation --query dog.jpg -o strip.png\n\n"
    "vtv prompt --model tiny --task segmentation --example cat.jpg cat_mask.png --query dog.jpg -o out.png\n\n"
    "vtv prompt --task colorization --example cat.jpg --query dog.jpg -o prompt.png",
)
def prompt(
    ctx: typer.Context,
    query: Annotated[Path, typer.Option(help="The picture to answer.")],
    output: options.Output,
    example: Examples = None,
    task: TaskName = None,
    mask: Mask = None,
    model: Painter = None,
    vectors: Run = None,
    scale: Scale = 1.0,
    vqgan: options.VQGAN = None,
    embedding_type: options.EmbeddingType = None,
    dtype: options.DType = None,
    order: options.Order = Settings.order,
) -> None:
    """Make a visual prompt of picture files; with --model, paint its output; with --vectors, answer it with no example.

    Without a model the prompt itself is saved, the hidden patches dimmed. With vectors a strip is: the example and the
    one-shot answer where there is an example, the query, the answer with nothing patched, and with the task vector.
    """
    files = example or []
    if len(files) > 2:
        raise ValueError(f"--example names {len(files)} files; give an input and its output, or one picture.")
    if not files and not vectors:
        raise ValueError("there is no --example; give one, or --vectors, which need none.")
    if mask is not None and len(files) != 1:
        raise ValueError("--mask goes with a single --example file; with two, the second file is the answer.")
    if not model and not vectors:
        options.refuse_unused(ctx, "without a model", "vqgan", "embedding_type", "dtype")
    if vectors:
        options.refuse_unused(ctx, "with --vectors, which know it", "order")
    else:
        options.refuse_unused(ctx, "without --vectors", "scale")
    keywords = options.given(vqgan=vqgan, embedding_type=embedding_type, dtype=dtype)
    bundle = bundles.load(vectors) if vectors else None
    name = task or (next(iter(bundle)) if bundle else "identity")
    to_make = tasks.get(name)
    if to_make.needs != "mask":
        options.refuse_unused(ctx, f"for {name}, which asks for no mask", "mask")
    if bundle:
        layout = bundle[name][1].space.layout
        patched = bundle.load_model(model, **keywords)
        bundle.check(patched)
        visual_prompt = _compose(to_make, files, mask, read_picture(query), layout)
        image = _strip(patched, bundle, name, visual_prompt, scale, bool(files))
    else:
        painter: Any = load_model(model, **keywords) if model else None
        layout = replace(painter.layout if painter else Layout(), order=order)
        visual_prompt = _compose(to_make, files, mask, read_picture(query), layout)
        image = to_pil(painter.generate(visual_prompt)[0]) if painter else visual_prompt.picture()
    write_picture(output, image.save)
    wrote(output)


@app.command(epilog="Example: vtv layouts tiny --data scenes --prompts 100 -o layouts.csv")
def layouts(
    ctx: typer.Context,
    source: options.Source,
    output: options.Output,
    data: options.Data = Settings.data,
    images: options.Images = None,
    split: options.Split = "test",
    prompts: Annotated[int, typer.Option("--prompts", "--n", min=1, help="Prompts to segment.")] = 100,
    colours: Colours = "",
    ensemble: Annotated[
        str, typer.Option(help="How the layouts' answers are made one: softmax, logits, product or maximum.")
    ] = "softmax",
    seed: options.Seed = Settings.seed,
    vqgan: options.VQGAN = None,
    embedding_type: options.EmbeddingType = None,
    dtype: options.DType = None,
    device: options.Device = None,
) -> None:
    """Segment the same queries in both orders of a prompt, in several colours, and in both orders at once (VP §4.4).

    Prints mean IoUs and writes those of every prompt.
    """
    if ensemble not in ensembles.RULES:
        raise ValueError(f"--ensemble {ensemble} is unknown; choose from {', '.join(ensembles.RULES)}.")
    looks: dict[str, Any] = (
        {task.name: task for task in tasks.get_all(colours)} if colours else prompt_engineering.COLOURS
    )
    if others := [name for name, task in looks.items() if not isinstance(task, tasks.Segmentation)]:
        raise ValueError(f"--colours {others[0]} is not a segmentation task.")
    settings = options.settings_of(ctx, model=source, tasks="segmentation")
    model = steps.set_up(settings, device, dtype=dtype).model
    rows = load(settings.data, split, 2 * prompts, seed)
    steps.servable(settings, rows)
    scores = prompt_engineering.compare(model, rows, prompts, seed, tasks=looks, rule=ensemble)
    say(prompt_engineering.table(scores))
    columns = {f"{layout}, {look}": values.tolist() for (layout, look), values in scores.items()}
    write_text(output, pd.DataFrame(columns).to_csv(index_label="prompt", lineterminator="\n"))
    wrote(output)


def _compose(
    task: tasks.Task, example: list[Path], mask: Path | None, query: Image.Image, layout: Layout
) -> VisualPrompt:
    """The prompt of a query and no example, one that the task makes input and output of, or an input and its output."""
    if len(example) == 2:
        example_input, example_output = map(read_picture, example)
        return VisualPrompt.from_cells(
            {"example_input": example_input, "example_output": example_output, "query": query}, layout
        )
    if example:
        row = {"image": read_picture(example[0])} | ({"mask": read_picture(mask)} if mask else {})
        return task.prompt(example=row, query={"image": query}, layout=layout)
    return VisualPrompt.from_cells({"query": task.cells(query, layout.cell_size)[0]}, layout)


def _strip(
    model: Any, bundle: bundles.Bundle, task: str, prompt: VisualPrompt, scale: float, example: bool
) -> Image.Image:
    """The example, the query, and its answers, one beside the other."""
    vector, patches = bundle[task]
    gates = torch.tensor([0.0, scale])[:, None] * patches.choices
    nothing, patched = generate_with_gates(model, prompt, vector, patches.space, gates)
    pictures = {"query": prompt.region("query")[0]}
    if example:
        with torch.no_grad():
            one_shot = model.generate(prompt).answer[0].cpu()
        cells = {"example": prompt.region("example_input")[0], "its answer": prompt.region("example_output")[0]}
        pictures = cells | pictures | {"one-shot": one_shot}
    return strip(pictures | {"nothing": nothing, f"task vector, scale {scale:g}": patched})
