"""One forward of a model on prompts: trace, edit, output, and what is read off it: losses, and the painted answer.

>>> edit = partial(patch, vector=vector, patches=result.patches)
>>> output, answered = forward(model, prompts.query_only(), edit)
>>> model.answers(output, answered)                          # the painted answers and the true ones
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from nnsight import save

from vtv_nnsight.finite import WHERE, check_finite
from vtv_nnsight.models.inside_trace import first
from vtv_nnsight.models.interface import PIXELS, InContextModel, Loss, Place
from vtv_nnsight.models.sites import place_of
from vtv_nnsight.prompts import Prompts
from vtv_nnsight.text import quoted

Edit = Callable[[InContextModel], None]
"""What is done to a model inside a trace, such as `partial(patch, vector=vector, patches=patches)`."""

MEMORY = 512 * 2**20
"""Bytes of what is remembered of prompts at most."""


def forward(
    model: InContextModel,
    prompts: Prompts,
    edit: Edit | None = None,
    *,
    restrict: bool = False,
    cached: Sequence[Any] | None = None,
) -> tuple[Any, Any]:
    """The network's output on prompts, and the prompts that it answers.

    Args:
        model: The model, on the device of the prompts.
        prompts: What it sees.
        edit: Called with the model inside the trace.
        restrict: Compute only the part of the output that the model's losses read
            (`InContextModel.restrict_to_output`).
        cached: What `remember` gave of each of these prompts; the edit is then one that patches.
    """
    answered = prompts
    with model.trace(prompts, **model.scoring, **({} if cached is None else {"cached": cached})):
        if edit is not None:
            edit(model)
        if restrict:
            answered = save(model.restrict_to_output(prompts))
        output = save(model.output)
    return output, answered


def remember(model: InContextModel, prompts: Prompts, batch_size: int) -> list[Any] | None:
    """What `InContextModel.cached` gives of each of many prompts that are to be run under many patches; None where that
    is nothing, or would be more than `MEMORY` of all of them."""
    kept: list[Any] = []
    for batch in prompts.split(batch_size):
        if (values := model.cached(batch)) is None:
            return None
        kept += values
        if sum(value.nbytes for value in kept) / len(kept) * len(prompts) > MEMORY:
            return None
    return kept


def layers_of(model: InContextModel) -> list[Place]:
    """The residual stream that each layer leaves, through the stages."""
    return [place_of(model, stage.at("residual"), layer) for stage in model.stages for layer in range(stage.layers)]


@torch.no_grad()
def residuals(model: InContextModel, prompts: Prompts, layers: Sequence[int], edit: Edit | None = None) -> list[Any]:
    """What layers (see `layers_of`) leave, [stream, batch, ...] each, in a tuple where they give one; the model runs up
    to the last of them."""
    places = layers_of(model)
    with model.trace(prompts, **model.scoring) as tracer:
        if edit is not None:
            edit(model)
        outputs = save([places[layer].module.output for layer in layers])
        tracer.stop()
    by_row = (first(raw).unflatten(0, (-1, places[n].streams)) for n, raw in zip(layers, outputs))
    return [give_like(raw, value.transpose(0, 1)) for raw, value in zip(outputs, by_row)]


def give_like(raw: Any, value: torch.Tensor) -> Any:
    """A value in the form in which a module gives it."""
    return (value,) if isinstance(raw, tuple) else value


def start_from(model: InContextModel, left: Mapping[int, Any]) -> None:
    """Inside a trace: leave out all layers up to the last of these, which leave what `residuals` gave."""
    for number, place in enumerate(layers_of(model)[: max(left) + 1]):
        value = first(left[number]).transpose(0, 1).flatten(0, 1) if number in left else place.module.input
        place.module.skip(give_like(left[max(left)], value))


def losses(
    model: InContextModel,
    prompts: Prompts,
    loss: Loss,
    truth: torch.Tensor,
    edit: Edit | None = None,
    cached: Sequence[Any] | None = None,
) -> torch.Tensor:
    """A loss of the answers to prompts, [batch].

    Args:
        model, prompts, edit, cached: As for `forward`.
        loss: What `find_loss` gives.
        truth: What the loss compares with: `loss.truth(prompts)` where it has one, else `model.truth(prompts)`.

    Raises:
        ValueError: when a loss is not finite.
    """
    output, answered = forward(model, prompts, edit, restrict=loss.truth is None, cached=cached)
    values = loss.value(output, answered, truth)
    check_finite(values, f"the loss {loss.name!r}", WHERE)
    return values


def find_loss(model: InContextModel, name: str | None = None, task: Any = None, *, gradient: bool = False) -> Loss:
    """A loss by its name: one of the model's, the first by default; or the task's own, such as "pixels".

    Args:
        model: The model.
        name: The loss's; None is the first that there is.
        task: Without it there is no loss of a task's own.
        gradient: Ask for a loss that has a gradient.

    Raises:
        ValueError: when there is no such loss, naming those that there are.
    """
    known = [*model.losses, *(model.task_losses(task) if task is not None else ())]
    for loss in known:
        if name in (None, loss.name) and (loss.differentiable or not gradient):
            return loss
    if gradient and name in (None, PIXELS, *(loss.name for loss in known)):
        others = ", ".join(f'loss="{loss.name}"' for loss in known if loss.differentiable)
        raise ValueError(f"loss={name!r} has no gradient; use {others or 'a search that needs no gradient'}.")
    names = ", ".join(loss.name for loss in known) or "none"
    raise ValueError(f"loss={quoted(name)} is unknown; choose from {names}, the losses of this model.")
