"""Causal mediation analysis: what each unit does alone."""

from __future__ import annotations

import torch

from vtv_nnsight.search.budget import Search
from vtv_nnsight.search.registry import algorithm


@algorithm("the effect of each unit alone, the top units")
def mediation(search: Search, *, size: int | None = None, tolerance: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """The top units by their own effect: how far the loss falls when a unit is patched and nothing else is (the
    baseline of ECCV 2024, §5; as Todd et al., *Function Vectors in Large Language Models*, ICLR 2024).

    Half of the budget measures effects, each unit on as many training prompts as that pays for.

    Args:
        size: Units to keep; None tries sizes on the training prompts (`Search.top_units`).
        tolerance: How much worse a smaller set may be, in standard errors of the paired difference.

    Returns:
        Its scores are the effects: loss with nothing patched less loss with the unit.
    """
    sets = torch.cat([torch.zeros(1, search.units, dtype=torch.bool), torch.eye(search.units, dtype=torch.bool)])
    prompts = min(len(search.train), max(1, search.budget // 2 // len(sets)))
    search.require(len(sets) * prompts + len(search.held_out), f"patching each of {search.units} units on one prompt")
    rows = search.train[:prompts]
    losses = search.mean(search.losses(sets, rows), rows)
    effects = losses[0] - losses[1:]
    return search.top_units(effects.argsort(descending=True, stable=True), size, tolerance), effects
