"""The heads that tell the tasks apart best."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vtv_nnsight.search.algorithm import Run, algorithm


@algorithm
def ranking(
    run: Run, *, scores: Mapping[str, torch.Tensor] | torch.Tensor, size: int | None = None, tolerance: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top units by task score (ECCV 2024, §4.2): the only search that needs no evaluation to rank.

    Args:
        scores: `vectors.score()`, by stage [layer, head, position], averaged here over each unit's positions; or one
            score for each unit [unit].
        size: Units to keep; None tries sizes on the training prompts (`Run.cut`).
        tolerance: How much worse a smaller set may be, in standard errors of the paired difference.
    """
    if isinstance(scores, Mapping):
        scores = run.objective.space.average(scores)
    if scores.shape != (run.units,):
        raise ValueError(f"scores of shape {list(scores.shape)} are not one for each of {run.units} units.")
    scores = scores.double().cpu()
    order = scores.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    return run.cut(order, size, tolerance), scores
