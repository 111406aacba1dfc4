"""Prompts that a model does well: VTV's first step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vtv_nnsight.layouts import Layout
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import InContextModel, batch_size_of
from vtv_nnsight.patching.forward import forward
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.tasks import Draw, Task, draw
from vtv_nnsight.text import check_choice

DUPLICATES = ("apart", "published")
"""What is done with candidates that share images."""


def select_prompts(
    model: InContextModel,
    task: Task,
    images: Any,
    n: int = 100,
    *,
    candidates: int = 1000,
    seed: int = 0,
    layout: Layout | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    drawn: Draw | None = None,
    duplicates: str = "apart",
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
        batch_size: Prompts in a forward; None is `models.interface.default_batch_size`, 32 for MAE-VQGAN.
        progress: Show a progress bar.
        drawn: Candidates to use in place of random ones (see `tasks.draw`).
        duplicates: "apart": of the best prompts first, each that shares no image with those before it, as the paper
            describes. "published": as its released code does it: among the candidates of one example the one of lowest
            metric stays, then among those of one query; for IoU that is the worst. The best `n` of these are kept, and
            an image may be an example in one and the query of another.

    Raises:
        ValueError: when the candidates leave fewer than `n` prompts, or duplicates is neither.
    """
    layout = layout or model.layout
    device, batch_size = device_of(model), batch_size_of(model, batch_size)
    check_choice(DUPLICATES, duplicates=duplicates)
    drawn = drawn if drawn is not None else draw(images, candidates, layout.examples, seed)
    candidates = len(drawn)
    losses = []
    starts = range(0, candidates, batch_size)
    with progress_bar(starts, desc=f"{task.name} candidates", unit="batch", disable=not progress) as bar:
        for start in bar:
            prompts = task.compose(images, drawn[start : start + batch_size], layout).to(device)
            prompts.check_truth()
            with torch.no_grad():
                output, _ = forward(model, prompts)
            losses.append(task.loss(*model.answers(output, prompts, task)).double().cpu())
    loss = torch.cat(losses)
    left = _apart(loss, drawn.rows) if duplicates == "apart" else _published(loss, drawn.rows, task.higher_is_better)
    if len(left) < n:
        raise ValueError(
            f"{candidates} candidates of {task.name!r} hold {len(left)} that share no image; give more for {n}."
        )
    return task.compose(images, drawn[left[:n]], layout)


def _apart(losses: torch.Tensor, rows: np.ndarray) -> list[int]:
    """The prompts that share no image with a better one, the best first."""
    best: list[int] = []
    used: set[int] = set()
    for i in losses.argsort(stable=True).tolist():
        if used.isdisjoint(rows[i].tolist()):
            best.append(i)
            used.update(rows[i].tolist())
    return best


def _published(losses: torch.Tensor, rows: np.ndarray, higher_is_better: bool) -> list[int]:
    """The prompts that the released code keeps, the best first."""
    metric = -losses if higher_is_better else losses
    left = metric.argsort(stable=True).tolist()
    for column in (0, -1):  # by example, then by query
        first: dict[int, int] = {}
        for i in left:
            first.setdefault(int(rows[i, column]), i)
        left = sorted(first.values(), key=lambda i: float(metric[i]))
    return sorted(left, key=lambda i: float(losses[i]))
