"""Units by how well they tell tasks apart: the accuracy of a nearest-centroid classifier at each.

>>> activations = {name: Activations.collect(model, rows) for name, rows in prompts.items()}
>>> result = search.ranking(model, vector, task, queries, space, scores=centroid_accuracy(activations, space))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.vectors import Activations


def centroid_accuracy(activations: Mapping[str, Activations], space: PatchSpace) -> torch.Tensor:
    """How often a prompt's activation at a unit is nearest, by cosine, to the mean of its task's other prompts: [unit],
    the mean over tasks of the share of their prompts. So sparse attention vectors rank heads (Mitra et al., 2024,
    arXiv 2412.00142); an activation is the mean over the unit's positions.

    Args:
        activations: Task → those of its prompts, one-shot.
        space: The units.

    Raises:
        ValueError: with fewer than two tasks, or a task of fewer than two prompts.
    """
    if len(activations) < 2 or min(map(len, activations.values())) < 2:
        counts = ", ".join(f"{len(rows)} of {task}" for task, rows in activations.items())
        raise ValueError(
            f"prompts of two tasks or more are told apart, two or more of each; given: {counts or 'none'}."
        )
    parts = []
    for key, groups in space.groups.items():
        regions = [
            _accuracy([rows.values[key][:, :, members].nanmean(2) for rows in activations.values()])
            for members in groups.values()
        ]
        parts += [torch.stack(regions, dim=-1).flatten()] if regions else []
    return torch.cat(parts)


def _accuracy(tasks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of the activations of every task, [row, layer, head, head_dim]: [layer, head]."""
    means, right = torch.stack([rows.mean(0) for rows in tasks]), []
    for number, rows in enumerate(tasks):
        centroids = means.expand(len(rows), *means.shape).clone()
        centroids[:, number] = (rows.sum(0) - rows) / (len(rows) - 1)
        nearest = torch.cosine_similarity(centroids, rows[:, None], dim=-1).argmax(1)
        right.append((nearest == number).double().mean(0))
    return torch.stack(right).mean(0)
