"""Prompts that a model does well: VTV's first step."""

from __future__ import annotations

from typing import Any

import torch

from vtv_nnsight.layouts import Layout
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import VisualPrompt, crop
from vtv_nnsight.stages import device_of
from vtv_nnsight.tasks import Task, draw


def select_prompts(
    model: InContextModel,
    task: Task,
    images: Any,
    n: int = 100,
    *,
    candidates: int = 1000,
    seed: int = 0,
    layout: Layout | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> VisualPrompt:
    """Prompts that work: random pairs are run one-shot and the best `n` kept, each image used once (ECCV 2024, §4.1).

    Args:
        model: The model, on its device and in its dtype.
        task: What the prompts ask.
        images: A datasets.Dataset or a sequence of rows.
        n: Prompts to keep.
        candidates: Random prompts to try.
        seed: Of the candidates, which are those of `task.prompts(images, candidates, seed)`.
        layout: The model's own by default.
        batch_size: Prompts in a forward.
        progress: Show a progress bar.

    Raises:
        ValueError: when the candidates hold fewer than `n` prompts that share no image.
    """
    layout = layout or model.layout
    device = device_of(model)
    drawn = draw(images, candidates, layout.examples, seed)
    losses = []
    starts = range(0, candidates, batch_size)
    with progress_bar(starts, desc=f"{task.name} candidates", unit="batch", disable=not progress) as bar:
        for start in bar:
            prompts = task.compose(images, drawn[start : start + batch_size], layout).to(device)
            with torch.no_grad(), model.trace(prompts):
                output = model.output.save()
            answers = crop(model.paint(output, prompts), "output", layout)
            losses.append(task.loss(answers, prompts.region("output")).double().cpu())
    best: list[int] = []
    used: set[int] = set()
    for i in torch.cat(losses).argsort(stable=True).tolist():
        if len(best) < n and used.isdisjoint(drawn.rows[i].tolist()):
            best.append(i)
            used.update(drawn.rows[i].tolist())
    if len(best) < n:
        raise ValueError(
            f"{candidates} candidates of {task.name!r} hold {len(best)} prompts that share no image and {n} were asked "
            "for; give more images or more candidates, or ask for fewer."
        )
    return task.compose(images, drawn[best], layout)
