"""Sets drawn at random: what any search must beat."""

from __future__ import annotations

import torch

from vtv_nnsight.search.budget import Search
from vtv_nnsight.search.registry import algorithm


@algorithm("random sets, the best one")
def random(search: Search, *, size: int | None = None, images: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of as many random sets as the budget pays for.

    Args:
        size: Units in each set, such as the size that another search found; None draws a size for each set too, all
            sizes being equally likely.
        images: Training prompts that each set is tried on.

    Returns:
        Its scores are, for each unit, how much lower the loss was over the sets that had it.
    """
    rows = search.train[:images]
    count = (search.left - len(search.held_out)) // len(rows)
    search.require(len(rows) + len(search.held_out), "one set")
    sets = draw_sets(search, count, size)
    losses = search.mean(search.losses(sets, rows), rows)
    best = losses.argmin()
    search.validate(sets[best], losses[best])
    return sets[best], association(sets, losses)


def draw_sets(search: Search, count: int, size: int | None = None) -> torch.Tensor:
    """Random sets: bool [set, unit], of one size or of sizes from 0 to all."""
    if size is not None and not 0 <= size <= search.units:
        raise ValueError(f"size={size} is not a number of units from 0 to {search.units}.")
    ranks = torch.rand(count, search.units, generator=search.generator).argsort(1).argsort(1)
    sizes = torch.randint(0, search.units + 1, (count, 1), generator=search.generator) if size is None else size
    return ranks < sizes


def association(sets: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Mean loss without a unit less the mean loss with it, over sets [set, unit] and losses [set]: [unit]; 0 for units
    that all or none of the sets have."""
    having, total = sets.double().sum(0), len(sets)
    with_unit = losses @ sets.double() / having.clamp(min=1)
    without = losses @ (~sets).double() / (total - having).clamp(min=1)
    return torch.where((having > 0) & (having < total), without - with_unit, 0.0)
