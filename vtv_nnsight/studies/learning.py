"""What is learned by gradient while the model stays as it is: a task vector, beside the one that is the mean over
prompts (and a prompt's border, in `visual_prompting.border`).

    >>> learned = learn_vector(model, vectors["segmentation"], result.patches, prompts.query_only(), seed=0)
    >>> evaluate(model, task, test, {"learned": (learned, result.patches)})

The mean is what the heads say on average when the example is shown; nothing makes it the best thing to say. What is
best at these units bounds what any vector can do there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import ByStage, InContextModel
from vtv_nnsight.patching import PatchSet, patch
from vtv_nnsight.patching.forward import Edit, find_loss, losses
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.search.holdout import hold_out
from vtv_nnsight.vectors import TaskVector


@dataclass(frozen=True)
class Descent:
    """How a loss is gone down, by Adam. Held-out prompts are looked at ten times, and what was best on them is kept.

    Args:
        loss: The name of one of the model's losses that have gradients, by default its first.
        steps, lr: Of Adam.
        batch_size: Prompts of a step, the next ones of a random order.
        held_out: The share of the prompts that is held out, or separate prompts.
        seed: Of the split and the order.
        progress: Show a progress bar.
    """

    loss: str | None = None
    steps: int = 200
    lr: float = 0.02
    batch_size: int = 16
    held_out: float | VisualPrompt = 0.25
    seed: int = 0
    progress: bool = True


def learn_vector(
    model: InContextModel, vector: TaskVector, patches: PatchSet, prompts: VisualPrompt, **options: Any
) -> TaskVector:
    """The vector that lowers the loss most at the units of a set, starting from a task's.

    Adam goes down the gradient of the loss through `patch`; the model stays as it is. The vector that was best on the
    held-out prompts is returned: there it is never worse than the one given.

    Args:
        model: The model, on its device and in its dtype.
        vector: Where to start.
        patches: The units; elsewhere the vector stays as it is.
        prompts: Prompts of the task with the truth in their output cells, `query_only()` for zero-shot.
        **options: Those of `Descent`, such as `steps=60`; the learning rate is in units of the vector's own root mean
            square at the units.

    Raises:
        ValueError: when the model has no such loss, or nothing is to be learned.
    """
    how = Descent(**options)
    if not len(patches) or how.steps < 1:
        raise ValueError(f"{len(patches)} units and {how.steps} steps leave nothing to learn; give 1 or more of both.")
    vector = vector.to(device_of(model))
    mask = patches.space.mask(patches.choices.to(device_of(model)))
    size = torch.cat([vector.mean[name][units].flatten() for name, units in mask.items()]).square().nanmean().sqrt()
    leaves = vector.mean.map(lambda mean: mean.float().clone().requires_grad_())
    learned = replace(vector, task=f"{vector.task}, learned", mean=leaves, variance=None)
    how, edit = replace(how, lr=how.lr * float(size)), partial(patch, vector=learned, patches=mask)
    best = descend(model, prompts, list(leaves.values()), how, edit=edit)
    return replace(learned, mean=ByStage(zip(leaves, best)))


def descend(
    model: InContextModel,
    prompts: VisualPrompt,
    parameters: Sequence[torch.Tensor],
    how: Descent,
    show: Callable[[VisualPrompt], VisualPrompt] = lambda prompts: prompts,
    edit: Edit | None = None,
) -> list[torch.Tensor]:
    """Adam down the gradient of a model's loss; held-out prompts tell which values to keep.

    Args:
        model: The model.
        prompts: With the truth in their output cells.
        parameters: Leaves that `show` or `edit` use; they are changed in place.
        how: Its learning rate is Adam's own.
        show: Makes the prompts that the model sees of some of those given; the truth is that of those given.
        edit: Called with the model inside the trace.

    Returns:
        The values of the parameters that were best on the held-out prompts: those given, if none were better.

    Raises:
        ValueError: when the model has no such loss with gradients.
    """
    objective, device, size = find_loss(model, how.loss, gradient=True), device_of(model), how.batch_size
    held_out = how.held_out if isinstance(how.held_out, (int, float)) else [how.held_out]
    ((train, held),) = hold_out([prompts], held_out, how.seed)
    train, held = train.to(device), held.to(device)
    truths = [torch.cat([model.truth(batch) for batch in rows.split(size)]) for rows in (train, held)]
    adam = torch.optim.Adam(parameters, how.lr)
    generator = torch.Generator().manual_seed(how.seed)

    def judge() -> float:
        with torch.no_grad():
            parts = zip(held.split(size), truths[1].split(size))
            return torch.cat([losses(model, show(rows), objective, truth, edit) for rows, truth in parts]).mean().item()

    def current() -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in parameters]

    best, best_loss, order = current(), judge(), torch.tensor([], dtype=torch.long)
    with progress_bar(total=how.steps, desc="learning", unit="step", disable=not how.progress) as bar:
        for step in range(how.steps):
            if len(order) < min(size, len(train)):
                order = torch.randperm(len(train), generator=generator)
            rows, order = order[:size].to(device), order[size:]
            values = losses(model, show(train[rows]), objective, truths[0][rows], edit)
            slopes = torch.autograd.grad(values.mean(), parameters, allow_unused=True)
            for parameter, slope in zip(parameters, slopes):
                parameter.grad = slope
            adam.step()
            if (step + 1) % max(1, how.steps // 10) == 0 or step + 1 == how.steps:
                held_out_loss = judge()
                if held_out_loss < best_loss:
                    best, best_loss = current(), held_out_loss
                bar.set_postfix_str(f"held-out loss {best_loss:.4f}")
            bar.update(1)
    return best
