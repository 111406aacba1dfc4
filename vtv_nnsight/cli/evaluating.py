"""`vtv evaluate`: task vectors beside what they are compared with, for one model or several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from datasets import Dataset

from vtv_nnsight import data as sources
from vtv_nnsight.cli import options
from vtv_nnsight.cli.group import app
from vtv_nnsight.cli.output import say, wrote
from vtv_nnsight.evaluation import Table
from vtv_nnsight.files import make_folder, write_picture, write_text
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.report import plots
from vtv_nnsight.report.verdicts import verdicts
from vtv_nnsight.runs import steps
from vtv_nnsight.runs.folds import is_published_detection, is_published_pascal
from vtv_nnsight.runs.resuming import check_files
from vtv_nnsight.runs.settings import PUBLISHED, Settings
from vtv_nnsight.search.result import SearchResult
from vtv_nnsight.tasks import Task

PatchesFile = Annotated[
    Path | None, typer.Option(help="Where to patch: a patch set (.json) or a search result (.safetensors).")
]
MaxImages = Annotated[
    int | None, typer.Option(min=1, help="The most pictures to draw prompts from.", show_default="two per prompt")
]
TestPrompts = Annotated[
    int | None,
    typer.Option(
        "--prompts",
        "--n",
        "--test-prompts",
        min=1,
        help="Prompts per task to evaluate on.",
        show_default=f"{Settings.test_prompts}; {PUBLISHED['test_prompts']} with --published",
    ),
]
Beside = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SOURCE",
        help="Another model, on the same prompts, as many times as there are models: of another kind, too, such as "
        "facebook/vit-mae-large.",
    ),
]
Published = Annotated[
    bool,
    typer.Option(
        "--published",
        help="On pascal:ROOT, evaluate as both papers' released code does: in each fold, the pictures of its list in "
        "their order as queries; then the mean over folds. On detection:ROOT:0.2, the queries of VP's list and its "
        "repeats.",
    ),
]


@app.command(
    epilog="Examples: vtv evaluate tiny --tasks segmentation,lowlight --data scenes --prompts 100 -o results\n\n"
    "vtv evaluate tiny --tasks segmentation --vectors vectors.safetensors --patches segmentation.json -o results"
)
def evaluate(
    ctx: typer.Context,
    source: options.Source,
    output: options.OutputFolder,
    tasks: options.OneTask = None,
    vectors: Annotated[Path | None, typer.Option(help="The vectors that `vtv collect` wrote.")] = None,
    patches: PatchesFile = None,
    data: options.Data = Settings.data,
    images: options.Images = None,
    split: options.Split = "test",
    max_images: MaxImages = None,
    test_prompts: TestPrompts = None,
    beside: Beside = None,
    published: Published = False,
    order: options.Order = Settings.order,
    seed: options.Seed = Settings.seed,
    batch_size: options.BatchSize = None,
    vqgan: options.VQGAN = None,
    embedding_type: options.EmbeddingType = None,
    dtype: options.DType = None,
    device: options.Device = None,
) -> None:
    """Compare one-shot, zero-shot and, with vectors and patches, task vectors, on the same prompts.

    Writes table.md, table.csv, values.parquet and a picture of the first answers for every task; of several models in a
    folder for each, and models.md with all of them.
    """
    if (vectors is None) != (patches is None):
        raise ValueError("--vectors and --patches go together; give both or neither.")
    if beside and vectors:
        raise ValueError("--vectors are of one model; leave them out, or --beside.")
    preset = {name: PUBLISHED[name] for name in ("protocol", "test_prompts")} if published else {}
    settings = options.settings_of(ctx, preset | {"most_tasks": 1}, model=source)
    if is_published_pascal(settings):
        options.refuse_unused(ctx, "with --published on Pascal, where all pictures count", "max_images")
    units = _patches(patches) if patches else None
    sites = () if units is None else getattr(units.space, "sites", ())  # of a space that is no model's there are none
    by_task = options.read_vectors(vectors, settings.tasks, sites) if vectors else None
    folds = _folds(settings, split, max_images)
    to_evaluate = steps.servable(settings, folds[0][1], by_task)
    tables = {}
    for name in dict.fromkeys([source, *(beside or [])]):
        other = replace(settings, model=name, vqgan=None, embedding_type=None)
        setup = steps.set_up(settings if name == source else other, device, batch_size, dtype)
        tables[name] = Table.cat(
            [steps.evaluate(setup, task, rows, by_task, units, fold) for task in to_evaluate for fold, rows in folds]
        )
    if len(tables) == 1:
        _write_table(tables[source], to_evaluate, output)
    else:
        _write_tables(tables, to_evaluate, output)


def _write_tables(tables: Mapping[str, Table], tasks: Sequence[Task], output: Path) -> None:
    """Write the evaluations of several models, each in a folder, and one table of them all."""
    make_folder(output)
    for i, (name, table) in enumerate(tables.items()):
        say(name)
        _write_table(table, tasks, output / f"{i}_{re.sub(r'[^A-Za-z0-9.-]+', '-', Path(name).name)}")
    comparison = _models(tables)
    say(comparison)
    write_text(output / "models.md", comparison + "\n")
    wrote(output / "models.md")


def _write_table(table: Table, tasks: Sequence[Task], output: Path) -> None:
    """Print a table of evaluations and what it says, and write it in every form."""
    said = verdicts(table)
    say("\n".join([str(table), "", *said]).strip())
    make_folder(output)
    write_text(output / "table.md", "\n\n".join([table.markdown(), *said]) + "\n")
    table.to_csv(output / "table.csv")
    table.to_parquet(output / "values.parquet")
    written = ["table.md", "table.csv", "values.parquet"]
    for task in tasks:
        write_picture(output / f"{task.name}.png", plots.answers(table, task.name).savefig, dpi=150)
        written.append(f"{task.name}.png")
    for name in written:
        wrote(output / name)


def _models(tables: Mapping[str, Table]) -> str:
    """Several models' scores under every condition, as Markdown: a row for each task and model."""
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


def _patches(path: Path) -> PatchSet:
    """The patch set in a separate file, or in a search result."""
    check_files(path.parent, path.name, recorded=False)
    return PatchSet.load(path) if path.suffix != ".safetensors" else SearchResult.load(path).patches


def _folds(settings: Settings, split: str, max_images: int | None) -> list[tuple[int, Dataset]]:
    """Number and pictures of each fold to evaluate on: all that the published protocol tests on, else one."""
    if is_published_detection(settings):
        return [(0, sources.load(settings.data, split))]
    if not is_published_pascal(settings):
        most = max_images or (None if settings.data == "words" else 2 * settings.test_prompts)
        return [(0, sources.load(settings.data, split, most, settings.seed))]
    root, fold, published = sources.pascal_argument(settings.data.removeprefix("pascal:"))
    half = "trn" if split == "train" else "val"
    return [(f, sources.pascal(root, f, half, published=published)) for f in (range(4) if fold is None else (fold,))]
