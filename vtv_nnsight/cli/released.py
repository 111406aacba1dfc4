"""`vtv import-released`: files of VTV's released code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtv_nnsight.cli import options
from vtv_nnsight.cli.group import app
from vtv_nnsight.cli.output import say, wrote
from vtv_nnsight.files import make_folder
from vtv_nnsight.models.mae_vqgan.traced import MAEVQGAN
from vtv_nnsight.studies import released


@app.command(epilog="Example: vtv import-released checkpoint-3400.pth outputs/ -o imported")
def import_released(
    ctx: typer.Context,
    source: options.Source,
    files: Annotated[
        list[Path], typer.Argument(help="{task}_mean_activations.pkl and bernoullis_*.pkl, or folders that hold them.")
    ],
    output: options.OutputFolder,
    vqgan: options.VQGAN = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Draw the patches from their probabilities with this seed.", show_default="the likely ones"
        ),
    ] = None,
) -> None:
    """Turn files of VTV's released code into vectors.safetensors and patch sets (.json).

    The files are pickles; only tensors and arrays are read from them, and nothing in them is run.
    """
    activations, bernoullis = released.find(dict.fromkeys(files))
    if not bernoullis:
        options.refuse_unused(ctx, "without files of probabilities", "seed")
    model = MAEVQGAN(source, **options.given(vqgan=vqgan))
    sets = {file: released.read_patches(model, file, seed) for file in bernoullis}
    vectors, residuals = released.read_activations(model, activations) if activations else (None, {})
    make_folder(output)
    if vectors is not None:
        for task, residual in residuals.items():
            both = ", ".join(f"{stage} {value:.1e}" for stage, value in residual.items())
            say(f"{task}: {vectors[task].count} prompts, residual {both}")
        vectors.save(output / "vectors.safetensors")
        wrote(output / "vectors.safetensors")
    for file, patches in sets.items():
        patches.save(output / f"{file.stem}.json")
        wrote(output / f"{file.stem}.json")
