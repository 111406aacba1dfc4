"""Figures of the pages: each drawn in light and in dark, and kept beside the page as PNG and SVG with its numbers."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.spines import Spine
from matplotlib.text import Text
from PIL import Image

from vtv_nnsight.evaluation.conditions import PATCHED
from vtv_nnsight.files import make_folder, replacing
from vtv_nnsight.images import png_of
from vtv_nnsight.report import plots
from vtv_nnsight.report.labels import plain_label
from vtv_nnsight.report.pictures import data_uri
from vtv_nnsight.search.result import SearchResult

INK = {"light": "#1c2126", "dark": "#e8e6e1"}
DPI = 144

Keep = Callable[[str, bytes | pd.DataFrame], str]
"""Keeps a file beside a page: its name and content → its address, seen from the page."""


class Drawn(NamedTuple):
    """A figure as data URIs, on no background, in the ink of a light and of a dark page; and the kinds of files that it
    was kept in → their addresses. A phone scrolls a wide one, and makes others small."""

    light: str
    dark: str
    width: int
    caption: str
    wide: bool
    links: dict[str, str]


def draw(
    figure: Callable[[], Figure],
    caption: str,
    *,
    wide: bool = True,
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
    inks: dict[Any, Any] = dict.fromkeys(keys, INK["light"]) | {"legend.framealpha": 0.0, "font.size": 9}
    links = {} if keep is None or numbers is None else {"CSV": keep(f"{name}.csv", numbers)}
    with matplotlib.rc_context(inks | {"svg.hashsalt": "vtv", "svg.fonttype": "none"}):
        drawing = figure()
        light = _rasterise(drawing)
        drawing.set_layout_engine("none")  # which takes most of the time; everything stays where it is
        if keep:
            on_white = Image.alpha_composite(Image.new("RGBA", light.size, "white"), light).convert("RGB")
            links["PNG"] = keep(f"{name}.png", png_of(on_white))
            buffer = io.StringIO()
            FigureCanvasSVG(drawing).print_svg(buffer, metadata={"Date": None})
            links["SVG"] = keep(f"{name}.svg", buffer.getvalue().encode())
        _change_ink(drawing, INK["light"], INK["dark"])
        dark = _rasterise(drawing)
    uris = [data_uri(png_of(inked.quantize(128, method=Image.Quantize.FASTOCTREE))) for inked in (light, dark)]
    return Drawn(uris[0], uris[1], int(96 * drawing.get_figwidth()), caption, wide, links)


def keep_file(run: Path, name: str, content: bytes | pd.DataFrame) -> str:
    """A `Keep` for the folder of a run: files lie in its folder figures."""
    folder = make_folder(run / "figures")
    if isinstance(content, pd.DataFrame):
        content = content.to_csv(index=False, lineterminator="\n").encode()
    with replacing(folder / name) as temporary:
        temporary.write_bytes(content)
    return f"{folder.name}/{quote(name)}"


def searches(results: Mapping[str, Sequence[SearchResult]]) -> Figure:
    """`plots.curves`, with labels shown as they are, which matplotlib takes for mathematics or hides."""
    return plots.curves({plain_label(name): repeats for name, repeats in results.items()})


def all_searches(results: Mapping[str, Sequence[SearchResult]], bounds: Mapping[str, Mapping[str, float]]) -> Figure:
    """The searches of several tasks, a small panel each, with lines for conditions without a vector.

    Args:
        results: Task → its result, or those of several folds.
        bounds: Task → condition → its loss, as the searches measure it.
    """
    figure = Figure(figsize=(2.3 * len(results) + 0.4, 2.3), layout="constrained")
    for panel, (name, folds) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
        for result in folds:
            at = np.array([step.evaluations for step in result.history])
            panel.plot(at, plots.best_so_far(result, at), color="tab:green", label=PATCHED)
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


def _rasterise(figure: Figure) -> Image.Image:
    """A figure on no background. (`savefig` would draw it twice.)"""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    papers = [figure.patch, *(axes.patch for axes in figure.axes)]
    for paper in papers:
        paper.set_visible(False)
    canvas.draw()
    for paper in papers:
        paper.set_visible(True)
    return Image.fromarray(np.asarray(canvas.buffer_rgba()).copy())


def _change_ink(figure: Figure, ink: str, other: str) -> None:
    """Give all that is drawn in one ink another."""
    for artist in figure.findobj(lambda part: isinstance(part, (Text, Line2D, Spine))):
        for attribute in ("color", "edgecolor", "markeredgecolor"):
            if hasattr(artist, f"get_{attribute}") and same_color(getattr(artist, f"get_{attribute}")(), ink):
                getattr(artist, f"set_{attribute}")(other)
