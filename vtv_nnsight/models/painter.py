"""Painter and SegGPT under nnsight: in-context painters that see a picture and its target as two pictures.

    >>> model = SegGPT("BAAI/seggpt-vit-large", embedding_type="semantic")
    >>> prompts = task.prompts(images, n=4, layout=model.layout)          # Layout(896, 16, gap=0)
    >>> with model.trace(prompts):
    ...     z = model.encoder.layers[3].attention.heads.save()            # [batch, token, head, head_dim]
    ...     prediction = model.output.prediction.save()                   # [batch, 3, cell, cell], normalised
    >>> canvas = model.generate(prompts)                                  # [batch, 3, height, width] in [0, 1]

*Images Speak in Images* (CVPR 2023, arXiv 2212.02499) and *SegGPT* (ICCV 2023, arXiv 2304.03284) are one network, and
transformers has it. Its *image* is the left column of a canvas (example input over query), its *target* the right one
(example output over the answer, which is masked). The first layers see the two as streams of their own; after layer
`merge_index` the streams are averaged, and one token stands for a place of both.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from huggingface_hub import hf_hub_download
from nnsight.intervention.envoy import Envoy, eproperty
from nnsight.intervention.source import install_source
from nnsight.modeling.mixins.meta import MetaDevice
from torch import nn
from torch.nn import functional as F
from transformers import SegGptConfig, SegGptForImageSegmentation
from transformers.models.seggpt.modeling_seggpt import SegGptAttention
from transformers.utils import ModelOutput

from vtv_nnsight.images import denormalise, normalise
from vtv_nnsight.layouts import Layout, positions
from vtv_nnsight.models.canvas import HUB_OPTIONS, CanvasModel, Inputs, drop_none
from vtv_nnsight.models.interface import InContextModel, Loss, Stage, group_positions
from vtv_nnsight.models.nnsight_compat import PromptBatcher, editable
from vtv_nnsight.models.torch_files import StoredTensor, is_checkpoint, read_tensors
from vtv_nnsight.prompts import VisualPrompt, crop
from vtv_nnsight.text import join_names

EMBEDDING_TYPES = ("semantic", "instance")


@dataclass
class PainterOutput(ModelOutput):
    """
    Args:
        prediction: The answer as the network gives it, normalised and not clipped, [batch, 3, cell, cell].
    """

    prediction: torch.FloatTensor | None = None


class PainterNetwork(nn.Module):
    """transformers' SegGPT on canvases: its own modules, under the names that a trace uses.

    Args:
        seggpt: The network, whose modules and weights these are.

    Attributes:
        embeddings: Two pictures → tokens [2 * batch, row, column, width], those of all images before those of all
            targets.
        encoder: `layers[i]` (layernorm_before, attention (qkv, proj), layernorm_after, mlp (lin1, lin2)), layernorm.
        decoder: Features of four layers, side by side → pixels.

    Raises:
        ValueError: when the network's pictures are not two squares, one upon the other.
    """

    def __init__(self, seggpt: SegGptForImageSegmentation) -> None:
        super().__init__()
        self.config = seggpt.config
        self.layout = _layout(seggpt.config)
        self.embeddings, self.encoder = seggpt.model.embeddings, seggpt.model.encoder
        self.decoder = seggpt.decoder
        for i, layer in enumerate(self.encoder.layers):
            layer.attention.streams = 2 if i <= self.config.merge_index else 1
            layer.attention.columns = self.layout.cell_size // self.layout.patch_size
        object.__setattr__(self, "original", seggpt)  # not as a child: its modules have their names here

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.mask_token.dtype

    @property
    def device(self) -> torch.device:
        return self.embeddings.mask_token.device

    def forward(
        self,
        canvas: torch.Tensor,
        visible: torch.Tensor,
        decoded: torch.Tensor,
        embedding_type: str = "instance",
        feature_ensemble: bool = False,
    ) -> PainterOutput:
        """Paint the answer.

        Query only, the example is hidden: no token of the query's half attends to one of the example's, in any layer.
        What such a mask leaves is computed: the lower half alone, at its own places of the position embeddings and its
        own offsets. (Only the decoder's 3x3 convolution sees over the seam, so that the answer's first row of pixels
        is another than under a mask.)

        Args:
            canvas: [batch, 3, height, width] in [0, 1].
            visible: Ids of the patches that are shown: all but the answer's, or the query's alone.
            decoded: Ids of the patches that there are: all, or those of the query and the answer ("query only").
            embedding_type: "semantic" or "instance".
            feature_ensemble: All rows are examples of one query: average the attention's output at the query's half
                over the rows, in every layer (each stream on its own until they are merged), as the released code does.

        Returns:
            prediction [batch, 3, cell, cell].
        """
        rows = self.layout.cell_size // self.layout.patch_size
        image, target = normalise(canvas).to(self.dtype).chunk(2, dim=-1)
        hidden = torch.arange(2 * rows, device=canvas.device).ge(rows).repeat_interleave(rows)[None]
        tokens = self.embeddings(image, target, hidden, embedding_type)
        if len(decoded) < self.layout.num_patches:
            with _offsets_of_fewer_rows(self.encoder):
                encoded = self.encoder(tokens[:, rows:])
        elif feature_ensemble:
            with _merging_as_released(self.encoder):
                encoded = self.encoder(tokens, feature_ensemble=True)
        else:
            encoded = self.encoder(tokens)
        seam = 1  # row of patches above the answer, of which the decoder's convolution sees one row of pixels
        features = torch.cat([f[:, -(rows + seam) :] for f in encoded.intermediate_hidden_states], dim=-1)
        return PainterOutput(prediction=self.decoder(features)[:, :, -self.layout.cell_size :])

    @torch.no_grad()
    def generate(
        self, canvas: torch.Tensor, visible: torch.Tensor, decoded: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Canvases [batch, 3, height, width] in [0, 1] with the answer painted in; arguments are `forward`'s."""
        return self.paint(self.forward(canvas, visible, decoded, **options).prediction, canvas)

    def paint(self, prediction: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
        """Canvases with a prediction [batch, 3, cell, cell] in their output cell, clipped to [0, 1]."""
        painted, (rows, columns) = canvas.clone(), self.layout.cells["output"]
        painted[..., rows, columns] = denormalise(prediction.to(canvas.dtype)).clamp(0, 1)
        return painted


@contextmanager
def _offsets_of_fewer_rows(encoder: nn.Module) -> Iterator[None]:
    """Give fewer rows of tokens than the whole grid's the position embeddings of their own offsets, which lie in the
    middle of all; transformers would stretch all over them."""

    def middle(get: Callable, queries: int, keys: int, offsets: torch.Tensor) -> torch.Tensor:
        none = len(offsets) // 2
        return get(queries, keys, offsets[none - keys + 1 : none + keys])

    for layer in encoder.layers:
        layer.attention.get_rel_pos = partial(middle, layer.attention.get_rel_pos)
    try:
        yield
    finally:
        for layer in encoder.layers:
            del layer.attention.get_rel_pos


@contextmanager
def _merging_as_released(encoder: nn.Module) -> Iterator[None]:
    """Average over examples stream by stream in the last layer before the merge, too.

    The released code does (`merge_idx >= idx`); transformers averages there over both streams at once (`merge_index >
    i`), which mixes image and target.
    """
    last = encoder.layers[encoder.config.merge_index]
    handle = last.register_forward_pre_hook(lambda layer, inputs: (inputs[0], 2, *inputs[2:]))
    try:
        yield
    finally:
        handle.remove()


def _layout(config: SegGptConfig) -> Layout:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != 2 * width:
        raise ValueError(
            f"image_size={height}x{width} is not two square cells, one upon the other; expected a height of twice the "
            "width."
        )
    return Layout(canvas_size=height, patch_size=config.patch_size, gap=0)


class PatternProperty(eproperty):
    """The softmax inside the attention's forward, which nnsight serves once that forward is instrumented."""

    def __get__(self, attention: Envoy | None, owner: Any = None) -> Any:
        if attention is not None:
            install_source(attention)
        return super().__get__(attention, owner)

    def __set__(self, attention: Envoy, value: Any) -> None:
        install_source(attention)
        super().__set__(attention, value)


class AttentionEnvoy(Envoy):
    """An attention layer whose heads can be told apart, and in which a row of the batch has both its streams."""

    @eproperty(key="proj.input", description="outputs z of the heads, [batch, token, head, head_dim]")
    def heads(self, value: Any) -> torch.Tensor:
        """Output z of every head, before the output projection: [batch, token, head, head_dim].

        Before the merge, the image's tokens and then the target's, each row by row; after it, one token for a place of
        both.
        """
        (z,), _ = value
        pattern = "(stream batch) row column (head dim) -> batch (stream row column) head dim"
        return rearrange(editable(z), pattern, stream=self._module.streams, head=self._module.num_attention_heads)

    @heads.postprocess
    def heads(self, value: torch.Tensor) -> Any:
        heads, streams, columns = self._module.num_attention_heads, self._module.streams, self._module.columns
        size = self._module.proj.in_features // heads
        if not isinstance(value, torch.Tensor) or value.ndim != 4 or tuple(value.shape[-2:]) != (heads, size):
            found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"{self.path}.heads was given {found}; expected a tensor [batch, token, {heads}, {size}].")
        pattern = "batch (stream row column) head dim -> (stream batch) row column (head dim)"
        return (rearrange(value, pattern, stream=streams, column=columns),), {}

    @heads.transform
    def heads(self, view: torch.Tensor, raw: Any) -> Any:
        return type(self).heads._postprocess(self, view)

    @PatternProperty(
        key="source.torch_nn_functional_softmax_0.output", description="attention pattern, [batch, head, query, key]"
    )
    def pattern(self, value: torch.Tensor) -> torch.Tensor:
        """How much each token attends to each, rows that sum to one: [batch, head, query token, key token].

        Before the merge, a query token is of either stream, as in `heads`, and the keys are the tokens of its own.
        """
        pattern = "(stream batch head) query key -> batch head (stream query) key"
        return rearrange(editable(value), pattern, stream=self._module.streams, head=self._module.num_attention_heads)

    @pattern.postprocess
    def pattern(self, value: torch.Tensor) -> torch.Tensor:
        pattern = "batch head (stream query) key -> (stream batch head) query key"
        return rearrange(value, pattern, stream=self._module.streams)

    @pattern.transform
    def pattern(self, view: torch.Tensor, raw: Any) -> torch.Tensor:
        return type(self).pattern._postprocess(self, view)


class StreamBatcher(PromptBatcher):
    """Rows of invokes are rows of canvases, also where the network stacks both streams of the batch: [stream * batch,
    …], and inside the attention [stream * batch * head, query, key]."""

    def _narrow_tensor(self, tensor: torch.Tensor, group: list) -> torch.Tensor:
        streams, rows = self._stacked(tensor)
        if streams == 2 or rows > self.total:
            start, size = (n * rows // self.total for n in group)
            return torch.cat([half[start : start + size] for half in tensor.chunk(streams)])
        return super()._narrow_tensor(tensor, group)

    def _widen_tensor(self, full: torch.Tensor, group: list, edited: torch.Tensor) -> torch.Tensor:
        streams, rows = self._stacked(full)
        if streams == 2 or rows > self.total:
            start, size = (n * rows // self.total for n in group)
            parts = zip(full.chunk(streams), edited.chunk(streams))
            return torch.cat([p for old, new in parts for p in (old[:start], new, old[start + size :])])
        return super()._widen_tensor(full, group, edited)

    def _stacked(self, tensor: torch.Tensor) -> tuple[int, int]:
        """(streams, rows of one stream); rows of the attention's inside count once a head. (0, 0): not by rows."""
        if tensor.ndim < 3:
            return 0, 0
        rows = self.total * (self.envoy._module.config.num_attention_heads if tensor.ndim == 3 else 1)
        streams = len(tensor) / rows
        return (int(streams), rows) if streams in (1, 2) else (0, 0)


class Painter(CanvasModel, InContextModel):
    """A Painter that can be traced: any image-to-image task from one example.

    The names that lead to its parts:

        Painter
        ├── embeddings       patch_embeddings, mask_token, position_embeddings, …
        ├── encoder
        │   ├── layers[i]    layernorm_before, attention (qkv, proj; .heads, .pattern), layernorm_after,
        │   │                mlp (lin1, lin2)
        │   └── layernorm
        └── decoder          decoder_embed, decoder_pred

    Every module has `.input` and `.output`. Up to layer `merge_index` a module's rows are the batch's images and then
    its targets, of which an invoke sees its own; afterwards they are the batch. `attention.heads` is [batch, token,
    head, head_dim] throughout: before the merge the tokens of the image and then of the target, after it one token for
    a place of both. `attention.pattern` is [batch, head, query token, key token].

        import torch
        from vtv_nnsight import Painter, VisualPrompt

        model = Painter("painter_vit_large.pth", dtype=torch.bfloat16)
        prompts = VisualPrompt.from_canvas(torch.rand(2, 3, 896, 896), model.layout)

        with model.trace(prompts.query_only()):              # the example is hidden
            z = model.encoder.layers[3].attention.heads.save()
            prediction = model.output.prediction.save()      # [batch, 3, 448, 448], normalised

        canvas = model.generate(prompts)                     # [batch, 3, 896, 896] in [0, 1]

    A prompt is one-shot or query only. Weights are loaded when a trace first needs them; `scan` never does.

    Args:
        source: A Hub id, a folder written by `save_pretrained`, the released checkpoint file (`.pth`), or a ready
            `SegGptForImageSegmentation`, which is put in eval mode.
        revision: Revision of a Hub id.
        **kwargs: As for transformers' `from_pretrained`: `dtype`, `device_map`, …; and nnsight's: `dispatch=True`
            (load the weights at once), `rename`, `envoys`.

    Raises:
        TypeError, ValueError, OSError: naming the source and what is wrong with it.
    """

    config_class = SegGptConfig
    released = {"BAAI/Painter": "painter_vit_large.pth"}
    """Hub ids that hold the released file, and its name there."""
    typed = False
    """Whether the model has type tokens and, with them, a feature ensemble."""
    embedding_type = "instance"
    """Which of the type tokens, Painter's being zero."""
    _batcher_class = StreamBatcher

    def __init__(
        self, source: str | os.PathLike | SegGptForImageSegmentation, *, revision: str | None = None, **kwargs: Any
    ) -> None:
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        if not isinstance(source, (str, SegGptForImageSegmentation)):
            raise TypeError(
                f"{type(source).__name__} is not a source of {type(self).__name__}; give a Hub id, a folder, a "
                "checkpoint file or a SegGptForImageSegmentation."
            )
        if isinstance(source, str) and source in self.released:
            source = hf_hub_download(
                source, self.released[source], revision=revision, **drop_none(kwargs, *HUB_OPTIONS)
            )
        envoys = kwargs.pop("envoys", None) or {}
        if isinstance(envoys, dict):
            envoys = {SegGptAttention: AttentionEnvoy, **envoys}
        super().__init__(source, revision=revision, envoys=envoys, **kwargs)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The layers before the merge, "streams", in which image and target run side by side, and those after it,
        "merged"."""
        config = self._module.config
        apart = config.merge_index + 1
        heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        return (
            Stage("streams", apart, heads, size, streams=2),
            Stage("merged", config.num_hidden_layers - apart, heads, size),
        )

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The smooth L1 distance of the masked half, as trained."""
        return (Loss("smooth_l1", self._smooth_l1),)

    @property
    def parts(self) -> dict[str, str]:
        """What it is made of, for `vtv info`: name → words."""
        config, (streams, _) = self._module.config, self.stages
        features = len(config.intermediate_hidden_state_indices)
        return {
            "embeddings": f"patches of {config.patch_size}x{config.patch_size} to width {config.hidden_size}",
            "encoder": f"{config.num_hidden_layers} layers of width {config.hidden_size}, {streams.heads} heads; the "
            f"first {streams.layers} see image and target as two streams",
            "decoder": f"width {config.decoder_hidden_size}, of what {features} of the layers give",
        }

    def attention(self, stage: str, layer: int) -> Envoy:
        """The attention of a layer: `encoder.layers[layer].attention` for "streams"; "merged" goes on counting."""
        return self.encoder.layers[self._first(stage) + layer].attention

    def outputs(self, stage: str, layer: int) -> dict[str, Envoy]:
        """The attention, the MLP, and the layer itself; in "streams", of both streams."""
        own = self.encoder.layers[self._first(stage) + layer]
        return {"attn": own.attention, "mlp": own.mlp, "residual": own}

    def positions(self, stage: str, prompts: VisualPrompt | None = None) -> torch.Tensor:
        """Position of every token of a stage, LongTensor [token]: before the merge the image's patches and then the
        target's; after it the image's, each for a place of both."""
        if prompts is None:
            tokens = self.encoder.layers[self._first(stage)].input
            query_only, device = tokens.shape[1] == tokens.shape[2], tokens.device
        else:
            query_only, device = len(prompts.decoded) < self.layout.num_patches, prompts.device
        return _positions(stage, self.layout, query_only).to(device)

    def groups(self, stage: str, granularity: str, layout: Layout | None = None) -> dict[str, torch.Tensor]:
        """Units are the query and the output of each stream, and after the merge their one place, "query+output"; by
        cell, the example's likewise."""
        layout = layout or self.layout
        self._check_layout(layout, "units")
        if stage == "streams":
            regions, cells = ("query", "output"), ("example_input", "query", "example_output", "output")
        else:
            regions, cells = ("query+output",), ("example_input+example_output", "query+output")
        shown, whole = (_positions(stage, layout, query_only) for query_only in (True, False))
        return group_positions(
            granularity,
            positions(layout.all_patches),
            dict(zip(regions, shown.chunk(len(regions)))),
            shown,
            dict(zip(cells, whole.chunk(len(cells)))),
        )

    def truth(self, prompts: VisualPrompt) -> torch.Tensor:
        """The output cell as the network is to give it: normalised, [batch, 3, cell, cell]."""
        return normalise(prompts.region("output"))

    def paint(self, output: PainterOutput, prompts: VisualPrompt) -> torch.Tensor:
        """The prompts' canvases with the answer in the output cell, clipped: [batch, 3, height, width] in [0, 1]."""
        return self._module.paint(output.prediction.detach(), prompts.canvas)

    def save_pretrained(self, folder: str | os.PathLike, **kwargs: Any) -> None:
        """Write a safetensors folder that this class and transformers read."""
        self.dispatch()
        self._module.original.save_pretrained(folder, **kwargs)

    def _auto(self) -> type[SegGptForImageSegmentation]:
        return SegGptForImageSegmentation

    def _load_meta(self, source: str, **kwargs: Any) -> PainterNetwork:
        config = self._read_config(source, **kwargs)
        with MetaDevice.real(), torch.device("meta"):  # transformers computes drop rates on the CPU
            return PainterNetwork(self._build(config, source, **kwargs))

    def _load(self, source: str, **kwargs: Any) -> PainterNetwork:
        config = self._read_config(source, **kwargs)
        if is_checkpoint(source):
            dtype = kwargs.pop("dtype", None)
            if isinstance(dtype, str):
                dtype = None if dtype == "auto" else getattr(torch, dtype)
            module = self._with_weights(config, self._read_weights(source, config, dtype), **kwargs)
        else:
            module = self._from_pretrained(source, **kwargs)
        return PainterNetwork(self._checked(module, source))

    def _wrap(self, module: SegGptForImageSegmentation, **kwargs: Any) -> PainterNetwork:
        """The network of a ready module, or of a copy of it when something about it is to differ."""
        if chosen := drop_none(kwargs, *kwargs):
            module = self._with_weights(copy.deepcopy(module.config), module.state_dict(), **chosen)
        return PainterNetwork(self._checked(module.eval(), f"this {type(module).__name__}"))

    def _with_weights(
        self, config: SegGptConfig, weights: dict[str, torch.Tensor], **kwargs: Any
    ) -> SegGptForImageSegmentation:
        """The module of these sizes and weights; in their dtype, where none is asked for."""
        kwargs = {"dtype": next(iter(weights.values())).dtype} | drop_none(kwargs, *kwargs)
        return self._auto().from_pretrained(None, config=config, state_dict=weights, **kwargs)

    def _read_config(self, source: str, **kwargs: Any) -> SegGptConfig:
        if not is_checkpoint(source):
            return super()._read_config(source, **kwargs)
        return config_of(read_tensors(source), source)

    def _read_weights(self, source: str, config: SegGptConfig, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        """The tensors of a released file, under transformers' names; in the file's dtype where none is given."""
        tensors = read_tensors(source)
        typed = any(name in tensors for name in TYPE_TOKENS)
        if typed != self.typed:
            raise ValueError(f"{source} {_TYPED[typed]}")
        with torch.device("meta"):
            expected = self._auto()(config).state_dict()
        names = {released_name(name): name for name in expected}
        absent = () if typed else TYPE_TOKENS
        if missing := [name for name in names if name not in tensors and name not in absent]:
            raise ValueError(f"{source} has no {join_names(missing)}; the file is incomplete, or of another model.")
        if strange := [name for name in tensors if name not in names]:
            raise ValueError(
                f"{source} has {join_names(strange)}, unknown to {type(self).__name__}; the file is of another model."
            )
        for released, tensor in tensors.items():
            shape = expected[names[released]].shape
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(
                    f"{source}: {released} has shape {list(tensor.shape)}; the sizes of the other tensors ask for "
                    f"{list(shape)}."
                )
        weights = {names[released]: tensor.read(dtype) for released, tensor in tensors.items()}
        blank = weights[names["segment_token_x"]]
        return weights | {names[token]: torch.zeros_like(blank) for token in absent}

    def _checked(self, module: SegGptForImageSegmentation, source: str) -> SegGptForImageSegmentation:
        """The module, if it is of this model: Painter's type tokens are zero, and SegGPT's are not."""
        embeddings = module.model.embeddings
        tokens = embeddings.type_token_semantic, embeddings.type_token_instance
        if not any(token.is_meta for token in tokens):
            typed = any(bool(token.detach().any()) for token in tokens)
            if typed != self.typed:
                raise ValueError(f"{source} {_TYPED[typed]}")
        return module

    def _prepare(self, *inputs: Any, **kwargs: Any) -> tuple[VisualPrompt | Inputs, dict]:
        """One input set: a prompt in this model's layout that is one-shot or query only; and the options."""
        prompt = inputs[0] if inputs else None
        if isinstance(prompt, VisualPrompt):
            self._check_layout(prompt.layout, "a prompt")
        if "embedding_type" in kwargs:
            raise TypeError(
                f"embedding_type={kwargs['embedding_type']!r} belongs to the model, whose vectors are of one type; "
                "give it as SegGPT(…, embedding_type=…)."
            )
        if kwargs.get("feature_ensemble") and not self.typed:
            raise TypeError(f"{type(self).__name__} has no feature ensemble; SegGPT has.")
        given, options = super()._prepare(*inputs, **kwargs)
        layout, shown = self.layout, [ids.cpu().sort().values for ids in (given.visible, given.decoded)]
        forms = (layout.visible, layout.all_patches), (layout.regions["query"], layout.query_band)
        if not any(all(map(torch.equal, shown, form)) for form in forms):
            counts = " of ".join(str(ids.shape[-1]) for ids in shown)
            raise ValueError(
                f"a prompt that shows {counts} patches is neither one-shot nor query only; {type(self).__name__} knows "
                "those two (VisualPrompt.from_canvas makes the one, query_only() the other)."
            )
        return given, options | {"embedding_type": self.embedding_type}

    def _batch(self, invokes: list[tuple[tuple, dict]], fn: Any) -> tuple[tuple, dict]:
        inputs, options = super()._batch(invokes, fn)
        if options.get("feature_ensemble"):
            if len(inputs.decoded) < self.layout.num_patches:
                raise ValueError("a feature ensemble is over examples, and query-only prompts show none.")
            queries = len(crop(inputs.canvas, "query", self.layout).flatten(1).unique(dim=0))
            if queries > 1:
                raise ValueError(
                    f"a feature ensemble is over several examples of one query, and this batch has {queries} queries; "
                    "run it once for each query."
                )
        return inputs, options

    def _smooth_l1(self, output: PainterOutput, prompts: VisualPrompt, truth: torch.Tensor) -> torch.Tensor:
        distance = F.smooth_l1_loss(output.prediction.float(), truth, reduction="none", beta=self._module.config.beta)
        return distance.flatten(1).mean(1)

    def _first(self, stage: str) -> int:
        """Number of a stage's first layer."""
        return {"streams": 0, "merged": self._module.config.merge_index + 1}[stage]

    def _check_layout(self, layout: Layout, what: str) -> None:
        """Refuse a layout with other cells than the network's two pictures have."""
        if (layout.cells, layout.patch_size) != (self.layout.cells, self.layout.patch_size):
            raise ValueError(
                f"{what} of {layout} does not fit a {type(self).__name__} of {self.layout}; make it with "
                "layout=model.layout."
            )


class SegGPT(Painter):
    """A SegGPT that can be traced: Painter's network, trained to segment.

    The tree of its parts, its prompts, sources and arguments are `Painter`'s. Beside them it has types and an ensemble:

        model = SegGPT("BAAI/seggpt-vit-large", embedding_type="semantic", dtype=torch.bfloat16)

        with model.trace(examples, feature_ensemble=True):   # several examples of one query
            prediction = model.output.prediction.save()      # the same answer in every row; the released code's is
                                                             # the first (their upper rows of pixels see the example)

    Args:
        source, revision, **kwargs: As for `Painter`.
        embedding_type: "semantic" (classes of things) or "instance" (one thing), the token that every place gets. It is
            part of what a task vector belongs to.

    Raises:
        TypeError, ValueError, OSError: naming the source or the type, and what is wrong with it.
    """

    released = {"BAAI/SegGPT": "seggpt_vit_large.pth"}
    typed = True

    def __init__(
        self, source: str | os.PathLike | SegGptForImageSegmentation, *, embedding_type: str = "instance", **kwargs: Any
    ) -> None:
        if embedding_type not in EMBEDDING_TYPES:
            raise ValueError(f"embedding_type={embedding_type!r} is unknown; choose from {', '.join(EMBEDDING_TYPES)}.")
        super().__init__(source, **kwargs)
        self.embedding_type = embedding_type

    def identity(self) -> dict[str, Any]:
        """The kind of model, and the type of its embedding."""
        return super().identity() | {"embedding_type": self.embedding_type}


def _positions(stage: str, layout: Layout, query_only: bool) -> torch.Tensor:
    """Position of every token of a stage."""
    columns = (("example_input", "query"), ("example_output", "output"))
    shown = [name for column in columns[: 2 if stage == "streams" else 1] for name in column[query_only:]]
    return positions(torch.cat([layout.regions[name] for name in shown]))[1:]


TYPE_TOKENS = ("type_token_cls", "type_token_ins")
"""SegGPT's tokens for "semantic" and "instance", as released; Painter has none."""

_TYPED = {
    True: "is a SegGPT (its type tokens are not zero); load it with SegGPT.",
    False: "is a Painter (it has no type tokens, or zeros); load it with Painter.",
}
_NAMES = (
    ("model.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("model.embeddings.position_embeddings", "pos_embed"),
    ("model.embeddings.segment_token_input", "segment_token_x"),
    ("model.embeddings.segment_token_prompt", "segment_token_y"),
    ("model.embeddings.type_token_semantic", "type_token_cls"),
    ("model.embeddings.type_token_instance", "type_token_ins"),
    ("model.embeddings.", ""),
    ("model.encoder.layers", "blocks"),
    ("model.encoder.layernorm", "norm"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention", "attn"),
    ("mlp.lin", "mlp.fc"),
    ("decoder.decoder_embed", "decoder_embed"),
    ("decoder.decoder_pred.conv", "decoder_pred.0"),
    ("decoder.decoder_pred.layernorm", "decoder_pred.1"),
    ("decoder.decoder_pred.head", "decoder_pred.3"),
)
"""Parts of transformers' names, and of the released ones."""


def released_name(name: str) -> str:
    """What the released files call a tensor of transformers'."""
    for part, released in _NAMES:
        name = name.replace(part, released)
    return name


_SIZES = {
    "segment_token_x": 4,
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "blocks.0.attn.rel_pos_h": 2,
    "blocks.0.attn.rel_pos_w": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "decoder_embed.weight": 2,
    "decoder_pred.0.weight": 4,
}
"""The tensors that sizes are read off, and their ranks."""


def config_of(tensors: Mapping[str, StoredTensor], source: str) -> SegGptConfig:
    """The sizes of a released file, read off the shapes of its tensors (by released name).

    The layer after which the streams merge is the released code's (2), and so are the layers whose features the decoder
    sees: the last of each quarter.

    Raises:
        ValueError: naming the tensors that are missing or of another shape.
    """
    if missing := [name for name in _SIZES if name not in tensors]:
        raise ValueError(
            f"{source} is no Painter and no SegGPT: it has no {join_names(missing)}, but {join_names(tensors)}."
        )
    shapes = {name: list(tensors[name].shape) for name in _SIZES}
    for name, rank in _SIZES.items():
        if len(shapes[name]) != rank:
            raise ValueError(f"{source}: {name} has shape {shapes[name]}; expected {rank} dimensions.")
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    offsets, head_dim = shapes["blocks.0.attn.rel_pos_h"]
    rows, columns = ((n + 1) // 2 for n in (offsets, shapes["blocks.0.attn.rel_pos_w"][0]))
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    features = shapes["decoder_embed.weight"][1] // width
    if width % head_dim or not features or depth % features:
        raise ValueError(
            f"{source}: a width of {width}, heads of {head_dim}, {depth} layers and a decoder_embed of "
            f"{shapes['decoder_embed.weight'][1]} inputs do not go together; the file is damaged, or of another model."
        )
    return SegGptConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // head_dim,
        image_size=(rows * patch, columns * patch),
        patch_size=patch,
        mlp_dim=shapes["blocks.0.mlp.fc1.weight"][0],
        pretrain_image_size=math.isqrt(shapes["pos_embed"][1] - 1) * patch,
        decoder_hidden_size=shapes["decoder_pred.0.weight"][0],
        intermediate_hidden_state_indices=[depth // features * (i + 1) - 1 for i in range(features)],
    )
