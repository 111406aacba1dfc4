"""`vtv info` and `vtv convert`: models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vtv_nnsight.cli.app import MODEL, VQGAN, Source, app, given, wrote


@app.command(rich_help_panel=MODEL, epilog="Example: vtv info checkpoint-3400.pth --vqgan last.ckpt")
def info(source: Source, vqgan: VQGAN = None) -> None:
    """Show a model's sizes, its parameters, and where its tokenizer comes from. Reads no weights."""
    from rich.table import Table

    from vtv_nnsight.models.mae_vqgan.tracing import MAEVQGAN

    model = MAEVQGAN(source, **given(vqgan=vqgan))._module
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
    table = Table(title=f"{escape(source)}: canvas {size}x{size}, patches {patch}x{patch}")
    table.add_column("part")
    table.add_column("what it is")
    table.add_column("parameters", justify="right")
    for name, text in rows.items():
        table.add_row(name, text, f"{_parameters(getattr(model, name)):,}")
    table.add_section()
    table.add_row("all", f"tokenizer from {escape(str(vqgan or source))}", f"{_parameters(model):,}")
    Console().print(table)


@app.command(rich_help_panel=MODEL, epilog="Example: vtv convert checkpoint-3400.pth mae-vqgan --vqgan last.ckpt")
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A published .pth file.")],
    out_dir: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    vqgan: VQGAN = None,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads of the encoder; the file does not tell.")] = 16,
    decoder_heads: Annotated[int, typer.Option(min=1, help="Attention heads of the decoder.")] = 16,
) -> None:
    """Write a published checkpoint as a safetensors folder, for from_pretrained and MAEVQGAN."""
    from vtv_nnsight.models.mae_vqgan import checkpoints

    checkpoints.convert(
        checkpoint, out_dir, vqgan, num_attention_heads=heads, decoder_num_attention_heads=decoder_heads
    )
    wrote(out_dir)


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
