"""`vtv collect`, `score`, `search` and `evaluate`, the steps of `vtv run` one at a time, by the same functions and with
the same defaults; and `vtv import-released`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from vtv_nnsight.cli.app import (
    VECTORS,
    VQGAN,
    BatchSize,
    Candidates,
    Data,
    Device,
    DType,
    EmbeddingType,
    Granularity,
    Images,
    ListingCommand,
    Loss,
    MaxImages,
    Order,
    Output,
    Prompts,
    Seed,
    Sites,
    Source,
    Tasks,
    app,
    given,
    listed,
    place_for_file,
    say,
    settings_of,
    wrote,
)
from vtv_nnsight.runs.settings import PUBLISHED, Settings

Split = Annotated[str, typer.Option(help='The split of the data: "train", "validation" or "test".')]
Vectors = Annotated[Path, typer.Option(help="The vectors that `vtv collect` wrote.")]


@app.command(
    cls=ListingCommand,
    rich_help_panel=VECTORS,
    epilog="Example: vtv collect tiny --data scenes --tasks segmentation,lowlight --prompts 100 -o vectors.safetensors",
)
def collect(
    source: Source,
    output: Output,
    tasks: Tasks = None,
    data: Data = Settings.data,
    images: Images = None,
    split: Split = "train",
    max_images: MaxImages = Settings.max_images,
    prompts: Prompts = Settings.prompts,
    candidates: Candidates = Settings.candidates,
    sites: Sites = None,
    order: Order = Settings.order,
    seed: Seed = Settings.seed,
    batch_size: BatchSize = None,
    resume: Annotated[Path | None, typer.Option(help="A file that keeps the state of a long run.")] = None,
    vqgan: VQGAN = None,
    embedding_type: EmbeddingType = None,
    dtype: DType = None,
    device: Device = None,
) -> None:
    """Collect task vectors: the mean activation of every head (or MLP, …: --sites) at every position, task by task."""
    from vtv_nnsight.data import load
    from vtv_nnsight.runs import steps

    settings = settings_of(
        images, data, tasks, model=source, max_images=max_images, prompts=prompts, candidates=candidates, order=order,
        seed=seed, sites=listed(sites),
    )  # fmt: skip
    model = steps.load_model(source, vqgan, device, embedding_type=embedding_type, dtype=dtype)
    layout = steps.layout_for(model, settings)
    rows = load(settings.data, split, max_images, seed)
    chosen = {
        task.name: steps.select(model, task, rows, settings, layout, batch_size)
        for task in steps.servable(settings, rows)
    }
    steps.collect(model, chosen, batch_size, resume, settings.sites).save(output)
    wrote(output)


@app.command(rich_help_panel=VECTORS, epilog="Example: vtv score vectors.safetensors --top 10 --plot scores.png")
def score(
    vectors: Annotated[Path, typer.Argument(help="The vectors that `vtv collect` wrote.")],
    granularity: Granularity = Settings.granularity,
    top: Annotated[int, typer.Option(min=1, help="How many units to print.")] = 10,
    plot: Annotated[Path | None, typer.Option(help="Write layer × head heat maps to this picture.")] = None,
    model: Annotated[str, typer.Option(help="The model that the vectors are of; its sizes are all it takes.")] = "tiny",
    embedding_type: EmbeddingType = None,
) -> None:
    """Rank heads by how well they tell tasks apart: variance between tasks over variance within a task."""
    from vtv_nnsight import plots
    from vtv_nnsight.files import write_picture
    from vtv_nnsight.models import load_model
    from vtv_nnsight.runs import steps

    loaded = steps.read_vectors(vectors)
    space = steps.space_of(loaded, granularity, load_model(model, embedding_type=embedding_type))
    values = steps.score(loaded, space)
    if values is None:
        raise ValueError(f"a score compares tasks and {vectors} has only {', '.join(loaded)}; collect two or more.")
    table = Table(title=Text(f"{', '.join(loaded)}: variance between tasks / within a task"))
    table.add_column("unit")
    table.add_column("score", justify="right")
    for i in values.nan_to_num(-1).argsort(descending=True)[:top].tolist():
        table.add_row(Text(space.names[i]), f"{values[i]:.3f}")
    say(table)
    if plot:
        write_picture(plot, plots.score_map(loaded.score(), space.layout).savefig, dpi=150)
        wrote(plot)


@app.command(
    cls=ListingCommand,
    rich_help_panel=VECTORS,
    epilog="Example: vtv clusters tiny --tasks segmentation,lowlight,colorization -o clusters.png",
)
def clusters(
    source: Source,
    output: Output,
    tasks: Tasks = None,
    data: Data = Settings.data,
    images: Images = None,
    split: Split = "train",
    max_images: MaxImages = Settings.max_images,
    prompts: Prompts = 50,
    region: Annotated[str, typer.Option(help='Where heads are read: "cls", or a cell such as "query".')] = "query",
    top: Annotated[int, typer.Option(min=1, help="Heads to draw, those that tell tasks apart best.")] = 3,
    method: Annotated[str, typer.Option(help='How points are laid out: "pca", or "tsne" (with scikit-learn).')] = "pca",
    order: Order = Settings.order,
    seed: Seed = Settings.seed,
    batch_size: BatchSize = None,
    vqgan: VQGAN = None,
    embedding_type: EmbeddingType = None,
    dtype: DType = None,
    device: Device = None,
) -> None:
    """Draw how prompts cluster by task in the heads that tell tasks apart best (by silhouette)."""
    from vtv_nnsight import plots
    from vtv_nnsight.data import load
    from vtv_nnsight.files import write_picture
    from vtv_nnsight.runs import steps
    from vtv_nnsight.studies import clusters as found

    settings = settings_of(images, data, tasks, model=source, prompts=prompts, order=order, seed=seed)
    model = steps.load_model(source, vqgan, device, embedding_type=embedding_type, dtype=dtype)
    layout = steps.layout_for(model, settings)
    rows = load(settings.data, split, max_images, seed)
    asked = {task.name: task.prompts(rows, prompts, seed, layout) for task in steps.servable(settings, rows)}
    heads = found.activations(model, asked, region, batch_size=batch_size)
    widths = {stage: own for stage, own in found.silhouettes(heads).items() if own is not None}
    ranked = sorted(
        ((own[layer, head].item(), stage, layer, head)
         for stage, own in widths.items() for layer in range(own.shape[0]) for head in range(own.shape[1])),
        reverse=True,
    )[:top]  # fmt: skip
    for width, stage, layer, head in ranked:
        say(f"{stage} layer {layer}, head {head} at {region}: silhouette {width:.3f}")
    for i, (_, stage, layer, head) in enumerate(ranked):
        path = output if len(ranked) == 1 else output.with_stem(f"{output.stem}_{i + 1}")
        write_picture(path, plots.projection(heads, stage, layer, head, method).savefig, dpi=150)
        wrote(path)


@app.command(
    cls=ListingCommand,
    rich_help_panel=VECTORS,
    epilog="Examples: vtv search tiny --algorithm reinforce --tasks segmentation --vectors vectors.safetensors "
    "--budget 20000 -o segmentation.safetensors\n\n"
    "vtv search tiny --algorithm gates --tasks segmentation,lowlight --vectors vectors.safetensors -o both.json",
)
def search(
    source: Source,
    vectors: Vectors,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", callback=place_for_file,
            help="The result (.safetensors), or its patch set alone (.json).",
        ),
    ],
    algorithm: Annotated[
        str,
        typer.Option(
            "--algorithm", "--search",
            help="How to search: {algorithms}, or published (the paper's own).",
        ),
    ] = Settings.search,
    task: Annotated[
        str,
        typer.Option("--tasks", "--task", help="A task; with several, commas between them, one set is to serve all."),
    ] = "segmentation",
    recipe: Annotated[str | None, typer.Option(help='"published" makes reinforce the paper\'s.')] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1, help="Evaluations to spend, one mask on one prompt each.",
            show_default=f"{Settings.budget}; the paper's with published",
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=0, help="Units in the set, for attribution, mediation, ranking and random.", show_default="searched for"
        ),
    ] = None,
    loss: Loss = Settings.loss,
    granularity: Granularity = Settings.granularity,
    stages: Annotated[
        str | None,
        typer.Option(help="Stages to patch, with commas between them.", show_default="all of the model's"),
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(
            help='What of a layer is patched, with commas between them: "heads", "attn", "mlp", "residual", of those '
            "that were collected.",
            show_default="all that the vectors have",
        ),
    ] = None,
    data: Data = Settings.data,
    images: Images = None,
    split: Split = "train",
    max_images: MaxImages = Settings.max_images,
    prompts: Annotated[
        int, typer.Option("--prompts", "--n", min=1, help="Prompts per task; a quarter of them is held out.")
    ] = Settings.prompts,
    candidates: Candidates = Settings.candidates,
    order: Order = Settings.order,
    seed: Seed = Settings.seed,
    batch_size: BatchSize = None,
    resume: Annotated[Path | None, typer.Option(help="A file that keeps what a long run has learnt.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A folder for pictures of the search and of what it found.")] = None,
    vqgan: VQGAN = None,
    embedding_type: EmbeddingType = None,
    dtype: DType = None,
    device: Device = None,
) -> None:  # fmt: skip
    """Search for the units to patch so that the model does a task with no examples."""
    from vtv_nnsight.data import load
    from vtv_nnsight.files import write_picture
    from vtv_nnsight.patching import PatchSpace
    from vtv_nnsight.runs import steps
    from vtv_nnsight.search import ALGORITHMS, plots

    if algorithm not in (*ALGORITHMS, "published"):
        raise ValueError(f"{algorithm!r} is not an algorithm; choose from {', '.join(ALGORITHMS)}, or published.")
    published = "published" in (algorithm, recipe)
    settings = settings_of(
        images, data, task, {"budget": None} if published else None, model=source, max_images=max_images,
        prompts=prompts, candidates=candidates, order=order, seed=seed, loss=loss, granularity=granularity,
        search=algorithm, budget=budget, sites=listed(sites),
    )  # fmt: skip
    loaded = steps.read_vectors(vectors, settings.tasks, settings.sites if sites else ())
    model = steps.load_model(source, vqgan, device, embedding_type=embedding_type, dtype=dtype)
    layout = steps.layout_for(model, settings)
    rows = load(settings.data, split, max_images, seed)
    chosen = steps.servable(settings, rows)
    patched = settings.sites if sites else loaded.sites
    space = PatchSpace(model, layout, granularity, listed(stages), patched)
    result = steps.search(
        model,
        loaded,
        chosen,
        [steps.select(model, one, rows, settings, layout, batch_size) for one in chosen],
        space,
        settings,
        batch_size=batch_size,
        resume=resume,
        **given(recipe=recipe, size=size),
    )
    say(str(result))
    (result.patches if output.suffix == ".json" else result).save(output)
    wrote(output)
    if plot:
        plot.mkdir(parents=True, exist_ok=True)
        figures = {"curve.png": plots.curves({algorithm: result})}
        if granularity != "token":
            figures["units.png"] = plots.score_maps(result)
        for name, figure in figures.items():
            write_picture(plot / name, figure.savefig, dpi=150)
            wrote(plot / name)


@app.command(
    cls=ListingCommand,
    rich_help_panel=VECTORS,
    epilog="Examples: vtv evaluate tiny --tasks segmentation,lowlight --data scenes --prompts 100 -o results\n\n"
    "vtv evaluate tiny --tasks segmentation --vectors vectors.safetensors --patches segmentation.json -o results",
)
def evaluate(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder for tables, values and pictures.")],
    tasks: Tasks = "segmentation",
    vectors: Annotated[Path | None, typer.Option(help="The vectors that `vtv collect` wrote.")] = None,
    patches: Annotated[
        Path | None, typer.Option(help="Where to patch: a patch set (.json) or a search result (.safetensors).")
    ] = None,
    data: Data = Settings.data,
    images: Images = None,
    split: Split = "test",
    max_images: Annotated[
        int | None,
        typer.Option(min=1, help="The most pictures to draw prompts from.", show_default="two per prompt"),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            "--prompts", "--n", "--test-prompts", min=1, help="Prompts per task to evaluate on.",
            show_default=f"{Settings.test_prompts}; {PUBLISHED['test_prompts']} with --published",
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE", help="Another model, on the same prompts, as many times as there are models: of another "
            "kind, too, such as facebook/vit-mae-large.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Score answers by another metric: mse, lpips (with the extra of that name), or for VP's reasoning "
            "tasks color_blind_iou or shape_accuracy.",
            show_default="each task's own",
        ),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="On pascal:ROOT, evaluate as both papers' released code does: in each fold, the pictures of its list "
            "in their order as queries; then the mean over folds.",
        ),
    ] = False,
    order: Order = Settings.order,
    seed: Seed = Settings.seed,
    batch_size: BatchSize = None,
    vqgan: VQGAN = None,
    embedding_type: EmbeddingType = None,
    dtype: DType = None,
    device: Device = None,
) -> None:  # fmt: skip
    """Compare one-shot, zero-shot and, with vectors and patches, task vectors, on the same prompts.

    Writes table.md, table.csv, values.parquet and a picture of the first answers for every task; of several models in a
    folder for each, and models.md with all of them.
    """
    from dataclasses import replace

    from vtv_nnsight.evaluation import Table as Evaluations
    from vtv_nnsight.files import write_text
    from vtv_nnsight.runs import steps
    from vtv_nnsight.tasks import scored_by
    from vtv_nnsight.vectors import TaskVectors

    if (vectors is None) != (patches is None):
        raise ValueError("--vectors and --patches go together; give both or neither.")
    others = beside or []
    if others and vectors:
        raise ValueError("--vectors are of one model; leave them out, or --beside.")
    preset = {name: PUBLISHED[name] for name in ("protocol", "test_prompts")} if published else None
    settings = settings_of(images, data, tasks, preset, model=source, test_prompts=prompts, order=order, seed=seed)
    units = _patches(patches) if patches else None
    sites = () if units is None else getattr(units.space, "sites", ())  # of a space that is no model's there are none
    loaded = steps.read_vectors(vectors, settings.tasks, sites) if vectors else None
    folds = steps.folds_to_test(settings, split, max_images)
    asked = steps.servable(settings, folds[0][1])
    chosen = [scored_by(task, metric) if metric else task for task in asked]
    if loaded and metric:  # they are named as the tasks were without it
        names = {task.name: scored.name for task, scored in zip(asked, chosen)}
        renamed = [replace(vector, task=names.get(name, name)) for name, vector in loaded.items()]
        loaded = TaskVectors({vector.task: vector for vector in renamed})
    tables = {}
    for name in dict.fromkeys([source, *others]):
        own = dict(vqgan=vqgan, embedding_type=embedding_type) if name == source else {}
        model = steps.load_model(name, device=device, dtype=dtype, **own)
        layout = steps.layout_for(model, settings)
        tables[name] = Evaluations.cat(
            [
                steps.evaluate(model, task, rows, settings, layout, loaded, units, fold, batch_size=batch_size)
                for task in chosen
                for fold, rows in folds
            ]
        )
    if len(tables) == 1:
        _write_evaluation(tables[source], chosen, output)
        return
    for i, (name, table) in enumerate(tables.items()):
        say(name)
        _write_evaluation(table, chosen, output / f"{i}_{re.sub(r'[^A-Za-z0-9.-]+', '-', Path(name).name)}")
    beside_one_another = _models(tables)
    say(beside_one_another)
    write_text(output / "models.md", beside_one_another + "\n")
    wrote(output / "models.md")


def _write_evaluation(table: Any, chosen: Sequence[Any], output: Path) -> None:
    """Print a table of evaluations and what it says, and write it in every form."""
    from vtv_nnsight import plots
    from vtv_nnsight.evaluation import verdicts
    from vtv_nnsight.files import write_picture, write_text

    said = verdicts(table)
    say("\n".join([str(table), "", *said]).strip())
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "table.md", "\n\n".join([table.markdown(), *said]) + "\n")
    table.to_csv(output / "table.csv")
    table.to_parquet(output / "values.parquet")
    written = ["table.md", "table.csv", "values.parquet"]
    for task in chosen:
        write_picture(output / f"{task.name}.png", plots.answers(table, task.name).savefig, dpi=150)
        written.append(f"{task.name}.png")
    for name in written:
        wrote(output / name)


def _models(tables: Mapping[str, Any]) -> str:
    """Several models' scores under every condition, as Markdown: a row for each task and model."""
    import pandas as pd

    rows = []
    for name, table in tables.items():
        labels = table.frame.groupby("task", sort=False)[["label", "metric"]].first()
        for line in table.lines():
            if line.measure == labels.metric[line.task]:
                score = f"{line.mean:.3f} [{line.low:.3f}, {line.high:.3f}]"
                rows.append((f"{line.task}, {labels.label[line.task]}", name, line.condition, score))
    frame = pd.DataFrame(rows, columns=["task", "model", "condition", "score"])
    conditions = list(dict.fromkeys(frame.condition))
    order = list(dict.fromkeys(zip(frame.task, frame.model)))
    wide = frame.pivot(index=["task", "model"], columns="condition", values="score").loc[sorted(order), conditions]
    return wide.fillna("").reset_index().to_markdown(index=False, disable_numparse=True)


def _patches(path: Path) -> Any:
    """The patch set in a file of its own, or in a search result."""
    from vtv_nnsight.patching import PatchSet

    if path.suffix != ".safetensors":
        return PatchSet.load(path)
    from vtv_nnsight.search.result import SearchResult

    return SearchResult.load(path).patches


@app.command(
    "import-released",
    rich_help_panel=VECTORS,
    epilog="Example: vtv import-released checkpoint-3400.pth outputs/ -o imported",
)
def import_released(
    source: Source,
    files: Annotated[
        list[Path], typer.Argument(help="{task}_mean_activations.pkl and bernoullis_*.pkl, or folders that hold them.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write in.")],
    vqgan: VQGAN = None,
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
    from vtv_nnsight.models.mae_vqgan.traced import MAEVQGAN
    from vtv_nnsight.studies import released

    activations, bernoullis = released.find(files)
    model = MAEVQGAN(source, **given(vqgan=vqgan))
    sets = {file: released.read_patches(model, file, seed) for file in bernoullis}
    vectors, residuals = released.read_activations(model, activations) if activations else (None, {})
    output.mkdir(parents=True, exist_ok=True)
    for task, residual in residuals.items():
        both = ", ".join(f"{stage} {value:.1e}" for stage, value in residual.items())
        say(f"{task}: {vectors[task].count} prompts, residual {both}")
    if vectors is not None:
        vectors.save(output / "vectors.safetensors")
        wrote(output / "vectors.safetensors")
    for file, patches in sets.items():
        patches.save(output / f"{file.stem}.json")
        wrote(output / f"{file.stem}.json")
