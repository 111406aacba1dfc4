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

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from nnsight.intervention.envoy import Envoy
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F
from transformers import BeitConfig, BeitForMaskedImageModeling
from transformers.models.beit.modeling_beit import BeitAttention
from transformers.utils import ModelOutput

from vtv_nnsight.layouts import Layout, index_of, positions, take
from vtv_nnsight.models.baselines.dalle import DECODER, Tokenizer, can_encode, load_tokenizer
from vtv_nnsight.models.canvas import CanvasModel, copy_with, drop_none
from vtv_nnsight.models.interface import InContextModel, Loss, Stage
from vtv_nnsight.models.mae import groups, paint_canvas, token_loss
from vtv_nnsight.models.nnsight_compat import StackEnvoy
from vtv_nnsight.models.vit_mae import AttentionEnvoy
from vtv_nnsight.prompts import VisualPrompt


@dataclass
class BEiTOutput(ModelOutput):
    """
    Args:
        logits: Scores of the tokenizer's codes, [batch, decoded patch, code].
    """

    logits: torch.FloatTensor | None = None


class Encoder(nn.Module):
    """CLS and the decoded patches, hidden ones as mask tokens → logits [batch, decoded patch, code]; of transformers'
    modules.

    Patches that are not decoded are not there at all, as in the decoder of a masked autoencoder: rows and columns of
    the relative positions are those of the tokens that are.
    """

    def __init__(self, model: BeitForMaskedImageModeling) -> None:
        super().__init__()
        beit = model.beit
        self.embeddings, self.position_bias, self.layers = beit.embeddings, beit.shared_position_bias, beit.layers
        self.last_norm, self.norm, self.head = beit.layernorm, model.layernorm, model.lm_head
        self.grid = layout_of(model.config).grid

    def forward(self, pixels: torch.Tensor, visible: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        tokens, own = positions(decoded), self.embeddings
        patches = take(own.patch_embeddings(pixels), decoded)
        seen = (decoded[..., :, None] == visible[..., None, :]).any(-1)
        patches = torch.where(seen[..., None], patches, own.mask_token)
        x = torch.cat([own.cls_token.expand(len(pixels), -1, -1), patches], dim=1)
        if own.position_embeddings is not None:
            x = x + take(own.position_embeddings.expand(len(x), -1, -1), tokens)
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


class BEiTNetwork(nn.Module):
    """A BeitForMaskedImageModeling that sees the patches which it is told to, and a tokenizer that paints its codes.

    Raises:
        ValueError: when it has no mask token, its relative positions differ from layer to layer, its canvas is not a
            square of colours, or the tokenizer has other codes.
    """

    def __init__(self, model: BeitForMaskedImageModeling, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        check_config(model.config, f"this {type(model).__name__}")
        codes = getattr(tokenizer, "num_codes", model.config.vocab_size)
        if codes != model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {codes} codes, and the model predicts {model.config.vocab_size} (vocab_size); give "
                "tokenizer= the one that it was trained with."
            )
        self.config = model.config
        self.encoder = Encoder(model)
        self.tokenizer = tokenizer
        object.__setattr__(self, "original", model)  # not as a child: its modules have their names here

    @property
    def layout(self) -> Layout:
        """The canvas with one example."""
        return layout_of(self.config)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.embeddings.cls_token.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.embeddings.cls_token.device

    def forward(self, canvas: torch.Tensor, visible: torch.Tensor, decoded: torch.Tensor) -> BEiTOutput:
        """Predict the codes of the decoded patches.

        Args:
            canvas: [batch, 3, height, width] in [0, 1].
            visible: Ids of the patches that are shown, [n] or [batch, n]; what is not decoded is not.
            decoded: Ids of the patches that are there, [m] or [batch, m]; those that are not visible are mask tokens.
        """
        visible, decoded = visible.to(canvas.device), decoded.to(canvas.device)
        pixels = (2 * canvas - 1).to(self.dtype)  # mean and standard deviation of BEiT's pictures are 0.5
        return BEiTOutput(logits=self.encoder(pixels, visible, decoded))

    @torch.no_grad()
    def generate(
        self, canvas: torch.Tensor, visible: torch.Tensor, decoded: torch.Tensor, paste: bool = True
    ) -> torch.Tensor:
        """Complete the canvas with the picture of the arg-max codes, and its own pixels at the visible patches.
        Arguments are `forward`'s, with ids that the batch shares; returns are `paint`'s."""
        codes = self.forward(canvas, visible, decoded).logits.argmax(-1)
        return self.paint(codes, canvas, visible, decoded, paste)

    @torch.no_grad()
    def paint(
        self,
        codes: torch.Tensor,
        canvas: torch.Tensor,
        visible: torch.Tensor,
        decoded: torch.Tensor,
        paste: bool = True,
    ) -> torch.Tensor:
        """Canvases with their hidden patches drawn from codes [batch, decoded patch]. The tokenizer's picture is
        enlarged bicubically.

        When only some rows or columns are decoded, they are repeated over the canvas, as MAE-VQGAN's are zero-shot.

        Returns:
            [batch, 3, height, width] in [0, 1], in steps of 1/255 (truncated).
        """
        tokenizer = self._needed()

        def draw(codes: torch.Tensor) -> torch.Tensor:
            return _resize(tokenizer.decode(codes).to(canvas), self.layout.canvas_size)

        return paint_canvas(draw, codes, canvas, visible, decoded, self.layout, paste)

    @torch.no_grad()
    def codes(self, canvas: torch.Tensor) -> torch.Tensor:
        """The tokenizer's codes of canvases, LongTensor [batch, patch], of their pictures at its own size."""
        tokenizer = self._needed()
        if not can_encode(tokenizer):
            raise ValueError("this BEiT's tokenizer only decodes: there are no codes of the truth.")
        side = self.layout.grid * getattr(tokenizer, "patch_size", 8)
        return tokenizer.encode(_resize(canvas.float(), side)).to(canvas.device)

    def _needed(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"this BEiT has no tokenizer, and its codes no picture; give tokenizer= the path of DALL-E's {DECODER} "
                "(an encoder.pkl beside it gives losses and a ceiling), or anything with decode(codes)."
            )
        return self.tokenizer


def _resize(pixels: torch.Tensor, side: int) -> torch.Tensor:
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)


def layout_of(config: BeitConfig) -> Layout:
    """The canvas of a config, with one example."""
    return Layout(canvas_size=config.image_size, patch_size=config.patch_size)


def check_config(config: BeitConfig, source: str) -> None:
    """Refuse what cannot complete a prompt's canvas."""
    if not isinstance(config.image_size, int) or not isinstance(config.patch_size, int) or config.num_channels != 3:
        raise ValueError(
            f"{source} sees {config.num_channels} channels of image_size={config.image_size!r} and "
            f"patch_size={config.patch_size!r}; expected 3 of a square."
        )
    if not config.use_mask_token:
        raise ValueError(
            f"{source} has no mask token (use_mask_token): it was not trained, or trained further, to complete "
            "pictures; give one that was, such as microsoft/beit-base-patch16-224-pt22k."
        )
    if config.use_relative_position_bias:
        raise ValueError(
            f"{source} has relative positions of its own in every layer (use_relative_position_bias), as only BEiTs "
            "that classify have; give one whose layers share them (use_shared_relative_position_bias)."
        )


class BEiT(CanvasModel, InContextModel):
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
        tokenizer: As for `dalle.load_tokenizer`: DALL-E's published `decoder.pkl` or its folder, or anything with
            `decode(codes)`. Where it is not given, a `decoder.pkl` in the model's own folder is taken, if there is one.
            Without, there are logits, but nothing is painted. `losses` and the ceiling need its encoder, too.
        revision: Revision of a Hub id.
        **kwargs: As for `ViTMAE`. The tokenizer is in float32 whatever the `dtype`.

    Raises:
        TypeError, ValueError, OSError: naming the source and what is wrong with it.
    """

    config_class = BeitConfig

    def __init__(
        self,
        source: str | os.PathLike | BeitForMaskedImageModeling,
        tokenizer: Tokenizer | str | os.PathLike | None = None,
        *,
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        if not isinstance(source, (str, BeitForMaskedImageModeling)):
            raise TypeError(
                f"{type(source).__name__} is not a source of BEiT; give a Hub id, a folder or a "
                "BeitForMaskedImageModeling."
            )
        envoys = kwargs.pop("envoys", None) or {}
        if isinstance(envoys, dict):
            envoys = {BeitAttention: AttentionEnvoy, Encoder: StackEnvoy, **envoys}
        super().__init__(source, revision=revision, envoys=envoys, tokenizer=tokenizer, **kwargs)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """ "encoder"."""
        config = self._module.config
        heads = config.num_attention_heads
        return (Stage("encoder", config.num_hidden_layers, heads, config.hidden_size // heads),)

    @property
    def losses(self) -> tuple[Loss, ...]:
        """ "tokens": the mean cross-entropy of the output's logits against the tokenizer's codes of the truth; none
        without its encoder."""
        return (Loss("tokens", token_loss),) if can_encode(self._module.tokenizer) else ()

    @property
    def parts(self) -> dict[str, str]:
        """What it is made of, for `vtv info`: name → words."""
        (stage,) = self.stages
        words = f"{stage.layers} blocks of width {stage.width}, {stage.heads} heads; {self._module.config.vocab_size}"
        return {"encoder": f"{words} codes"}

    def attention(self, stage: str, layer: int) -> Envoy:
        """The attention of a layer: `encoder.layers[layer].attention`."""
        return self.encoder.layers[layer].attention

    def outputs(self, stage: str, layer: int) -> dict[str, Envoy]:
        """The attention and the MLP, both before their layer scale, and the layer itself."""
        own = self.encoder.layers[layer]
        return {"attn": own.attention, "mlp": own.mlp, "residual": own}

    def positions(self, stage: str, prompts: VisualPrompt | None = None) -> torch.Tensor:
        """CLS, then the decoded patches, in the prompt's order: LongTensor [token]."""
        return self.encoder.positions if prompts is None else positions(prompts.decoded)

    def groups(self, stage: str, granularity: str, layout: Layout | None = None) -> dict[str, torch.Tensor]:
        """As those of a MAE-VQGAN's decoder: by quadrant, CLS, query and output."""
        return groups("decoder", granularity, layout or self.layout)

    def truth(self, prompts: VisualPrompt) -> torch.Tensor:
        """The tokenizer's codes of the truth: LongTensor [batch, output patch]."""
        output = prompts.layout.regions["output"].to(prompts.device)
        prompts.layout.index(prompts.decoded, output)
        self.dispatch()
        return self._module.codes(prompts.canvas)[:, output]

    def paint(self, output: BEiTOutput, prompts: VisualPrompt, paste: bool = True) -> torch.Tensor:
        """The tokenizer's picture of the arg-max codes at the hidden patches: [batch, 3, height, width] in [0, 1]."""
        return self._module.paint(output.logits.argmax(-1), prompts.canvas, prompts.visible, prompts.decoded, paste)

    def ceiling(self, prompts: VisualPrompt) -> torch.Tensor | None:
        """The tokenizer's own pictures of the canvases: [batch, 3, height, width] in [0, 1]; None without its
        encoder."""
        self.dispatch()
        if not can_encode(self._module.tokenizer):
            return None
        everything = prompts.layout.all_patches.to(prompts.device)
        return self._module.paint(self._module.codes(prompts.canvas), prompts.canvas, everything, everything, False)

    def restrict_to_output(self, prompts: VisualPrompt) -> VisualPrompt:
        """Compute the predictions of the output's patches alone."""
        output = prompts.layout.regions["output"].to(prompts.device)
        kept = positions(index_of(prompts.decoded, output))
        self.encoder.norm.output = self.encoder.norm.output[:, kept]
        return prompts._with(decoded=output)

    def save_pretrained(self, folder: str | os.PathLike, **kwargs: Any) -> None:
        """Write a safetensors folder that this class and transformers read, without the tokenizer."""
        self.dispatch()
        self._module.original.save_pretrained(folder, **kwargs)

    def _auto(self) -> type[BeitForMaskedImageModeling]:
        return BeitForMaskedImageModeling

    def _load_meta(self, source: str, tokenizer: Any = None, **kwargs: Any) -> BEiTNetwork:
        model = self._build(self._read_config(source, **kwargs), source, **kwargs)
        return BEiTNetwork(model, _tokenizer(tokenizer, source, weights=False))

    def _load(self, source: str, tokenizer: Any = None, **kwargs: Any) -> BEiTNetwork:
        self._read_config(source, **kwargs)
        model = self._from_pretrained(source, **kwargs)
        return BEiTNetwork(model, _on(_tokenizer(tokenizer, source), model.device))

    def _wrap(self, module: BeitForMaskedImageModeling, tokenizer: Any = None, **kwargs: Any) -> BEiTNetwork:
        """The network of a ready module, or of a copy of it when something about it is to differ."""
        check_config(module.config, f"this {type(module).__name__}")
        if chosen := drop_none(kwargs, *kwargs):
            module = copy_with(module, **chosen)
        return BEiTNetwork(module.eval(), _on(_tokenizer(tokenizer, ""), module.device))

    def _read_config(self, source: str, **kwargs: Any) -> BeitConfig:
        config = super()._read_config(source, **kwargs)
        check_config(config, repr(source))
        if not config.use_mean_pooling:
            raise ValueError(
                f"{source!r} has two norms after its last layer (use_mean_pooling=False), each of which transformers "
                "loads into the other's place; give a BEiT that has one, or a ready module."
            )
        return config


def _tokenizer(given: Any, source: str, weights: bool = True) -> Tokenizer | None:
    """The tokenizer that was given, the one in the model's folder, or none."""
    if given is not None:
        return load_tokenizer(given, weights=weights)
    return load_tokenizer(source, weights=weights) if source and (Path(source) / DECODER).is_file() else None


def _on(tokenizer: Tokenizer | None, device: torch.device) -> Tokenizer | None:
    return tokenizer.to(device) if isinstance(tokenizer, nn.Module) else tokenizer
