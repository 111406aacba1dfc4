"""What `capture` and `patch` do inside a trace: plain functions of tensors, and plain reads and writes of a module's
`.input` or `.output`. It imports torch alone, so that it can be sent to where a model runs.

Activations are [batch, token, head, head_dim] at every site; a network's own tensors are [batch, token, width] or
[stream * batch, row, column, width], the first of a tuple where a module gives several things.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Place(NamedTuple):
    """Where a layer's activations are.

    Args:
        module: The module as nnsight has it.
        side: "input" or "output", where they are read and written.
        heads: Into how many parts the width is cut.
        streams: Rows of the network's tensors for each row of the batch.
    """

    module: Any
    side: str
    heads: int
    streams: int

    def read(self) -> Any:
        """What the module is given, (args, kwargs), or gives."""
        return self.module.inputs if self.side == "input" else self.module.output

    def change(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put a function of the activations in their place."""
        raw = self.read()
        value = self.join(function(self.split(first(raw))), first(raw))
        if self.side == "input":
            self.module.inputs = ((value, *raw[0][1:]), raw[1])
        else:
            self.module.output = (value, *raw[1:]) if isinstance(raw, tuple) else value

    def split(self, value: torch.Tensor) -> torch.Tensor:
        """The network's own tensor as [batch, token, head, head_dim]."""
        z: torch.Tensor = value.unflatten(-1, (self.heads, -1))
        return z if z.ndim == 4 else z.unflatten(0, (self.streams, -1)).transpose(0, 1).flatten(1, 3)

    def join(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`, in the shape of `like`."""
        z: torch.Tensor = value.flatten(2)
        if like.ndim == 4:
            z = z.unflatten(1, (self.streams, *like.shape[1:3])).transpose(0, 1).flatten(0, 1)
        return z


def first(raw: Any) -> torch.Tensor:
    """The first tensor of what a module is given or gives: attention layers of transformers give their pattern beside
    it."""
    while isinstance(raw, tuple):
        raw = raw[0]
    tensor: torch.Tensor = raw
    return tensor


def stop_gradient(module: Any) -> None:
    """Let gradients pass by a module from its input to its output, and none through what it adds."""
    before, raw = first(module.input), module.output
    value = before + (first(raw) - before).detach()
    module.output = (value, *raw[1:]) if isinstance(raw, tuple) else value


def mix(
    z: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, present: torch.Tensor | None, mode: str = "replace"
) -> torch.Tensor:
    """Activations with other values in their place, or on top of them.

    Args:
        z: [batch, token, head, head_dim].
        values: [token, head, head_dim], for all rows, or with a batch in front.
        mask: [token, head], or with a batch in front: bool to replace, float to go as far.
        present: bool [batch or 1, token, 1, 1], where there are values; of a float mask.
        mode: "replace" or "add".
    """
    values, mask = values.to(z), mask.to(z.device)[..., None]
    if mask.dtype == torch.bool:
        return torch.where(mask, values, z)
    step = values - z if mode == "replace" else values
    if present is not None:
        step = torch.where(present.to(z.device), step, 0)
    return z + mask.to(z.dtype) * step


def at(values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """[position, head, dim], or [row, position, head, dim], at the positions `seen`, [token] or [row, token]."""
    seen = seen.to(values.device)
    if seen.ndim == 1:
        return values.index_select(-3, seen)
    if values.ndim == 3:
        return values[seen]
    return values[torch.arange(len(values), device=values.device)[:, None], seen]


def put(values: torch.Tensor, layer: int, z: torch.Tensor, seen: torch.Tensor) -> None:
    """Write activations of a layer into [row, layer, position, head, head_dim], at the positions `seen` of the first
    tokens, [token], or [row, token] with negative numbers where there is none."""
    seen, z = seen.to(values.device), z[:, : seen.shape[-1]]
    if seen.ndim == 1:
        values.select(1, layer)[:, seen] = z
    else:
        rows, tokens = (seen >= 0).nonzero(as_tuple=True)
        values.select(1, layer)[rows, seen[rows, tokens]] = z[rows, tokens]


def last_tokens(seen: torch.Tensor, places: int) -> tuple[slice, torch.Tensor]:
    """Of tokens at positions [token] or [row, token], those at the last `places` of them, and their positions,
    told once where rows agree: texts have more tokens than vectors have positions, and count from the end."""
    tokens = slice(max(0, seen.shape[-1] - places), seen.shape[-1])
    seen = seen[..., tokens]
    return tokens, seen[0] if seen.ndim == 2 and bool((seen == seen[:1]).all()) else seen
