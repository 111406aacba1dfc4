"""ViT-MAE under nnsight: a masked autoencoder that predicts pixels (He et al., *Masked Autoencoders Are Scalable Vision
Learners*, CVPR 2022), which VP compares MAE-VQGAN with (NeurIPS 2022, §4.1).

    >>> model = ViTMAE("facebook/vit-mae-large")
    >>> with model.trace(prompts):
    ...     z = model.encoder.layers[3].attention.heads.save()     # [batch, token, head, head_dim]
    ...     pixels = model.output.logits.save()                    # [batch, decoded patch, 3 * patch_size²], normalised
    >>> canvas = model.generate(prompts)                           # [batch, 3, height, width] in [0, 1]

Canvas, regions and units are MAE-VQGAN's: CLS and the visible patches in the encoder, CLS and the decoded patches in
the decoder. The weights and the modules are transformers' own `ViTMAEForPreTraining`; its forward masks at random:
here the prompt says what is seen.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEAttention, ViTMAEDecoder, ViTMAEModel

from vtv_nnsight.images import denormalise, normalise
from vtv_nnsight.layouts import Layout, decoder_sources, index_of, positions, take
from vtv_nnsight.models.autoencoders import MaskedAutoencoder, output_patches
from vtv_nnsight.models.canvas import AdaptedNetwork
from vtv_nnsight.models.interface import Loss
from vtv_nnsight.models.nnsight_compat import StageEnvoy, attention_envoy
from vtv_nnsight.prompts import VisualPrompt


class Encoder(nn.Module):
    """CLS and the visible patches → [batch, 1 + visible patch, hidden_size]; of transformers' modules."""

    def __init__(self, vit: ViTMAEModel) -> None:
        super().__init__()
        self.embeddings, self.layers, self.norm = vit.embeddings, vit.layers, vit.layernorm

    def forward(self, pixels: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Normalised canvas [batch, 3, height, width] and ids of visible patches → tokens."""
        places = self.embeddings.position_embeddings
        patches = take(self.embeddings.patch_embeddings(pixels) + places[:, 1:], visible)
        cls = (self.embeddings.cls_token + places[:, :1]).expand(len(pixels), -1, -1)
        x = torch.cat([cls, patches], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Decoder(nn.Module):
    """The encoder's tokens, with a mask token at every hidden patch → pixels [batch, decoded patch, patch_size² * 3],
    of transformers' modules."""

    def __init__(self, decoder: ViTMAEDecoder) -> None:
        super().__init__()
        self.embed, self.mask_token = decoder.decoder_embed, decoder.mask_token
        self.pos_embed = decoder.decoder_pos_embed
        self.layers, self.norm, self.head = decoder.decoder_layers, decoder.decoder_norm, decoder.decoder_pred

    def forward(self, encoded: torch.Tensor, visible: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """Tokens of the encoder, and ids of the visible and decoded patches → pixels."""
        x = self.embed(encoded)
        x = torch.cat([x, self.mask_token.expand(len(x), -1, -1).to(x)], dim=1)
        places = self.pos_embed.expand(len(x), -1, -1).to(x.device)
        x = take(x, decoder_sources(visible, decoded).to(x.device)) + take(places, positions(decoded).to(x.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 1:])


class ViTMAENetwork(AdaptedNetwork):
    """A ViTMAEForPreTraining that sees the patches of a prompt.

    Raises:
        ValueError: when its predictions have no picture, or its canvas is not a square of colours.
    """

    def __init__(self, model: ViTMAEForPreTraining) -> None:
        super().__init__(model)
        self.encoder, self.decoder = Encoder(model.vit), Decoder(model.decoder)

    @property
    def layout(self) -> Layout:
        """The canvas with one example."""
        return Layout(canvas_size=self.config.image_size, patch_size=self.config.patch_size)

    def forward(self, canvas: torch.Tensor, visible: torch.Tensor, decoded: torch.Tensor) -> MaskedLMOutput:
        """Predict the decoded patches.

        Args:
            canvas: [batch, 3, height, width] in [0, 1].
            visible: Ids of the patches that the encoder sees, [n] or [batch, n].
            decoded: Ids of the patches that the decoder sees, [m] or [batch, m]; those that are not visible get the
                mask token.
        """
        visible, decoded = visible.to(canvas.device), decoded.to(canvas.device)
        encoded = self.encoder(normalise(canvas).to(self.dtype), visible)
        return MaskedLMOutput(logits=self.decoder(encoded, visible, decoded))


def check_config(config: ViTMAEConfig, source: str) -> None:
    """Refuse what cannot paint a prompt's canvas."""
    if config.norm_pix_loss:
        raise ValueError(f"{source} was trained with norm_pix_loss: its answers have no picture; give one without it.")
    if not isinstance(config.image_size, int) or config.num_channels != 3:
        raise ValueError(f"{source} sees no square of 3 channels (image_size={config.image_size!r}).")


AttentionEnvoy = attention_envoy("o_proj", "num_attention_heads")


class ViTMAE(MaskedAutoencoder):
    """A ViT-MAE that can be traced.

    The names that lead to its parts:

        ViTMAE
        ├── encoder          embeddings
        │   ├── layers[i]    layernorm_before, attention (q_proj, k_proj, v_proj, o_proj; .heads, .pattern),
        │   │                layernorm_after, mlp (fc1, fc2)
        │   └── norm
        └── decoder          embed, mask_token, pos_embed
            ├── layers[i]    the same
            ├── norm
            └── head         residual stream → pixels

    Everything else is as in `MAEVQGAN`: `trace`, `generate`, `encoder.positions`, one-shot and `query_only()` prompts.

        import torch
        from vtv_nnsight import ViTMAE, VisualPrompt

        model = ViTMAE("facebook/vit-mae-base")
        size = model.layout.canvas_size
        prompts = VisualPrompt.from_canvas(torch.rand(2, 3, size, size), model.layout)

        with model.trace(prompts):
            z = model.encoder.layers[2].attention.heads.save()
            pixels = model.output.logits.save()              # [batch, decoded patch, patch_size² * 3], normalised

        canvas = model.generate(prompts)                     # [batch, 3, height, width] in [0, 1]

    Args:
        source: A Hub id, a folder written by `save_pretrained`, or a ready ViTMAEForPreTraining.
        revision: Revision of a Hub id.
        **kwargs: As for transformers' `from_pretrained`: `dtype`, `device_map`, `attn_implementation` ("sdpa", or
            "eager" for `attention.pattern`), …; and nnsight's: `dispatch=True` (load the weights at once), `rename`,
            `envoys`.

    Raises:
        TypeError, ValueError, OSError: naming the source and what is wrong with it; a checkpoint trained with
            norm_pix_loss has no picture of its answers.
    """

    config_class = ViTMAEConfig
    module_class = ViTMAEForPreTraining
    envoy_classes = {ViTMAEAttention: AttentionEnvoy, Encoder: StageEnvoy, Decoder: StageEnvoy}

    @property
    def losses(self) -> tuple[Loss, ...]:
        """ "squared_error": of the output's normalised pixels, averaged over its patches, as trained."""
        return (Loss("squared_error", _squared_error),)

    def truth(self, prompts: VisualPrompt) -> torch.Tensor:
        """The output's patches as the network is to give them: [batch, output patch, patch_size² * 3]."""
        side = prompts.layout.patch_size
        patches = rearrange(normalise(prompts.canvas), "b c (h p) (w q) -> b (h w) (p q c)", p=side, q=side)
        return patches[:, output_patches(prompts)]

    def predictions(self, output: Any) -> torch.Tensor:
        """Normalised pixels, [batch, decoded patch, patch_size² * 3]."""
        return output.logits.float()

    def draw(self, predictions: torch.Tensor) -> torch.Tensor:
        """Normalised pixels of every patch → [batch, 3, height, width] in [0, 1]."""
        side = dict(h=self.layout.grid, p=self.layout.patch_size, c=3)
        return denormalise(rearrange(predictions, "b (h w) (p q c) -> b c (h p) (w q)", **side)).clamp(0, 1)

    def adapt(self, module: ViTMAEForPreTraining, source: str) -> ViTMAENetwork:
        """The network of a ViTMAEForPreTraining, in eval mode."""
        check_config(module.config, source)
        return ViTMAENetwork(module.eval())


def _squared_error(output: Any, prompts: VisualPrompt, truth: torch.Tensor) -> torch.Tensor:
    """Losses [batch] of predictions against the truth [batch, output patch, patch_size² * 3]."""
    patches = prompts.layout.regions["output"].to(prompts.device)
    predicted = output.logits[:, index_of(prompts.decoded, patches)]
    return (predicted.float() - truth).square().flatten(1).mean(1)
