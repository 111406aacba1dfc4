"""Rankings of heads as MIB's circuits are written: nodes by name, with scores (code hannamw/MIB-circuit-track)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vtv_nnsight.files import write_text
from vtv_nnsight.patching import PatchSet, PatchSpace


def nodes(space: PatchSpace, scores: torch.Tensor, circuit: PatchSet | None = None) -> dict[str, dict[str, Any]]:
    """{"a0.h1": {"score": …, "in_graph": …}, "m0": …}: the heads and MLPs of all layers, which are counted through the
    stages: after an encoder of six layers, the decoder's first is layer 6.

    Args:
        space: Of granularity "head" and of sites "heads", "mlp" or both: MIB's nodes are whole heads and MLPs.
        scores: A number for each unit, [unit].
        circuit: The units that make the circuit; all of them by default.

    Raises:
        ValueError: when the units are not whole heads and MLPs, or scores are not one for each.
    """
    if space.granularity != "head":
        raise ValueError(f'units by {space.granularity} are not nodes of MIB; use a space of granularity="head".')
    if others := [site for site in space.sites if site not in _NODES]:
        raise ValueError(f"{', '.join(others)} is no node of MIB; use a space of sites {', '.join(_NODES)}.")
    if len(scores) != len(space):
        raise ValueError(f"{len(scores)} scores were given; expected one for each of {len(space)} units.")
    starts: dict[str, int] = {}
    total = 0
    for stage in space.stages:
        if stage.name not in starts:
            starts[stage.name], total = total, total + stage.layers
    places = [(starts[stage.name], _NODES[stage.site]) for stage in space.stages]
    return {
        places[stage][1].format(layer=places[stage][0] + layer, head=head): {
            "score": float(scores[i]),
            "in_graph": circuit is None or bool(circuit.choices[i]),
        }
        for i, (stage, layer, head, _) in enumerate(zip(*(part.tolist() for part in space.units)))
    }


_NODES = {"heads": "a{layer}.h{head}", "mlp": "m{layer}"}


def by_head(space: PatchSpace, scores: torch.Tensor) -> torch.Tensor:
    """The scores of whole heads, [head unit] in the order of a space of granularity "head": sums over a head's units,
    as first-order effects add up."""
    parts = space.split(torch.as_tensor(scores, dtype=torch.float64))
    return torch.cat([part.nan_to_num().sum(-1).flatten() for part in parts.values()])


def write_nodes(path: str | Path, space: PatchSpace, scores: torch.Tensor, circuit: PatchSet | None = None) -> None:
    """Write `nodes` as JSON, with the names that they have here beside MIB's."""
    pairs = zip(nodes(space, scores, circuit).items(), space.names)
    labelled = {name: node | {"label": label} for (name, node), label in pairs}
    write_text(path, json.dumps({"nodes": labelled}, indent=1) + "\n")
