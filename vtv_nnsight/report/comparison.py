"""Several runs side by side, on one page.

>>> report.compare(["runs/a", "runs/b"], "comparison.html")       # or `vtv report runs/a runs/b`
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial, reduce
from operator import and_
from pathlib import Path
from typing import Any

from vtv_nnsight.evaluation.conditions import BASELINE, PATCHED, ZERO_SHOT
from vtv_nnsight.evaluation.table import titled
from vtv_nnsight.files import write_text
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.report import plots
from vtv_nnsight.report.figures import draw, searches
from vtv_nnsight.report.labels import legend, plain_label
from vtv_nnsight.report.pictures import first_pictures
from vtv_nnsight.report.reading import Lines, RunResults, load_run
from vtv_nnsight.report.rendering import render
from vtv_nnsight.tasks import Task


def compare(runs: Sequence[str | os.PathLike], path: str | Path) -> Path:
    """Write a page that sets several runs side by side: their settings where they differ; for each task that they share
    their scores, their answers to the same queries, and how far the units agree that they found.

    Raises:
        ValueError: when the runs have no task in common; and as `load_run`.
    """
    if len({Path(run).resolve() for run in runs}) < len(runs):
        raise ValueError(f"a run is named twice in {', '.join(map(str, runs))}; give different ones.")
    results = [load_run(run) for run in runs]
    if len({run.name for run in results}) < len(results):
        results = [run._replace(name=str(folder)) for run, folder in zip(results, runs)]
    shared = [task for task in results[0].tasks if all(task in run.tasks for run in results)]
    if not shared:
        names = ", ".join(run.name for run in results)
        raise ValueError(f"{names} have no task in common; there is nothing to compare.")
    settings = [
        name for name in results[0].settings if len({json.dumps(run.settings.get(name)) for run in results}) > 1
    ]
    lines = {run.name: run.lines() for run in results}
    page = render(
        "comparison.html",
        title="Task vectors: runs compared",
        settings=settings,
        runs=results,
        words=legend((BASELINE, ZERO_SHOT, PATCHED), results[0].of_texts),
        shown=titled(BASELINE, results[0].table.frame.noun.iloc[0]),
        tasks=[_task(results, lines, task) for task in shared],
    )
    write_text(path, page + "\n")
    return Path(path)


def _task(results: list[RunResults], lines: dict[str, dict[str, Lines]], task: Task) -> dict[str, Any]:
    scores = {name: by_task[task.name]["score"] for name, by_task in lines.items()}
    same = [run for run in results if _query_settings(run) == _query_settings(results[0])]
    pictures = {run.name: first_pictures(run, task) for run in same}
    first = pictures[results[0].name]
    return {
        "task": task,
        "scores": scores,
        "lines": [line for by_condition in scores.values() for line in by_condition.values()],
        "answers": [(name, first[name]) for name in ("query", "truth")]
        + [(name, cells[PATCHED]) for name, cells in pictures.items()],
        "others": [run.name for run in results if run.name not in pictures],
        "searches": draw(
            partial(searches, {run.name: list(run.results[task.name].values()) for run in results}),
            "The searches: best held-out loss so far; lower is better.",
            wide=False,
        ),
        "overlap": _agreement({run.name: run.sets[task.name] for run in results}),
    }


def _query_settings(run: RunResults) -> list[Any]:
    """What runs must have in common to have asked the same queries in the same order."""
    return [run.settings.get(name) for name in ("data", "test pictures", "test_prompts", "protocol", "seed")]


def _agreement(sets: dict[str, PatchSet]) -> dict[str, Any] | None:
    """How far runs agree on units, which are compared by name, whatever the weights; None where names differ, or units
    are too many to draw."""
    space = next(iter(sets.values())).space
    if space.granularity == "token" or any(patches.space.names != space.names for patches in sets.values()):
        return None
    sets = {plain_label(name): PatchSet(space, patches.choices) for name, patches in sets.items()}
    caption = "How alike the runs' sets are (Jaccard similarity), and how many runs patch each unit."
    return {"figure": draw(partial(plots.overlap, sets), caption), "shared": list(reduce(and_, sets.values()))}
