"""What a circuit is measured by: a number for every answer, higher where the model does more of the task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import InContextModel, Loss
from vtv_nnsight.patching.forward import find_loss
from vtv_nnsight.prompts import Prompts, VisualPrompt
from vtv_nnsight.tasks.base import AnyTask


@dataclass(frozen=True)
class Measure:
    """m(answers) in the measures of circuits: higher is better.

    Args:
        name: For people.
        value: `value(output, answered, rows)` → [row]: of the network's output, the prompts that it answers, and the
            numbers of these prompts among those that the measure was made of.
        narrows: Whether the part of the output that the model's losses read is enough
            (`InContextModel.restrict_to_output`).
        truths: What `value` compares with: a measure of other truths is another, whatever its name.
    """

    name: str
    value: Callable[[Any, VisualPrompt, torch.Tensor], torch.Tensor]
    narrows: bool
    truths: tuple[torch.Tensor, ...] = ()


def answer_loss(model: InContextModel, prompts: VisualPrompt, loss: str | None = None) -> Measure:
    """Minus one of the model's losses of the truth in `prompts`; of MAE-VQGAN, minus the token loss.

    Raises:
        ValueError: when the model has no such loss.
    """
    scored = find_loss(model, loss)
    return _minus(scored, f"− {scored.name} loss", model.truth(prompts.to(device_of(model))), narrows=True)


def answer_metric(model: InContextModel, task: AnyTask, prompts: Prompts) -> Measure:
    """The task's own metric of the painted answers, or of those that a language model gives, signed so that higher is
    better.

    Raises:
        ValueError: when the metric reads what is generated.
    """
    prompts.check_truth()
    scored = next(iter(model.task_losses(task)), None)
    if scored is None:
        raise ValueError(f"{task.metric.name!r} reads what is generated, not an output; take answer_loss.")
    truth = (scored.truth or model.truth)(prompts.to(device_of(model)))
    return _minus(scored, f"{task.name}'s metric", truth, narrows=False)


def _minus(loss: Loss, name: str, truth: torch.Tensor, narrows: bool) -> Measure:
    """A loss with its sign turned."""
    return Measure(name, lambda output, answered, rows: -loss.value(output, answered, truth[rows]), narrows, (truth,))


def log_ratio(model: InContextModel, prompts: VisualPrompt, others: VisualPrompt, loss: str | None = None) -> Measure:
    """log p(answer of `prompts`) − log p(answer of `others`): how much more likely the one task's answer is than the
    other's to the same queries, a mean over the output's patches. What a logit difference is of language models, for
    which `answer_loss` of prompts with wrong answers gives it.

    Args:
        others: Prompts of another task, of the same queries in the same order.
        loss: The loss that is a negative log-likelihood; the model's first by default.

    Raises:
        ValueError: when the queries differ, or the model has no such loss.
    """
    if len(others) != len(prompts) or not torch.equal(others.region("query"), prompts.region("query")):
        raise ValueError(
            f"the {len(others)} other prompts are not of the queries of these {len(prompts)}; draw both from the same "
            "images with the same seed, of tasks that show the query alike."
        )
    scored = find_loss(model, loss)
    a, b = (model.truth(rows.to(device_of(model))) for rows in (prompts, others))

    def value(output: Any, answered: VisualPrompt, rows: torch.Tensor) -> torch.Tensor:
        return scored.value(output, answered, b[rows]) - scored.value(output, answered, a[rows])

    return Measure("log p(answer) − log p(other task's answer)", value, True, (a, b))
