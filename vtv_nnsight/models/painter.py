"""Painter and SegGPT under nnsight: in-context painters that see a picture and its target as two pictures.

    >>> model = SegGPT("BAAI/seggpt-vit-large", embedding_type="semantic")
    >>> prompts = task.prompts(images, n=4, layout=model.layout)          # Layout(896, 16, gap=0)
    >>> with model.trace(prompts):
    ...     z = model.encoder.layers[3].attention.heads.save()            # [batch, token, head, head_dim]
    ...     prediction = model.output.prediction.save()                   # [batch, 3, cell, cell], normalised
    >>> canvas = model.generate(prompts)                                  # [batch, 3, height, width] in [0, 1]

*Images Speak in Images* (CVPR 2023, arXiv 2212.02499) and *SegGPT* (ICCV 2023, arXiv 2304.03284) are one network, and
transformers has it. Its *image* is the left column of a canvas (example input over query), its *target* the right one
(example output over the answer, which is masked). The first layers see the two as two streams; after layer
`merge_index` the streams are averaged, and one token stands for a place of both.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch.nn import functional as F
from transformers import SegGptConfig, SegGptForImageSegmentation
from transformers.models.seggpt.modeling_seggpt import SegGptAttention

from vtv_nnsight.finite import check_output
from vtv_nnsight.images import denormalise, normalise
from vtv_nnsight.layouts import Layout, positions
from vtv_nnsight.models import nnsight_compat as compat
from vtv_nnsight.models.canvas import TraceableCanvas, drop_none
from vtv_nnsight.models.interface import Loss, Stage, group_positions
from vtv_nnsight.models.painter_files import describe, released_name
from vtv_nnsight.models.painter_network import PainterNetwork
from vtv_nnsight.models.painting import Inputs
from vtv_nnsight.models.sources import HUB_OPTIONS, fetch_released
from vtv_nnsight.models.torch_files import StrPath
from vtv_nnsight.prompts import VisualPrompt, crop
from vtv_nnsight.text import check_choice

EMBEDDING_TYPES = ("semantic", "instance")


def _join_pattern(attention: compat.Envoy, pattern: torch.Tensor) -> torch.Tensor:
    """A pattern as the module computes it: the streams side by side."""
    axes = "batch head (stream query) key -> (batch stream head) query key"
    return rearrange(pattern, axes, stream=compat.network_of(attention).streams)


class AttentionEnvoy(compat.Envoy):
    """An attention layer with heads that can be told apart, in which a row of the batch has both its streams: before
    the merge, the image's tokens and then the target's, each row by row; after it, one token for a place of both."""

    heads: compat.eproperty = compat.heads_of(
        "proj",
        "num_attention_heads",
        split=lambda z, attention: rearrange(
            z,
            "(batch stream) row column (head dim) -> batch (stream row column) head dim",
            stream=attention.streams,
            head=attention.num_attention_heads,
        ),
        join=lambda heads, attention: rearrange(
            heads,
            "batch (stream row column) head dim -> (batch stream) row column (head dim)",
            stream=attention.streams,
            column=attention.columns,
        ),
    )

    @compat.writable(compat.PATTERN_AXES, _join_pattern)
    @compat.SourceProperty(
        key="source.torch_nn_functional_softmax_0.output", description="attention pattern, [batch, head, query, key]"
    )
    def pattern(self, value: torch.Tensor) -> torch.Tensor:
        """How much each token attends to each, rows that sum to one: [batch, head, query token, key token].

        Before the merge, a query token is of either stream, as in `heads`, and the keys are the tokens of its own.
        """
        pattern, attention = "(batch stream head) query key -> batch head (stream query) key", compat.network_of(self)
        return rearrange(compat.editable(value), pattern, stream=attention.streams, head=attention.num_attention_heads)


class Painter(TraceableCanvas):
    """A Painter that can be traced: any image-to-image task from one example.

    The names that lead to its parts:

        Painter
        ├── embeddings       patch_embeddings, mask_token, position_embeddings, …
        ├── encoder
        │   ├── layers[i]    layernorm_before, attention (qkv, proj; .heads, .pattern), layernorm_after,
        │   │                mlp (lin1, lin2)
        │   └── layernorm
        └── decoder          decoder_embed, decoder_pred

    Every module has `.input` and `.output`. Up to layer `merge_index` each row of the batch is two rows of a module,
    its image and its target, of which an invoke sees its own; afterwards it is one. `attention.heads` is [batch, token,
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
    module_class = SegGptForImageSegmentation
    source_kinds = "a Hub id, a folder, a checkpoint file"
    published_name = staticmethod(released_name)
    envoy_classes = {SegGptAttention: AttentionEnvoy}
    typed = False
    """Whether the model has type tokens and, with them, a feature ensemble."""
    embedding_type = "instance"
    """Which of the type tokens, Painter's being zero."""

    def __init__(self, source: StrPath | SegGptForImageSegmentation, **kwargs: Any) -> None:
        if isinstance(source, str):
            source = fetch_released(source, **drop_none(kwargs, "revision", *HUB_OPTIONS))
        super().__init__(source, **kwargs)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The layers before the merge, "streams", in which image and target run side by side, and those after it,
        "merged"."""
        config = self.network.config
        apart = config.merge_index + 1
        heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        return (
            Stage("streams", apart, heads, size, streams=2),
            Stage("merged", config.num_hidden_layers - apart, heads, size),
        )

    @property
    def reread(self) -> tuple[int, ...]:
        """The layers that the decoder reads."""
        return tuple(self.network.config.intermediate_hidden_state_indices)

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The smooth L1 distance of the masked half, as trained."""
        return (Loss("smooth_l1", self._smooth_l1),)

    def layer(self, stage: str, layer: int) -> compat.Envoy:
        """The envoy of a layer: `encoder.layers[layer]` for "streams"; "merged" goes on counting."""
        return self.encoder.layers[self._first(stage) + layer]

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
        regions, cells = _PLACES[stage]
        query, whole = (_positions(stage, layout, query_only) for query_only in (True, False))
        return group_positions(
            granularity,
            positions(layout.all_patches),
            dict(zip(regions, query.chunk(len(regions)))),
            query,
            dict(zip(cells, whole.chunk(len(cells)))),
        )

    def truth(self, prompts: VisualPrompt) -> torch.Tensor:
        """The output cell as the network is to give it: normalised, [batch, 3, cell, cell]."""
        prompts.check_truth()
        return normalise(prompts.region("output"))

    @torch.no_grad()
    def paint(self, output: Any, prompts: VisualPrompt | Inputs) -> torch.Tensor:  # type: ignore[override]
        """The prompts' canvases with the answer in the output cell, clipped: [batch, 3, height, width] in [0, 1]."""
        check_output(output)
        painted, (rows, columns) = prompts.canvas.clone(), self.layout.cells["output"]
        painted[..., rows, columns] = denormalise(output.prediction.to(painted.dtype)).clamp(0, 1)
        return painted

    def read_released(self, source: str, **options: Any) -> tuple[SegGptConfig, dict[str, torch.Tensor]]:
        """The config that the tensors of a released file tell, and these."""
        return describe(source)

    def build(self, config: Any, source: str, **options: Any) -> Any:
        """The module of a config, without weights."""
        with compat.real_tensors(), torch.device("meta"):  # transformers computes drop rates on the CPU
            return super().build(config, source, **options)

    def adapt(self, module: SegGptForImageSegmentation, source: str) -> PainterNetwork:
        """The network of a module, in eval mode, if it is of this model: Painter's type tokens are zero."""
        tokens = module.model.embeddings.type_token_semantic, module.model.embeddings.type_token_instance
        if not any(token.is_meta for token in tokens):
            typed = any(bool(token.detach().any()) for token in tokens)
            if typed != self.typed:
                kind, why = ("SegGPT", "type tokens") if typed else ("Painter", "no type tokens")
                raise ValueError(f"{source} is a {kind} (it has {why}); load it with {kind}.")
        return PainterNetwork(module.eval())

    def check_inputs(self, *inputs: Any, **kwargs: Any) -> tuple[VisualPrompt | Inputs, dict[str, Any]]:
        """One input set: a prompt in this model's layout that is one-shot or query only; and the options."""
        prompt = inputs[0] if inputs else None
        if isinstance(prompt, VisualPrompt):
            self._check_layout(prompt.layout, "a prompt")
        if "embedding_type" in kwargs:
            raise TypeError("embedding_type= belongs to the model; give it as SegGPT(…, embedding_type=…).")
        if kwargs.get("feature_ensemble") and not self.typed:
            raise TypeError(f"{type(self).__name__} has no feature ensemble; SegGPT has.")
        given, options = super().check_inputs(*inputs, **kwargs)
        layout, patches = self.layout, [ids.cpu().sort().values for ids in (given.visible, given.decoded)]
        forms = (layout.visible, layout.all_patches), (layout.regions["query"], layout.query_band)
        if not any(all(map(torch.equal, patches, form)) for form in forms):
            counts = " of ".join(str(ids.shape[-1]) for ids in patches)
            raise ValueError(f"a prompt that shows {counts} patches is neither one-shot nor query only.")
        return given, options | {"embedding_type": self.embedding_type}

    def join_inputs(self, invokes: list[Any], method: Any) -> tuple[Inputs, dict[str, Any]]:
        """The input sets of a trace as one forward's arguments; a feature ensemble's are of one query."""
        inputs, options = super().join_inputs(invokes, method)
        if options.get("feature_ensemble"):
            if len(inputs.decoded) < self.layout.num_patches:
                raise ValueError("a feature ensemble is over examples, and query-only prompts show none.")
            queries = len(crop(inputs.canvas, "query", self.layout).flatten(1).unique(dim=0))
            if queries > 1:
                raise ValueError(f"a feature ensemble is over one query's examples; this batch has {queries} queries.")
        return inputs, options

    def _smooth_l1(self, output: Any, prompts: VisualPrompt, truth: torch.Tensor) -> torch.Tensor:
        distance = F.smooth_l1_loss(output.prediction.float(), truth, reduction="none", beta=self.network.config.beta)
        return distance.flatten(1).mean(1)

    def _first(self, stage: str) -> int:
        """Number of a stage's first layer."""
        return {"streams": 0, "merged": self.network.config.merge_index + 1}[stage]

    def _check_layout(self, layout: Layout, what: str) -> None:
        """Refuse a layout with other cells than the network's two pictures have."""
        if (layout.cells, layout.patch_size) != (self.layout.cells, self.layout.patch_size):
            raise ValueError(f"{what} of {layout} does not fit {self.layout}; make it with layout=model.layout.")


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

    typed = True

    def __init__(
        self, source: StrPath | SegGptForImageSegmentation, *, embedding_type: str = "instance", **kwargs: Any
    ) -> None:
        check_choice(EMBEDDING_TYPES, embedding_type=embedding_type)
        super().__init__(source, **kwargs)
        self.embedding_type = embedding_type

    def identity(self) -> dict[str, Any]:
        """The kind of model, and the type of its embedding."""
        return super().identity() | {"embedding_type": self.embedding_type}


def _positions(stage: str, layout: Layout, query_only: bool) -> torch.Tensor:
    """Position of every token of a stage."""
    columns = (("example_input", "query"), ("example_output", "output"))
    cells = [name for column in columns[: 2 if stage == "streams" else 1] for name in column[query_only:]]
    return positions(torch.cat([layout.regions[name] for name in cells]))[1:]


_PLACES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "streams": (("query", "output"), ("example_input", "query", "example_output", "output")),
    "merged": (("query+output",), ("example_input+example_output", "query+output")),
}
"""Stage → the names of a query-only prompt's places, and of a one-shot prompt's."""
