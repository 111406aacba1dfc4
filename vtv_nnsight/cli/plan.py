"""What a run would take, said before anything is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vtv_nnsight.evaluation.elsewhere import question
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.inside_trace import answer, collect_moments
from vtv_nnsight.models.interface import ByStage
from vtv_nnsight.models.nnsight_remote import weigh
from vtv_nnsight.patching import PatchSet, PatchSpace
from vtv_nnsight.patching.forward import find_loss, forward, losses
from vtv_nnsight.patching.patching import planned
from vtv_nnsight.runs import steps
from vtv_nnsight.runs.folds import load_folds, selects
from vtv_nnsight.runs.resuming import peak_memory
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.search.remote import RemoteObjective
from vtv_nnsight.search.score_function import PUBLISHED
from vtv_nnsight.text import duration
from vtv_nnsight.vectors import TaskVector
from vtv_nnsight.vectors.compatibility import geometry

ROWS = 8
"""Prompts of the batch that is timed."""


@torch.no_grad()
def plan(
    settings: Settings, device: str | None = None, jobs: int | None = None, remote: bool | str | None = None
) -> Iterator[str]:
    """The steps of a run in sentences: how often each asks the model, and about how long, by the time of a batch here;
    of a model that runs elsewhere, in how many jobs, and the bytes there and back. Starting and the report come on top,
    some seconds."""
    setup = steps.set_up(settings, device, remote=remote)
    model, (folds, _) = setup.model, load_folds(Path(), settings)
    tasks, rows = steps.servable(settings, folds[0].train), folds[0].train
    jobs = min(jobs or 1, len(tasks))
    if remote:
        yield from _jobs(settings, setup, tasks, rows)
        return
    shown = tasks[0].prompts(rows, ROWS, settings.seed, setup.layout).to(device_of(model))
    loss, hidden = find_loss(model, settings.loss, tasks[0]), shown.query_only()
    truth = (loss.truth or model.truth)(shown)
    one, zero = (_seconds(partial(_ask, model, rows)) for rows in (shown, hidden))
    evaluation = _seconds(partial(losses, model, hidden, loss, truth))
    many, tested, controls = len(tasks) * len(folds), settings.test_prompts, _controls(settings, len(tasks))
    asked = {
        "select": (settings.candidates * selects(settings, rows), "answers", one),
        "collect": (settings.prompts, "prompts", one),
        "search": (settings.budget or PUBLISHED.steps * PUBLISHED.masks, "evaluations", evaluation),
        "evaluate": (2 * tested + controls, "answers", (2 * tested * one + controls * zero) / (2 * tested + controls)),
    }
    for step, (count, what, seconds) in asked.items():
        yield f"{step}: {count * many:,} {what}, {duration(count * many * seconds)} of a process"
    total = sum(count * many * seconds for count, _, seconds in asked.values())
    yield f"in {jobs} process{'es' * (jobs > 1)}: about {duration(total / jobs)}; {peak_memory() or '?'} MiB or more"


def _controls(settings: Settings, tasks: int) -> int:
    """Answers of a task's conditions beside those with an example and without."""
    few = min(settings.control_prompts, settings.test_prompts)
    return 2 * settings.test_prompts + (tasks - 1) * few + 2 * settings.draws * -(-few // 4)


def _jobs(settings: Settings, setup: steps.Setup, tasks: Any, rows: Any) -> Iterator[str]:
    """The same of a model that runs elsewhere, with vectors of chance."""
    model: Any = setup.model
    prompts = tasks[0].prompts(rows, settings.prompts, settings.seed, setup.layout)
    stages = [model.stages[0].at(site) for site in settings.sites]
    shapes = [(s.layers, prompts.layout.num_positions, s.heads, s.head_dim) for s in stages]
    vector = TaskVector(
        "?", ByStage({s.key: torch.randn(shape) for s, shape in zip(stages, shapes)}), None, 1, geometry(model)
    )
    space = PatchSpace(model, prompts.layout, settings.granularity, sites=settings.sites)
    budget, tested = settings.budget or PUBLISHED.steps * PUBLISHED.masks, settings.test_prompts
    objective = RemoteObjective(model, vector, tasks[0], prompts.query_only(), space, remote=True)
    means = sum(8 * layers * places * heads * (dim + 1) for layers, places, heads, dim in shapes)
    texts = weigh(model, collect_moments, {"?": [model.seen(prompts)]}, list(settings.sites), 1)
    answers, parts = 2 * tested + _controls(settings, len(tasks)), -(-budget // objective.most)
    writes, many = planned(model, vector, PatchSet.random(space, 1), None), len(tasks)
    asks = weigh(model, answer, [question(model, prompts, writes, tasks[0])]) * -(-answers // settings.prompts)
    row = model.network.config.get_text_config().vocab_size * next(model.parameters()).element_size()
    search = objective.weigh() * parts, 16 * budget
    steps_of = {
        f"collect: 1 job, {settings.prompts * many:,} prompts": (texts, means),
        f"search: {parts * many:,} jobs or more, {budget * many:,} evaluations": search,
        f"evaluate: {many:,} jobs, {answers * many:,} answers": (asks, row * answers),
    }
    for step, (there, back) in steps_of.items():
        yield f"{step}; {_size(there * many)} there, {_size(back * many)} back"


def _size(count: int) -> str:
    return f"about {count / 1000:,.0f} kB" if count < 10**7 else f"about {count / 10**6:,.0f} MB"


def _ask(model: Any, prompts: Any) -> Any:
    return model.answers(forward(model, prompts)[0], prompts)


def _seconds(call: Callable[[], Any]) -> float:
    """Of a prompt, in the second of two calls with `ROWS`."""
    call()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) / ROWS
