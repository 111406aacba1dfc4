"""The algorithms, each declared once, where it is written."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec

import torch

from vtv_nnsight.digests import tensor_digest
from vtv_nnsight.finite import check_finite
from vtv_nnsight.models.devices import remote_of
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.prompts import Prompts
from vtv_nnsight.search.budget import Search, SearchObjective
from vtv_nnsight.search.objective import Objective
from vtv_nnsight.search.remote import REMOTE_EVALUATIONS, RemoteObjective
from vtv_nnsight.search.result import SearchResult
from vtv_nnsight.tasks import AnyTask
from vtv_nnsight.vectors import TaskVector, TaskVectors

ALGORITHMS: dict[str, Algorithm[...]] = {}
"""Name → algorithm, in alphabetical order."""

Options = ParamSpec("Options")
"""An algorithm's own options, which an editor shows in a call."""


class Algorithm(Generic[Options]):
    """A search algorithm, called as `vtv_nnsight.search` describes; `on` runs it on any objective.

    Args:
        function: `function(search, *, …) -> (choices [unit], scores [unit][, whether the scores are probabilities])`.
        description: How it searches, in one line.
        needs_gradient: Whether it reads gradients of the loss, which loss="pixels" does not have.

    Attributes:
        name: The function's.
        options: Name → default value of each of its options; `inspect.Parameter.empty` where there is none.
    """

    def __init__(
        self, function: Callable[Concatenate[Search, Options], tuple[Any, ...]], description: str, needs_gradient: bool
    ) -> None:
        functools.update_wrapper(self, function)
        self.function, self.description, self.needs_gradient = function, description, needs_gradient
        self.name = function.__name__
        options = list(inspect.signature(function).parameters.values())[1:]
        self.options = {parameter.name: parameter.default for parameter in options}
        shared = list(inspect.signature(Algorithm.__call__).parameters.values())[1:-2]
        shared = [p.replace(kind=p.KEYWORD_ONLY) if p.default is not p.empty else p for p in shared]
        self.__signature__ = inspect.Signature(shared + options, return_annotation=SearchResult)

    @property
    def needs_scores(self) -> bool:
        """Whether it compares tasks, and so needs `vectors` (or their `scores`)."""
        return "scores" in self.options

    @property
    def takes_size(self) -> bool:
        """Whether `size` says how many units to choose."""
        return "size" in self.options

    def __call__(
        self,
        model: InContextModel,
        vector: TaskVector | Sequence[TaskVector],
        task: AnyTask | Sequence[AnyTask],
        prompts: Prompts | Sequence[Prompts],
        space: PatchSpace,
        budget: int | None = None,
        loss: str | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        held_out: float | Prompts | Sequence[Prompts] = 0.25,
        vectors: TaskVectors | None = None,
        resume: str | Path | None = None,
        progress: bool = True,
        remote: bool | str | None = None,
        remote_evaluations: int = REMOTE_EVALUATIONS,
        *more: Options.args,
        **options: Options.kwargs,
    ) -> SearchResult:
        """Search units of a model; the arguments are those that `vtv_nnsight.search` describes."""
        self._check_options(options)
        shared: Any = {"loss": loss, "batch_size": batch_size, "held_out": held_out, "seed": seed}
        given = (model, vector, task, prompts, space)
        if remote := remote_of(model, remote):
            if self.function.__module__.partition(".")[0] != __name__.partition(".")[0]:
                raise ValueError(f"{self.name} is your own and runs here alone; take one of the package, as reinforce.")
            objective: Objective = RemoteObjective(
                *given, **shared, remote=remote, remote_evaluations=remote_evaluations
            )
        else:
            objective = Objective(*given, **shared)
        return self.on(objective, budget, seed, vectors, resume, progress, *more, **options)

    def on(
        self,
        objective: SearchObjective,
        budget: int | None = None,
        seed: int = 0,
        vectors: TaskVectors | None = None,
        resume: str | Path | None = None,
        progress: bool = True,
        *more: Options.args,
        **options: Options.kwargs,
    ) -> SearchResult:
        """Run it on any objective: see `SearchObjective`."""
        self._check_options(options)
        settings = {name: _plain(options.get(name, default)) for name, default in self.options.items()}
        search = Search(self.name, objective, budget, seed, settings, vectors, resume, progress)
        try:
            return search.result(*self.function(search, *more, **options))
        finally:
            search.close()

    def __repr__(self) -> str:
        return f"search.{self.name}: {self.description}"

    def _check_options(self, options: Mapping[str, Any]) -> None:
        for name, value in options.items():
            if isinstance(value, Real):
                check_finite(float(value), f"{name} of {self.name}", "give a finite number")


def algorithm(
    description: str, *, needs_gradient: bool = False
) -> Callable[[Callable[Concatenate[Search, Options], tuple[Any, ...]]], Algorithm[Options]]:
    """Make a public algorithm of a function, and enter it in `ALGORITHMS`. The arguments are those of `Algorithm`."""

    def declare(function: Callable[Concatenate[Search, Options], tuple[Any, ...]]) -> Algorithm[Options]:
        declared = Algorithm(function, description, needs_gradient)
        ALGORITHMS[declared.name] = declared
        return declared

    return declare


def _plain(value: Any) -> Any:
    """An option's value as JSON can hold it; tensors by their digest."""
    if isinstance(value, torch.Tensor):
        return tensor_digest(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value
