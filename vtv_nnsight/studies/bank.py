"""Several vectors for a task: the search chooses what to patch as well as where.

A mean over prompts may lie between what a head says of two kinds of prompts, and be neither. So each unit's activations
on single prompts are clustered, and a search picks one of a unit's centres, or none (after Ma et al., *Where and What
Matters: Sensitivity-Aware Task Vectors*, AAAI 2026, arXiv 2511.08246):

    >>> run = Activations.collect(model, prompts)
    >>> bank = cluster_vectors(run, space, count=3)
    >>> objective = BankObjective(model, bank, task, prompts.query_only(), space)
    >>> result = search.gates.on(objective, budget=4000)
    >>> condition = Condition(vectors=bank, patches=objective.sets(result.patches))
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from scipy.cluster.vq import kmeans2

from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.patching import PatchSet, PatchSpace, patch
from vtv_nnsight.patching.forward import Edit
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.search.objective import Objective
from vtv_nnsight.search.result import NamedUnits
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import Activations, TaskVector


def cluster_vectors(run: Activations, space: PatchSpace, count: int, seed: int = 0) -> list[TaskVector]:
    """The centres of every unit's activations on single prompts, by k-means: `count` vectors, the i-th of which has
    every unit's i-th centre, from the largest cluster to the smallest, and the mean over prompts outside the units.

    Args:
        run: The activations of the task's prompts.
        space: The units.
        count: Clusters of a unit.
        seed: Of k-means.

    Raises:
        ValueError: with fewer prompts than clusters.
    """
    if not 1 <= count <= len(run):
        raise ValueError(f"count={count} clusters cannot be made of {len(run)} prompts; give 1 to {len(run)}.")
    means = [run.values.map(lambda values: values.float().mean(0)) for _ in range(count)]
    for stage in space.stages:
        values = run.values[stage.key].float()
        for places in space.groups[stage.key].values():
            at = places[run.present[stage.key][places]]
            for layer in range(stage.layers):
                for head in range(stage.heads):
                    rows = values[:, layer, at, head].flatten(1)
                    for mean, centre in zip(means, _centres(rows, count, seed)):
                        mean[stage.key][layer, at, head] = centre.view(len(at), -1)
    return [TaskVector(f"cluster {i + 1}", mean, None, len(run), run.fingerprint) for i, mean in enumerate(means)]


def _centres(rows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """The centres of rows [row, dim], those of the most rows first: [count, dim]. Where rows are too alike for so many
    clusters, some centres are the mean."""
    mean = rows.mean(0).expand(count, -1).clone()
    if count == 1 or len(rows.unique(dim=0)) < count:
        return mean
    _, labels = kmeans2(rows.double().numpy(), count, minit="++", seed=seed, missing="warn")
    labels = torch.from_numpy(labels).long()
    sizes = torch.bincount(labels, minlength=count)
    for place, label in enumerate(sizes.argsort(descending=True, stable=True).tolist()):
        if sizes[label]:
            mean[place] = rows[labels == label].mean(0)
    return mean


class BankObjective(Objective):
    """The loss of sets of (unit, vector) pairs. Where a unit is chosen with several vectors, the last one stands.

    Args:
        model, task, prompts, space, **settings: As for `Objective`, of one task.
        bank: The vectors.

    Attributes:
        units: The space given; `space` has its units once for each vector.

    Raises:
        ValueError: as `Objective` does, and when the bank is empty.
    """

    def __init__(
        self,
        model: InContextModel,
        bank: Sequence[TaskVector],
        task: Task,
        prompts: VisualPrompt,
        space: PatchSpace,
        **settings: Any,
    ) -> None:
        if not bank:
            raise ValueError("there are no vectors in this bank; give at least one.")
        super().__init__(model, bank[0], task, prompts, space, **settings)
        self.vectors = [vector.to(self._truth.device) for vector in bank]
        self.units, self.late = space, None
        self._prefixes.before = {}  # which knows units, not pairs
        names = [f"{name} = {vector.task}" for vector in bank for name in space.names]
        self.space = NamedUnits(names, space.fingerprint | {"bank": [vector.task for vector in bank]})

    def sets(self, pairs: PatchSet) -> list[PatchSet]:
        """A set of pairs as a set of units for each vector, no unit twice: what goes with the bank in a `Condition`."""
        choices = self._split(pairs.choices)
        later = choices.flip(-2).cumsum(-2).flip(-2) - choices.long() > 0
        return [PatchSet(self.units, one) for one in choices & ~later]

    def _split(self, choices: torch.Tensor) -> torch.Tensor:
        """[..., pair] → [..., vector, unit]."""
        return choices.unflatten(-1, (len(self.vectors), len(self.units)))

    def _edit(self, choices: torch.Tensor, rows: torch.Tensor, left: Any = None) -> Edit:
        masks = [self.units.mask(part) for part in self._split(choices).unbind(-2)]
        return partial(patch, vector=self.vectors, patches=masks)
