"""Pictures for the pages: as data URIs, so that a page is one file."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.spines import Spine
from matplotlib.text import Text
from PIL import Image

from vtv_nnsight.evaluation.conditions import PATCHED
from vtv_nnsight.files import replacing
from vtv_nnsight.images import png_of, to_pil
from vtv_nnsight.prompts import crop
from vtv_nnsight.report.reading import PICTURES, RunResults
from vtv_nnsight.search import plots as search_plots
from vtv_nnsight.search.result import SearchResult

CELLS = {"example_input": "example", "example_output": "its answer", "output": "to be painted"}
"""What a page calls cells of the layout."""

INK = {"light": "#1c2126", "dark": "#e8e6e1"}
DPI = 144


Keep = Callable[[str, bytes | pd.DataFrame], str]
"""Keeps a file beside a page: its name and content → its address, seen from the page."""


class Drawn(NamedTuple):
    """A figure as data URIs, on no background, in the ink of a light and of a dark page; and the kinds of files that it
    was kept in → their addresses."""

    light: str
    dark: str
    width: int
    caption: str
    wide: bool
    links: dict[str, str]


def draw(
    figure: Callable[[], Figure],
    caption: str,
    wide: bool = False,
    keep: Keep | None = None,
    name: str = "",
    numbers: pd.DataFrame | None = None,
) -> Drawn:
    """A figure drawn twice, in light and in dark.

    Args:
        wide: Whether a phone should scroll it rather than make it small.
        keep: Where it is kept, too, as `name`.png and `name`.svg.
        numbers: What it shows, kept as `name`.csv.
    """
    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    inks = dict.fromkeys(keys, INK["light"]) | {"legend.framealpha": 0.0, "font.size": 9}
    links = {} if keep is None or numbers is None else {"CSV": keep(f"{name}.csv", numbers)}
    with matplotlib.rc_context(inks | {"svg.hashsalt": "vtv", "svg.fonttype": "none"}):
        made = figure()
        light = _drawn(made)
        made.set_layout_engine("none")  # which takes most of the time; everything stays where it is
        if keep:
            links["PNG"] = keep(f"{name}.png", png_of(_on_white(light)))
            buffer = io.StringIO()
            FigureCanvasSVG(made).print_svg(buffer, metadata={"Date": None})
            links["SVG"] = keep(f"{name}.svg", buffer.getvalue().encode())
        _change_ink(made, INK["light"], INK["dark"])
        dark = _drawn(made)
    few = [drawn.quantize(128, method=Image.Quantize.FASTOCTREE) for drawn in (light, dark)]  # all that a figure needs
    return Drawn(*map(_data_uri, map(png_of, few)), int(96 * made.get_figwidth()), caption, wide, links)


def keep_file(run: Path, name: str, content: bytes | pd.DataFrame) -> str:
    """A `Keep` for the folder of a run: files lie in its folder figures."""
    folder = run / "figures"
    folder.mkdir(exist_ok=True)
    if isinstance(content, pd.DataFrame):
        content = content.to_csv(index=False, lineterminator="\n").encode()
    with replacing(folder / name) as temporary:
        temporary.write_bytes(content)
    return f"{folder.name}/{quote(name)}"


def searches(results: Mapping[str, Sequence[SearchResult]]) -> Figure:
    """`search.plots.curves`, with labels shown as they are, which matplotlib takes for mathematics or hides."""
    return search_plots.curves({plain_label(name): found for name, found in results.items()})


def all_searches(results: Mapping[str, Sequence[SearchResult]], bounds: Mapping[str, Mapping[str, float]]) -> Figure:
    """The searches of several tasks, a small panel each, with lines for conditions without a vector.

    Args:
        results: Task → its result, or those of several folds.
        bounds: Task → condition → its loss, as the searches measure it.
    """
    figure = Figure(figsize=(2.3 * len(results) + 0.4, 2.3), layout="constrained")
    for panel, (name, found) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
        for result in found:
            at = np.array([step.evaluations for step in result.history])
            panel.plot(at, search_plots.best_so_far(result, at), color="tab:green", label=PATCHED)
        for (condition, loss), style in zip(bounds[name].items(), ("--", ":")):
            panel.axhline(loss, color="tab:gray", linestyle=style, label=condition)
        panel.set_title(plain_label(name), fontsize=9)
        panel.set_xlabel("evaluations")
        panel.tick_params(labelsize=7)
    handles, labels = panel.get_legend_handles_labels()
    first = dict(zip(labels, handles))
    figure.axes[0].set_ylabel("held-out loss")
    figure.legend(first.values(), first, loc="outside lower center", ncols=len(first), fontsize=8)
    return figure


def plain_label(name: str) -> str:
    """A label that matplotlib shows as it is written: `$` begins mathematics there, and `_` hides a label."""
    shown = name.replace("\\", "\\\\") if "$" in name else name
    shown = shown.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def uri(pixels: torch.Tensor) -> str:
    """A picture, uint8 [3, height, width], as a data URI."""
    return _data_uri(png_of(to_pil(pixels.float() / 255)))


def prompt_cells(found: RunResults, size: float = 92.0) -> list[dict[str, object]]:
    """The cells of the run's first prompt, where and how large the page's diagram of a prompt shows them."""
    across = sorted({columns.start for _, columns in found.layout.cells.values()})
    down = sorted({rows.start for rows, _ in found.layout.cells.values()})
    canvas = found.table.pictures[found.tasks[0].name]["prompt"][0]
    scale = 2 / len(across)
    return [
        {
            "uri": uri(crop(canvas, name, found.layout)),
            "x": 4 + across.index(columns.start) * (size + 16) * scale,
            "y": 2 + down.index(rows.start) * (size + 16) * scale,
            "size": size * scale,
            "label": cell_label(name),
        }
        for name, (rows, columns) in found.layout.cells.items()
    ]


def cell_label(name: str) -> str:
    """What a page calls a cell of the layout: "example", or "example 2" of several."""
    cell, number = re.fullmatch(r"(.*?)(?:_(\d+))?", name).groups()
    return " ".join(filter(None, (CELLS.get(cell, cell), number)))


def overview(found: RunResults) -> Figure:
    """A row of pictures for every task: example, query, answers, truth. Of the prompts whose answers are kept, the one
    whose answer with the vector has the median score in the first task."""
    first = found.tasks[0]
    kept = found.table.values(first.name, PATCHED)[: len(found.cells(first)[PATCHED])]
    row = np.argsort(kept)[(len(kept) - 1) // 2]
    figure = Figure(figsize=(1.5 * len(PICTURES), 1.65 * len(found.tasks)), layout="constrained")
    panels = figure.subplots(len(found.tasks), len(PICTURES), squeeze=False)
    for number, (task, across) in enumerate(zip(found.tasks, panels)):
        pictures = found.cells(task)
        for panel, (name, label) in zip(across, PICTURES.items()):
            panel.imshow(pictures[name][row].permute(1, 2, 0).numpy())
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            if number == 0:
                panel.set_title(label, fontsize=8)
        across[0].set_ylabel(task.name, fontsize=8)
    return figure


def _drawn(figure: Figure) -> Image.Image:
    """A figure on no background. (`savefig` would draw it twice.)"""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    papers = [figure.patch, *(axes.patch for axes in figure.axes)]
    colours = [paper.get_facecolor() for paper in papers]
    for paper in papers:
        paper.set_facecolor("none")
    canvas.draw()
    for paper, colour in zip(papers, colours):
        paper.set_facecolor(colour)
    return Image.fromarray(np.asarray(canvas.buffer_rgba()).copy())


def _change_ink(figure: Figure, ink: str, other: str) -> None:
    """Give all that is drawn in one ink another."""
    for artist in figure.findobj(lambda one: isinstance(one, (Text, Line2D, Spine))):
        for part in ("color", "edgecolor", "markeredgecolor"):
            if hasattr(artist, f"get_{part}") and same_color(getattr(artist, f"get_{part}")(), ink):
                getattr(artist, f"set_{part}")(other)


def _on_white(drawn: Image.Image) -> Image.Image:
    """The same picture on white, for papers and slides."""
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
