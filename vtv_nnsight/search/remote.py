"""The objective of a model that runs elsewhere: searches go there in jobs, each a session of nnsight's.

A job is some five hundred evaluations. That of a loop that `Search.follow` runs asks there what the loop asks here
next; that of a single question is the question. Answers are journaled as they are used, so that a job that is refused,
cut or too slow loses at most its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from vtv_nnsight.finite import check_whole
from vtv_nnsight.models.interface import ByStage
from vtv_nnsight.models.nnsight_remote import PLAIN, RemoteFailure, there, weigh
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.patching.patching import planned
from vtv_nnsight.search.loops import NO_GRADIENT, job, once, tags
from vtv_nnsight.search.objective import Objective
from vtv_nnsight.text import duration
from vtv_nnsight.vectors import Activations

REMOTE_EVALUATIONS = 500
"""Evaluations of a job, about, where a user does not say."""


class RemoteObjective(Objective):
    """An `Objective` that computes its losses where the model runs.

    Args:
        remote: As for nnsight's `trace`.
        remote_evaluations: Of a job, about.
        *args, **kwargs: As for `Objective`.

    Attributes:
        jobs: How many were done.
        waited, ran: Seconds until they were done, and of these the ones that the server says it worked.

    Raises:
        ValueError: for a loss that is not the model's own, or vectors that are activations.
    """

    layers = 0
    """Gradients can be kept out of none."""

    def __init__(self, *args: Any, remote: bool | str, remote_evaluations: int = REMOTE_EVALUATIONS, **kwargs: Any):
        self.remote = remote
        check_whole(remote_evaluations=remote_evaluations)
        if remote_evaluations < 1:
            raise ValueError(f"remote_evaluations={remote_evaluations} is no job; give 1 or more.")
        super().__init__(*args, **kwargs)
        if self.loss != self.model.losses[0].name:
            raise ValueError(f"loss={self.loss!r} is computed here, not there; use {self.model.losses[0].name!r}.")
        if any(isinstance(vector, Activations) for vector in self.vectors):
            raise ValueError("activations are of single prompts and stay here; search with a vector there.")
        for vector in self.vectors:
            planned(self.model, vector, PatchSet.random(self.space, len(self.space)), self.prompts.layout)
        model: Any = self.model
        prompts: Any = self.prompts
        self.most, self.jobs, self.waited, self.ran = remote_evaluations, 0, 0.0, 0.0
        width = len(self.space)
        numbers = self.space.mask(torch.arange(1, width + 1))
        self.data = {
            "texts": model.tokens(prompts.texts),
            "answers": model.tokens(prompts.texts, prompts.answers),
            "truth": self._truth,
            "group": self.group,
            "kinds": self._kinds,
            "size": self.batch_size,
            "values": [PLAIN[ByStage](vector.values) for vector in self.vectors],
            "units": PLAIN[ByStage](numbers.map(lambda at: torch.where(at > 0, at - 1, width))),
            "keeps": "logits_to_keep" in model.scored(1),
        }
        self.ahead()

    @property
    def stride(self) -> int:
        """Rows worth asking for at once."""
        return self.most

    @property
    def progress(self) -> str:
        """For the bar."""
        return f"job {self.jobs}, {duration(self.waited)} of which {duration(self.ran)} at work"

    def weigh(self) -> int:
        """The bytes of a job of a single question."""
        rows = self.train[torch.arange(self.most) % len(self.train)]
        choices = torch.ones(self.most, len(self.space)) > 0
        settings = {"choices": choices, "rows": rows[:, None]}
        return weigh(self.model, job, once, settings, torch.zeros(0, 1), self.most, self.data)

    def ahead(self, loop: Any = None, settings: Any = None, heard: Any = ()) -> None:
        """What is asked from now on are the questions of a loop, of which `heard` has the answers; or single ones."""
        self._loop, self._heard, self._queue = (loop, settings), heard, torch.zeros(0)

    def among(self, sets: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Losses [row] of sets [row, unit] on prompts [row]."""
        return lambda choices, rows: self._values(choices, rows)[:, 0]

    def gradient(self, gates: torch.Tensor, rows: torch.Tensor, drop: int | None = None) -> Any:
        """Losses [row] and gradients [row, unit]."""
        values = self._values(gates, rows)
        return values[:, 0], values[:, 1:]

    def _values(self, choices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.evaluations += len(rows)
        if not len(self._queue):
            loop, settings = self._loop
            known = torch.cat(list(self._heard)) if self._heard else torch.zeros(0, 1)
            if loop is None:
                loop, settings, known = once, {"choices": choices, "rows": rows[:, None]}, known[:0]
            start = time.perf_counter()
            try:
                self._queue = there(self.model, self.remote, job, loop, settings, known, self.most, self.data)
            except RemoteFailure as failure:
                if NO_GRADIENT in str(failure):
                    raise ValueError(
                        f"on this server {NO_GRADIENT}; search there with reinforce, which needs none."
                    ) from failure
                raise
            self.jobs += 1
            self.waited += time.perf_counter() - start
            self.ran += getattr(self.model, "cost", {}).get("runtime") or 0.0
        answers, self._queue = self._queue[: len(rows)], self._queue[len(rows) :]
        if self._loop[0] is not None and not torch.equal(answers[:, -1], tags(choices, rows)):
            raise RuntimeError("the server drew other sets than this machine; take the release of torch that it has.")
        return answers[:, :-1]
