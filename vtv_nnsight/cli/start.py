"""`vtv run` and `vtv report`: the whole paper."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from vtv_nnsight.cli.app import (
    START,
    VQGAN,
    BatchSize,
    Device,
    DType,
    EmbeddingType,
    Granularity,
    Images,
    ListingCommand,
    Loss,
    Order,
    Seed,
    Sites,
    app,
    listed,
    say,
    settings_of,
    wrote,
)
from vtv_nnsight.runs.settings import PUBLISHED, QUICK, Settings


def _default(name: str) -> str:
    value, quick, published = getattr(Settings, name), QUICK.get(name), PUBLISHED.get(name, getattr(Settings, name))
    others = {"--quick": quick if quick is not None else value, "--published": "the algorithm's" if published is None
              else published}  # fmt: skip
    return "; ".join([str(value), *(f"{other} with {flag}" for flag, other in others.items() if other != value)])


@app.command(
    cls=ListingCommand,
    rich_help_panel=START,
    epilog="Examples: vtv run --quick\n\nvtv run --images holiday/ --out runs/holiday\n\n"
    "vtv run --model BAAI/seggpt-vit-large --dtype bfloat16 --data pascal:VOCdevkit --device cuda\n\n"
    "vtv run --model checkpoint-3400.pth --data pascal:VOCdevkit --published --device cuda",
)
def run(
    model: Annotated[str, typer.Option(help="A model, as SOURCE of `vtv info`.", metavar="SOURCE")] = Settings.model,
    data: Annotated[
        str,
        typer.Option(help="The data: {sources}, or a folder by its path; pascal:ROOT is done fold by fold."),
    ] = Settings.data,
    images: Images = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The folder to write.", show_default="runs/NAME, after the data"),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks by name, with commas between them.",
            show_default="those of VTV's five that the data can serve; segmentation,lowlight with --quick",
        ),
    ] = None,
    folds: Annotated[
        str | None, typer.Option(help="Folds of Pascal-5i, such as 0,1.", show_default="all four")
    ] = None,
    max_images: Annotated[
        int | None,
        typer.Option(min=1, help="The most pictures to draw prompts from.", show_default=_default("max_images")),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            "--prompts", "--n", min=1, help="Prompts per task to collect and search on.",
            show_default=_default("prompts"),
        ),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            "--candidates", "--select", min=1,
            help="Random prompts per task to select them from.", show_default=_default("candidates"),
        ),
    ] = None,
    granularity: Granularity = Settings.granularity,
    sites: Sites = None,
    search: Annotated[
        str | None,
        typer.Option(
            "--search", "--algorithm", help="How to search: {algorithms}, or published (the paper's own).",
            show_default=_default("search"),
        ),
    ] = None,
    loss: Loss = None,
    budget: Annotated[
        int | None,
        typer.Option(min=1, help="Evaluations that a search may spend.", show_default=_default("budget")),
    ] = None,
    test_prompts: Annotated[
        int | None,
        typer.Option(
            "--test-prompts", "--evaluations", min=1, help="Prompts per task to evaluate on.",
            show_default=_default("test_prompts"),
        ),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            min=1, help="Draws of random units, uniform and matched, to compare the found ones with.",
            show_default=_default("draws"),
        ),
    ] = None,
    control_prompts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Test prompts that the vectors of other tasks are tried on, and a quarter of them each random draw.",
            show_default=_default("control_prompts"),
        ),
    ] = None,
    order: Order = Settings.order,
    seed: Seed = Settings.seed,
    quick: Annotated[bool, typer.Option("--quick", help="Take a first look: two tasks, a short search.")] = False,
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="Use the paper's search, loss and numbers; on pascal:ROOT its whole protocol: vectors of folds 1 to "
            "3, one search, its set on all folds.",
        ),
    ] = False,
    search_fold: Annotated[
        int, typer.Option(min=0, max=3, help="With --published, the fold of Pascal-5i that is searched on.")
    ] = Settings.search_fold,
    redo: Annotated[
        bool, typer.Option("--redo", help="Do again what depends on settings or files that changed.")
    ] = False,
    batch_size: BatchSize = None,
    vqgan: VQGAN = None,
    embedding_type: EmbeddingType = None,
    dtype: DType = None,
    device: Device = None,
    show: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
) -> None:  # fmt: skip
    """Find the task vectors of a model and write a report: select, collect, score, search, evaluate.

    The same command goes on where it stopped.
    """
    from vtv_nnsight.runs import steps

    if quick and published:
        raise ValueError("--quick and --published are opposites; give one.")
    settings = settings_of(
        images,
        data,
        tasks,
        QUICK if quick else PUBLISHED if published else None,
        model=model,
        vqgan=str(vqgan) if vqgan else None,
        embedding_type=embedding_type,
        dtype=dtype,
        folds=_numbers(folds) if folds else None,
        max_images=max_images,
        prompts=prompts,
        candidates=candidates,
        granularity=granularity,
        sites=listed(sites),
        search=search,
        loss=loss,
        budget=budget,
        test_prompts=test_prompts,
        draws=draws,
        control_prompts=control_prompts,
        order=order,
        seed=seed,
        search_fold=search_fold,
    )
    folder = out or Path("runs") / (f"{settings.name}-quick" if quick else settings.name)
    page = steps.run(folder, settings, redo=redo, device=device, batch_size=batch_size)
    summarise(page)
    wrote(page)
    if show:
        webbrowser.open(page.resolve().as_uri())
    else:
        say("Open it in a browser, or let --open do so. Next: vtv run --images FOLDER, with pictures of your own.")


def _numbers(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise ValueError(f"--folds {text} are not numbers with commas between them; give such as 0,1.")
    return tuple(int(part) for part in text.split(","))


def summarise(page: Path) -> None:
    """Print the scores of a run, and what they say."""
    from vtv_nnsight.evaluation import verdicts
    from vtv_nnsight.report.labels import FLOOR_TO_CEILING
    from vtv_nnsight.report.reading import load_run

    found = load_run(page.parent)
    table = Table("task", *FLOOR_TO_CEILING, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    lines = found.lines()
    for task in found.tasks:
        own = lines[task.name]["score"]
        scores = [f"{own[name].mean:.3f}" if name in own else "" for name in FLOOR_TO_CEILING]
        table.add_row(Text(task.name), *scores)
    say(table)
    for sentence in verdicts(found.table):
        say(sentence)


@app.command(rich_help_panel=START, epilog="Example: vtv report runs/scenes runs/holiday -o comparison.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `vtv run` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page that compares several runs.")] = Path(
        "comparison.html"
    ),
) -> None:
    """Write the report of a run again, or a page that compares several runs."""
    from vtv_nnsight import report as reports

    wrote(reports.write(runs[0]) if len(runs) == 1 else reports.compare(runs, output))
