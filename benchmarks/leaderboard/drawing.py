"""The board as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import mean
from typing import Any

import numpy as np
from common import label_decades
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from leaderboard.sets import REFERENCES
from vtv_nnsight import metrics
from vtv_nnsight.report.labels import plain_label


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Metric and sufficiency of every task; below, one algorithm's transfer between tasks, and everyone's stability."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    sets = list(dict.fromkeys(row["set"] for row in rows if "units" in row))
    labels = [plain_label(name) for name in sets]
    figure = Figure(figsize=(max(10, 2.6 * len(names) + 1.5), 10), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2, 1))
    panels = above.subplots(2, len(names), squeeze=False)
    for task, (top, bottom) in zip(names, panels.T):
        draw_task(top, bottom, [row for row in rows if row["task"] == task], sets)
        top.set_yticks(range(len(sets)), labels if task == names[0] else [])
    above.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    left, right = below.subplots(1, 2)
    draw_transfer(left, rows, names)
    for task, marker in zip(names, cycle("osD^vP*X")):
        right.plot([], [], marker, color="0.4", label=task)
        for row in (row for row in rows if row["task"] == task and row.get("jaccard_over_seeds")):
            place = sets.index(row["set"])
            for value, fill in zip(row["jaccard_over_seeds"].values(), ("full", "none")):
                right.plot(value, place, marker, color=f"C{place % 10}", fillstyle=fill, alpha=0.8)
    right.set_yticks(range(len(sets)), labels)
    right.set(title="Jaccard over seeds (hollow: by chance)", xlim=(-0.03, 1.03))
    right.set_ylim(len(sets) - 0.5, -0.5)
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def draw_task(top: Axes, bottom: Axes, rows: Sequence[Mapping[str, Any]], sets: Sequence[str]) -> None:
    """One task's panels: above, the metric of every set beside random draws; below, of its best-scored units."""
    for row in rows:
        value, low, high = row["metric"]
        reference = next((name for name in REFERENCES if row["set"].startswith(name)), None)
        if reference:
            style = dict(color="0.4", linewidth=1, linestyle=("-", "--", ":")[REFERENCES.index(reference)])
            top.axvline(value, label=row["set"], **style)
            bottom.axhline(value, **style)
            continue
        place = sets.index(row["set"])
        top.plot(row["random_units"]["metric"][0], place, "o", color="0.4", fillstyle="none", zorder=1,
                 label="as many random units" if row["set"] == sets[0] else None)  # fmt: skip
        if matched := row.get("matched_random_units"):
            top.plot([row["random_units"]["least"], row["random_units"]["most"]], [place] * 2, color="0.6", linewidth=1)
            top.plot([matched["least"], matched["most"]], [place + 0.2] * 2, color="0.6", linewidth=1, linestyle=":",
                     label="their draws (dotted: matched)" if row["set"] == sets[0] else None)  # fmt: skip
        top.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=f"C{place % 10}", capsize=3)
        curve = [(point["units"], point["metric"][0]) for point in row["sufficiency"]]
        bottom.plot(*np.reshape(curve, (-1, 2)).T, ".-", color=f"C{place % 10}")
        bottom.plot(mean(row["units"]), value, "o", color=f"C{place % 10}")
    metric = metrics.get(rows[0]["metric_name"])
    higher = metric.higher_is_better
    label = f"{metric.label.split()[0]} ({'higher' if higher else 'lower'} is better)"
    top.set(title=rows[0]["task"], xlabel=label, ylim=(len(sets) - 0.5, -0.5))
    bottom.set_xscale("log", base=2)
    bottom.xaxis.set_major_formatter("{x:.0f}")
    bottom.set(xlabel="best-scored units (dot: the set)", ylabel=label)
    if not higher:
        top.set_xscale("log")
        bottom.set_yscale("log")
        for axis in (top.xaxis, bottom.yaxis):
            label_decades(axis)


def draw_transfer(panel: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """What a task's sets cost the others: of the name that has sets of most tasks, the one of lowest loss."""
    able = [row for row in rows if row["cost_to_other_tasks"]]
    if not able:
        panel.set_axis_off()
        return
    losses = {name: [row["loss"][0] for row in able if row["set"] == name] for name in {r["set"] for r in able}}
    best = min(losses, key=lambda name: (-len(losses[name]), mean(losses[name]), name))
    matrix = np.full((len(names), len(names)), np.nan)
    for row in able:
        for other, cost in ({row["task"]: 0.0} | row["cost_to_other_tasks"]).items() if row["set"] == best else ():
            at = names.index(row["task"]), names.index(other)
            matrix[at] = cost
            panel.text(at[1], at[0], f"{cost:+.2f}" if at[0] != at[1] else "0", ha="center", va="center", fontsize=8)
    limit = 1.5 * max(np.nanmax(np.abs(matrix)), 1e-9)
    panel.imshow(matrix, cmap="coolwarm", vmin=-limit, vmax=limit, aspect="auto")
    panel.set_xticks(range(len(names)), names, rotation=15)
    panel.set_yticks(range(len(names)), names)
    title = f"{plain_label(best)}: {rows[0]['loss_name']} over that of the task's set"
    panel.set(title=title, xlabel="task done", ylabel="set of task")
