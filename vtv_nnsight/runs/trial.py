"""Settings that a later step would refuse are refused before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.patching.forward import find_loss
from vtv_nnsight.runs.folds import Fold, selects
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.runs.steps import algorithm_of
from vtv_nnsight.search.holdout import held_out_count
from vtv_nnsight.tasks import Task

HELD_OUT = 0.25
"""Of the prompts, the share that searches hold out."""


ENOUGH = 10_000
"""Evaluations after which the trial of a search's settings ends."""


def check(
    settings: Settings, folds: Sequence[Fold], tasks: Sequence[Task], space: PatchSpace, model: InContextModel
) -> None:
    """Refuse settings that a later step would refuse."""
    tasks[0].check_model(model)
    if settings.candidates < settings.prompts and any(selects(settings, fold.train) for fold in folds):
        raise ValueError(f"candidates={settings.candidates} are fewer than the prompts={settings.prompts}; give more.")
    trial: Any = _Trial(space, settings.prompts, model, settings.loss, tasks[0])
    algorithm, options = algorithm_of(settings)
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
