"""What a run would take, said before anything is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vtv_nnsight.models.devices import device_of
from vtv_nnsight.patching.forward import find_loss, forward, losses
from vtv_nnsight.runs import steps
from vtv_nnsight.runs.folds import load_folds, selects
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.search.remote import REMOTE_EVALUATIONS
from vtv_nnsight.search.score_function import PUBLISHED
from vtv_nnsight.text import duration

ROWS = 8
"""Prompts of the batch that is timed."""


def plan(
    settings: Settings, device: str | None = None, jobs: int | None = None, remote: bool | str | None = None
) -> Iterator[str]:
    """The steps of a run in sentences: how often each asks the model, and about how long, by the time of a batch here;
    of a model that runs elsewhere, in how many jobs. Starting and the report come on top, some seconds."""
    setup = steps.set_up(settings, device, remote=remote)
    folds, _ = load_folds(Path(), settings)
    rows = folds[0].train
    tasks = steps.servable(settings, rows)
    one, zero, evaluation = (0.0, 0.0, 0.0) if remote else _times(setup, tasks[0], rows)
    many, tested = len(tasks) * len(folds), settings.test_prompts
    few = min(settings.control_prompts, tested)
    controls = 2 * tested + (len(tasks) - 1) * few + 2 * settings.draws * -(-few // 4)
    budget = settings.budget or PUBLISHED.steps * PUBLISHED.masks
    asked = {
        "select": (settings.candidates * selects(settings, rows), "answers", one),
        "collect": (settings.prompts, "prompts", one),
        "search": (budget, "evaluations", evaluation),
        "evaluate": (2 * tested + controls, "answers", (2 * tested * one + controls * zero) / (2 * tested + controls)),
    }
    for step, (count, what, seconds) in asked.items():
        takes = "" if remote else f", {duration(count * many * seconds)} of a process"
        yield f"{step}: {count * many:,} {what}{takes}"
    if remote:
        yield f"in {1 + many * (1 + -(-budget // REMOTE_EVALUATIONS)):,} jobs there, or more"
    else:
        jobs = min(jobs or 1, len(tasks))
        total = sum(count * many * seconds for count, _, seconds in asked.values())
        yield f"in {jobs} process{'es' * (jobs > 1)}: about {duration(total / jobs)}"


@torch.no_grad()
def _times(setup: steps.Setup, task: Any, rows: Any) -> list[float]:
    """Seconds of a one-shot answer, a zero-shot answer and an evaluation, each in the second of two calls."""
    model = setup.model
    shown = task.prompts(rows, ROWS, setup.settings.seed, setup.layout).to(device_of(model))
    loss, hidden = find_loss(model, setup.settings.loss, task), shown.query_only()
    truth = (loss.truth or model.truth)(shown)
    calls: list[Callable[[], Any]] = [partial(_answer, model, shown), partial(_answer, model, hidden)]
    calls.append(partial(losses, model, hidden, loss, truth))
    seconds = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        seconds.append((time.perf_counter() - start) / ROWS)
    return seconds


def _answer(model: Any, prompts: Any) -> Any:
    return model.answers(forward(model, prompts)[0], prompts)
