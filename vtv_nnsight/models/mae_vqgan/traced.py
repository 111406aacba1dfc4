"""MAE-VQGAN under nnsight: read and edit what any head of any block computes, while the model completes a canvas.

    >>> model = MAEVQGAN("tiny")
    >>> with model.trace(prompts):
    ...     z = model.encoder.blocks[3].attn.heads.save()     # [batch, token, head, head_dim]
    ...     model.decoder.blocks[2].attn.heads[:, :, 5] = 0   # silence a head
    ...     logits = model.output.logits.save()               # [batch, decoded patch, code]

nnsight's own ways (`save`, `tracer.invoke`, `edit`, `session`, `cache`, `with loss.backward():`) all apply.
"""

from __future__ import annotations

from typing import Any

import torch

from vtv_nnsight.models import nnsight_compat as compat
from vtv_nnsight.models.autoencoders import CodeModel, MaskedAutoencoder
from vtv_nnsight.models.mae_vqgan.config import MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.published import describe, published_name
from vtv_nnsight.models.mae_vqgan.transformer import Attention, Decoder, Encoder, MAEVQGANModel
from vtv_nnsight.models.sources import EMBEDDED
from vtv_nnsight.models.torch_files import StrPath


class AttentionEnvoy(compat.Envoy):
    """An attention layer with heads that can be told apart."""

    heads: compat.eproperty = compat.heads_of("proj")

    @compat.writable(compat.PATTERN_AXES)
    @compat.EagerProperty(
        key="softmax.output", description='attention pattern, [batch, head, query, key] (only "eager")'
    )
    def pattern(self, value: Any) -> torch.Tensor:
        """How much each token attends to each: [batch, head, query token, key token], rows that sum to one."""
        return compat.editable(value)


class MAEVQGAN(CodeModel, MaskedAutoencoder):
    """A MAE-VQGAN that can be traced.

    The names that lead to its parts:

        MAEVQGAN
        ├── encoder          patch_embed, cls_token, pos_embed
        │   ├── blocks[i]    norm1, attn (qkv, proj; .heads, .pattern), norm2, mlp (fc1, fc2)
        │   └── norm
        ├── decoder          embed, mask_token, pos_embed
        │   ├── blocks[i]    the same
        │   ├── norm
        │   └── head         residual stream → codebook logits
        └── vqgan            encode(pixels) → codes, decode(codes) → pixels

    Every module has `.input` and `.output`; a block's `.output` is the residual stream [batch, token, width].
    `attn.heads` is [batch, token, head, head_dim], `attn.pattern` [batch, head, query token, key token], and
    `encoder.positions` and `decoder.positions` say where on the canvas the tokens lie: [token]. Values can be read,
    replaced (`attn.heads = z`) and edited in place (`attn.heads[:, 0] = 0`), and gradients flow through them.

        import torch
        from vtv_nnsight import MAEVQGAN, VisualPrompt

        model = MAEVQGAN("tiny")
        size = model.layout.canvas_size
        prompts = VisualPrompt.from_canvas(torch.rand(2, 3, size, size), model.layout)

        with model.trace(prompts):                           # the transformer
            z = model.encoder.blocks[2].attn.heads.save()
            logits = model.output.logits.save()              # [batch, decoded patch, code]

        with model.generate(prompts) as tracer:              # the transformer, arg-max codes, the VQGAN
            model.decoder.blocks[0].attn.heads[:, :, 1] = 0
            canvas = tracer.result.save()                    # [batch, 3, height, width] in [0, 1]

    Weights are loaded when a trace first needs them; `scan` never does.

    Args:
        source: "tiny" (the embedded model), a folder written by `save_pretrained`, a Hub id, a published checkpoint
            file (`.pth`), or a ready MAEVQGANModel.
        vqgan: The tokenizer's own checkpoint, for a published file that lacks it.
        revision: Revision of a Hub id.
        **kwargs: As for transformers' `from_pretrained`: `dtype`, `device_map`, `attn_implementation` ("sdpa", or
            "eager" for `attn.pattern`), …; and nnsight's: `dispatch=True` (load the weights at once), `rename`,
            `envoys`.

    Raises:
        TypeError, ValueError, OSError: naming the source and what is wrong with it.
    """

    config_class = MAEVQGANConfig
    module_class = MAEVQGANModel
    source_kinds = '"tiny", a folder, a Hub id, a checkpoint file'
    file_options = ("vqgan", "num_attention_heads", "decoder_num_attention_heads")
    published_name = staticmethod(published_name)
    envoy_classes = {Attention: AttentionEnvoy, Encoder: compat.StageEnvoy, Decoder: compat.StageEnvoy}

    def __init__(self, source: StrPath | MAEVQGANModel = EMBEDDED, **kwargs: Any) -> None:
        super().__init__(source, **kwargs)

    def layer(self, stage: str, layer: int) -> Any:
        """The envoy of a block, `encoder.blocks[layer]` or `decoder.blocks[layer]`."""
        return getattr(self, stage).blocks[layer]

    def attention(self, stage: str, layer: int) -> Any:
        """The attention of a block: `encoder.blocks[layer].attn`."""
        return self.layer(stage, layer).attn

    def codes(self, canvas: torch.Tensor) -> torch.Tensor:
        """The VQGAN's codes of canvases [batch, 3, height, width]: LongTensor [batch, patch]."""
        vqgan = self.network.vqgan
        return vqgan.encode(canvas.to(vqgan.codebook.weight.dtype)).to(canvas.device)

    def draw(self, predictions: torch.Tensor) -> torch.Tensor:
        """The VQGAN's picture of codes [batch, patch]: [batch, 3, height, width] in [0, 1]."""
        return self.network.vqgan.decode(predictions)

    def read_released(self, source: str, **options: Any) -> tuple[MAEVQGANConfig, dict[str, torch.Tensor]]:
        """The config that the tensors of a published file tell, and these."""
        return describe(source, **options)
