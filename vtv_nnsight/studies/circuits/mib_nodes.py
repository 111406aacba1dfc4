"""Rankings of heads as MIB's circuits are written: a graph of nodes by name, with scores, which `Graph.from_json` of
EAP-IG reads (code hannamw/MIB-circuit-track and hannamw/EAP-IG)."""

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
_INPUTS = {"a": ("<q>", "<k>", "<v>"), "m": ("",)}
"""What an edge says of the input of a head or an MLP that it ends in."""


def by_head(space: PatchSpace, scores: torch.Tensor) -> torch.Tensor:
    """The scores of whole heads, [head unit] in the order of a space of granularity "head": sums over a head's units,
    as first-order effects add up."""
    parts = space.split(torch.as_tensor(scores, dtype=torch.float64))
    return torch.cat([part.nan_to_num().sum(-1).flatten() for part in parts.values()])


def write_nodes(path: str | Path, space: PatchSpace, scores: torch.Tensor, circuit: PatchSet | None = None) -> None:
    """Write `nodes` as the JSON of a graph: cfg (layers, heads, width), nodes and edges.

    Nodes have the names that they have here beside MIB's. Those that the space has not (the input, the logits, MLPs of
    a space of heads) are in the graph without a score, which keeps them there. Edges are those between nodes in the
    graph; they are not scored, so that rankings of it are by node (`apply_topn(n, level="node")`). Where a stage has
    fewer heads than another, the heads that it lacks are no nodes of the file.
    """
    pairs = zip(nodes(space, scores, circuit).items(), space.names)
    labelled = {name: node | {"label": label} for (name, node), label in pairs}
    heads = [
        space.fingerprint[f"{s.name} heads"]
        for s in {s.name: s for s in space.stages}.values()
        for _ in range(s.layers)
    ]
    graph = {"input": {"in_graph": True}}
    stream, edges = ["input"], []
    for layer, count in enumerate(heads):
        for names in ([_NODES["heads"].format(layer=layer, head=head) for head in range(count)], [f"m{layer}"]):
            graph |= {name: labelled.get(name, {"in_graph": True}) for name in names}
            read = [end + inputs for end in names if graph[end]["in_graph"] for inputs in _INPUTS[end[0]]]
            edges += [f"{start}->{end}" for start in stream for end in read]
            stream += [name for name in names if graph[name]["in_graph"]]
    edges += [f"{start}->logits" for start in stream]
    content = {
        "cfg": {
            "n_layers": len(heads),
            "n_heads": max(heads),
            "parallel_attn_mlp": False,
            "d_model": max(stage.width for stage in space.stages),
        },
        "nodes": graph | {"logits": {"in_graph": True}},
        "edges": {name: {"score": 0.0, "in_graph": True} for name in edges},
    }
    write_text(path, json.dumps(content) + "\n")
