"""`vtv`: the library from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from vtv_nnsight.settings import PUBLISHED, Settings

START, MODEL, PROMPTS, VECTORS = "From end to end", "Model", "Prompts", "Task vectors"
TRAINING, BENCHMARKS = "Training", "Benchmarks"
"""The steps that commands are grouped by in the help."""


GO_ON = {
    "run": "The same command goes on where it stopped.",
    "collect": "With --resume FILE, the same command would go on where it stops.",
    "search": "With --resume FILE, the same command would go on where it stops.",
    "pretrain": "The same command with --resume goes on where it last saved.",
}
"""Command → what is said when it is interrupted."""


class Commands(TyperGroup):
    """Takes `--debug` anywhere, and says what a user did wrong, or how to go on after Ctrl-C, in one sentence."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        return super().parse_args(ctx, sorted(args, key=lambda arg: arg != "--debug"))

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError, ImportError) as error:
            if ctx.params["debug"]:
                raise
            Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as stop:
            Console(stderr=True).print(f"Stopped. {GO_ON.get(ctx.invoked_subcommand, '')}".strip(), soft_wrap=True)
            raise typer.Exit(130) from stop


class ExampleCommand(TyperCommand):
    """Reads `--example IN OUT` as `--example IN --example OUT`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        spread: list[str] = []
        for arg in args:
            follows = len(spread) > 1 and spread[-2] == "--example" and not arg.startswith("-")
            spread += ["--example", arg] if follows else [arg]
        return super().parse_args(ctx, spread)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[
    str,
    typer.Argument(
        help='"tiny" (embedded), a folder written by `vtv convert` or save_pretrained, a Hub id, or a published .pth.'
    ),
]
VQGAN = Annotated[
    Path | None,
    typer.Option(help="The tokenizer's own checkpoint (taming-transformers' last.ckpt), for a .pth that has none."),
]


@app.callback()
def vtv(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Find, inspect and use visual task vectors in MAE-VQGAN."""


@app.command(
    rich_help_panel=START,
    epilog="Examples: vtv run\n\nvtv run --images holiday/ --out runs/holiday\n\n"
    "vtv run --model checkpoint-3400.pth --data pascal:VOCdevkit --published --device cuda",
)
def run(
    model: Annotated[str, typer.Option(help="As SOURCE of `vtv info`.", metavar="SOURCE")] = Settings.model,
    data: Annotated[
        str, typer.Option(help="scenes (generated), a folder of pictures, pascal:ROOT (fold by fold), or hf:NAME.")
    ] = Settings.data,
    images: Annotated[
        Path | None, typer.Option(help="A folder of your own pictures: the tasks that need no masks are done on them.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write; runs/NAME, after the data, by default.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks by name, with commas between them; all of VTV's that the data can serve.")
    ] = None,
    folds: Annotated[str | None, typer.Option(help="Folds of Pascal-5i, such as 0,1; all by default.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts to collect and search on, a task.")] = Settings.prompts,
    candidates: Annotated[int | None, typer.Option(help="Random prompts to pick them from.")] = None,
    granularity: Annotated[str, typer.Option(help='"head", "quadrant" or "token".')] = Settings.granularity,
    search: Annotated[str | None, typer.Option(help="An algorithm of `vtv search`, or published.")] = None,
    loss: Annotated[str | None, typer.Option(help='"tokens", or "pixels" for the task\'s metric.')] = None,
    budget: Annotated[int | None, typer.Option(help="Evaluations that a search may spend.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Prompts to evaluate on, a task.")] = None,
    order: Annotated[
        str, typer.Option(help='"vertical", or "horizontal" for inputs above outputs.')
    ] = Settings.order,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = Settings.seed,
    published: Annotated[bool, typer.Option("--published", help="The paper's own search, loss and numbers.")] = False,
    redo: Annotated[bool, typer.Option("--redo", help="Do again what depends on settings that changed.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Prompts a forward.")] = None,
    vqgan: VQGAN = None,
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.")] = None,
) -> None:
    """Find the task vectors of a model and write a report: select, collect, score, search, evaluate.

    The same command goes on where it stopped.
    """
    from vtv_nnsight.run import run as whole

    if images is not None and data != Settings.data:
        raise ValueError("--images and --data both say where pictures come from; give one.")
    chosen = _given(candidates=candidates, search=search, loss=loss, budget=budget, evaluations=evaluations)
    settings = Settings(
        model=model,
        vqgan=str(vqgan) if vqgan else None,
        data=str(images) if images else data,
        folds=tuple(int(fold) for fold in folds.split(",")) if folds else (),
        tasks=tuple(tasks.split(",")) if tasks else (),
        prompts=prompts,
        granularity=granularity,
        order=order,
        seed=seed,
        **(PUBLISHED if published else {}) | chosen,
    )
    folder = out or Path("runs") / settings.name
    _wrote(whole(folder, settings, redo=redo, device=device, batch_size=batch_size))


@app.command(rich_help_panel=START, epilog="Example: vtv report runs/scenes runs/holiday -o comparison.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `vtv run` wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page that compares several runs.")
    ] = Path("comparison.html"),
) -> None:
    """Write the report of a run again, or a page that compares several runs."""
    from vtv_nnsight import report as reports

    _wrote(reports.write(runs[0]) if len(runs) == 1 else reports.compare(runs, output))


@app.command(rich_help_panel=MODEL, epilog="Example: vtv info checkpoint-3400.pth --vqgan last.ckpt")
def info(source: Source, vqgan: VQGAN = None) -> None:
    """Show a model's sizes, its parameters, and where its tokenizer comes from. Reads no weights."""
    from rich.table import Table

    from vtv_nnsight.tracing import MAEVQGAN

    model = MAEVQGAN(source, **_given(vqgan=vqgan))._module
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
    table = Table(title=f"{source}: canvas {size}x{size}, patches {patch}x{patch}")
    table.add_column("part")
    table.add_column("what it is")
    table.add_column("parameters", justify="right")
    for name, text in rows.items():
        table.add_row(name, text, f"{_parameters(getattr(model, name)):,}")
    table.add_section()
    table.add_row("all", f"tokenizer from {vqgan or source}", f"{_parameters(model):,}")
    Console().print(table)


@app.command(rich_help_panel=MODEL, epilog="Example: vtv convert checkpoint-3400.pth mae-vqgan --vqgan last.ckpt")
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A published .pth.")],
    out_dir: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    vqgan: VQGAN = None,
    heads: Annotated[int, typer.Option(help="Attention heads of the encoder; the file does not tell.")] = 16,
    decoder_heads: Annotated[int, typer.Option(help="Attention heads of the decoder.")] = 16,
) -> None:
    """Write a published checkpoint as a safetensors folder, for from_pretrained and MAEVQGAN."""
    from vtv_nnsight.model import checkpoints

    checkpoints.convert(
        checkpoint, out_dir, vqgan, num_attention_heads=heads, decoder_num_attention_heads=decoder_heads
    )
    _wrote(out_dir)


@app.command(
    cls=ExampleCommand,
    rich_help_panel=PROMPTS,
    epilog="Examples: vtv prompt --model tiny --task segmentation --example cat.jpg cat_mask.png --query dog.jpg "
    "-o out.png\n\nvtv prompt --task colorization --example cat.jpg --query dog.jpg -o prompt.png",
)
def prompt(
    query: Annotated[Path, typer.Option(help="The picture to answer.")],
    example: Annotated[
        list[Path],
        typer.Option(
            metavar="IN [OUT]",
            help="Two files fill the example's cells as they are, and the query its cell. With one file the task makes "
            "input and output of it, and corrupts the query alike.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the picture is written.")],
    task: Annotated[str, typer.Option(help="A task, or several joined by '+'.")] = "identity",
    mask: Annotated[
        Path | None, typer.Option(help="Mask of a single example (0 and 255), for tasks that ask for masks.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Paint the output with this model (as SOURCE of `vtv info`).", metavar="SOURCE")
    ] = None,
    vqgan: VQGAN = None,
    order: Annotated[str, typer.Option(help='"vertical", or "horizontal" for inputs above outputs.')] = "vertical",
) -> None:
    """Make a visual prompt of picture files; with --model, paint its output.

    Without a model the prompt itself is saved, the hidden patches dimmed.
    """
    from dataclasses import replace

    from vtv_nnsight import tasks
    from vtv_nnsight.images import to_pil
    from vtv_nnsight.layouts import Layout
    from vtv_nnsight.tracing import MAEVQGAN

    chosen = tasks.get(task)
    if len(example) > 2:
        raise ValueError(f"--example names {len(example)} files; give an input and its output, or one picture.")
    if mask is not None and len(example) == 2:
        raise ValueError("--mask goes with a single --example file; with two, the second file is the answer.")
    painter = MAEVQGAN(model, **_given(vqgan=vqgan)) if model else None
    layout = replace(painter.layout if painter else Layout(), order=order)
    picture = _open(query)
    if len(example) == 2:
        made = _as_they_are(*map(_open, example), picture, layout)
    else:
        row = {"image": _open(example[0])} | ({"mask": _open(mask)} if mask else {})
        made = chosen.prompt(example=row, query={"image": picture}, layout=layout)
    image = to_pil(painter.generate(made)[0]) if painter else made.picture()
    image.save(output)
    _wrote(output)


Data = Annotated[
    str,
    typer.Option(
        help="scenes (generated), a folder of pictures, pascal:ROOT[:FOLD], detection:ROOT, reasoning:TASK, or "
        "hf:NAME[:SPLIT]."
    ),
]
Device = Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.")]
Order = Annotated[str, typer.Option(help='"vertical", or "horizontal" for inputs above outputs.')]


@app.command(
    rich_help_panel=VECTORS,
    epilog="Example: vtv collect tiny --data scenes --tasks segmentation,lowlight --n 100 -o vectors.safetensors",
)
def collect(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    tasks: Annotated[
        str, typer.Option(help="Tasks by name, with commas between them.")
    ] = "segmentation,lowlight,identity,inpainting,colorization",
    data: Data = "scenes",
    split: Annotated[str, typer.Option(help="Split of the data.")] = "train",
    images: Annotated[int | None, typer.Option(help="Images to draw prompts from.")] = None,
    n: Annotated[int, typer.Option(help="Prompts a task.")] = 100,
    select: Annotated[
        int | None, typer.Option(help="Try as many random prompts one-shot and keep the best, each image used once.")
    ] = None,
    order: Order = "vertical",
    seed: Annotated[int, typer.Option(help="Of the images and the prompts.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts a forward.")] = 32,
    resume: Annotated[Path | None, typer.Option(help="A file that keeps the state of a long run.")] = None,
    vqgan: VQGAN = None,
    device: Device = None,
) -> None:
    """Collect task vectors: the mean activation of every head at every position, task by task."""
    from dataclasses import replace

    from vtv_nnsight import data as sources
    from vtv_nnsight import tasks as registry
    from vtv_nnsight.evaluation import select_prompts
    from vtv_nnsight.vectors import TaskVectors

    chosen = [registry.get(name) for name in tasks.split(",")]
    model = _model(source, vqgan, device)
    layout = replace(model.layout, order=order)
    rows = sources.load(data, split=split, n=images, seed=seed)
    prompts = {}
    for task in chosen:
        if select is None:
            prompts[task.name] = task.prompts(rows, n, seed, layout)
        else:
            prompts[task.name] = select_prompts(
                model, task, rows, n, candidates=select, seed=seed, layout=layout, batch_size=batch_size
            )
    TaskVectors.collect(model, prompts, batch_size=batch_size, resume=resume).save(output)
    _wrote(output)


@app.command(rich_help_panel=VECTORS, epilog="Example: vtv score vectors.safetensors --top 10 --plot scores.png")
def score(
    vectors: Annotated[Path, typer.Argument(help="What `vtv collect` wrote.")],
    granularity: Annotated[str, typer.Option(help='Units to rank: "head", "quadrant" or "token".')] = "quadrant",
    top: Annotated[int, typer.Option(help="Units to print.")] = 10,
    plot: Annotated[Path | None, typer.Option(help="Write layer × head heat maps to this picture.")] = None,
) -> None:
    """Rank heads by how well they tell tasks apart: variance between tasks over variance within a task."""
    from rich.table import Table

    from vtv_nnsight import plots
    from vtv_nnsight.patches import PatchSpace
    from vtv_nnsight.vectors import TaskVectors

    loaded = TaskVectors.load(vectors)
    scores = loaded.score()
    facts = next(iter(loaded.values())).fingerprint
    space = PatchSpace.from_fingerprint(facts | {"granularity": granularity, "stacks": list(scores._fields)})
    values = space.average(scores)
    table = Table(title=f"{', '.join(loaded)}: variance between tasks / within a task")
    table.add_column("unit")
    table.add_column("score", justify="right")
    for i in values.nan_to_num(-1).argsort(descending=True)[:top].tolist():
        table.add_row(space.names[i], f"{values[i]:.3f}")
    Console().print(table)
    if plot:
        plots.score_map(scores, space.layout).savefig(plot, dpi=150)
        _wrote(plot)


@app.command(
    rich_help_panel=VECTORS,
    epilog="Examples: vtv search tiny --algorithm reinforce --task segmentation --vectors vectors.safetensors "
    "--budget 20000 -o segmentation.safetensors\n\n"
    "vtv search tiny --algorithm gates --task segmentation,lowlight --vectors vectors.safetensors -o both.json",
)
def search(
    source: Source,
    vectors: Annotated[Path, typer.Option(help="What `vtv collect` wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The result (.safetensors), or its patch set alone (.json).")
    ],
    algorithm: Annotated[
        str, typer.Option(help="reinforce, gates, attribution, mediation, ranking, greedy or random.")
    ] = "reinforce",
    task: Annotated[
        str, typer.Option(help="A task; several, with commas between them, look for one set that serves all.")
    ] = "segmentation",
    recipe: Annotated[str | None, typer.Option(help='"published" makes reinforce the paper\'s.')] = None,
    budget: Annotated[int | None, typer.Option(help="Evaluations to spend, one mask on one prompt each.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Units in the set, for attribution, mediation, ranking and random.")
    ] = None,
    loss: Annotated[str, typer.Option(help='"tokens", or "pixels" for the task\'s metric.')] = "tokens",
    granularity: Annotated[str, typer.Option(help='Units: "head", "quadrant" or "token".')] = "quadrant",
    stacks: Annotated[str, typer.Option(help="Stacks to patch, with commas between them.")] = "encoder,decoder",
    data: Data = "scenes",
    split: Annotated[str, typer.Option(help="Split of the data.")] = "train",
    images: Annotated[int | None, typer.Option(help="Images to draw prompts from.")] = None,
    n: Annotated[int, typer.Option(help="Prompts a task; a quarter of them is held out.")] = 100,
    order: Order = "vertical",
    seed: Annotated[int, typer.Option(help="Of the images, the prompts and the search.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Prompts a forward.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A file that keeps what a long run has learnt.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A folder for pictures of the search and of what it found.")] = None,
    vqgan: VQGAN = None,
    device: Device = None,
) -> None:
    """Search for the units to patch so that the model does a task with no examples."""
    from dataclasses import replace

    from vtv_nnsight import data as sources
    from vtv_nnsight import tasks as registry
    from vtv_nnsight.patches import PatchSpace
    from vtv_nnsight.search import ALGORITHMS, plots
    from vtv_nnsight.vectors import TaskVectors

    if algorithm not in ALGORITHMS:
        raise ValueError(f"{algorithm!r} is not an algorithm; choose from {', '.join(ALGORITHMS)}.")
    chosen = [registry.get(name) for name in task.split(",")]
    loaded = TaskVectors.load(vectors)
    if missing := [t.name for t in chosen if t.name not in loaded]:
        raise ValueError(f"{vectors} has no vector of {', '.join(map(repr, missing))}; it has {', '.join(loaded)}.")
    model = _model(source, vqgan, device)
    layout = replace(model.layout, order=order)
    rows = sources.load(data, split=split, n=images, seed=seed)
    scores = loaded.score() if algorithm == "ranking" else None
    result = ALGORITHMS[algorithm](
        model,
        [loaded[t.name] for t in chosen],
        chosen,
        [t.prompts(rows, n, seed, layout).query_only() for t in chosen],
        PatchSpace(model, layout, granularity, stacks.split(",")),
        loss=loss,
        seed=seed,
        **_given(budget=budget, batch_size=batch_size, resume=resume, recipe=recipe, size=size, scores=scores),
    )
    Console().print(str(result), highlight=False, soft_wrap=True)
    (result.patches if output.suffix == ".json" else result).save(output)
    _wrote(output)
    if plot:
        plot.mkdir(parents=True, exist_ok=True)
        figures = {"curve.png": plots.curves({algorithm: result})}
        if granularity != "token":
            figures["units.png"] = plots.score_maps(result)
        for name, figure in figures.items():
            figure.savefig(plot / name, dpi=150)
            _wrote(plot / name)


@app.command(
    rich_help_panel=VECTORS,
    epilog="Examples: vtv evaluate tiny --tasks segmentation,lowlight --data scenes --n 100 -o results\n\n"
    "vtv evaluate tiny --tasks segmentation --vectors vectors.safetensors --patches segmentation.json -o results",
)
def evaluate(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder for tables, values and pictures.")],
    tasks: Annotated[str, typer.Option(help="Tasks by name, with commas between them.")] = "segmentation",
    vectors: Annotated[Path | None, typer.Option(help="What `vtv collect` wrote.")] = None,
    patches: Annotated[
        Path | None, typer.Option(help="Where to patch: a patch set (.json) or a search result (.safetensors).")
    ] = None,
    data: Data = "scenes",
    split: Annotated[str, typer.Option(help="Split of the data.")] = "test",
    images: Annotated[int | None, typer.Option(help="Images to draw prompts from.")] = None,
    n: Annotated[int, typer.Option(help="Prompts a task.")] = 100,
    order: Order = "vertical",
    seed: Annotated[int, typer.Option(help="Of the images and the prompts.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts a forward.")] = 32,
    vqgan: VQGAN = None,
    device: Device = None,
) -> None:
    """Compare one-shot, zero-shot and, with vectors and patches, task vectors, on the same prompts.

    Writes table.md, table.csv, values.parquet and a picture of the first answers for every task.
    """
    from dataclasses import replace

    from vtv_nnsight import data as sources
    from vtv_nnsight import plots
    from vtv_nnsight import tasks as registry
    from vtv_nnsight.evaluation import Table, comparison
    from vtv_nnsight.evaluation import evaluate as run
    from vtv_nnsight.files import write_text
    from vtv_nnsight.vectors import TaskVectors

    if (vectors is None) != (patches is None):
        raise ValueError("--vectors and --patches go together; give both or neither.")
    chosen = [registry.get(name) for name in tasks.split(",")]
    loaded = TaskVectors.load(vectors) if vectors else None
    units = _patches(patches) if patches else None
    if loaded and (missing := [task.name for task in chosen if task.name not in loaded]):
        raise ValueError(f"{vectors} has no vector of {', '.join(missing)}; it has {', '.join(loaded)}.")
    model = _model(source, vqgan, device)
    layout = replace(model.layout, order=order)
    rows = sources.load(data, split=split, n=images, seed=seed)
    tables = [
        run(
            model,
            task,
            task.prompts(rows, n, seed, layout),
            comparison(loaded[task.name], units, loaded, seed) if loaded else None,
            batch_size=batch_size,
        )
        for task in chosen
    ]
    table = Table.cat(tables)
    print(table)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "table.md", table.markdown() + "\n")
    table.csv(output / "table.csv")
    table.parquet(output / "values.parquet")
    written = ["table.md", "table.csv", "values.parquet"]
    for task in chosen:
        plots.answers(table, task.name).savefig(output / f"{task.name}.png", dpi=150)
        written.append(f"{task.name}.png")
    for name in written:
        _wrote(output / name)


def _model(source: str, vqgan: Path | None, device: str | None):
    from vtv_nnsight.tracing import MAEVQGAN

    model = MAEVQGAN(source, **_given(vqgan=vqgan))
    return model.to(device) if device else model


def _patches(path: Path):
    """The patch set in a file of its own, or in a search result."""
    from vtv_nnsight.patches import PatchSet

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
        list[Path],
        typer.Argument(help="{task}_mean_activations.pkl and bernoullis_*.pkl, or folders that hold them."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write in.")],
    vqgan: VQGAN = None,
    seed: Annotated[
        int | None, typer.Option(help="Draw the patches from their probabilities, instead of taking the likely ones.")
    ] = None,
) -> None:
    """Turn files of VTV's released code into vectors.safetensors and patch sets (.json).

    The files are pickles; only tensors and arrays are read from them, and nothing in them is run.
    """
    from vtv_nnsight import released
    from vtv_nnsight.tracing import MAEVQGAN

    activations, bernoullis = released.find(files)
    model = MAEVQGAN(source, **_given(vqgan=vqgan))
    sets = {file: released.read_patches(model, file, seed) for file in bernoullis}
    vectors, residuals = released.read_activations(model, activations) if activations else (None, {})
    output.mkdir(parents=True, exist_ok=True)
    for task, residual in residuals.items():
        both = ", ".join(f"{stack} {value:.1e}" for stack, value in residual._asdict().items())
        Console().print(f"{task}: {vectors[task].count} prompts, residual {both}", highlight=False, soft_wrap=True)
    if vectors is not None:
        vectors.save(output / "vectors.safetensors")
        _wrote(output / "vectors.safetensors")
    for file, patches in sets.items():
        patches.save(output / f"{file.stem}.json")
        _wrote(output / f"{file.stem}.json")


def main() -> None:
    app()


@app.command(
    rich_help_panel=TRAINING,
    epilog="Examples: vtv pretrain tokenizer --config tiny --out runs/tiny\n\n"
    "vtv pretrain mae --config tiny --out runs/tiny --resume",
)
def pretrain(
    stage: Annotated[str, typer.Argument(help='"tokenizer" first, then "mae".', metavar="tokenizer|mae")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the stages go in tokenizer/ and mae/.")],
    config: Annotated[str, typer.Option(help='"tiny" (the embedded model), "small", "published" or "smoke".')] = "tiny",
    images: Annotated[
        Path | None, typer.Option(help="A corpus or a folder of pictures to train on beside the generated scenes, "
        "instead of the photographs that scikit-image and scikit-learn carry.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, in place of the config's.")] = None,
    decay: Annotated[
        int | None, typer.Option(help="Last steps, over which the rates fall to zero, in place of the config's.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str | None, typer.Option(help="A torch device; by default the first GPU, or the CPU.")] = None,
) -> None:
    """Train a MAE-VQGAN of your own: its tokenizer, then its transformer."""
    from vtv_nnsight.pretraining import pretrain as run

    _wrote(run(stage, config, out, images=images, steps=steps, decay=decay, resume=resume, seed=seed, device=device))


@app.command(
    rich_help_panel=BENCHMARKS,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Examples: vtv bench patch_sets mine.json --tasks segmentation\n\nvtv bench all --quick",
)
def bench(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(help="A benchmark, or all; none lists them.")] = None,
) -> None:
    """Run a benchmark with options of its own (`vtv bench NAME --help`), or list them."""
    import subprocess
    import sys

    scripts = _benchmarks()
    if name is None:
        for path in scripts.values():
            title = path.read_text().removeprefix('"""').partition("\n")[0]
            Console().print(f"{path.stem:<20}{title}", highlight=False, soft_wrap=True)
        return
    if name != "all" and name not in scripts:
        raise ValueError(f"{name!r} is not a benchmark; choose from {', '.join(scripts)}, or all.")
    for script in scripts.values() if name == "all" else [scripts[name]]:
        if code := subprocess.run([sys.executable, str(script), *ctx.args]).returncode:
            raise typer.Exit(code)


def _benchmarks() -> dict[str, Path]:
    """Name → script: those that were installed, or those of the repository that this package lies in."""
    package = Path(__file__).parent
    found = sorted((package / "benchmarks").glob("*.py")) or sorted((package.parent / "benchmarks").glob("*.py"))
    return {path.stem: path for path in found if path.stem != "common"}


def _as_they_are(example_input, example_output, query, layout):
    from vtv_nnsight.images import as_rgb, resize, to_tensor
    from vtv_nnsight.prompts import VisualPrompt

    pictures = {"example_input": example_input, "example_output": example_output, "query": query}
    cells = {name: to_tensor(resize(as_rgb(image), layout.cell_size)) for name, image in pictures.items()}
    return VisualPrompt.from_cells(cells, layout)


def _open(path: Path):
    """A picture file, decoded."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}.") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}.") from error
    return image


def _given(**options) -> dict:
    return {name: value for name, value in options.items() if value is not None}


def _parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _wrote(path: Path) -> None:
    Console().print(f"wrote {path}", highlight=False, soft_wrap=True)
