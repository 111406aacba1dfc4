"""How far an answer is from the truth: pure functions of tensors, one value a picture.

Pixels are [batch, 3, height, width] in [0, 1]; results are [batch]. The papers score the output cell only
(`prompt.region("output")`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch.nn import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
Colour = tuple[int, int, int]


def iou(
    prediction: torch.Tensor,
    target: torch.Tensor,
    foreground: Colour = WHITE,
    background: Colour = BLACK,
) -> torch.Tensor:
    """Intersection over union of the foregrounds, after every pixel of both went to the nearer of the two colours
    (squared RGB distance, ties to the foreground). Two empty foregrounds agree: 1. As in ECCV 2024's released code.
    """
    return colour_iou(prediction, target, foreground, (foreground, background))


def colour_iou(
    prediction: torch.Tensor, target: torch.Tensor, foreground: Colour, palette: Sequence[Colour]
) -> torch.Tensor:
    """Intersection over union of the pixels of one colour, after every pixel of both went to the nearest colour of a
    palette (squared RGB distance, ties to the first): VP's colour-aware IoU (§4.3)."""
    a, b = (_nearest(pixels, palette) == palette.index(foreground) for pixels in _pair(prediction, target))
    union = (a | b).flatten(1).sum(1)
    return torch.where(union > 0, (a & b).flatten(1).sum(1) / union.clamp(min=1), 1.0)


def squared_off(prediction: torch.Tensor, foreground: Colour = WHITE, background: Colour = BLACK) -> torch.Tensor:
    """The filled bounding rectangle of the largest connected piece of foreground, in the two colours: what VP scores of
    a detection (§4.2, released code). Pieces are connected through their pixels' eight neighbours."""
    inside = _nearest(prediction, (foreground, background)) == 0
    boxes = torch.stack([_box(row) for row in inside])[:, None]
    colours = (prediction.new_tensor(colour).view(3, 1, 1) / 255 for colour in (foreground, background))
    return torch.where(boxes, *colours)


def accuracy(
    prediction: torch.Tensor,
    target: torch.Tensor,
    foreground: Colour = WHITE,
    background: Colour = BLACK,
) -> torch.Tensor:
    """Share of the pixels on the right side of the two colours."""
    a, b = (_nearest(pixels, (foreground, background)) for pixels in _pair(prediction, target))
    return (a == b).flatten(1).double().mean(1)


def mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of ImageNet-normalised values over pixels and channels, as in both papers."""
    prediction, target = _pair(prediction, target)
    std = prediction.new_tensor(IMAGENET_STD, dtype=torch.float64).view(3, 1, 1)
    return ((prediction.double() - target.double()) / std).square().flatten(1).mean(1)


def lpips(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Perceptual distance (Zhang et al., CVPR 2018, with AlexNet) as VP reports of colorization (§4.2).

    Raises:
        ImportError: without the optional package: `pip install 'vtv-nnsight[lpips]'`. It fetches AlexNet's weights.
    """
    prediction, target = _pair(prediction, target)
    with torch.no_grad():
        return _lpips_network(prediction.device)(2 * prediction.float() - 1, 2 * target.float() - 1).flatten()


def token_loss(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits [batch, patch, code] against the tokenizer's codes [batch, patch] of the truth."""
    return F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").mean(1)


@cache
def _lpips_network(device: torch.device) -> torch.nn.Module:
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise ImportError(
            "LPIPS needs the package lpips, which is not installed; pip install 'vtv-nnsight[lpips]'."
        ) from error
    return LPIPS(net="alex", verbose=False).eval().to(device)


def _nearest(pixels: torch.Tensor, palette: Sequence[Colour]) -> torch.Tensor:
    """Pixels [batch, 3, height, width] → which colour of the palette is nearest, [batch, height, width]."""
    values = pixels.double().mul(255).round(decimals=3)
    distances = [(values - values.new_tensor(colour).view(3, 1, 1)).square().sum(1) for colour in palette]
    return torch.stack(distances).argmin(0)


def _box(inside: torch.Tensor) -> torch.Tensor:
    """Bool [height, width] → the bounding rectangle of its largest connected piece, filled."""
    names = torch.arange(1, inside.numel() + 1, device=inside.device, dtype=torch.float32).view_as(inside) * inside
    grown = None
    while grown is None or not torch.equal(grown, names):
        grown, names = names, F.max_pool2d(names[None], 3, 1, 1)[0] * inside
    pieces, sizes = names[inside].unique(return_counts=True)
    box = torch.zeros_like(inside)
    if len(pieces):
        rows, columns = (names == pieces[sizes.argmax()]).nonzero().T
        box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    return box


def _pair(prediction: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if prediction.shape != target.shape or prediction.ndim != 4 or prediction.shape[1] != 3:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must both be "
            "[batch, 3, height, width]; crop both to the same cell."
        )
    return prediction, target
