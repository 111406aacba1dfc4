"""MAE-VQGAN (Bar et al., *Visual Prompting via Image Inpainting*, NeurIPS 2022, §3): a masked autoencoder that predicts
a VQGAN's codes at the hidden patches of a canvas.

    >>> model = MAEVQGANModel(MAEVQGANConfig())
    >>> logits = model(canvas, layout.visible, layout.all_patches).logits     # [batch, decoded patch, code]
    >>> completed = model.generate(canvas, layout.visible, layout.all_patches)
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput

from vtv_nnsight.layouts import Layout, decoder_sources, positions, take
from vtv_nnsight.models.mae_vqgan.config import MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.vqgan import VQGAN
from vtv_nnsight.models.painting import Inputs, paint_canvas


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
        """[batch, token, width] → the same."""
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.num_heads)
        if self.config._attn_implementation == "eager":
            z = self.softmax(q @ k.transpose(-2, -1) * self.head_dim**-0.5) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(z, "b h t d -> b t (h d)"))


class MLP(nn.Module):
    """Two linear maps with a GELU between them, of each token by itself."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, token, width] → the same."""
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
        """[batch, token, width] → the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sincos_positions(grid: int, width: int) -> torch.Tensor:
    """Fixed 2-D sin-cos position embedding of CLS (zeros) and every patch: [1, 1 + grid * grid, width].

    As in MAE: the first half of the channels encodes the column, the second the row. Made on the CPU, since not every
    device has double precision.
    """
    with torch.device("cpu"):
        steps = torch.arange(grid, dtype=torch.float64)
        frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
        row, column = torch.meshgrid(steps, steps, indexing="ij")
        angles = [coordinate.flatten()[:, None] * frequencies for coordinate in (column, row)]
        patches = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
        return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches])[None].float()


class Encoder(nn.Module):
    """CLS and the visible patches → [batch, 1 + visible patch, hidden_size]."""

    def __init__(self, config: MAEVQGANConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.layout.num_positions, width), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(config, width, config.num_attention_heads) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, canvas: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Normalised canvas [batch, 3, height, width] and ids of visible patches → tokens."""
        cls = self.cls_token.expand(len(canvas), -1, -1)
        x = torch.cat([cls, self.patch_embed(canvas, visible)], dim=1)
        x = x + _positions(self.pos_embed, visible)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """The encoder's tokens, with a mask token at every hidden patch → logits [batch, decoded patch, code]."""

    def __init__(self, config: MAEVQGANConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.layout.num_positions, width), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(config, width, config.decoder_num_attention_heads) for _ in range(config.decoder_num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, config.num_codes)

    def forward(
        self, encoded: torch.Tensor, visible: torch.Tensor, decoded: torch.Tensor, logits_to_keep: int = 0
    ) -> torch.Tensor:
        """Tokens of the encoder, and ids of the visible and decoded patches → logits of the last `logits_to_keep` of
        the decoded patches, or of all at 0."""
        mask = self.mask_token.expand(len(encoded), -1, -1).to(encoded.dtype)
        x = torch.cat([self.embed(encoded), mask], dim=1)
        x = take(x, decoder_sources(visible, decoded)) + _positions(self.pos_embed, decoded)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, -logits_to_keep or 1 :])


def _positions(embedding: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    if seen.ndim == 2:
        embedding = embedding.expand(len(seen), -1, -1)
    return take(embedding, positions(seen))


class MAEVQGANModel(PreTrainedModel):
    """Encoder, decoder and tokenizer.

    Canvases are pixels in [0, 1]; the model normalises them. Patch ids are shared by the batch ([n]) or given for each
    row ([batch, n], for training, where each canvas has another mask).
    """

    config_class = MAEVQGANConfig
    base_model_prefix = ""
    main_input_name = "canvas"
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    def __init__(self, config: MAEVQGANConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.vqgan = VQGAN(config)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def layout(self) -> Layout:
        """The canvas with one example."""
        return self.config.layout

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # which transformers else tells by whether this file's source names its own attention functions

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """MAE's initialisation of the transformer; the tokenizer keeps torch's own."""
        if isinstance(module, (Encoder, Decoder)):
            for name, parameter in module.named_parameters():
                if name in ("cls_token", "mask_token"):
                    init.normal_(parameter, std=0.02)
                elif name == "pos_embed":
                    init.copy_(parameter, sincos_positions(self.config.layout.grid, parameter.shape[-1]))
                elif parameter.ndim == 2:
                    init.xavier_uniform_(parameter)
                elif name.endswith("bias"):
                    init.zeros_(parameter)

    def forward(
        self, canvas: torch.Tensor, visible: torch.Tensor, decoded: torch.Tensor, logits_to_keep: int = 0
    ) -> MaskedLMOutput:
        """Run the transformer.

        Args:
            canvas: [batch, 3, height, width] in [0, 1].
            visible: Ids of the patches that the encoder sees, [n] or [batch, n].
            decoded: Ids of the patches that the decoder sees, [m] or [batch, m]; those that are not visible get the
                mask token.
            logits_to_keep: Predict the last so many of the decoded patches alone, as in transformers; 0 is all.

        Returns:
            logits [batch, m, code].
        """
        mean, std = (canvas.new_tensor(v).view(3, 1, 1) for v in (self.config.image_mean, self.config.image_std))
        pixels = ((canvas - mean) / std).to(self.encoder.patch_embed.proj.weight.dtype)
        visible, decoded = visible.to(canvas.device), decoded.to(canvas.device)
        encoded = self.encoder(pixels, visible)
        return MaskedLMOutput(logits=self.decoder(encoded, visible, decoded, logits_to_keep=logits_to_keep))

    @torch.no_grad()
    def generate(
        self, canvas: torch.Tensor, visible: torch.Tensor, decoded: torch.Tensor, paste: bool = True
    ) -> torch.Tensor:
        """Complete the canvas: arg-max code of every decoded patch, the VQGAN's picture of them, and the canvas's own
        pixels at the visible patches.

        When only some rows or columns are decoded, they are repeated over the canvas before the VQGAN draws it, as the
        released code does zero-shot.

        Args:
            canvas: [batch, 3, height, width] in [0, 1].
            visible: LongTensor [visible patch], shared by the batch.
            decoded: LongTensor [decoded patch], shared by the batch, a block of whole rows and columns.
            paste: Keep the canvas's own pixels at the visible patches; False gives the VQGAN's picture of all of it.

        Returns:
            [batch, 3, height, width] in [0, 1], in steps of 1/255 (truncated, as published).
        """
        logits: Any = self.forward(canvas, visible, decoded).logits
        return paint_canvas(self.vqgan.decode, logits.argmax(-1), Inputs(canvas, visible, decoded), self.layout, paste)


AutoConfig.register(MAEVQGANConfig.model_type, MAEVQGANConfig)
AutoModel.register(MAEVQGANConfig, MAEVQGANModel)
