"""Figures of the pages, on white in a dark page, too."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vtv_nnsight.evaluation.conditions import PATCHED
from vtv_nnsight.images import png_of
from vtv_nnsight.report import plots
from vtv_nnsight.report.labels import plain_label
from vtv_nnsight.report.pictures import data_uri
from vtv_nnsight.search.result import SearchResult

DPI = 144


class Drawn(NamedTuple):
    """A figure as a data URI. A phone scrolls a wide one, and makes others small."""

    uri: str
    width: int
    caption: str
    wide: bool


def draw(figure: Callable[[], Figure], caption: str, *, wide: bool = True) -> Drawn:
    """A figure that is drawn for a page; `wide`: whether a phone should scroll it rather than make it small."""
    with matplotlib.rc_context({"font.size": 9}):
        drawing, buffer = figure(), io.BytesIO()
        drawing.savefig(buffer, format="png", dpi=DPI)
    few = Image.open(buffer).convert("RGB").quantize(128)
    return Drawn(data_uri(png_of(few)), int(96 * drawing.get_figwidth()), caption, wide)


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
