"""`vtv collect`: the first steps of `vtv run`, by the same functions."""

from __future__ import annotations

import typer

from vtv_nnsight.cli import options
from vtv_nnsight.cli.group import app
from vtv_nnsight.cli.output import wrote
from vtv_nnsight.data import load
from vtv_nnsight.runs import steps
from vtv_nnsight.runs.settings import Settings


@app.command(
    epilog="Example: vtv collect tiny --data scenes --tasks segmentation,lowlight --prompts 100 -o vectors.safetensors"
)
def collect(
    ctx: typer.Context,
    source: options.Source,
    output: options.Output,
    tasks: options.Tasks = None,
    data: options.Data = Settings.data,
    images: options.Images = None,
    split: options.Split = "train",
    max_images: options.MaxImages = Settings.max_images,
    prompts: options.Prompts = Settings.prompts,
    candidates: options.Candidates = Settings.candidates,
    sites: options.Sites = None,
    order: options.Order = Settings.order,
    seed: options.Seed = Settings.seed,
    batch_size: options.BatchSize = None,
    vqgan: options.VQGAN = None,
    embedding_type: options.EmbeddingType = None,
    dtype: options.DType = None,
    device: options.Device = None,
) -> None:
    """Collect task vectors: the mean activation of every head (or MLP, …: --sites) at every position, task by task."""
    settings = options.settings_of(ctx, model=source)
    setup = steps.set_up(settings, device, batch_size, dtype)
    rows = load(settings.data, split, max_images, seed)
    prompts_by_task = {task.name: steps.select(setup, task, rows) for task in steps.servable(settings, rows)}
    steps.collect(setup, prompts_by_task).save(output)
    wrote(output)
