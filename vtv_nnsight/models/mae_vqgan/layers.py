"""The transformer blocks that the encoder and the decoder share (ViT as in MAE, pre-norm)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from vtv_nnsight.layouts import take


class PatchEmbed(nn.Module):
    """A linear map of each visible patch; the patches that nobody sees cost nothing."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(3 * patch_size**2, width)

    def forward(self, canvas: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Normalised canvas [batch, 3, height, width] → [batch, visible patch, width]."""
        p = self.patch_size
        patches = rearrange(canvas, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return self.proj(take(patches, visible))


class Attention(nn.Module):
    """Multi-head self-attention. The input of `proj` is z, the heads' outputs side by side: the value that
    *Finding Visual Task Vectors* averages and patches, head by head."""

    def __init__(self, config: PretrainedConfig, width: int, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.softmax = nn.Softmax(dim=-1)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.num_heads)
        if self.config._attn_implementation == "eager":
            z = self.softmax(q @ k.transpose(-2, -1) * self.head_dim**-0.5) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(z, "b h t d -> b t (h d)"))


class MLP(nn.Module):
    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Residual stream in, residual stream out: [batch, token, width]."""

    def __init__(self, config: PretrainedConfig, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = Attention(config, width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(width, config.mlp_ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sincos_positions(grid: int, width: int) -> torch.Tensor:
    """Fixed 2-D sin-cos position embedding of CLS (zeros) and every patch: [1, 1 + grid * grid, width].

    As in MAE: the first half of the channels encodes the column, the second the row. Made on the CPU, since not every
    device has double precision.
    """
    wide = dict(dtype=torch.float64, device="cpu")
    frequencies = 10000 ** -(torch.arange(width // 4, **wide) / (width // 4))
    row, column = torch.meshgrid(*[torch.arange(grid, **wide)] * 2, indexing="ij")
    halves = []
    for coordinate in (column, row):
        angles = coordinate.flatten()[:, None] * frequencies
        halves += [angles.sin(), angles.cos()]
    patches = torch.cat(halves, dim=1)
    return torch.cat([torch.zeros(1, width, **wide), patches])[None].float()
