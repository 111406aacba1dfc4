"""The shape of a MAE-VQGAN."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

from vtv_nnsight.images import IMAGENET_MEAN, IMAGENET_STD
from vtv_nnsight.layouts import Layout


@strict
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
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        for name in ("vqgan_channel_multipliers", "vqgan_attention_levels", "image_mean", "image_std"):
            setattr(self, name, list(getattr(self, name)))
        for prefix in ("", "decoder_"):
            name = f"{prefix}hidden_size"
            width, heads = getattr(self, name), getattr(self, f"{prefix}num_attention_heads")
            if heads < 1 or width % heads:
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
