"""Attribution patching: every unit's effect from one forward and one backward."""

from __future__ import annotations

import torch

from vtv_nnsight.search.algorithm import GRADIENT_COST, Search
from vtv_nnsight.search.registry import algorithm


@algorithm("gradient x (vector - activation), the top units", needs_gradient=True)
def attribution(
    search: Search, *, steps: int = 1, size: int | None = None, tolerance: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top units by gradient x (vector - activation), the first-order estimate of `mediation`'s effect (Nanda,
    *Attribution Patching*, 2023; Syed et al., 2023).

    At most half of the budget goes to gradients; a prompt's costs three evaluations.

    Args:
        steps: With more than one, the gradient is averaged at that many points on the way from nothing patched to
            everything patched (integrated gradients: Sundararajan et al., ICML 2017).
        size: Units to keep; None tries sizes on the training prompts (`Search.top_units`).
        tolerance: How much worse a smaller set may be, in standard errors of the paired difference.

    Returns:
        Its scores are the estimated falls of the loss.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} takes no gradient; give 1 or more.")
    prompts = min(len(search.train), max(1, search.budget // 2 // (GRADIENT_COST * steps)))
    search.require(GRADIENT_COST * steps * prompts + len(search.held_out), "the gradient of one prompt")
    falls = estimated_falls(search, search.train[:prompts], steps)
    return search.top_units(falls.argsort(descending=True, stable=True), size, tolerance), falls


def estimated_falls(search: Search, rows: torch.Tensor, steps: int = 1) -> torch.Tensor:
    """How far the loss falls with each unit, as gradients on prompts `rows` [prompt] tell: [unit]."""
    points = torch.zeros(1) if steps == 1 else (torch.arange(steps) + 0.5) / steps
    falls = torch.zeros(search.units, dtype=torch.float64)
    for point in points:
        _, gradients = search.gradient(point.expand(len(rows), search.units), rows)
        falls -= search.mean(gradients.T, rows) / steps
    return falls
