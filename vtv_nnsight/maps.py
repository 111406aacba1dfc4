"""Heat maps of layers × heads, of names and values: vectors, sets and search results show themselves by these.

Each function returns a matplotlib Figure.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

PANEL = 2.4
"""Inches of a panel's side."""
_LEFT, _BELOW, _ABOVE, _BETWEEN, _BAR = 0.5, 0.45, 0.3, 0.5, 0.95
"""Inches around and between panels that their labels need, and at the right those of a bar of colours."""


def png(figure: Figure) -> bytes:
    """A figure as a notebook shows it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def panels(rows: int, columns: int, height: float, *, left: float = 0, above: float = 0) -> tuple[Figure, Any]:
    """A figure of panels [row, column] of `height` inches, with room for labels and a bar of colours, and more at the
    left and above. Laid out by sizes: an engine that measures labels takes most of the time of such a figure."""
    left, width, between = left + _LEFT, 0.7 * PANEL, _BELOW + _ABOVE
    across = left + columns * (width + _BETWEEN) - _BETWEEN + _BAR
    down = above + rows * (height + between)
    figure = Figure(figsize=(across, down))
    top, right = 1 - (above + _ABOVE) / down, 1 - _BAR / across
    figure.subplots_adjust(left / across, _BELOW / down, right, top, _BETWEEN / width, between / height)
    return figure, figure.subplots(rows, columns, squeeze=False)


def add_bar(figure: Figure, picture: Any, label: str) -> None:
    """A bar of a picture's colours, in the room that `panels` left at the right."""
    edges, width = figure.subplotpars, figure.get_figwidth()
    place = (edges.right + 0.15 / width, edges.bottom, 0.12 / width, edges.top - edges.bottom)
    figure.colorbar(picture, cax=figure.add_axes(place), label=label)


def score_map(
    scores: Mapping[Any, torch.Tensor], layout: Any, title: str = "between-task / within-task variance"
) -> Figure:
    """Layer × head heat maps of a score, one for each stage and region that the stage sees.

    Args:
        scores: By stage, [layer, head, position], such as `TaskVectors.score()`; NaN where absent.
        layout: The layout of the prompts that were scored.
        title: What the colours mean.
    """
    places = layout.places
    means = {
        (stage, region): values[..., at].nanmean(-1)
        for stage, values in scores.items()
        for region, at in places.items()
        if not values[..., at].isnan().all()
    }
    regions = [region for region in places if any((stage, region) in means for stage in scores)]
    values = torch.cat([mean.flatten() for mean in means.values()])
    values = values[values.isfinite()]
    positive = bool((values > 0).all()) and float(values.max()) > 20 * float(values.min())
    norm = (LogNorm if positive else Normalize)(float(values.min()), float(values.max()))
    figure, grid = panels(len(scores), len(regions), 0.7 * PANEL)
    for row, stage in zip(grid, scores):
        for panel, region in zip(row, regions):
            if (stage, region) in means:
                picture = draw_map(panel, means[stage, region], f"{stage} @ {region}", norm=norm)
            else:
                panel.set_axis_off()
    add_bar(figure, picture, title)
    return figure


def draw_map(panel: Any, values: torch.Tensor, title: str, *, aspect: str = "auto", **colours: Any) -> Any:
    """One map [layer, head] in a panel; gives the picture, for its bar of colours."""
    picture = panel.imshow(values.numpy(), aspect=aspect, interpolation="nearest", **colours)
    panel.set_title(title, fontsize=9)
    panel.set_xlabel("head", labelpad=1)
    panel.set_ylabel("layer", labelpad=1)
    for axis in (panel.xaxis, panel.yaxis):
        axis.get_major_locator().set_params(integer=True, nbins=6)
    return picture


def unit_maps(
    values: Mapping[str, torch.Tensor],
    limits: tuple[float, float],
    *,
    cmap: str = "viridis",
    label: str | None = None,
    rings: Mapping[str, torch.Tensor] | None = None,
    first: tuple[str, ...] = (),
    heading: str | None = None,
) -> Figure:
    """A row of layer × head maps of the units of a space.

    Args:
        values: Title → [layer, head], such as `PatchSpace.by_region` gives.
        limits: The values of the colour map's two ends.
        cmap: The colour map.
        label: What the colours mean, beside a bar of them; None draws none.
        rings: Title → bool [layer, head]: the units that are ringed.
        first: Names of the rows of a panel before the others, `figure.axes[0]`, which is left empty.
        heading: Above all.
    """
    count = len(values) + bool(first)
    height = max(0.7 * PANEL, 0.12 * max(map(len, values.values())))
    figure, grid = panels(1, count, height, left=0.08 * max(map(len, first), default=0), above=0.25 * bool(heading))
    if heading is not None:
        figure.suptitle(heading, x=0.05, y=0.98, ha="left", fontsize=10)
    if first:
        grid[0, 0].set_yticks(range(len(first)), first, fontsize=9)
    for panel, (title, value) in zip(grid[0, count - len(values) :], values.items()):
        picture = draw_map(panel, value, title, aspect="equal", vmin=limits[0], vmax=limits[1], cmap=cmap)
        if rings is not None:
            layers, heads = rings[title].numpy().nonzero()
            for ink, width in (("black", 3.5), ("white", 1.5)):  # a ring that is seen on every colour
                panel.scatter(heads, layers, s=40, facecolors="none", edgecolors=ink, linewidths=width)
    if label is not None:
        add_bar(figure, picture, label)
    return figure
