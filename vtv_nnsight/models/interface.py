"""What the rest of the package may ask of a model, and nothing else: vectors, patching, search, evaluation, studies and
reports know no model but through `InContextModel`.

A model of your own subclasses it beside one of nnsight's (`NNsight`, `HuggingFaceModel`), so that `trace` takes a
`VisualPrompt` and `model.output` is what the network gives; then everything works on it: collecting, scoring,
searching, patching, evaluating. `docs/your_model.md` is a complete example.

A *position* is a place of the canvas, whatever the prompt shows and in whatever order: 0 is CLS, and 1 + i is patch i
of the layout (see `layouts`). A *stage* is a run of layers that share their heads and see the same positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from vtv_nnsight import tasks
from vtv_nnsight.layouts import Layout, place_names
from vtv_nnsight.prompts import VisualPrompt

QUERY_ONLY = ("head", "quadrant", "token")
"""How fine the units of query-only prompts are: a head at all its tokens, at a region of the canvas, or at a token."""
GRANULARITIES = (*QUERY_ONLY, "cell")
"""How fine units are; "cell" is a head at any cell of a one-shot prompt, the example's too, for circuits that are cut
out of a model."""

SITES = ("heads", "attn", "mlp", "residual")
"""Where a layer's activations can be read and written, in the order in which it computes them: the outputs of its
heads, of its attention, of its MLP, and the residual stream that it leaves (see `sites`)."""


HEADS = SITES[0]


class StageSite(NamedTuple):
    """Where activations are: a site of the layers of a stage. Written "encoder" for heads, else "encoder.mlp"."""

    stage: str
    site: str = HEADS

    def __str__(self) -> str:
        return self.stage if self.site == HEADS else f"{self.stage}.{self.site}"


class ByStage(dict[StageSite, Any]):
    """A value for each stage, or for each stage and site: `values["encoder"]` is that of the stage's heads,
    `values["encoder", "mlp"]` that of another site. Iteration gives `StageSite`s."""

    fingerprint: Mapping[str, Any] | None = None
    """Of a mask that a space of units made: the space's."""

    def __init__(self, values: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = (), **stages: Any) -> None:
        super().__init__((_key(key), value) for key, value in dict(values, **stages).items())

    def __getitem__(self, key: str | tuple[str, str]) -> Any:
        return super().__getitem__(_key(key))

    def __setitem__(self, key: str | tuple[str, str], value: Any) -> None:
        super().__setitem__(_key(key), value)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(StageSite(key) if isinstance(key, str) else key)

    def get(self, key: str | tuple[str, str], default: Any = None) -> Any:
        """The value, or `default` where there is none."""
        return super().get(_key(key), default)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that there are, in the order in which a layer computes them."""
        return tuple(site for site in SITES if any(key.site == site for key in self))

    def map(self, function: Callable[..., Any], *others: Mapping[Any, Any]) -> ByStage:
        """`function` of each value, beside those of `others`."""
        rest = [ByStage(other) for other in others]
        return ByStage({key: function(value, *(other[key] for other in rest)) for key, value in self.items()})


def _key(key: str | tuple[str, str]) -> StageSite:
    names = (key,) if isinstance(key, str) else key
    if not isinstance(names, tuple) or not 0 < len(names) < 3 or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{key!r} is neither the name of a stage nor (stage, site), such as ('encoder', 'mlp').")
    return StageSite(*names)


@dataclass(frozen=True)
class Stage:
    """Layers that have the same heads and see the same positions.

    Args:
        name: Its name, such as "encoder": the key of values by stage.
        layers: Number of layers.
        heads: Attention heads of each layer.
        head_dim: Width of a head.
        streams: Rows of the network's own tensors for each row of a batch: 2 where image and target run side by side.
        site: Where of its layers (see `SITES`); at the sites of whole layers it has one head.
    """

    name: str
    layers: int
    heads: int
    head_dim: int
    streams: int = 1
    site: str = HEADS

    @property
    def key(self) -> StageSite:
        """Its name and site: the key of its values."""
        return StageSite(self.name, self.site)

    def at(self, site: str) -> Stage:
        """The stage at another site."""
        return self if site == self.site else replace(self, heads=1, head_dim=self.width, site=site)

    @property
    def width(self) -> int:
        """Width of the residual stream: of all heads side by side."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Loss:
    """How far an answer is from the truth, as the model itself was trained to see it.

    Args:
        name: Its name, such as "tokens". Not "pixels": that is the task's own loss of the painted answer, which every
            model has.
        value: `value(output, prompts, truth)` → losses [batch], of the network's output, the prompts that it answers
            and what `truth` gives of them.
        differentiable: Whether gradients flow from it into the network, as gates and attribution need.
    """

    name: str
    value: Callable[[Any, VisualPrompt, torch.Tensor], torch.Tensor]
    differentiable: bool = True


class InContextModel(ABC):
    """A traceable model that completes visual prompts.

    Beside what is below it is an nnsight model: `trace`, `edit`, `output`, `state_dict`, `parameters`. Its input is a
    VisualPrompt, one or one for each invoke, and each invoke sees its own rows only.
    """

    trace: Any
    edit: Any
    output: Any
    state_dict: Any
    parameters: Any

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The layout of its canvas, with one example."""

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """Its stages, in the order in which they run. Known before the weights are loaded. None of a model that can
        only be traced and evaluated: there are no heads to ask for then."""

    @property
    @abstractmethod
    def losses(self) -> tuple[Loss, ...]:
        """The losses that it was trained with, the default first; none for a model whose only loss is the task's own of
        the painted answer."""

    @abstractmethod
    def attention(self, stage: str, layer: int) -> Any:
        """The envoy of a layer's attention, 0 being the stage's first layer. Its `heads` are the outputs of the heads
        before the output projection, [batch, token, head, head_dim], readable and writable inside a trace, with tokens
        at `positions`; its `path` names it for people. Where its class has `pattern`, [batch, head, query token, key
        token], reports show where the answer looks; keys are the tokens of the query token's own stream."""

    def outputs(self, stage: str, layer: int) -> dict[str, Any]:
        """The envoys whose `output` is what a layer has at the sites beside its heads: "attn", "mlp" and "residual" of
        `SITES`, those that there are. An output, or the first of a tuple, is [batch, token, width] with tokens at
        `positions`, or [stream * batch, row, column, width]. A model that says nothing has heads alone."""
        return {}

    @property
    def reread(self) -> tuple[int, ...] | None:
        """Layers, counted through the stages, of which something reads the output again after the next layer has: of a
        network that goes from layer to layer none, (). Searches then start from the last layer before the first that
        they patch. None, where a model says nothing: they run all of it."""
        return None

    @abstractmethod
    def positions(self, stage: str, prompts: VisualPrompt | None = None) -> torch.Tensor:
        """The position of every token of a stage: LongTensor [token]; inside a trace whose rows were given patches of
        their own, [batch, token].

        Args:
            stage: Its name.
            prompts: Of these prompts; None, inside a trace, of what is running. It is then asked once a stage, before
                the first of the stage's heads.
        """

    @abstractmethod
    def groups(self, stage: str, granularity: str, layout: Layout | None = None) -> dict[str, torch.Tensor]:
        """The places of a stage that units are made of: name → LongTensor of positions that are patched together.

        Only places that a query-only prompt shows; for "head", one group of all that any prompt shows; for "cell", a
        group for each cell that a one-shot prompt shows. `group_positions` makes it of a model's regions.

        Args:
            stage: Its name.
            granularity: One of `GRANULARITIES`.
            layout: The layout of the prompts; the model's own by default.

        Raises:
            ValueError: when the granularity is unknown.
        """

    @abstractmethod
    def truth(self, prompts: VisualPrompt) -> torch.Tensor:
        """What `losses` compare an output with, of prompts whose output cells hold the truth: [batch, …]. It is
        computed once and kept."""

    @abstractmethod
    def paint(self, output: Any, prompts: VisualPrompt) -> torch.Tensor:
        """The completed canvases that the network's output stands for: [batch, 3, height, width] in [0, 1], on the
        canvas's device, without gradients."""

    def prompt(self, task: Any, example: Any, query: Any) -> VisualPrompt:
        """One prompt in the model's own layout.

            >>> model.prompt("colorization", "cat.jpg", "dog.jpg")
            >>> model.prompt("segmentation", {"image": "cat.jpg", "mask": "cat_mask.png"}, "dog.jpg")
            >>> model.prompt(None, ("photo.jpg", "sketch.png"), "other.jpg")

        Args:
            task: A task, or its name; None to show pictures as they are.
            example: As for `Task.prompt`; without a task a pair, input and output.
            query: The same; without a task a picture.

        Raises:
            ValueError, TypeError: as `Task.prompt`; or when an example without a task is not a pair.
        """
        if task is not None:
            return (tasks.get(task) if isinstance(task, str) else task).prompt(example, query, self.layout)
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise ValueError("without a task the example is a pair of pictures, its input and its output.")
        cells = {"example_input": example[0], "example_output": example[1], "query": query}
        return VisualPrompt.from_cells(cells, self.layout)

    def ceiling(self, prompts: VisualPrompt) -> torch.Tensor | None:
        """The best canvases that the model could paint, knowing the truth, such as its tokenizer's own pictures of
        them: [batch, 3, height, width] in [0, 1]. None where nothing bounds it."""
        return None

    def identity(self) -> dict[str, Any]:
        """What tells it from other models beside stages, canvas and weights, as JSON values: its kind, and settings
        that a vector depends on."""
        return {"model": type(self).__name__}

    def restrict_to_output(self, prompts: VisualPrompt) -> VisualPrompt:
        """Inside a trace, after all edits: leave out the part of the output that `losses` do not read, to save time.

        Returns:
            Prompts that say what the output answers now: those given, where nothing was left out.
        """
        return prompts


def group_positions(
    granularity: str,
    everywhere: torch.Tensor,
    regions: Mapping[str, torch.Tensor],
    tokens: torch.Tensor,
    cells: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Groups of a stage's positions, for `InContextModel.groups`.

    Args:
        granularity: One of `GRANULARITIES`.
        everywhere: The positions that any prompt shows: the group of "head".
        regions: Name → positions: the groups of "quadrant".
        tokens: The positions that a query-only prompt shows: a group each for "token".
        cells: Name → positions of every cell that a one-shot prompt shows: the groups of "cell". A model that says
            none has no such units.
    """
    if granularity == "head":
        return {"all tokens": everywhere}
    if granularity == "quadrant":
        return dict(regions)
    if granularity == "token":
        return dict(zip(place_names(tokens), tokens[:, None]))
    if granularity == "cell" and cells:
        return dict(cells)
    known = GRANULARITIES if cells else QUERY_ONLY
    raise ValueError(f"granularity={granularity!r} is unknown; choose from {', '.join(known)}.")


PAPERS_PATCHES = 14 * 14


def default_batch_size(model: InContextModel, rows: int = 32) -> int:
    """Prompts per forward, where a user does not say: `rows` on a canvas of 14×14 patches, as the papers' are, and
    fewer on one of more patches, such as Painter's of 56×56."""
    return max(1, rows * PAPERS_PATCHES // max(PAPERS_PATCHES, model.layout.num_patches))
