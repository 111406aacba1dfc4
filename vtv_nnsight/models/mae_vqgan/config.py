"""The shape of a MAE-VQGAN."""

from __future__ import annotations

from transformers import PretrainedConfig

from vtv_nnsight.layouts import Layout


class MAEVQGANConfig(PretrainedConfig):
    """Sizes of the encoder, the decoder and the VQGAN tokenizer. The defaults are the published ViT-L.

    Args:
        image_size: Side of the canvas in pixels.
        patch_size: Side of a patch in pixels; the tokenizer makes one code of each patch.
        hidden_size, num_hidden_layers, num_attention_heads: The encoder.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads: The decoder.
        mlp_ratio: Hidden width of the MLPs over the width of their stack.
        layer_norm_eps: Epsilon of the transformer's LayerNorms.
        num_codes: Entries of the VQGAN's codebook, which the decoder's head classifies into.
        code_dim: Width of a codebook entry.
        vqgan_z_channels: Channels of the VQGAN's latent before quantisation.
        vqgan_channels: Channels of the finest level.
        vqgan_channel_multipliers: Channels of each level as multiples of `vqgan_channels`, finest first.
        vqgan_num_res_blocks: Residual blocks a level.
        vqgan_attention_levels: Levels with attention, 0 the finest.
        vqgan_fold: Side of the pixel blocks that are folded into channels before the first convolution; 1 in the
            published tokenizer.
        image_mean, image_std: Per-channel normalisation of the transformer's input.
    """

    model_type = "mae_vqgan"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        decoder_hidden_size: int = 512,
        decoder_num_hidden_layers: int = 8,
        decoder_num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        layer_norm_eps: float = 1e-6,
        num_codes: int = 1024,
        code_dim: int = 256,
        vqgan_z_channels: int = 256,
        vqgan_channels: int = 128,
        vqgan_channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        vqgan_num_res_blocks: int = 2,
        vqgan_attention_levels: tuple[int, ...] = (4,),
        vqgan_fold: int = 1,
        image_mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        image_std: tuple[float, ...] = (0.229, 0.224, 0.225),
        **kwargs,
    ) -> None:
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.decoder_hidden_size = decoder_hidden_size
        self.decoder_num_hidden_layers = decoder_num_hidden_layers
        self.decoder_num_attention_heads = decoder_num_attention_heads
        self.mlp_ratio = mlp_ratio
        self.layer_norm_eps = layer_norm_eps
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.vqgan_z_channels = vqgan_z_channels
        self.vqgan_channels = vqgan_channels
        self.vqgan_channel_multipliers = list(vqgan_channel_multipliers)
        self.vqgan_num_res_blocks = vqgan_num_res_blocks
        self.vqgan_attention_levels = list(vqgan_attention_levels)
        self.vqgan_fold = vqgan_fold
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for stack, width, heads in (
            ("hidden_size", self.hidden_size, self.num_attention_heads),
            ("decoder_hidden_size", self.decoder_hidden_size, self.decoder_num_attention_heads),
        ):
            if width % heads:
                raise ValueError(f"{stack}={width} is not a multiple of its {heads} attention heads.")
            if width % 4:
                raise ValueError(f"{stack}={width} is not a multiple of 4, as 2-D sin-cos positions need.")
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
