"""`vtv collect`, `vtv score` and `vtv clusters`: the first steps of `vtv run` by the same functions, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from vtv_nnsight.cli import options
from vtv_nnsight.cli.group import app
from vtv_nnsight.cli.output import say, wrote
from vtv_nnsight.data import load
from vtv_nnsight.files import write_picture
from vtv_nnsight.models import load_model
from vtv_nnsight.report import plots
from vtv_nnsight.runs import steps
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.studies.clusters import activations, silhouettes


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
    resume: options.Resume = None,
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
    steps.collect(setup, prompts_by_task, resume).save(output)
    wrote(output)


@app.command(epilog="Example: vtv score vectors.safetensors --top 10 --plot scores.png")
def score(
    vectors: Annotated[Path, typer.Argument(help="The vectors that `vtv collect` wrote.")],
    granularity: options.Granularity = Settings.granularity,
    top: Annotated[int, typer.Option(min=1, help="How many units to print.")] = 10,
    plot: Annotated[
        Path | None, typer.Option(help="Write layer × head heat maps to this picture.", callback=options.place_for_file)
    ] = None,
    model: Annotated[
        str, typer.Option(help="The model that the vectors are of; its sizes are all it takes.")
    ] = Settings.model,
    embedding_type: options.EmbeddingType = None,
) -> None:
    """Rank heads by how well they tell tasks apart: variance between tasks over variance within a task."""
    by_task = steps.read_vectors(vectors)
    space = steps.space_of(by_task, granularity, load_model(model, embedding_type=embedding_type))
    values = steps.score(by_task, space)
    if values is None:
        raise ValueError(f"a score compares tasks and {vectors} has only {', '.join(by_task)}; collect two or more.")
    table = Table(title=Text(f"{', '.join(by_task)}: variance between tasks / within a task"))
    table.add_column("unit")
    table.add_column("score", justify="right")
    for i in values.nan_to_num(-1).argsort(descending=True)[:top].tolist():
        table.add_row(Text(space.names[i]), f"{values[i]:.3f}")
    say(table)
    if plot:
        write_picture(plot, plots.score_map(by_task.score(), space.layout).savefig, dpi=150)
        wrote(plot)


@app.command(epilog="Example: vtv clusters tiny --tasks segmentation,lowlight,colorization -o clusters.png")
def clusters(
    ctx: typer.Context,
    source: options.Source,
    output: options.Output,
    tasks: options.Tasks = None,
    data: options.Data = Settings.data,
    images: options.Images = None,
    split: options.Split = "train",
    max_images: options.MaxImages = Settings.max_images,
    prompts: options.Prompts = 50,
    region: Annotated[str, typer.Option(help='Where heads are read: "cls", or a cell such as "query".')] = "query",
    top: Annotated[int, typer.Option(min=1, help="Heads to draw, those that tell tasks apart best.")] = 3,
    method: Annotated[str, typer.Option(help='How points are laid out: "pca", or "tsne" (with scikit-learn).')] = "pca",
    order: options.Order = Settings.order,
    seed: options.Seed = Settings.seed,
    batch_size: options.BatchSize = None,
    vqgan: options.VQGAN = None,
    embedding_type: options.EmbeddingType = None,
    dtype: options.DType = None,
    device: options.Device = None,
) -> None:
    """Draw how prompts cluster by task in the heads that tell tasks apart best (by silhouette)."""
    settings = options.settings_of(ctx, model=source)
    setup = steps.set_up(settings, device, batch_size, dtype)
    rows = load(settings.data, split, max_images, seed)
    prompts_by_task = {
        task.name: task.prompts(rows, prompts, seed, setup.layout) for task in steps.servable(settings, rows)
    }
    heads = activations(setup.model, prompts_by_task, region, batch_size=batch_size)
    ranked = [
        (width.item(), stage, layer, head)
        for (stage, _), widths in silhouettes(heads).items()
        if widths is not None
        for layer, of_layer in enumerate(widths)
        for head, width in enumerate(of_layer)
    ]
    best = sorted(ranked, reverse=True)[:top]
    for width, stage, layer, head in best:
        say(f"{stage} layer {layer}, head {head} at {region}: silhouette {width:.3f}")
    for i, (_, stage, layer, head) in enumerate(best):
        path = output if len(best) == 1 else output.with_stem(f"{output.stem}_{i + 1}")
        write_picture(path, plots.projection(heads, stage, layer, head, method).savefig, dpi=150)
        wrote(path)
