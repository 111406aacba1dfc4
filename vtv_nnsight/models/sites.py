"""The sites of a layer: where activations are read and written inside a trace.

"heads" are the outputs of the attention's heads, before its output projection; "attn" is what the attention adds to the
residual stream, "mlp" what the MLP adds, and "residual" the stream as the layer leaves it. Values are [batch, token,
head, head_dim] at every site; those of whole layers have one head, as wide as the stream.

What there is one of for each stage and site is kept by `stage_key`: "encoder" for the heads of a stage,
"encoder.mlp" for another site.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from einops import rearrange

from vtv_nnsight.models.interface import HEADS, SITES, InContextModel, Stage


def stage_key(stage: str, site: str) -> str:
    """The name of a stage's values at a site."""
    return stage if site == HEADS else f"{stage}.{site}"


def split_key(name: str) -> tuple[str, str]:
    """The stage and the site of a `stage_key`."""
    stage, _, site = name.rpartition(".")
    return (stage, site) if site in SITES[1:] else (name, HEADS)


def sites_in(keys: Iterable[str]) -> tuple[str, ...]:
    """The sites of some `stage_key`s, in the order in which a layer computes them."""
    found = {split_key(name)[1] for name in keys}
    return tuple(site for site in SITES if site in found)


def at_sites(stages: Iterable[Stage], sites: Iterable[str]) -> tuple[Stage, ...]:
    """Stages once for each site, named by `stage_key`: of the sites of whole layers, with one head."""
    return tuple(
        stage if site == HEADS else Stage(stage_key(stage.name, site), stage.layers, 1, stage.width, stage.streams)
        for stage in stages
        for site in sites
    )


def validate_sites(model: InContextModel, sites: str | Sequence[str]) -> tuple[str, ...]:
    """Sites in the order in which a layer computes them.

    Raises:
        ValueError: when there are none, or the model lacks one, or has no stages at all.
    """
    if not model.stages:
        kind = type(model).__name__
        raise ValueError(f"{kind} has no heads to read or patch: it can be evaluated, and has no vectors or units.")
    chosen = [sites] if isinstance(sites, str) else list(sites)
    known = (HEADS, *model.outputs(model.stages[0].name, 0))
    if not chosen or not set(chosen) <= set(known):
        raise ValueError(f"sites={chosen} are not sites of this model; choose from {', '.join(known)}.")
    return tuple(site for site in SITES if site in chosen)


def module_path(model: InContextModel, stage: str, layer: int, site: str = HEADS) -> str:
    """The name of a layer's module as users type it, such as "encoder.blocks.3.attn"."""
    module = model.attention(stage, layer) if site == HEADS else model.outputs(stage, layer)[site]
    return module.path.removeprefix("model.")


def read(model: InContextModel, stage: Stage, layer: int, site: str) -> torch.Tensor:
    """Inside a trace: the activations of a layer, [batch, token, head, head_dim]."""
    if site == HEADS:
        return model.attention(stage.name, layer).heads
    return _tokens(model.outputs(stage.name, layer)[site].output, stage)


def write(model: InContextModel, stage: Stage, layer: int, site: str, value: torch.Tensor) -> None:
    """Inside a trace: put activations [batch, token, head, head_dim] in the place of a layer's own."""
    if site == HEADS:
        model.attention(stage.name, layer).heads = value
        return
    module = model.outputs(stage.name, layer)[site]
    own = module.output
    shape = _tensor(own).shape
    if len(shape) == 3:
        value = value[:, :, 0]
    else:
        value = rearrange(value, f"{_TOKENS} -> {_STACKED}", stream=stage.streams, row=shape[1])
    module.output = (value, *own[1:]) if isinstance(own, tuple) else value


def stop_gradient(model: InContextModel, stage: Stage, layer: int) -> None:
    """Inside a trace: let gradients pass by a layer, along the residual stream, and none through what it adds."""
    before = _tokens(model.outputs(stage.name, layer)["residual"].input, stage)
    after = read(model, stage, layer, "residual")
    write(model, stage, layer, "residual", before + (after - before).detach())


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
