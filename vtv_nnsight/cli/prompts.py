"""`vtv prompt`: one prompt of picture files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from vtv_nnsight.cli.app import PROMPTS, VQGAN, DType, EmbeddingType, Order, app, wrote


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
        Path | None, typer.Option(help="The mask of a single example (0 and 255), for tasks that ask for masks.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Paint the output with this model (as SOURCE of `vtv info`).", metavar="SOURCE")
    ] = None,
    vqgan: VQGAN = None,
    embedding_type: EmbeddingType = None,
    dtype: DType = None,
    order: Order = "vertical",
) -> None:
    """Make a visual prompt of picture files; with --model, paint its output.

    Without a model the prompt itself is saved, the hidden patches dimmed.
    """
    from dataclasses import replace

    from vtv_nnsight import tasks
    from vtv_nnsight.images import to_pil
    from vtv_nnsight.layouts import Layout
    from vtv_nnsight.models import load_model

    chosen = tasks.get(task)
    if len(example) > 2:
        raise ValueError(f"--example names {len(example)} files; give an input and its output, or one picture.")
    if mask is not None and len(example) == 2:
        raise ValueError("--mask goes with a single --example file; with two, the second file is the answer.")
    painter = load_model(model, vqgan=vqgan, embedding_type=embedding_type, dtype=dtype) if model else None
    layout = replace(painter.layout if painter else Layout(), order=order)
    picture = _open(query)
    if len(example) == 2:
        made = _as_they_are(*map(_open, example), picture, layout)
    else:
        row = {"image": _open(example[0])} | ({"mask": _open(mask)} if mask else {})
        made = chosen.prompt(example=row, query={"image": picture}, layout=layout)
    image = to_pil(painter.generate(made)[0]) if painter else made.picture()
    image.save(output)
    wrote(output)


def _as_they_are(example_input: Any, example_output: Any, query: Any, layout: Any) -> Any:
    """The prompt whose cells are these pictures, resized."""
    from vtv_nnsight.images import as_rgb, resize, to_tensor
    from vtv_nnsight.prompts import VisualPrompt

    pictures = {"example_input": example_input, "example_output": example_output, "query": query}
    cells = {name: to_tensor(resize(as_rgb(image), layout.cell_size)) for name, image in pictures.items()}
    return VisualPrompt.from_cells(cells, layout)


def _open(path: Path) -> Any:
    """A picture file, decoded."""
    import warnings

    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels, and is not opened; make it smaller."
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}.") from error
    return image
