"""Progress bars: of a loop, or all of them as one line of a display that says which step of several is being done.

    >>> for batch in progress_bar(batches, desc="collecting"):
    ...     ...
    >>> with display(2) as step:
    ...     with step("collect") as working_on:
    ...         working_on("segmentation")
    ...         for prompt in progress_bar(prompts):      # shows inside the display
    ...             ...

All are drawn by rich, on stderr; in a notebook under the cell, where ipywidgets is installed.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers.utils import logging as loading

from vtv_nnsight.text import duration

_display: ContextVar[Callable[..., None] | None] = ContextVar("display", default=None)
"""Changes the line of the display that is shown, if one is."""


class progress_bar:
    """A progress bar over a loop, or one that is told how far things are. Bars inside others stand below them.

    Give it a `with` block where the loop may raise: a bar that is left open takes in those that come after it.

    Args:
        iterable: What to loop over; None for a bar that `update` moves.
        total: How many steps there are; by default as many as the iterable has.
        desc: What is being done.
        unit: What a step is called.
        initial: Steps that were done before.
        disable: Show nothing.
        delay: Seconds before the bar is shown, for what is done in a moment as a rule.
    """

    _shown: ClassVar[list[progress_bar]] = []

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        *,
        total: int | None = None,
        desc: str = "",
        unit: str = "it",
        initial: int = 0,
        disable: bool = False,
        delay: float = 0.0,
    ) -> None:
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        self._iterable, self._done, self._total, self._note = iterable, initial, total, ""
        self._desc, self._unit = desc, unit
        self._line = None if disable else _display.get()
        self._progress: Progress | None = None
        self._due = time.monotonic() + delay if not disable and self._line is None else float("inf")
        self._show()

    @property
    def total(self) -> int | None:
        return self._total

    @total.setter
    def total(self, total: int) -> None:
        self._total = total
        self._show()

    def update(self, n: int = 1) -> None:
        """Say that so many more steps are done."""
        self._done += n
        self._show()

    def set_postfix_str(self, text: str) -> None:
        """Show a few words behind the bar."""
        self._note = text
        self._show()

    def close(self) -> None:
        self._due = float("inf")
        if self not in self._shown:
            return
        self._shown.remove(self)
        if self._shown:
            self._progress.remove_task(self._task)
        else:
            self._progress.stop()

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self._iterable:
                yield item
                self.update()
        finally:
            self.close()

    def __enter__(self) -> progress_bar:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _show(self) -> None:
        fields = dict(completed=self._done, total=self._total, note=escape(self._note))
        if self._line is not None:
            self._line(**fields)
        elif self in self._shown:
            self._progress.update(self._task, **fields)
        elif time.monotonic() >= self._due:
            self._progress = self._shown[0]._progress if self._shown else _started()
            self._task = self._progress.add_task(escape(self._desc), unit=self._unit, **fields)
            self._shown.append(self)


def _started() -> Progress:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=_console(),
    )
    progress.start()
    return progress


class _Rate(ProgressColumn):
    """Steps a second, or seconds a step."""

    def render(self, task: Task) -> Text:
        unit, speed = task.fields["unit"], task.finished_speed or task.speed
        if not speed:
            return Text(f"? {unit}/s", style="progress.data.speed")
        rate = f"{speed:.4g} {unit}/s" if speed >= 1 else f"{1 / speed:.4g} s/{unit}"
        return Text(rate, style="progress.data.speed")


def _console() -> Console:
    """Of stderr. Without ipywidgets rich warns in notebooks at every redraw; there it then writes plain lines."""
    console = Console(stderr=True, highlight=False)
    if console.is_jupyter and not importlib.util.find_spec("ipywidgets"):
        return Console(stderr=True, highlight=False, force_jupyter=False)
    return console


@contextmanager
def display(total: int, shown: bool = True) -> Iterator[Callable[[str], AbstractContextManager[Callable[[str], None]]]]:
    """A display of `total` steps, on stderr. `step(name)` is the context of one of them; what it yields is called with
    what is being done. A step that does nothing is shown as done before."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TaskProgressColumn())
    progress = Progress(
        *columns,
        TextColumn("[dim]{task.fields[note]}", justify="left"),
        TimeElapsedColumn(),
        console=_console(),
        transient=True,
        disable=not shown,
    )
    line = progress.add_task("", total=None, note="")
    numbers = itertools.count(1)

    def update(**fields: Any) -> None:
        progress.update(line, **fields)

    @contextmanager
    def step(name: str) -> Iterator[Callable[[str], None]]:
        title, began, worked = f"[bold]{next(numbers)}/{total} {escape(name)}[/]", time.perf_counter(), []

        def working_on(what: str) -> None:
            worked.append(what)
            update(description=f"{title} {escape(what)}", completed=0, total=None, note="")

        update(description=title, completed=0, total=None, note="")
        yield working_on
        if shown:
            spent = duration(time.perf_counter() - began) if worked else "done before"
            progress.console.print(f"[green]✓[/] {title}  [dim]{spent}[/]")

    token = _display.set(update)
    try:
        with progress:
            yield step
    finally:
        _display.reset(token)


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
