"""All that this package needs of nnsight beyond its public names: no file but this, `nnsight_batching`,
`nnsight_remote` and `nnsight_verbs` knows how nnsight works inside.

A family's model is a `TraceableModel` of one network; its modules get envoys with readable heads (`heads_of`) and
patterns, and stages that know where their tokens lie; `PromptBatcher` cuts the rows of a batch into those of its
invokes.
"""

from __future__ import annotations

import ast
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from nnsight import _c, save
from nnsight.intervention.envoy import Envoy, eproperty
from nnsight.intervention.envoy import traceable as nnsight_traceable
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.source import install_source
from nnsight.intervention.tracer import InterleavingTracer, ScanningTracer
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.modeling.mixins.meta import MetaDevice
from nnsight.modeling.transformers import TransformersModel
from torch import nn

from vtv_nnsight.files import refusing
from vtv_nnsight.layouts import positions
from vtv_nnsight.models.inside_trace import called
from vtv_nnsight.models.nnsight_batching import PromptBatcher
from vtv_nnsight.models.nnsight_remote import Fetching, check_server, nnsight_class, there

__all__ = ["Envoy", "PromptBatcher", "eproperty", "traceable"]

PATTERN_AXES = "[batch, head, query token, key token]"


def network_of(envoy: Any) -> Any:
    """The torch module of a model, or of any envoy in it."""
    return envoy._module


def heads_of(
    projection: str,
    count: str | int = "num_heads",
    split: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
    join: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
) -> eproperty:
    """The property `heads` of an attention envoy: z, the input of the module's output projection, head by head.

    Args:
        projection: Name of the output projection, an `nn.Linear` that reads the heads side by side.
        count: The number of heads, or the module's name of it.
        split: (z, module) → [batch, token, head, head_dim], where z is not [batch, token, width].
        join: Its inverse.
    """

    def sizes(attention: Envoy) -> tuple[int, int]:
        module = network_of(attention)
        number = getattr(module, count) if isinstance(count, str) else count
        linear = getattr(module, projection)
        return number, (getattr(linear, "in_features", None) or linear.nx) // number

    def joined(attention: Envoy, heads: torch.Tensor) -> tuple[tuple[torch.Tensor], dict[str, Any]]:
        return (join(heads, network_of(attention)) if join else heads.flatten(-2),), {}

    def heads(self: Envoy, value: Any) -> torch.Tensor:
        """Output z = softmax(qkᵀ/√d)·v of every head, before the output projection: [batch, token, head, head_dim].

        Tokens are those that the stage sees, in the prompt's order. For `tracer.cache`, it is the input of the output
        projection:

            cache = tracer.cache(modules=[attn.proj], include_inputs=True)
        """
        (z,), _ = value
        return split(editable(z), network_of(self)) if split else editable(z).unflatten(-1, sizes(self))

    view = eproperty(f"{projection}.input", "outputs z of the heads, [batch, token, head, head_dim]")(heads)
    return writable("[batch, token, head, head_dim]", joined)(view)


def writable(
    axes: str, write: Callable[[Any, torch.Tensor], Any] = lambda envoy, value: value
) -> Callable[[eproperty], eproperty]:
    """Let an envoy's view be written, and edited in place.

    Args:
        axes: Of what it shows. What is written and has not the shape of what it replaces, and would broadcast, is
            refused with a ValueError that names both.
        write: (envoy, what was written or edited) → what the module goes on with; the same by default.
    """

    def declare(view: eproperty) -> eproperty:
        def checked(envoy: Envoy, value: Any) -> Any:
            expected = list(view._preprocess(envoy, Mediator.value(view._location(envoy))).shape)
            if not isinstance(value, torch.Tensor) or list(value.shape) != expected:
                given = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(f"{envoy.path}.{view.name} was given {given}; expected a tensor {axes} = {expected}.")
            return write(envoy, value)

        view.postprocess(checked)
        view.transform(lambda envoy, edited, raw: write(envoy, edited))
        return view

    return declare


def editable(value: torch.Tensor) -> torch.Tensor:
    """The tensor that a block may edit in place: the model's own memory, or a copy where the backward pass needs the
    model's unedited (as softmax and the attention kernels do)."""
    return value.clone() if value.requires_grad else value


class EagerProperty(eproperty):
    """A value that exists only under attn_implementation="eager"; elsewhere, asking for it says so."""

    def _location(self, attention: Envoy) -> str:
        """Refuse other implementations."""
        if network_of(attention).config._attn_implementation != "eager":
            raise ValueError(f'{attention.path}.{self.name}: load the model with attn_implementation="eager".')
        return str(super()._location(attention))


class AttentionEnvoy(Envoy):
    """An attention layer of transformers', which gives its pattern beside its output where it is computed eagerly."""

    @EagerProperty(key="output", description='attention pattern, [batch, head, query, key] (only "eager")')
    def pattern(self, value: Any) -> torch.Tensor:
        """How much each token attends to each: [batch, head, query token, key token], rows that sum to one. It comes
        after `heads`, and can only be read."""
        return value[1]

    @pattern.postprocess  # type: ignore[no-redef]
    def pattern(self, value: Any) -> Any:
        """Refuse to write it.

        Raises:
            ValueError: always, naming what to change in its place.
        """
        raise ValueError(f"{self.path}.pattern can only be read; change {self.path}.heads, which come of it.")


def attention_envoy(projection: str, count: str | int) -> type[AttentionEnvoy]:
    """The envoy of an attention layer of transformers' that has its heads side by side; arguments are `heads_of`'s."""
    return type("AttentionEnvoy", (AttentionEnvoy,), {"heads": heads_of(projection, count)})


class SourceProperty(eproperty):
    """A value inside the module's forward, which nnsight serves once that forward is instrumented."""

    def _location(self, attention: Envoy) -> str:
        """Instrument the module's forward."""
        install_source(attention)
        return str(super()._location(attention))


class StageEnvoy(Envoy):
    """The encoder or the decoder, which knows where its tokens lie. The last input of its module is the patches that it
    sees."""

    @eproperty(key="input", description="absolute positions of the tokens, [token]")
    def positions(self, value: Any) -> torch.Tensor:
        """Absolute position of every token of the stage, 0 for CLS and 1 + i for patch i: LongTensor [token], or
        [batch, token] where the rows were given different patches.

        Like any input, it comes before what is inside the stage: read it first.
        """
        (*_, seen), _ = value
        return positions(seen)

    @positions.postprocess  # type: ignore[no-redef]
    def positions(self, value: Any) -> Any:
        raise ValueError(f"{self.path}.positions can only be read: they follow from the patches that the prompt shows.")


_running: weakref.WeakSet[Any] = weakref.WeakSet()
"""The interleavers of models that run."""
_looking = threading.Lock()


@contextmanager
def _only_run(model: Any) -> Iterator[None]:
    """Refuse a second run of a model while it runs, in the same block or in another thread: nnsight keeps what a run is
    given with the model."""
    with _looking:
        if model.interleaver in _running:
            raise RuntimeError(RUNS)
        _running.add(model.interleaver)
    try:
        yield
    finally:
        _running.discard(model.interleaver)


RUNS = (
    "a trace of this model is running, around this line or in another thread; let it end first: call the model outside "
    "of the block, and from several threads behind a threading.Lock, or with a model for each."
)


def traceable(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a model as a call and as the context of a trace. `TraceableModel.interleave` runs it."""

    @functools.wraps(method)
    def while_running(self: Any, *args: Any, **kwargs: Any) -> Any:  # all that nnsight calls itself
        raise RuntimeError(RUNS)

    while_running.runs = method  # type: ignore[attr-defined]
    return nnsight_traceable(while_running)


class _RunningAlone:
    """A tracer of a model that does not run already."""

    def execute(self: Any, code: Any) -> None:
        """Run the block."""
        with _only_run(self.envoy):
            super().execute(code)  # type: ignore[misc]


class PromptScan(_RunningAlone, ScanningTracer):
    """A scan of shapes."""


class PromptTracer(_RunningAlone, InterleavingTracer):
    """Finds the block of a trace. A call in the body of somebody else's one-line `with`, such as
    `with torch.no_grad(): canvas = model.generate(prompts)`, has none."""

    def parse(self, source: str, lineno: int) -> ast.With | ast.AsyncWith | None:
        """The `with` statement of this trace in the source of the code around it."""
        node = super().parse(source, lineno)
        if node is None or node.body[0].lineno != node.lineno:
            return node
        entered = {getattr(getattr(item.context_expr, "func", None), "attr", None) for item in node.items}
        return node if entered & {"trace", "generate", "scan"} else None


class Traceable:
    """What models of canvases and of texts share. nnsight asks them, under names that say it:

    - `count_rows(*inputs, **options)`: rows that an invoke adds to the batch, 0 where it holds options alone;
    - `join_inputs(invokes, method)`: the (inputs, options) of all invokes as the arguments of one forward.
    """

    @property
    def network(self) -> Any:
        """The torch module that is traced."""
        return network_of(self)

    @property
    def is_edited(self: Any) -> bool:
        """Whether `edit` has stored a block that its traces replay."""
        return bool(self._edits)

    def __call__(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        """Run the network once, untraced: the output that `model.trace(...)` calls `model.output`."""
        return self.trace(*inputs, trace=False, **kwargs)

    def trace(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        return super().trace(*inputs, **{"tracer_cls": PromptTracer, **kwargs})  # type: ignore[misc]

    trace.__doc__ = HuggingFaceModel.trace.__doc__

    def scan(self: Any, *inputs: Any, fn: Any = None, backend: Any = None, **kwargs: Any) -> Any:
        return PromptScan(self, fn or "__call__", *inputs, backend=backend, **kwargs)

    scan.__doc__ = HuggingFaceModel.scan.__doc__

    def interleave(self: Any, fn: Any, *args: Any, batcher: Any = None, **kwargs: Any) -> Any:
        """Run the network with what waits for its values: a tracer's, or none in a call."""
        if method := getattr(fn, "runs", None):  # of `traceable`
            fn = method.__get__(fn.__self__)
        with nullcontext() if batcher is not None else _only_run(self):
            return super().interleave(fn, *args, batcher=batcher, **kwargs)  # type: ignore[misc]

    def _batch_size(self: Any, *inputs: Any, **kwargs: Any) -> int:
        rows: int = self.count_rows(*inputs, **kwargs)
        return rows

    def _batch(self: Any, invokes: list[Any], method: Any) -> Any:
        return self.join_inputs(invokes, method)


class TraceableTexts(Traceable, TransformersModel):
    """nnsight's model of strings and tokens. `adapt(module)` is given the network before its envoys are made;
    `as_tokens(invokes)` gives tokens for prompts; `remote` is where it runs, if not here."""

    remote: bool | str
    as_tokens: Callable[[list[Any]], list[Any]]
    sent: Any

    def count_rows(self, *inputs: Any, **kwargs: Any) -> int:
        """As nnsight counts strings and tokens."""
        return TransformersModel._batch_size(self, *inputs, **kwargs)

    def join_inputs(self, invokes: list[Any], method: Any) -> Any:
        """As nnsight pads strings and tokens."""
        return TransformersModel._batch(self, invokes, method)

    def interleave(self, fn: Any, *inputs: Any, remote: bool | str = False, **kwargs: Any) -> Any:
        """As nnsight's; with `remote`, a call such as `generate` is a job."""
        if remote:
            ((inputs, kwargs),) = self.as_tokens([(inputs, kwargs)])
            return there(self, remote, called, getattr(fn, "__name__", fn), inputs, kwargs)
        return super().interleave(fn, *inputs, **kwargs)

    def session(self, *args: Any, **kwargs: Any) -> Any:
        """As nnsight's."""
        self.sent, self.after = None, 0
        return super().session(*args, **kwargs)

    def dispatch(self) -> None:
        """Load the weights.

        Raises:
            ValueError: when the model runs elsewhere.
        """
        if self.remote not in (False, "local"):
            raise ValueError(f"{self.repo_id!r} has no weights here; write remote={self.remote!r}, or load it without.")
        super().dispatch()

    def _remoteable_class(self) -> type:
        return nnsight_class(type(self))

    def _remote_backend(self, remote: bool | str, *args: Any) -> Any:
        check_server(self, remote)
        return Fetching(super()._remote_backend(remote, *args), self)

    def _load_meta(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.adapt(super()._load_meta(*args, **kwargs))

    def _load(self, *args: Any, **kwargs: Any) -> nn.Module:
        with refusing(self.repo_id, "could not be loaded"):
            return self.adapt(super()._load(*args, **kwargs))

    def _wrap(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.adapt(super()._wrap(*args, **kwargs))


class TraceableModel(Traceable, HuggingFaceModel):
    """nnsight's lazy model of a network: the weights are loaded when a trace first needs them, and until then the
    network is on the meta device.

    What nnsight asks of a family, under names that say it:

    - `empty_network(source, **options)`: the network without weights, `loaded_network(source, **options)`: with them,
      and `ready_network(module, **options)`: that of a ready module;
    - `module_class`: the class of transformers' with the `from_pretrained` that reads weights.
    """

    _batcher_class = PromptBatcher

    def load_pretrained(self, source: str, **options: Any) -> Any:
        """What transformers' `from_pretrained` gives for a source and options."""
        return super()._load(source, **options)

    def _auto(self) -> Any:
        return self.module_class

    def _load_meta(self, source: str, **options: Any) -> nn.Module:
        return self.empty_network(source, **options)

    def _load(self, source: str, **options: Any) -> nn.Module:
        return self.loaded_network(source, **options)

    def _wrap(self, module: nn.Module, **options: Any) -> nn.Module:
        return self.ready_network(module, **options)


def real_tensors() -> AbstractContextManager[None]:
    """While an empty network is built: new tensors have values, unless a device says otherwise."""
    return MetaDevice.real()


@contextmanager
def without_save() -> Iterator[None]:
    """Take `save` off every Python object for a while, for code that checks the attributes of its classes."""
    mounted = _c.unmount is not None and hasattr(object, "save")
    if mounted:
        _c.unmount("save")
    try:
        yield
    finally:
        if mounted:
            _c.mount(save, "save")
