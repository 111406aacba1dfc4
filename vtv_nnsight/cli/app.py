"""The command line itself: what every command shares. The commands are in a module for each panel of the help."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from vtv_nnsight.runs.settings import Settings

START, MODEL, PROMPTS, VECTORS = "From end to end", "Model", "Prompts", "Task vectors"
TRAINING, BENCHMARKS = "Training", "Benchmarks"
"""The panels of the help."""

GO_ON = {
    "run": "The same command goes on where it stopped.",
    "collect": "With --resume FILE, the same command would go on where it stops.",
    "search": "With --resume FILE, the same command would go on where it stops.",
    "pretrain": "The same command with --resume goes on where it last saved.",
}
"""Command → what is said when it is interrupted."""

EXPECTED = (ValueError, TypeError, OSError, ImportError)
"""Errors whose message is meant for the user; of others the kind is told as well."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends before it kills."""


class Commands(TyperGroup):
    """Takes `--debug` anywhere, and says what went wrong, or how to go on after Ctrl-C or SIGTERM, in one sentence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, sorted(args, key=lambda arg: arg != "--debug"))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            complain(f"Stopped. {GO_ON.get(ctx.invoked_subcommand, '')}".strip())
            raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from stop
        except Exception as error:
            if ctx.params["debug"] or _is_of_typer(error):
                raise
            complain(f"[bold red]Error:[/] {escape(sentence(error))}")
            raise typer.Exit(1) from error


class ListingCommand(TyperCommand):
    """A command whose help names what the registries hold, in place of {algorithms} and {sources}. They are asked when
    the help is shown, since they need torch."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            text = getattr(parameter, "help", None) or ""
            if "{algorithms}" in text:
                from vtv_nnsight.search import ALGORITHMS

                text = text.replace("{algorithms}", ", ".join(ALGORITHMS))
            if "{sources}" in text:
                from vtv_nnsight.data.sources import SOURCES

                text = text.replace("{sources}", ", ".join(source.usage for source in SOURCES.values()))
            if text:
                parameter.help = text
        super().format_help(ctx, formatter)


def sentence(error: Exception) -> str:
    """An error's message on one line."""
    words = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if isinstance(error, EXPECTED) and words:
        return words
    return f"{type(error).__name__}{': ' if words else ''}{words} (--debug shows where)"


def complain(markup: str) -> None:
    """Say something on stderr; of several processes the first says it."""
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True).print(markup, highlight=False, soft_wrap=True)


def _is_of_typer(error: Exception) -> bool:
    """Whether typer shows an error itself, as it does a wrong option, or ends the program by it."""
    return isinstance(error, (typer.Exit, typer.Abort, *typer.BadParameter.__mro__[1:3]))


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        say(f"vtv-nnsight {version('vtv-nnsight')}")
        raise typer.Exit


@app.callback()
def vtv(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Find, inspect and use visual task vectors in MAE-VQGAN, SegGPT, Painter and ViT-MAE."""


def main() -> None:
    """`vtv`."""

    def terminate(*_: Any) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    app()


# What commands share: their options, of which each has one name everywhere, and how they speak

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
Data = Annotated[str, typer.Option(help="The data: {sources}, or a folder by its path alone.")]
Images = Annotated[Path | None, typer.Option(help="A folder of your own pictures, in place of --data.")]
MaxImages = Annotated[int, typer.Option(min=1, help="The most pictures to draw prompts from.")]
Tasks = Annotated[
    str | None,
    typer.Option(help="Tasks by name, with commas between them.", show_default="VTV's that the data can serve"),
]
Prompts = Annotated[int, typer.Option("--prompts", "--n", min=1, help="Prompts per task.")]
Candidates = Annotated[
    int,
    typer.Option(
        "--candidates", "--select", min=1,
        help="Random prompts per task that are tried one-shot, of which the best are kept; with fewer than four "
        "pictures per prompt none are tried, and prompts are random.",
    ),
]  # fmt: skip
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
Order = Annotated[str, typer.Option(help='"vertical", or "horizontal" for inputs above outputs.')]
Seed = Annotated[int, typer.Option(min=0, help="The seed of all that is random.")]


def place_for_file(ctx: typer.Context, path: Path) -> Path:
    """A path to write a file at, before the work that goes into it: its folder is made, and what cannot be a file's
    path is refused. (Completion in a shell, which parses, too, makes nothing.)"""
    if not ctx.resilient_parsing:
        from vtv_nnsight.files import check_place

        with suppress(FileExistsError, NotADirectoryError):
            path.parent.mkdir(parents=True, exist_ok=True)
        check_place(path)
    return path


Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write.", callback=place_for_file)]


def settings_of(
    images: Path | None, data: str, tasks: str | None, preset: Mapping[str, Any] | None = None, **options: Any
) -> Settings:
    """Settings of a command's options; those that are None are the preset's, or the defaults."""
    if images is not None and data != Settings.data:
        raise ValueError("--images and --data both say where pictures come from; give one.")
    if images is not None and not images.is_dir():
        raise ValueError(f"--images {images} is not a folder; give one of pictures (--max-images says how many).")
    chosen = {"data": str(images) if images else data} | dict(preset or {}) | given(**options)
    if tasks:
        from vtv_nnsight.tasks import get_all

        chosen["tasks"] = tuple(task.name for task in get_all(tasks))
    return Settings(**chosen)


def listed(text: str | None) -> tuple[str, ...] | None:
    """What an option names with commas between; None where it was not given."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def say(what: str | Table) -> None:
    """Print text as it is, whatever brackets are in it, or a table; of several processes the first prints."""
    plain: dict[str, Any] = dict(markup=False, highlight=False, soft_wrap=True) if isinstance(what, str) else {}
    if os.environ.get("RANK", "0") == "0":
        Console().print(what, **plain)


def wrote(path: Path) -> None:
    say(f"wrote {path}")
