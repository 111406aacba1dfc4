"""MAE-VQGAN under nnsight: read and edit what any head of any block computes, while the model completes a canvas.

    >>> model = MAEVQGAN("tiny")
    >>> with model.trace(prompts):
    ...     z = model.encoder.blocks[3].attn.heads.save()     # [batch, token, head, head_dim]
    ...     model.decoder.blocks[2].attn.heads[:, :, 5] = 0   # silence a head
    ...     logits = model.output.logits.save()               # [batch, decoded patch, code]

nnsight's own ways (`save`, `tracer.invoke`, `edit`, `session`, `cache`, `with loss.backward():`) all apply.
"""

from __future__ import annotations

import os
from importlib.resources import files
from typing import Any

import torch
from nnsight.intervention.envoy import Envoy, eproperty

from vtv_nnsight.models.canvas import CanvasModel, copy_with, drop_none
from vtv_nnsight.models.interface import Loss
from vtv_nnsight.models.mae import MaskedAutoencoder, token_loss
from vtv_nnsight.models.mae_vqgan.config import MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.layers import Attention
from vtv_nnsight.models.mae_vqgan.transformer import Decoder, Encoder, MAEVQGANModel, MAEVQGANOutput
from vtv_nnsight.models.nnsight_compat import EagerProperty, StackEnvoy, editable, heads_of
from vtv_nnsight.models.torch_files import is_checkpoint
from vtv_nnsight.prompts import VisualPrompt


class AttentionEnvoy(Envoy):
    """An attention layer whose heads can be told apart."""

    heads: eproperty = heads_of("proj")

    @EagerProperty(key="softmax.output", description='attention pattern, [batch, head, query, key] (only "eager")')
    def pattern(self, value: Any) -> torch.Tensor:
        """How much each token attends to each: [batch, head, query token, key token], rows that sum to one."""
        return editable(value)

    @pattern.transform
    def pattern(self, edited: torch.Tensor, raw: Any) -> torch.Tensor:
        return edited


class MAEVQGAN(CanvasModel, MaskedAutoencoder):
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

    def __init__(
        self, source: str | os.PathLike | MAEVQGANModel = "tiny", *, revision: str | None = None, **kwargs: Any
    ) -> None:
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        if not isinstance(source, (str, MAEVQGANModel)):
            raise TypeError(
                f'{type(source).__name__} is not a source; give "tiny", a folder, a Hub id, a checkpoint file or a '
                "MAEVQGANModel."
            )
        envoys = kwargs.pop("envoys", None) or {}
        if isinstance(envoys, dict):
            envoys = {Attention: AttentionEnvoy, Encoder: StackEnvoy, Decoder: StackEnvoy, **envoys}
        super().__init__(source, revision=revision, envoys=envoys, **kwargs)

    @property
    def losses(self) -> tuple[Loss, ...]:
        """ "tokens": the mean cross-entropy of the output's logits against the tokenizer's codes of the truth."""
        return (Loss("tokens", token_loss),)

    @property
    def parts(self) -> dict[str, str]:
        """What it is made of, for `vtv info`: name → words."""
        config = self._module.config
        levels = ", ".join(str(config.vqgan_channels * m) for m in config.vqgan_channel_multipliers)
        codes = f"{config.num_codes} codes of width {config.code_dim}; levels of {levels} channels"
        return super().parts | {"vqgan": codes}

    def truth(self, prompts: VisualPrompt) -> torch.Tensor:
        """The tokenizer's codes of the truth: LongTensor [batch, output patch]."""
        output = prompts.layout.regions["output"].to(prompts.device)
        prompts.layout.index(prompts.decoded, output)
        return self._codes(prompts)[:, output]

    def paint(self, output: MAEVQGANOutput, prompts: VisualPrompt, paste: bool = True) -> torch.Tensor:
        """The VQGAN's picture of the arg-max codes at the hidden patches: [batch, 3, height, width] in [0, 1]."""
        return self._module.paint(output.logits.argmax(-1), prompts.canvas, prompts.visible, prompts.decoded, paste)

    def ceiling(self, prompts: VisualPrompt) -> torch.Tensor:
        """The tokenizer's own pictures of the canvases: [batch, 3, height, width] in [0, 1]."""
        everything, codes = prompts.layout.all_patches.to(prompts.device), self._codes(prompts)
        return self._module.paint(codes, prompts.canvas, everything, everything, paste=False)

    @torch.no_grad()
    def _codes(self, prompts: VisualPrompt) -> torch.Tensor:
        """The tokenizer's codes of canvases, LongTensor [batch, patch]."""
        self.dispatch()
        vqgan = self._module.vqgan
        return vqgan.encode(prompts.canvas.to(vqgan.codebook.weight.dtype)).to(prompts.device)

    def _load_meta(self, source: str, vqgan: Any = None, **kwargs: Any) -> torch.nn.Module:
        return self._build(self._read_config(source, vqgan, **kwargs), source, **kwargs)

    def _load(self, source: str, vqgan: Any = None, **kwargs: Any) -> torch.nn.Module:
        if is_checkpoint(source):
            from vtv_nnsight.models.mae_vqgan.published import load_checkpoint

            own = drop_none(kwargs, *_HEAD_OPTIONS, "dtype", "attn_implementation")
            rest = {name: value for name, value in kwargs.items() if name not in own}
            return self._wrap(load_checkpoint(source, vqgan=vqgan, **own), **rest)
        self._read_config(source, vqgan, **kwargs)
        return self._from_pretrained(_folder(source), **kwargs)

    def _wrap(self, module: MAEVQGANModel, **kwargs: Any) -> torch.nn.Module:
        """The module itself, or a copy of it when something about it is to differ."""
        chosen = drop_none(kwargs, *kwargs)
        if "vqgan" in chosen:
            raise ValueError(_STRAY_VQGAN.format(type(module).__name__))
        return copy_with(module, **chosen) if chosen else module

    def _read_config(self, source: str, vqgan: Any = None, **kwargs: Any) -> MAEVQGANConfig:
        if is_checkpoint(source):
            from vtv_nnsight.models.mae_vqgan.published import read_config

            return read_config(source, vqgan=vqgan, **drop_none(kwargs, *_HEAD_OPTIONS))
        if vqgan is not None:
            raise ValueError(_STRAY_VQGAN.format(repr(source)))
        return super()._read_config(_folder(source), **kwargs)


_STRAY_VQGAN = "vqgan= is the tokenizer of a published checkpoint file; {} has its own."
_HEAD_OPTIONS = ("num_attention_heads", "decoder_num_attention_heads")


def _folder(source: str) -> str:
    """Where transformers finds a source: a folder or a Hub id."""
    if source != "tiny":
        return source
    folder = files("vtv_nnsight") / "weights" / "tiny"
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f'the embedded model "tiny" has no {" and no ".join(missing)} in {folder}.')
    return str(folder)
