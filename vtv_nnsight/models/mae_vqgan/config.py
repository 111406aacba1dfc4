"""The shape of a MAE-VQGAN."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from transformers import PretrainedConfig

from vtv_nnsight.images import IMAGENET_MEAN, IMAGENET_STD
from vtv_nnsight.layouts import Layout
from vtv_nnsight.models.devices import floating_dtype
from vtv_nnsight.text import quoted

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
        self._check_kinds()
        floating_dtype(self.dtype if self.dtype is not None else kwargs.get("torch_dtype"))
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self._check_sizes()

    def _check_kinds(self) -> None:
        """That every setting is a number, or a list of numbers, of a size that a model can have."""
        for name, kind in MAEVQGANConfig.__annotations__.items():
            whole, value = "int" in kind, getattr(self, name)
            least, most = 0 if name == "vqgan_attention_levels" else 1 if whole else 1e-12, _most(name)
            numbers = value if "Sequence" in kind else [value]
            number: Any
            for number in numbers if isinstance(numbers, list) else [None]:
                is_number = isinstance(number, Integral if whole else Real) and not isinstance(number, bool)
                if not is_number or not least <= number <= most:
                    words = f"whole numbers from {least} to {most}" if whole else "numbers above 0"
                    raise ValueError(f"{name}={quoted(value)} in the model's config; expected {words}.")

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
            raise ValueError(f"the VQGAN reduces {reduction}x but patch_size={self.patch_size}; a patch is one code.")

    @property
    def layout(self) -> Layout:
        """The canvas of this model with one example."""
        return Layout(canvas_size=self.image_size, patch_size=self.patch_size)


def _most(name: str) -> int:
    """The most that a setting which counts something may be."""
    if name in ("image_size", "patch_size", "vqgan_fold"):
        return MAX_PIXELS
    return MAX_LAYERS if name.endswith(("_layers", "_blocks")) else MAX_WIDTH
