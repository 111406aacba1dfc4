"""`vtv bench`: the scripts in benchmarks/."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtv_nnsight.cli.app import BENCHMARKS, app, say


@app.command(
    rich_help_panel=BENCHMARKS,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Examples: vtv bench patch_sets mine.json --tasks segmentation\n\nvtv bench all --quick",
)
def bench(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(help="A benchmark, or all; without a name they are listed.")] = None,
) -> None:
    """Run a benchmark with options of its own (`vtv bench NAME --help`), or list them."""
    import subprocess
    import sys

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
    found = sorted((package / "benchmarks").glob("*.py")) or sorted((package.parent / "benchmarks").glob("*.py"))
    return {path.stem: path for path in found if path.stem != "common"}
