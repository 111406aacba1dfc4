"""Searches by gradients of the loss: attribution patching, and gates trained by gradient."""

from __future__ import annotations

import torch

from vtv_nnsight.search.budget import GRADIENT_COST, Search
from vtv_nnsight.search.registry import algorithm
from vtv_nnsight.text import check_choice

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""The hard-concrete distribution's own constants (Louizos et al., 2018, §4)."""


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
    rows = affordable_prompts(search, cost)
    falls = dropped_falls(search, rows, steps, layers) if drop else estimated_falls(search, rows, steps)
    return search.top_units(falls.argsort(descending=True, stable=True), size, tolerance), falls


def affordable_prompts(search: Search, cost: int) -> torch.Tensor:
    """The training prompts that half of the budget pays for, at `cost` evaluations each: [prompt]."""
    prompts = min(len(search.train), max(1, search.budget // 2 // cost))
    search.require(cost * prompts + len(search.held_out), "the gradient of one prompt")
    return search.train[:prompts]


def estimated_falls(search: Search, rows: torch.Tensor, steps: int = 1) -> torch.Tensor:
    """How far the loss falls with each unit, as gradients on prompts `rows` [prompt] tell: [unit]."""
    return search.mean(falls_of_prompts(search, rows, steps).T, rows)


def dropped_falls(search: Search, rows: torch.Tensor, steps: int, layers: int) -> torch.Tensor:
    """How much each unit matters by GradDrop (AtP*, eq. 11): [unit]. Its own layer's gradient is nothing to a unit, so
    that one layer less is counted."""
    falls = [search.mean(falls_of_prompts(search, rows, steps, layer).abs().T, rows) for layer in range(layers)]
    return sum(falls, torch.zeros(search.units, dtype=torch.float64)) / (layers - 1)


def falls_of_prompts(search: Search, rows: torch.Tensor, steps: int, drop: int | None = None) -> torch.Tensor:
    """How far each prompt's loss falls with each unit, as gradients tell: [prompt, unit]."""
    points = torch.zeros(1) if steps == 1 else (torch.arange(steps) + 0.5) / steps
    at = [search.gradient(point.expand(len(rows), search.units), rows, drop)[1] for point in points]
    return -torch.stack(at).mean(0)


@algorithm("hard-concrete gates by gradient", needs_gradient=True)
def gates(
    search: Search,
    *,
    start: str | None = None,
    init: float = -1.0,
    lr: float = 0.1,
    penalty: float = 0.05,
    images: int = 16,
    tolerance: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Hard-concrete gates (Louizos et al., *Learning Sparse Neural Networks through L0 Regularization*, ICLR 2018),
    trained by gradient through the token loss, then made definite.

    Every unit's activation is activation x (1 - gate) + vector x gate. The likeliest units are then cut to a set on the
    training prompts. A prompt's gradient costs three evaluations; a fifth of the budget is kept for the end.

    Args:
        start: None starts all gates alike; "attribution" moves each by its `attribution` score (over the scores'
            standard deviation, at most 2), for which up to a tenth of the budget is spent.
        init: Initial location of the gates, in logits.
        lr: Adam's learning rate.
        penalty: Price of all gates being open, in units of the loss.
        images: Prompts a step, each with its own draw of the gates.
        tolerance: How much worse a smaller set may be, in standard errors of the paired difference.

    Returns:
        Its probabilities are those of a gate that is not shut.
    """
    check_choice((None, "attribution"), start=start)
    cost, held_out = GRADIENT_COST * images, len(search.held_out)
    reserve = search.budget // 5 + held_out
    every = max(1, search.budget // 10 // cost)
    scored = search.train[: max(1, search.budget // 10 // GRADIENT_COST)] if start else search.train[:0]
    search.require(GRADIENT_COST * len(scored) + reserve + cost + held_out, "one step and the end")
    alpha = torch.full((search.units,), init, dtype=torch.float64)
    if start:
        falls = estimated_falls(search, scored)
        alpha += (falls / falls.std().clamp(min=1e-12)).clamp(-2, 2)
    alpha.requires_grad_()
    adam = torch.optim.Adam([alpha], lr)
    for step in search.steps():
        if search.left < reserve + cost + held_out:
            break
        rows = search.next_prompts(images)
        gate = hard_concrete(alpha, torch.rand(images, search.units, dtype=torch.float64, generator=search.generator))
        losses, gradients = search.gradient(gate.detach().float(), rows)
        adam.zero_grad()
        (search.mean((gradients * gate).T, rows).sum() + penalty * is_open(alpha).mean()).backward()
        adam.step()
        if step % every == every - 1:
            search.validate(alpha.detach() > 0, losses.mean())
    probabilities = is_open(alpha).detach()
    return search.top_units(probabilities.argsort(descending=True, stable=True), None, tolerance), probabilities, True


def hard_concrete(alpha: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Gates in [0, 1] of uniform noise u: [row, unit]."""
    concrete = ((u.logit(eps=1e-6) + alpha) / TEMPERATURE).sigmoid()
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def is_open(alpha: torch.Tensor) -> torch.Tensor:
    """Probability that a gate is not shut: [unit]."""
    return (alpha - TEMPERATURE * torch.tensor(-LOW / HIGH, dtype=alpha.dtype).log()).sigmoid()
