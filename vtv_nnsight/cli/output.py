"""How commands speak: text and tables on stdout, complaints on stderr."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from vtv_nnsight.text import printable, shortened

WIDEST = 100
"""Columns of a table in a terminal, at most."""
EXPECTED = (ValueError, TypeError, OSError, ImportError)
"""Errors with a message that is meant for the user; of others the kind is told as well."""


def say(what: str | Table) -> None:
    """Print text as it is, whatever brackets are in it, or a table; a terminal gets Markdown's tables as tables. Of
    several processes the first prints."""
    plain: dict[str, Any] = dict(markup=False, highlight=False, soft_wrap=True) if isinstance(what, str) else {}
    console = Console()
    if os.environ.get("RANK", "0") != "0":
        return
    if isinstance(what, str) and "\n|" in what and console.is_terminal:
        Console(width=min(console.width, WIDEST)).print(Markdown(what))
    else:
        console.print(what, **plain)


def wrote(path: Path) -> None:
    """Say where something was written."""
    say(f"wrote {path}")


def complain(markup: str) -> None:
    """Say something on stderr; of several processes the first says it."""
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True).print(markup, highlight=False, soft_wrap=True)


def sentence(error: Exception) -> str:
    """An error's message on one line."""
    words = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    words = shortened(printable(words))
    if words and (isinstance(error, EXPECTED) or isinstance(error, KeyError) and " " in words):  # not a mere key
        return words
    return f"{type(error).__name__}{': ' if words else ''}{words} (--debug shows where)"
