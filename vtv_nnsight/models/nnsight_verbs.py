"""Verbs: functions such as `patch` that a block of nnsight's calls and that run beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from greenlet import GreenletExit
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import EarlyStopException, Event, Mediator, OutOfOrderError
from nnsight.intervention.iterator import Iterations

from vtv_nnsight.text import quoted


def projection_of(attention: Envoy) -> Envoy:
    """The module that is given what an attention's `heads` are."""
    name, _, side = type(attention).heads.key.rpartition(".")
    if side != "input":
        raise TypeError(f"{attention.path}.heads are not the input of a module; make them with heads_of.")
    return functools.reduce(getattr, name.split("."), attention)


class CallingBlock:
    """The block of a trace, or the invoke, that calls a verb such as `patch`.

    Args:
        verb: The verb's name.
        model: The model that the verb was given.
        example: What to write, for errors.

    Raises:
        ValueError: outside a block, in the block of another model, or in a loop over the steps of a run.
    """

    def __init__(self, verb: str, model: Any, example: str) -> None:
        self.verb = verb
        try:
            self._mediator = Mediator.current(verb)
        except ValueError as error:
            raise ValueError(f"{verb} is called inside the block of a trace or an invoke: {example}.") from error
        if self._mediator.iteration != 0:
            raise ValueError(
                f'{verb} cannot be called in a loop over steps; write {verb}(…, steps="all") once, above the loop.'
            )
        self._batcher, self._group = self._mediator.interleaver.batcher, self._mediator.batch_group
        traced = self._batcher.envoy
        if not isinstance(model, Envoy) or (model.interleaver, model.path) != (traced.interleaver, traced.path):
            raise ValueError(
                f"{verb} was given a {type(model).__name__} that is not the model of this trace; give the "
                f"{type(traced).__name__} of the block it is called in."
            )

    @property
    def is_edit(self) -> bool:
        """Whether it is stored by `model.edit`, and runs in later traces."""
        return bool(self._mediator.copy)

    @property
    def inputs(self) -> list[tuple[Any, ...]]:
        """The unnamed inputs of the invokes that it sees the rows of."""
        start, seen = 0, []
        for inputs, options in self._batcher.invokes:
            if self._group is None or self._group[0] == start:
                seen.append(inputs)
            start += self._batcher.envoy._batch_size(*inputs, **options)
        return seen

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its rows of a tensor of the whole batch."""
        rows: torch.Tensor = self._batcher.narrow(tensor, self._group)
        return rows

    def run(self, function: Callable[[int], None], *, steps: str = "first", whole: bool = False) -> None:
        """Run a function of the step's number in the model's forward. It reads and writes modules in their order, from
        where this is called: it sees what the block did above, and the block sees below what it has done.

        Args:
            function: What to run.
            steps: "first" forward, or "all" that the traced call makes.
            whole: Read the whole batch, not the block's rows alone.

        Raises:
            ValueError: when the model has run past what the function reads first.
        """
        if steps not in ("first", "all"):
            raise ValueError(f"steps={quoted(steps)} is unknown; choose 'first' or 'all'.")
        caller, worker = self._mediator, _Worker(self.verb, function, steps)
        worker.batch_group = None if whole else self._group
        interleaver = caller.interleaver
        interleaver.mediators.insert(interleaver.mediators.index(caller), worker)
        worker.start(interleaver)
        self._serve(worker)
        if worker.pending is not None and caller.occurrence(worker.pending.provider):
            place = worker.place
            interleaver.mediators.remove(worker)
            worker.worker.throw(GreenletExit)
            raise ValueError(
                f"{self.verb} comes too late: the model has run past {place} in this block; write {self.verb}(…) above "
                "the lines that read what comes after it, or in an empty `with tracer.invoke():`."
            )
        if worker.alive:
            worker.worker.parent = caller.worker.parent  # not this block, which has other things to wait for
        interleaver.reindex()

    def _serve(self, worker: _Worker) -> None:
        """Serve what the worker asks for at the place that the model is at, where the block has read already."""
        caller, here = self._mediator, self._mediator.pending
        if here is None or here.provider is None or caller.occurrence(here.provider):
            return
        try:
            caller.batch_group = worker.batch_group
            while (pending := worker.pending) is not None and pending.provider == here.provider:
                if pending.event is Event.VALUE:
                    worker.pending = worker.switch(Mediator.value(here.provider))
                else:
                    Mediator.swap(here.provider, pending.value)
                    worker.pending = worker.switch()
        finally:
            caller.batch_group = self._group


class _Worker(Mediator):
    """What a verb does in a run, served before the block that called it."""

    def __init__(self, verb: str, function: Callable[[int], None], steps: str) -> None:
        super().__init__(None, {}, {})
        self.verb, self.function, self.steps = verb, function, steps

    @property
    def place(self) -> str:
        """What it waits for, as users write it."""
        return str(self.pending.provider).removeprefix("model.")

    def _run(self) -> None:
        step = 0
        try:
            for step in Iterations()[:] if self.steps == "all" else (0,):
                self.function(step)
                self.flush()
        except OutOfOrderError as error:  # the run has ended; a stopped one has no result
            if step == 0 and self.occurrence("result"):
                raise ValueError(f"{self.verb} waited for {self.place}, which the model did not run.") from error


def end_run() -> None:
    """Inside a verb's function: end the model's run here, as `tracer.stop` does."""
    raise EarlyStopException
