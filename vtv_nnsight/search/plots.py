"""Pictures of searches: how the loss fell, which units were chosen, and where found sets overlap.

Each function returns a matplotlib Figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from vtv_nnsight.patching import PatchSet, PatchSpace
from vtv_nnsight.search.result import SearchResult


def curves(results: Mapping[str, SearchResult | Sequence[SearchResult]]) -> Figure:
    """Best held-out loss so far against evaluations, for several searches on one axis.

    Args:
        results: Label → a result, or several of different seeds, whose mean is drawn with their range behind it.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="patched evaluations", ylabel="best held-out loss so far")
    for label, found in results.items():
        found = [found] if isinstance(found, SearchResult) else list(found)
        at = np.unique([step.evaluations for result in found for step in result.history])
        at = at[at >= max(result.history[0].evaluations for result in found)]
        best = np.stack([best_so_far(result, at) for result in found])
        (line,) = axes.plot(at, best.mean(0), label=label, marker="." if len(at) < 3 else "")
        if len(found) > 1:
            axes.fill_between(at, best.min(0), best.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.legend()
    return figure


def best_so_far(result: SearchResult, evaluations: np.ndarray) -> np.ndarray:
    """The lowest held-out loss that a search had seen by each of some numbers of evaluations; NaN before its first."""
    spent = np.array([step.evaluations for step in result.history])
    lowest = np.minimum.accumulate([step.held_out_loss for step in result.history])
    index = np.searchsorted(spent, evaluations, side="right") - 1
    return np.where(index >= 0, lowest[index], np.nan)


def score_maps(result: SearchResult) -> Figure:
    """Probabilities or scores as layer x head maps, one a stage and region; chosen units are ringed.

    Raises:
        ValueError: for spaces with a unit a token, which have too many regions to draw.
    """
    space = result.patches.space
    label = "probability" if result.probabilistic else "score"
    limits = (0, 1) if result.probabilistic else (result.scores.min().item(), result.scores.max().item())
    figure, panels = _panels(space)
    scores, chosen = (space.split(values) for values in (result.scores, result.patches.choices))
    for (stage, group), axes in panels.items():
        image = axes.imshow(scores[stage][..., group].numpy(), vmin=limits[0], vmax=limits[1], cmap="viridis")
        layers, heads = chosen[stage][..., group].numpy().nonzero()
        for ink, width in (("black", 3.5), ("white", 1.5)):  # a ring that is seen on every colour
            axes.scatter(heads, layers, s=40, facecolors="none", edgecolors=ink, linewidths=width)
    figure.colorbar(image, ax=list(panels.values()), label=label)
    return figure


def units(patches: PatchSet) -> Figure:
    """The units of a set (dark) as layer x head maps, one a stage and region.

    Raises:
        ValueError: as `score_maps`.
    """
    figure, panels = _panels(patches.space)
    chosen = patches.space.split(patches.choices)
    for (stage, group), axes in panels.items():
        axes.imshow(chosen[stage][..., group].float().numpy(), vmin=0, vmax=1.3, cmap="GnBu")
    figure.suptitle(f"{len(patches)} of {len(patches.space)} units", fontsize=10)
    return figure


def overlap(sets: Mapping[str, SearchResult | PatchSet]) -> Figure:
    """How far found sets agree, such as those of two tasks or seeds: their Jaccard similarities, and how many of them
    have each unit, as layer x head maps.

    Args:
        sets: Label → a result or a set, all of one space.
    """
    patches = {label: found.patches if isinstance(found, SearchResult) else found for label, found in sets.items()}
    space = next(iter(patches.values())).space
    similarity = np.array([[a.jaccard(b) for b in patches.values()] for a in patches.values()])
    figure, panels = _panels(space, first="Jaccard similarity")
    axes = figure.axes[0]
    image = axes.imshow(similarity, vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, ax=axes, location="left", shrink=0.8, label="shared / all, of two sets")
    axes.set_xticks(range(len(patches)), list(patches), rotation=30, ha="right")
    axes.set_yticks(range(len(patches)), list(patches))
    for (row, column), value in np.ndenumerate(similarity):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    counts = space.split(sum(found.choices.int() for found in patches.values()))
    for (stage, group), axes in panels.items():
        image = axes.imshow(counts[stage][..., group].numpy(), vmin=0, vmax=len(patches), cmap="magma")
    figure.colorbar(image, ax=list(panels.values()), label="number of sets that have the unit")
    return figure


def _panels(space: PatchSpace, first: str | None = None) -> tuple[Figure, dict[tuple[str, int], object]]:
    """A row of axes: one with the title `first`, if any, then (stage, group number) → one a region."""
    if space.granularity == "token":
        raise ValueError("a space with a unit a token has too many regions to draw; average over positions first.")
    regions = [(stage, i, name) for stage, groups in space.groups.items() for i, name in enumerate(groups)]
    count = len(regions) + (first is not None)
    figure = Figure(figsize=(2.4 * count + 1, 3), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    if first is not None:
        axes.pop(0).set_title(first)
    panels = {}
    for (stage, group, name), own in zip(regions, axes):
        own.set(title=f"{stage}, {name}", xlabel="head", ylabel="layer")
        panels[stage, group] = own
    return figure, panels
