"""`vtv pretrain`: models of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtv_nnsight.cli import options
from vtv_nnsight.cli.group import app
from vtv_nnsight.cli.output import wrote
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.training import pretrain as train


@app.command(
    epilog="Examples: vtv pretrain tokenizer --config tiny --out runs/tiny\n\n"
    "vtv pretrain mae --config tiny --out runs/tiny --resume\n\nvtv pretrain mae --data my-figures --out runs/tiny"
)
def pretrain(
    stage: Annotated[
        str,
        typer.Argument(
            help='"tokenizer", then "mae"; beside it, "decoder" lets the tokenizer draw better.',
            metavar="tokenizer|decoder|mae",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder; each stage has its own in it.")],
    config: Annotated[str, typer.Option(help='"tiny" (the embedded model), "small", "published" or "smoke".')] = "tiny",
    images: Annotated[
        Path | None,
        typer.Option(
            help="A corpus (see docs/gather_corpus.py) or a folder of pictures to train on beside the scenes.",
            show_default="the photographs that scikit-image and scikit-learn carry",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="For mae: a folder of your own figures, or cvf:ROOT, VP's by their list, in which parts are hidden at "
            "random.",
            show_default="prompts",
        ),
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="For mae: a model of the same size to begin with, by its name or folder.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps to do.", show_default="the config's")
    ] = None,
    decay: Annotated[
        int | None,
        typer.Option(min=1, help="Last steps, over which the rates fall to zero.", show_default="the config's"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    seed: options.Seed = Settings.seed,
    device: Annotated[
        str | None, typer.Option(help="Where the model is trained, such as cuda.", show_default="the first GPU, or cpu")
    ] = None,
) -> None:
    """Train a MAE-VQGAN of your own: its tokenizer, then its transformer."""
    keywords: dict[str, Any] = dict(images=images, data=data, start=start, steps=steps, decay=decay)
    wrote(train(stage, config, out, resume=resume, seed=seed, device=device, **keywords))
