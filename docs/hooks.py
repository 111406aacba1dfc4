"""What mkdocs does to pages: algorithms, commands and benchmarks are listed from where they are declared, so that the
pages cannot fall behind."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put lists in the place of their marks."""
    for mark, listed in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, listed())
    return markdown


def algorithms() -> str:
    """The table of search algorithms, and the reference of each."""
    from vtv_nnsight.search import ALGORITHMS

    lines = ["| algorithm | how it searches | what it reads |", "| --- | --- | --- |"]
    for algorithm in ALGORITHMS.values():
        reads = ["losses"] + ["gradients"] * algorithm.needs_gradient + ["task scores"] * algorithm.needs_scores
        lines.append(f"| `{algorithm.name}` | {algorithm.description} | {', '.join(reads)} |")
    pages = [f"::: {algorithm.__module__}.{algorithm.name}" for algorithm in ALGORITHMS.values()]
    return "\n".join(lines) + "\n\n" + "\n\n".join(pages)


def commands() -> str:
    """Every command of `vtv`: what it does, its arguments and options with their defaults, its examples."""
    from vtv_nnsight.cli.group import load_commands

    return "\n\n".join(_command(name, command) for name, command in load_commands().items())


def _command(name: str, command: Any) -> str:
    lines = [f"## vtv {name}", inspect.cleandoc(command.help or "")]
    lines.append("| option | what it does | default |\n|---|---|---|")
    for parameter in command.params:
        option = parameter.param_type_name == "option"
        usage = ", ".join(parameter.opts) if option else (parameter.metavar or parameter.name.upper())
        lines[-1] += f"\n| `{usage}` | {_cell(parameter.help or '')} | {_cell(_default(parameter))} |"
    if not command.params:
        lines.pop()
    if command.epilog:
        lines.append("```text\n" + command.epilog.replace("\n\n", "\n") + "\n```")
    return "\n\n".join(lines)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if isinstance(shown := getattr(parameter, "show_default", None), str):
        return shown
    value = parameter.default
    return "" if value is None or value is False or callable(value) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def benchmarks() -> str:
    """Every benchmark with the first line of its script."""
    lines = ["| benchmark | what it tells |", "|---|---|"]
    for path in sorted(BENCHMARKS.glob("*.py")):
        if path.stem != "common":
            title = path.read_text(encoding="utf-8").removeprefix('"""').partition("\n")[0]
            lines.append(f"| `{path.stem}` | {_cell(title)} |")
    return "\n".join(lines)


def rankings() -> str:
    """The table of rankings of units."""
    from vtv_nnsight.studies.circuits import RANKINGS

    lines = ["| ranking | search | a unit's score |", "|---|---|---|"]
    for name, ranking in RANKINGS.items():
        options = ", ".join(f"{option}={value!r}" for option, value in ranking.options.items())
        lines.append(f"| {name} | `{ranking.algorithm}({options})` | {_cell(ranking.description)} |")
    return "\n".join(lines)


MARKS: dict[str, Callable[[], str]] = {
    "<!-- search.ALGORITHMS -->": algorithms,
    "<!-- vtv -->": commands,
    "<!-- benchmarks -->": benchmarks,
    "<!-- circuits.RANKINGS -->": rankings,
}
