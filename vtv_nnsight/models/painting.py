"""From what a network predicts of each patch to a picture, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from vtv_nnsight.layouts import Layout, take, tile
from vtv_nnsight.prompts import VisualPrompt


class Inputs(NamedTuple):
    """What the network is given: canvases, and the patches that its two stages see, shared by the batch ([patch]) or
    for each row ([batch, patch])."""

    canvas: torch.Tensor
    visible: torch.Tensor
    decoded: torch.Tensor


def paint_canvas(
    draw: Callable[[torch.Tensor], torch.Tensor],
    predicted: torch.Tensor,
    prompts: VisualPrompt | Inputs,
    layout: Layout,
    paste: bool,
) -> torch.Tensor:
    """The canvases that predictions of the decoded patches make. When only some rows or columns are decoded, they are
    repeated over the canvas: zero-shot, MAE-VQGAN's bottom half stands for the top half, too.

    Args:
        draw: Predictions of every patch of the grid → pixels [batch, 3, height, width] in [0, 1].
        predicted: [batch, decoded patch, ...].
        prompts: Their canvases, and the ids of their visible and decoded patches, which they must share.
        layout: Of the model.
        paste: Keep the canvases' own pixels at the visible patches.

    Returns:
        [batch, 3, height, width] in [0, 1], in steps of 1/255 (truncated, as published).

    Raises:
        ValueError: when the rows have different patches, or the decoded ones are no block.
    """
    canvas, visible, decoded = prompts.canvas, prompts.visible, prompts.decoded
    if decoded.ndim != 1 or visible.ndim != 1:
        raise ValueError("canvases are painted with patches that they share; give visible and decoded as [patch].")
    painted = draw(take(predicted, tile(decoded.to(predicted.device), layout.grid))).to(canvas)
    if paste:
        painted = torch.where(layout.pixels(visible.to(canvas.device)), canvas, painted)
    return painted.mul(255).floor().div(255)
