"""The paper from end to end, in a folder: *Finding Visual Task Vectors* (ECCV 2024), §4 and §5.

    >>> run("runs/pictures", Settings(budget=20_000))        # or `vtv run --budget 20000`

The folder, and what is written in it:

    run.json                     settings, seeds, versions, the machine, seconds per step, a digest of every other file
    prompts.safetensors          prompts that the model does well one-shot, of every task
    vectors.safetensors          the task vectors of these prompts (`TaskVectors`)
    scores.csv                   how well each unit tells the tasks apart
    search/TASK.safetensors      the units to patch (`SearchResult`)
    evaluation/TASK.parquet      scores of all conditions, image by image; the first answers beside them
    shown/TASK.safetensors       one query looked at closely (`QueryExplorer`)
    report.html, table.csv, …    see `vtv_nnsight.report`; figures/ has each of its figures as CSV, PNG and SVG

Data in folds, such as Pascal-5i, have a folder for each fold; in the published protocol (`experiment.protocol`) these
have the same vectors and sets. A step whose file is there is not done again, a search or a collection that was
interrupted goes on, and a folder that was made with other settings is refused, as are files that the run did not write.
Of several processes (`torchrun --nproc-per-node 2 -m vtv_nnsight run`) the first writes, and searches are shared out;
the files are those of one process.

The steps are functions of their own: `select`, `collect`, `score`, `search` and `evaluate`, which `vtv collect` and its
like call with the same defaults.
"""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from vtv_nnsight.digests import json_digest
from vtv_nnsight import data, models
from vtv_nnsight import tasks as registry
from vtv_nnsight.evaluation import Condition, Table, comparison, controls, select_prompts
from vtv_nnsight.evaluation import evaluate as evaluate_conditions
from vtv_nnsight.evaluation.conditions import CEILING, FLOOR, PATCHED
from vtv_nnsight.evaluation.explorer import demonstrate
from vtv_nnsight.runs.protocol import VECTOR_FOLDS, candidates, search_prompts, test_prompts
from vtv_nnsight.runs.record import STEPS, RunRecord, StepFiles, begin_step
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.files import package_version, read_tensors, write_tensors, write_text
from vtv_nnsight.layouts import REASONING, Layout
from vtv_nnsight.models.devices import resolve_device
from vtv_nnsight.models.interface import SITES, InContextModel
from vtv_nnsight.patching import PatchSet, PatchSpace
from vtv_nnsight.patching.forward import find_loss
from vtv_nnsight.progress import numbered_steps, quiet
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.search import ALGORITHMS, Algorithm, SearchResult, reinforce
from vtv_nnsight.search.holdout import held_out_count
from vtv_nnsight.parallel import processes
from vtv_nnsight.models.interface import HEADS
from vtv_nnsight.models.sites import validate_sites
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.vectors.compatibility import differences, fingerprint, geometry, layout_of
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import TaskVector, TaskVectors

PICTURES_PER_PROMPT = 4
"""Pictures per prompt, at least, for prompts to be selected: each serves in one only."""

SIXTEENTH = 255 * 128
"""Prompts are kept as 16-bit numbers: pixels of 8 bits, and those darkened to a half, are kept exactly."""

HELD_OUT = 0.25
"""Of the prompts, the share that searches hold out."""

SHARED = ("select", "collect", "search")
"""The steps whose files the folds of the published protocol share."""

ENOUGH = 10_000
"""Evaluations after which the trial of a search's settings ends."""


def run(
    out: str | os.PathLike,
    settings: Settings | None = None,
    *,
    redo: bool = False,
    device: str | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Path:
    """Find the task vectors of a model and say what they are worth. Called again, it goes on where it stopped.

    Args:
        out: The folder; it is made.
        settings: The defaults take some minutes on two CPU cores.
        redo: When the settings are not those that the folder was begun with, or a file in it was changed, do again what
            depends on them.
        device: Where the model runs.
        batch_size: Prompts per forward; by default 32 of a canvas like MAE-VQGAN's (`stages.default_batch_size`), and as many
            as the device likes for searches.
        progress: Show which step is being done.

    Returns:
        The report.

    Raises:
        ValueError: before anything is done, when the folder was begun with other settings or a file in it was changed,
            naming them and the steps that depend on them; when the data cannot serve a task; or when a search cannot be
            done with these settings.
    """
    from vtv_nnsight.report import page as report  # which reads what this package writes, and so imports it

    out, settings, state = Path(out), settings or Settings(), processes()
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} holds nothing; give 1 or more.")
    with quiet():
        model = load_model(
            settings.model, settings.vqgan, device, embedding_type=settings.embedding_type, dtype=settings.dtype
        )
        folds, notes = load_folds(out, settings)
        tasks = servable(settings, folds[0].train)
        layout = layout_for(model, settings)
        space = PatchSpace(model, layout, settings.granularity, sites=settings.sites)
        check(settings, folds, tasks, space, model)
        record = None
        if state.is_main_process:
            record = RunRecord.open(
                out, identity(settings, model, folds, tasks), [fold.folder for fold in folds], notes,
                device_of(model), redo,
            )  # fmt: skip
        state.wait_for_everyone()
        shown = numbered_steps(len(STEPS) * len(folds) + 1, disable=not (progress and state.is_main_process))
        for fold in folds:

            def begin(name: str, fold: Fold = fold) -> AbstractContextManager[StepFiles]:
                shares = fold.shares if name in SHARED else None
                return begin_step(record, fold.folder, name, shown(f"{name} {fold.name}".strip()), shares)

            with begin("select") as step:
                if step.lacks("prompts.safetensors"):
                    prompts = {
                        task.name: select(model, task, fold.train, settings, layout, batch_size)
                        for task in step.each(tasks)
                    }
                    step.save("prompts.safetensors", write_prompts, prompts)
                prompts = read_prompts(step.path("prompts.safetensors"), layout)
            with begin("collect") as step:
                if step.lacks("vectors.safetensors"):
                    step.working_on("")
                    state_file = fold.folder / "vectors.state"
                    vectors = collect(model, prompts, batch_size, state_file, settings.sites)
                    step.save("vectors.safetensors", lambda path, vectors: vectors.save(path), vectors)
                    step.remove("vectors.state")
                vectors = TaskVectors.load(step.path("vectors.safetensors"))
            with begin("score") as step:
                scores = score(vectors, space)
                if scores is not None and step.lacks("scores.csv"):
                    step.working_on("")
                    step.save("scores.csv", partial(write_scores, space=space), scores)
            with begin("search") as step:
                found = {}
                for task in tasks:
                    name = f"search/{task.name}"
                    if step.everyone_lacks(f"{name}.safetensors"):
                        step.working_on(task.name)
                        to_search, apart = [prompts[task.name]], {}
                        if fold.search is not None:
                            train, held_out = search_prompts(task, fold.search, layout, settings.seed)
                            to_search, apart = [train], {"held_out": [held_out.query_only()]}
                        found[task.name] = search(
                            model, vectors, [task], to_search, space, settings,
                            batch_size=batch_size, resume=fold.folder / f"{name}.journal", **apart,
                        )  # fmt: skip
                        step.save(f"{name}.safetensors", lambda path, result: result.save(path), found[task.name])
                        step.remove(f"{name}.journal")
                    found[task.name] = SearchResult.load(step.path(f"{name}.safetensors"))
            with begin("evaluate") as step:
                for task in tasks:
                    names = [f"evaluation/{task.name}.{kind}" for kind in ("safetensors", "parquet")]
                    if any([step.lacks(name) for name in names]):
                        step.working_on(task.name)
                        patches = found[task.name].patches
                        table = evaluate(
                            model, task, fold.test, settings, layout, vectors, patches, fold.number, batch_size
                        )
                        step.save(names[0], partial(write_pictures, task=task), table)
                        step.save(names[1], lambda path, table: table.to_parquet(path), table)
                step.wait()
            with begin("demonstrate") as step:
                for task in tasks:
                    name = f"shown/{task.name}.safetensors"
                    if step.lacks(name):
                        step.working_on(task.name)
                        table = Table.load(fold.folder / f"evaluation/{task.name}.parquet")
                        own = table.values(task.name, PATCHED)
                        asked = prompts_to_test(task, fold.test, settings, layout)
                        closely = demonstrate(model, task, asked, own, vectors, found, batch_size=batch_size)
                        step.save(name, lambda path, shown: shown.save(path), closely)
                step.wait()
        with begin_step(record, out, "report", shown("report")) as step:
            if state.is_main_process:
                step.working_on("")
                report.write(out)
            step.wait()
    return out / "report.html"


class Fold(NamedTuple):
    """The pictures of one fold, or of all data where there are no folds.

    Args:
        search: Pictures to search on, in the published protocol; else searches have the prompts that were collected on.
        shares: The folder whose prompts, vectors and sets are this fold's, too, in the published protocol.
    """

    name: str
    folder: Path
    number: int
    train: Dataset
    test: Dataset
    search: Dataset | None = None
    shares: Path | None = None


def load_model(
    source: str, vqgan: str | os.PathLike | None = None, device: str | None = None, **options: Any
) -> InContextModel:
    """A model with its weights, on a device; of several processes each on a device of its own. Options are
    `models.load_model`'s."""
    state = processes()
    if device is None and state.num_processes > 1:
        device = str(state.device)
    device = resolve_device(device) if device else None
    model = models.load_model(source, vqgan=vqgan or None, dispatch=True, **options)
    return model.to(device) if device else model


def load_folds(out: Path, settings: Settings) -> tuple[list[Fold], list[str]]:
    """The data of every fold, pictures to learn from and to test on apart; and what loading them had to say."""
    names = {"": settings.data}
    if settings.data.startswith("pascal:"):
        root, fold, lists = data.pascal_argument(settings.data.removeprefix("pascal:"))
        numbers = settings.folds or (range(4) if fold is None else (fold,))
        if is_published_pascal(settings):
            return published_folds(out, settings, root, lists, numbers), []
        names = {f"fold{fold}": f"pascal:{root}:{fold}" + f":{lists}" * (lists != "published") for fold in numbers}
    elif settings.folds:
        raise ValueError(f"{settings.data!r} has no folds; they go with data='pascal:ROOT'.")
    folds = []
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        for name, spec in names.items():
            number = int(name.removeprefix("fold") or 0)
            parts = data.split_data(spec, settings.max_images, 2 * settings.test_prompts, settings.seed)
            folds.append(Fold(name, out / name, number, *parts))
    notes = list(dict.fromkeys(str(warning.message) for warning in heard if warning.category is UserWarning))
    fewest = min(len(fold.train) for fold in folds)
    if fewest < PICTURES_PER_PROMPT * settings.prompts:
        notes.append(
            f"{fewest} pictures to learn from are few: prompts are drawn at random, and pictures serve in several."
        )
    return folds, notes


def is_published_pascal(settings: Settings) -> bool:
    """Whether the released protocol on Pascal-5i is followed; see `experiment.protocol`."""
    return settings.protocol == "published" and settings.data.startswith("pascal:")


def folds_to_test(settings: Settings, split: str = "test", max_images: int | None = None) -> list[tuple[int, Dataset]]:
    """Number and pictures of each fold to evaluate on: all that the published protocol tests on, else one."""
    if not is_published_pascal(settings):
        return [(0, data.load(settings.data, split, max_images or 2 * settings.test_prompts, settings.seed))]
    root, fold, lists = data.pascal_argument(settings.data.removeprefix("pascal:"))
    half = "trn" if split == "train" else "val"
    return [(f, data.pascal(root, f, half, splits=lists)) for f in (range(4) if fold is None else (fold,))]


def published_folds(out: Path, settings: Settings, root: str, lists: str, numbers: Sequence[int]) -> list[Fold]:
    """The folds of the released protocol: each is tested on, the first finds vectors and sets for all of them."""
    train = data.pascal(root, VECTOR_FOLDS, "trn", splits=lists)
    search = data.pascal(root, settings.search_fold, "trn", splits=lists)
    first = out / f"fold{numbers[0]}"
    return [
        Fold(
            f"fold{number}", out / f"fold{number}", number, train, data.pascal(root, number, "val", splits=lists),
            search, first if number != numbers[0] else None,
        )
        for number in numbers
    ]  # fmt: skip


def layout_for(model: InContextModel, settings: Settings) -> Layout:
    """The model's layout in the order that was asked for; that of VP's reasoning study where the data are its own."""
    own = model.layout
    if settings.data.startswith("reasoning:") and own.gap is None:
        own = replace(REASONING, canvas_size=own.canvas_size, patch_size=own.patch_size)
    return replace(own, order=settings.order)


def servable(settings: Settings, rows: Dataset) -> list[Task]:
    """The tasks that were asked for, or those of VTV's that the data have the columns for."""
    wanted = [registry.get(name) for name in settings.tasks]
    for task in wanted:
        if task.needs not in rows.column_names:
            raise ValueError(
                f"{task.name!r} needs a column {task.needs!r}, and {settings.data} has {', '.join(rows.column_names)}; "
                "leave the task out, or give other data."
            )
    return wanted or [task for task in registry.VTV if task.needs in rows.column_names]


def selects(settings: Settings, rows: Dataset) -> bool:
    """Whether there are enough pictures for prompts to be selected among candidates."""
    return len(rows) >= PICTURES_PER_PROMPT * settings.prompts


def check(
    settings: Settings, folds: Sequence[Fold], tasks: Sequence[Task], space: PatchSpace, model: InContextModel
) -> None:
    """Refuse settings that a later step would refuse."""
    if settings.candidates < settings.prompts and any(selects(settings, fold.train) for fold in folds):
        raise ValueError(
            f"candidates={settings.candidates} are fewer than the prompts={settings.prompts} to select; give more."
        )
    trial = _Trial(space, settings.prompts, model, settings.loss, tasks[0])
    algorithm, options = _algorithm(settings.search)
    if algorithm.needs_scores:
        if len(tasks) < 2:
            raise ValueError(f"search={settings.search!r} ranks by what tells tasks apart; give two tasks or more.")
        options["scores"] = torch.zeros(len(space))
    with suppress(_Enough):
        algorithm.on(trial, budget=settings.budget, seed=settings.seed, progress=False, **options)


class _Enough(Exception):
    """A trial has gone on long enough."""


class _Trial:
    """An objective that costs nothing, to try a search's settings on: every loss is 0."""

    def __init__(self, space: PatchSpace, prompts: int, model: InContextModel, loss: str | None, task: Task) -> None:
        self.space, self.model, self.evaluations = space, model, 0
        self.task, self.loss = task, find_loss(model, loss, task).name
        self.held_out, self.train = torch.arange(prompts).tensor_split([held_out_count(prompts, HELD_OUT)])
        self.group = torch.zeros(prompts, dtype=torch.long)

    def __call__(self, choices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.evaluations += len(rows)
        if self.evaluations > ENOUGH:
            raise _Enough
        return torch.zeros(len(rows), dtype=torch.float64)

    def gradient(self, gates: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        find_loss(self.model, self.loss, self.task, gradient=True)
        return self(gates, rows), torch.zeros(gates.shape, dtype=torch.float64)


def select(
    model: InContextModel, task: Task, rows: Dataset, settings: Settings, layout: Layout,
    batch_size: int | None = None,
) -> VisualPrompt:
    """Prompts that the model does well one-shot (ECCV 2024, §4.1); random ones where there are few pictures."""
    if not selects(settings, rows):
        return task.prompts(rows, settings.prompts, settings.seed, layout)
    options: dict[str, Any] = {"duplicates": "published"} if settings.protocol == "published" else {}
    if is_published_pascal(settings):
        options["drawn"] = candidates(rows, layout.examples, settings.seed, settings.candidates)
    return select_prompts(
        model, task, rows, settings.prompts, candidates=settings.candidates, seed=settings.seed, layout=layout,
        batch_size=batch_size, **options,
    )  # fmt: skip


def collect(
    model: InContextModel,
    prompts: Mapping[str, VisualPrompt],
    batch_size: int | None = None,
    resume: str | os.PathLike | None = None,
    sites: Sequence[str] = Settings.sites,
) -> TaskVectors:
    """The mean activation of every head (ECCV 2024, §4.1), or at other sites of the layers, by task."""
    return TaskVectors.collect(model, prompts, sites=sites, batch_size=batch_size, resume=resume)


def read_vectors(path: str | os.PathLike, tasks: Sequence[str] = (), sites: Sequence[str] = ()) -> TaskVectors:
    """Vectors in a file, which hold some tasks and sites.

    Raises:
        FileNotFoundError, ValueError: as `TaskVectors.load`; and naming the task or the site that is missing.
    """
    vectors = TaskVectors.load(path)
    if missing := [task for task in tasks if task not in vectors]:
        raise ValueError(f"{path} has no vector of {', '.join(map(repr, missing))}; it has {', '.join(vectors)}.")
    there = vectors.sites
    if missing := [site for site in sites if site not in there]:
        raise ValueError(
            f"{path} has vectors of {', '.join(there)} and none of {', '.join(missing)}; collect with "
            f"sites {','.join(site for site in SITES if site in {*there, *missing})}."
        )
    return vectors


def space_of(vectors: TaskVectors, granularity: str, model: InContextModel) -> PatchSpace:
    """The space of the model and layout that vectors were collected from.

    Raises:
        ValueError: when the vectors are of another model.
    """
    layout = layout_of(vectors.fingerprint)
    if differ := differences(vectors.fingerprint, geometry(model, layout)):
        raise ValueError(
            f"these vectors are of {vectors.fingerprint['model']}, and this {type(model).__name__} differs: they have "
            f"{'; '.join(differ)}. Say which model it was (--model)."
        )
    stages = list(dict.fromkeys(key.stage for key in next(iter(vectors.values())).mean))
    return PatchSpace(model, layout, granularity, stages, vectors.sites)


def score(vectors: TaskVectors, space: PatchSpace) -> torch.Tensor | None:
    """How well each unit tells the tasks apart, [unit] (ECCV 2024, §4.2); None of a single task."""
    return space.average(vectors.score()) if len(vectors) > 1 else None


def search(
    model: InContextModel,
    vectors: TaskVectors,
    tasks: Sequence[Task],
    prompts: Sequence[VisualPrompt],
    space: PatchSpace,
    settings: Settings,
    *,
    batch_size: int | None = None,
    resume: str | os.PathLike | None = None,
    **options: Any,
) -> SearchResult:
    """The units to patch so that the model does the tasks with no example (ECCV 2024, §4.3): one set for all of them.

    Args:
        prompts: Of every task, with examples; the search does not show them.
        **options: The algorithm's own.

    Returns:
        Without the seconds of its history, so that the same seed gives the same file.
    """
    algorithm, own = _algorithm(settings.search)
    result = algorithm(
        model, [vectors[task.name] for task in tasks], list(tasks), [rows.query_only() for rows in prompts], space,
        budget=settings.budget, loss=settings.loss, seed=settings.seed, batch_size=batch_size, resume=resume,
        vectors=vectors, **own | options,
    )  # fmt: skip
    return replace(result, history=tuple(moment._replace(seconds=float("nan")) for moment in result.history))


def _algorithm(name: str) -> tuple[Algorithm, dict[str, Any]]:
    """The algorithm of that name, and the options that make it so."""
    if name == "published":
        return reinforce, {"recipe": "published"}
    return ALGORITHMS[name], {}


def evaluate(
    model: InContextModel, task: Task, rows: Dataset, settings: Settings, layout: Layout,
    vectors: TaskVectors | None = None,
    patches: PatchSet | None = None,
    fold: int = 0,
    batch_size: int | None = None,
) -> Table:
    """Scores and first answers on prompts of pictures that were not searched on, of every condition; without vectors
    those that need none. Controls that are many are asked fewer prompts: see `Settings`."""
    prompts = prompts_to_test(task, rows, settings, layout)
    conditions = _conditions(vectors[task.name], patches, vectors, settings) if vectors else None
    return evaluate_conditions(model, task, prompts, conditions, fold=fold, batch_size=batch_size)


def prompts_to_test(task: Task, rows: Dataset, settings: Settings, layout: Layout) -> VisualPrompt:
    """What `evaluate` asks."""
    if is_published_pascal(settings):
        return test_prompts(task, rows, settings.test_prompts, layout, settings.seed)
    return task.prompts(rows, settings.test_prompts, settings.seed, layout)


def _conditions(
    vector: TaskVector, patches: PatchSet, vectors: TaskVectors, settings: Settings
) -> dict[str, Condition | list[Condition]]:
    """What a run compares: `comparison`, with `controls` in the place of its single ones; floor and ceiling last."""
    conditions = comparison(vector, patches, seed=settings.seed)
    bounds = {name: conditions.pop(name) for name in (CEILING, FLOOR)}
    drawn = controls(
        vector, patches, vectors, draws=settings.draws, seed=settings.seed, prompts=settings.control_prompts
    )
    return conditions | drawn | bounds


def write_prompts(path: Path, prompts: Mapping[str, VisualPrompt]) -> None:
    canvases = {name: rows.canvas.mul(SIXTEENTH).round().short().cpu() for name, rows in prompts.items()}
    write_tensors(path, "prompts", canvases, {"tasks": list(prompts)})


def read_prompts(path: Path, layout: Layout) -> dict[str, VisualPrompt]:
    canvases, metadata = read_tensors(path, "prompts")
    return {name: VisualPrompt.from_canvas(canvases[name].float() / SIXTEENTH, layout) for name in metadata["tasks"]}


def write_pictures(path: Path, table: Table, task: Task) -> None:
    """The first answers of an evaluation, which a Parquet file has no place for."""
    shown = table.pictures[task.name]
    write_tensors(path, "answers", shown, {"names": list(shown)})


def write_scores(path: Path, scores: torch.Tensor, space: PatchSpace) -> None:
    """Units and their scores [unit], the highest first, as CSV."""
    order = scores.nan_to_num(-1).argsort(descending=True).tolist()
    text = io.StringIO()
    rows = [("unit", "score"), *((space.names[i], f"{scores[i]:.6g}") for i in order)]
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def identity(settings: Settings, model: InContextModel, folds: Sequence[Fold], tasks: Sequence[Task]) -> dict[str, Any]:
    """What the numbers of a run depend on, as run.json has it: settings, weights, pictures and version."""
    return asdict(settings) | {
        "loss": find_loss(model, settings.loss, tasks[0]).name,
        "sites": validate_sites(model, settings.sites),
        "tasks": [task.name for task in tasks],
        "folds": [fold.number for fold in folds if fold.name],
        "weights": json_digest(fingerprint(model)),
        "pictures": json_digest([data.identities(fold.train) for fold in folds if not fold.shares]),
        "search pictures": json_digest([data.identities(fold.search) for fold in folds[:1] if fold.search is not None]),
        "test pictures": json_digest([data.identities(fold.test) for fold in folds]),
        "version": package_version(),
    }
