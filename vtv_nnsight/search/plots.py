"""Pictures of searches: how the loss fell, which units were chosen, and where sets overlap.

Each function returns a matplotlib Figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from vtv_nnsight.maps import unit_maps
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.search.result import SearchResult


def curves(results: Mapping[str, SearchResult | Sequence[SearchResult]]) -> Figure:
    """Best held-out loss so far against evaluations, for several searches on one axis.

    Args:
        results: Label → a result, or several of different seeds, whose mean is drawn with their range behind it.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="patched evaluations", ylabel="best held-out loss so far")
    for label, value in results.items():
        runs = [value] if isinstance(value, SearchResult) else list(value)
        at = np.unique([step.evaluations for run in runs for step in run.history])
        at = at[at >= max(run.history[0].evaluations for run in runs)]
        best = np.stack([best_so_far(run, at) for run in runs])
        (line,) = axes.plot(at, best.mean(0), label=label, marker="." if len(at) < 3 else "")
        if len(runs) > 1:
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
    """Probabilities or scores as layer × head maps, one a stage and region; chosen units are ringed.

    Raises:
        ValueError: for spaces with a unit a token, which have too many regions to draw.
    """
    return result.figure()


def units(patches: PatchSet) -> Figure:
    """The units of a set (dark) as layer × head maps, one a stage and region.

    Raises:
        ValueError: as `score_maps`.
    """
    return patches.figure()


def overlap(sets: Mapping[str, SearchResult | PatchSet]) -> Figure:
    """How far sets agree, such as those of two tasks or seeds: their Jaccard similarities, and how many of them have
    each unit, as layer × head maps.

    Args:
        sets: Label → a result or a set, all of one space.

    Raises:
        ValueError: as `score_maps`.
    """
    patches = {label: value.patches if isinstance(value, SearchResult) else value for label, value in sets.items()}
    similarity = np.array([[a.jaccard(b) for b in patches.values()] for a in patches.values()])
    counts = sum(one.choices.int() for one in patches.values())
    space = next(iter(patches.values())).space
    figure = unit_maps(
        space.by_region(counts),
        (0, len(patches)),
        cmap="magma",
        label="number of sets that have the unit",
        first="Jaccard similarity",
    )
    axes = figure.axes[0]
    image = axes.imshow(similarity, vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, ax=axes, location="left", shrink=0.8, label="shared / all, of two sets")
    axes.set_xticks(range(len(patches)), list(patches), rotation=30, ha="right")
    axes.set_yticks(range(len(patches)), list(patches))
    for (row, column), value in np.ndenumerate(similarity):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    return figure
