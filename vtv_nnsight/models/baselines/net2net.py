"""VQGAN's own transformer under nnsight: a GPT over a VQGAN's codes, one after the other (Esser et al., *Taming
Transformers for High-Resolution Image Synthesis*, CVPR 2021, §3.2), which VP compares MAE-VQGAN with (NeurIPS 2022,
§4.1).

    >>> model = Net2Net("last.ckpt")                                # the transformer and its VQGAN, as published
    >>> canvas = model.generate(prompts)                           # [batch, 3, height, width] in [0, 1]
    >>> canvas = model.generate(prompts, temperature=1.0, top_k=100, seed=1)
    >>> table = evaluate(model, task, prompts)

The published transformers are of canvases of 256×256, a grid of 16×16 codes. A prompt's visible patches have the codes
that the VQGAN gives them on a canvas with white hidden patches; the hidden ones are sampled in the order in which
the transformer was trained, row by row, each given all codes before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.utils.generic import ModelOutput

from vtv_nnsight.files import refusing
from vtv_nnsight.models.autoencoders import CodeModel
from vtv_nnsight.models.canvas import drop_none
from vtv_nnsight.models.devices import floating_dtype, resolve_device
from vtv_nnsight.models.interface import Loss, Stage
from vtv_nnsight.models.mae_vqgan.config import MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.published import code_size, count_modules, tokenizer_sizes
from vtv_nnsight.models.mae_vqgan.vqgan import VQGAN
from vtv_nnsight.models.torch_files import StrPath, fill, read_tensors

FIRST_STAGE = "first_stage_model."
"""What the names of the VQGAN's tensors begin with in a published file."""
GRID = 16
"""Codes along a side of the canvas in every published model."""


@dataclass
class Net2NetOutput(ModelOutput):
    """What `Net2NetNetwork` gives.

    Args:
        logits: Scores of the codebook's entries that each decoded patch was sampled with, given all before it: [batch,
            decoded patch, code].
        codes: Codes of the decoded patches, those of visible ones the VQGAN's: LongTensor [batch, decoded patch].
    """

    logits: Any = None
    codes: Any = None


class Net2NetNetwork(nn.Module):
    """A VQGAN and the transformer of its codes.

    Args:
        vqgan: Sizes of the VQGAN: those of a MAE-VQGAN's tokenizer, its canvas and its patches.
        transformer: Sizes of the GPT, which transformers has.
        condition: The tokens that it is given before the codes: 0 of a model without classes, else the number of a
            class; or several.

    Raises:
        ValueError: when there is no place for condition and canvas, or the vocabulary lacks codes.
    """

    def __init__(self, vqgan: MAEVQGANConfig, transformer: GPT2Config, condition: int | Sequence[int] = 0) -> None:
        super().__init__()
        self.layout = vqgan.layout
        self.condition = (condition,) if isinstance(condition, int) else tuple(condition)
        vocabulary, length = transformer.vocab_size, transformer.n_positions
        if not self.condition or not all(0 <= token < vocabulary for token in self.condition):
            raise ValueError(f"condition={condition!r} is unknown to the transformer; give 0 to {vocabulary - 1}.")
        if vocabulary < vqgan.num_codes:
            raise ValueError(f"the transformer knows {vocabulary} codes, and its VQGAN has {vqgan.num_codes}.")
        if (needed := len(self.condition) + self.layout.num_patches - 1) > length:
            raise ValueError(f"the transformer has {length} places, and the codes need {needed}; lower image_size.")
        self.transformer = GPT2LMHeadModel(transformer)
        self.vqgan = VQGAN(vqgan)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the transformer's weights."""
        return self.transformer.dtype

    @torch.no_grad()
    def codes(self, canvas: torch.Tensor) -> torch.Tensor:
        """The VQGAN's codes of canvases, LongTensor [batch, patch]."""
        return self.vqgan.encode(canvas.to(self.vqgan.codebook.weight.dtype))

    @torch.no_grad()
    def forward(
        self,
        canvas: torch.Tensor,
        visible: torch.Tensor,
        decoded: torch.Tensor,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Net2NetOutput:
        """Sample the codes of the hidden patches, row by row. Decoded patches alone are in the sequence, at their own
        places of it; one-shot, these are all.

        Args:
            canvas: [batch, 3, height, width] in [0, 1].
            visible, decoded: Ids of patches, [n] and [m], shared by the batch.
            temperature: Of sampling; at 0 every code is the one of the highest score.
            top_k: Sample among this many codes of the highest scores.
            seed: Of sampling.
        """
        if decoded.ndim != 1 or visible.ndim != 1:
            raise ValueError("codes are sampled for patches that rows share; give visible and decoded as [patch].")
        chance = torch.Generator(canvas.device).manual_seed(seed)
        visible, (decoded, order) = visible.to(canvas.device), decoded.to(canvas.device).sort()
        canvas = torch.where(self.layout.pixels(visible), canvas, 1.0)
        codes = self.codes(canvas)[:, decoded]
        condition = torch.tensor(self.condition, device=canvas.device)
        first = len(condition) - 1  # where the first code's logits are
        tokens = torch.cat([condition.expand(len(codes), -1), codes[:, :-1]], dim=1)
        places = torch.cat([torch.arange(first + 1, device=canvas.device), first + 1 + decoded[:-1]])
        hidden = (~torch.isin(decoded, visible)).nonzero()[:, 0].tolist()
        logits: list[torch.Tensor] = []
        cache = DynamicCache(config=self.transformer.config)
        done = 0
        for rank in [*hidden, None]:
            end = tokens.shape[1] if rank is None else first + rank + 1
            if end > done:
                at = {"position_ids": places[None, done:end], "past_key_values": cache, "use_cache": True}
                logits.append(
                    self.transformer(tokens[:, done:end], **at).logits[..., : self.vqgan.codebook.num_embeddings]
                )
                done = end
            if rank is not None:
                codes[:, rank] = _draw(logits[-1][:, -1].float(), chance, temperature, top_k)
                if end < tokens.shape[1]:
                    tokens[:, end] = codes[:, rank]
        rank = order.argsort()
        return Net2NetOutput(logits=torch.cat(logits, dim=1)[:, first:][:, rank], codes=codes[:, rank])


def _draw(logits: torch.Tensor, chance: torch.Generator, temperature: float, top_k: int | None) -> torch.Tensor:
    """A code for each row of logits [batch, code]: LongTensor [batch]."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return (logits / temperature).softmax(-1).multinomial(1, generator=chance)[:, 0]


def describe(
    path: StrPath, *, num_attention_heads: int = 16, image_size: int | None = None
) -> tuple[MAEVQGANConfig, GPT2Config, dict[str, torch.Tensor]]:
    """The sizes of a published checkpoint, and its tensors by the names of `Net2NetNetwork`.

    Args:
        path: The file: a dict with tensors in "state_dict", under "transformer." and "first_stage_model.".
        num_attention_heads: `n_head` of the model's yaml; the shapes do not tell.
        image_size: Side of the canvas. 16 codes by default, or the fewer that there are places for.

    Raises:
        FileNotFoundError: when the file is not there.
        ValueError: naming the file and the tensors, when it is of something else, lacks tensors or has others; or was
            trained with pictures as its condition, which prompts do not have.
    """
    tensors = {name: value for name, value in read_tensors(path).items() if not _is_for_training(name)}
    if conditions := [name for name in tensors if name.startswith("cond_stage_model.")]:
        raise ValueError(f"{path} was trained on conditions that are pictures ({conditions[0]}); give one without.")
    sizes = tokenizer_sizes(tensors, path, FIRST_STAGE)
    patch = code_size(sizes)
    with refusing(path, "is not a checkpoint of a VQGAN's transformer (Net2NetTransformer)"):
        vocabulary, width = tensors["transformer.tok_emb.weight"].shape
        _, length, _ = tensors["transformer.pos_emb"].shape
        transformer = GPT2Config(
            vocab_size=vocabulary,
            n_positions=length,
            n_embd=width,
            n_layer=count_modules("transformer.blocks.", tensors),
            n_head=num_attention_heads,
            activation_function="gelu",
            tie_word_embeddings=False,
        )
        config = MAEVQGANConfig(
            image_size=image_size or patch * min(GRID, math.isqrt(length)), patch_size=patch, **sizes
        )
        tensors["transformer.pos_emb"] = tensors["transformer.pos_emb"][0]
        for block in (f"transformer.blocks.{i}" for i in range(transformer.n_layer)):
            for kind in ("weight", "bias"):
                parts = [tensors.pop(f"{block}.attn.{name}.{kind}") for name in ("query", "key", "value")]
                tensors[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
            for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2"):  # transformers has these transposed
                tensors[f"{block}.{name}.weight"] = tensors[f"{block}.{name}.weight"].T
    return config, transformer, tensors


_NAMES = (
    ("vqgan.", FIRST_STAGE),
    ("codebook.", "quantize.embedding."),
    ("transformer.transformer.wte", "transformer.tok_emb"),
    ("transformer.transformer.wpe.weight", "transformer.pos_emb"),
    ("transformer.transformer.h", "transformer.blocks"),
    ("transformer.transformer.ln_f", "transformer.ln_f"),
    ("transformer.lm_head", "transformer.head"),
    ("ln_1", "ln1"),
    ("ln_2", "ln2"),
    ("attn.c_attn", "attn.qkv"),
    ("attn.c_proj", "attn.proj"),
    ("mlp.c_fc", "mlp.0"),
    ("mlp.c_proj", "mlp.2"),
)
"""Parts of the names of parameters, and of the published ones."""


def _published(name: str) -> str:
    """The published name of a parameter."""
    for part, published in _NAMES:
        name = name.replace(part, published)
    return name


def _is_for_training(name: str) -> bool:
    """Whether a published tensor is of a training loss, or a causal mask."""
    return name.startswith(f"{FIRST_STAGE}loss.") or name.endswith(".attn.mask")


class Net2Net(CodeModel):
    """A VQGAN with the transformer of its codes, for `trace`, `generate` and `evaluate`.

        Net2Net
        ├── transformer      transformers' GPT2LMHeadModel: transformer (wte, wpe, h[i], ln_f), lm_head
        └── vqgan            encode(pixels) → codes, decode(codes) → pixels

    A trace samples all hidden patches, and so runs the transformer once for each of them: 64 times one-shot on a grid
    of 16×16. `output.logits` are those that each code was sampled with, `output.codes` are the codes. Query-only
    prompts are sequences of the query's rows alone.

    What it does not offer: heads to read or patch (it has no stages, and so no vectors or units), since every token of
    an answer is a forward of its own; losses, since those that it was trained with are of the true codes before each
    code, and an answer has its own; patches of each row's own; and `scan`.

    Args:
        source: A published checkpoint file, such as `last.ckpt` of a transformer of taming-transformers, or a ready
            Net2NetNetwork.
        num_attention_heads, image_size, condition: As for `describe` and `Net2NetNetwork`. How codes are sampled is
            said to `trace` and `generate`: `temperature`, `top_k` and `seed`.
        **kwargs: `dtype`, `device_map` (a device); and nnsight's: `dispatch=True` (load the weights at
            once), `rename`, `envoys`.

    Raises:
        TypeError, ValueError, OSError: naming the source and what is wrong with it.
    """

    module_class = Net2NetNetwork
    source_kinds = "a file"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """None: see above."""
        return ()

    @property
    def losses(self) -> tuple[Loss, ...]:
        """None: see above."""
        return ()

    def attention(self, stage: str, *_: Any) -> NoReturn:
        """None: see above."""
        raise ValueError(f"there is no stage {stage!r}: this model samples code by code, and no head can be patched.")

    positions: Any = attention
    groups: Any = attention

    def codes(self, canvas: torch.Tensor) -> torch.Tensor:
        """The VQGAN's codes of canvases, LongTensor [batch, patch]."""
        return self.network.codes(canvas)

    def predictions(self, output: Net2NetOutput) -> torch.Tensor:
        """The sampled codes: LongTensor [batch, decoded patch]."""
        return output.codes

    def draw(self, predictions: torch.Tensor) -> torch.Tensor:
        """The VQGAN's picture of codes [batch, patch]: [batch, 3, height, width] in [0, 1]."""
        return self.network.vqgan.decode(predictions)

    def empty_network(self, source: str, device_map: Any = None, **options: Any) -> Net2NetNetwork:
        """The network of a file on the meta device."""
        return self._empty(source, **drop_none(options, *options))[0]

    def loaded_network(self, source: str, device_map: Any = None, dtype: Any = None, **options: Any) -> Net2NetNetwork:
        """The network of a file, with its weights."""
        network, tensors = self._empty(source, **drop_none(options, *options))
        return fill(network, tensors, _published, source, floating_dtype(dtype)).to(resolve_device(device_map or "cpu"))

    def _empty(
        self, source: str, condition: int | Sequence[int] = 0, dtype: Any = None, **options: Any
    ) -> tuple[Net2NetNetwork, dict[str, torch.Tensor]]:
        vqgan, transformer, tensors = describe(source, **options)
        with refusing(source, "cannot be used"), torch.device("meta"):
            return Net2NetNetwork(vqgan, transformer, condition), tensors

    def ready_network(self, module: Net2NetNetwork, **options: Any) -> Net2NetNetwork:
        """The network itself, in eval mode."""
        if given := drop_none(options, *options):
            raise ValueError(f"a ready Net2NetNetwork is taken as it is; leave out {', '.join(given)}.")
        return module.eval()
