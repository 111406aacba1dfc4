"""The shape of a MAE-VQGAN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from transformers import PretrainedConfig

from vtv_nnsight.images import IMAGENET_MEAN, IMAGENET_STD
from vtv_nnsight.layouts import Layout

MAX_LAYERS = 256
MAX_WIDTH = 2**20
MAX_PIXELS = 4096
"""Layers of a stage, width of anything and side of a canvas: a config beyond them is damaged, and building its model
would take hours or all memory."""


class MAEVQGANConfig(PretrainedConfig):
    """Sizes of the encoder, the decoder and the VQGAN tokenizer. The defaults are the published ViT-L.

    Args:
        image_size: Side of the canvas in pixels.
        patch_size: Side of a patch in pixels; the tokenizer makes one code of each patch.
        hidden_size, num_hidden_layers, num_attention_heads: The encoder.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads: The decoder.
        mlp_ratio: Hidden width of the MLPs over the width of their stage.
        layer_norm_eps: Epsilon of the transformer's LayerNorms.
        num_codes: Entries of the VQGAN's codebook, which the decoder's head classifies into.
        code_dim: Width of a codebook entry.
        vqgan_z_channels: Channels of the VQGAN's latent before quantisation.
        vqgan_channels: Channels of the finest level.
        vqgan_channel_multipliers: Channels of each level as multiples of `vqgan_channels`, finest first.
        vqgan_num_res_blocks: Residual blocks of each level.
        vqgan_attention_levels: Levels with attention, 0 the finest.
        vqgan_fold: Side of the pixel blocks that are folded into channels before the first convolution; 1 in the
            published tokenizer.
        image_mean, image_std: Normalisation of the transformer's input, by channel.

    Raises:
        ValueError: naming the setting that is not of its kind, or does not go with the others.
    """

    model_type = "mae_vqgan"

    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6
    num_codes: int = 1024
    code_dim: int = 256
    vqgan_z_channels: int = 256
    vqgan_channels: int = 128
    vqgan_channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4)
    vqgan_num_res_blocks: int = 2
    vqgan_attention_levels: Sequence[int] = (4,)
    vqgan_fold: int = 1
    image_mean: Sequence[float] = IMAGENET_MEAN
    image_std: Sequence[float] = IMAGENET_STD

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vqgan_channel_multipliers", "vqgan_attention_levels", "image_mean", "image_std"):
            if isinstance(values := getattr(self, name), tuple):
                setattr(self, name, list(values))
        self._check_kinds(self.dtype if self.dtype is not None else kwargs.get("torch_dtype"))
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self._check_sizes()

    def _check_kinds(self, dtype: Any) -> None:
        """That every setting is a number, or numbers, of a size that a model can have."""
        for name in (name for name, kind in MAEVQGANConfig.__annotations__.items() if kind == "int"):
            if not _is_whole(getattr(self, name), 1, most := _most(name)):
                raise _wrong(name, getattr(self, name), f"a whole number from 1 to {most}")
        levels, attending = self.vqgan_channel_multipliers, self.vqgan_attention_levels
        if not isinstance(levels, list) or not 1 <= len(levels) <= 12 or not all(_is_whole(n, 1, 1024) for n in levels):
            raise _wrong("vqgan_channel_multipliers", levels, "1 to 12 whole numbers from 1 to 1024")
        if not isinstance(attending, list) or not all(_is_whole(n, 0, len(levels) - 1) for n in attending):
            raise _wrong("vqgan_attention_levels", attending, f"numbers of levels, from 0 to {len(levels) - 1}")
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if not isinstance(value, list) or len(value) != 3 or not all(map(_is_real, value)):
                raise _wrong(name, value, "3 numbers")
        if min(self.image_std) <= 0:
            raise _wrong("image_std", self.image_std, "3 numbers above 0")
        for name in ("mlp_ratio", "layer_norm_eps"):
            value = getattr(self, name)
            if not _is_real(value) or not 0 < value <= 1024:
                raise _wrong(name, value, "a number above 0, and at most 1024")
        named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(named, torch.dtype) and named.is_floating_point):
            raise _wrong("dtype", dtype, "a floating-point one, such as float32 or bfloat16")

    def _check_sizes(self) -> None:
        """That the settings go with each other."""
        for prefix in ("", "decoder_"):
            name = f"{prefix}hidden_size"
            width, heads = getattr(self, name), getattr(self, f"{prefix}num_attention_heads")
            if width % heads:
                raise ValueError(f"{name}={width} is not a multiple of its {heads} attention heads.")
            if width % 4:
                raise ValueError(f"{name}={width} is not a multiple of 4, as 2-D sin-cos positions need.")
        reduction = self.vqgan_fold * 2 ** (len(self.vqgan_channel_multipliers) - 1)
        if reduction != self.patch_size:
            raise ValueError(
                f"the VQGAN reduces {reduction}x but patch_size={self.patch_size}; a patch must be one code: change "
                "vqgan_fold or the number of vqgan_channel_multipliers."
            )

    @property
    def layout(self) -> Layout:
        """The canvas of this model with one example."""
        return Layout(canvas_size=self.image_size, patch_size=self.patch_size)


def _most(name: str) -> int:
    """The most that a setting which counts something may be."""
    if name in ("image_size", "patch_size", "vqgan_fold"):
        return MAX_PIXELS
    return MAX_LAYERS if name.endswith(("_layers", "_blocks")) else MAX_WIDTH


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    text = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    return ValueError(f"{name}={text} in the model's config; expected {expected}.")
