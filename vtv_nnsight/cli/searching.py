"""`vtv search`: the search of `vtv run`, with the options of its algorithms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtv_nnsight.cli import options
from vtv_nnsight.cli.group import app
from vtv_nnsight.cli.output import say, wrote
from vtv_nnsight.data import load
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.runs import steps
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.search import ALGORITHMS

ResultFile = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        callback=options.place_for_file,
        help="The result (.safetensors), or its patch set alone (.json).",
    ),
]
AlgorithmName = Annotated[str, typer.Option("--algorithm", "--search", help=options.SEARCHES)]
Budget = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Evaluations to spend, one mask on one prompt each.",
        show_default=f"{Settings.budget}; the paper's with published",
    ),
]
CollectedSites = Annotated[
    str | None,
    typer.Option(
        help='What of a layer is patched, with commas between them: "heads", "attn", "mlp", "residual", of those that '
        "were collected.",
        show_default="all that the vectors have",
    ),
]
Prompts = Annotated[
    int, typer.Option("--prompts", "--n", min=1, help="Prompts per task; a quarter of them is held out.")
]


@app.command(
    epilog="Examples: vtv search tiny --algorithm reinforce --tasks segmentation --vectors vectors.safetensors "
    "--budget 20000 -o segmentation.safetensors\n\n"
    "vtv search tiny --algorithm gates --tasks segmentation,lowlight --vectors vectors.safetensors -o both.json"
)
def search(
    ctx: typer.Context,
    source: options.Source,
    vectors: options.Vectors,
    output: ResultFile,
    algorithm: AlgorithmName = Settings.search,
    tasks: options.OneTask = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="With reinforce and published, the one of several tasks that judges, as segmentation does in the "
            "released code.",
            show_default="all alike",
        ),
    ] = None,
    sparsity: options.Sparsity = Settings.sparsity,
    budget: Budget = None,
    loss: options.Loss = Settings.loss,
    granularity: options.Granularity = Settings.granularity,
    sites: CollectedSites = None,
    data: options.Data = Settings.data,
    images: options.Images = None,
    split: options.Split = "train",
    max_images: options.MaxImages = Settings.max_images,
    prompts: Prompts = Settings.prompts,
    candidates: options.Candidates = Settings.candidates,
    order: options.Order = Settings.order,
    seed: options.Seed = Settings.seed,
    batch_size: options.BatchSize = None,
    resume: options.Resume = None,
    vqgan: options.VQGAN = None,
    embedding_type: options.EmbeddingType = None,
    dtype: options.DType = None,
    device: options.Device = None,
) -> None:
    """Search for the units to patch so that the model does a task with no examples; one set for several tasks."""
    if algorithm not in (*ALGORITHMS, "published"):
        raise ValueError(f"{algorithm!r} is not an algorithm; choose from {', '.join(ALGORITHMS)}, or published.")
    preset = {"budget": None} if algorithm == "published" else {}
    settings = options.settings_of(ctx, preset | {"most_tasks": 1}, model=source, search=algorithm)
    by_task = options.read_vectors(vectors, settings.tasks, settings.sites if sites else ())
    setup = steps.set_up(settings, device, batch_size, dtype)
    rows = load(settings.data, split, max_images, seed)
    to_serve = steps.servable(settings, rows, by_task)
    patched = settings.sites if sites else by_task.sites
    space = PatchSpace(setup.model, setup.layout, granularity, sites=patched)
    to_search = [steps.select(setup, task, rows) for task in to_serve]
    result = steps.search(setup, by_task, to_serve, to_search, space, resume=resume, **options.given(judge=judge))
    say(str(result))
    (result.patches if output.suffix == ".json" else result).save(output)
    wrote(output)
