"""What a run left in its folder, read back."""

from __future__ import annotations

import os
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any, NamedTuple

from vtv_nnsight import tasks as registry
from vtv_nnsight.evaluation import Line, Table
from vtv_nnsight.evaluation.conditions import BASELINE, PATCHED, ZERO_SHOT
from vtv_nnsight.files import read_tensors
from vtv_nnsight.patching import PatchSet, PatchSpace
from vtv_nnsight.progress import quiet
from vtv_nnsight.prompts import crop
from vtv_nnsight.report.explorer import QueryExplorer
from vtv_nnsight.report.labels import PICTURES
from vtv_nnsight.runs.resuming import check_files, read_record
from vtv_nnsight.search.result import SearchResult
from vtv_nnsight.tasks import Task
from vtv_nnsight.text_prompts import TextLayout
from vtv_nnsight.vectors import TaskVectors

Lines = dict[str, dict[str, Line]]
"""Of a task: "score" or "loss" → condition → its line of the table."""


class RunResults(NamedTuple):
    """What a run left.

    Args:
        name: Of its folder.
        record: run.json.
        table: The evaluations of all tasks.
        results: Task → name of the fold ("" where there are none) → what its search found.
        scores: Name of the fold → `TaskVectors.score()`; none of a single task.
        explorers: Task → what was looked at closely, in the first fold.
        anew: Scores at units searched for each pair of a task and a vector; None without, and of a single task.
    """

    name: str
    record: dict[str, Any]
    table: Table
    results: dict[str, dict[str, SearchResult]]
    scores: dict[str, Any]
    explorers: dict[str, QueryExplorer]
    anew: Table | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the run, as run.json has them."""
        return self.record["settings"]

    @property
    def tasks(self) -> list[Task]:
        """The run's tasks, in its order."""
        return [registry.get(name) for name in self.settings["tasks"]]

    @property
    def seconds(self) -> float:
        """How long its steps took, all together."""
        return sum(self.record["seconds"].values())

    @property
    def space(self) -> PatchSpace:
        """The units that were searched, which are those of all tasks and folds."""
        return next(iter(next(iter(self.results.values())).values())).patches.space

    @property
    def layout(self) -> Any:
        """That of its prompts."""
        return self.space.layout

    @property
    def sets(self) -> dict[str, PatchSet]:
        """Task → the units that were found in every fold."""
        return {
            name: reduce(and_, (result.patches for result in folds.values())) for name, folds in self.results.items()
        }

    def size(self, task: Task) -> str:
        """How many units were found for a task in each fold, and of how many."""
        return f"{', '.join(str(len(r.patches)) for r in self.results[task.name].values())} of {len(self.space)}"

    def lines(self) -> dict[str, Lines]:
        """Task → the lines of its table."""
        metrics = {task.name: task.metric.name for task in self.tasks}
        lines: dict[str, Lines] = {name: {"score": {}, "loss": {}} for name in metrics}
        for line in self.table.lines():
            lines[line.task]["score" if line.measure == metrics[line.task] else "loss"][line.condition] = line
        return lines

    @property
    def of_texts(self) -> bool:
        """Whether its model is one of language."""
        return isinstance(self.layout, TextLayout)

    @property
    def example(self) -> str:
        """What one-shot prompts show."""
        return "the examples" if self.of_texts else "one example"

    def cells(self, task: Any) -> dict[str, Any]:
        """The pictures of `PICTURES`, uint8 [row, 3, height, width], of the first prompts; of texts, strings [row],
        from the query on."""
        pictures = self.table.pictures[task.name]
        if self.of_texts:
            queries = [text.rsplit(task.stop, 1)[-1] for text in pictures["prompt"]]
            return {"query": queries} | {name: pictures[name] for name in PICTURES if name in pictures}
        layout, asking = self.layout, ("example_input", "example_output", "query")
        first = {name: name if name in layout.cells else f"{name}_1" for name in asking}  # of several examples
        return {n: crop(pictures["prompt"], first[n], layout) if n in first else pictures[n] for n in PICTURES}


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
    evaluations = {folder / "evaluation" / f"{name}.parquet": name for name in names for folder in folders.values()}
    for path, name in evaluations.items():
        if not path.is_file():
            raise FileNotFoundError(f"{run} is not finished: {name} is not evaluated yet; run the same `vtv run`.")
    _, written = check_files(run, "")
    with quiet():
        table = Table.cat([_read_table(path, name) for path, name in evaluations.items()])
    results = {
        name: {fold: SearchResult.load(folder / "search" / f"{name}.safetensors") for fold, folder in folders.items()}
        for name in names
    }
    scores = {}
    if len(names) > 1:
        scores = {fold: TaskVectors.load(folder / "vectors.safetensors").score() for fold, folder in folders.items()}
    explored = {name: next(iter(folders.values())) / "shown" / f"{name}.safetensors" for name in names}
    explorers = {name: QueryExplorer.load(p) for name, p in explored.items() if str(p.relative_to(run)) in written}
    matrix = [folder / "matrix" / f"{name}.parquet" for name in names for folder in folders.values()]
    pairs = len(names) > 1 and all(str(path.relative_to(run)) in written for path in matrix)
    anew = Table.cat(map(Table.load, matrix)) if pairs else None
    return RunResults(run.resolve().name, record, table, results, scores, explorers, anew)


def _read_table(path: Path, task: str) -> Table:
    tensors, metadata = read_tensors(path.with_suffix(".safetensors"), "answers")
    tensors |= metadata.get("texts", {})
    try:
        table = Table.load(path)
    except Exception as error:  # of pyarrow and pandas, each with its own, about bytes and columns
        raise ValueError(f"{path} is not the whole table of an evaluation; run the same `vtv run` again.") from error
    if table.tasks != [task]:
        raise ValueError(f"{path} is of {', '.join(table.tasks)}; expected an evaluation of {task}.")
    if missing := {BASELINE, ZERO_SHOT, PATCHED} - set(table.frame.condition):
        raise ValueError(f"{path} lacks the conditions {', '.join(sorted(missing))}; run the same `vtv run`.")
    if absent := [name for name in ("prompt", *list(PICTURES)[3:]) if name not in tensors]:
        raise ValueError(f"{path.with_suffix('.safetensors')} lacks {', '.join(absent)}; run the same `vtv run`.")
    return Table(table.frame, {task: {name: tensors[name] for name in metadata["names"]}})
