"""What the rest of the package may ask of a model, and nothing else: vectors, patching, search and evaluation know no
model but through `InContextModel`, studies and reports of pictures through `CanvasModel`.

A model of your own subclasses one of them beside one of nnsight's (`NNsight`, `HuggingFaceModel`), so that `trace`
takes its prompts and `model.output` is what the network gives; then everything works on it: collecting, scoring,
searching, patching, evaluating. `docs/your_model.md` is a complete example.

A *position* is a place that prompts share. Of a canvas, whatever is shown and in whatever order: 0 is CLS, and 1 + i
is patch i of the layout (see `layouts`). Of a text it is counted from the end: 0 is the prompt's last token. A *stage*
is a run of layers that share their heads and see the same positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from vtv_nnsight import tasks
from vtv_nnsight.layouts import Layout
from vtv_nnsight.prompts import VisualPrompt, crop
from vtv_nnsight.text import quoted

QUERY_ONLY = ("head", "quadrant", "token")
"""How fine the units of query-only prompts are: a head at all its tokens, at a region of the canvas, or at a token."""
GRANULARITIES = (*QUERY_ONLY, "cell")
"""How fine units are; "cell" is a head at any cell of a one-shot prompt, the example's too, for circuits that are cut
out of a model."""

SITES = ("heads", "attn", "mlp", "residual")
"""Where a layer's activations can be read and written, in the order in which it computes them: the outputs of its
heads, of its attention, of its MLP, and the residual stream that it leaves (see `sites`)."""


HEADS = SITES[0]
PIXELS = "pixels"
"""The name of the task's own loss of the painted answer, which every canvas model has beside its `losses`."""


class Place(NamedTuple):
    """Where a layer's activations are, for the functions of `inside_trace`.

    Args:
        module: The module as nnsight has it.
        side: "input" or "output", where they are read and written.
        heads: Into how many parts the width is cut.
        streams: Rows of the network's tensors for each row of the batch.
    """

    module: Any
    side: str
    heads: int
    streams: int


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
        stream: Width of the residual stream, where it is not that of all heads side by side.
    """

    name: str
    layers: int
    heads: int
    head_dim: int
    streams: int = 1
    site: str = HEADS
    stream: int | None = None

    @property
    def key(self) -> StageSite:
        """Its name and site: the key of its values."""
        return StageSite(self.name, self.site)

    def at(self, site: str) -> Stage:
        """The stage at another site."""
        return self if site == self.site else replace(self, heads=1, head_dim=self.width, site=site)

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.stream or self.heads * self.head_dim


@dataclass(frozen=True)
class Loss:
    """How far an answer is from the truth, as the model itself was trained to see it.

    Args:
        name: Its name, such as "tokens". Not "pixels": that is the task's own loss of the painted answer, which every
            canvas model has.
        value: `value(output, prompts, truth)` → losses [batch], of the network's output, the prompts that it answers
            and what `truth` gives of them.
        differentiable: Whether gradients flow from it into the network, as gates and attribution need.
        truth: What it compares with in the place of the model's `truth`; it then reads the whole output.
    """

    name: str
    value: Callable[[Any, Any, torch.Tensor], torch.Tensor]
    differentiable: bool = True
    truth: Callable[[Any], torch.Tensor] | None = None


class InContextModel(ABC):
    """A traceable model that answers prompts (`prompts.Prompts`), whatever they are of.

    Beside what is below it is an nnsight model: `trace`, `edit`, `output`, `state_dict`, `parameters`. Its input is
    prompts, one batch or one for each invoke, and each invoke sees its own rows only.
    """

    trace: Any
    edit: Any
    output: Any
    state_dict: Any
    parameters: Any
    scoring: Mapping[str, Any] = {}
    """Options of a trace with which the output is what `losses` and `answers` read."""

    @property
    @abstractmethod
    def layout(self) -> Any:
        """The layout of its prompts where none is said."""

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """Its stages, in the order in which they run. Known before the weights are loaded. None of a model that can
        only be traced and evaluated: there are no heads to ask for then."""

    @property
    @abstractmethod
    def losses(self) -> tuple[Loss, ...]:
        """The losses that it was trained with, the default first; none for a model that has no losses but the task's
        own."""

    def task_losses(self, task: Any) -> tuple[Loss, ...]:
        """The losses of its answers that a task itself has."""
        return ()

    @abstractmethod
    def attention(self, stage: str, layer: int) -> Any:
        """The envoy of a layer's attention, 0 being the stage's first layer. Its `heads` are the outputs of the heads
        before the output projection, [batch, token, head, head_dim], readable and writable inside a trace, with tokens
        at `positions`; its `path` names it for people. Where its class has `pattern`, [batch, head, query token, key
        token], reports show where the answer looks; keys are the tokens of the query token's own stream."""

    def outputs(self, stage: str, layer: int) -> dict[str, Any]:
        """The envoys that give as `output` what a layer has at the sites beside its heads: those that there are of
        "attn", "mlp" and "residual". An output, or the first of a tuple, is [batch, token, width] with tokens at
        `positions`, or [batch * stream, row, column, width]. A model that says nothing has heads alone."""
        return {}

    @property
    def reread(self) -> tuple[int, ...] | None:
        """Layers, counted through the stages, of which something reads the output again after the next layer has: of a
        network that goes from layer to layer none, (). Searches then start from the last layer before the first that
        they patch. None, where a model says nothing: they run all of it."""
        return None

    def cached(self, prompts: Any) -> Sequence[torch.Tensor] | None:
        """What no patch at the positions of these prompts' layout can change, such as the keys and values of the tokens
        before them: a tensor for each prompt. A trace of these or some of these prompts with the option `cached`, a
        list of theirs, goes on from there. None, where a model says nothing: it is always run whole."""
        return None

    def name_of(self, module: Any) -> str:
        """The name of a module as users type it, such as "encoder.blocks.3.attn"."""
        return str(module.path).removeprefix("model.")

    @abstractmethod
    def positions(self, stage: str, prompts: Any = None) -> torch.Tensor:
        """The position of every token of a stage: LongTensor [token]; [batch, token] where rows differ.

        Args:
            stage: Its name.
            prompts: Of these prompts; None, inside a trace, of what is running. It is then asked once a stage, before
                the first of the stage's heads.
        """

    def token_positions(self, stage: str, prompts: Sequence[Any] | None, place: Place) -> torch.Tensor:
        """Inside a trace: the positions of the first tokens of a stage, [token] or [batch, token] with a negative
        number where a row has none; later tokens have none. By default `positions` of the prompts where all of them
        agree, else of what is running.

        Args:
            stage: Its name.
            prompts: Those that run, of each invoke; None where that is not known.
            place: Where the stage is read next.
        """
        with unset_fake_temporarily():
            known = [self.positions(stage, rows) for rows in prompts or ()]
            if known and all(torch.equal(known[0], other) for other in known[1:]):
                return known[0]
        return self.positions(stage)

    @abstractmethod
    def groups(self, stage: str, granularity: str, layout: Any = None) -> dict[str, torch.Tensor]:
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
    def lengths(self, prompts: Any = None) -> torch.Tensor:
        """The tokens of each prompt, LongTensor [batch], or [1] where all have as many: what bounds a batch."""

    def answer_lengths(self, prompts: Any) -> torch.Tensor:
        """The tokens of each true answer, LongTensor [batch], or [1] where all have as many: prompts of equal numbers
        are fastest together."""
        return torch.ones(1, dtype=torch.long)

    @abstractmethod
    def truth(self, prompts: Any) -> torch.Tensor:
        """What `losses` compare an output with, of prompts that know their answers: [batch, …]. It is computed once, of
        all prompts together, and kept."""

    @abstractmethod
    def answers(
        self, output: Any, prompts: Any, task: Any = None, edit: Callable[[Any], None] | None = None
    ) -> tuple[Any, Any]:
        """The answers that an output stands for, and the true ones, as tasks score them: two values of as many rows.

        Args:
            output: The network's, unrestricted.
            prompts: Those that it answers.
            task: The task, for a model that answers by its metric.
            edit: What was done inside the trace, for a model that must run again to answer.
        """

    def show(self, answers: Any) -> Any:
        """Answers for people: pictures, or strings."""
        return answers

    def bound(self, kind: str, prompts: Any) -> tuple[Any, Any] | None:
        """Answers that are not the model's, and the true ones: "copy", the queries themselves, or "ceiling", the best
        that it could give knowing the truth. None where there are none."""
        return None

    def identity(self) -> dict[str, Any]:
        """What tells it from other models beside stages, layout and weights, as JSON values: its kind, and settings
        that a vector depends on."""
        return {"model": type(self).__name__}

    def restrict_to_output(self, prompts: Any) -> Any:
        """Inside a trace, after all edits: leave out the part of the output that `losses` do not read, to save time.

        Returns:
            Prompts that say what the output answers now: those given, where nothing was left out.
        """
        return prompts


class CanvasModel(InContextModel):
    """A traceable model that completes the canvases of a VisualPrompt."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The layout of its canvas, with one example."""

    @abstractmethod
    def paint(self, output: Any, prompts: VisualPrompt) -> torch.Tensor:
        """The completed canvases that the network's output stands for: [batch, 3, height, width] in [0, 1], on the
        canvas's device, without gradients."""

    def ceiling(self, prompts: VisualPrompt) -> torch.Tensor | None:
        """The best canvases that the model could paint, knowing the truth, such as its tokenizer's own pictures of
        them: [batch, 3, height, width] in [0, 1]. None where nothing bounds it."""
        return None

    def lengths(self, prompts: Any = None) -> torch.Tensor:
        """The patches of a canvas: LongTensor [1]."""
        return torch.tensor([self.layout.num_patches])

    def answers(
        self, output: Any, prompts: VisualPrompt, task: Any = None, edit: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The painted output cells of an unrestricted output and the true ones: [batch, 3, cell, cell] in [0, 1]."""
        return crop(self.paint(output, prompts), "output", prompts.layout), prompts.region("output")

    def task_losses(self, task: Any) -> tuple[Loss, ...]:
        """ "pixels": the task's own loss of the painted answer."""

        def value(output: Any, prompts: VisualPrompt, truth: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = task.loss(self.answers(output, prompts)[0], truth)
            return loss

        return (Loss(PIXELS, value, False, lambda prompts: prompts.region("output")),)

    def bound(self, kind: str, prompts: VisualPrompt) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The query's pixels, or the output cells of `ceiling`; and the true output cells."""
        canvas, cell = (prompts.canvas, "query") if kind == "copy" else (self.ceiling(prompts), "output")
        return None if canvas is None else (crop(canvas, cell, prompts.layout), prompts.region("output"))

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
        return dict(zip(Layout.place_names(tokens), tokens[:, None]))
    if granularity == "cell" and cells:
        return dict(cells)
    known = GRANULARITIES if cells else QUERY_ONLY
    raise ValueError(f"granularity={quoted(granularity)} is unknown; choose from {', '.join(known)}.")


PAPERS_PATCHES = 14 * 14


def default_batch_size(model: InContextModel, rows: int = 32, prompts: Any = None) -> int:
    """Prompts per forward, where a user does not say: `rows` of as many tokens as the papers' canvas has patches,
    14×14; fewer of longer ones, such as Painter's canvas of 56×56, and up to four times as many of shorter ones."""
    return max(1, rows * PAPERS_PATCHES // max(PAPERS_PATCHES // 4, int(model.lengths(prompts).max())))


def batch_size_of(model: InContextModel, given: int | None, rows: int = 32, prompts: Any = None) -> int:
    """Prompts per forward: what a user gave, or `default_batch_size`."""
    return default_batch_size(model, rows, prompts) if given is None else given
