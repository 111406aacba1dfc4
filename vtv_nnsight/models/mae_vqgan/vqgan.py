"""The VQGAN tokenizer (Esser et al., *Taming Transformers*, CVPR 2021): one codebook entry for each patch.

Submodules bear the names of the taming-transformers release, so that its checkpoints load by renaming one tensor.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from vtv_nnsight.models.mae_vqgan.config import MAEVQGANConfig


def norm(channels: int) -> nn.GroupNorm:
    """The norm of every layer, over 32 groups of channels."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two convolutions with a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, in_channels, height, width] → [batch, out_channels, height, width]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over the pixels of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channel, height, width] → the same."""
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        z = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(z, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Half as high and wide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channel, height, width] → [batch, channel, height / 2, width / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice as high and wide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channel, height, width] → [batch, channel, 2 height, 2 width]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution; `resample` is the change to the next, "downsample", "upsample" or none."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, resample: str | None) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attention else 0))
        if resample == "downsample":
            self.downsample = Downsample(out_channels)
        elif resample == "upsample":
            self.upsample = Upsample(out_channels)
        self.resample = resample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A feature map → that of the next resolution."""
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return getattr(self, self.resample)(x) if self.resample else x


class Middle(nn.Module):
    """The blocks of the coarsest resolution, between encoder and decoder."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channel, height, width] → the same."""
        return self.block_2(self.attn_1(self.block_1(x)))


def _levels(config: MAEVQGANConfig, inputs: list[int], blocks: int, resample: str, last: int) -> nn.ModuleList:
    """The levels of an encoder or a decoder, finest first; the one that runs last keeps its resolution."""
    return nn.ModuleList(
        Level(channels, width, blocks, i in config.vqgan_attention_levels, resample if i != last else None)
        for i, (channels, width) in enumerate(zip(inputs, _widths(config)))
    )


def _widths(config: MAEVQGANConfig) -> list[int]:
    """Channels of each level, finest first."""
    return [config.vqgan_channels * multiplier for multiplier in config.vqgan_channel_multipliers]


class Encoder(nn.Module):
    """Pixels in [-1, 1], [batch, 3, height, width] → latent [batch, z_channels, grid, grid]."""

    def __init__(self, config: MAEVQGANConfig) -> None:
        super().__init__()
        widths = _widths(config)
        inputs = [config.vqgan_channels, *widths[:-1]]
        self.fold = nn.PixelUnshuffle(config.vqgan_fold)
        self.conv_in = nn.Conv2d(3 * config.vqgan_fold**2, inputs[0], 3, padding=1)
        self.down = _levels(config, inputs, config.vqgan_num_res_blocks, "downsample", len(widths) - 1)
        self.mid = Middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.vqgan_z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels → latent."""
        x = self.conv_in(self.fold(x))
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latent [batch, z_channels, grid, grid] → pixels, about [-1, 1], [batch, 3, height, width]."""

    def __init__(self, config: MAEVQGANConfig) -> None:
        super().__init__()
        widths = _widths(config)
        self.conv_in = nn.Conv2d(config.vqgan_z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = _levels(config, [*widths[1:], widths[-1]], config.vqgan_num_res_blocks + 1, "upsample", 0)
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3 * config.vqgan_fold**2, 3, padding=1)
        self.unfold = nn.PixelShuffle(config.vqgan_fold)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Latent → pixels."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.unfold(self.conv_out(F.silu(self.norm_out(x))))


class VQGAN(nn.Module):
    """Pixels to codes and back. A code is the index of the nearest row of the codebook."""

    def __init__(self, config: MAEVQGANConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.vqgan_z_channels, config.code_dim, 1)
        self.codebook = nn.Embedding(config.num_codes, config.code_dim)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.vqgan_z_channels, 1)
        self.decoder = Decoder(config)
        # On a CPU, GroupNorm of maps with few channels a group is many times slower in the channels-last format that
        # `decode_latent` begins with; convolutions of many channels are faster in it (benchmarks/memory_format.py).
        self.narrow = max(_widths(config)) < 16 * 32

    def latent(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [batch, 3, height, width] in [0, 1] → unquantised [batch, patch, code_dim], patches row by row."""
        return rearrange(self.quant_conv(self.encoder(2 * pixels - 1)), "b c h w -> b (h w) c")

    def nearest(self, latent: torch.Tensor) -> torch.Tensor:
        """Unquantised [batch, patch, code_dim] → codes [batch, patch]."""
        entries = torch.arange(self.codebook.num_embeddings, device=latent.device)
        latent, codebook = latent.float(), self.codebook(entries).to(latent.device).float()
        distance = latent.square().sum(-1, keepdim=True) + codebook.square().sum(-1) - 2 * latent @ codebook.T
        return distance.argmin(-1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [batch, 3, height, width] in [0, 1] → codes [batch, patch], patches row by row."""
        return self.nearest(self.latent(pixels))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [batch, patch] of a whole canvas → pixels [batch, 3, height, width] in [0, 1]."""
        return self.decode_latent(self.codebook(codes)).clamp(-1, 1).add(1).div(2)

    def decode_latent(self, latent: torch.Tensor) -> torch.Tensor:
        """Quantised [batch, patch, code_dim] → pixels about [-1, 1], not clamped."""
        z = rearrange(latent, "b (h w) c -> b c h w", h=round(latent.shape[1] ** 0.5))
        if self.narrow and z.device.type == "cpu":
            z = z.contiguous()
        return self.decoder(self.post_quant_conv(z))
