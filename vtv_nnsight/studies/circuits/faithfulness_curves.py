"""Faithfulness: how much of what the model does is done by the units that a ranking puts first.

    >>> result = search.attribution(model, vectors["segmentation"], task, prompts.query_only(), space)
    >>> curves = faithfulness(
    ...     model, vectors["segmentation"], prompts, space, {"attribution": result.scores, "random": draws},
    ...     answer_loss(model, prompts),
    ... )
    >>> print(curves.summary())                      # CPR and CMD, with intervals
    >>> circuits.plots.draw([curves])

After MIB (Mueller et al., *MIB: A Mechanistic Interpretability Benchmark*, 2025, arXiv 2504.13151, §3): the first share
k of the units is kept, and f(k) = (m_k − m_∅) / (m_full − m_∅), where m_full is the whole model's, one-shot, and m_∅
what is left without any unit. Two directions:

- "in": the query alone, the vector patched in at the first units. m_∅ is the query with nothing patched. Nothing says
  that everything patched is as good as an example, so f(100 %) tells something, too.
- "out": the whole prompt; the first units are as they are, all others are ablated. m_∅ has all ablated; f(100 %) = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vtv_nnsight.digests import tensor_digest
from vtv_nnsight.finite import WHERE, check_finite
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import InContextModel, batch_size_of
from vtv_nnsight.patching import PatchSpace, patch
from vtv_nnsight.patching.forward import forward
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.search.budget import prefixes
from vtv_nnsight.search.journal import Journal
from vtv_nnsight.studies.circuits.curves import SIZES, Curves
from vtv_nnsight.studies.circuits.measures import Measure
from vtv_nnsight.vectors import Activations, TaskVector
from vtv_nnsight.vectors.compatibility import fingerprint

DIRECTIONS = ("in", "out")
ORDERS = ("signed", "absolute")
"""Units are ranked by their scores, or by the scores' absolute values; MIB reports both, since results differ."""


def faithfulness(
    model: InContextModel,
    vector: TaskVector | Activations,
    prompts: VisualPrompt,
    space: PatchSpace,
    rankings: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
    measure: Measure | Sequence[Measure],
    *,
    direction: str = "in",
    sizes: Sequence[float] = SIZES,
    orders: Sequence[str] = ORDERS,
    batch_size: int | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Curves | list[Curves]:
    """The faithfulness curves of rankings, on the same prompts.

    Args:
        model: The model, on its device and in its dtype.
        vector: "in": what is patched in, the task's vector. "out": what takes the place of the units that are ablated,
            such as `vectors.zero_vector(model)`, `vectors.mean()`, or `Activations` with a row for each prompt, those
            of `counterfactual` prompts.
        prompts: One-shot, with the truth in their output cells; "in" shows their queries alone.
        space: The units. "out" ablates what the space names and leaves the rest, so that its groups should hold the
            example's cells, too (granularity "cell").
        rankings: Name → a score for each unit [unit], high where it matters; or several, one for each seed.
        measure: m, of these very prompts; or several, which share the forwards.
        direction: "in" or "out".
        sizes: Shares of the units, in (0, 1].
        orders: "signed", "absolute", or both.
        batch_size: Rows of a trace; None is `models.interface.default_batch_size`, 32 for MAE-VQGAN.
        resume: A file that keeps the answers; a run that finds it goes on where it stopped.

    Returns:
        Curves of the measure, or a list of them for several.

    Raises:
        ValueError: for an unknown direction or order, shares out of range, scores that are not one for each unit,
            activations that are not one for each prompt, or a file of another run.
    """
    if direction not in DIRECTIONS or not set(orders) <= set(ORDERS):
        raise ValueError(
            f"direction={direction!r} with orders={list(orders)} is unknown; choose a direction from "
            f"{', '.join(DIRECTIONS)} and orders from {', '.join(ORDERS)}."
        )
    if not sizes or not all(0 < size <= 1 for size in sizes):
        raise ValueError(f"sizes={list(sizes)} are not shares of the units; give numbers above 0, up to 1.")
    if isinstance(vector, Activations) and len(vector) != len(prompts):
        raise ValueError(f"activations of {len(vector)} prompts were given for {len(prompts)}; give a row for each.")
    measures = [measure] if isinstance(measure, Measure) else list(measure)
    ranked = _orders(rankings, orders, len(space))
    counts = [int(size * len(space)) for size in sizes]  # the floor, as MIB has it
    nothing, everything = (torch.full((len(space),), value) for value in (False, True))
    sets = {_key(choices): choices for choices in (nothing, everything)}
    for order in ranked.values():
        sets |= {_key(choices): choices for choices in prefixes(order, len(space), counts)}
    prompts = prompts.to(device_of(model))
    vector = vector if isinstance(vector, Activations) else vector.to(device_of(model))
    asked = _Asked(model, vector, space, measures)
    journal = Journal(resume, asked.settings(prompts) | {"direction": direction})
    total = len(prompts) * (len(sets) + (direction == "in"))
    with progress_bar(total=total, desc=f"curves, {direction}", unit="answer", disable=not progress) as bar:
        answers = partial(asked.values, batch_size_of(model, batch_size), journal, bar)
        if direction == "out":
            values = dict(zip(sets, answers(prompts, [~choices for choices in sets.values()])))
            full = values[_key(everything)]
        else:
            values = dict(zip(sets, answers(prompts.query_only(), list(sets.values()))))
            full = answers(prompts, [nothing])[0]
    curves, shared = [], np.stack([numbers.numpy() for numbers in prompts.factors.values()], axis=1)
    for i, part in enumerate(measures):
        kept = {
            name: np.stack([values[_key(choices)][i] for choices in prefixes(order, len(space), counts)])
            for name, order in ranked.items()
        }
        empty = values[_key(nothing)][i]
        curves.append(Curves(direction, part.name, tuple(sizes), tuple(counts), full[i], empty, kept, shared))
    return curves[0] if isinstance(measure, Measure) else curves


def _orders(
    rankings: Mapping[str, torch.Tensor | Sequence[torch.Tensor]], orders: Sequence[str], units: int
) -> dict[tuple[str, str, int], torch.Tensor]:
    """(ranking, order, seed) → unit numbers, the first first. A score that is NaN comes last."""
    ranked = {}
    for name, scores in rankings.items():
        for seed, values in enumerate([scores] if isinstance(scores, torch.Tensor) else scores):
            if values.shape != (units,):
                raise ValueError(f"the scores of {name!r} have shape {list(values.shape)}; expected [{units}].")
            for order in orders:
                key = values.abs() if order == "absolute" else values
                ranked[name, order, seed] = key.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
    return ranked


def _key(choices: torch.Tensor) -> bytes:
    return choices.numpy().tobytes()


class _Asked(NamedTuple):
    """What is asked of prompts under sets that are patched."""

    model: InContextModel
    vector: TaskVector | Activations
    space: PatchSpace
    measures: Sequence[Measure]

    def values(
        self, batch_size: int, journal: Journal, bar: Any, prompts: VisualPrompt, sets: Sequence[torch.Tensor]
    ) -> list[np.ndarray]:
        """m of every prompt under every set: arrays [measure, prompt]."""
        values = []
        which = torch.arange(len(sets)).repeat_interleave(len(prompts))
        numbers = torch.arange(len(prompts)).repeat(len(sets))
        for part, rows in zip(which.split(batch_size), numbers.split(batch_size)):
            choices = torch.stack([sets[i] for i in part.tolist()])
            values.append(journal.answer((choices, rows), partial(self.measure, prompts)))
            bar.update(len(rows))
        return list(torch.cat(values).view(len(sets), len(prompts), -1).mT.numpy())

    @torch.no_grad()
    def measure(self, prompts: VisualPrompt, choices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """All measures of the prompts of numbers `rows`, each patched with its own set: float64 [row, measure]."""
        device, vector = device_of(self.model), self.vector
        vector = vector[rows].to(device) if isinstance(vector, Activations) else vector
        rows = rows.to(device)
        edit = partial(patch, vector=vector, patches=self.space.mask(choices.to(device)))
        restrict = all(measure.narrows for measure in self.measures)
        output, answered = forward(self.model, prompts[rows], edit, restrict=restrict)
        values = torch.stack([measure.value(output, answered, rows).double().cpu() for measure in self.measures], dim=1)
        check_finite(values, "a measure", WHERE)
        return values

    def settings(self, prompts: VisualPrompt) -> dict[str, Any]:
        """What the answers depend on, in words and digests (JSON values)."""
        compared = [tensor for measure in self.measures for tensor in measure.truths]
        return {
            "algorithm": "faithfulness",
            "measures": [measure.name for measure in self.measures],
            "model": fingerprint(self.model),
            "data": [prompts.digest, tensor_digest(*self.vector.values.values(), *compared)],
            "space": self.space.fingerprint,
        }
