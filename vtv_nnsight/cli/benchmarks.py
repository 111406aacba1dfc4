"""`vtv bench`: the scripts in benchmarks/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from vtv_nnsight.cli.group import app
from vtv_nnsight.cli.output import say


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Examples: vtv bench patch_sets mine.json --tasks segmentation\n\nvtv bench all --quick",
)
def bench(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(help="A benchmark, or all; without a name they are listed.")] = None,
) -> None:
    """Run a benchmark with its own options (`vtv bench NAME --help`), or list them."""
    scripts = _benchmarks()
    if name in (None, "-h", "--help"):
        for path in scripts.values():
            title = path.read_text(encoding="utf-8").removeprefix('"""').partition("\n")[0]
            say(f"{path.stem:<20}{title}")
        return
    if name != "all" and name not in scripts:
        raise ValueError(f"{name!r} is not a benchmark; choose from {', '.join(scripts)}, or all.")
    for script in scripts.values() if name == "all" else [scripts[name]]:
        if code := subprocess.run([sys.executable, str(script), *ctx.args]).returncode:
            raise typer.Exit(code)


def _benchmarks() -> dict[str, Path]:
    """Name → script: those that were installed, or those of the repository that this package lies in."""
    package = Path(__file__).parents[1]
    paths = sorted((package / "benchmarks").glob("*.py")) or sorted((package.parent / "benchmarks").glob("*.py"))
    return {path.stem: path for path in paths if path.stem != "common"}
