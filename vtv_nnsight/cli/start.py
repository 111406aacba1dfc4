"""`vtv run` and `vtv report`: the whole paper."""

from __future__ import annotations

import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Image
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from vtv_nnsight.cli import options
from vtv_nnsight.cli.group import app
from vtv_nnsight.cli.output import say, wrote
from vtv_nnsight.cli.plan import plan
from vtv_nnsight.data import load
from vtv_nnsight.evaluation.searched_anew import BUDGET
from vtv_nnsight.files import make_folder
from vtv_nnsight.models.sources import EMBEDDED
from vtv_nnsight.report import page, photographs, reading
from vtv_nnsight.report.comparison import compare
from vtv_nnsight.report.explorer import demonstrate
from vtv_nnsight.report.labels import FLOOR_TO_CEILING, titled
from vtv_nnsight.report.seeds import merge
from vtv_nnsight.report.verdicts import specificity_sentences, vector_pairs, verdicts
from vtv_nnsight.runs import bundles, pipeline
from vtv_nnsight.runs.folds import is_published_pascal
from vtv_nnsight.runs.settings import PUBLISHED, QUICK, Settings
from vtv_nnsight.tasks import get

FEW = 40
"""Photographs below which `vtv run --images` finds no vectors: the embedded model's answer them."""
MOST = 24
"""Photographs of a run that are shown answered, at most."""
NEXT = (
    " Next: vtv run --images FOLDER, with pictures of your own.",
    " Next: vtv prompt --vectors RUN --query WORD, with a word of your own.",
)
"""What can be done after a run of pictures, and of words."""

PANELS = {
    "Basics": ("model", "data", "images", "out", "tasks", "quick", "redo", "device", "show"),
    "Search": ("search", "loss", "budget", "sparsity", "granularity", "sites"),
    "Evaluation": ("test_prompts", "draws", "matrix", "seeds"),
    "Expert": ("max_images", "prompts", "candidates", "order", "seed", "folds", "published", "search_fold")
    + ("fold_draws", "jobs", "remote", "dry_run", "batch_size", "vqgan", "embedding_type", "dtype"),
}
"""Panel of the help of `vtv run` → its options."""


class PanelCommand(TyperCommand):
    """A command that shows its options in `PANELS` when asked for help."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        panels = {name: panel for panel, names in PANELS.items() for name in names}
        parameters: list[Any] = self.params
        for parameter in parameters:
            parameter.rich_help_panel = panels[parameter.name]
        parameters.sort(key=lambda parameter: list(panels).index(parameter.name))


def _count(name: str, *flags: str, help: str) -> Any:
    """The option of a number of the settings; its default is that of the settings, --quick or --published."""
    return typer.Option(*flags, min=1, help=help, show_default=_default(name))


def _default(name: str) -> str:
    """The default of a setting, and what else it is with --quick and --published."""
    default = getattr(Settings, name)
    quick, published = QUICK.get(name, default), PUBLISHED.get(name, default)
    others = {"--quick": quick, "--published": "the algorithm's" if published is None else published}
    return "; ".join([str(default), *(f"{other} with {flag}" for flag, other in others.items() if other != default)])


Model = Annotated[str, typer.Option(help="A model, as SOURCE of `vtv info`.", metavar="SOURCE")]
DataInFolds = Annotated[str, typer.Option(help=f"{options.DATA}; pascal:ROOT is done fold by fold.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="The folder to write.",
        show_default="runs/NAME, after the data",
        callback=options.place_for_folder,
    ),
]
RunTasks = Annotated[
    str | None,
    typer.Option(
        help="Tasks by name, with commas between them.",
        show_default=f"those of VTV's five that the data can serve; the first {QUICK['most_tasks']} with --quick",
    ),
]
Folds = Annotated[str | None, typer.Option(help="Folds of Pascal-5i, such as 0,1.", show_default="all four")]
MaxImages = Annotated[int | None, _count("max_images", help="The most pictures to draw prompts from.")]
Prompts = Annotated[
    int | None, _count("prompts", "--prompts", "--n", help="Prompts per task to collect and search on.")
]
Candidates = Annotated[
    int | None, _count("candidates", "--candidates", "--select", help="Random prompts per task to select them from.")
]
Search = Annotated[
    str | None, typer.Option("--search", "--algorithm", help=options.SEARCHES, show_default=_default("search"))
]
Budget = Annotated[int | None, _count("budget", help="Evaluations that a search may spend.")]
TestPrompts = Annotated[
    int | None, _count("test_prompts", "--test-prompts", "--evaluations", help="Prompts per task to evaluate on.")
]
Draws = Annotated[
    int | None, _count("draws", help="Draws of random units, uniform and matched, to compare the found ones with.")
]
Matrix = Annotated[
    bool,
    typer.Option(
        "--matrix",
        help=f"Search units for every vector on every task, {BUDGET} evaluations each: which vectors carry their task?",
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of as many seeds, from --seed on, and their tables as one.")]
Quick = Annotated[bool, typer.Option("--quick", help="Take a first look: two tasks, a short search.")]
Published = Annotated[
    bool,
    typer.Option(
        "--published",
        help="Use the paper's search, loss and numbers; on pascal:ROOT its whole protocol: vectors of folds 1 to 3, "
        "one search, its set on all folds.",
    ),
]
SearchFold = Annotated[
    int, typer.Option(min=0, max=3, help="With --published, the fold of Pascal-5i that is searched on.")
]
FoldDraws = Annotated[
    bool,
    typer.Option(
        "--fold-draws",
        help="With --published on pascal:ROOT, draw other units for each fold from the search's probabilities, as "
        "the released code does.",
    ),
]
Redo = Annotated[bool, typer.Option("--redo", help="Do again what depends on settings or files that changed.")]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes of one thread each, which share the tasks out; with any number the results are the same.",
        show_default="physical cores, at most the number of tasks; 1 on a GPU",
    ),
]
Remote = Annotated[
    str | None,
    typer.Option(
        help='Run a language model at nnsight\'s NDIF, "ndif", or at a server\'s address; "local" tries the way there.',
        metavar="HOST",
        callback=lambda host: True if host == "ndif" else host,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what the run would take, and do nothing.")]
Open = Annotated[bool, typer.Option("--open", help="Open the report in the browser.")]


@app.command(
    cls=PanelCommand,
    epilog="Examples: vtv run --quick\n\nvtv run --images holiday/ --out runs/holiday\n\n"
    "vtv run --model BAAI/seggpt-vit-large --dtype bfloat16 --data pascal:VOCdevkit --device cuda\n\n"
    "vtv run --model checkpoint-3400.pth --data pascal:VOCdevkit --published --device cuda",
)
def run(
    ctx: typer.Context,
    model: Model = Settings.model,
    data: DataInFolds = Settings.data,
    images: options.Images = None,
    out: Out = None,
    tasks: RunTasks = None,
    folds: Folds = None,
    max_images: MaxImages = None,
    prompts: Prompts = None,
    candidates: Candidates = None,
    granularity: options.Granularity = Settings.granularity,
    sites: options.Sites = None,
    search: Search = None,
    loss: options.Loss = Settings.loss,
    budget: Budget = None,
    sparsity: options.Sparsity = Settings.sparsity,
    test_prompts: TestPrompts = None,
    draws: Draws = None,
    matrix: Matrix = False,
    order: options.Order = Settings.order,
    seed: options.Seed = Settings.seed,
    seeds: Seeds = 1,
    quick: Quick = False,
    published: Published = False,
    search_fold: SearchFold = Settings.search_fold,
    fold_draws: FoldDraws = Settings.fold_draws,
    redo: Redo = False,
    jobs: Jobs = None,
    remote: Remote = None,
    dry_run: DryRun = False,
    batch_size: options.BatchSize = None,
    vqgan: options.VQGAN = None,
    embedding_type: options.EmbeddingType = None,
    dtype: options.DType = None,
    device: options.Device = None,
    show: Open = False,
) -> None:
    """Find the task vectors of a model and write a report: select, collect, score, search, evaluate.

    The same command goes on where it stopped.
    """
    if quick and published:
        raise ValueError("--quick and --published are opposites; give one.")
    preset = QUICK if quick else PUBLISHED if published else None
    settings = options.settings_of(
        ctx, preset, folds=_numbers(folds) if folds else (), dtype=dtype, matrix=BUDGET * matrix
    )
    if is_published_pascal(settings):
        options.refuse_unused(ctx, "with --published on Pascal, which takes all pictures", "max_images")
    else:
        options.refuse_unused(ctx, "but with --published on pascal:ROOT", "search_fold")
    folder = out or Path("runs") / (f"{settings.name}-quick" if quick else settings.name)
    written = folder / ("table.md" if seeds > 1 else "report.html")
    files = _photographs(images) if images else {}
    if files and len(files) < FEW and model == EMBEDDED:
        written = _answer(folder, EMBEDDED, settings.tasks, files)
        say(f"{len(files)} photographs are too few to find task vectors in: those of the package answer all of them.")
    else:
        if jobs is None and not remote and device in (None, "cpu") and len(settings.tasks) != 1:
            jobs = torch.get_num_threads()  # as many as there are physical cores, or as the user has set
        if dry_run:
            say("\n".join(plan(settings, device, jobs, remote)))
            raise typer.Exit
        if seeds > 1:
            make_folder(folder)
        folders = {seed + i: folder / f"seed{seed + i}" for i in range(seeds)} if seeds > 1 else {seed: folder}
        shared: dict[str, Any] = dict(redo=redo, device=device, batch_size=batch_size, jobs=jobs, remote=remote)
        for number, place in folders.items():
            _run(place, replace(settings, seed=number), **shared)
        if seeds > 1:
            say("\n".join(merge(folder, folders)))
        if files:
            wrote(_answer(folder, str(folders[seed]), settings.tasks, dict(list(files.items())[:MOST])))
    wrote(written)
    if show:
        webbrowser.open(written.resolve().as_uri())
    else:
        say("Open it in a browser, or let --open do so." + ("" if files else NEXT[settings.data == "words"]))


def _photographs(images: Path) -> dict[str, Path]:
    """Name → file of the pictures in a folder."""
    rows = load(str(images)).cast_column("image", Image(decode=False))
    files = [Path(cell["path"]) for cell in rows["image"]]
    return {str(file.relative_to(images.absolute())): file for file in files}


def _answer(folder: Path, vectors: str, tasks: Sequence[str], files: Mapping[str, Path]) -> Path:
    """The page of photographs that a bundle's vectors answer, in a folder, which is made."""
    bundle = bundles.load(vectors)
    asked = [task for task in map(get, tasks or bundle) if tasks or task.change]
    return photographs.write(folder / "photographs.html", bundle.load_model(), bundle, asked, files)


def _numbers(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise ValueError(f"--folds {text} are not numbers with commas between them; give such as 0,1.")
    return tuple(int(part) for part in text.split(","))


def _run(folder: Path, settings: Settings, **shared: Any) -> None:
    """One run and its report, and what it says."""
    read: list[reading.RunResults] = []

    def report(folder: Path) -> None:
        read.append(reading.load_run(folder))
        page.write(folder, read[0])

    pipeline.run(folder, settings, explore=demonstrate, report=report, **shared)
    if read:  # in the process that wrote it
        summarise(read[0])


def summarise(results: reading.RunResults) -> None:
    """Print the scores of a run, and what they say."""
    lines = results.lines()
    columns = [name for name in FLOOR_TO_CEILING if any(name in task["score"] for task in lines.values())]
    titles = (titled(name, results.table.frame.noun.iloc[0]) for name in columns)
    table = Table("task", *titles, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for task in results.tasks:
        scores = lines[task.name]["score"]
        means = [f"{scores[name].mean:.3f}" if name in scores else "" for name in columns]
        table.add_row(Text(task.name), *means)
    say(table)
    for note in results.record["notes"]:
        say(note)
    for verdict in verdicts(results.table):
        say(verdict)
    if results.anew is not None:
        say(" ".join(specificity_sentences(vector_pairs(results.anew))))


@app.command(epilog="Example: vtv report runs/scenes runs/holiday -o comparison.html")
def report(
    ctx: typer.Context,
    runs: Annotated[list[Path], typer.Argument(help="Folders that `vtv run` wrote.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The page that compares several runs.", callback=options.place_for_file),
    ] = Path("comparison.html"),
) -> None:
    """Write the report of a run again, or a page that compares several runs."""
    if len(runs) == 1:
        options.refuse_unused(ctx, "for a single run, which has its page in its folder", "output")
    wrote(page.write(runs[0]) if len(runs) == 1 else compare(runs, output))
