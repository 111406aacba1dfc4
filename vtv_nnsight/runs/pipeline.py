"""The paper from end to end, in a folder: *Finding Visual Task Vectors* (ECCV 2024), §4 and §5.

    >>> run("runs/pictures", Settings(budget=20_000), explore=explorer.demonstrate, report=page.write)

as `vtv run --budget 20000` does, with what `vtv_nnsight.report` has for the last two steps.

The folder, and what is written in it:

    run.json                     settings, seeds, versions, the machine, seconds per step, digests of the steps' files
    prompts.safetensors          prompts that the model does well one-shot, of every task
    vectors.safetensors          the task vectors of these prompts (`TaskVectors`)
    scores.csv                   how well each unit tells the tasks apart
    search/TASK.safetensors      the units to patch (`SearchResult`)
    evaluation/TASK.parquet      scores of all conditions, image by image; the first answers beside them
    shown/TASK.safetensors       one query looked at closely (`QueryExplorer`)
    matrix/TASK.parquet          scores of every task's vector, each at units that were searched for it, where asked for
    report.html, table.csv, …    see `vtv_nnsight.report`; figures/ has each of its figures as CSV, PNG and SVG

Data in folds, such as Pascal-5i, have a folder for each fold; in the published protocol (`runs.protocol`) these have
the same vectors and sets. A step whose file is there is not done again, a search or a collection that was interrupted
goes on, and a folder that was made with other settings is refused, as are files that the run did not write. Of several
processes (`torchrun --nproc-per-node 2 -m vtv_nnsight run`) the first writes, and searches are shared out; the files
are those of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vtv_nnsight.evaluation import Table
from vtv_nnsight.evaluation.conditions import PATCHED
from vtv_nnsight.files import make_folder
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.parallel import processes
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.progress import numbered_steps, quiet
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.runs import steps
from vtv_nnsight.runs.folds import Fold, load_folds
from vtv_nnsight.runs.outputs import identity, read_prompts, write_pictures, write_prompts, write_scores
from vtv_nnsight.runs.protocol import fold_draw, search_prompts
from vtv_nnsight.runs.resuming import STEPS, RunRecord, StepFiles, begin_step
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.runs.trial import check
from vtv_nnsight.search import SearchResult
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import TaskVectors

SHARED = ("select", "collect", "search")
"""The steps whose files the folds of the published protocol share."""


def run(
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    redo: bool = False,
    device: str | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    explore: Callable[..., Any] | None = None,
    report: Callable[[Path], object] | None = None,
) -> Path:
    """Find the task vectors of a model and say what they are worth. Called again, it goes on where it stopped.

    Args:
        out: The folder; it is made.
        settings: The defaults take some minutes on two CPU cores.
        redo: When the settings are not those that the folder was begun with, or a file in it was changed, do again what
            depends on them.
        device: Where the model runs.
        batch_size: Prompts per forward; by default `default_batch_size` of the model, and as many as the device likes
            for searches.
        progress: Show which step is being done.
        explore: What the step "demonstrate" does for a task, such as `report.explorer.demonstrate`: called with the
            model, the task, prompts, scores, vectors, results and `batch_size`, it returns what can `save(path)`. None
            leaves the step out.
        report: The last step, called with the folder, such as `report.page.write`; none by default.

    Returns:
        The folder.

    Raises:
        ValueError: before anything is done, when the folder was begun with other settings or a file in it was changed,
            naming them and the steps that depend on them; when the data cannot serve a task; or when a search cannot be
            done with these settings.
    """
    out, settings, state = Path(out), settings or Settings(), processes()
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} holds nothing; give 1 or more.")
    with quiet():
        setup = steps.set_up(settings, device, batch_size)
        folds, notes = load_folds(out, settings)
        tasks = steps.servable(settings, folds[0].train)
        space = PatchSpace(setup.model, setup.layout, settings.granularity, sites=settings.sites)
        check(settings, folds, tasks, space, setup.model)
        record = None
        if state.is_main_process:
            facts = identity(settings, setup.model, folds, tasks)
            record = RunRecord.open(out, facts, [fold.folder for fold in folds], notes, device_of(setup.model), redo)
        state.wait_for_everyone()
        total = (len(STEPS) - (explore is None) - (not settings.matrix)) * len(folds) + (report is not None)
        step = numbered_steps(total, disable=not (progress and state.is_main_process))
        for fold in folds:
            work = _Work(setup, tasks, space, record, step, fold)
            prompts = work.select()
            vectors = work.collect(prompts)
            work.score(vectors)
            results = work.search(prompts, vectors)
            work.evaluate(vectors, results)
            if explore is not None:
                work.demonstrate(explore, vectors, results)
            if settings.matrix:
                work.search_anew(prompts, vectors)
        if report is not None:
            with begin_step(record, out, "report", step("report")) as files:
                if state.is_main_process:
                    files.working_on("")
                    report(out)
                files.wait()
    return out


@dataclass(frozen=True)
class _Work:
    """The steps of one fold: each makes the files that it lacks, and returns what they hold."""

    setup: steps.Setup
    tasks: Sequence[Task]
    space: PatchSpace
    record: RunRecord | None
    step: Callable[[str], AbstractContextManager[Callable[[str], None]]]
    fold: Fold

    def begin(self, name: str) -> AbstractContextManager[StepFiles]:
        shares = self.fold.shares if name in SHARED else None
        return begin_step(self.record, self.fold.folder, name, self.step(f"{name} {self.fold.name}".strip()), shares)

    def select(self) -> dict[str, VisualPrompt]:
        with self.begin("select") as files:
            if files.lacks("prompts.safetensors"):
                prompts = {
                    task.name: steps.select(self.setup, task, self.fold.train) for task in files.each(self.tasks)
                }
                files.save("prompts.safetensors", partial(write_prompts, prompts=prompts))
            return read_prompts(files.path("prompts.safetensors"), self.setup.layout)

    def collect(self, prompts: Mapping[str, VisualPrompt]) -> TaskVectors:
        with self.begin("collect") as files:
            if files.lacks("vectors.safetensors"):
                files.working_on("")
                vectors = steps.collect(self.setup, prompts, self.fold.folder / "vectors.state")
                files.save("vectors.safetensors", vectors.save)
                files.remove("vectors.state")
            return TaskVectors.load(files.path("vectors.safetensors"))

    def score(self, vectors: TaskVectors) -> None:
        with self.begin("score") as files:
            scores = steps.score(vectors, self.space)
            if scores is not None and files.lacks("scores.csv"):
                files.working_on("")
                files.save("scores.csv", partial(write_scores, scores=scores, space=self.space))

    def search(self, prompts: Mapping[str, VisualPrompt], vectors: TaskVectors) -> dict[str, SearchResult]:
        results = {}
        with self.begin("search") as files:
            make_folder(self.fold.folder / "search")  # where journals are kept
            for task in self.tasks:
                name = f"search/{task.name}"
                if files.everyone_lacks(f"{name}.safetensors"):
                    files.working_on(task.name)
                    result = self._search(task, prompts[task.name], vectors, self.fold.folder / f"{name}.journal")
                    files.save(f"{name}.safetensors", result.save)
                    files.remove(f"{name}.journal")
                results[task.name] = SearchResult.load(files.path(f"{name}.safetensors"))
        if self.setup.settings.fold_draws:
            seed = self.setup.settings.seed
            return {task: fold_draw(result, self.fold.number, seed) for task, result in results.items()}
        return results

    def _search(self, task: Task, prompts: VisualPrompt, vectors: TaskVectors, journal: Path) -> SearchResult:
        options: dict[str, Any] = {"resume": journal}
        if self.fold.search is not None:
            seed = self.setup.settings.seed
            prompts, held_out = search_prompts(task, self.fold.search, self.setup.layout, seed)
            options["held_out"] = [held_out.query_only()]
        return steps.search(self.setup, vectors, [task], [prompts], self.space, **options)

    def evaluate(self, vectors: TaskVectors, results: Mapping[str, SearchResult]) -> None:
        with self.begin("evaluate") as files:
            for task in self.tasks:
                names = [f"evaluation/{task.name}.{kind}" for kind in ("safetensors", "parquet")]
                if any([files.lacks(name) for name in names]):
                    files.working_on(task.name)
                    patches = results[task.name].patches
                    table = steps.evaluate(self.setup, task, self.fold.test, vectors, patches, self.fold.number)
                    files.save(names[0], partial(write_pictures, table=table, task=task))
                    files.save(names[1], table.to_parquet)
            files.wait()

    def demonstrate(
        self, explore: Callable[..., Any], vectors: TaskVectors, results: Mapping[str, SearchResult]
    ) -> None:
        with self.begin("demonstrate") as files:
            for task in self.tasks:
                name = f"shown/{task.name}.safetensors"
                if files.lacks(name):
                    files.working_on(task.name)
                    table = Table.load(self.fold.folder / f"evaluation/{task.name}.parquet")
                    scores = table.values(task.name, PATCHED)
                    prompts = steps.prompts_to_test(self.setup, task, self.fold.test)
                    explorer = explore(
                        self.setup.model, task, prompts, scores, vectors, results, batch_size=self.setup.batch_size
                    )
                    files.save(name, explorer.save)
            files.wait()

    def search_anew(self, prompts: Mapping[str, VisualPrompt], vectors: TaskVectors) -> None:
        with self.begin("matrix") as files:
            for task in self.tasks:
                name = f"matrix/{task.name}.parquet"
                if files.everyone_lacks(name):
                    files.working_on(task.name)
                    (folder := self.fold.folder / "matrix").mkdir(exist_ok=True)
                    given = (prompts[task.name], self.fold.test, vectors, self.space, self.fold.number, folder)
                    table = steps.search_anew(self.setup, task, *given)
                    files.save(name, table.to_parquet)
                    for other in vectors:
                        files.remove(f"matrix/{task.name}-{other}.journal")
            files.wait()
