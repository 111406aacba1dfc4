"""Pictures of what was found: each function returns a matplotlib Figure.

>>> plots.score_map(vectors.score(), model.layout).savefig("scores.png")
>>> plots.answers(table)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

from vtv_nnsight.evaluation.random_controls import best_others
from vtv_nnsight.layouts import Layout, named_positions
from vtv_nnsight.models.interface import ByStage
from vtv_nnsight.studies.clusters import silhouette

PANEL = 2.4
"""Inches of a panel's side."""


def score_map(scores: ByStage, layout: Layout, title: str = "between-task / within-task variance") -> Figure:
    """Layer × head heat maps of a score, one for each stack and region that the stack sees.

    Args:
        scores: By stage, [layer, head, position], such as `TaskVectors.score()`; NaN where absent.
        layout: The layout of the prompts that were scored.
        title: What the colours mean.
    """
    maps = {
        (stack, region): values[..., places].nanmean(-1)
        for stack, values in scores.items()
        for region, places in named_positions(layout.regions).items()
        if not values[..., places].isnan().all()
    }
    regions = [region for region in named_positions(layout.regions) if any((stack, region) in maps for stack in scores)]
    values = torch.cat([m.flatten() for m in maps.values()])
    values = values[values.isfinite()]
    positive = bool((values > 0).all()) and float(values.max()) > 20 * float(values.min())
    norm = (LogNorm if positive else Normalize)(float(values.min()), float(values.max()))
    figure = Figure(figsize=(PANEL * len(regions) + 1, 1.2 * PANEL * len(scores)), layout="constrained")
    panels = figure.subplots(len(scores), len(regions), squeeze=False)
    for row, stack in zip(panels, scores):
        for panel, region in zip(row, regions):
            if (stack, region) not in maps:
                panel.set_axis_off()
                continue
            picture = panel.imshow(maps[stack, region].numpy(), norm=norm, aspect="auto", interpolation="nearest")
            panel.set_title(f"{stack} @ {region}", fontsize=9)
            _label_heads(panel)
    figure.colorbar(picture, ax=panels, label=title)
    return figure


def label_decades(axis: Axis) -> None:
    """Labels of a logarithmic axis at 1, 2 and 5 of every decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _label_heads(panel: Any) -> None:
    panel.set_xlabel("head")
    panel.set_ylabel("layer")
    for axis in (panel.xaxis, panel.yaxis):
        axis.get_major_locator().set_params(integer=True)


def head_map(values: ByStage, title: str = "silhouette by task, −1 to 1") -> Figure:
    """Layer × head heat maps of one value a head: by stage, [layer, head] (or None), such as `clusters.silhouettes`."""
    present = {stack: v for stack, v in values.items() if v is not None}
    low, high = (float(bound(torch.cat([v.flatten() for v in present.values()]))) for bound in (torch.min, torch.max))
    figure = Figure(figsize=(1.6 * PANEL * len(present) + 1, 1.4 * PANEL), layout="constrained")
    panels = figure.subplots(1, len(present), squeeze=False)
    for panel, (stack, shown) in zip(panels[0], present.items()):
        picture = panel.imshow(shown.numpy(), vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        panel.set_title(stack, fontsize=9)
        _label_heads(panel)
    figure.colorbar(picture, ax=panels, label=title)
    return figure


def projection(heads: ByStage, stack: str, layer: int, head: int | Sequence[int], method: str = "pca") -> Figure:
    """Prompts in the plane, coloured by task, as some heads see them; one panel a head, titled with its silhouette.

    Args:
        heads: What `clusters.activations` returns.
        stack, layer: "encoder" or "decoder", and the layer in it.
        head: One or several.
        method: "pca", or "tsne" (with scikit-learn).

    Raises:
        ValueError: when the stack was not seen or the method is unknown.
        ImportError: when scikit-learn is needed and missing.
    """
    by_task = heads[stack]
    if by_task is None:
        raise ValueError(f"the {stack} does not see the region of these activations; choose another stack or region.")
    chosen = [head] if isinstance(head, int) else list(head)
    labels = torch.arange(len(by_task)).repeat_interleave(torch.tensor([len(z) for z in by_task.values()]))
    figure = Figure(figsize=(1.5 * PANEL * len(chosen) + 1, 1.5 * PANEL), layout="constrained")
    panels = figure.subplots(1, len(chosen), squeeze=False)[0]
    for panel, one in zip(panels, chosen):
        points = torch.cat([z[:, layer, one] for z in by_task.values()])
        flat = project(points, method)
        for i, task in enumerate(by_task):
            panel.scatter(*flat[labels == i].T, s=10, label=task, alpha=0.8)
        width = float(silhouette(points, labels)) if len(by_task) > 1 else float("nan")
        panel.set_title(f"{stack} layer {layer}, head {one}: silhouette {width:.2f}", fontsize=8)
        panel.set_xticks([])
        panel.set_yticks([])
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def project(points: torch.Tensor, method: str = "pca") -> np.ndarray:
    """Points [point, dim] → [point, 2]."""
    if method == "pca":
        centred = (points - points.mean(0)).double()
        axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
        return (centred @ axes.T).numpy()
    if method != "tsne":
        raise ValueError(f"method={method!r} is unknown; choose 'pca' or 'tsne'.")
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("t-SNE needs scikit-learn, which is not installed; use method='pca'.") from error
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points.numpy())


def matrix(pairs: Any) -> Figure:
    """Every vector on every task, as `evaluation.specificity` found: scores, coloured in each row from the worst (dark)
    to the best (light); the task's own vector is framed, and a star marks the best one of another task where the own
    is not surely better.

    Args:
        pairs: What `evaluation.specificity` returned.
    """
    tasks, vectors = list(pairs.task.unique()), list(pairs.vector.unique())
    scores = pairs.pivot(index="task", columns="vector", values="mean").loc[tasks, vectors]
    first = pairs.drop_duplicates("task").set_index("task").loc[tasks]
    signed = scores.where(first.higher_is_better, -scores, axis=0)
    low, high = signed.min(axis=1), signed.max(axis=1)
    goodness = signed.sub(low, axis=0).div((high - low).where(high > low, 1.0), axis=0)
    doubtful = {(row.task, row.vector) for row in best_others(pairs).itertuples() if not row.specific}
    figure = Figure(figsize=(0.55 * PANEL * len(vectors) + 2, 0.3 * PANEL * len(tasks) + 1.4), layout="constrained")
    panel = figure.subplots()
    panel.imshow(goodness.to_numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for row, task in enumerate(tasks):
        for column, vector in enumerate(vectors):
            star = " *" if (task, vector) in doubtful else ""
            ink = "black" if goodness.iloc[row, column] > 0.6 else "white"
            panel.text(column, row, f"{scores.iloc[row, column]:.3f}{star}", ha="center", va="center", color=ink)
            if task == vector:
                edge = {"fill": False, "edgecolor": "red", "linewidth": 2}
                panel.add_patch(Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, **edge))
    panel.set_xticks(range(len(vectors)), vectors, rotation=20, ha="right")
    panel.set_yticks(range(len(tasks)), [f"{task}\n{first.label[task]}" for task in tasks])
    panel.set(xlabel="vector", ylabel="task, at its units")
    return figure


def answers(table: Any, task: str | None = None) -> Figure:
    """The first prompts of an evaluation, their truths, and every condition's answers with their scores.

    Args:
        table: What `evaluate` returned.
        task: One of its tasks; the first by default.

    Raises:
        ValueError: when the table kept no pictures of the task.
    """
    task = task or table.tasks[0]
    shown = table.pictures.get(task)
    if not shown or not len(shown["truth"]):
        raise ValueError(f"the table kept no pictures of {task!r}; evaluate with keep=6.")
    rows, columns = len(shown["truth"]), len(shown)
    figure = Figure(figsize=(0.75 * PANEL * columns, 0.8 * PANEL * rows + 0.4), layout="constrained")
    sheet = figure.subplots()
    for column, (name, cells) in enumerate(shown.items()):
        sheet.text(column + 0.47, -0.04, name, ha="center", va="bottom", fontsize=7)
        scores = table.values(task, name) if name not in ("prompt", "truth") else None
        for row, cell in enumerate(cells):
            sheet.imshow(cell.permute(1, 2, 0).numpy(), extent=(column, column + 0.94, row + 0.88, row))
            if scores is not None:
                sheet.text(column + 0.47, row + 0.9, f"{scores[row]:.3f}", ha="center", va="top", fontsize=7)
    sheet.set(xlim=(0, columns), ylim=(rows, -0.15), aspect="auto", title=task)
    sheet.set_axis_off()
    return figure
