"""The command line itself: what every command shares. A command's module is imported when the command is called or its
help is shown, so that `vtv --help` does not wait for torch."""

from __future__ import annotations

import ast
import os
import re
import signal
import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from vtv_nnsight.cli.output import complain, say, sentence
from vtv_nnsight.text import shortened

COMMANDS = {
    "From end to end": {"run": "start", "report": "start", "demo": "demo"},
    "Model": {"info": "model", "convert": "model"},
    "Prompts": {"prompt": "prompts"},
    "Task vectors": {
        "collect": "collecting",
        "search": "searching",
        "evaluate": "evaluating",
        "import-released": "released",
    },
    "Training": {"pretrain": "training"},
    "Benchmarks": {"bench": "benchmarks"},
}
"""Panel of the help → command → the module of `vtv_nnsight.cli` that it is in."""

GO_ON = {
    "run": "The same command goes on where it stopped.",
    "search": "With --resume FILE, the same command would go on where it stops.",
    "pretrain": "The same command with --resume goes on where it last saved.",
}
"""Command → what is said when it is interrupted."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends before it kills."""


class LazyCommand(TyperCommand):
    """The name of a command and the first line of its help; the command itself is imported to parse its arguments."""

    def __init__(self, name: str, module: str) -> None:
        super().__init__(name, help=escape(_docstrings(module)[name.replace("-", "_")].partition("\n\n")[0]))
        self.load = lambda: load_commands(module)[name]

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the command itself, which parses its arguments."""
        return self.load().make_context(info_name, args, parent, **extra)


class Commands(TyperGroup):
    """Takes `--debug` anywhere, and says what went wrong, or how to go on after Ctrl-C or SIGTERM, in one sentence."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        imported, self.commands = self.commands, {}
        for panel, modules in COMMANDS.items():
            for name, module in modules.items():
                command: Any = _as_written(imported[name]) if name in imported else LazyCommand(name, module)
                command.rich_help_panel = panel
                self.commands[name] = command

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--debug` is the group's, wherever it stands; empty values, as of a shell's variable that is not set, are
        noted for `invoke`."""
        ctx.meta["empty"] = [
            "".join(args[:i][-1:]) if not arg.strip() else arg.strip().rstrip("=")
            for i, arg in enumerate(args)
            if not arg.strip() or re.fullmatch(r"--[\w-]+=\s*", arg)
        ]
        return super().parse_args(ctx, sorted(args, key=lambda arg: arg != "--debug"))

    def invoke(self, ctx: Any) -> Any:
        """Run a command; its errors are told in a sentence, and are the exit code."""
        try:
            if ctx.meta["empty"]:
                raise ValueError(f"an empty value follows {ctx.meta['empty'][0]}; give one, or leave it out.")
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            complain(f"Stopped. {GO_ON.get(ctx.invoked_subcommand, '')}".strip())
            raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from stop
        except Exception as error:
            if _is_of_typer(error):
                vars(error).update(message=shortened(getattr(error, "message", "")))
            if ctx.params["debug"] or _is_of_typer(error):
                raise
            complain(f"[bold red]Error:[/] {escape(sentence(error))}")
            raise typer.Exit(1) from error


def _as_written(command: Any) -> Any:
    """A command, the brackets in its help shown as they are."""
    for shown in (command, *command.params):
        if getattr(shown, "help", None):
            shown.help = escape(shown.help)
    return command


def load_commands(*modules: str) -> dict[str, Any]:
    """Name → command, those of some modules imported, by default of all."""
    for module in modules or {module for names in COMMANDS.values() for module in names.values()}:
        import_module(f"vtv_nnsight.cli.{module}")
    group: Any = typer.main.get_command(app)
    return group.commands


@cache
def _docstrings(module: str) -> dict[str, str]:
    """Function → docstring, read from a module's source without importing it."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {function.name: ast.get_docstring(function) or "" for function in functions}


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


def _version(value: bool) -> None:
    if value:
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
    warnings.showwarning = lambda message, *_, **__: complain(f"[bold yellow]Note:[/] {escape(str(message))}")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads yield busy cores; read when torch is imported
    app()
