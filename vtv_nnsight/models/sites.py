"""The sites of a layer: where activations are read and written inside a trace.

"heads" are the outputs of the attention's heads, before its output projection; "attn" is what the attention adds to the
residual stream, "mlp" what the MLP adds, and "residual" the stream as the layer leaves it. Values are [batch, token,
head, head_dim] at every site; those of whole layers have one head, as wide as the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from vtv_nnsight.models import inside_trace
from vtv_nnsight.models.interface import HEADS, SITES, InContextModel, Place, Stage
from vtv_nnsight.models.nnsight_verbs import CallingBlock, end_run, projection_of
from vtv_nnsight.prompts import Prompts
from vtv_nnsight.text import quoted

Layers = int | Sequence[int] | Mapping[str, int | Sequence[int]]
"""Numbers of layers, of a model of one stage, or by stage."""
Keep = Callable[[int, Stage, int, torch.Tensor, torch.Tensor], None]
"""Given the step of the run, the stage at a site, the layer, its activations [batch, token, head, head_dim], and their
positions [token] or [batch, token]."""


def validate_sites(model: InContextModel, sites: str | Sequence[str]) -> tuple[str, ...]:
    """Sites in the order in which a layer computes them.

    Raises:
        ValueError: when there are none, or the model lacks one, or has no stages at all.
    """
    if not model.stages:
        kind = type(model).__name__
        raise ValueError(f"{kind} has no heads to read or patch: it can be evaluated, and has no vectors or units.")
    names = list(sites) if isinstance(sites, Iterable) and not isinstance(sites, str) else [sites]
    known = (HEADS, *model.outputs(model.stages[0].name, 0))
    if not names or not all(name in known for name in names):
        raise ValueError(f"sites={quoted(names)} are not sites of this model; choose from {', '.join(known)}.")
    return tuple(site for site in SITES if site in names)


def validate_stages(model: InContextModel, stages: str | Sequence[str] | None) -> tuple[Stage, ...]:
    """Stages by their names, in the order in which they run; all of the model's for None.

    Raises:
        ValueError: when there are none, or the model lacks one.
    """
    known = [stage.name for stage in model.stages]
    names = known if stages is None else [stages] if isinstance(stages, str) else list(stages)
    if not names or not set(names) <= set(known):
        raise ValueError(f"stages={quoted(names)} are not stages of the model; choose from {', '.join(known)}.")
    return tuple(stage for stage in model.stages if stage.name in names)


def list_layers(
    model: InContextModel,
    sites: str | Sequence[str] = HEADS,
    stages: str | Sequence[str] | None = None,
    layers: Layers | None = None,
) -> list[tuple[Stage, int]]:
    """A stage at a site and a layer of it, for each that is asked for, in the order in which the model computes them.

    Args:
        model: The model.
        sites: One or several of `SITES`.
        stages: Names of stages; all, or those that `layers` names.
        layers: Numbers of layers where there is one stage, else by the stage's name; all of a stage that is not named.

    Raises:
        ValueError: when the model has no such site, stage or layer.
    """
    sites = validate_sites(model, sites)
    by_stage = layers if isinstance(layers, Mapping) else {}
    if by_stage:
        validate_stages(model, list(by_stage))
    captured = validate_stages(model, list(by_stage) if by_stage and stages is None else stages)
    if others := sorted(set(by_stage) - {stage.name for stage in captured}):
        raise ValueError(f"layers= names {', '.join(others)}, which stages={stages} leaves out; name the same stages.")
    if layers is not None and not isinstance(layers, Mapping):
        if len(captured) > 1:
            names = ", ".join(stage.name for stage in captured)
            raise ValueError(f"layers={layers} are of several stages ({names}); give a dict, {{stage: layers}}.")
        by_stage = {captured[0].name: layers}
    places = []
    for stage in captured:
        numbers = by_stage.get(stage.name, range(stage.layers))
        numbers = [numbers] if isinstance(numbers, int) else sorted(set(numbers))
        if not numbers or not set(numbers) <= set(range(stage.layers)):
            raise ValueError(f"layers {numbers} are not layers of the {stage.name}; it has 0 to {stage.layers - 1}.")
        places += [(stage.at(site), layer) for layer in numbers for site in sites]
    return places


def module_path(model: InContextModel, stage: Stage, layer: int) -> str:
    """The name of a layer's module as users type it, such as "encoder.blocks.3.attn"."""
    heads = stage.site == HEADS
    module = model.attention(stage.name, layer) if heads else model.outputs(stage.name, layer)[stage.site]
    return model.name_of(module)


def place_of(model: InContextModel, stage: Stage, layer: int) -> Place:
    """Where a layer's activations are at the stage's site."""
    if stage.site == HEADS:
        return Place(projection_of(model.attention(stage.name, layer)), "input", stage.heads, stage.streams)
    return Place(model.outputs(stage.name, layer)[stage.site], "output", 1, stage.streams)


def running_prompts(block: CallingBlock) -> list[Prompts] | None:
    """The prompts of the invokes that a block sees; None where it was given tensors, which tell no layout."""
    prompts = [inputs[0] for inputs in block.inputs if len(inputs) == 1 and isinstance(inputs[0], Prompts)]
    return prompts if prompts and len(prompts) == len(block.inputs) else None


def running_layout(block: CallingBlock) -> Any:
    """The layout that the prompts of the invokes share, the one that vectors and units are compared with; None where
    all of them were given tensors, which tell none."""
    prompts = (inputs[0] for inputs in block.inputs if inputs and isinstance(inputs[0], Prompts))
    return next((rows.layout for rows in prompts), None)


def token_positions(
    model: InContextModel, stage: str, prompts: Sequence[Prompts] | None, place: Place, block: CallingBlock
) -> torch.Tensor:
    """Inside a trace: the positions of the first tokens of a stage, in the rows that the block sees (see
    `InContextModel.token_positions`)."""
    seen = model.token_positions(stage, prompts, place)
    return block.rows(seen) if seen.ndim == 2 else seen


def read_layers(
    model: InContextModel,
    places: Sequence[tuple[Stage, int]],
    keep: Keep,
    *,
    gradients: Keep | None = None,
    block: CallingBlock | None = None,
    steps: str = "first",
    stop: bool = False,
) -> None:
    """Inside a trace: give the activations of layers to a function, as the model computes them.

    Args:
        model: The model.
        places: What `list_layers` gives.
        keep: Called with each layer's activations, which are the model's own memory.
        gradients: Called with their gradients in a backward pass, where there is one.
        block: The block of the trace; the one that calls this, by default.
        steps: "first" or "all": the forwards of the traced call that are read.
        stop: End the run with the last layer.
    """
    block = block or CallingBlock("reading", model, "with model.trace(prompts): ...")
    prompts, at = running_prompts(block), [(*place, place_of(model, *place)) for place in places]

    def at_block(raw: torch.Tensor, place: Place) -> torch.Tensor:
        return inside_trace.split(place, block.rows(raw))

    def run(step: int) -> None:
        positions: dict[str, torch.Tensor] = {}
        for stage, layer, place in at:
            if stage.name not in positions:
                positions[stage.name] = token_positions(model, stage.name, prompts if step == 0 else None, place, block)
            seen, raw = positions[stage.name], inside_trace.first(inside_trace.read(place))
            keep(step, stage, layer, at_block(raw, place), seen)
            if gradients is not None and raw.requires_grad and torch.is_grad_enabled():
                give = partial(gradients, step, stage, layer)
                raw.register_hook(lambda slope, give=give, place=place, seen=seen: give(at_block(slope, place), seen))
        if stop:
            end_run()

    block.run(run, steps=steps, whole=True)
