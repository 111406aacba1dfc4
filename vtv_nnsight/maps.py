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


def png(figure: Figure) -> bytes:
    """A figure as a notebook shows it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


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
    figure = Figure(figsize=(PANEL * len(regions) + 1, 1.2 * PANEL * len(scores)), layout="constrained")
    panels = figure.subplots(len(scores), len(regions), squeeze=False)
    for row, stage in zip(panels, scores):
        for panel, region in zip(row, regions):
            if (stage, region) in means:
                picture = draw_map(panel, means[stage, region], f"{stage} @ {region}", norm=norm)
            else:
                panel.set_axis_off()
    figure.colorbar(picture, ax=panels, label=title)
    return figure


def draw_map(panel: Any, values: torch.Tensor, title: str, **colours: Any) -> Any:
    """One map [layer, head] in a panel; gives the picture, for its bar of colours."""
    picture = panel.imshow(values.numpy(), aspect="auto", interpolation="nearest", **colours)
    panel.set_title(title, fontsize=9)
    panel.set(xlabel="head", ylabel="layer")
    for axis in (panel.xaxis, panel.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return picture


def unit_maps(
    values: Mapping[str, torch.Tensor],
    limits: tuple[float, float],
    *,
    cmap: str = "viridis",
    label: str | None = None,
    rings: Mapping[str, torch.Tensor] | None = None,
    first: str | None = None,
) -> Figure:
    """A row of layer × head maps of the units of a space.

    Args:
        values: Title → [layer, head], such as `PatchSpace.by_region` gives.
        limits: The values of the colour map's two ends.
        cmap: The colour map.
        label: What the colours mean, beside a bar of them; None draws none.
        rings: Title → bool [layer, head]: the units that are ringed.
        first: Title of an empty panel before the others, `figure.axes[0]`.
    """
    count = len(values) + (first is not None)
    height = max(3, 0.16 * max(map(len, values.values())))
    figure = Figure(figsize=(PANEL * count + 1, height), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    if first is not None:
        panels.pop(0).set_title(first)
    for panel, (title, value) in zip(panels, values.items()):
        picture = panel.imshow(value.numpy(), vmin=limits[0], vmax=limits[1], cmap=cmap)
        panel.set(title=title, xlabel="head", ylabel="layer")
        if rings is not None:
            layers, heads = rings[title].numpy().nonzero()
            for ink, width in (("black", 3.5), ("white", 1.5)):  # a ring that is seen on every colour
                panel.scatter(heads, layers, s=40, facecolors="none", edgecolors=ink, linewidths=width)
    if label is not None:
        figure.colorbar(picture, ax=panels, label=label)
    return figure
