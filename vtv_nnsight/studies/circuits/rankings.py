"""The rankings of units that are compared: what each search algorithm scores them by.

    >>> objective = search.Objective(model, vector, task, prompts.query_only(), space)
    >>> scores = rank_units("integrated gradients", objective, "in", budget=1000, seed=0)
    >>> curves = faithfulness(model, vector, test_prompts, space, {"integrated gradients": scores}, measure)

For direction "out", the objective patches what ablates into the whole prompt: zeros, the mean over tasks, or the
activations under another task's example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vtv_nnsight.search import ALGORITHMS
from vtv_nnsight.search.budget import SearchObjective
from vtv_nnsight.studies.circuits.nearest_centroid import centroid_accuracy
from vtv_nnsight.vectors import Activations, TaskVectors


@dataclass(frozen=True)
class Ranking:
    """One way to score units.

    Args:
        description: What a unit's score is, in a few words.
        algorithm: The name of the search.
        options: Its own.
        signed: Whether a score tells harm from help; some tell only that a unit matters.
        keeps: Whether it looks for a set, of the units to keep; the others score units one by one, by what is lost by
            ablating each.
    """

    description: str
    algorithm: str
    options: Mapping[str, Any] = field(default_factory=dict)
    keeps: bool = False
    signed: bool = True


RANKINGS = {
    "attribution": Ranking("gradient x (what is patched - activation), where nothing is patched", "attribution"),
    "integrated gradients": Ranking("the same, averaged on the way to everything patched", "attribution", {"steps": 5}),
    "GradDrop": Ranking(
        "the mean absolute gradient without each layer's (AtP*)", "attribution", {"drop": True}, signed=False
    ),
    "consistent attribution": Ranking(
        "integrated gradients where 95 % of bootstrap samples of the prompts agree on the sign, else 0",
        "consistent_attribution",
    ),
    "gates": Ranking("the probability that its gate is not shut", "gates", keeps=True),
    "gates from attribution": Ranking("the same", "gates", {"start": "attribution"}, keeps=True),
    "reinforce": Ranking("the probability of being in the set", "reinforce", {"prune": False}, keeps=True),
    "mediation": Ranking("what it does alone", "mediation"),
    "between/within variance": Ranking("its task score, which asks for no loss", "ranking"),
    "nearest centroid": Ranking("how often it tells a prompt's task (`centroid_accuracy`)", "ranking"),
    "random": Ranking("chance", "random"),
}
"""Name → ranking. "random" is no search, but scores drawn by chance."""


def rank_units(
    name: str,
    objective: SearchObjective,
    direction: str = "in",
    *,
    budget: int | None = None,
    seed: int = 0,
    vectors: TaskVectors | None = None,
    activations: Mapping[str, Activations] | None = None,
    **shared: Any,
) -> torch.Tensor:
    """The score of every unit, high where it matters: [unit].

    Args:
        name: One of `RANKINGS`.
        objective: The loss of patched units; "in": patched with the vector into the query alone, "out": patched with
            what ablates into the whole prompt.
        direction: "in" or "out", see `faithfulness`.
        budget, seed, vectors, **shared: As for every search.
        activations: Of "nearest centroid": task → those of its prompts, one-shot.

    Raises:
        ValueError: when there is no such ranking, or its activations are missing.
    """
    if name not in RANKINGS:
        raise ValueError(f"ranking {name!r} is unknown; choose from {', '.join(RANKINGS)}.")
    ranking, units = RANKINGS[name], len(objective.space)
    if ranking.algorithm == "random":
        return torch.rand(units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    algorithm, options = ALGORITHMS[ranking.algorithm], dict(ranking.options)
    if algorithm.takes_size:
        options["size"] = units // 2  # trying sizes is no part of ranking
    if name == "nearest centroid":
        options["scores"] = centroid_accuracy(activations or {}, objective.space)
    settings = dict(budget=budget, seed=seed, vectors=vectors, **shared, **options)
    if direction == "in" or algorithm.needs_scores or not ranking.signed:
        return algorithm.on(objective, **settings).scores
    if ranking.keeps:
        return algorithm.on(ComplementObjective(objective), **settings).scores
    return -algorithm.on(objective, **settings).scores  # how far the loss rises when the unit is ablated


class ComplementObjective:
    """An objective asked by the units that stay: all others are patched, and so ablated. A `SearchObjective`."""

    def __init__(self, objective: Any) -> None:
        self.objective, self.space = objective, objective.space
        self.train, self.held_out, self.group = objective.train, objective.held_out, objective.group
        if hasattr(objective, "stride"):
            self.stride = objective.stride
        self.fingerprint = getattr(objective, "fingerprint", {}) | {"choices": "kept units"}

    def __call__(self, choices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Losses [row] of the sets that stay, [row, unit]."""
        return self.objective(~choices, rows)

    def gradient(self, gates: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [row] and gradients [row, unit] at gates from 0 (ablated) to 1 (as it is)."""
        losses, gradients = self.objective.gradient(1 - gates, rows)
        return losses, -gradients
