"""DALL-E's tokenizer, a discrete VAE of 8192 codes (Ramesh et al., *Zero-Shot Text-to-Image Generation*, ICML 2021,
§2.1 and appendix A), which BEiT predicts the codes of: a code stands for 8×8 pixels.

    >>> tokenizer = load_tokenizer("dall-e")              # a folder with decoder.pkl and, if it is there, encoder.pkl
    >>> pixels = tokenizer.decode(codes)                  # [batch, patch] → [batch, 3, height, width] in [0, 1]

The published `decoder.pkl` and `encoder.pkl` are pickles of whole modules. Only the tensors in them are read, and
nothing of them is run (see `models.torch_files`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from vtv_nnsight.files import refusing
from vtv_nnsight.models.mae_vqgan.published import count_modules
from vtv_nnsight.models.torch_files import StrPath, fill, read_tensors

GROUPS = 4
EPSILON = 0.1
"""Pixels in [0, 1] are [0.1, 0.9] to the tokenizer (appendix A.3, the logit-Laplace distribution)."""


class Block(nn.Module):
    """A bottleneck with a shortcut; `sizes` are those of its four kernels."""

    def __init__(self, in_channels: int, out_channels: int, sizes: tuple[int, ...], gain: float) -> None:
        super().__init__()
        hidden = out_channels // 4
        widths = (in_channels, hidden, hidden, hidden, out_channels)
        self.gain = gain
        self.id_path = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        path: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (size, a, b) in enumerate(zip(sizes, widths, widths[1:]), 1):
            path |= {f"relu_{i}": nn.ReLU(), f"conv_{i}": nn.Conv2d(a, b, size, padding=size // 2)}
        self.res_path = nn.Sequential(path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channel, height, width] → the same, of `out_channels`."""
        return self.id_path(x) + self.gain * self.res_path(x)


def _groups(
    first: nn.Module,
    widths: list[int],
    blocks: int,
    sizes: tuple[int, ...],
    resample: Callable[[], nn.Module],
    channels: int,
) -> nn.Sequential:
    """`first`, groups of blocks from width to width with a change of resolution between them, and a last layer."""
    gain = 1 / (GROUPS * blocks) ** 2
    parts = OrderedDict(first=first)
    for i, (a, b) in enumerate(zip(widths, widths[1:]), 1):
        group: OrderedDict[str, nn.Module] = OrderedDict()
        for n in range(blocks):
            group[f"block_{n + 1}"] = Block(b if n else a, b, sizes, gain)
        if i < GROUPS:
            group["resample"] = resample()
        parts[f"group_{i}"] = nn.Sequential(group)
    parts["last"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(widths[-1], channels, 1)))
    return nn.Sequential(parts)


class DVAE(nn.Module):
    """Codes to pixels and back.

    Args:
        num_codes: Entries of its vocabulary.
        width: Channels of the decoder's last group; those before have 2, 4 and 8 times as many.
        first_width: Channels of a code.
        blocks: Blocks of each of the decoder's four groups.
        encoder_width, encoder_blocks: Channels of the encoder's first group, and blocks of each.
    """

    patch_size = 2 ** (GROUPS - 1)

    def __init__(
        self,
        num_codes: int = 8192,
        width: int = 256,
        first_width: int = 128,
        blocks: int = 2,
        encoder_width: int = 256,
        encoder_blocks: int = 2,
    ) -> None:
        super().__init__()
        self.num_codes = num_codes
        widths = [first_width, 8 * width, 4 * width, 2 * width, width]
        first = nn.Conv2d(num_codes, first_width, 1)
        self.decoder = _groups(first, widths, blocks, (1, 3, 3, 3), partial(nn.Upsample, scale_factor=2), 6)
        width = encoder_width
        first = nn.Conv2d(3, width, 7, padding=3)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.encoder = _groups(first, widths, encoder_blocks, (3, 3, 3, 1), partial(nn.MaxPool2d, 2), num_codes)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [batch, patch] of a square grid, row by row → pixels [batch, 3, 8 * grid, 8 * grid] in [0, 1]: the
        means of what it decodes to."""
        first: Any
        first, *rest = self.decoder
        x = F.embedding(codes, first.weight[:, :, 0, 0].T) + first.bias  # a 1x1 convolution of one-hot codes
        x = rearrange(x, "b (h w) c -> b c h w", h=math.isqrt(codes.shape[1]))
        for part in rest:
            x = part(x)
        return ((x[:, :3].float().sigmoid() - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [batch, 3, 8 * grid, 8 * grid] in [0, 1] → codes [batch, patch], row by row."""
        first: Any = self.encoder.first
        return self.encoder(((1 - 2 * EPSILON) * pixels + EPSILON).to(first.weight.dtype)).argmax(1).flatten(1)


def load_tokenizer(folder: StrPath, *, weights: bool = True) -> DVAE:
    """A tokenizer, on the CPU in float32.

    Args:
        folder: The folder of the published `decoder.pkl` and `encoder.pkl`.
        weights: Read the weights; False builds it on the meta device, of the shapes alone.

    Raises:
        FileNotFoundError, ValueError: naming the file, and the tensors that are missing, unknown or of other shapes.
    """
    files = {part: Path(folder, f"{part}.pkl") for part in ("decoder", "encoder")}
    tensors = {part: read_tensors(file) for part, file in files.items()}
    sizes = {}
    for part, held in tensors.items():
        with refusing(files[part], "is no part of DALL-E's tokenizer"):
            blocks = count_modules("blocks.group_1.block_", held)
            sizes[part] = *held["blocks.input.w"].shape[:2], held["blocks.output.conv.w"].shape[1], blocks
    (first_width, num_codes, width, blocks), (encoder_width, _, _, encoder_blocks) = sizes.values()
    with torch.device("meta"):
        tokenizer = DVAE(num_codes, width, first_width, blocks, encoder_width, encoder_blocks)
    for part in files if weights else ():
        fill(getattr(tokenizer, part), tensors[part], _published, files[part], torch.float32)
    return tokenizer.eval().requires_grad_(False)


def _published(name: str) -> str:
    """The published name of a parameter. `input` and `output` have other names here, which nnsight does not need."""
    first, rest = name.removesuffix("weight").removesuffix("bias"), "w" if name.endswith("weight") else "b"
    group, *path = first.split(".")
    return ".".join(["blocks", {"first": "input", "last": "output"}.get(group, group), *path]) + rest
