"""Faithfulness: how much of what the model does is done by the units that a ranking puts first.

    >>> found = search.attribution(model, vectors["segmentation"], task, prompts.query_only(), space)
    >>> curves = faithfulness(
    ...     model, vectors["segmentation"], prompts, space, {"attribution": found.scores, "random": draws},
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

import numpy as np
import torch

from vtv_nnsight.circuits.curves import SIZES, Curves
from vtv_nnsight.circuits.measures import Measure
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.patches import PatchSpace, patch
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.stages import device_of
from vtv_nnsight.vectors import TaskVector

DIRECTIONS = ("in", "out")
ORDERS = ("signed", "absolute")
"""Units are ranked by their scores, or by the scores' absolute values; MIB reports both, since results differ."""


def faithfulness(
    model: InContextModel,
    vector: TaskVector,
    prompts: VisualPrompt,
    space: PatchSpace,
    rankings: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
    measure: Measure,
    *,
    direction: str = "in",
    sizes: Sequence[float] = SIZES,
    orders: Sequence[str] = ORDERS,
    batch_size: int = 32,
    progress: bool = True,
) -> Curves:
    """The faithfulness curves of rankings, on the same prompts.

    Args:
        model: The model, on its device and in its dtype.
        vector: "in": what is patched in, the task's vector. "out": what takes the place of the units that are ablated,
            such as `vectors.zero_vector(model)` or `vectors.mean()`.
        prompts: One-shot, with the truth in their output cells; "in" shows their queries alone.
        space: The units. "out" ablates what the space names and leaves the rest, so that its groups should hold the
            example's cells, too (granularity "cell").
        rankings: Name → a score for each unit [unit], high where it matters; or several, one for each seed.
        measure: m, of these very prompts.
        direction: "in" or "out".
        sizes: Shares of the units, in (0, 1].
        orders: "signed", "absolute", or both.
        batch_size: Rows of a trace.

    Raises:
        ValueError: for an unknown direction or order, shares out of range, or scores that are not one for each unit.
    """
    if direction not in DIRECTIONS or not set(orders) <= set(ORDERS):
        raise ValueError(
            f"direction={direction!r} with orders={list(orders)} is unknown; choose a direction from "
            f"{', '.join(DIRECTIONS)} and orders from {', '.join(ORDERS)}."
        )
    if not sizes or not all(0 < size <= 1 for size in sizes):
        raise ValueError(f"sizes={list(sizes)} are not shares of the units; give numbers above 0, up to 1.")
    ranked = _orders(rankings, orders, len(space))
    counts = [round(size * len(space)) for size in sizes]
    nothing, everything = (torch.full((len(space),), value) for value in (False, True))
    sets = {_key(chosen): chosen for chosen in (nothing, everything)}
    for order in ranked.values():
        sets |= {_key(chosen): chosen for chosen in _prefixes(order, counts)}
    device = device_of(model)
    shown = (prompts if direction == "out" else prompts.query_only()).to(device)
    values = dict(zip(sets, _values(model, vector.to(device), shown, space, list(sets.values()), measure, direction,
                                    batch_size, progress)))  # fmt: skip
    if direction == "out":
        full = values[_key(everything)]
    else:
        (full,) = _values(model, vector.to(device), prompts.to(device), space, [nothing], measure, direction,
                          batch_size, progress=False)  # fmt: skip
    kept = {
        name: np.stack([values[_key(chosen)] for chosen in _prefixes(order, counts)])
        for name, order in ranked.items()
    }
    return Curves(direction, measure.name, tuple(sizes), tuple(counts), full, values[_key(nothing)], kept)


def _orders(
    rankings: Mapping[str, torch.Tensor | Sequence[torch.Tensor]], orders: Sequence[str], units: int
) -> dict[tuple[str, str, int], torch.Tensor]:
    """(ranking, order, seed) → unit numbers, the first first. A score that is NaN comes last."""
    found = {}
    for name, scores in rankings.items():
        for seed, one in enumerate([scores] if isinstance(scores, torch.Tensor) else scores):
            if one.shape != (units,):
                raise ValueError(f"the scores of {name!r} have shape {list(one.shape)}; expected [{units}].")
            for order in orders:
                key = one.abs() if order == "absolute" else one
                found[name, order, seed] = key.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
    return found


def _prefixes(order: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    return [torch.zeros(len(order), dtype=torch.bool).index_fill(0, order[:count], True) for count in counts]


def _key(chosen: torch.Tensor) -> bytes:
    return chosen.numpy().tobytes()


@torch.no_grad()
def _values(
    model: InContextModel,
    vector: TaskVector,
    prompts: VisualPrompt,
    space: PatchSpace,
    sets: Sequence[torch.Tensor],
    measure: Measure,
    direction: str,
    batch_size: int,
    progress: bool = True,
) -> list[np.ndarray]:
    """m of every prompt under every set: an array [prompt] for each set. Every row of a batch has a set of its own."""
    choices, device = torch.stack(list(sets)), prompts.device
    patched = ~choices if direction == "out" else choices
    which = torch.arange(len(sets)).repeat_interleave(len(prompts))
    rows = torch.arange(len(prompts)).repeat(len(sets))
    values = []
    with progress_bar(total=len(rows), unit="answer", disable=not progress) as bar:
        for own, at in zip(which.split(batch_size), rows.split(batch_size)):
            batch = prompts[at.to(device)]
            mask, answered = space.mask(patched[own].to(device)), batch
            with model.trace(batch):
                patch(model, vector, mask)
                if measure.narrows:
                    answered = model.narrow(batch).save()
                output = model.output.save()
            values.append(measure.value(output, answered, at.to(device)).double().cpu())
            bar.update(len(at))
    return list(torch.cat(values).view(len(sets), len(prompts)).numpy())
