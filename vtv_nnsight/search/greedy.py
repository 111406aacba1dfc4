"""Greedy random search."""

from __future__ import annotations

import torch

from vtv_nnsight.search.budget import Search
from vtv_nnsight.search.random import draw_sets
from vtv_nnsight.search.registry import algorithm


@algorithm("random changes, kept when better")
def greedy(
    search: Search,
    *,
    images: int = 16,
    start: float = 0.1,
    flips: int = 1,
    candidates: int = 16,
    validate_every: float = 0.1,
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
    if not 1 <= flips <= search.units:
        raise ValueError(f"flips={flips} is not a number of units from 1 to {search.units}.")
    rows, held_out = search.train[:images], len(search.held_out)
    search.require(len(rows) * (1 + candidates) + held_out, "one step")
    most = min(int(start * search.budget), search.left - held_out) // len(rows)
    sets = draw_sets(search, max(1, most))
    losses = search.mean(search.losses(sets, rows), rows)
    current, loss = sets[losses.argmin()], losses.min()
    gains, next_time = torch.zeros(search.units, dtype=torch.float64), 0.0
    for _ in search.steps():
        if search.evaluations >= next_time and search.left >= len(rows) * candidates + 2 * held_out:
            search.validate(current, loss)
            next_time = search.evaluations + validate_every * search.budget
        if search.left < len(rows) * candidates + held_out:
            break
        which = torch.rand(candidates, search.units, generator=search.generator).argsort(1)[:, :flips]
        counts = torch.randint(1, flips + 1, (candidates, 1), generator=search.generator)
        flipped = torch.zeros(candidates, search.units, dtype=torch.bool)
        flipped.scatter_(1, which, torch.arange(flips) < counts)
        proposals = current ^ flipped
        losses = search.mean(search.losses(proposals, rows), rows)
        best = losses.argmin()
        if losses[best] < loss:
            gains += torch.where(flipped[best], loss - losses[best], 0.0)
            current, loss = proposals[best], losses[best]
    search.validate(current, loss)
    return current, torch.where(current, gains, -gains)
