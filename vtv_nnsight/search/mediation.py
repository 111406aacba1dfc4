"""Causal mediation analysis: what each unit does alone."""

from __future__ import annotations

import torch

from vtv_nnsight.search.algorithm import Run, algorithm


@algorithm
def mediation(run: Run, *, size: int | None = None, tolerance: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """The top units by their own effect: how far the loss falls when a unit is patched and nothing else is (the
    baseline of ECCV 2024, §5; as Todd et al., *Function Vectors in Large Language Models*, ICLR 2024).

    Half of the budget measures effects, each unit on as many training prompts as that pays for.

    Args:
        size: Units to keep; None tries sizes on the training prompts (`Run.cut`).
        tolerance: How much worse a smaller set may be, in standard errors of the paired difference.

    Returns:
        Its scores are the effects: loss with nothing patched less loss with the unit.
    """
    sets = torch.cat([torch.zeros(1, run.units, dtype=torch.bool), torch.eye(run.units, dtype=torch.bool)])
    prompts = min(len(run.train), max(1, run.budget // 2 // len(sets)))
    run.require(len(sets) * prompts + len(run.held_out), f"patching each of {run.units} units on one prompt")
    rows = run.train[:prompts]
    losses = run.mean(run.losses(sets, rows), rows)
    effects = losses[0] - losses[1:]
    return run.cut(effects.argsort(descending=True, stable=True), size, tolerance), effects
