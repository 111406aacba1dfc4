"""Where the answer looks: the attention of its patches, as maps over the canvas.

>>> maps = attention_maps(model, prompts)                       # stage → [layer, head, position]
>>> prompts.layout.on_grid(maps["decoder"].mean((0, 1)))        # [row, column], to lay over a picture
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nnsight import save

from vtv_nnsight.layouts import Layout
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import InContextModel, Stage
from vtv_nnsight.models.nnsight_compat import network_of
from vtv_nnsight.prompts import VisualPrompt


@torch.no_grad()
def attention_maps(model: InContextModel, prompts: VisualPrompt) -> dict[str, torch.Tensor]:
    """How much the answer's patches look at every position, averaged over these patches and over prompts.

    Patterns are computed eagerly meanwhile, however the model was loaded.

    Args:
        model: A model; its attention layers have `pattern`, [batch, head, query token, key token].
        prompts: One-shot prompts, or `query_only()` ones.

    Returns:
        Stage → [layer, head, position], on the CPU: shares of attention that sum to 1, NaN at positions that the answer
        cannot look at. Stages that hold no token of the answer, such as the encoder of a masked autoencoder, are left
        out, and so are those without patterns.
    """
    prompts = prompts.to(device_of(model))
    asking = {}
    for stage in model.stages:
        if hasattr(type(model.attention(stage.name, 0)), "pattern"):
            asking[stage] = _askers(model, stage, prompts)
    asking = {stage: askers for stage, askers in asking.items() if askers}
    if not asking:
        return {}
    positions = prompts.layout.num_positions
    with eager_attention(model), model.trace(prompts):
        maps = {
            stage.name: [
                _spread(model.attention(stage.name, layer).pattern, askers, positions) for layer in range(stage.layers)
            ]
            for stage, askers in asking.items()
        }
        maps = save(maps)
    return {name: torch.stack(layers).cpu() for name, layers in maps.items()}


def answer_positions(model: InContextModel, stage: str, layout: Layout) -> torch.Tensor:
    """The positions of a stage that stand for the answer, alone or with another cell: LongTensor [position]."""
    groups = model.groups(stage, "quadrant", layout)
    parts = [places for name, places in groups.items() if "output" in name.split("+")]
    return torch.cat([torch.tensor([], dtype=torch.long), *parts])


def _askers(model: InContextModel, stage: Stage, prompts: VisualPrompt) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each stream that holds tokens of the answer: these tokens, and the positions that they can look at."""
    seen = model.positions(stage.name, prompts).cpu()
    theirs = torch.isin(seen, answer_positions(model, stage.name, prompts.layout))
    streams = zip(torch.arange(len(seen)).chunk(stage.streams), seen.chunk(stage.streams))
    return [(tokens[theirs[tokens]], places) for tokens, places in streams if theirs[tokens].any()]


def _spread(pattern: torch.Tensor, askers: list[tuple[torch.Tensor, torch.Tensor]], positions: int) -> torch.Tensor:
    """Pattern [batch, head, query, key] → the mean of the askers' rows, by position: [head, position]."""
    heads = pattern.shape[1]
    looked = torch.full((heads, positions), torch.nan, device=pattern.device)
    for tokens, places in askers:
        looked[:, places] = pattern[:, :, tokens].float().mean((0, 2))
    return looked


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Let a model compute its attention eagerly for a while, so that there are patterns to read."""
    configs = {id(module.config): module.config for module in network_of(model).modules() if hasattr(module, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
