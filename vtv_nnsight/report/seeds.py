"""Runs of several seeds as one: what `vtv run --seeds` writes beside their folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vtv_nnsight.evaluation import Table
from vtv_nnsight.evaluation.conditions import PATCHED
from vtv_nnsight.files import write_text
from vtv_nnsight.report.reading import RunResults, load_run
from vtv_nnsight.report.verdicts import beats_copying


def merge(out: str | os.PathLike[str], runs: Mapping[int, Path]) -> list[str]:
    """Write table.csv and table.md of all seeds together, with intervals over seeds and pictures, and seeds.csv, a row
    for each seed, task and condition.

    Args:
        out: The folder of the seeds' folders.
        runs: Seed → a run's folder.

    Returns:
        In how many seeds the task vector is better than one-shot, a sentence a task.
    """
    results = {seed: load_run(run) for seed, run in runs.items()}
    table = Table.cat(Table(run.table.frame.assign(seed=seed)) for seed, run in results.items())
    sentences = list(_sentences(list(results.values())))
    table.to_csv(Path(out) / "table.csv")
    write_text(Path(out) / "table.md", "\n\n".join([table.markdown(), *sentences]) + "\n")
    rows = pd.DataFrame(row for seed, run in results.items() for row in _rows(seed, run))
    write_text(Path(out) / "seeds.csv", rows.to_csv(index=False, float_format="%.5f", lineterminator="\n"))
    return sentences


def _rows(seed: int, run: RunResults) -> Iterator[dict[str, Any]]:
    for task in run.tasks:
        units = sum(len(result.patches) for result in run.results[task.name].values())
        for line in run.lines()[task.name]["score"].values():
            yield {"seed": seed, "units": units} | line._asdict()


def _sentences(runs: Sequence[RunResults]) -> Iterator[str]:
    for task in runs[0].tasks:
        counts = {"better": 0, "worse": 0, "not told apart": 0}
        scores = [run.lines()[task.name]["score"] for run in runs]
        for lines in scores:
            change = lines[PATCHED]
            differs = change.difference_low > 0 or change.difference_high < 0
            better = (change.difference > 0) == task.metric.higher_is_better
            counts["not told apart" if not differs else "better" if better else "worse"] += 1
        copied = len(runs) - sum(beats_copying(task.metric, lines) for lines in scores)
        found = ", ".join(f"{name} in {count}" for name, count in counts.items() if count)
        end = f"; copying the query is better than one of them in {copied}" if copied else ""
        yield f"{task.name}: the task vector against one-shot, of {len(runs)} seeds: {found}{end}."
