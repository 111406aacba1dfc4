"""The steps of a run, which `vtv collect` and its like call with the same defaults."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset

from vtv_nnsight import models
from vtv_nnsight import tasks as registry
from vtv_nnsight.evaluation import Condition, Table, comparison, controls, select_prompts, with_other_examples
from vtv_nnsight.evaluation import evaluate as evaluate_conditions
from vtv_nnsight.layouts import Layout
from vtv_nnsight.models.devices import resolve_device
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.parallel import processes
from vtv_nnsight.patching import PatchSet, PatchSpace
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.runs.folds import is_published_detection, is_published_pascal, selects
from vtv_nnsight.runs.protocol import candidates, detection_prompts, test_prompts
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.search import ALGORITHMS, Algorithm, SearchResult, reinforce
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import TaskVectors


@dataclass(frozen=True)
class Setup:
    """What every step is given.

    Args:
        settings: What its numbers depend on.
        model: The model of the settings, with its weights.
        batch_size: Prompts per forward; None is what suits the model and the device.
    """

    settings: Settings
    model: InContextModel
    batch_size: int | None = None

    @property
    def layout(self) -> Any:
        """The model's layout, of a canvas in the order of the settings."""
        layout: Any = self.model.layout
        return replace(layout, order=self.settings.order) if isinstance(layout, Layout) else layout


def set_up(
    settings: Settings,
    device: str | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    remote: bool | str | None = None,
) -> Setup:
    """The setup of some settings: the model is loaded, on a device, or of several processes on a device for each.

    Args:
        dtype: Precision of the weights, in place of that of the settings.
        remote: Where the model runs, if not here, as for `CausalLM`.

    Raises:
        ValueError, OSError: as `models.load_model`, or for a device that there is not.
    """
    state = processes()
    if device is None and state.num_processes > 1:
        device = str(state.device)
    place = resolve_device(device) if device else None
    options = {"vqgan": settings.vqgan, "embedding_type": settings.embedding_type, "dtype": dtype or settings.dtype}
    model: Any = models.load_model(settings.model, dispatch=not remote, remote=remote, **options)
    return Setup(settings, model.to(place) if place else model, batch_size)


def servable(settings: Settings, rows: Dataset, known: Collection[str] | None = None) -> list[Task]:
    """The tasks that were asked for, or those of VTV's and of the lists of words that the data have the columns for: of
    the `known` ones, and at most `settings.most_tasks`.

    Raises:
        ValueError: when the data cannot serve a task that was asked for, or none that is known.
    """
    columns = ", ".join(rows.column_names)
    wanted: list[Any] = [registry.get(name) for name in settings.tasks]
    for task in wanted:
        if task.needs not in rows.column_names:
            raise ValueError(f"{task.name!r} needs a column {task.needs!r}, and the data have {columns}.")
    lists = map(registry.words, registry.WORDS)
    offered: list[Any] = [*map(registry.get, known)] if known is not None else [*registry.VTV, *lists]
    serve = wanted or [task for task in offered if task.needs in rows.column_names][: settings.most_tasks]
    if not serve:
        raise ValueError(f"{settings.data} has {columns}, which serve none of {', '.join(known or ())}.")
    return serve


def select(setup: Setup, task: Task, rows: Dataset) -> VisualPrompt:
    """Prompts that the model does well one-shot (ECCV 2024, §4.1); random ones where there are few pictures."""
    settings, layout = setup.settings, setup.layout
    if not selects(settings, rows):
        return task.prompts(rows, settings.prompts, settings.seed, layout)
    options: dict[str, Any] = {"candidates": settings.candidates, "seed": settings.seed, "layout": layout}
    if settings.protocol == "published":
        options["duplicates"] = "published"
    if is_published_pascal(settings):
        options["drawn"] = candidates(rows, layout.examples, settings.seed, settings.candidates)
    return select_prompts(setup.model, task, rows, settings.prompts, batch_size=setup.batch_size, **options)


def collect(setup: Setup, prompts: Mapping[str, VisualPrompt]) -> TaskVectors:
    """The mean activation of every head (ECCV 2024, §4.1), or at other sites of the layers, by task."""
    sites = setup.settings.sites
    return TaskVectors.collect(setup.model, prompts, sites=sites, batch_size=setup.batch_size)


def search(
    setup: Setup,
    vectors: TaskVectors,
    tasks: Sequence[Task],
    prompts: Sequence[VisualPrompt],
    space: PatchSpace,
    **options: Any,
) -> SearchResult:
    """The units to patch so that the model does the tasks with no example (ECCV 2024, §4.3): one set for all of them.

    Args:
        prompts: Of every task, with examples; the search does not show them.
        **options: The algorithm's own.

    Returns:
        Without the seconds of its history, so that the same seed gives the same file.
    """
    settings = setup.settings
    algorithm, recipe = algorithm_of(settings)
    shared = {"budget": settings.budget, "loss": settings.loss, "seed": settings.seed, "batch_size": setup.batch_size}
    queries = [rows.query_only() for rows in prompts]
    result = algorithm(
        setup.model, [vectors[task.name] for task in tasks], list(tasks), queries, space, vectors=vectors,
        **shared | recipe | options,
    )  # fmt: skip
    return replace(result, history=tuple(moment._replace(seconds=float("nan")) for moment in result.history))


def algorithm_of(settings: Settings) -> tuple[Algorithm[...], dict[str, Any]]:
    """The algorithm of the settings, and the options that make it so."""
    price = {"sparsity": settings.sparsity} if settings.sparsity else {}
    if settings.search == "published":
        return reinforce, {"recipe": "published"} | price
    return ALGORITHMS[settings.search], price


def evaluate(
    setup: Setup,
    task: Task,
    rows: Dataset,
    vectors: TaskVectors | None = None,
    patches: PatchSet | None = None,
    fold: int = 0,
) -> Table:
    """Scores and first answers on prompts of pictures that were not searched on, of every condition; without vectors
    those that need none. Controls that are many are asked fewer prompts: see `Settings`."""
    prompts = prompts_to_test(setup, task, rows)
    conditions: dict[str, Condition | list[Condition]] | None = None
    if vectors is not None and patches is not None:
        settings, vector = setup.settings, vectors[task.name]
        drawn: dict[str, int] = {"draws": settings.draws, "seed": settings.seed, "prompts": settings.control_prompts}
        conditions = dict[str, Condition | list[Condition]](comparison(vector, patches, seed=settings.seed))
        conditions |= controls(vector, patches, vectors, **drawn)
        others = (other for other in registry.VTV if other.name != task.name and other.needs in rows.column_names)
        if other := next(others, None):
            wrong = prompts_to_test(setup, other, rows)  # of the same rows
            conditions |= with_other_examples(prompts, wrong, settings.control_prompts)
    return evaluate_conditions(setup.model, task, prompts, conditions, fold=fold, batch_size=setup.batch_size)


def prompts_to_test(setup: Setup, task: Task, rows: Dataset) -> VisualPrompt:
    """What `evaluate` asks."""
    settings = setup.settings
    if is_published_pascal(settings):
        return test_prompts(task, rows, settings.test_prompts, setup.layout, settings.seed)
    if is_published_detection(settings):
        return detection_prompts(task, rows, settings, setup.layout)
    return task.prompts(rows, settings.test_prompts, settings.seed, setup.layout)
