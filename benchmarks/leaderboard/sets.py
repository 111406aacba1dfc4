"""The sets that are compared, what they are measured with, and what is told of a set without a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from common import file_name
from datasets import Dataset

from vtv_nnsight import data, search, tasks
from vtv_nnsight.cli.options import read_vectors
from vtv_nnsight.evaluation.conditions import BASELINE, ZERO_SHOT
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import HEADS, InContextModel
from vtv_nnsight.patching import PatchSet, PatchSpace
from vtv_nnsight.progress import progress_bar, quiet
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.runs import steps
from vtv_nnsight.runs.resuming import check_files
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.search.budget import prefixes, sizes
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import TaskVectors
from vtv_nnsight.vectors.compatibility import check_compatible, fingerprint, layout_of

OF_RUN = ("model", "vqgan", "embedding_type", "dtype", "data", "max_images", "test_prompts", "seed")
"""What sets are measured with as their run was."""
DRAW_PROMPTS = 24
"""Prompts per task on which each draw of random units is measured."""
UNSEEN = "unseen scenes"
EVERYTHING = "everything patched"
REFERENCES = (BASELINE, ZERO_SHOT, EVERYTHING)

Units = search.SearchResult | PatchSet
"""A set of units: by itself, or with the search that gave it."""
Measured = dict[Any, dict[str, Any]]
Sets = dict[str, dict[str, list[Units]]]
"""Name → task → the sets, one for each seed."""


class Bench(NamedTuple):
    """What sets are measured with; prompts are one-shot, by task."""

    model: InContextModel
    vectors: TaskVectors
    here: dict[str, VisualPrompt]
    elsewhere: dict[str, VisualPrompt]
    seed: int
    batch_size: int | None


@dataclass(frozen=True)
class Leaderboard:
    """What sets are measured on.

    Args:
        algorithms: Searches to run now, of `search.ALGORITHMS`.
        model, vqgan, embedding_type, dtype: As for `Settings`.
        data: As for `vtv run`; searched on and measured on apart.
        max_images: The most pictures to draw prompts to collect and search on from.
        transfer_data: Other data to measure on; None is `UNSEEN`, scenes of other classes, beside scenes.
        tasks: Names.
        vectors: A file of `vtv collect`; None collects them now.
        budget: Evaluations that a search may spend.
        seeds: Searches of each algorithm per task.
        prompts: Prompts per task to collect and to search on.
        test_prompts: Prompts per task to measure on.
        batch_size: Prompts per forward; by default as evaluate and the searches have it.
        seed: Of all that is random.
        device: Where the model runs.
        resume: A folder that keeps every search's journal.

    Raises:
        ValueError: naming the option that makes no sense.
    """

    algorithms: tuple[str, ...] = ()
    model: str = "tiny"
    vqgan: str | None = None
    embedding_type: str | None = None
    dtype: str | None = None
    data: str = "scenes"
    max_images: int = 500
    transfer_data: str | None = None
    tasks: tuple[str, ...] = tuple(task.name for task in tasks.VTV)
    vectors: Path | None = None
    budget: int = 4000
    seeds: int = 3
    prompts: int = 100
    test_prompts: int = 96
    batch_size: int | None = None
    seed: int = 0
    device: str | None = None
    resume: Path | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "seeds", "prompts", "test_prompts", "batch_size", "max_images"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} leaves nothing to do; give 1 or more.")
        if unknown := [name for name in self.algorithms if name not in search.ALGORITHMS]:
            raise ValueError(f"{unknown[0]!r} is not an algorithm; choose from {', '.join(search.ALGORITHMS)}.")
        self.by_name  # noqa: B018  which refuses what is no task

    @property
    def by_name(self) -> dict[str, Task]:
        """The tasks, by name."""
        return {task.name: task for task in map(tasks.get, self.tasks)}


def read(files: Sequence[str], by_name: Mapping[str, Task], taken: Sequence[str] = REFERENCES) -> Sets:
    """The sets in files, by name and task. One is called as its file, or its folder if the file is called as a task."""
    sets: Sets = {}
    for text in files:
        owner, path = owner_of(text)
        if owner and owner not in by_name:
            raise ValueError(f"{path} is of {owner!r} and --tasks is {','.join(by_name)}; add it, or omit the file.")
        name = str(path.parent) if path.stem == owner else path.stem
        if name in taken:
            raise ValueError(f"{path} would be called {name!r}, as another row is; rename it.")
        content = search.SearchResult.load(path) if path.suffix == ".safetensors" else PatchSet.load(path)
        for task in [owner] if owner else by_name:
            if task in sets.setdefault(name, {}):
                raise ValueError(f"{path} is a second set of {task!r} that is called {name!r}; rename it.")
            sets[name][task] = [content]
    return sets


def owner_of(text: str) -> tuple[str | None, Path]:
    """The task and the file of [TASK=]FILE; None where neither names a task."""
    owner, _, file = text.rpartition("=")
    path = Path(file if is_task(owner) else text)
    return next(filter(is_task, (owner, path.stem)), None), path


def settings_of_runs(files: Sequence[str]) -> list[dict[str, Any]]:
    """What the runs of sets in files were made with, each once: `OF_RUN`, their vectors, and {} for no run.

    Raises:
        ValueError, FileNotFoundError: when a file is not as its run wrote it.
    """
    runs: list[dict[str, Any]] = []
    for _, path in map(owner_of, files):
        record, _ = check_files(path.parent, path.name, recorded=False)
        known = {name: record["settings"][name] for name in OF_RUN} if "settings" in record else {}
        if known:
            known["tasks"] = ",".join(record["settings"]["tasks"])
        vectors = path.absolute().parent.parent / "vectors.safetensors"
        if known and vectors.is_file():
            known["vectors"] = vectors
        if known.get("data", "").startswith("pascal:") and vectors.parent.name.startswith("fold"):
            root, _, published = data.pascal_argument(known["data"].removeprefix("pascal:"))
            fold = vectors.parent.name.removeprefix("fold")
            known["data"] = f"pascal:{root}:{fold}" + ":masks" * (not published)
        if known not in runs:
            runs.append(known)
    return runs


def heading(options: Leaderboard, runs: Sequence[Mapping[str, Any]]) -> str:
    """What sets are measured on, and a warning where it is not known to be that of their run."""
    text = f"{options.model}, {options.data}, {options.test_prompts} prompts a task, seed {options.seed}"
    differ = [name for run in runs for name in OF_RUN if run and run[name] != getattr(options, name)]
    if not runs or runs == [{}]:
        return text + (". warning: no run.json says what these sets were found on." if runs else "")
    if differ or {} in runs:
        other = ", ".join(dict.fromkeys(differ)) or "their data"
        return f"{text}. warning: sets of another run are here, which differs or is not known in {other}."
    return f"{text}, as their run"


def is_task(name: str) -> bool:
    """Whether a name is a task's."""
    try:
        tasks.get(name)
    except ValueError:
        return False
    return True


def patches(units: Units) -> PatchSet:
    """The set alone."""
    return units if isinstance(units, PatchSet) else units.patches


def prepare(options: Leaderboard, sets: Sets) -> tuple[Bench, Dataset]:
    """What sets are measured with, and the pictures to search on."""
    with quiet():
        settings = Settings(model=options.model, vqgan=options.vqgan, embedding_type=options.embedding_type)
        model: Any = steps.set_up(settings, options.device, dtype=options.dtype).model
    if not model.losses:
        raise ValueError(f"sets are compared by the model's own loss, and {options.model} has none; give it `losses`.")
    sites = {site for by_task in sets.values() for (units,) in by_task.values() for site in patches(units).space.sites}
    vectors = read_vectors(options.vectors, options.tasks, sorted(sites)) if options.vectors else None
    owners: dict[str, Any] = {
        f"the set {name!r}": patches(units) for name, by_task in sets.items() for (units,) in by_task.values()
    }
    owners |= {str(options.vectors): next(iter(vectors.values()))} if vectors else {}
    known = next((owner.fingerprint for owner in owners.values()), {})
    layout = layout_of(known) if known else model.layout
    for name, owner in owners.items():
        expected = f"{options.model} and {next(iter(owners))}"
        check_compatible(name, owner.fingerprint, expected, fingerprint(model, layout))

    train, test = data.split_data(options.data, options.max_images, 2 * options.test_prompts, options.seed)
    for task in options.by_name.values():
        if task.needs not in train.column_names:
            raise ValueError(f"{task.name!r} needs a column {task.needs!r} and {options.data} has none; omit the task.")

    def ask(rows: Dataset, which: Mapping[str, Task], n: int) -> dict[str, VisualPrompt]:
        able = {name: task for name, task in which.items() if task.needs in rows.column_names}
        return {name: task.prompts(rows, n, options.seed, layout) for name, task in able.items()}

    if vectors is None:
        several = options.by_name | {task.name: task for task in tasks.VTV}
        prompts = ask(train, several, options.prompts)
        vectors = TaskVectors.collect(model, prompts, sites=sorted(sites | {HEADS}), batch_size=options.batch_size)
    if len(vectors) < 2:
        raise ValueError(f"there is a vector of {', '.join(vectors)} only; the mean over tasks needs two or more.")
    spec = options.transfer_data or (UNSEEN if options.data == "scenes" else None)
    if spec == UNSEEN:
        other = data.scenes("test", 2 * options.test_prompts, options.seed, folds=(3,))
    else:
        other = data.load(spec, "test", 2 * options.test_prompts, options.seed) if spec else None
    here = ask(test, options.by_name, options.test_prompts)
    elsewhere = ask(other, options.by_name, options.test_prompts) if other else {}
    device = device_of(model)
    return Bench(model, vectors.to(device), here, elsewhere, options.seed, options.batch_size), train


def run_searches(options: Leaderboard, bench: Bench, train: Dataset) -> Sets:
    """What every algorithm finds for every task, one result for each seed."""
    layout = next(iter(bench.here.values())).layout
    space, seeds = PatchSpace(bench.model, layout), range(options.seed + 1, options.seed + 1 + options.seeds)
    sets: Sets = {name: {task: [] for task in options.by_name} for name in options.algorithms}
    plan = [(task, seed, name) for task in options.by_name.values() for seed in seeds for name in options.algorithms]
    with progress_bar(plan, desc="searching", unit="search", disable=not plan) as bar:
        for task, seed, name in bar:
            bar.set_postfix_str(f"{name}, {task.name}")
            prompts = task.prompts(train, options.prompts, seed, layout)
            setup = steps.Setup(
                Settings(search=name, budget=options.budget, seed=seed), bench.model, options.batch_size
            )
            file = journal(options, task, name, seed)
            result = steps.search(setup, bench.vectors, [task], [prompts], space, resume=file, progress=False)
            sets[name][task.name].append(result)
    return sets


def journal(options: Leaderboard, task: Task, algorithm: str, seed: int) -> Path | None:
    """Where a search keeps what it learns, if anywhere."""
    if options.resume is None:
        return None
    options.resume.mkdir(parents=True, exist_ok=True)
    return options.resume / f"{file_name(task.name, algorithm, options.budget, seed)}.jsonl"


def prunings(whole: PatchSet, seed: int = 0, share: float = 0.1) -> Iterator[PatchSet]:
    """The set without each tenth of its units in turn, drawn at random; the last takes some again to be as large."""
    members = whole.choices.nonzero()[:, 0]
    members = members[torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))]
    size = math.ceil(share * len(members))
    for start in range(0, len(members), max(size, 1)):
        kept = whole.choices.clone()
        kept[members.roll(-start)[:size]] = False
        yield PatchSet(whole.space, kept)


def stability(sets: Sequence[PatchSet]) -> dict[str, float] | None:
    """Mean Jaccard similarity of pairs of sets, and about that of random sets of their sizes."""
    pairs = list(combinations(sets, 2))
    if not pairs:
        return None

    def by_chance(a: PatchSet, b: PatchSet) -> float:
        shared = len(a) * len(b) / len(a.space)
        return shared / (len(a) + len(b) - shared) if len(a) + len(b) else 1.0

    return {"mean": mean(a.jaccard(b) for a, b in pairs), "by_chance": mean(by_chance(a, b) for a, b in pairs)}


def best_scored(result: Units, count: int = 8) -> dict[int, PatchSet]:
    """The k units of a search that it scores best, for several k; chosen units first among equals."""
    if isinstance(result, PatchSet):
        return {}
    choices, space = result.patches.choices, result.patches.space
    order = (~choices).int().argsort(stable=True)
    scores = result.scores.nan_to_num(nan=-torch.inf)[order]
    lengths = sizes(1, len(space), count)
    best = prefixes(order[scores.argsort(descending=True, stable=True)], len(space), lengths)
    return {k: PatchSet(space, choices) for k, choices in zip(lengths, best)}
