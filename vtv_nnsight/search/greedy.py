"""Greedy random search."""

from __future__ import annotations

import torch

from vtv_nnsight.search.algorithm import Run, algorithm
from vtv_nnsight.search.random import draw_sets


@algorithm
def greedy(
    run: Run, *, images: int = 16, start: float = 0.1, flips: int = 1, candidates: int = 16, validate_every: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sets, kept when better (the greedy random search that ECCV 2024, §5, compares with).

    It starts from the best of some random sets. Then every step proposes sets that differ from the current one in a few
    random units, and takes the best of them if that lowers the training loss.

    Args:
        images: Training prompts that each set is tried on.
        start: Share of the budget for the random sets that it starts from.
        flips: Most units in which a proposal differs.
        candidates: Proposals a step.
        validate_every: Share of the budget between two held-out evaluations.

    Returns:
        Its scores are, for each unit, how much the loss fell when it was flipped to what it is in the end, summed.
    """
    rows, held_out = run.train[:images], len(run.held_out)
    run.require(len(rows) * (1 + candidates) + held_out, "one step")
    sets = draw_sets(run, max(1, int(start * run.budget) // len(rows)))
    losses = run.mean(run.losses(sets, rows), rows)
    current, loss = sets[losses.argmin()], losses.min()
    gains, next_time = torch.zeros(run.units, dtype=torch.float64), 0.0
    for _ in run.steps():
        if run.evaluations >= next_time and run.left >= len(rows) * candidates + 2 * held_out:
            run.validate(current, loss)
            next_time = run.evaluations + validate_every * run.budget
        if run.left < len(rows) * candidates + held_out:
            break
        which = torch.rand(candidates, run.units, generator=run.generator).argsort(1)[:, :flips]
        counts = torch.randint(1, flips + 1, (candidates, 1), generator=run.generator)
        flipped = torch.zeros(candidates, run.units, dtype=torch.bool)
        flipped.scatter_(1, which, torch.arange(flips) < counts)
        proposals = current ^ flipped
        losses = run.mean(run.losses(proposals, rows), rows)
        best = losses.argmin()
        if losses[best] < loss:
            gains += torch.where(flipped[best], loss - losses[best], 0.0)
            current, loss = proposals[best], losses[best]
    run.validate(current, loss)
    return current, torch.where(current, gains, -gains)
