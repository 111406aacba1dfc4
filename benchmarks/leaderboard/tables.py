"""The board as text: a table, and under it what random units and other vectors say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from statistics import mean
from typing import Any

import pandas as pd

from vtv_nnsight import metrics
from vtv_nnsight.evaluation.table import ENOUGH


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, and under it what floor, ceiling, random units and other vectors say of each task's sets."""
    return "\n\n".join([_markdown(rows), *sentences(rows)])


def sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each task: its floor and ceiling, how many random draws each set beats, and whether the task's vector is
    better there than every other."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        metric = metrics.get(of_task[0]["metric_name"])
        ends = next((row for row in of_task if "floor" in row), {})
        words = [f"{what} {ends[what][0]:.3f}" for what in ("floor", "ceiling") if what in ends]
        text = f"{task} ({metric.label}): {', '.join(words)}." if words else f"{task} ({metric.label})."
        for row in (row for row in of_task if "matched_random_units" in row):
            drawn = [row["random_units"], row["matched_random_units"]]
            uniform, matched = (
                f"{{}} of {{}} {what} draws ({{:.3f}} to {{:.3f}})".format(
                    *(one[key] for key in ("beaten", "draws", "least", "most"))
                )
                for what, one in zip(("random", "matched"), drawn)
            )
            if row["random_units"]["pictures"] < ENOUGH:
                text += f" {row['set']}: no verdict on {row['random_units']['pictures']} pictures"
            else:
                text += f" {row['set']} beats {uniform} and {matched}"
            best = best_other(row, metric)
            if best and row["pictures"] >= ENOUGH:
                name, other = best
                _, low, high = other["difference"]
                worse = high < 0 if metric.higher_is_better else low > 0
                text += f"; transfer at fixed units: {name}'s vector has {other['metric'][0]:.3f}"
                text += "" if worse else ", not surely worse"
            text += "."
        lines.append(text)
    return lines


def best_other(row: Mapping[str, Any], metric: metrics.Metric) -> tuple[str, Mapping[str, Any]] | None:
    """The vector of another task that does best at a row's sets, by metric."""
    others = {name: other for name, other in row.get("other_vectors", {}).items() if "difference" in other}
    sign = 1 if metric.higher_is_better else -1
    return max(others.items(), key=lambda item: sign * item[1]["metric"][0], default=None)


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["task", "set", "units", "metric", rows[0]["loss_name"], "gap closed (random)", "other vector"]
    head += ["less a tenth (most)", "Jaccard (chance)", "other data", "other tasks", "ablated (random)"]

    def pick(row: Mapping[str, Any], form: str, *paths: str) -> str:
        """The first value, and the second in brackets; nothing of what a row has not."""
        values = [reduce(lambda at, key: (at or {}).get(key), path.split("."), row) for path in paths]
        first, *more = [f"{value:{form}}" for value in values if value is not None] or [""]
        return f"{first} ({more[0]})" if more else first

    def cells(row: Mapping[str, Any]) -> list[str]:
        abroad = list(row["cost_to_other_tasks"].values())
        return [
            row["task"],
            row["set"],
            f"{mean(row['units']):.3g}" if "units" in row else "",
            *("{:.3f} [{:.3f}, {:.3f}]".format(*row[measure]) for measure in ("metric", "loss")),
            pick(row, ".0%", "gap_closed", "random_units.gap_closed"),
            nearest(row),
            pick(row, "+.3f", "cost_of_pruning_a_tenth.mean", "cost_of_pruning_a_tenth.most"),
            pick(row, ".2f", "jaccard_over_seeds.mean", "jaccard_over_seeds.by_chance"),
            pick(row, ".0%", "other_data.gap_closed"),
            f"{mean(abroad):+.3f}" if abroad else "",
            pick(row, ".0%", "mean_ablated_one_shot.gap_closed", "random_units_mean_ablated_one_shot.gap_closed"),
        ]

    def nearest(row: Mapping[str, Any]) -> str:
        closed = {t: other["gap_closed"] for t, other in row.get("other_vectors", {}).items() if other["gap_closed"]}
        best = max(closed, key=closed.get, default=None)
        return f"{closed[best]:.0%} ({best})" if best else ""

    return pd.DataFrame(map(cells, rows), columns=head).to_markdown(index=False, disable_numparse=True)
