"""Options that commands share, of which each has one name everywhere, and the settings that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from vtv_nnsight import tasks
from vtv_nnsight.data.sources import SOURCES
from vtv_nnsight.files import check_folder, check_place
from vtv_nnsight.models.interface import SITES
from vtv_nnsight.runs.resuming import check_files
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.search import ALGORITHMS
from vtv_nnsight.vectors import TaskVectors

SEARCHES = f"How to search: {', '.join(ALGORITHMS)}, or published (the paper's own)."
DATA = f"The data: {', '.join(source.usage for source in SOURCES.values())}, or a folder by its path"


def place_for_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """A path to write a file at, refused before the work that goes into it where it cannot be."""
    if path is not None and not ctx.resilient_parsing:
        check_place(path)
    return path


def place_for_folder(ctx: typer.Context, path: Path | None) -> Path | None:
    """A path to write a folder at, alike."""
    if path is not None and not ctx.resilient_parsing:
        check_folder(path)
    return path


Source = Annotated[
    str,
    typer.Argument(
        help='A model: "tiny" (embedded), a folder that `vtv convert` or save_pretrained wrote, a Hub id such as '
        "BAAI/seggpt-vit-large or facebook/vit-mae-large, or a published .pth file."
    ),
]
VQGAN = Annotated[
    Path | None,
    typer.Option(help="The tokenizer's own checkpoint (taming-transformers' last.ckpt), for a .pth that has none."),
]
DType = Annotated[
    str | None,
    typer.Option("--dtype", help="Precision of the weights, such as bfloat16.", show_default="that of the source"),
]
EmbeddingType = Annotated[
    str | None, typer.Option(help='Of SegGPT: "semantic" or "instance".', show_default="instance")
]
Device = Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.", show_default="cpu")]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Prompts per forward.",
        show_default="32, fewer of large canvases; for searches what fits the device",
    ),
]
Data = Annotated[str, typer.Option(help=f"{DATA} alone.")]
Images = Annotated[Path | None, typer.Option(help="A folder of your own pictures, in place of --data.")]
Split = Annotated[str, typer.Option(help='The split of the data: "train", "validation" or "test".')]
MaxImages = Annotated[int, typer.Option(min=1, help="The most pictures to draw prompts from.")]
Tasks = Annotated[
    str | None,
    typer.Option(help="Tasks by name, with commas between them.", show_default="VTV's that the data can serve"),
]
OneTask = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        "--task",
        help="A task, or several with commas between them.",
        show_default="the first of VTV's, or of those that the vectors have, that the data can serve",
    ),
]
Prompts = Annotated[int, typer.Option("--prompts", "--n", min=1, help="Prompts per task.")]
Candidates = Annotated[
    int,
    typer.Option(
        "--candidates",
        "--select",
        min=1,
        help="Random prompts per task that are tried one-shot, of which the best are kept; with fewer than four "
        "pictures per prompt none are tried, and prompts are random.",
    ),
]
Granularity = Annotated[str, typer.Option(help='What a unit is: a "head", a head in a "quadrant", or at a "token".')]
Sites = Annotated[
    str | None,
    typer.Option(
        help='What of a layer is collected and patched, with commas between them: "heads", "attn" (the attention\'s '
        'output), "mlp" (the MLP\'s), "residual" (the layer\'s).',
        show_default=",".join(Settings.sites),
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(
        help='What the search lowers: a loss of the model (`vtv info` lists them), or "pixels" for the task\'s metric.',
        show_default="the model's first",
    ),
]
Sparsity = Annotated[
    float,
    typer.Option(
        min=0,
        help="With reinforce and published, the price of all units, in standard deviations of the loss: the released "
        "code's regularization_strength.",
    ),
]
Order = Annotated[str, typer.Option(help='"vertical", or "horizontal" for inputs above outputs.')]
Seed = Annotated[int, typer.Option(min=0, help="The seed of all that is random.")]
Vectors = Annotated[Path, typer.Option(help="The vectors that `vtv collect` wrote.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write.", callback=place_for_file)]
OutputFolder = Annotated[
    Path, typer.Option("--output", "-o", help="The folder to write in.", callback=place_for_folder)
]
Resume = Annotated[
    Path | None, typer.Option(help="A file that keeps the state of a long job.", callback=place_for_file)
]


def settings_of(ctx: typer.Context, preset: Mapping[str, Any] | None = None, **others: Any) -> Settings:
    """Settings of a command's options, which have the names of the settings.

    Args:
        preset: Settings in the place of the defaults.
        **others: Settings that are options of another name.

    Raises:
        ValueError: as `Settings`, or for --images that are no folder or go with --data.
    """
    names = {field.name for field in fields(Settings)} - {"dtype"}  # the model checks it, but for a run
    options = given(**{name: value for name, value in ctx.params.items() if name in names} | others)
    if images := ctx.params.get("images"):
        if is_given(ctx, "data"):
            raise ValueError("--images and --data both say where pictures come from; give one.")
        if not images.is_dir():
            raise ValueError(f"--images {images} is not a folder; give one of pictures (--max-images says how many).")
        options["data"] = str(images)
    if task_names := options.pop("tasks", None):
        options["tasks"] = tuple(task.name for task in tasks.get_all(task_names))
    if "sites" in options:
        options["sites"] = listed(options["sites"])
    if "vqgan" in options:
        options["vqgan"] = str(options["vqgan"])
    return Settings(**{**(preset or {}), **options})


def is_given(ctx: typer.Context, name: str) -> bool:
    """Whether an option is on the command line."""
    return getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"


def refuse_unused(ctx: typer.Context, why: str, *names: str) -> None:
    """Refuse options that would change nothing.

    Args:
        why: What makes them useless: "without --model".
        *names: Of the options' parameters.

    Raises:
        ValueError: naming one that is on the command line.
    """
    for name in names:
        if is_given(ctx, name):
            raise ValueError(f"--{name.replace('_', '-')} has no use {why}; leave it out.")


def listed(text: str) -> tuple[str, ...]:
    """What an option names with commas between, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def read_vectors(path: str | Path, tasks: Sequence[str] = (), sites: Sequence[str] = ()) -> TaskVectors:
    """Vectors in a file, which hold some tasks and sites.

    Raises:
        FileNotFoundError, ValueError: as `TaskVectors.load`; and naming the task or the site that is missing.
    """
    check_files(Path(path).parent, Path(path).name, recorded=False)
    vectors = TaskVectors.load(path)
    if missing := [task for task in tasks if task not in vectors]:
        raise ValueError(f"{path} has no vector of {', '.join(map(repr, missing))}; it has {', '.join(vectors)}.")
    there = vectors.sites
    if missing := [site for site in sites if site not in there]:
        raise ValueError(
            f"{path} has vectors of {', '.join(there)} and none of {', '.join(missing)}; collect with "
            f"sites {','.join(site for site in SITES if site in {*there, *missing})}."
        )
    return vectors
