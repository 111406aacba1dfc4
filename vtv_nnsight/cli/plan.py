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
from vtv_nnsight.runs.resuming import peak_memory
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.search.score_function import PUBLISHED
from vtv_nnsight.text import duration

ROWS = 8
"""Prompts of the batch that is timed."""


@torch.no_grad()
def plan(settings: Settings, device: str | None = None, jobs: int | None = None) -> Iterator[str]:
    """The steps of a run in sentences: how often each asks the model, and about how long, by the time of a batch here.
    Starting and the report come on top, some seconds."""
    setup = steps.set_up(settings, device)
    model, (folds, _) = setup.model, load_folds(Path(), settings)
    tasks, rows = steps.servable(settings, folds[0].train), folds[0].train
    jobs = min(jobs or 1, len(tasks))
    shown = tasks[0].prompts(rows, ROWS, settings.seed, setup.layout).to(device_of(model))
    loss, hidden = find_loss(model, settings.loss, tasks[0]), shown.query_only()
    truth = (loss.truth or model.truth)(shown)
    one, zero = (_seconds(partial(_ask, model, rows)) for rows in (shown, hidden))
    evaluation = _seconds(partial(losses, model, hidden, loss, truth))
    many, tested = len(tasks) * len(folds), settings.test_prompts
    few = min(settings.control_prompts, tested)
    controls = 2 * tested + (len(tasks) - 1) * few + 2 * settings.draws * -(-few // 4)
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


def _ask(model: Any, prompts: Any) -> Any:
    return model.answers(forward(model, prompts)[0], prompts)


def _seconds(call: Callable[[], Any]) -> float:
    """Of a prompt, in the second of two calls with `ROWS`."""
    call()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) / ROWS
