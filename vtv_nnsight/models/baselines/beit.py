"""BEiT under nnsight: a transformer that predicts the codes of DALL-E's tokenizer at hidden patches (Bao et al., *BEiT:
BERT Pre-Training of Image Transformers*, ICLR 2022), which VP compares MAE-VQGAN with (NeurIPS 2022, §4.1).

    >>> model = BEiT("microsoft/beit-large-patch16-224-pt22k", tokenizer="dall-e/decoder.pkl")
    >>> with model.trace(prompts):
    ...     z = model.encoder.layers[3].attention.heads.save()     # [batch, token, head, head_dim]
    ...     logits = model.output.logits.save()                    # [batch, decoded patch, code]
    >>> canvas = model.generate(prompts)                           # [batch, 3, height, width] in [0, 1]

The canvas of 224×224 is a grid of 14×14 patches, and so are the codes: the tokenizer, a code of which stands for 8×8
pixels, sees and paints 112×112. The weights and the modules are transformers' own `BeitForMaskedImageModeling`.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F
from transformers import BeitConfig, BeitForMaskedImageModeling
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.beit.modeling_beit import BeitAttention

from vtv_nnsight.layouts import Layout, positions, take
from vtv_nnsight.models.autoencoders import CodeModel, autoencoder_groups, keep_output
from vtv_nnsight.models.baselines.dalle import DVAE, load_tokenizer
from vtv_nnsight.models.canvas import AdaptedNetwork
from vtv_nnsight.models.interface import Stage
from vtv_nnsight.models.nnsight_compat import StageEnvoy
from vtv_nnsight.models.torch_files import StrPath
from vtv_nnsight.models.vit_mae import AttentionEnvoy
from vtv_nnsight.prompts import VisualPrompt


class Encoder(nn.Module):
    """CLS and the decoded patches, hidden ones as mask tokens → logits [batch, decoded patch, code]; of transformers'
    modules.

    Patches that are not decoded are not there at all, as in the decoder of a masked autoencoder: rows and columns of
    the relative positions are those of the tokens that are.
    """

    def __init__(self, model: BeitForMaskedImageModeling) -> None:
        super().__init__()
        beit: Any = model.beit
        self.embeddings, self.position_bias, self.layers = beit.embeddings, beit.shared_position_bias, beit.layers
        self.last_norm, self.norm, self.head = beit.layernorm, model.layernorm, model.lm_head
        self.grid = _layout(model.config).grid

    def forward(self, pixels: torch.Tensor, visible: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """Normalised canvas, and ids of the visible and decoded patches → logits."""
        tokens, embeddings = positions(decoded), self.embeddings
        patches = take(embeddings.patch_embeddings(pixels), decoded)
        seen = (decoded[..., :, None] == visible[..., None, :]).any(-1)
        patches = torch.where(seen[..., None], patches, embeddings.mask_token)
        x = torch.cat([embeddings.cls_token.expand(len(pixels), -1, -1), patches], dim=1)
        if embeddings.position_embeddings is not None:
            x = x + take(embeddings.position_embeddings.expand(len(x), -1, -1), tokens)
        bias = None if self.position_bias is None else self._bias(tokens)
        for layer in self.layers:
            x = layer(x, attention_mask=bias)
        return self.head(self.norm(self.last_norm(x))[:, 1:])

    def _bias(self, tokens: torch.Tensor) -> torch.Tensor:
        """What is added to the attention of tokens at these positions [..., token] to each other: [batch or 1, head,
        token, token]."""
        table = self.position_bias.relative_position_bias_table
        with unset_fake_temporarily(), torch.device("cpu"):  # transformers keeps the index for all that come later
            index = self.position_bias.generate_relative_position_index((self.grid, self.grid))
        index = index.to(tokens.device)[tokens[..., :, None], tokens[..., None, :]]
        return rearrange(table[index if index.ndim == 3 else index[None]], "b q k head -> b head q k")


class BEiTNetwork(AdaptedNetwork):
    """A BeitForMaskedImageModeling that sees the patches of a prompt, and a tokenizer that paints its codes.

    Raises:
        ValueError: when the tokenizer has other codes.
    """

    def __init__(self, model: BeitForMaskedImageModeling, tokenizer: DVAE) -> None:
        super().__init__(model)
        codes = tokenizer.num_codes
        if codes != model.config.vocab_size:
            raise ValueError(f"the tokenizer has {codes} codes, the model {model.config.vocab_size}; give its own.")
        self.encoder = Encoder(model)
        self.tokenizer = tokenizer

    @property
    def layout(self) -> Layout:
        """The canvas with one example."""
        return _layout(self.config)

    def forward(self, canvas: torch.Tensor, visible: torch.Tensor, decoded: torch.Tensor) -> MaskedLMOutput:
        """Predict the codes of the decoded patches.

        Args:
            canvas: [batch, 3, height, width] in [0, 1].
            visible: Ids of the patches that are shown, [n] or [batch, n]; what is not decoded is not.
            decoded: Ids of the patches that are there, [m] or [batch, m]; those that are not visible are mask tokens.
        """
        visible, decoded = visible.to(canvas.device), decoded.to(canvas.device)
        pixels = (2 * canvas - 1).to(self.dtype)  # mean and standard deviation of BEiT's pictures are 0.5
        return MaskedLMOutput(logits=self.encoder(pixels, visible, decoded))


def _resize(pixels: torch.Tensor, side: int) -> torch.Tensor:
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)


def _layout(config: Any) -> Layout:
    """The canvas of a config, with one example."""
    return Layout(canvas_size=config.image_size, patch_size=config.patch_size)


def check_config(config: BeitConfig, source: str) -> None:
    """Refuse what cannot complete a prompt's canvas."""
    if not isinstance(config.image_size, int) or not isinstance(config.patch_size, int) or config.num_channels != 3:
        raise ValueError(f"{source} sees no square of 3 channels (image_size={config.image_size!r}).")
    if not config.use_mask_token:
        raise ValueError(f"{source} has no mask token (use_mask_token); give a BEiT that completes pictures.")
    if config.use_relative_position_bias:
        raise ValueError(f"{source} has relative positions in every layer (use_relative_position_bias); share them.")


class BEiT(CodeModel):
    """A BEiT that can be traced.

    The names that lead to its parts:

        BEiT
        ├── encoder          embeddings, position_bias
        │   ├── layers[i]    layernorm_before, attention (q_proj, k_proj, v_proj, o_proj; .heads, .pattern),
        │   │                layernorm_after, mlp (fc1, fc2)
        │   ├── norm
        │   └── head         residual stream → logits of the codes
        └── tokenizer        decode(codes) → pixels, encode(pixels) → codes

    It has one stage, "encoder", of CLS and the decoded patches, and the units of a MAE-VQGAN's decoder. Everything else
    is as in `MAEVQGAN`: `trace`, `generate`, one-shot and `query_only()` prompts.

    Args:
        source: A Hub id, a folder written by `save_pretrained`, or a ready BeitForMaskedImageModeling.
        tokenizer: The folder of DALL-E's published `decoder.pkl` and `encoder.pkl`; by default the model's own.
        revision: Revision of a Hub id.
        **kwargs: As for `ViTMAE`. The tokenizer is in float32 whatever the `dtype`.

    Raises:
        TypeError, ValueError, OSError: naming the source and what is wrong with it.
    """

    config_class = BeitConfig
    module_class = BeitForMaskedImageModeling
    envoy_classes = {BeitAttention: AttentionEnvoy, Encoder: StageEnvoy}

    def __init__(self, source: Any, *, tokenizer: StrPath | None = None, **kwargs: Any) -> None:
        self._tokenizer = tokenizer
        super().__init__(source, **kwargs)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """ "encoder"."""
        config = self.network.config
        heads = config.num_attention_heads
        return (Stage("encoder", config.num_hidden_layers, heads, config.hidden_size // heads),)

    def positions(self, stage: str, prompts: VisualPrompt | None = None) -> torch.Tensor:
        """CLS, then the decoded patches, in the prompt's order: LongTensor [token]."""
        return self.encoder.positions if prompts is None else positions(prompts.decoded)

    def groups(self, stage: str, granularity: str, layout: Layout | None = None) -> dict[str, torch.Tensor]:
        """As those of a MAE-VQGAN's decoder: by quadrant, CLS, query and output."""
        return autoencoder_groups("decoder", granularity, layout or self.layout)

    def codes(self, canvas: torch.Tensor) -> torch.Tensor:
        """The tokenizer's codes of canvases, LongTensor [batch, patch], of their pictures at its own size."""
        tokenizer = self.network.tokenizer
        side = self.layout.grid * tokenizer.patch_size
        return tokenizer.encode(_resize(canvas.float(), side)).to(canvas.device)

    def draw(self, predictions: torch.Tensor) -> torch.Tensor:
        """The tokenizer's picture of codes [batch, patch], enlarged bicubically: [batch, 3, height, width]."""
        return _resize(self.network.tokenizer.decode(predictions).float(), self.layout.canvas_size)

    def restrict_to_output(self, prompts: VisualPrompt) -> VisualPrompt:
        """Compute the predictions of the output's patches alone."""
        return keep_output(self.encoder.norm, prompts)

    def adapt(self, module: BeitForMaskedImageModeling, source: str) -> BEiTNetwork:
        """The network of a module and the tokenizer, in eval mode."""
        check_config(module.config, source)
        tokenizer = load_tokenizer(self._tokenizer or source, weights=module.device.type != "meta")
        return BEiTNetwork(module.eval(), tokenizer.to(module.device))
