"""What the events of the page of `vtv demo` call."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from vtv_nnsight import tasks
from vtv_nnsight.demo.playing import MODES, ONE_SHOT, VECTOR, ZERO_SHOT, Player, Row, enlarged, panels, upload
from vtv_nnsight.evaluation.conditions import FEW_SHOT
from vtv_nnsight.images import enlarge, to_pil
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.report import photographs
from vtv_nnsight.vectors import TaskVector, TaskVectors

NONE = "none"
"""No other task's vector is mixed in."""
SHOWN = (photographs.QUERY, ZERO_SHOT, ONE_SHOT, VECTOR, "truth", photographs.CARRIED)
"""The panels of the page."""
SAID = (ZERO_SHOT, FEW_SHOT, VECTOR, "truth")
"""The answers of the tab for words."""
SIDE = 336
"""Pixels: pictures are not shown smaller."""
STEPS, PAUSE = 11, 0.15
"""Of the scale when it is played, and seconds between them."""


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
        prefix: What ids of the page's elements begin with.
    """

    player: Any
    folder: Path
    prefix: str = ""

    def id(self, name: str) -> str:
        """The id of one of the page's elements."""
        return self.prefix + name

    @functools.cached_property
    def panels(self) -> dict[str, dict[str, str]]:
        """See `playing.panels`."""
        return panels(self.player.space)

    def heat(self, task: str, visitor: Player | None) -> str:
        """A style that colours each unit by the score that the search gave it."""
        scores = (visitor or self.player).bundle.results[task].scores
        least, most = scores.min(), scores.max()
        shares = ((scores - least) / (most - least).clamp(min=1e-12)).tolist()
        share = dict(zip(self.player.space.names, shares))
        columns, rules = max(stage.heads for stage in self.player.space.stages), []
        for panel, names in enumerate(self.panels.values()):
            boxes = f"#{self.id(f'units-{panel}')} .wrap"
            rules.append(f"{boxes} {{ grid-template-columns: repeat({columns}, max-content); }}")
            for place, name in enumerate(names, 1):
                colour = f"color-mix(in srgb, #0b7a5c {70 * share[name]:.0f}%, transparent)"
                rules.append(f"{boxes} label:nth-of-type({place}) {{ background: {colour}; }}")
        return f"<style>{' '.join(rules)}</style>"

    def found_units(self, task: str, other: str, visitor: Player | None) -> list:
        """The units that were found for a task and the other that is mixed in, as the panels' values."""
        return self._values((visitor or self.player).found(task, None if other == NONE else other))

    def no_units(self) -> list:
        """The panels' values where no unit is on."""
        return self._values(())

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

    def _values(self, units: Any) -> list:
        """What gradio takes for the panels: a list of names for each, and of a lone one that list itself."""
        ticks = self._ticks(units)
        return ticks if len(ticks) > 1 else ticks[0]

    @staticmethod
    def _in_words(other: str, share: float, scale: float, units: PatchSet) -> str:
        """What an answer with the vector was made of."""
        mixed = "" if other == NONE else f", {share:g} of it {other}'s"
        return f"{VECTOR}{mixed}, scale {scale:g}, {len(units)} of {len(units.space)} units"


class PictureCallbacks(Callbacks):
    """Those of the page of pictures, over a `Player`."""

    @show_errors
    def respond(
        self, task: str, other: str, share: float, scale: float, example: Row | None, query: Row,
        visitor: Player | None, *ticked: list[str],
    ):  # fmt: skip
        """A picture for each of `SHOWN`, a line about them, and Python that makes the answer with the vector."""
        began = time.perf_counter()
        units, vector = self._units(task, ticked, visitor), self._vector(task, other, share, visitor)
        pictures = self.player.answers(task, example, query, vector, units, scale)
        seconds, asked = time.perf_counter() - began, tasks.get(task)
        words = self._in_words(other, share, scale, units)
        if "truth" in pictures:
            truth = pictures["truth"][None]
            scores = {name: float(asked.score(pictures[name][None], truth)[0]) for name in MODES if name in pictures}
            others = "".join(f", {name} {score:.3f}" for name, score in scores.items() if name != VECTOR)
            words += f": {asked.metric.label} {scores[VECTOR]:.3f}{others}"
        unlike = photographs.warning(self.player.model, units.space.layout, query["image"])
        words += f" ({seconds:.1f} s)" + (f"\n\n**Note:** {unlike}" if unlike else "")
        pictures = {photographs.QUERY: pictures[photographs.PHOTOGRAPH]} | pictures
        code = self.player.code(task, None if other == NONE else other, share, units, query, scale)
        return *(self._panel(name, pictures.get(name)) for name in SHOWN), words, code

    @staticmethod
    def _panel(name: str, pixels: torch.Tensor | None) -> Any:
        """What a panel shows: a cell, enlarged, or a photograph as large as it is; or that there is none."""
        if pixels is None:
            return gr.update(value=None, visible=name not in ("truth", photographs.CARRIED))
        height, width = pixels.shape[-2:]
        if height != width or max(height, width) > SIDE:
            pixels = enlarge(pixels, round(height * max(1, SIDE / width)), max(width, SIDE))
            return gr.update(value=to_pil(pixels), visible=True)
        return gr.update(value=enlarged(pixels), visible=True)

    def play(
        self, task: str, other: str, share: float, query: Row, visitor: Player | None, *ticked: list[str]
    ) -> Iterator[tuple[float, Any]]:
        """The scale from 0 to 1, and the answer at each."""
        units, vector = self._units(task, ticked, visitor), self._vector(task, other, share, visitor)
        scales = torch.linspace(0, 1, STEPS)
        cells = self.player.at_scales(task, query, vector, units, scales)
        for scale, cell in zip(scales.tolist(), cells):
            yield round(scale, 2), enlarged(cell)
            time.sleep(PAUSE)

    def example_cells(self, row: Row | None, task: str) -> tuple[Any, Any]:
        """The example's two cells, as the page shows them."""
        if row is None:
            return None, None
        if row.get("answer") is not None:
            return row["image"], row["answer"]
        cell, answer = tasks.get(task).cells(row, self.player.space.layout.cell_size)
        return enlarged(cell, 168), None if answer is None else enlarged(answer, 168)

    def pick(self, event: gr.SelectData) -> Row:
        """The row of a picture that was clicked at."""
        return self.row(event.index)

    def row(self, number: int) -> Row:
        """One of the player's rows, which knows its number."""
        return {**self.player.rows[number], "number": number}

    @show_errors
    def upload_picture(self, path: str) -> Row:
        """An uploaded picture as a row."""
        return {"image": upload(path)}

    @show_errors
    def upload_answer(self, path: str, row: Row) -> Row:
        """The example with an uploaded answer."""
        return {"image": row["image"], "answer": upload(path)}

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


class WordCallbacks(Callbacks):
    """Those of the tab for words, over a `WordPlayer`."""

    @show_errors
    def respond(
        self, task: str, other: str, share: float, scale: float, query: str, shots: int, visitor: None,
        *ticked: list[str],
    ):  # fmt: skip
        """A text for each of `SAID`, a line about them, the few-shot prompt, and Python that prints the answer with the
        vector."""
        began = time.perf_counter()
        units, vector = self._units(task, ticked, visitor), self._vector(task, other, share, visitor)
        answers = self.player.answers(task, query, vector, units, scale, shots)
        words = f"{self._in_words(other, share, scale, units)} ({time.perf_counter() - began:.1f} s)"
        code = self.player.code(task, None if other == NONE else other, share, units, query, scale)
        return *(answers[name] for name in SAID), words, self.player.few_shot(task, query, shots).texts[0], code

    def first_query(self, task: str) -> str:
        """A query to begin with."""
        row = tasks.get(task).rows[0]
        return row[tasks.get(task).inputs[-1]]
