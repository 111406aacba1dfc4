"""`vtv info` and `vtv convert`: models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from vtv_nnsight.cli import options
from vtv_nnsight.cli.group import app
from vtv_nnsight.cli.output import say, wrote
from vtv_nnsight.models import load_model
from vtv_nnsight.models.interface import CanvasModel, InContextModel
from vtv_nnsight.models.mae_vqgan import published
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.search import PIXELS


@app.command(epilog="Examples: vtv info checkpoint-3400.pth --vqgan last.ckpt\n\nvtv info BAAI/seggpt-vit-large")
def info(source: options.Source, vqgan: options.VQGAN = None) -> None:
    """Show a model's sizes, parameters, losses and units, and what a task's vectors take on disk. Reads no weights."""
    model: Any = load_model(source, vqgan=vqgan)
    of_pictures = isinstance(model, CanvasModel)
    if of_pictures:
        size, patch = model.layout.canvas_size, model.layout.patch_size
        sizes = f"canvas {size}x{size}, patches {patch}x{patch}"
    else:
        sizes = f"{model.identity()['architecture']}, vocabulary of {len(model.tokenizer):,}"
    table = Table(title=f"{type(model).__name__}, {sizes}", caption=escape(source))
    table.add_column("part")
    table.add_column("what it is")
    table.add_column("parameters", justify="right")
    parts = dict(model.network.named_children())
    stages = {s.name: f"{s.layers} layers of width {s.width}, {s.heads} heads" for s in model.stages}
    for name in {**parts, **stages}:
        table.add_row(name, stages.get(name, ""), f"{_parameters(parts[name]):,}" if name in parts else "")
    table.add_section()
    origin = f"tokenizer from {escape(str(vqgan or source))}" if "vqgan" in parts else ""
    table.add_row("all", origin, f"{_parameters(model):,}")
    table.add_section()
    table.add_row("losses", ", ".join([loss.name for loss in model.losses] + [PIXELS] * of_pictures))
    if model.stages:
        table.add_row("units", f"{len(PatchSpace(model))} by {model.layout.REGION}")
        table.add_row("a task's vectors", f"{_vector_bytes(model) / 1e6:.3g} MB on disk")
    say(table)


@app.command(epilog="Example: vtv convert checkpoint-3400.pth mae-vqgan --vqgan last.ckpt")
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A published .pth file.")],
    out_dir: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    vqgan: options.VQGAN = None,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads of the encoder; the file does not tell.")] = 16,
    decoder_heads: Annotated[int, typer.Option(min=1, help="Attention heads of the decoder.")] = 16,
) -> None:
    """Write a published checkpoint as a safetensors folder, for from_pretrained and MAEVQGAN."""
    published.convert(checkpoint, out_dir, vqgan, num_attention_heads=heads, decoder_num_attention_heads=decoder_heads)
    wrote(out_dir)


def _vector_bytes(model: InContextModel) -> int:
    """The size of what `TaskVectors.save` writes of a task: a mean and a variance of every head at every position that
    one-shot prompts show, or at the last token of a text, in float32."""
    positions = dict.fromkeys((stage.name for stage in model.stages), 1)
    if isinstance(model, CanvasModel):
        size = model.layout.canvas_size
        prompt = VisualPrompt.from_canvas(torch.zeros(1, 3, size, size), model.layout)
        positions = {stage.name: len(model.positions(stage.name, prompt)) for stage in model.stages}
    return sum(4 * s.layers * positions[s.name] * s.heads * (s.head_dim + 1) for s in model.stages)


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
