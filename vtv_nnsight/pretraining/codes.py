"""The codes of patches, before there is a network that finds them.

Left to itself a VQGAN's codebook collapses: 2048 codes of width 16 came to differ in three directions, a patch's mean
colour, and what else the encoder found lay below the distance of two codes, where the decoder cannot see it and no
gradient makes it grow. So codes are chosen beforehand: a patch's principal components, in units of the error that so
many bits allow (reverse water-filling: Cover and Thomas, *Elements of Information Theory*, §10.3.3), and their k-means.
A code says what its patch looks like, whatever is around it; and since codes are known from the start, the tokenizer's
networks and the transformer can be trained at the same time.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import nn

from vtv_nnsight.files import replacing
from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.vqgan import nearest

ITERATIONS = 12
"""Rounds of k-means."""
AT_ONCE = 8192
"""Patches that are compared with the codebook at once."""


class PatchCodes(nn.Module):
    """Principal components of patches and a codebook over them; without gradients.

    Attributes:
        mean: [3 * patch_size²], of patches.
        components: [3 * patch_size², code_dim].
        codebook: [code, code_dim].
        patches: What each code looks like, the mean of its patches: [code, 3 * patch_size²].
    """

    def __init__(self, config: MAEVQGANConfig) -> None:
        super().__init__()
        self.patch_size, values = config.patch_size, 3 * config.patch_size**2
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("components", torch.zeros(values, config.code_dim))
        self.register_buffer("codebook", torch.zeros(config.num_codes, config.code_dim))
        self.register_buffer("patches", torch.zeros(config.num_codes, values))

    @classmethod
    @torch.no_grad()
    def find(cls, config: MAEVQGANConfig, pixels: torch.Tensor, generator: torch.Generator) -> PatchCodes:
        """The codes of pictures [n, 3, height, width] in [0, 1]."""
        codes = cls(config)
        patches = codes._split(pixels).flatten(0, 1)
        variances, basis = torch.linalg.eigh(torch.cov(patches.T))
        variances, basis = variances.flip(0).clamp(min=1e-12), basis.flip(1)
        error = _water_level(variances, math.log2(config.num_codes))
        codes.mean.copy_(patches.mean(0))
        codes.components.copy_(basis[:, : config.code_dim] / error**0.5)
        points = (patches - codes.mean) @ codes.components
        codes.codebook.copy_(_draw(points, config.num_codes, generator))
        for _ in range(ITERATIONS):
            sums, counts = codes._sum(points, points)
            fresh = _draw(points, config.num_codes, generator)  # in the place of codes that no patch has
            codes.codebook.copy_(torch.where(counts > 0, sums / counts.clamp(min=1), fresh))
        sums, counts = codes._sum(points, patches)
        codes.patches.copy_(torch.where(counts > 0, sums / counts.clamp(min=1), codes.mean))
        return codes

    def principal(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [batch, 3, height, width] → principal components [batch, patch, code_dim], patches row by row."""
        return (self._split(pixels) - self.mean) @ self.components

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [batch, 3, height, width] in [0, 1] → codes [batch, patch]."""
        return nearest(self.principal(pixels), self.codebook)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [batch, patch] of a square canvas → pixels [batch, 3, height, width] in [0, 1]: every code's patch."""
        rows, p = round(codes.shape[1] ** 0.5), self.patch_size
        return rearrange(self.patches[codes], "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=p, q=p)

    def save(self, path: Path) -> None:
        with replacing(path) as temporary:
            save_file(self.state_dict(), temporary)

    @classmethod
    def load(cls, config: MAEVQGANConfig, path: Path) -> PatchCodes:
        """The codes that the tokenizer's training found first.

        Raises:
            FileNotFoundError: when it has not begun.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; train the tokenizer first (vtv pretrain tokenizer).")
        codes = cls(config)
        codes.load_state_dict(load_file(path))
        return codes

    def _split(self, pixels: torch.Tensor) -> torch.Tensor:
        p = self.patch_size
        return rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)

    def _sum(self, points: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the values [n, ...] whose points have each code, and their number [code, 1]."""
        nearby = torch.cat([nearest(some, self.codebook) for some in points.split(AT_ONCE)])
        sums = values.new_zeros(len(self.codebook), values.shape[1]).index_add_(0, nearby, values)
        return sums, torch.bincount(nearby, minlength=len(self.codebook))[:, None].to(values.dtype)


def _draw(points: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    return points[torch.randint(len(points), (n,), generator=generator)]


def _water_level(variances: torch.Tensor, bits: float) -> torch.Tensor:
    """The error at which components of these variances, each coded as far as it exceeds it, cost so many bits."""
    low, high = variances.min().log(), variances.max().log()
    for _ in range(50):
        middle = (low + high) / 2
        cost = ((variances.log() - middle).clamp(min=0) / (2 * math.log(2))).sum()
        low, high = (middle, high) if cost > bits else (low, middle)
    return middle.exp()
