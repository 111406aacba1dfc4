"""`vtv prompt`: one prompt of picture files; `vtv layouts`: what the look of prompts is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from vtv_nnsight.cli.app import (
    PROMPTS,
    VQGAN,
    Data,
    Device,
    DType,
    EmbeddingType,
    Images,
    ListingCommand,
    Order,
    Output,
    Seed,
    Source,
    app,
    given,
    say,
    settings_of,
    wrote,
)
from vtv_nnsight.runs.settings import Settings


class ExampleCommand(TyperCommand):
    """Reads `--example IN OUT` as `--example IN --example OUT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        for arg in args:
            follows = len(spread) > 1 and spread[-2] == "--example" and not arg.startswith("-")
            spread += ["--example", arg] if follows else [arg]
        return super().parse_args(ctx, spread)


@app.command(
    cls=ExampleCommand,
    rich_help_panel=PROMPTS,
    epilog="Examples: vtv prompt --vectors tiny --task segmentation --query dog.jpg -o strip.png\n\n"
    "vtv prompt --model tiny --task segmentation --example cat.jpg cat_mask.png --query dog.jpg -o out.png\n\n"
    "vtv prompt --task colorization --example cat.jpg --query dog.jpg -o prompt.png",
)
def prompt(
    query: Annotated[Path, typer.Option(help="The picture to answer.")],
    output: Output,
    example: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="IN [OUT]",
            help="Two files fill the example's cells as they are, and the query its cell. With one file the task makes "
            "input and output of it, and corrupts the query alike. With --vectors there need be no example.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="A task, or several joined by '+'.", show_default="identity; with --vectors the first that they have"
        ),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="The mask of a single example (0 and 255), for tasks that ask for masks.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Paint the output with this model (as SOURCE of `vtv info`).", metavar="SOURCE",
            show_default="with --vectors the model of the run",
        ),
    ] = None,
    vectors: Annotated[
        str | None,
        typer.Option(
            help='Answer with task vectors, too: "tiny" for those in the package, or a folder that `vtv run` wrote.',
            metavar="RUN",
        ),
    ] = None,
    scale: Annotated[
        float, typer.Option(help="How far the vector goes: 0 changes nothing, 1 is the vector itself.")
    ] = 1.0,
    vqgan: VQGAN = None,
    embedding_type: EmbeddingType = None,
    dtype: DType = None,
    order: Order = "vertical",
) -> None:  # fmt: skip
    """Make a visual prompt of picture files; with --model, paint its output; with --vectors, answer it with no example.

    Without a model the prompt itself is saved, the hidden patches dimmed. With vectors a strip is: the example and the
    one-shot answer where there is an example, the query, the answer with nothing patched, and with the task vector.
    """
    from dataclasses import replace

    from vtv_nnsight import tasks
    from vtv_nnsight.files import write_picture
    from vtv_nnsight.images import read_picture, to_pil
    from vtv_nnsight.layouts import Layout
    from vtv_nnsight.models import load_model
    from vtv_nnsight.prompts import VisualPrompt

    files = example or []
    if len(files) > 2:
        raise ValueError(f"--example names {len(files)} files; give an input and its output, or one picture.")
    if not files and not vectors:
        raise ValueError("there is no --example; give one, or --vectors, which need none.")
    if mask is not None and len(files) != 1:
        raise ValueError("--mask goes with a single --example file; with two, the second file is the answer.")
    options = given(vqgan=vqgan, embedding_type=embedding_type, dtype=dtype)
    bundle = None
    if vectors:
        from vtv_nnsight.runs import bundles

        bundle = bundles.load(vectors)
        task = task or next(iter(bundle))
        _, patches = bundle[task]
        layout = patches.space.layout
    chosen = tasks.get(task or "identity")
    if bundle:
        painter = bundle.load_model(model, **options)
        bundle.check(painter)
    else:
        painter = load_model(model, **options) if model else None
        layout = replace(painter.layout if painter else Layout(), order=order)
    picture = read_picture(query)
    if len(files) == 2:
        made = _as_they_are(*map(read_picture, files), picture, layout)
    elif files:
        row = {"image": read_picture(files[0])} | ({"mask": read_picture(mask)} if mask else {})
        made = chosen.prompt(example=row, query={"image": picture}, layout=layout)
    else:
        shown, _ = chosen.cells(picture, layout.cell_size)
        made = VisualPrompt.from_cells({"query": shown}, layout)
    if bundle:
        image = _strip(painter, bundle, task, made, scale, bool(files))
    else:
        image = to_pil(painter.generate(made)[0]) if painter else made.picture()
    write_picture(output, image.save)
    wrote(output)


@app.command(
    cls=ListingCommand,
    rich_help_panel=PROMPTS,
    epilog="Example: vtv layouts tiny --data scenes --prompts 100 -o layouts.csv",
)
def layouts(
    source: Source,
    output: Output,
    data: Data = Settings.data,
    images: Images = None,
    split: Annotated[str, typer.Option(help='The split of the data: "train", "validation" or "test".')] = "test",
    prompts: Annotated[int, typer.Option("--prompts", "--n", min=1, help="Prompts to segment.")] = 100,
    colours: Annotated[
        str,
        typer.Option(
            help="Looks of the masks, with commas between them: segmentation tasks, such as "
            "'segmentation(black, white)' or 'segmentation(fill=edges)'.",
            show_default="white on black, and yellow on purple",
        ),
    ] = "",
    ensemble: Annotated[
        str, typer.Option(help="How the layouts' answers are made one: softmax, logits, product or maximum.")
    ] = "softmax",
    seed: Seed = Settings.seed,
    vqgan: VQGAN = None,
    embedding_type: EmbeddingType = None,
    dtype: DType = None,
    device: Device = None,
) -> None:
    """Segment the same queries in both orders of a prompt, in several colours, and in both orders at once (VP §4.4).

    Prints mean IoUs and writes those of every prompt.
    """
    import pandas as pd

    from vtv_nnsight.data import load
    from vtv_nnsight.files import write_text
    from vtv_nnsight.runs import steps
    from vtv_nnsight.studies.prompting import ensembles, prompt_engineering
    from vtv_nnsight.tasks import Segmentation, get_all

    if ensemble not in ensembles.RULES:
        raise ValueError(f"--ensemble {ensemble} is unknown; choose from {', '.join(ensembles.RULES)}.")
    looks = {task.name: task for task in get_all(colours)} if colours else prompt_engineering.COLOURS
    if others := [name for name, task in looks.items() if not isinstance(task, Segmentation)]:
        raise ValueError(f"--colours {others[0]} is not a segmentation task.")
    settings = settings_of(images, data, None, model=source, test_prompts=prompts, seed=seed)
    model = steps.load_model(source, vqgan, device, embedding_type=embedding_type, dtype=dtype)
    rows = load(settings.data, split, 2 * prompts, seed)
    steps.servable(settings_of(images, data, "segmentation"), rows)
    scores = prompt_engineering.compare(model, rows, prompts, seed, tasks=looks, rule=ensemble)
    say(prompt_engineering.table(scores))
    columns = {f"{layout}, {look}": values.tolist() for (layout, look), values in scores.items()}
    write_text(output, pd.DataFrame(columns).to_csv(index_label="prompt", lineterminator="\n"))
    wrote(output)


def _strip(model: Any, bundle: Any, task: str, prompt: Any, scale: float, example: bool) -> Any:
    """The example, the query, and its answers, one beside the other."""
    import torch

    from vtv_nnsight.images import strip
    from vtv_nnsight.patching.forward import generate_with_gates

    vector, patches = bundle[task]
    gates = torch.tensor([0.0, scale])[:, None] * patches.choices
    nothing, patched = generate_with_gates(model, prompt, vector, patches.space, gates)
    shown = {"query": prompt.region("query")[0]}
    if example:
        with torch.no_grad():
            one_shot = model.generate(prompt).answer[0].cpu()
        shown = {"example": prompt.region("example_input")[0], "its answer": prompt.region("example_output")[0]} | shown
        shown["one-shot"] = one_shot
    return strip(shown | {"nothing": nothing, f"task vector, scale {scale:g}": patched})


def _as_they_are(example_input: Any, example_output: Any, query: Any, layout: Any) -> Any:
    """The prompt whose cells are these pictures, resized."""
    from vtv_nnsight.prompts import VisualPrompt

    return VisualPrompt.from_cells(
        {"example_input": example_input, "example_output": example_output, "query": query}, layout
    )
