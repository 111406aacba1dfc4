"""The paper from end to end, in a folder: *Finding Visual Task Vectors* (ECCV 2024), §4 and §5.

    >>> run("runs/pictures", Settings(budget=20_000), explore=explorer.demonstrate, report=page.write)

as `vtv run --budget 20000` does, with what `vtv_nnsight.report` has for the last two steps.

The folder, and what is written in it:

    run.json                     settings, seeds, versions, the machine, seconds per step, digests of the steps' files
    prompts/TASK.safetensors     prompts that the model does well one-shot
    vectors.safetensors          the task vectors of these prompts (`TaskVectors`)
    scores.csv                   how well each unit tells the tasks apart
    search/TASK.safetensors      the units to patch (`SearchResult`)
    evaluation/TASK.parquet      scores of all conditions, image by image; the first answers beside them
    shown/TASK.safetensors       one query looked at closely (`QueryExplorer`)
    matrix/TASK.parquet          scores of every task's vector, each at units that were searched for it, where asked for
    report.html, table.csv, …    see `vtv_nnsight.report`

Data in folds, such as Pascal-5i, have a folder for each fold; in the published protocol (`runs.protocol`) these have
the same vectors and sets. A step that has its file is not done again, a search or a collection that was interrupted
goes on, and a folder that was made with other settings is refused, as are files that the run did not write. Of several
processes (`torchrun --nproc-per-node 2 -m vtv_nnsight run`) the first writes, and searches are shared out; the files
are those of one process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vtv_nnsight import tasks as registry
from vtv_nnsight.evaluation import Table, each_vector, evaluate, search_each
from vtv_nnsight.evaluation.conditions import PATCHED
from vtv_nnsight.files import replacing
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.parallel import Workers, processes
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.progress import numbered_steps, quiet
from vtv_nnsight.runs import steps
from vtv_nnsight.runs.folds import Fold, load_folds
from vtv_nnsight.runs.outputs import identity, read_prompts, write_pictures, write_prompts, write_scores
from vtv_nnsight.runs.protocol import fold_draw, search_prompts
from vtv_nnsight.runs.resuming import STEPS, RunRecord
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.runs.trial import check
from vtv_nnsight.search import SearchResult
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import TaskVectors

SHARED = ("select", "collect", "score", "search")
"""The steps that have their files shared by the folds of the published protocol."""


def run(
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    redo: bool = False,
    device: str | None = None,
    batch_size: int | None = None,
    jobs: int | None = None,
    remote: bool | str | None = None,
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
        jobs: Worker processes, of one thread each, which share the tasks out; with any number the files are the same.
            None is this process, with all of its threads.
        remote: Where the model runs, if not here, as for `CausalLM`.
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
    given = settings, device, batch_size, remote, out, explore
    bench = _prepare(*given)
    setup, tasks, folds = bench.setup, bench.tasks, bench.folds
    with quiet():
        check(settings, folds, tasks, bench.space, setup.model)
        record = RunRecord(out, [fold.folder for fold in folds])
        if state.is_main_process:
            facts = identity(settings, setup.model, folds, tasks)
            record = RunRecord.open(out, facts, record.folders, bench.notes, device_of(setup.model), redo)
        state.wait_for_everyone()
        total = (len(STEPS) - (bench.explore is None) - (not settings.matrix)) * len(folds) + (report is not None)
        total -= (len(SHARED) - 1) * sum(fold.shares is not None for fold in folds)
        step = numbered_steps(total, disable=not (progress and state.is_main_process))
        jobs = min(jobs, len(tasks)) if jobs and state.num_processes == 1 else None
        with Workers(jobs, bench, _prepare, *given) as workers:
            for number, fold in enumerate(folds):
                work = _Work(bench, record, step, number, fold, workers)
                if fold.shares is None:
                    work.make("select", _select, "prompts/{}.safetensors")
                    work.collect()
                    work.make("search", _search, "search/{}.safetensors", together=True, then=_evaluate)
                else:
                    work.share(fold.shares)
                shown = _demonstrate if bench.explore is not None else None
                work.make("evaluate", _evaluate, "evaluation/{}.safetensors", "evaluation/{}.parquet", then=shown)
                if bench.explore is not None:
                    work.make("demonstrate", _demonstrate, "shown/{}.safetensors")
                if settings.matrix:
                    work.make("matrix", _search_anew, "matrix/{}.parquet", together=True)
        if report is not None:
            with record.step("report", step("report")) as working_on:
                if state.is_main_process:
                    working_on("")
                    report(out)
    return out


class _Bench(NamedTuple):
    """What each process computes with."""

    setup: steps.Setup
    tasks: Sequence[Task]
    folds: Sequence[Fold]
    notes: list[str]
    space: PatchSpace
    explore: Callable[..., Any] | None


def _prepare(
    settings: Settings,
    device: str | None,
    batch_size: int | None,
    remote: bool | str | None,
    out: Path,
    explore: Callable[..., Any] | None,
) -> _Bench:
    """The bench, of this process or of a worker that does not inherit one."""
    with quiet():
        setup = steps.set_up(settings, device, batch_size, remote=remote)
        folds, notes = load_folds(out, settings)
        tasks = steps.servable(settings, folds[0].train)
        space = PatchSpace(setup.model, setup.layout, settings.granularity, sites=settings.sites)
        pictures = hasattr(setup.model, "paint")  # which alone are looked at closely
        return _Bench(setup, tasks, folds, notes, space, explore if pictures else None)


def _select(bench: _Bench, fold: int, task: str) -> None:
    prompts = steps.select(bench.setup, registry.get(task), bench.folds[fold].train)
    write_prompts(bench.folds[fold].folder / f"prompts/{task}.safetensors", prompts)


def _search(bench: _Bench, fold: int, task: str) -> None:
    """One task's search, in all processes that `torchrun` started."""
    folder, setup, search = bench.folds[fold].folder, bench.setup, bench.folds[fold].search
    prompts = read_prompts(folder / f"prompts/{task}.safetensors", setup.layout)
    options: dict[str, Any] = {"resume": folder / f"search/{task}.journal"}
    if search is not None:
        prompts, held_out = search_prompts(registry.get(task), search, setup.layout, setup.settings.seed)
        options["held_out"] = [held_out.query_only()]
    vectors = TaskVectors.load(folder / "vectors.safetensors")
    result = steps.search(setup, vectors, [registry.get(task)], [prompts], bench.space, **options)
    if processes().is_main_process:
        result.save(folder / f"search/{task}.safetensors")


def _result(bench: _Bench, fold: Fold, task: str) -> SearchResult:
    """A task's search, as it serves a fold."""
    result, settings = SearchResult.load(fold.folder / f"search/{task}.safetensors"), bench.setup.settings
    return fold_draw(result, fold.number, settings.seed) if settings.fold_draws else result


def _evaluate(bench: _Bench, fold: int, task: str) -> None:
    part = bench.folds[fold]
    vectors = TaskVectors.load(part.folder / "vectors.safetensors")
    patches = _result(bench, part, task).patches
    table = steps.evaluate(bench.setup, registry.get(task), part.test, vectors, patches, part.number)
    write_pictures(part.folder / f"evaluation/{task}.safetensors", table, registry.get(task))
    table.to_parquet(part.folder / f"evaluation/{task}.parquet")


def _demonstrate(bench: _Bench, fold: int, task: str) -> None:
    setup, part = bench.setup, bench.folds[fold]
    vectors = TaskVectors.load(part.folder / "vectors.safetensors")
    results = {name: _result(bench, part, name) for name in vectors}
    scores = Table.load(part.folder / f"evaluation/{task}.parquet").values(task, PATCHED)
    prompts = steps.prompts_to_test(setup, registry.get(task), part.test)
    if bench.explore is not None:
        explorer = bench.explore(
            setup.model, registry.get(task), prompts, scores, vectors, results, batch_size=setup.batch_size
        )
        explorer.save(part.folder / f"shown/{task}.safetensors")


def _search_anew(bench: _Bench, fold: int, task: str) -> None:
    """One task's row of the matrix, in all processes that `torchrun` started."""
    part, setup, asked = bench.folds[fold], bench.setup, registry.get(task)
    settings, model, batch_size = setup.settings, setup.model, setup.batch_size
    prompts = read_prompts(part.folder / f"prompts/{task}.safetensors", setup.layout)
    vectors = TaskVectors.load(part.folder / "vectors.safetensors")
    shared: dict[str, Any] = {"budget": settings.matrix, "resume": part.folder / "matrix", "batch_size": batch_size}
    shared |= {"loss": settings.loss, "seed": settings.seed}
    conditions = each_vector(task, vectors, search_each(model, asked, prompts, vectors, bench.space, **shared))
    queries = steps.prompts_to_test(setup, asked, part.test)
    table = evaluate(model, asked, queries, conditions, fold=part.number, batch_size=batch_size, keep=0)
    if processes().is_main_process:
        table.to_parquet(part.folder / f"matrix/{task}.parquet")


@dataclass(frozen=True)
class _Work:
    """The steps of one fold: each makes the files that it lacks."""

    bench: _Bench
    record: RunRecord
    step: Callable[[str], AbstractContextManager[Callable[[str], None]]]
    number: int
    fold: Fold
    workers: Workers

    def begin(self, name: str) -> AbstractContextManager[Callable[[str], None]]:
        return self.record.step(name, self.step(f"{name} {self.fold.name}".strip()), self.fold.folder)

    def collect(self) -> None:
        folder = self.fold.folder
        vectors, scores = folder / "vectors.safetensors", folder / "scores.csv"
        with self.begin("collect") as working_on:
            if self.record.lacking([vectors]):
                working_on("")
                prompts = {
                    task.name: read_prompts(folder / f"prompts/{task.name}.safetensors", self.bench.setup.layout)
                    for task in self.bench.tasks
                }
                steps.collect(self.bench.setup, prompts).save(vectors)
                self.record.made(vectors)
        with self.begin("score") as working_on:
            if len(self.bench.tasks) > 1 and self.record.lacking([scores]):
                working_on("")
                write_scores(scores, TaskVectors.load(vectors), self.bench.space)
                self.record.made(scores)

    def share(self, folder: Path) -> None:
        """Take the files of `SHARED` from another fold."""
        with self.begin("search"):
            for pattern in (pattern for step in SHARED for pattern in STEPS[step].writes):
                for source in folder.glob(pattern) if processes().is_main_process else ():
                    path = self.fold.folder / source.relative_to(folder)
                    replace_by_link(source, path)
                    self.record.made(path)

    def make(
        self,
        step: str,
        function: Callable[[_Bench, int, str], None],
        *names: str,
        together: bool = False,
        then: Callable[[_Bench, int, str], None] | None = None,
    ) -> None:
        """The files of a step, task by task: by all processes that `torchrun` started together, or by the first alone.
        `then` is what a worker may begin with when a task is done."""
        with self.begin(step) as working_on:
            files = {
                task.name: [self.fold.folder / name.format(task.name) for name in names] for task in self.bench.tasks
            }
            lacking = self.record.lacking([path for paths in files.values() for path in paths], together)
            calls = [(self.number, task) for task, paths in files.items() if not set(paths).isdisjoint(lacking)]
            for _, task in self.workers.each(function, calls, working_on):
                self.record.made(*files[task])
                if then is not None:
                    self.workers.begin(then, self.number, task)


def replace_by_link(source: Path, path: Path) -> None:
    """One file under a second path, in the place of what is there; a copy where the system cannot."""
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        with replacing(path) as temporary:
            shutil.copyfile(source, temporary)
