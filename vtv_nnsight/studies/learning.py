"""What is learned by gradient while the model stays as it is: a task vector, beside the one that is the mean over
prompts (and a prompt's border, in `visual_prompting.border`).

    >>> learned = learn_vector(model, vectors["segmentation"], result.patches, prompts.query_only(), seed=0)
    >>> evaluate(model, task, test, {"learned": (learned, result.patches)})

The mean is what the heads say on average when the example is shown; nothing makes it the best thing to say. What is
best at these units bounds what any vector can do there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import ByStage, InContextModel
from vtv_nnsight.patching import PatchSet, patch
from vtv_nnsight.patching.forward import Edit, find_loss, losses
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.search.holdout import hold_out
from vtv_nnsight.vectors import TaskVector


def learn_vector(
    model: InContextModel,
    vector: TaskVector,
    patches: PatchSet,
    prompts: VisualPrompt,
    *,
    loss: str | None = None,
    steps: int = 200,
    lr: float = 0.02,
    batch_size: int = 16,
    held_out: float | VisualPrompt = 0.25,
    seed: int = 0,
    progress: bool = True,
) -> TaskVector:
    """The vector that lowers the loss most at the units of a set, starting from a task's.

    Adam goes down the gradient of the loss through `patch`; the model stays as it is. The held-out prompts are looked
    at ten times, and the vector that was best on them is returned: there it is never worse than the one given.

    Args:
        model: The model, on its device and in its dtype.
        vector: Where to start.
        patches: The units; elsewhere the vector stays as it is.
        prompts: Prompts of the task with the truth in their output cells, `query_only()` for zero-shot.
        loss: The name of one of the model's losses that have gradients, by default its first.
        steps, lr, batch_size: Of Adam; a step takes the next `batch_size` prompts of a random order. The learning rate
            is in units of the vector's own root mean square at the units.
        held_out: The share of the prompts that is held out, or separate prompts.
        seed: Of the split and the order.

    Raises:
        ValueError: when the model has no such loss, or nothing is to be learned.
    """
    if not len(patches) or steps < 1:
        raise ValueError(f"{len(patches)} units and {steps} steps leave nothing to learn; give 1 or more of both.")
    vector = vector.to(device_of(model))
    mask = patches.space.mask(patches.choices.to(device_of(model)))
    size = torch.cat([vector.mean[name][units].flatten() for name, units in mask.items()]).square().nanmean().sqrt()
    learned = replace(
        vector,
        task=f"{vector.task}, learned",
        mean=vector.mean.map(lambda mean: mean.float().clone().requires_grad_()),
        variance=None,
    )
    best = descend(
        model,
        prompts,
        list(learned.mean.values()),
        edit=partial(patch, vector=learned, patches=mask),
        loss=loss,
        steps=steps,
        lr=lr * float(size),
        batch_size=batch_size,
        held_out=held_out,
        seed=seed,
        progress=progress,
    )
    return replace(learned, mean=ByStage(zip(learned.mean, best)))


def descend(
    model: InContextModel,
    prompts: VisualPrompt,
    parameters: Sequence[torch.Tensor],
    *,
    show: Callable[[VisualPrompt], VisualPrompt] = lambda prompts: prompts,
    edit: Edit | None = None,
    loss: str | None,
    steps: int,
    lr: float,
    batch_size: int,
    held_out: float | VisualPrompt,
    seed: int,
    progress: bool,
) -> list[torch.Tensor]:
    """Adam down the gradient of a model's loss; held-out prompts, looked at ten times, tell which values to keep.

    Args:
        model: The model.
        prompts: With the truth in their output cells.
        parameters: Leaves that `show` or `edit` use; they are changed in place.
        show: Makes the prompts that the model sees of some of those given; the truth is that of those given.
        edit: Called with the model inside the trace.
        loss, steps, lr, batch_size, held_out, seed, progress: See `learn_vector`; the learning rate is Adam's own.

    Returns:
        The values of the parameters that were best on the held-out prompts: those given, if none were better.

    Raises:
        ValueError: when the model has no such loss with gradients.
    """
    objective, device = find_loss(model, loss, gradient=True), device_of(model)
    ((train, held),) = hold_out([prompts], held_out if isinstance(held_out, (int, float)) else [held_out], seed)
    train, held = train.to(device), held.to(device)
    truths = [torch.cat([model.truth(batch) for batch in rows.split(batch_size)]) for rows in (train, held)]
    adam = torch.optim.Adam(parameters, lr)
    generator = torch.Generator().manual_seed(seed)

    def judge() -> float:
        with torch.no_grad():
            parts = zip(held.split(batch_size), truths[1].split(batch_size))
            return torch.cat([losses(model, show(rows), objective, truth, edit) for rows, truth in parts]).mean().item()

    def current() -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in parameters]

    best, best_loss, order = current(), judge(), torch.tensor([], dtype=torch.long)
    with progress_bar(total=steps, desc="learning", unit="step", disable=not progress) as bar:
        for step in range(steps):
            if len(order) < min(batch_size, len(train)):
                order = torch.randperm(len(train), generator=generator)
            rows, order = order[:batch_size].to(device), order[batch_size:]
            values = losses(model, show(train[rows]), objective, truths[0][rows], edit)
            slopes = torch.autograd.grad(values.mean(), parameters, allow_unused=True)
            for parameter, slope in zip(parameters, slopes):
                parameter.grad = slope
            adam.step()
            if (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps:
                held_out_loss = judge()
                if held_out_loss < best_loss:
                    best, best_loss = current(), held_out_loss
                bar.set_postfix_str(f"held-out loss {best_loss:.4f}")
            bar.update(1)
    return best
