"""What the events of the page of `vtv demo` call."""

from __future__ import annotations

import functools
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from vtv_nnsight import tasks
from vtv_nnsight.demo.playing import VECTOR, Player, Row, drawn_mask, enlarged, panels, upload
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.vectors import TaskVector, TaskVectors

NONE = "none"
"""No other task's vector is mixed in."""


def show_errors(function: Callable) -> Callable:
    """The same function; what it refuses is shown on the page, in its one sentence."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except (ValueError, TypeError, OSError) as error:
            raise gr.Error(str(error), duration=8, print_exception=False) from error

    return wrapped


@dataclass(frozen=True, eq=False)
class Callbacks:
    """Functions from values of the page's components to values of others. `visitor` is the player that a search on a
    visitor's pictures made, None before; `ticked` are the names of units that are on, a list for each panel.

    Args:
        player: That of all visitors.
        folder: Where files to download are written.
    """

    player: Player
    folder: Path

    @functools.cached_property
    def panels(self) -> dict[str, dict[str, str]]:
        """See `playing.panels`."""
        return panels(self.player.space)

    @show_errors
    def respond(
        self, task: str, other: str, share: float, mode: str, scale: float, example: Row | None, query: Row,
        visitor: Player | None, *ticked: list[str],
    ):  # fmt: skip
        """The answer, the query as the task shows it, and a line about them."""
        began = time.perf_counter()
        units = self._units(task, ticked, visitor)
        prompt = self.player.prompt(task, example, query)
        cell = self.player.answer(prompt, mode, self._vector(task, other, share, visitor), units, scale)
        seconds = time.perf_counter() - began
        words = mode
        if mode == VECTOR:
            mixed = "" if other == NONE else f", {share:g} of it {other}'s"
            words += f"{mixed}, scale {scale:g}, {len(units)} of {len(units.space)} units"
        if query.get(tasks.get(task).needs) is not None and (example or {}).get("answer") is None:
            score = float(tasks.get(task).score(cell[None], prompt.region("output"))[0])
            words += f": {tasks.get(task).metric.label} {score:.3f}"
        return enlarged(cell), enlarged(prompt.region("query")[0]), f"{words} ({seconds:.1f} s)"

    def example_cells(self, row: Row | None, task: str) -> tuple[Any, Any]:
        """The example's two cells, as the page shows them."""
        if row is None:
            return None, None
        if row.get("answer") is not None:
            return row["image"], row["answer"]
        cell, answer = tasks.get(task).cells(row, self.player.space.layout.cell_size)
        return enlarged(cell, 168), None if answer is None else enlarged(answer, 168)

    def found_units(self, task: str, other: str, visitor: Player | None) -> list[list[str]]:
        """The units that were found for a task and the other that is mixed in."""
        return self._ticks((visitor or self.player).found(task, None if other == NONE else other))

    def random_units(self, *ticked: list[str]) -> list[list[str]]:
        """As many units, drawn at random."""
        return self._ticks(PatchSet.random(self.player.space, sum(map(len, ticked)), random.randrange(2**31)))

    def pick(self, event: gr.SelectData) -> Row:
        """The row of a picture that was clicked at."""
        return dict(self.player.rows[event.index])

    @show_errors
    def upload_picture(self, path: str) -> Row:
        """An uploaded picture as a row."""
        return {"image": upload(path)}

    @show_errors
    def upload_answer(self, path: str, row: Row) -> Row:
        """The example with an uploaded answer."""
        return {"image": row["image"], "answer": upload(path)}

    @show_errors
    def paint_mask(self, drawn: dict[str, Any] | None) -> Row:
        """What was drawn over a picture, as a row with a mask."""
        if not drawn or drawn.get("background") is None:
            raise ValueError("there is no picture to paint on; upload one, or pick an example.")
        image = drawn["background"].convert("RGB")
        return {"image": image, "mask": drawn_mask(image, drawn["layers"])}

    @show_errors
    def search(self, task: str, files: list[str] | None, visitor: Player | None, progress: Any = gr.Progress()):  # noqa: B008
        """The visitor's player, its units, and a line about them."""
        progress(0.05, "reading")
        rows = [{"image": upload(path, Path(path).name)} for path in files or []]
        progress(0.2, f"collecting and searching on {len(rows)} pictures")
        visitor = (visitor or self.player).search(task, rows)
        progress(1.0, "done")
        units = visitor.found(task)
        return [visitor, *self._ticks(units), f"{len(units)} units found on your pictures: {', '.join(units)}"]

    def write_vector(self, task: str, other: str, share: float, visitor: Player | None) -> str:
        """The path of a file with the vector, mixed as it is on the page."""
        vector = self._vector(task, other, share, visitor)
        path = Path(tempfile.mkdtemp(dir=self.folder), "vector.safetensors")
        TaskVectors({vector.task: vector}).save(path)
        return str(path)

    def write_set(self, task: str, visitor: Player | None, *ticked: list[str]) -> str:
        """The path of a file with the units that are on."""
        path = Path(tempfile.mkdtemp(dir=self.folder), "units.json")
        self._units(task, ticked, visitor).save(path)
        return str(path)

    def _vector(self, task: str, other: str, share: float, visitor: Player | None) -> TaskVector:
        return (visitor or self.player).vector(task, None if other == NONE else other, share)

    def _units(self, task: str, ticked: Sequence[list[str]], visitor: Player | None) -> PatchSet:
        """The units that are ticked; those found for the task where the page has no boxes to tick."""
        if not self.panels:
            return (visitor or self.player).found(task)
        return PatchSet.named(self.player.space, [name for names in ticked for name in names])

    def _ticks(self, units: Any) -> list[list[str]]:
        """The same units, a list of names for each panel."""
        return [[name for name in names if name in units] for names in self.panels.values()]
