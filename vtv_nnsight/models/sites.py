"""The sites of a layer: where activations are read and written inside a trace.

"heads" are the outputs of the attention's heads, before its output projection; "attn" is what the attention adds to the
residual stream, "mlp" what the MLP adds, and "residual" the stream as the layer leaves it. Values are [batch, token,
head, head_dim] at every site; those of whole layers have one head, as wide as the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange

from vtv_nnsight.models.interface import HEADS, SITES, InContextModel, Stage


def validate_sites(model: InContextModel, sites: str | Sequence[str]) -> tuple[str, ...]:
    """Sites in the order in which a layer computes them.

    Raises:
        ValueError: when there are none, or the model lacks one, or has no stages at all.
    """
    if not model.stages:
        kind = type(model).__name__
        raise ValueError(f"{kind} has no heads to read or patch: it can be evaluated, and has no vectors or units.")
    names = [sites] if isinstance(sites, str) else list(sites)
    known = (HEADS, *model.outputs(model.stages[0].name, 0))
    if not names or not set(names) <= set(known):
        raise ValueError(f"sites={names} are not sites of this model; choose from {', '.join(known)}.")
    return tuple(site for site in SITES if site in names)


def module_path(model: InContextModel, stage: Stage, layer: int) -> str:
    """The name of a layer's module as users type it, such as "encoder.blocks.3.attn"."""
    return _module(model, stage, layer).path.removeprefix("model.")


def _module(model: InContextModel, stage: Stage, layer: int) -> Any:
    return model.attention(stage.name, layer) if stage.site == HEADS else model.outputs(stage.name, layer)[stage.site]


def read(model: InContextModel, stage: Stage, layer: int) -> torch.Tensor:
    """Inside a trace: the activations of a layer at the stage's site, [batch, token, head, head_dim]."""
    module = _module(model, stage, layer)
    return module.heads if stage.site == HEADS else _tokens(module.output, stage)


def write(model: InContextModel, stage: Stage, layer: int, value: torch.Tensor) -> None:
    """Inside a trace: put activations [batch, token, head, head_dim] in the place of a layer's own."""
    module = _module(model, stage, layer)
    if stage.site == HEADS:
        module.heads = value
        return
    output = module.output
    shape = _tensor(output).shape
    if len(shape) == 3:
        value = value[:, :, 0]
    else:
        value = rearrange(value, f"{_TOKENS} -> {_STACKED}", stream=stage.streams, row=shape[1])
    module.output = (value, *output[1:]) if isinstance(output, tuple) else value


def stop_gradient(model: InContextModel, stage: Stage, layer: int) -> None:
    """Inside a trace: let gradients pass by a layer, along the residual stream, and none through what it adds."""
    stage = stage.at("residual")
    before = _tokens(_module(model, stage, layer).input, stage)
    write(model, stage, layer, before + (read(model, stage, layer) - before).detach())


def _tokens(value: Any, stage: Stage) -> torch.Tensor:
    """What a module is given or gives, as [batch, token, 1, width]."""
    value = _tensor(value)
    if value.ndim == 3:
        return value[:, :, None]
    return rearrange(value, f"{_STACKED} -> {_TOKENS}", stream=stage.streams)


_STACKED, _TOKENS = "(stream batch) row column width", "batch (stream row column) 1 width"


def _tensor(output: Any) -> torch.Tensor:
    """What a module hands on; attention layers of transformers hand out their pattern beside it."""
    return output[0] if isinstance(output, tuple) else output
