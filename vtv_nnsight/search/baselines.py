"""Searches that read losses alone, or none, and learn nothing: what any other must beat."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vtv_nnsight.models.interface import StageSite
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


@algorithm("the task score of each unit, the top units")
def ranking(
    search: Search,
    *,
    scores: Mapping[StageSite, torch.Tensor] | torch.Tensor | None = None,
    size: int | None = None,
    tolerance: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top units by task score (ECCV 2024, §4.2): the only search that needs no evaluation to rank.

    Args:
        scores: What `TaskVectors.score` gives, [layer, head, position] by stage, averaged here over each unit's
            positions; or one score for each unit, [unit]. None scores the `vectors` that the search is given.
        size: Units to keep; None tries sizes on the training prompts (`Search.top_units`).
        tolerance: How much worse a smaller set may be, in standard errors of the paired difference.

    Raises:
        TypeError: with neither scores nor vectors.
        ValueError: when the vectors are of a single task, or the scores are not one for each unit.
    """
    if scores is None:
        if search.vectors is None:
            raise TypeError("ranking needs scores, or vectors= of two tasks or more to compute them from.")
        scores = search.vectors.score()
    by_unit: torch.Tensor = scores if isinstance(scores, torch.Tensor) else search.objective.space.average(scores)
    if by_unit.shape != (search.units,):
        raise ValueError(f"scores of shape {list(by_unit.shape)} are not one for each of {search.units} units.")
    by_unit = by_unit.cpu().double()
    order = by_unit.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    return search.top_units(order, size, tolerance), by_unit
