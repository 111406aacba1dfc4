"""MAE-VQGAN under nnsight: read and edit what any head of any block computes, while the model completes a canvas.

    >>> model = MAEVQGAN("tiny")
    >>> with model.trace(prompts):
    ...     z = model.encoder.blocks[3].attn.heads.save()     # [batch, token, head, head_dim]
    ...     model.decoder.blocks[2].attn.heads[:, :, 5] = 0   # silence a head
    ...     logits = model.output.logits.save()               # [batch, decoded patch, code]

nnsight's own ways (`save`, `tracer.invoke`, `edit`, `session`, `cache`, `with loss.backward():`) all apply.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from nnsight.intervention.batching import Batcher
from nnsight.intervention.envoy import Envoy, eproperty, traceable
from nnsight.intervention.interleaver import Mediator
from nnsight.modeling.huggingface import HuggingFaceModel
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoConfig

from vtv_nnsight import metrics
from vtv_nnsight.layouts import Layout, positions, token_index
from vtv_nnsight.models.interface import Loss
from vtv_nnsight.models.mae import MaskedAutoencoder
from vtv_nnsight.models.mae_vqgan.config import MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.network import Decoder, Encoder, MAEVQGANModel, MAEVQGANOutput
from vtv_nnsight.models.mae_vqgan.vit import Attention
from vtv_nnsight.prompts import VisualPrompt

INPUTS = ("canvas", "visible", "decoded")


class HeadsProperty(eproperty):
    """A view of the model's own memory. With gradients off, an edit in place needs no writing back, which would cost
    as much as the read (and, in a trace of several invokes, a copy of the batch)."""

    def __get__(self, attention: Envoy | None, owner: Any = None) -> Any:
        view = super().__get__(attention, owner)
        if attention is not None and not (view.requires_grad or torch.is_grad_enabled()):
            Mediator.current(self.name).transform = None
        return view


class EagerProperty(eproperty):
    """A value that exists only under attn_implementation="eager"; elsewhere, asking for it says so."""

    def __get__(self, attention: Envoy | None, owner: Any = None) -> Any:
        if attention is not None:
            self._require_eager(attention)
        return super().__get__(attention, owner)

    def __set__(self, attention: Envoy, value: Any) -> None:
        self._require_eager(attention)
        super().__set__(attention, value)

    def _require_eager(self, attention: Envoy) -> None:
        implementation = attention._module.config._attn_implementation
        if implementation != "eager":
            raise ValueError(
                f"attn.{self.name} is not computed by attn_implementation={implementation!r}; "
                'load the model with attn_implementation="eager".'
            )


class AttentionEnvoy(Envoy):
    """An attention layer whose heads can be told apart."""

    @HeadsProperty(key="proj.input", description="outputs z of the heads, [batch, token, head, head_dim]")
    def heads(self, value: Any) -> torch.Tensor:
        """Output z = softmax(qkᵀ/√d)·v of every head, before the output projection: [batch, token, head, head_dim].

        Token 0 is CLS; the others are the patches that the stack sees, in the prompt's order.
        """
        (z,), _ = value
        if z.requires_grad:
            z = z.clone()  # the attention kernel needs its own output, unedited, for the backward pass
        return z.unflatten(-1, (self._module.num_heads, self._module.head_dim))

    @heads.postprocess
    def heads(self, value: torch.Tensor) -> Any:
        expected = (self._module.num_heads, self._module.head_dim)
        if not isinstance(value, torch.Tensor) or tuple(value.shape[-2:]) != expected or value.ndim != 4:
            found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"{self.path}.heads was given {found}; expected a tensor [batch, token, {expected[0]}, {expected[1]}]."
            )
        return (value.flatten(-2),), {}

    @heads.transform
    def heads(self, view: torch.Tensor, raw: Any) -> Any:
        return (view.flatten(-2),), {}

    @EagerProperty(key="softmax.output", description='attention pattern, [batch, head, query, key] (only "eager")')
    def pattern(self, value: Any) -> torch.Tensor:
        """How much each token attends to each: [batch, head, query token, key token], rows that sum to one."""
        return value


class StackEnvoy(Envoy):
    """The encoder or the decoder, which knows where its tokens lie."""

    @eproperty(key="input", description="absolute positions of the tokens, [token]")
    def positions(self, value: Any) -> torch.Tensor:
        """Absolute position of every token of the stack, 0 for CLS and 1 + i for patch i: LongTensor [token].

        Like any input, it comes before what is inside the stack: read it first.
        """
        (*_, seen), _ = value
        return positions(seen)


class PromptBatcher(Batcher):
    """Rows of invokes are rows of canvases. Patch ids are shared by the batch, also when there are as many as rows."""

    def _narrow_tensor(self, tensor: torch.Tensor, group: list) -> torch.Tensor:
        return tensor if _is_ids(tensor) else super()._narrow_tensor(tensor, group)

    def _widen_tensor(self, full: torch.Tensor, group: list, edited: torch.Tensor) -> torch.Tensor:
        return edited if _is_ids(full) else super()._widen_tensor(full, group, edited)


def _is_ids(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 1 and tensor.dtype == torch.long


class MAEVQGAN(MaskedAutoencoder, HuggingFaceModel):
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

    _batcher_class = PromptBatcher

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
    def layout(self) -> Layout:
        """The layout of the model's canvas, with one example."""
        return self._module.config.layout

    @property
    def losses(self) -> tuple[Loss, ...]:
        """ "tokens": the mean cross-entropy of the output's logits against the tokenizer's codes of the truth."""
        return (Loss("tokens", _token_loss),)

    def truth(self, prompts: VisualPrompt) -> torch.Tensor:
        """The tokenizer's codes of the truth: LongTensor [batch, output patch]."""
        output = prompts.layout.regions["output"].to(prompts.device)
        prompts.layout.index(prompts.decoded, output)
        return self._codes(prompts)[:, output]

    def paint(self, output: MAEVQGANOutput, prompts: VisualPrompt) -> torch.Tensor:
        """The VQGAN's picture of the arg-max codes at the hidden patches: [batch, 3, height, width] in [0, 1]."""
        return self._painted(output.logits.argmax(-1), prompts.canvas, prompts.visible, prompts.decoded)

    def ceiling(self, prompts: VisualPrompt) -> torch.Tensor:
        """The tokenizer's own pictures of the canvases: [batch, 3, height, width] in [0, 1]."""
        everything = prompts.layout.all_patches.to(prompts.device)
        return self._painted(self._codes(prompts), prompts.canvas, everything, everything, paste=False)

    def identity(self) -> dict[str, Any]:
        """Its kind, and eight numbers of the mask token, which is what version 0.1 kept of the weights."""
        token = self._module.decoder.mask_token.detach()
        if token.is_meta or type(token) not in (torch.Tensor, torch.nn.Parameter):
            return {"model": "MAEVQGAN"}
        return {"model": "MAEVQGAN", "mask token": token.flatten()[:8].float().tolist()}

    def narrow(self, prompts: VisualPrompt) -> VisualPrompt:
        """Compute the logits of the output's patches alone."""
        output = prompts.layout.regions["output"].to(prompts.device)
        kept = token_index(prompts.decoded, output)
        self.decoder.norm.output = self.decoder.norm.output[:, torch.cat([kept.new_zeros(1), kept])]
        return replace(prompts, decoded=output)

    @torch.no_grad()
    def _codes(self, prompts: VisualPrompt) -> torch.Tensor:
        """The tokenizer's codes of canvases, LongTensor [batch, patch]."""
        vqgan = self._module.vqgan
        return vqgan.encode(prompts.canvas.to(vqgan.codebook.weight.dtype))

    @torch.no_grad()
    def _painted(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._module.paint(*args, **kwargs)

    @traceable
    def generate(self, *inputs: Any, **kwargs: Any) -> torch.Tensor:
        """Complete canvases: called as it is, or as `with model.generate(prompts) as tracer:`, where `tracer.result`
        is the canvas.

        Args:
            *inputs: A VisualPrompt, or canvas, visible and decoded as tensors.
            paste: Keep the canvas's own pixels at the visible patches (default); False gives the VQGAN's picture of
                all of it.

        Returns:
            [batch, 3, height, width] in [0, 1].
        """
        return self._module.generate(*inputs, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> MAEVQGAN:
        """Move or cast the model (device, dtype), in place, as `torch.nn.Module.to` does; loads the weights first."""
        self.dispatch()
        self._module.to(*args, **kwargs)
        return self

    def _load_meta(self, source: str, vqgan: Any = None, **kwargs: Any) -> torch.nn.Module:
        config = self._read_config(source, vqgan, **kwargs)
        chosen = _pick(kwargs, "dtype", "attn_implementation")
        if chosen.get("dtype") == "auto":
            del chosen["dtype"]
        return self._auto().from_config(config, **chosen)

    def _load(self, source: str, vqgan: Any = None, **kwargs: Any) -> torch.nn.Module:
        if _is_checkpoint(source):
            from vtv_nnsight.models.mae_vqgan.checkpoints import load_checkpoint

            own = _pick(kwargs, *_HEAD_OPTIONS, "dtype", "attn_implementation")
            rest = {name: value for name, value in kwargs.items() if name not in own}
            return self._wrap(load_checkpoint(source, vqgan=vqgan, **own), **rest)
        self._read_config(source, vqgan, **kwargs)
        return super()._load(_folder(source), **kwargs)

    def _wrap(self, module: MAEVQGANModel, **kwargs: Any) -> torch.nn.Module:
        """The module itself, or a copy of it when something about it is to differ."""
        chosen = _pick(kwargs, *kwargs)
        if "vqgan" in chosen:
            raise ValueError(_STRAY_VQGAN.format(type(module).__name__))
        if not chosen:
            return module
        own = {"attn_implementation": module.config._attn_implementation, "dtype": module.dtype}
        config, weights = copy.deepcopy(module.config), module.state_dict()
        return type(module).from_pretrained(None, config=config, state_dict=weights, **(own | chosen))

    def _read_config(self, source: str, vqgan: Any, **kwargs: Any) -> MAEVQGANConfig:
        if _is_checkpoint(source):
            from vtv_nnsight.models.mae_vqgan.checkpoints import read_config

            return read_config(source, vqgan=vqgan, **_pick(kwargs, *_HEAD_OPTIONS))
        if vqgan is not None:
            raise ValueError(_STRAY_VQGAN.format(repr(source)))
        hub = _pick(kwargs, *_HUB_OPTIONS)
        config = AutoConfig.from_pretrained(_folder(source), revision=self.revision, **hub)
        if not isinstance(config, MAEVQGANConfig):
            raise ValueError(f"{source!r} is a {config.model_type} model; expected {MAEVQGANConfig.model_type}.")
        return config

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        """Rows of one input set; 0 when it holds only options, as in `model.trace()` with invokes."""
        if not inputs and not any(name in kwargs for name in INPUTS):
            return 0
        canvas = inputs[0] if inputs else kwargs.get("canvas")
        if not isinstance(canvas, (VisualPrompt, torch.Tensor)) or getattr(canvas, "ndim", 4) == 0:
            raise TypeError(f"a trace was given {type(canvas).__name__}; {_EXPECTED}")
        if not len(canvas):
            raise ValueError("there are no canvases in this batch; give at least one.")
        return len(canvas)

    def _batch(self, invokes: list[tuple[tuple, dict]], fn: Any) -> tuple[tuple, dict]:
        """The input sets of a trace as one forward's arguments: (canvas, visible, decoded) and the options."""
        if not invokes:
            raise ValueError(f"a trace was given nothing; {_EXPECTED}")
        with unset_fake_temporarily():  # a scan's inputs are real, and their values are checked
            prompts, options = zip(*[self._prompt(*inputs, **kwargs) for inputs, kwargs in invokes])
            if any(other != options[0] for other in options):
                raise ValueError(f"the invokes of a trace share one forward; {options} must not differ between them.")
            first = prompts[0]
            prompt = VisualPrompt.cat([p.to(first.device) for p in prompts]) if len(prompts) > 1 else first
        return (prompt.canvas, prompt.visible, prompt.decoded), options[0]

    def _prompt(self, *inputs: Any, **kwargs: Any) -> tuple[VisualPrompt, dict]:
        """One input set as a prompt that fits the model's grid of patches, and what is left: the options."""
        if len(inputs) == 1 and isinstance(inputs[0], VisualPrompt):
            prompt, own = inputs[0], self.layout
            if (prompt.layout.canvas_size, prompt.layout.patch_size) != (own.canvas_size, own.patch_size):
                raise ValueError(
                    f"a prompt of {prompt.layout} does not fit a model of {own}; make it with "
                    "layout=model.layout (canvas_size and patch_size must agree; order and examples are free)."
                )
            return prompt, kwargs
        given = dict(zip(INPUTS, inputs)) | _pick(kwargs, *INPUTS)
        if len(inputs) > len(INPUTS) or set(given) != set(INPUTS):
            raise TypeError(f"a trace was given {', '.join(given)} ({len(inputs)} unnamed); {_EXPECTED}")
        options = {name: value for name, value in kwargs.items() if name not in INPUTS}
        return VisualPrompt(**given, layout=self.layout), options


def _token_loss(output: MAEVQGANOutput, prompts: VisualPrompt, codes: torch.Tensor) -> torch.Tensor:
    """Losses [batch] of logits against the codes of the truth [batch, output patch]."""
    patches = prompts.layout.regions["output"].to(prompts.device)
    return metrics.token_loss(output.logits[:, token_index(prompts.decoded, patches) - 1], codes)


_EXPECTED = (
    "give a VisualPrompt, or canvas [batch, 3, height, width], visible [patch] and decoded [patch] as tensors "
    "(VisualPrompt.from_canvas makes a prompt of a canvas)."
)
_STRAY_VQGAN = "vqgan= is the tokenizer of a published checkpoint file; {} has its own."
_HEAD_OPTIONS = ("num_attention_heads", "decoder_num_attention_heads")
_HUB_OPTIONS = ("token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")


def _pick(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """The options of these names that are set."""
    return {name: options[name] for name in names if options.get(name) is not None}


def _is_checkpoint(source: str) -> bool:
    """Whether a source names one file of weights, as the papers published them."""
    return Path(source).suffix in (".pth", ".pt", ".ckpt") or Path(source).is_file()


def _folder(source: str) -> str:
    """Where transformers finds a source: a folder or a Hub id."""
    if source != "tiny":
        return source
    folder = files("vtv_nnsight") / "weights" / "tiny"
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f'the embedded model "tiny" has no {" and no ".join(missing)} in {folder}.')
    return str(folder)
