"""VQGAN's own transformer under nnsight: a GPT over a VQGAN's codes, one after the other (Esser et al., *Taming
Transformers for High-Resolution Image Synthesis*, CVPR 2021, §3.2), which VP compares MAE-VQGAN with (NeurIPS 2022,
§4.1).

    >>> model = Net2Net("last.ckpt")                                # the transformer and its VQGAN, as published
    >>> canvas = model.generate(prompts)                           # [batch, 3, height, width] in [0, 1]
    >>> canvas = model.generate(prompts, temperature=1.0, top_k=100, seed=1)
    >>> table = evaluate(model, task, prompts)

The published transformers are of canvases of 256×256, a grid of 16×16 codes. A prompt's visible patches have the codes
that the VQGAN gives them on a canvas whose hidden patches are white; the hidden ones are sampled in the order in which
the transformer was trained, row by row, each given all codes before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from transformers.utils.generic import ModelOutput

from vtv_nnsight.models.autoencoders import CodeModel
from vtv_nnsight.models.canvas import drop_none
from vtv_nnsight.models.devices import AUTOMATIC, available_devices, floating_dtype, resolve_device
from vtv_nnsight.models.interface import Loss, Stage
from vtv_nnsight.models.mae_vqgan.config import MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.published import code_size, count_modules, tokenizer_sizes
from vtv_nnsight.models.mae_vqgan.vqgan import VQGAN
from vtv_nnsight.models.torch_files import StrPath, cast, check_ranks, check_tensors, read_tensors

FIRST_STAGE = "first_stage_model."
"""What the names of the VQGAN's tensors begin with in a published file."""
GRID = 16
"""Codes along a side of the canvas in every published model."""

_SIZES = {"transformer.tok_emb.weight": 2, "transformer.pos_emb": 3, "transformer.head.weight": 2}


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


class Attention(nn.Module):
    """Causal attention of tokens to themselves and to all whose keys and values are in the cache."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
        """[batch, token, width] → the same; `cache` is the keys and the values, or empty, and is added to."""
        q, k, v = (
            rearrange(layer(x), "b t (h d) -> b h t d", h=self.num_heads)
            for layer in (self.query, self.key, self.value)
        )
        if cache:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        cache[:] = k, v
        new, every = q.shape[2], k.shape[2]
        allowed = torch.ones(new, every, dtype=torch.bool, device=x.device).tril(every - new)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.proj(rearrange(z, "b h t d -> b t (h d)"))


class Block(nn.Module):
    """Residual stream in, residual stream out: [batch, token, width]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
        """[batch, token, width] and the attention's cache → [batch, token, width]."""
        x = x + self.attn(self.ln1(x), cache)
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """Tokens [batch, token] at their places [token] → logits [batch, token, vocabulary] of what comes after each.
    Modules bear the names of the taming-transformers release."""

    def __init__(self, vocabulary: int, length: int, layers: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(vocabulary, width)
        self.pos_emb = nn.Parameter(torch.zeros(1, length, width))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(
        self, tokens: torch.Tensor, places: torch.Tensor, caches: list[list[torch.Tensor]] | None = None
    ) -> torch.Tensor:
        """Logits of what comes after each token.

        Args:
            tokens: [batch, token].
            places: [token].
            caches: For each block the keys and values of the tokens before, to which those of these are added; empty
                lists to begin with.
        """
        x = self.tok_emb(tokens) + self.pos_emb[:, places]
        for block, cache in zip(self.blocks, caches or [[] for _ in self.blocks]):
            x = block(x, cache)
        return self.head(self.ln_f(x))


class Net2NetNetwork(nn.Module):
    """A VQGAN and the transformer of its codes.

    Args:
        vqgan: Sizes of the VQGAN: those of a MAE-VQGAN's tokenizer, its canvas and its patches.
        vocabulary, length, layers, width, num_heads: Of the GPT.
        condition: The tokens that it is given before the codes: 0 of a model without classes, else the number of a
            class; or several.
        temperature: Of sampling; at 0 every code is the one of the highest score.
        top_k: Sample among this many codes of the highest scores.
        seed: Of sampling. Every forward begins with it.

    Raises:
        ValueError: when there is no place for condition and canvas, or the vocabulary lacks codes.
    """

    def __init__(
        self,
        vqgan: MAEVQGANConfig,
        vocabulary: int,
        length: int,
        layers: int,
        width: int,
        num_heads: int = 16,
        condition: int | Sequence[int] = 0,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layout = vqgan.layout
        self.condition = (condition,) if isinstance(condition, int) else tuple(condition)
        self.sampling = {"temperature": temperature, "top_k": top_k, "seed": seed}
        if not self.condition or not all(0 <= token < vocabulary for token in self.condition):
            raise ValueError(f"condition={condition!r} is unknown to the transformer; give 0 to {vocabulary - 1}.")
        if vocabulary < vqgan.num_codes:
            raise ValueError(f"the transformer knows {vocabulary} codes, and its VQGAN has {vqgan.num_codes}.")
        if (needed := len(self.condition) + self.layout.num_patches - 1) > length:
            raise ValueError(f"the transformer has {length} places, and the codes need {needed}; lower image_size.")
        if width % num_heads:
            raise ValueError(f"width {width} cannot have {num_heads} heads; give num_attention_heads=.")
        self.transformer = GPT(vocabulary, length, layers, width, num_heads)
        self.vqgan = VQGAN(vqgan)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the transformer's weights."""
        return self.transformer.pos_emb.dtype

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
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Net2NetOutput:
        """Sample the codes of the hidden patches, row by row. Decoded patches alone are in the sequence, at their own
        places of it; one-shot, these are all.

        Args:
            canvas: [batch, 3, height, width] in [0, 1].
            visible, decoded: Ids of patches, [n] and [m], shared by the batch.
            temperature, top_k, seed: In the place of the model's own.
        """
        if decoded.ndim != 1 or visible.ndim != 1:
            raise ValueError("codes are sampled for patches that rows share; give visible and decoded as [patch].")
        given = {"temperature": temperature, "top_k": top_k, "seed": seed}
        sampling = self.sampling | drop_none(given, *given)
        chance = torch.Generator(canvas.device).manual_seed(sampling["seed"])
        visible, (decoded, order) = visible.to(canvas.device), decoded.to(canvas.device).sort()
        canvas = torch.where(self.layout.pixels(visible), canvas, 1.0)
        codes = self.codes(canvas)[:, decoded]
        condition = torch.tensor(self.condition, device=canvas.device)
        first = len(condition) - 1  # where the first code's logits are
        tokens = torch.cat([condition.expand(len(codes), -1), codes[:, :-1]], dim=1)
        places = torch.cat([torch.arange(first + 1, device=canvas.device), first + 1 + decoded[:-1]])
        hidden = (~torch.isin(decoded, visible)).nonzero()[:, 0].tolist()
        logits: list[torch.Tensor] = []
        caches: list[list[torch.Tensor]] = [[] for _ in self.transformer.blocks]
        done = 0
        for rank in [*hidden, None]:
            end = tokens.shape[1] if rank is None else first + rank + 1
            if end > done:
                scores = self.transformer(tokens[:, done:end], places[done:end], caches)
                logits.append(scores[..., : self.vqgan.codebook.num_embeddings])
                done = end
            if rank is not None:
                codes[:, rank] = _draw(logits[-1][:, -1].float(), chance, sampling["temperature"], sampling["top_k"])
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


def load_checkpoint(
    path: StrPath,
    *,
    num_attention_heads: int = 16,
    image_size: int | None = None,
    dtype: torch.dtype | str | None = None,
    weights: bool = True,
    **settings: Any,
) -> Net2NetNetwork:
    """The network of a published checkpoint, on the CPU: a dict whose "state_dict" holds tensors under "transformer."
    and "first_stage_model.".

    Args:
        path: The file.
        num_attention_heads: `n_head` of the model's yaml; the shapes do not tell.
        image_size: Side of the canvas. 16 codes by default, or the fewer that there are places for.
        dtype: None and "auto" keep the file's.
        weights: Read the weights; False builds it on the meta device, of the shapes alone.
        **settings: As for `Net2NetNetwork`: condition, temperature, top_k, seed.

    Raises:
        FileNotFoundError: when the file is not there.
        ValueError: naming the file and the tensors, when it is of something else, lacks tensors or has others; or was
            trained with pictures as its condition, which prompts do not have.
    """
    tensors = read_tensors(path)
    check_ranks(_SIZES, tensors, path, "not a checkpoint of a VQGAN's transformer (Net2NetTransformer)")
    if conditions := [name for name in tensors if name.startswith("cond_stage_model.")]:
        raise ValueError(f"{path} was trained on conditions that are pictures ({conditions[0]}); give one without.")
    sizes = tokenizer_sizes(tensors, path, "not a checkpoint with its VQGAN", FIRST_STAGE)
    patch = code_size(sizes)
    vocabulary, width = tensors["transformer.tok_emb.weight"].shape
    length = tensors["transformer.pos_emb"].shape[1]
    image_size = image_size or patch * min(GRID, math.isqrt(length))
    layers = count_modules("transformer.blocks.", tensors, path)
    with torch.device("meta"):
        try:
            config = MAEVQGANConfig(
                image_size=image_size, patch_size=patch, dtype=None if dtype == "auto" else dtype, **sizes
            )
            network = Net2NetNetwork(config, vocabulary, length, layers, width, num_attention_heads, **settings)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    published = {name: _published(name) for name in network.state_dict()}
    shapes = {published[name]: value.shape for name, value in network.state_dict().items()}
    used = {name: value for name, value in tensors.items() if not _is_for_training(name)}
    check_tensors(shapes, used, path, "VQGAN's transformer")
    if weights:
        network.load_state_dict(
            {name: cast(tensors[published[name]], floating_dtype(config.dtype)) for name in published}, assign=True
        )
    return network.eval()


def _published(name: str) -> str:
    """The published name of a parameter."""
    return name.replace("vqgan.", FIRST_STAGE, 1).replace("codebook.", "quantize.embedding.")


def _is_for_training(name: str) -> bool:
    """Whether a published tensor is of a training loss, or a causal mask."""
    return name.startswith(f"{FIRST_STAGE}loss.") or name.endswith(".attn.mask")


class Net2Net(CodeModel):
    """A VQGAN with the transformer of its codes, for `trace`, `generate` and `evaluate`.

        Net2Net
        ├── transformer      tok_emb, pos_emb, blocks[i] (ln1, attn, ln2, mlp), ln_f, head
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
        num_attention_heads, image_size, condition: As for `load_checkpoint` and `Net2NetNetwork`.
        temperature, top_k, seed: How codes are sampled; by default every code is the one of the highest score. `trace`
            and `generate` take them, too.
        **kwargs: `dtype`, `device_map` (a device, or "auto"); and nnsight's: `dispatch=True` (load the weights at
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
        return load_checkpoint(source, weights=False, **drop_none(options, *options))

    def loaded_network(self, source: str, device_map: Any = None, **options: Any) -> Net2NetNetwork:
        """The network of a file, with its weights."""
        return load_checkpoint(source, **drop_none(options, *options)).to(_place(device_map))

    def ready_network(self, module: Net2NetNetwork, **options: Any) -> Net2NetNetwork:
        """The network itself, in eval mode."""
        if given := drop_none(options, *options):
            raise ValueError(f"a ready Net2NetNetwork is taken as it is; leave out {', '.join(given)}.")
        return module.eval()


def _place(device_map: Any) -> torch.device:
    """The one device that a `device_map` names."""
    if device_map is None or device_map in AUTOMATIC:
        return torch.device("cpu" if device_map is None else available_devices()[-1])
    return resolve_device(device_map)
