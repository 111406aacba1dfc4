"""How far an answer is from the truth: pure functions of tensors, one value a picture.

Pixels are [batch, 3, height, width] in [0, 1]; results are [batch]. The papers score the output cell only
(`prompt.region("output")`).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

IMAGENET_STD = (0.229, 0.224, 0.225)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def iou(
    prediction: torch.Tensor,
    target: torch.Tensor,
    foreground: tuple[int, int, int] = WHITE,
    background: tuple[int, int, int] = BLACK,
) -> torch.Tensor:
    """Intersection over union of the foregrounds, after every pixel of both went to the nearer of the two colours
    (squared RGB distance, ties to the foreground). Two empty foregrounds agree: 1. As in ECCV 2024's released code.
    """
    a, b = (_is_foreground(pixels, foreground, background) for pixels in _pair(prediction, target))
    union = (a | b).flatten(1).sum(1)
    return torch.where(union > 0, (a & b).flatten(1).sum(1) / union.clamp(min=1), 1.0)


def accuracy(
    prediction: torch.Tensor,
    target: torch.Tensor,
    foreground: tuple[int, int, int] = WHITE,
    background: tuple[int, int, int] = BLACK,
) -> torch.Tensor:
    """Share of the pixels on the right side of the two colours."""
    a, b = (_is_foreground(pixels, foreground, background) for pixels in _pair(prediction, target))
    return (a == b).flatten(1).double().mean(1)


def mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of ImageNet-normalised values over pixels and channels, as in both papers."""
    prediction, target = _pair(prediction, target)
    std = prediction.new_tensor(IMAGENET_STD, dtype=torch.float64).view(3, 1, 1)
    return ((prediction.double() - target.double()) / std).square().flatten(1).mean(1)


def token_loss(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits [batch, patch, code] against the tokenizer's codes [batch, patch] of the truth."""
    return F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").mean(1)


def _is_foreground(pixels: torch.Tensor, foreground: tuple, background: tuple) -> torch.Tensor:
    near, far = (
        (pixels.double() * 255 - pixels.new_tensor(colour, dtype=torch.float64).view(3, 1, 1)).square().sum(1)
        for colour in (foreground, background)
    )
    return near <= far


def _pair(prediction: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if prediction.shape != target.shape or prediction.ndim != 4 or prediction.shape[1] != 3:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must both be "
            "[batch, 3, height, width]; crop both to the same cell."
        )
    return prediction, target
