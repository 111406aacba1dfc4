"""What a run left in its folder, read back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vtv_nnsight import tasks as registry
from vtv_nnsight.evaluation import Line, Table
from vtv_nnsight.evaluation.conditions import BASELINE, BOTH, CEILING, FLOOR, MATCHED, OTHER, PATCHED, RANDOM, ZERO_SHOT
from vtv_nnsight.evaluation.explorer import QueryExplorer
from vtv_nnsight.files import read_tensors
from vtv_nnsight.layouts import Layout
from vtv_nnsight.progress import quiet
from vtv_nnsight.prompts import crop
from vtv_nnsight.runs.record import changed_files, read_record
from vtv_nnsight.search.result import SearchResult
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import TaskVectors

CONDITIONS = {
    BASELINE: "An example is shown; nothing is patched.",
    ZERO_SHOT: "No example is shown; nothing is patched.",
    PATCHED: "No example is shown; the task vector is patched in at the units that were found.",
    BOTH: "An example is shown, and the task vector is patched in as well.",
    RANDOM: "No example is shown; the task vector is patched in at as many units drawn at random (many times).",
    MATCHED: "The same, with as many units of each stage and place as were found.",
    f"{OTHER}…": "No example is shown; the vector of another task is patched in at the same units.",
    CEILING: "The tokenizer's own drawing of the truth, the ceiling: no answer can be better.",
    FLOOR: "The query as its own answer, a floor.",
}
"""What is compared, in words."""
FLOOR_TO_CEILING = (FLOOR, BASELINE, ZERO_SHOT, RANDOM, PATCHED, CEILING)
"""The columns of the table that ends a run, and of the README's."""

PICTURES = {
    "example_input": "example",
    "example_output": "its answer",
    "query": "query",
    BASELINE: BASELINE,
    ZERO_SHOT: ZERO_SHOT,
    PATCHED: PATCHED,
    "truth": "truth",
}
"""The pictures of a row, and what is written under them."""


class RunResults(NamedTuple):
    """What a run left.

    Args:
        record: run.json.
        results: Task → name of the fold ("" where there are none) → what its search found.
        scores: Name of the fold → `TaskVectors.score()`; none of a single task.
        shown: Task → what was looked at closely, in the first fold.
    """

    name: str
    record: dict[str, Any]
    table: Table
    results: dict[str, dict[str, SearchResult]]
    scores: dict[str, Any]
    layout: Layout
    shown: dict[str, QueryExplorer]

    @property
    def tasks(self) -> list[Task]:
        return [registry.get(name) for name in self.record["settings"]["tasks"]]

    @property
    def seconds(self) -> float:
        return sum(self.record["seconds"].values())

    def lines(self) -> dict[str, dict[str, dict[str, Line]]]:
        """Task → "score" or "loss" → condition → its line of the table."""
        metrics = {task.name: task.metric.name for task in self.tasks}
        found: dict[str, dict[str, dict[str, Line]]] = {name: {"score": {}, "loss": {}} for name in metrics}
        for line in self.table.lines():
            found[line.task]["score" if line.measure == metrics[line.task] else "loss"][line.condition] = line
        return found

    def cells(self, task: Task) -> dict[str, torch.Tensor]:
        """The pictures of `PICTURES`, uint8 [row, 3, height, width], of the first prompts."""
        pictures = self.table.pictures[task.name]
        cells = self.layout.cells
        shown = {n: n if n in cells else f"{n}_1" for n in ("example_input", "example_output", "query")}  # of several
        return {n: crop(pictures["prompt"], shown[n], self.layout) if n in shown else pictures[n] for n in PICTURES}


def load_run(run: str | os.PathLike) -> RunResults:
    """What a run left.

    Raises:
        FileNotFoundError: when the folder holds no run, or an unfinished one.
        ValueError: when a file in it was changed, is cut short, or is of something else.
    """
    run = Path(run)
    record = read_record(run)
    names = record["settings"]["tasks"]
    folders = {f"fold{fold}": run / f"fold{fold}" for fold in record["settings"]["folds"]} or {"": run}
    for folder in folders.values():
        for name in names:
            if not (folder / "evaluation" / f"{name}.parquet").is_file():
                raise FileNotFoundError(f"{run} is not finished: {name} is not evaluated yet; run the same `vtv run`.")
    if changed := changed_files(run, record):
        raise ValueError(
            f"{', '.join(str(run / name) for name in changed)}: not as the run wrote it; put it back, or do it again "
            "with the same `vtv run` and --redo."
        )
    with quiet():
        tables = [
            _read_table(folder / "evaluation" / f"{name}.parquet", name)
            for name in names
            for folder in folders.values()
        ]
    results = {
        name: {fold: SearchResult.load(folder / "search" / f"{name}.safetensors") for fold, folder in folders.items()}
        for name in names
    }
    scores = {}
    if len(names) > 1:
        scores = {fold: TaskVectors.load(folder / "vectors.safetensors").score() for fold, folder in folders.items()}
    layout = next(iter(results[names[0]].values())).patches.space.layout
    closely = {name: next(iter(folders.values())) / "shown" / f"{name}.safetensors" for name in names}
    shown = {name: QueryExplorer.load(path) for name, path in closely.items() if path.is_file()}
    return RunResults(run.resolve().name, record, Table.cat(tables), results, scores, layout, shown)


def _read_table(path: Path, task: str) -> Table:
    tensors, metadata = read_tensors(path.with_suffix(".safetensors"), "answers")
    try:
        table = Table.load(path)
    except Exception as error:  # of pyarrow and pandas, each with its own, about bytes and columns
        raise ValueError(f"{path} is not the whole table of an evaluation; run the same `vtv run` again.") from error
    if table.tasks != [task]:
        raise ValueError(f"{path} is of {', '.join(table.tasks)}; expected an evaluation of {task}.")
    if missing := {BASELINE, ZERO_SHOT, PATCHED} - set(table.frame.condition):
        raise ValueError(f"{path} lacks the conditions {', '.join(sorted(missing))}; run the same `vtv run`.")
    if missing := [name for name in ("prompt", *list(PICTURES)[3:]) if name not in tensors]:
        raise ValueError(f"{path.with_suffix('.safetensors')} lacks {', '.join(missing)}; run the same `vtv run`.")
    return Table(table.frame, {task: {name: tensors[name] for name in metadata["names"]}})
