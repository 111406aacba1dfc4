"""What every model here adds to nnsight's envoys: heads that can be told apart, and stages that know where their tokens
lie.

A model says which of its modules get which envoy (`envoys={Attention: AttentionEnvoy}`), and a batch's rows are cut by
`PromptBatcher`. Attention layers of other shapes make their own envoy with `heads_of`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nnsight import _c, save
from nnsight.intervention.batching import Batcher
from nnsight.intervention.envoy import Envoy, eproperty
from nnsight.intervention.tracer import InterleavingTracer

from vtv_nnsight.layouts import positions
from vtv_nnsight.prompts import Canvases


@contextmanager
def without_save() -> Iterator[None]:
    """Within, objects lack the method `save` that nnsight puts on all: some classes cannot be defined with it."""
    mounted = _c.unmount is not None and hasattr(object, "save")
    if mounted:
        _c.unmount("save")
    try:
        yield
    finally:
        if mounted:
            _c.mount(save, "save")


def heads_of(projection: str, count: str = "num_heads") -> eproperty:
    """The property `heads` of an attention envoy: z, the input of the module's output projection, head by head.

    Args:
        projection: Name of the output projection, whose input has the heads side by side, [batch, token, width].
        count: Name of the module's number of heads; `head_dim` is the width of one.
    """

    def sizes(attention: Envoy) -> tuple[int, int]:
        return getattr(attention._module, count), attention._module.head_dim

    @eproperty(key=f"{projection}.input", description="outputs z of the heads, [batch, token, head, head_dim]")
    def heads(self, value: Any) -> torch.Tensor:
        """Output z = softmax(qkᵀ/√d)·v of every head, before the output projection: [batch, token, head, head_dim].

        Token 0 is CLS; the others are the patches that the stage sees, in the prompt's order. For `tracer.cache`, it is
        the input of the output projection:

            cache = tracer.cache(modules=[attn.proj], include_inputs=True)
        """
        (z,), _ = value
        return editable(z).unflatten(-1, sizes(self))

    @heads.postprocess
    def heads(self, value: torch.Tensor) -> Any:
        number, size = sizes(self)
        if not isinstance(value, torch.Tensor) or tuple(value.shape[-2:]) != (number, size) or value.ndim != 4:
            found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"{self.path}.heads was given {found}; expected a tensor [batch, token, {number}, {size}]."
            )
        return (value.flatten(-2),), {}

    @heads.transform
    def heads(self, view: torch.Tensor, raw: Any) -> Any:
        return (view.flatten(-2),), {}

    return heads


def editable(value: torch.Tensor) -> torch.Tensor:
    """The tensor that a block may edit in place: the model's own memory, or a copy where the backward pass needs the
    model's unedited (as softmax and the attention kernels do)."""
    return value.clone() if value.requires_grad else value


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
                f"{attention.path}.{self.name} is not computed by attn_implementation={implementation!r}; "
                'load the model with attn_implementation="eager".'
            )


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Let a model compute its attention eagerly for a while, so that there are patterns to read."""
    configs = {id(module.config): module.config for module in model._module.modules() if hasattr(module, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


class StackEnvoy(Envoy):
    """The encoder or the decoder, which knows where its tokens lie. The last input of its module is the patches that it
    sees."""

    @eproperty(key="input", description="absolute positions of the tokens, [token]")
    def positions(self, value: Any) -> torch.Tensor:
        """Absolute position of every token of the stage, 0 for CLS and 1 + i for patch i: LongTensor [token], or
        [batch, token] where every row was given patches of its own.

        Like any input, it comes before what is inside the stage: read it first.
        """
        (*_, seen), _ = value
        return positions(seen)

    @positions.postprocess
    def positions(self, value: Any) -> Any:
        raise ValueError(
            f"{self.path}.positions can only be read: they follow from the patches that the prompt shows; trace a "
            "prompt with other `visible` and `decoded` patches."
        )


class PromptBatcher(Batcher):
    """Rows of invokes are rows of canvases. Patch ids that the batch shares stay whole, also when there are as many as
    rows."""

    def _narrow_tensor(self, tensor: torch.Tensor, group: list) -> torch.Tensor:
        if _is_shared(tensor):
            return tensor
        own = super()._narrow_tensor(tensor, group)
        return Canvases.of(own, tensor.canvas_layout) if isinstance(tensor, Canvases) else own

    def _widen_tensor(self, full: torch.Tensor, group: list, edited: torch.Tensor) -> torch.Tensor:
        if _is_shared(full):
            return edited
        start, size = group
        if len(full) == self.total and edited.is_set_to(full.narrow(0, start, size)):
            return full  # edited in place
        return super()._widen_tensor(full, group, edited)


def _is_shared(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 1 and tensor.dtype == torch.long


class PromptTracer(InterleavingTracer):
    """Finds the block of a trace. A call in the body of somebody else's one-line `with`, such as
    `with torch.no_grad(): canvas = model.generate(prompts)`, has none."""

    def parse(self, source: str, lineno: int) -> ast.With | ast.AsyncWith | None:
        node = super().parse(source, lineno)
        if node is None or node.body[0].lineno != node.lineno:
            return node
        entered = {getattr(getattr(item.context_expr, "func", None), "attr", None) for item in node.items}
        return node if entered & {"trace", "generate", "scan"} else None
