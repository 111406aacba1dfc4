"""Attribution of which only what bootstrap samples of the prompts agree about is kept."""

from __future__ import annotations

import torch

from vtv_nnsight.search.budget import GRADIENT_COST, Search
from vtv_nnsight.search.gradients import affordable_prompts, falls_of_prompts
from vtv_nnsight.search.registry import algorithm


@algorithm("attribution that bootstrap samples agree about, the top units", needs_gradient=True)
def consistent_attribution(
    search: Search,
    *,
    steps: int = 5,
    samples: int = 200,
    agreement: float = 0.95,
    size: int | None = None,
    tolerance: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top units by `attribution` that is of one sign in bootstrap samples of the prompts, as edges were selected in
    the BlackboxNLP 2025 shared task on circuits. It costs no more than attribution does.

    Args:
        steps: Points on the way from nothing patched to everything patched (integrated gradients).
        samples: Bootstrap samples of the prompts.
        agreement: The share of samples in which a score must have its mean's sign; units of less have the score 0.
        size: Units to keep; None tries sizes on the training prompts (`Search.top_units`).
        tolerance: How much worse a smaller set may be, in standard errors of the paired difference.

    Returns:
        Its scores are the estimated falls of the loss.

    Raises:
        ValueError: when there are no steps or no samples.
    """
    if steps < 1 or samples < 1:
        raise ValueError(f"steps={steps} and samples={samples} leave nothing to agree about; give 1 or more of both.")
    rows = affordable_prompts(search, GRADIENT_COST * steps)
    falls = falls_of_prompts(search, rows, steps)
    drawn = torch.randint(len(rows), (samples, len(rows)), generator=search.generator)
    signs = torch.stack([search.mean(falls[sample].T, rows[sample]) for sample in drawn]).sign()
    scores = search.mean(falls.T, rows)
    scores = torch.where((signs == scores.sign()).double().mean(0) >= agreement, scores, 0.0)
    return search.top_units(scores.argsort(descending=True, stable=True), size, tolerance), scores
