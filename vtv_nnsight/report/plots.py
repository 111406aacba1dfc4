"""Pictures of results: each function returns a matplotlib Figure.

>>> plots.score_map(vectors.score(), model.layout).savefig("scores.png")
>>> plots.answers(table)
>>> plots.curves({"reinforce": result})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch.nn import functional as F

from vtv_nnsight.maps import PANEL, add_bar, draw_map, panels, score_map, unit_maps
from vtv_nnsight.models.interface import ByStage
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.report.verdicts import best_others
from vtv_nnsight.search.result import SearchResult

__all__ = [
    "answers", "best_so_far", "curves", "head_map", "matrix", "overlap", "project", "projection", "score_map",
    "score_maps", "units",
]  # fmt: skip


def projection(heads: ByStage, stage: str, layer: int, head: int | Sequence[int], method: str = "pca") -> Figure:
    """Prompts in the plane, coloured by task, as some heads see them; one panel a head, titled with its silhouette.

    Args:
        heads: What `clusters.activations` returns.
        stage, layer: "encoder" or "decoder", and the layer in it.
        head: One or several.
        method: "pca", or "tsne" (with scikit-learn).

    Raises:
        ValueError: when the stage was not seen or the method is unknown.
        ImportError: when scikit-learn is needed and missing.
    """
    by_task = heads[stage]
    if by_task is None:
        raise ValueError(f"the {stage} does not see the region of these activations; choose another stage or region.")
    numbers = [head] if isinstance(head, int) else list(head)
    labels = torch.arange(len(by_task)).repeat_interleave(torch.tensor([len(z) for z in by_task.values()]))
    figure = Figure(figsize=(1.5 * PANEL * len(numbers) + 1, 1.5 * PANEL), layout="constrained")
    panels = figure.subplots(1, len(numbers), squeeze=False)[0]
    for panel, number in zip(panels, numbers):
        points = torch.cat([z[:, layer, number] for z in by_task.values()])
        flat = project(points, method)
        for i, task in enumerate(by_task):
            panel.scatter(*flat[labels == i].T, s=10, label=task, alpha=0.8)
        width = float(silhouette(points, labels)) if len(by_task) > 1 else float("nan")
        panel.set_title(f"{stage} layer {layer}, head {number}: silhouette {width:.2f}", fontsize=8)
        panel.set(xticks=[], yticks=[])
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def project(points: torch.Tensor, method: str = "pca") -> Any:
    """Points [point, dim] → an array [point, 2]."""
    if method == "pca":
        centred = (points - points.mean(0)).double()
        axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
        return np.asarray(centred @ axes.T)
    if method != "tsne":
        raise ValueError(f"method={method!r} is unknown; choose 'pca' or 'tsne'.")
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("t-SNE needs scikit-learn, which is not installed; use method='pca'.") from error
    perplexity = min(30.0, (len(points) - 1) / 3)
    return np.asarray(TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points.numpy()))


def matrix(pairs: Any) -> Figure:
    """Every vector on every task: scores, coloured in each row from the worst (dark) to the best (light); the task's
    vector is framed, and a star marks the best one of another task where it is not surely worse.

    Args:
        pairs: What `report.verdicts.vector_pairs` returned; or title → such pairs, to be drawn beside each other.
    """
    titled = pairs if isinstance(pairs, dict) else {"": pairs}
    first = next(iter(titled.values()))
    width, height = 0.55 * PANEL * first.vector.nunique() + 2, 0.3 * PANEL * first.task.nunique() + 1.4
    figure = Figure(figsize=(width * len(titled), height), layout="constrained")
    for panel, (title, one) in zip(figure.subplots(1, len(titled), squeeze=False)[0], titled.items()):
        _draw_matrix(panel, one)
        panel.set_title(title)
    return figure


def _draw_matrix(panel: Any, pairs: Any) -> None:
    tasks, vectors = list(pairs.task.unique()), list(pairs.vector.unique())
    scores = pairs.pivot(index="task", columns="vector", values="mean").loc[tasks, vectors]
    first = pairs.drop_duplicates("task").set_index("task").loc[tasks]
    signed = scores.where(first.higher_is_better, -scores, axis=0)
    low, high = signed.min(axis=1), signed.max(axis=1)
    goodness = signed.sub(low, axis=0).div((high - low).where(high > low, 1.0), axis=0)
    doubtful = {(row.task, row.vector) for row in best_others(pairs).itertuples() if not row.worse}
    panel.imshow(goodness.to_numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for row, task in enumerate(tasks):
        for column, vector in enumerate(vectors):
            star = " *" if (task, vector) in doubtful else ""
            ink = "black" if goodness.iloc[row, column] > 0.6 else "white"
            panel.text(column, row, f"{scores.iloc[row, column]:.3f}{star}", ha="center", va="center", color=ink)
            if task == vector:
                frame = Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor="red", linewidth=2)
                panel.add_patch(frame)
    panel.set_xticks(range(len(vectors)), vectors, rotation=20, ha="right")
    panel.set_yticks(range(len(tasks)), [f"{task}\n{first.label[task]}" for task in tasks])
    panel.set(xlabel="vector", ylabel="task")


def answers(table: Any, task: str | None = None) -> Figure:
    """The first prompts of an evaluation, their truths, and every condition's answers with their scores.

    Args:
        table: What `evaluate` returned.
        task: One of its tasks; the first by default.

    Raises:
        ValueError: when the table kept no pictures of the task.
    """
    task = task or table.tasks[0]
    pictures = table.pictures.get(task)
    if not pictures or not len(pictures["truth"]):
        raise ValueError(f"the table kept no pictures of {task!r}; evaluate with keep=6.")
    rows, columns = len(pictures["truth"]), len(pictures)
    figure = Figure(figsize=(0.34 * PANEL * columns, 0.37 * PANEL * rows + 0.9), layout="constrained")
    sheet = figure.subplots()
    for column, (name, cells) in enumerate(pictures.items()):
        sheet.text(column + 0.47, -0.04, fill(name, 11, break_long_words=False), ha="center", va="bottom", fontsize=8.5)
        scores = table.values(task, name) if name not in ("prompt", "truth") else None
        for row, cell in enumerate(cells):
            if isinstance(cell, str):  # the end of a long one
                middle: dict[str, Any] = dict(ha="center", va="center", fontsize=7, parse_math=False)
                sheet.text(column + 0.47, row + 0.44, fill(cell.strip()[-40:], 14), **middle)
            else:
                sheet.imshow(cell.permute(1, 2, 0).numpy(), extent=(column, column + 0.94, row + 0.88, row))
            if scores is not None:
                sheet.text(column + 0.47, row + 0.9, f"{scores[row]:.3f}", ha="center", va="top", fontsize=8)
    sheet.set(xlim=(0, columns), ylim=(rows, -0.5), aspect="auto", title=task)
    sheet.set_axis_off()
    return figure


def curves(results: Mapping[str, SearchResult | Sequence[SearchResult]]) -> Figure:
    """Best held-out loss so far against evaluations, for several searches on one axis.

    Args:
        results: Label → a result, or several of different seeds: their mean is drawn with their range behind it.
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
    counts = torch.stack([one.choices.int() for one in patches.values()]).sum(0)
    regions = next(iter(patches.values())).space.by_region(counts)
    label = "sets that have the unit"
    figure = unit_maps(regions, (0, len(patches)), cmap="magma", label=label, first=tuple(patches))
    axes = figure.axes[0]
    axes.imshow(similarity, vmin=0, vmax=1, cmap="viridis")
    axes.set_title("Jaccard similarity", fontsize=9)
    axes.set_xticks([])  # in the order of the rows
    for (row, column), value in np.ndenumerate(similarity):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    return figure


def head_map(values: Mapping[Any, torch.Tensor | None], title: str = "silhouette by task, −1 to 1") -> Figure:
    """Layer × head heat maps of one value a head: by stage, [layer, head] (or None), such as `clusters.silhouettes`."""
    present = {stage: value for stage, value in values.items() if value is not None}
    every = torch.cat([value.flatten() for value in present.values()])
    figure, grid = panels(1, len(present), PANEL)
    for panel, (stage, value) in zip(grid[0], present.items()):
        picture = draw_map(panel, value, str(stage), vmin=float(every.min()), vmax=float(every.max()))
    add_bar(figure, picture, title)
    return figure


def silhouette(points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean silhouette of labelled points [..., point, dim] by Euclidean distance: [...]. A cluster's only point counts
    0, as in scikit-learn."""
    points = points.double()
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    members = F.one_hot(labels).double()
    sums, sizes = distances @ members, members.sum(0)
    own = sums.gather(-1, labels[:, None].expand(*sums.shape[:-1], 1))[..., 0] / (sizes[labels] - 1).clamp(min=1)
    others = (sums / sizes).masked_fill(members.bool(), torch.inf).amin(-1)
    widths = (others - own) / torch.maximum(others, own).clamp(min=torch.finfo(torch.float64).tiny)
    return widths.masked_fill(sizes[labels] == 1, 0.0).mean(-1)
