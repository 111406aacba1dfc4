"""`capture`: the activations of a run, as they are where it is called. The twin of `patch`.

>>> with model.trace(prompts):
...     activations = capture(model)
...     logits = model.output.logits.save()
>>> with model.trace(others):
...     patch(model, activations, units)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nnsight import save

from vtv_nnsight.models import inside_trace
from vtv_nnsight.models.interface import HEADS, ByStage, InContextModel, Stage
from vtv_nnsight.models.nnsight_remote import OURS, PLAIN
from vtv_nnsight.models.nnsight_verbs import CallingBlock
from vtv_nnsight.models.sites import Layers, list_layers, read_layers, running_layout
from vtv_nnsight.vectors.collecting import put_rows
from vtv_nnsight.vectors.compatibility import fingerprint, geometry, sent
from vtv_nnsight.vectors.values import Activations, TaskVector, TaskVectors


def capture(
    model: InContextModel,
    sites: str | Sequence[str] = HEADS,
    stages: str | Sequence[str] | None = None,
    layers: Layers | None = None,
    *,
    steps: str = "first",
) -> Activations | list[Activations]:
    """The activations of a run, inside `trace`, `generate` or an invoke; they are there after the block.

    They are copies of what the model computes, with the edits and patches of the lines above and without those below.
    Call it in any order with `patch`, as often as you like. After a `loss.backward()`, in the block or after it,
    `activations.grad` has their gradients.

    Args:
        model: The model that is traced.
        sites: "heads", "attn", "mlp", "residual", or several of them (see `models.sites`).
        stages: Names of stages; None is all, or those that `layers` names.
        layers: Numbers of layers where there is one stage, else by stage: {"decoder": [0, 2]}. The others are NaN.
        steps: "first": the first forward of the traced call. "all": each of its forwards, for a list of them.

    Returns:
        Activations, by stage and site [row, layer, position, head, head_dim]; NaN where a row has no such position. In
        a scan they are shapes alone, on the device "meta". With steps="all", a list of them.

    Raises:
        ValueError: when the model has no such site, stage or layer; outside a block, or inside `edit`, which gives
            nothing back; or when the model has run past the first of the layers.
    """
    block = CallingBlock("capture", model, "with model.trace(prompts): activations = capture(model)")
    if block.is_edit:
        raise ValueError("capture in an edit gives nothing back; write it in a trace of the edited model.")
    places = list_layers(model, sites, stages, layers)
    owner = fingerprint(model, running_layout(block), cached=True)
    captured = [Activations(ByStage(), owner)]

    def keep(step: int, stage: Stage, layer: int, z: torch.Tensor, seen: torch.Tensor) -> None:
        if step == len(captured):
            captured.append(Activations(ByStage(), owner))
        put_rows(captured[step].values, stage, layer, z, seen, model.layout.num_positions)

    def keep_gradient(step: int, stage: Stage, layer: int, slope: torch.Tensor, seen: torch.Tensor) -> None:
        captured[step].add_gradient(stage.key, layer, slope, seen)

    read_layers(model, places, keep, gradients=keep_gradient, block=block, steps=steps)
    result: Activations | list[Activations] = save(captured if steps == "all" else captured[0])
    return result


def zero_vector(model: InContextModel, sites: Sequence[str] = (HEADS,), layout: Any = None) -> TaskVector:
    """Zeros at every position of a layout, by default the model's: what ablation by zero patches in."""
    places, zero = (layout or model.layout).num_positions, torch.zeros(())
    stages = [stage.at(site) for stage in model.stages for site in sites]
    mean = ByStage({s.key: zero.expand(s.layers, places, s.heads, s.head_dim) for s in stages})
    return TaskVector("zero", mean, None, 0, geometry(model))


def _fetched(model: Any, captured: Mapping[str, Any]) -> Activations:
    """Ours, of what was captured where the model runs."""
    values, lengths = ByStage(), None if model.sent is None else model.lengths(model.sent)
    for site, layers in captured.items():
        for layer, z in layers.items() if site != inside_trace.CAPTURED else ():
            seen = torch.arange(z.shape[1])
            if lengths is not None and len(lengths) == len(z):
                seen = torch.where(seen < lengths[:, None], seen, -1)
            put_rows(values, model.stages[0].at(site), layer, z, seen, model.layout.num_positions)
    return Activations(values, fingerprint(model, model.sent and model.sent.layout, cached=True))


PLAIN[TaskVector] = PLAIN[Activations] = lambda vector: sent(vector.label, vector.fingerprint, vector.values)
PLAIN[TaskVectors] = dict
PLAIN[capture] = lambda _: inside_trace.capture
OURS[inside_trace.CAPTURED] = _fetched
