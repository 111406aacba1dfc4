"""`vtv prompt`: one prompt of picture files, or of words."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from typer.core import TyperCommand

from vtv_nnsight import tasks
from vtv_nnsight.cli import options
from vtv_nnsight.cli.group import app
from vtv_nnsight.cli.output import say, wrote
from vtv_nnsight.data.embedded_pictures import SAMPLE
from vtv_nnsight.evaluation.conditions import BASELINE, PATCHED, ZERO_SHOT
from vtv_nnsight.files import write_picture
from vtv_nnsight.finite import check_finite
from vtv_nnsight.images import read_picture, to_pil
from vtv_nnsight.layouts import Layout
from vtv_nnsight.models import load_model
from vtv_nnsight.patching import patch
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.report import photographs
from vtv_nnsight.report.pictures import strip
from vtv_nnsight.runs import bundles
from vtv_nnsight.runs.settings import Settings

Examples = Annotated[
    list[str] | None,
    typer.Option(
        metavar="IN [OUT]",
        help="Two files fill the example's cells as they are, and the query its cell. With one file the task makes "
        "input and output of it, and corrupts the query alike. A task of words takes two words. With --vectors there "
        "need be no example.",
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
        help="Answer with this model (as SOURCE of `vtv info`).",
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
STRIP_SIDE = 320
"""Pixels: the width of each picture of a strip."""


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
    epilog="Examples: vtv prompt --vectors tiny --task lowlight --query sample\n\n"
    "vtv prompt --model tiny --task segmentation --example cat.jpg cat_mask.png --query dog.jpg -o out.png\n\n"
    "vtv prompt --task colorization --example cat.jpg --query dog.jpg -o prompt.png\n\n"
    "vtv prompt --model SmolLM2.gguf --vectors runs/words --task antonym --query hot",
)
def prompt(
    ctx: typer.Context,
    query: Annotated[
        str, typer.Option(help='The picture or the word to answer; "sample" is a photograph in the package.')
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The file to write.", callback=options.place_for_file, show_default="QUERY-TASK.png"
        ),
    ] = None,
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
    """Make a prompt of pictures or words; with --model, answer it; with --vectors, answer it with no example.

    Without a model the prompt itself is saved, the hidden patches dimmed. With vectors a strip is: the photograph, the
    query, its answers zero-shot, one-shot (with an example) and with the task vector, and this last one carried over to
    the photograph, which is also written at full resolution. Answers of a language model are printed.
    """
    files = example or []
    if len(files) > 2:
        raise ValueError(f"--example names {len(files)} files; give an input and its output, or one picture.")
    if not files and not vectors:
        raise ValueError("there is no --example; give one, or --vectors, which need none.")
    if not vectors:
        options.refuse_unused(ctx, "without --vectors", "scale")
    check_finite(scale, "--scale", "give a number from 0 (as it is) to 1 (the vector), or beyond")
    keywords = options.given(vqgan=vqgan, embedding_type=embedding_type, dtype=dtype)
    bundle = bundles.load(vectors) if vectors else None
    name = task or (next(iter(bundle)) if bundle else "identity")
    to_make = tasks.get(name)
    if isinstance(to_make, tasks.Text):
        options.refuse_unused(ctx, f"for {name}: its answers are printed", "output", "mask", "order")
        return _say(to_make, query, files, model, bundle, scale, keywords)
    if mask is not None and len(files) != 1:
        raise ValueError("--mask goes with a single --example file; with two, the second file is the answer.")
    if not model and not vectors:
        options.refuse_unused(ctx, "without a model", "vqgan", "embedding_type", "dtype")
    if vectors:
        options.refuse_unused(ctx, "with --vectors, which know it", "order")
    if to_make.needs != "mask":
        options.refuse_unused(ctx, f"for {name}, which asks for no mask", "mask")
    output = output or Path(f"{Path(query).stem}-{name}.png")
    image = read_picture(SAMPLE if query == "sample" else query)
    if bundle:
        vector, patches = bundle[name]
        patched = bundle.load_model(model, **keywords)
        bundle.check(patched)
        if sentence := photographs.warning(patched, patches.space.layout, image):
            warnings.warn(sentence, stacklevel=2)
        visual_prompt = _compose(to_make, files, mask, image, patches.space.layout) if files else None
        pictures = photographs.answers(
            patched, to_make, vector, patches, image, visual_prompt, scale=scale, as_it_is=len(files) == 2
        )
        write_picture(output, strip(pictures, STRIP_SIDE, f"{name}: {Path(query).name}, vector of {vectors}").save)
        if measured := photographs.psnrs(to_make, pictures):
            values = ", ".join(f"{picture} {value:.1f} dB" for picture, value in measured.items())
            say(f"{name}, PSNR against the photograph: {values}")
        if photographs.CARRIED in pictures:
            full = output.with_stem(f"{output.stem}-full")
            write_picture(full, to_pil(pictures[photographs.CARRIED]).save)
            wrote(full)
    else:
        painter: Any = load_model(model, **keywords) if model else None
        if painter:
            to_make.check_model(painter)
        layout = replace(painter.layout if painter else Layout(), order=order)
        visual_prompt = _compose(to_make, files, mask, image, layout)
        drawn = to_pil(painter.generate(visual_prompt)[0]) if painter else visual_prompt.picture()
        write_picture(output, drawn.save)
    wrote(output)


def _say(
    task: tasks.Text, query: str, example: list[str], source: str | None, bundle: Any, scale: float,
    keywords: dict[str, Any],
) -> None:  # fmt: skip
    """Print what a language model says zero-shot, after an example, and with the task vector."""
    columns = (*task.inputs, task.needs)
    if len(example) not in (0, len(columns)):
        raise ValueError(f"--example of {task.name} has {len(example)} part; give {', '.join(columns)}.")
    if not source and not bundle:
        raise ValueError(f"{task.name} is for language models; say which (--model).")
    model: Any = bundle.load_model(source, **keywords) if bundle else load_model(str(source), **keywords)
    task.check_model(model)
    model.dispatch()
    zero_shot = task.prompt([], query)
    said = {ZERO_SHOT: model.say(zero_shot)}
    if example:
        said[BASELINE] = model.say(task.prompt(dict(zip(columns, example)), query))
    if bundle:
        bundle.check(model)
        vector, patches = bundle[task.name]
        said[PATCHED] = model.say(zero_shot, edit=lambda traced: patch(traced, vector, patches, scale=scale))
    say("\n".join(f"{condition}: {answer.strip()}" for condition, (answer,) in said.items()))


def _compose(
    task: tasks.Task, example: list[str], mask: Path | None, query: Image.Image, layout: Layout
) -> VisualPrompt:
    """The prompt of a query and an example that the task makes input and output of, or of an input and its output."""
    if len(example) == 2:
        example_input, example_output = map(read_picture, example)
        return VisualPrompt.from_cells(
            {"example_input": example_input, "example_output": example_output, "query": query}, layout
        )
    row = {"image": read_picture(example[0])} | ({"mask": read_picture(mask)} if mask else {})
    return task.prompt(example=row, query={"image": query}, layout=layout)
