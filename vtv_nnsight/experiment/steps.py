"""The paper from end to end, in a folder: *Finding Visual Task Vectors* (ECCV 2024), §4 and §5.

    >>> run("runs/scenes", Settings(budget=20_000))          # or `vtv run --budget 20000`

The folder, and what is written in it:

    run.json                     settings, seeds, versions, the machine, seconds a step, and what there is to be told
    prompts.safetensors          prompts that the model does well one-shot, of every task
    vectors.safetensors          the task vectors of these prompts (`TaskVectors`)
    scores.csv                   how well each unit tells the tasks apart
    search/TASK.safetensors      the units to patch (`SearchResult`)
    evaluation/TASK.parquet      scores of all conditions, image by image; the first answers beside them
    report.html, table.csv, …    see `vtv_nnsight.report`

Data in folds, such as Pascal-5i, have a folder for each fold. A step whose file is there is not done again, a search or
a collection that was interrupted goes on, and a folder that was made with other settings is refused.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from vtv_nnsight import search
from vtv_nnsight import tasks as registry
from vtv_nnsight.data import load
from vtv_nnsight.evaluation import comparison, evaluate, select_prompts
from vtv_nnsight.experiment.settings import Settings
from vtv_nnsight.files import package_version, read_tensors, write_tensors, write_text
from vtv_nnsight.layouts import Layout
from vtv_nnsight.models.mae_vqgan.tracing import MAEVQGAN
from vtv_nnsight.patches import PatchSpace
from vtv_nnsight.progress import display, quiet
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.report import page as report
from vtv_nnsight.search import ALGORITHMS, SearchResult
from vtv_nnsight.stages import fingerprint
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import TaskVectors

STEPS = {
    "select": ("model", "vqgan", "weights", "data", "folds", "pictures", "tasks", "order", "images", "prompts")
    + ("candidates", "seed", "version"),
    "collect": (),
    "score": ("granularity",),
    "search": ("search", "loss", "budget"),
    "evaluate": ("evaluations", "test pictures"),
}
"""Step → the settings that matter from there on."""

FILES = {
    "select": ("prompts.safetensors",),
    "collect": ("vectors.safetensors", "vectors.state"),
    "score": ("scores.csv",),
    "search": ("search/*",),
    "evaluate": ("evaluation/*",),
}
"""Step → what it writes."""

PER_PROMPT = 4
"""Pictures a prompt, at least, for prompts to be picked: each serves in one only."""

SIXTEENTH = 255 * 128
"""Prompts are kept as 16-bit numbers: pixels of 8 bits, and those darkened to a half, are kept exactly."""


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
        redo: When the settings are not those that the folder was begun with, do again what depends on them.
        device: Where the model runs.
        batch_size: Rows a trace; 32 by default, and as many as the device likes for searches.
        progress: Show which step is being done.

    Returns:
        The report.

    Raises:
        ValueError: when the folder was begun with other settings, naming them and the steps that depend on them; or
            when the data cannot serve a task.
    """
    out, settings = Path(out), settings or Settings()
    with quiet():
        model = MAEVQGAN(settings.model, **({"vqgan": settings.vqgan} if settings.vqgan else {}), dispatch=True)
        model = model.to(device) if device else model
        parts, notes = sources(out, settings)
        tasks = servable(settings, parts[0].train)
        layout = replace(model.layout, order=settings.order)
        space = PatchSpace(model, layout, settings.granularity)
        diary = Diary(out, settings, model, parts, tasks, notes, redo)
        with display(len(STEPS) * len(parts) + 1, progress) as step:
            for part in parts:
                at = partial(diary.timed, step, part)
                with at("select") as doing:
                    prompts = select(part, model, tasks, layout, settings, batch_size or 32, doing)
                with at("collect") as doing:
                    vectors = collect(part, model, prompts, batch_size or 32, doing)
                with at("score") as doing:
                    scores = score(part, vectors, space, doing)
                with at("search") as doing:
                    found = seek(part, model, vectors, tasks, prompts, space, scores, settings, batch_size, doing)
                with at("evaluate") as doing:
                    judge(part, model, vectors, tasks, found, layout, settings, batch_size or 32, doing)
            with diary.timed(step, None, "report") as doing:
                doing("")
                path = report.write(out)
    return path


class Part(NamedTuple):
    """All of the data, or a fold."""

    name: str
    folder: Path
    fold: int
    train: Dataset
    test: Dataset


def sources(out: Path, settings: Settings) -> tuple[list[Part], list[str]]:
    """The data of every fold, training and test apart; and what loading them had to say."""
    names = {"": settings.data}
    if settings.data.startswith("pascal:"):
        root = Path(settings.data.removeprefix("pascal:"))
        root = root.parent if root.name == "VOCdevkit" else root
        names = {f"fold{fold}": f"pascal:{root}:{fold}" for fold in settings.folds or range(4)}
    elif settings.folds:
        raise ValueError(f"{settings.data!r} has no folds; they go with data='pascal:ROOT'.")
    parts = []
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        for number, (name, spec) in enumerate(names.items()):
            fold = int(name.removeprefix("fold")) if name else number
            parts.append(Part(name, out / name, fold, *halves(spec, settings)))
    notes = [str(warning.message) for warning in heard if warning.category is UserWarning]
    fewest = min(len(part.train) for part in parts)
    if fewest < PER_PROMPT * settings.prompts:
        notes.append(
            f"{fewest} pictures to learn from are few: prompts are drawn at random, and pictures serve in several."
        )
    return parts, notes


def halves(spec: str, settings: Settings) -> tuple[Dataset, Dataset]:
    """Training and test rows: the source's own, or a quarter set aside where it has none."""
    train = load(spec, "train", settings.images, settings.seed)
    test = train if Path(spec).expanduser().is_dir() else load(spec, "test", 2 * settings.evaluations, settings.seed)
    if digest(train) != digest(test):
        return train, test
    if len(train) < 4:
        raise ValueError(f"{spec} holds {len(train)} pictures; a run needs 4 or more, some of them to be tested on.")
    halves = train.train_test_split(test_size=max(2, len(train) // 4), seed=settings.seed)
    return halves["train"], halves["test"]


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


def select(
    part: Part, model: Any, tasks: list[Task], layout: Layout, settings: Settings, batch_size: int, doing: Callable
) -> dict[str, VisualPrompt]:
    """Prompts that the model does well one-shot, by task."""
    path = part.folder / "prompts.safetensors"
    if not path.exists():
        canvases = {}
        for task in tasks:
            doing(task.name)
            if len(part.train) < PER_PROMPT * settings.prompts:
                prompts = task.prompts(part.train, settings.prompts, settings.seed, layout)
            else:
                prompts = select_prompts(
                    model, task, part.train, settings.prompts, candidates=settings.candidates, seed=settings.seed,
                    layout=layout, batch_size=batch_size,
                )  # fmt: skip
            canvases[task.name] = prompts.canvas.mul(SIXTEENTH).round().short().cpu()
        write_tensors(path, "prompts", canvases, {"tasks": [task.name for task in tasks]})
    canvases, facts = read_tensors(path, "prompts")
    return {name: VisualPrompt.from_canvas(canvases[name].float() / SIXTEENTH, layout) for name in facts["tasks"]}


def collect(
    part: Part, model: Any, prompts: dict[str, VisualPrompt], batch_size: int, doing: Callable
) -> TaskVectors:
    """The mean activation of every head, by task."""
    path, state = (part.folder / f"vectors.{kind}" for kind in ("safetensors", "state"))
    if not path.exists():
        doing("")
        TaskVectors.collect(model, prompts, batch_size=batch_size, resume=state).save(path)
        state.unlink()
    return TaskVectors.load(path)


def score(part: Part, vectors: TaskVectors, space: PatchSpace, doing: Callable) -> torch.Tensor | None:
    """How well each unit tells the tasks apart, [unit]; None of a single task."""
    if len(vectors) < 2:
        return None
    scores, path = space.average(vectors.score()), part.folder / "scores.csv"
    if not path.exists():
        doing("")
        order = scores.nan_to_num(-1).argsort(descending=True).tolist()
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [("unit", "score"), *((space.names[i], f"{scores[i]:.6g}") for i in order)]
        )
        write_text(path, text.getvalue())
    return scores


def seek(
    part: Part, model: Any, vectors: TaskVectors, tasks: list[Task], prompts: dict[str, VisualPrompt],
    space: PatchSpace, scores: torch.Tensor | None, settings: Settings, batch_size: int | None, doing: Callable,
) -> dict[str, SearchResult]:  # fmt: skip
    """The units to patch, by task."""
    algorithm = _algorithm(settings.search, scores)
    found = {}
    for task in tasks:
        path, journal = (part.folder / "search" / f"{task.name}.{kind}" for kind in ("safetensors", "journal"))
        if not path.exists():
            doing(task.name)
            path.parent.mkdir(exist_ok=True)
            queries = prompts[task.name].query_only()
            algorithm(
                model, vectors[task.name], task, queries, space, budget=settings.budget, loss=settings.loss,
                seed=settings.seed, batch_size=batch_size, resume=journal,
            ).save(path)  # fmt: skip
            journal.unlink()
        found[task.name] = SearchResult.load(path)
    return found


def _algorithm(name: str, scores: torch.Tensor | None) -> Callable[..., SearchResult]:
    if name == "published":
        return partial(search.reinforce, recipe="published")
    if name == "ranking":
        if scores is None:
            raise ValueError("search='ranking' ranks by a score that compares tasks; give two tasks or more.")
        return partial(search.ranking, scores=scores)
    return ALGORITHMS[name]


def judge(
    part: Part, model: Any, vectors: TaskVectors, tasks: list[Task], found: dict[str, SearchResult], layout: Layout,
    settings: Settings, batch_size: int, doing: Callable,
) -> None:  # fmt: skip
    """Scores and first answers of all conditions, on pictures that were not searched on."""
    for task in tasks:
        path = part.folder / "evaluation" / f"{task.name}.parquet"
        if path.exists():
            continue
        doing(task.name)
        path.parent.mkdir(exist_ok=True)
        prompts = task.prompts(part.test, settings.evaluations, settings.seed, layout)
        conditions = comparison(vectors[task.name], found[task.name].patches, vectors, settings.seed)
        table = evaluate(model, task, prompts, conditions, fold=part.fold, batch_size=batch_size)
        report.write_pictures(path.with_suffix(".safetensors"), table, task)
        table.parquet(path)


class Diary:
    """run.json: it knows what a folder was begun with, refuses what differs, and writes down how long steps take.

    Args:
        redo: Remove what differing settings have spoilt, instead of refusing.
    """

    def __init__(
        self, out: Path, settings: Settings, model: Any, parts: list[Part], tasks: list[Task], notes: list[str],
        redo: bool,
    ) -> None:  # fmt: skip
        self.path, self.out = out / "run.json", out
        facts = asdict(settings) | {
            "tasks": [task.name for task in tasks],
            "folds": [part.fold for part in parts if part.name],
            "weights": _short(fingerprint(model)),
            "pictures": _short([digest(part.train) for part in parts]),
            "test pictures": _short([digest(part.test) for part in parts]),
            "version": package_version(),
        }
        facts = json.loads(json.dumps(facts))
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        seconds = found.get("seconds", {})
        if found:
            for step in self._spoilt(found["settings"], facts, redo):
                seconds.pop(step, None)
                for part in parts:
                    for file in (file for pattern in FILES[step] for file in part.folder.glob(pattern)):
                        file.unlink()
        elif out.is_dir() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty and holds no run; name a new folder.")
        for part in parts:
            part.folder.mkdir(parents=True, exist_ok=True)
        packages = ("torch", "nnsight", "transformers", "datasets", "numpy")
        self.facts = {
            "kind": "vtv run",
            "settings": facts,
            "notes": notes,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
            "machine": {
                "processors": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "device": _device_name(model._module.device),
            },
            "seconds": seconds,
        }
        self._write()

    def _spoilt(self, found: dict[str, Any], facts: dict[str, Any], redo: bool) -> list[str]:
        """The steps that depend on settings that differ from those found."""
        differ = [name for name in facts if found.get(name) != facts[name]]
        first = next((i for i, names in enumerate(STEPS.values()) if set(names) & set(differ)), None)
        if first is None:
            return []
        steps = list(STEPS)[first:]
        if not redo:
            changes = ", ".join(f"{name} was {_word(found.get(name))} and is {_word(facts[name])}" for name in differ)
            raise ValueError(
                f"{self.out} was begun with other settings: {changes}. Name another folder, or do {', '.join(steps)} "
                "again there with redo (--redo)."
            )
        return steps

    @contextmanager
    def timed(self, step: Callable, part: Part | None, name: str) -> Iterator[Callable]:
        """A step of the display, whose seconds are added to those of earlier attempts."""
        began, worked = time.perf_counter(), []

        with step(f"{name} {part.name}".strip() if part else name) as doing:

            def noted(what: str) -> None:
                worked.append(what)
                doing(what)

            try:
                yield noted
            finally:
                if worked:
                    spent = time.perf_counter() - began
                    self.facts["seconds"][name] = round(self.facts["seconds"].get(name, 0) + spent, 2)
                    self._write()

    def _write(self) -> None:
        self.facts["peak memory (MiB)"] = _peak_memory()
        write_text(self.path, json.dumps(self.facts, indent=1) + "\n")


def digest(rows: Dataset) -> str:
    """A name for what rows hold; of pictures that lie in files, for the files' names, sizes and times."""
    hasher = hashlib.blake2b(digest_size=8)

    def take(value: Any) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                take(inner)
        elif isinstance(value, bytes):
            hasher.update(value)
        elif isinstance(value, str) and os.path.isfile(value):
            status = os.stat(value)
            hasher.update(f"{os.path.basename(value)} {status.st_size} {status.st_mtime_ns}".encode())
        else:
            hasher.update(repr(value).encode())

    for row in rows.with_format("arrow")[:].to_pylist():
        take(row)
    return hasher.hexdigest()


def _short(facts: Any) -> str:
    """A name for facts."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _word(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _peak_memory() -> int | None:
    """Of this process, in MiB, where the system tells."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)
