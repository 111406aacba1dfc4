"""The heads that tell the tasks apart best."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vtv_nnsight.search.budget import Search
from vtv_nnsight.search.registry import algorithm


@algorithm("the task score of each unit, the top units")
def ranking(
    search: Search,
    *,
    scores: Mapping[str, torch.Tensor] | torch.Tensor | None = None,
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
            raise TypeError(
                "ranking needs scores, or the vectors of two tasks or more (vectors=…) to compute them from."
            )
        scores = search.vectors.score()
    if not isinstance(scores, torch.Tensor):
        scores = search.objective.space.average(scores)
    if scores.shape != (search.units,):
        raise ValueError(f"scores of shape {list(scores.shape)} are not one for each of {search.units} units.")
    scores = scores.cpu().double()
    order = scores.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    return search.top_units(order, size, tolerance), scores
