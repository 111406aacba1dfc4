"""`vtv`: the library from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

MODEL, PROMPTS, TRAINING = "Model", "Prompts", "Training"
"""The steps that commands are grouped by in the help."""


class Commands(TyperGroup):
    """Takes `--debug` anywhere, and says what a user did wrong in one sentence."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        return super().parse_args(ctx, sorted(args, key=lambda arg: arg != "--debug"))

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError) as error:
            if ctx.params["debug"]:
                raise
            Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


class ExampleCommand(TyperCommand):
    """Reads `--example IN OUT` as `--example IN --example OUT`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        spread: list[str] = []
        for arg in args:
            follows = len(spread) > 1 and spread[-2] == "--example" and not arg.startswith("-")
            spread += ["--example", arg] if follows else [arg]
        return super().parse_args(ctx, spread)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[
    str,
    typer.Argument(
        help='"tiny" (embedded), a folder written by `vtv convert` or save_pretrained, a Hub id, or a published .pth.'
    ),
]
VQGAN = Annotated[
    Path | None,
    typer.Option(help="The tokenizer's own checkpoint (taming-transformers' last.ckpt), for a .pth that has none."),
]


@app.callback()
def vtv(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Find, inspect and use visual task vectors in MAE-VQGAN."""


@app.command(rich_help_panel=MODEL, epilog="Example: vtv info checkpoint-3400.pth --vqgan last.ckpt")
def info(source: Source, vqgan: VQGAN = None) -> None:
    """Show a model's sizes, its parameters, and where its tokenizer comes from. Reads no weights."""
    from rich.table import Table

    from vtv_nnsight.tracing import MAEVQGAN

    model = MAEVQGAN(source, **_given(vqgan=vqgan))._module
    config = model.config
    levels = ", ".join(str(config.vqgan_channels * m) for m in config.vqgan_channel_multipliers)
    rows = {
        "encoder": f"{config.num_hidden_layers} blocks of width {config.hidden_size}, "
        f"{config.num_attention_heads} heads",
        "decoder": f"{config.decoder_num_hidden_layers} blocks of width {config.decoder_hidden_size}, "
        f"{config.decoder_num_attention_heads} heads",
        "vqgan": f"{config.num_codes} codes of width {config.code_dim}; levels of {levels} channels",
    }
    size, patch = config.image_size, config.patch_size
    table = Table(title=f"{source}: canvas {size}x{size}, patches {patch}x{patch}")
    table.add_column("part")
    table.add_column("what it is")
    table.add_column("parameters", justify="right")
    for name, text in rows.items():
        table.add_row(name, text, f"{_parameters(getattr(model, name)):,}")
    table.add_section()
    table.add_row("all", f"tokenizer from {vqgan or source}", f"{_parameters(model):,}")
    Console().print(table)


@app.command(rich_help_panel=MODEL, epilog="Example: vtv convert checkpoint-3400.pth mae-vqgan --vqgan last.ckpt")
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A published .pth.")],
    out_dir: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    vqgan: VQGAN = None,
    heads: Annotated[int, typer.Option(help="Attention heads of the encoder; the file does not tell.")] = 16,
    decoder_heads: Annotated[int, typer.Option(help="Attention heads of the decoder.")] = 16,
) -> None:
    """Write a published checkpoint as a safetensors folder, for from_pretrained and MAEVQGAN."""
    from vtv_nnsight.model import checkpoints

    checkpoints.convert(
        checkpoint, out_dir, vqgan, num_attention_heads=heads, decoder_num_attention_heads=decoder_heads
    )
    _wrote(out_dir)


@app.command(
    cls=ExampleCommand,
    rich_help_panel=PROMPTS,
    epilog="Examples: vtv prompt --model tiny --task segmentation --example cat.jpg cat_mask.png --query dog.jpg "
    "-o out.png\n\nvtv prompt --task colorization --example cat.jpg --query dog.jpg -o prompt.png",
)
def prompt(
    query: Annotated[Path, typer.Option(help="The picture to answer.")],
    example: Annotated[
        list[Path],
        typer.Option(
            metavar="IN [OUT]",
            help="Two files fill the example's cells as they are, and the query its cell. With one file the task makes "
            "input and output of it, and corrupts the query alike.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the picture is written.")],
    task: Annotated[str, typer.Option(help="A task, or several joined by '+'.")] = "identity",
    mask: Annotated[
        Path | None, typer.Option(help="Mask of a single example (0 and 255), for tasks that ask for masks.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Paint the output with this model (as SOURCE of `vtv info`).", metavar="SOURCE")
    ] = None,
    vqgan: VQGAN = None,
    order: Annotated[str, typer.Option(help='"vertical", or "horizontal" for inputs above outputs.')] = "vertical",
) -> None:
    """Make a visual prompt of picture files; with --model, paint its output.

    Without a model the prompt itself is saved, the hidden patches dimmed.
    """
    from dataclasses import replace

    from vtv_nnsight import tasks
    from vtv_nnsight.images import to_pil
    from vtv_nnsight.layouts import Layout
    from vtv_nnsight.tracing import MAEVQGAN

    chosen = tasks.get(task)
    if len(example) > 2:
        raise ValueError(f"--example names {len(example)} files; give an input and its output, or one picture.")
    if mask is not None and len(example) == 2:
        raise ValueError("--mask goes with a single --example file; with two, the second file is the answer.")
    painter = MAEVQGAN(model, **_given(vqgan=vqgan)) if model else None
    layout = replace(painter.layout if painter else Layout(), order=order)
    picture = _open(query)
    if len(example) == 2:
        made = _as_they_are(*map(_open, example), picture, layout)
    else:
        row = {"image": _open(example[0])} | ({"mask": _open(mask)} if mask else {})
        made = chosen.prompt(example=row, query={"image": picture}, layout=layout)
    image = to_pil(painter.generate(made)[0]) if painter else made.picture()
    image.save(output)
    _wrote(output)


def main() -> None:
    app()


@app.command(
    rich_help_panel=TRAINING,
    epilog="Examples: vtv pretrain tokenizer --config tiny --out runs/tiny\n\n"
    "vtv pretrain mae --config tiny --out runs/tiny --resume",
)
def pretrain(
    stage: Annotated[str, typer.Argument(help='"tokenizer" first, then "mae".', metavar="tokenizer|mae")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the stages go in tokenizer/ and mae/.")],
    config: Annotated[str, typer.Option(help='"tiny" (the embedded model), "small", "published" or "smoke".')] = "tiny",
    images: Annotated[
        Path | None, typer.Option(help="Pictures to train on beside the generated scenes, instead of the photographs "
        "that scikit-image and scikit-learn carry.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, in place of the config's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str | None, typer.Option(help="A torch device; by default the first GPU, or the CPU.")] = None,
) -> None:
    """Train a MAE-VQGAN of your own: its tokenizer, then its transformer."""
    from vtv_nnsight.pretraining import pretrain as run

    _wrote(run(stage, config, out, images=images, steps=steps, resume=resume, seed=seed, device=device))


def _as_they_are(example_input, example_output, query, layout):
    from vtv_nnsight.images import as_rgb, resize, to_tensor
    from vtv_nnsight.prompts import VisualPrompt

    pictures = {"example_input": example_input, "example_output": example_output, "query": query}
    cells = {name: to_tensor(resize(as_rgb(image), layout.cell_size)) for name, image in pictures.items()}
    return VisualPrompt.from_cells(cells, layout)


def _open(path: Path):
    """A picture file, decoded."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}.") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}.") from error
    return image


def _given(**options) -> dict:
    return {name: value for name, value in options.items() if value is not None}


def _parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _wrote(path: Path) -> None:
    Console().print(f"wrote {path}", highlight=False, soft_wrap=True)
