"""Progress bars: tqdm's, or all of them as one line of a display that says which step of several is being done.

    >>> with display(2) as step:
    ...     with step("collect") as doing:
    ...         doing("segmentation")
    ...         for prompt in tqdm(prompts):      # shows inside the display
    ...             ...

Long loops of this package take `tqdm` from here.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from tqdm.auto import tqdm as bar
from tqdm.std import tqdm as base
from transformers.utils import logging as loading

_update: ContextVar[Callable[..., None] | None] = ContextVar("update", default=None)
"""Changes the line of the display that is shown, if one is."""


def tqdm(*args: Any, **kwargs: Any) -> base:
    """A progress bar, with tqdm's own arguments."""
    return (bar if _update.get() is None else _Line)(*args, **kwargs)


class _Line(base):
    """A bar that a display shows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"gui": True})  # it prints nothing of its own

    def display(self, *_: Any, **__: Any) -> None:
        if update := _update.get():
            update(completed=self.n, total=self.total, note=self.postfix or "")


@contextmanager
def display(total: int, shown: bool = True) -> Iterator[Callable[[str], AbstractContextManager[Callable[[str], None]]]]:
    """A display of `total` steps, on stderr. `step(name)` is the context of one of them; what it yields is called with
    what is being done. A step that does nothing is shown as done before."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TaskProgressColumn())
    progress = Progress(
        *columns,
        TextColumn("[dim]{task.fields[note]}", justify="left"),
        TimeElapsedColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
        disable=not shown,
    )
    line = progress.add_task("", total=None, note="")
    numbers = itertools.count(1)

    def update(**fields: Any) -> None:
        progress.update(line, **fields)

    @contextmanager
    def step(name: str) -> Iterator[Callable[[str], None]]:
        title, began, done = f"[bold]{next(numbers)}/{total} {name}[/]", time.perf_counter(), []

        def doing(what: str) -> None:
            done.append(what)
            update(description=f"{title} {what}", completed=0, total=None, note="")

        update(description=title, completed=0, total=None, note="")
        yield doing
        if shown:
            spent = duration(time.perf_counter() - began) if done else "done before"
            progress.console.print(f"[green]✓[/] {title}  [dim]{spent}[/]")

    token = _update.set(update)
    try:
        with progress:
            yield step
    finally:
        _update.reset(token)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of other libraries, about what takes a moment."""
    shown = loading.is_progress_bar_enabled(), is_progress_bar_enabled()
    loading.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown[0]:
            loading.enable_progress_bar()
        if shown[1]:
            enable_progress_bars()


def duration(seconds: float) -> str:
    """Such as "0.4 s", "12 s" or "3 min 20 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
