"""Attribution patching: every unit's effect from one forward and one backward."""

from __future__ import annotations

import torch

from vtv_nnsight.search.budget import GRADIENT_COST, Search
from vtv_nnsight.search.registry import algorithm


@algorithm("gradient x (vector - activation), the top units", needs_gradient=True)
def attribution(
    search: Search, *, steps: int = 1, drop: bool = False, size: int | None = None, tolerance: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top units by gradient x (vector - activation), the first-order estimate of `mediation`'s effect (Nanda,
    *Attribution Patching*, 2023; Syed et al., 2023).

    At most half of the budget goes to gradients; a prompt's costs three evaluations.

    Args:
        steps: With more than one, the gradient is averaged at that many points on the way from nothing patched to
            everything patched (integrated gradients: Sundararajan et al., ICML 2017).
        drop: GradDrop (Kramár et al., *AtP**, 2024, arXiv 2403.00745, §3.2): one gradient for each layer, without what
            flows through it, so that direct and indirect effects that cancel do not hide a unit. Scores are mean
            absolute values, and tell that a unit matters, not which way.
        size: Units to keep; None tries sizes on the training prompts (`Search.top_units`).
        tolerance: How much worse a smaller set may be, in standard errors of the paired difference.

    Returns:
        Its scores are the estimated falls of the loss.

    Raises:
        ValueError: when there are no steps, or no layers to drop.
    """
    layers = getattr(search.objective, "layers", 0) if drop else 1
    if steps < 1:
        raise ValueError(f"steps={steps} takes no gradient; give 1 or more.")
    if drop and layers < 2:
        raise ValueError(f"drop=True needs two layers or more that gradients can be kept out of; there are {layers}.")
    cost = GRADIENT_COST * steps * layers
    prompts = min(len(search.train), max(1, search.budget // 2 // cost))
    search.require(cost * prompts + len(search.held_out), "the gradient of one prompt")
    rows = search.train[:prompts]
    falls = dropped_falls(search, rows, steps, layers) if drop else estimated_falls(search, rows, steps)
    return search.top_units(falls.argsort(descending=True, stable=True), size, tolerance), falls


def estimated_falls(search: Search, rows: torch.Tensor, steps: int = 1) -> torch.Tensor:
    """How far the loss falls with each unit, as gradients on prompts `rows` [prompt] tell: [unit]."""
    return search.mean(_falls(search, rows, steps).T, rows)


def dropped_falls(search: Search, rows: torch.Tensor, steps: int, layers: int) -> torch.Tensor:
    """How much each unit matters by GradDrop (AtP*, eq. 11): [unit]. Its own layer's gradient is nothing to a unit, so
    that one layer less is counted."""
    falls = [search.mean(_falls(search, rows, steps, layer).abs().T, rows) for layer in range(layers)]
    return sum(falls) / (layers - 1)


def _falls(search: Search, rows: torch.Tensor, steps: int, drop: int | None = None) -> torch.Tensor:
    """Every prompt's: [prompt, unit]."""
    points = torch.zeros(1) if steps == 1 else (torch.arange(steps) + 0.5) / steps
    at = [search.gradient(point.expand(len(rows), search.units), rows, drop)[1] for point in points]
    return -torch.stack(at).mean(0)
