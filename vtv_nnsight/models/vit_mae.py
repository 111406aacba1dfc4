"""ViT-MAE under nnsight: a masked autoencoder that predicts pixels (He et al., *Masked Autoencoders Are Scalable Vision
Learners*, CVPR 2022), which VP compares MAE-VQGAN with (NeurIPS 2022, §4.1).

    >>> model = ViTMAE("facebook/vit-mae-large")
    >>> with model.trace(prompts):
    ...     z = model.encoder.layers[3].attention.heads.save()     # [batch, token, head, head_dim]
    ...     pixels = model.output.logits.save()                    # [batch, decoded patch, 3 * patch_size²], normalised
    >>> canvas = model.generate(prompts)                           # [batch, 3, height, width] in [0, 1]

Canvas, regions and units are MAE-VQGAN's: CLS and the visible patches in the encoder, CLS and the decoded patches in
the decoder. The weights and the modules are transformers' own `ViTMAEForPreTraining`, whose forward masks at random;
here the prompt says what is seen.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from nnsight.intervention.envoy import Envoy, eproperty
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEAttention, ViTMAEDecoder, ViTMAEModel
from transformers.utils import ModelOutput

from vtv_nnsight.images import denormalise, normalise
from vtv_nnsight.layouts import Layout, decoder_sources, index_of, positions, take
from vtv_nnsight.models.canvas import CanvasModel, copy_with, drop_none
from vtv_nnsight.models.interface import Loss
from vtv_nnsight.models.mae import MaskedAutoencoder, paint_canvas
from vtv_nnsight.models.nnsight_compat import EagerProperty, StackEnvoy, heads_of
from vtv_nnsight.prompts import VisualPrompt


@dataclass
class ViTMAEOutput(ModelOutput):
    """
    Args:
        logits: Pixels of the decoded patches, row by row, red, green and blue beside each other, less ImageNet's mean
            and over its deviation: [batch, decoded patch, patch_size² * 3].
    """

    logits: torch.FloatTensor | None = None


class Encoder(nn.Module):
    """CLS and the visible patches → [batch, 1 + visible patch, hidden_size]; of transformers' modules."""

    def __init__(self, vit: ViTMAEModel) -> None:
        super().__init__()
        self.embeddings, self.layers, self.norm = vit.embeddings, vit.layers, vit.layernorm

    def forward(self, pixels: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
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
        self.embed, self.mask_token, self.pos_embed = (
            decoder.decoder_embed,
            decoder.mask_token,
            decoder.decoder_pos_embed,
        )
        self.layers, self.norm, self.head = decoder.decoder_layers, decoder.decoder_norm, decoder.decoder_pred

    def forward(self, encoded: torch.Tensor, visible: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        x = self.embed(encoded)
        x = torch.cat([x, self.mask_token.expand(len(x), -1, -1).to(x)], dim=1)
        places = self.pos_embed.expand(len(x), -1, -1).to(x.device)
        x = take(x, decoder_sources(visible, decoded).to(x.device)) + take(places, positions(decoded).to(x.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 1:])


class ViTMAENetwork(nn.Module):
    """A ViTMAEForPreTraining that sees the patches which it is told to.

    Raises:
        ValueError: when its predictions have no picture, or its canvas is not a square of colours.
    """

    def __init__(self, model: ViTMAEForPreTraining) -> None:
        super().__init__()
        check_config(model.config, f"this {type(model).__name__}")
        self.config = model.config
        self.encoder, self.decoder = Encoder(model.vit), Decoder(model.decoder)
        object.__setattr__(self, "original", model)  # not as a child: its modules have their names here

    @property
    def layout(self) -> Layout:
        """The canvas with one example."""
        return layout_of(self.config)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.mask_token.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.embeddings.cls_token.device

    def forward(self, canvas: torch.Tensor, visible: torch.Tensor, decoded: torch.Tensor) -> ViTMAEOutput:
        """Predict the decoded patches.

        Args:
            canvas: [batch, 3, height, width] in [0, 1].
            visible: Ids of the patches that the encoder sees, [n] or [batch, n].
            decoded: Ids of the patches that the decoder sees, [m] or [batch, m]; those that are not visible get the
                mask token.
        """
        visible, decoded = visible.to(canvas.device), decoded.to(canvas.device)
        encoded = self.encoder(normalise(canvas).to(self.dtype), visible)
        return ViTMAEOutput(logits=self.decoder(encoded, visible, decoded))

    @torch.no_grad()
    def generate(
        self, canvas: torch.Tensor, visible: torch.Tensor, decoded: torch.Tensor, paste: bool = True
    ) -> torch.Tensor:
        """Complete the canvas with the predicted pixels, and its own at the visible patches. Arguments are `forward`'s,
        with ids that the batch shares; returns are `paint`'s."""
        return self.paint(self.forward(canvas, visible, decoded).logits, canvas, visible, decoded, paste)

    @torch.no_grad()
    def paint(
        self,
        logits: torch.Tensor,
        canvas: torch.Tensor,
        visible: torch.Tensor,
        decoded: torch.Tensor,
        paste: bool = True,
    ) -> torch.Tensor:
        """Canvases with their hidden patches drawn from predictions [batch, decoded patch, patch_size² * 3].

        When only some rows or columns are decoded, they are repeated over the canvas, as MAE-VQGAN's are zero-shot.

        Returns:
            [batch, 3, height, width] in [0, 1], in steps of 1/255 (truncated).
        """
        side = dict(h=self.layout.grid, p=self.layout.patch_size, c=3)

        def draw(patches: torch.Tensor) -> torch.Tensor:
            return denormalise(rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", **side)).clamp(0, 1)

        return paint_canvas(draw, logits.to(canvas), canvas, visible, decoded, self.layout, paste)


def layout_of(config: ViTMAEConfig) -> Layout:
    """The canvas of a config, with one example."""
    return Layout(canvas_size=config.image_size, patch_size=config.patch_size)


def check_config(config: ViTMAEConfig, source: str) -> None:
    """Refuse what cannot paint a prompt's canvas."""
    if config.norm_pix_loss:
        raise ValueError(
            f"{source} was trained with norm_pix_loss: it predicts every patch less its own mean and over its own "
            "deviation, which only the hidden truth has, so that its answers have no picture; give a checkpoint that "
            "predicts pixels as they are."
        )
    if not isinstance(config.image_size, int) or config.num_channels != 3:
        raise ValueError(
            f"{source} sees {config.num_channels} channels of image_size={config.image_size!r}; expected 3 of a square."
        )


class AttentionEnvoy(Envoy):
    """An attention layer of transformers' whose heads can be told apart."""

    heads: eproperty = heads_of("o_proj", "num_attention_heads")

    @EagerProperty(key="output", description='attention pattern, [batch, head, query, key] (only "eager")')
    def pattern(self, value: Any) -> torch.Tensor:
        """How much each token attends to each: [batch, head, query token, key token], rows that sum to one. It comes
        after `heads`, and can only be read."""
        return value[1]

    @pattern.postprocess
    def pattern(self, value: Any) -> Any:
        raise ValueError(f"{self.path}.pattern can only be read; change {self.path}.heads, which come of it.")


class ViTMAE(CanvasModel, MaskedAutoencoder):
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

    def __init__(
        self, source: str | os.PathLike | ViTMAEForPreTraining, *, revision: str | None = None, **kwargs: Any
    ) -> None:
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        if not isinstance(source, (str, ViTMAEForPreTraining)):
            raise TypeError(
                f"{type(source).__name__} is not a source of ViTMAE; give a Hub id, a folder or a ViTMAEForPreTraining."
            )
        envoys = kwargs.pop("envoys", None) or {}
        if isinstance(envoys, dict):
            envoys = {ViTMAEAttention: AttentionEnvoy, Encoder: StackEnvoy, Decoder: StackEnvoy, **envoys}
        super().__init__(source, revision=revision, envoys=envoys, **kwargs)

    @property
    def losses(self) -> tuple[Loss, ...]:
        """ "squared_error": of the output's normalised pixels, averaged over its patches, as trained."""
        return (Loss("squared_error", _squared_error),)

    def attention(self, stage: str, layer: int) -> Envoy:
        """The attention of a layer: `encoder.layers[layer].attention`."""
        return getattr(self, stage).layers[layer].attention

    def outputs(self, stage: str, layer: int) -> dict[str, Envoy]:
        """The attention, the MLP, and the layer itself."""
        own = getattr(self, stage).layers[layer]
        return {"attn": own.attention, "mlp": own.mlp, "residual": own}

    def truth(self, prompts: VisualPrompt) -> torch.Tensor:
        """The output's patches as the network is to give them: [batch, output patch, patch_size² * 3]."""
        output = prompts.layout.regions["output"].to(prompts.device)
        prompts.layout.index(prompts.decoded, output)
        side = prompts.layout.patch_size
        patches = rearrange(normalise(prompts.canvas), "b c (h p) (w q) -> b (h w) (p q c)", p=side, q=side)
        return patches[:, output]

    def paint(self, output: ViTMAEOutput, prompts: VisualPrompt, paste: bool = True) -> torch.Tensor:
        """The predicted pixels at the hidden patches, on the prompts' own: [batch, 3, height, width] in [0, 1]."""
        return self._module.paint(output.logits, prompts.canvas, prompts.visible, prompts.decoded, paste)

    def save_pretrained(self, folder: str | os.PathLike, **kwargs: Any) -> None:
        """Write a safetensors folder that this class and transformers read."""
        self.dispatch()
        self._module.original.save_pretrained(folder, **kwargs)

    def _auto(self) -> type[ViTMAEForPreTraining]:
        return ViTMAEForPreTraining

    def _load_meta(self, source: str, **kwargs: Any) -> ViTMAENetwork:
        return ViTMAENetwork(self._build(self._read_config(source, **kwargs), source, **kwargs))

    def _load(self, source: str, **kwargs: Any) -> ViTMAENetwork:
        self._read_config(source, **kwargs)
        return ViTMAENetwork(self._from_pretrained(source, **kwargs))

    def _wrap(self, module: ViTMAEForPreTraining, **kwargs: Any) -> ViTMAENetwork:
        """The network of a ready module, or of a copy of it when something about it is to differ."""
        check_config(module.config, f"this {type(module).__name__}")
        if chosen := drop_none(kwargs, *kwargs):
            module = copy_with(module, **chosen)
        return ViTMAENetwork(module.eval())

    def _read_config(self, source: str, **kwargs: Any) -> ViTMAEConfig:
        config = super()._read_config(source, **kwargs)
        check_config(config, repr(source))
        return config


def _squared_error(output: ViTMAEOutput, prompts: VisualPrompt, truth: torch.Tensor) -> torch.Tensor:
    """Losses [batch] of predictions against the truth [batch, output patch, patch_size² * 3]."""
    patches = prompts.layout.regions["output"].to(prompts.device)
    predicted = output.logits[:, index_of(prompts.decoded, patches)]
    return (predicted.float() - truth).square().flatten(1).mean(1)
