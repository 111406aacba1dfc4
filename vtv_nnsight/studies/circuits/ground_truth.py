"""How well a ranking finds a circuit that is known.

A search that is right on a model with an unknown circuit cannot be told from one that is merely consistent. In a
`known_circuit.KnownCircuit` every head attends and speaks, and only the chosen ones are listened to, as the output
projection has no weights for the others. (InterpBench, arXiv 2407.14494, trains such models.)

    >>> model = KnownCircuit(seed=0)
    >>> scores = rank_units("integrated gradients", objective, "out", budget=500)
    >>> auroc(scores, model.circuit(space))
"""

from __future__ import annotations

import torch
from scipy.stats import mannwhitneyu


def auroc(scores: torch.Tensor, truth: torch.Tensor) -> float:
    """The chance that a unit of the circuit is scored higher than one that is not, ties counting half: 0.5 by chance, 1
    when the circuit comes first. It is of whole rankings; MIB's is the area under the line through the rates of true
    and false edges at its ten sizes of circuits.

    Args:
        scores: [unit]; NaN is lowest.
        truth: Bool [unit].

    Raises:
        ValueError: when all units or none are of the circuit.
    """
    inside = int(truth.sum())
    if not 0 < inside < len(truth):
        raise ValueError(f"{inside} of {len(truth)} units are of the circuit; a ranking needs some on both sides.")
    ranked = scores.nan_to_num(-torch.inf).numpy()
    return float(mannwhitneyu(ranked[truth], ranked[~truth]).statistic / (inside * (len(truth) - inside)))
