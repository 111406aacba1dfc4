"""All that this package needs of nnsight beyond its public names: no other file knows how nnsight works inside.

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
from greenlet import GreenletExit
from nnsight import _c, save
from nnsight.intervention.batching import Batcher
from nnsight.intervention.envoy import Envoy, eproperty
from nnsight.intervention.envoy import traceable as nnsight_traceable
from nnsight.intervention.interleaver import EarlyStopException, Event, Mediator, OutOfOrderError
from nnsight.intervention.iterator import Iterations
from nnsight.intervention.source import install_source
from nnsight.intervention.tracer import InterleavingTracer, ScanningTracer
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.modeling.mixins.meta import MetaDevice
from nnsight.util import apply
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from vtv_nnsight.layouts import positions
from vtv_nnsight.prompts import Canvases

__all__ = ["Envoy", "eproperty", "traceable"]

PATTERN_AXES = "[batch, head, query token, key token]"


def network_of(envoy: Any) -> Any:
    """The torch module of a model, or of any envoy in it."""
    return envoy._module


def heads_of(
    projection: str,
    count: str = "num_heads",
    split: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
    join: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
) -> eproperty:
    """The property `heads` of an attention envoy: z, the input of the module's output projection, head by head.

    Args:
        projection: Name of the output projection, an `nn.Linear` whose input has the heads side by side.
        count: Name of the module's number of heads.
        split: (z, module) → [batch, token, head, head_dim], where z is not [batch, token, width].
        join: Its inverse.
    """

    def sizes(attention: Envoy) -> tuple[int, int]:
        module = network_of(attention)
        number = getattr(module, count)
        return number, getattr(module, projection).in_features // number

    def joined(attention: Envoy, heads: torch.Tensor) -> tuple[tuple[torch.Tensor], dict[str, Any]]:
        return (join(heads, network_of(attention)) if join else heads.flatten(-2),), {}

    @eproperty(key=f"{projection}.input", description="outputs z of the heads, [batch, token, head, head_dim]")
    def heads(self: Envoy, value: Any) -> torch.Tensor:
        """Output z = softmax(qkᵀ/√d)·v of every head, before the output projection: [batch, token, head, head_dim].

        Tokens are those that the stage sees, in the prompt's order. For `tracer.cache`, it is the input of the output
        projection:

            cache = tracer.cache(modules=[attn.proj], include_inputs=True)
        """
        (z,), _ = value
        return split(editable(z), network_of(self)) if split else editable(z).unflatten(-1, sizes(self))

    @heads.postprocess  # type: ignore[no-redef]
    def heads(self: Envoy, value: torch.Tensor) -> Any:
        check_written(heads, self, value, "[batch, token, head, head_dim]")
        return joined(self, value)

    @heads.transform  # type: ignore[no-redef]
    def heads(self: Envoy, view: torch.Tensor, raw: Any) -> Any:
        return joined(self, view)

    return heads


def check_written(view: eproperty, envoy: Envoy, value: Any, axes: str) -> None:
    """Refuse what is written to an envoy's view and has not the shape of what it replaces, which would broadcast.

    Raises:
        ValueError: naming both shapes.
    """
    expected = list(view._preprocess(envoy, Mediator.value(view._location(envoy))).shape)
    if not isinstance(value, torch.Tensor) or list(value.shape) != expected:
        given = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{envoy.path}.{view.name} was given {given}; expected a tensor {axes} = {expected}.")


def editable(value: torch.Tensor) -> torch.Tensor:
    """The tensor that a block may edit in place: the model's own memory, or a copy where the backward pass needs the
    model's unedited (as softmax and the attention kernels do)."""
    return value.clone() if value.requires_grad else value


class CheckedProperty(eproperty):
    """A value of an attention layer that needs something before it can be served, which `prepare` sees to."""

    def prepare(self, attention: Envoy) -> None:
        """Called before the value is read or written."""
        raise NotImplementedError

    def __get__(self, attention: Envoy | None, owner: Any = None) -> Any:
        if attention is not None:
            self.prepare(attention)
        return super().__get__(attention, owner)

    def __set__(self, attention: Envoy, value: Any) -> None:
        self.prepare(attention)
        super().__set__(attention, value)


class EagerProperty(CheckedProperty):
    """A value that exists only under attn_implementation="eager"; elsewhere, asking for it says so."""

    def prepare(self, attention: Envoy) -> None:
        """Refuse other implementations."""
        implementation = network_of(attention).config._attn_implementation
        if implementation != "eager":
            raise ValueError(
                f"{attention.path}.{self.name} is not computed by attn_implementation={implementation!r}; "
                'load the model with attn_implementation="eager".'
            )


class SourceProperty(CheckedProperty):
    """A value inside the module's forward, which nnsight serves once that forward is instrumented."""

    def prepare(self, attention: Envoy) -> None:
        """Instrument the module's forward."""
        install_source(attention)


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Let a model compute its attention eagerly for a while, so that there are patterns to read."""
    configs = {id(module.config): module.config for module in network_of(model).modules() if hasattr(module, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


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
        raise ValueError(
            f"{self.path}.positions can only be read: they follow from the patches that the prompt shows; trace a "
            "prompt with other `visible` and `decoded` patches."
        )


class StreamRows(torch.Tensor):
    """An invoke's rows of a tensor of several streams: a copy, since they are not side by side. What is edited in it is
    put back by `PromptBatcher`; a gradient that is asked of it is that of its rows of the whole tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # operations return plain tensors
    whole: torch.Tensor | None  # as long as gradients come by it
    places: list[tuple[int, int]]

    @classmethod
    def of(cls, whole: torch.Tensor, places: list[tuple[int, int]]) -> StreamRows:
        """The rows at (start, count) of each stream."""
        rows = _take_rows(whole, places).as_subclass(cls)
        rows.whole, rows.places = whole, places
        return rows

    def put_back(self) -> None:
        """Write what was edited into the whole tensor."""
        whole, is_edited = self.whole, self.is_inference() or self._version > 0
        if whole is not None and is_edited:
            _copy_rows(self, whole, self.places)
        if is_edited or whole is None or not whole.requires_grad:
            self.whole = None

    def register_hook(self, hook: Callable[[torch.Tensor], Any]) -> Any:
        """As of any tensor: `hook` is given the gradient, and may return another."""
        if self.whole is None:  # these rows are in the graph themselves
            return super().register_hook(hook)  # type: ignore[no-untyped-call]

        def on_whole(gradient: torch.Tensor) -> torch.Tensor | None:
            rows = _take_rows(gradient, self.places)
            if (changed := hook(rows)) is None or changed is rows:
                return None
            gradient = gradient.clone()
            _copy_rows(changed, gradient, self.places)
            return gradient

        return self.whole.register_hook(on_whole)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


def _take_rows(whole: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([whole.narrow(0, *place) for place in places])


def _copy_rows(rows: torch.Tensor, whole: torch.Tensor, places: list[tuple[int, int]]) -> None:
    for place, part in zip(places, rows.split([count for _, count in places])):
        whole.narrow(0, *place).copy_(part)


class PromptBatcher(Batcher):
    """Rows of invokes are rows of canvases. Patch ids that the batch shares stay whole, also when there are as many as
    rows. Where a stage has two streams, tensors are [stream * batch, …], and inside the attention [stream * batch *
    head, query, key]."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._copies: list[StreamRows] = []

    def narrow(self, value: Any, group: list[int] | None) -> Any:
        """An invoke's rows, with what others have edited in place."""
        self._put_back()
        return super().narrow(value, group)

    def widen(self, full: Any, group: list[int] | None, edited: Any) -> Any:
        """The whole batch with an invoke's rows in it."""
        self._put_back()
        return super().widen(full, group, edited)

    def assemble_skip(self, running: Any) -> Any:
        """The whole batch, which all invokes have skipped or none, when the model goes on."""
        self._put_back()
        whole = super().assemble_skip(running)
        return apply(whole, self._by_stream, torch.Tensor) if whole is not running else whole

    def _put_back(self) -> None:
        copies, self._copies = self._copies, []
        for rows in copies:
            rows.put_back()

    def _by_stream(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows that stand invoke by invoke, with the streams of each below each other, as the network has them."""
        if not (streams := len(self._streams(tensor))):
            return tensor
        rows, sizes = len(tensor) // (streams * self.total), [self.envoy._batch_size(*a, **k) for a, k in self.invokes]
        parts = [part.chunk(streams) for part in tensor.split([rows * streams * size for size in sizes])]
        return torch.cat([part[stream] for stream in range(streams) for part in parts])

    def _narrow_tensor(self, tensor: torch.Tensor, group: list[int]) -> torch.Tensor:
        if _is_shared(tensor):
            return tensor
        if parts := self._streams(tensor):
            (start, size), length = (n * len(parts[0]) // self.total for n in group), len(parts[0])
            places = [(stream * length + start, size) for stream in range(len(parts))]
            if isinstance(tensor, FakeTensor):  # of a scan, which has no values
                return _take_rows(tensor, places)
            self._copies.append(StreamRows.of(tensor, places))
            return self._copies[-1]
        rows = super()._narrow_tensor(tensor, group)
        return Canvases.of(rows, tensor.canvas_layout) if isinstance(tensor, Canvases) else rows

    def _widen_tensor(self, full: torch.Tensor, group: list[int], edited: torch.Tensor) -> torch.Tensor:
        if _is_shared(full):
            return edited
        start, size = group
        if parts := self._streams(full):
            start, size = (n * len(parts[0]) // self.total for n in group)
            pairs = zip(parts, edited.chunk(len(parts)))
            return torch.cat([part for old, new in pairs for part in (old[:start], new, old[start + size :])])
        if len(full) == self.total and edited.is_set_to(full.narrow(0, start, size)):
            return full  # edited in place
        return super()._widen_tensor(full, group, edited)

    def _streams(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The streams of a tensor that has several, or a row for each head; of others none."""
        streams = max((stage.streams for stage in self.envoy.stages), default=1)
        if streams == 1 or tensor.ndim < 3:
            return ()
        rows = self.total * (self.envoy.stages[0].heads if tensor.ndim == 3 else 1)
        number = len(tensor) / rows
        return tensor.chunk(int(number)) if number == streams or (number == 1 and rows > self.total) else ()


def _is_shared(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 1 and tensor.dtype == torch.long


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


class TraceableModel(HuggingFaceModel):
    """nnsight's lazy model of a network: the weights are loaded when a trace first needs them, and until then the
    network is on the meta device.

    What nnsight asks of a family, under names that say it:

    - `empty_network(source, **options)`: the network without weights, `loaded_network(source, **options)`: with them,
      and `ready_network(module, **options)`: that of a ready module;
    - `module_class`: the class of transformers' whose `from_pretrained` reads weights;
    - `count_rows(*inputs, **options)`: rows that an invoke adds to the batch, 0 where it holds options alone;
    - `join_inputs(invokes, method)`: the (inputs, options) of all invokes as the arguments of one forward.
    """

    _batcher_class = PromptBatcher

    @property
    def network(self) -> Any:
        """The torch module that is traced."""
        return network_of(self)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the network once, untraced: the output that `model.trace(...)` calls `model.output`."""
        return self.trace(*inputs, trace=False, **kwargs)

    def trace(self, *inputs: Any, **kwargs: Any) -> Any:
        return super().trace(*inputs, **{"tracer_cls": PromptTracer, **kwargs})

    trace.__doc__ = HuggingFaceModel.trace.__doc__

    def scan(self, *inputs: Any, fn: Any = None, backend: Any = None, **kwargs: Any) -> Any:
        return PromptScan(self, fn or "__call__", *inputs, backend=backend, **kwargs)

    scan.__doc__ = HuggingFaceModel.scan.__doc__

    def interleave(self, fn: Any, *args: Any, batcher: Any = None, **kwargs: Any) -> Any:
        """Run the network with what waits for its values: a tracer's, or none in a call."""
        if method := getattr(fn, "runs", None):  # of `traceable`
            fn = method.__get__(fn.__self__)
        with nullcontext() if batcher is not None else _only_run(self):
            return super().interleave(fn, *args, batcher=batcher, **kwargs)

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

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        return self.count_rows(*inputs, **kwargs)

    def _batch(self, invokes: list[Any], method: Any) -> tuple[Any, dict[str, Any]]:
        return self.join_inputs(invokes, method)


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


# Verbs: functions that a block calls and that run beside it


def projection_of(attention: Envoy) -> Envoy:
    """The module that is given what an attention's `heads` are."""
    name, _, side = type(attention).heads.key.rpartition(".")
    if side != "input":
        raise TypeError(f"{attention.path}.heads are not the input of a module; make them with heads_of.")
    return functools.reduce(getattr, name.split("."), attention)


class CallingBlock:
    """The block of a trace, or the invoke, that calls a verb such as `patch`.

    Args:
        verb: The verb's name.
        model: The model that the verb was given.
        example: What to write, for errors.

    Raises:
        ValueError: outside a block, in the block of another model, or in a loop over the steps of a run.
    """

    def __init__(self, verb: str, model: Any, example: str) -> None:
        self.verb = verb
        try:
            self._mediator = Mediator.current(verb)
        except ValueError as error:
            raise ValueError(f"{verb} is called inside the block of a trace or an invoke: {example}.") from error
        if self._mediator.iteration != 0:
            raise ValueError(
                f'{verb} cannot be called in a loop over steps; write {verb}(…, steps="all") once, above the loop.'
            )
        self._batcher, self._group = self._mediator.interleaver.batcher, self._mediator.batch_group
        traced = self._batcher.envoy
        if not isinstance(model, Envoy) or (model.interleaver, model.path) != (traced.interleaver, traced.path):
            raise ValueError(
                f"{verb} was given a {type(model).__name__} that is not the model of this trace; give the "
                f"{type(traced).__name__} whose block it is called in."
            )

    @property
    def is_edit(self) -> bool:
        """Whether it is stored by `model.edit`, and runs in later traces."""
        return bool(self._mediator.copy)

    @property
    def inputs(self) -> list[tuple[Any, ...]]:
        """The unnamed inputs of the invokes whose rows it sees."""
        start, seen = 0, []
        for inputs, options in self._batcher.invokes:
            if self._group is None or self._group[0] == start:
                seen.append(inputs)
            start += self._batcher.envoy._batch_size(*inputs, **options)
        return seen

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its rows of a tensor of the whole batch."""
        rows: torch.Tensor = self._batcher.narrow(tensor, self._group)
        return rows

    def run(self, function: Callable[[int], None], *, steps: str = "first", whole: bool = False) -> None:
        """Run a function of the step's number in the model's forward. It reads and writes modules in their order, from
        where this is called: it sees what the block did above, and the block sees below what it has done.

        Args:
            function: What to run.
            steps: "first" forward, or "all" that the traced call makes.
            whole: Read the whole batch, not the block's rows alone.

        Raises:
            ValueError: when the model has run past what the function reads first.
        """
        if steps not in ("first", "all"):
            raise ValueError(f"steps={steps!r} is unknown; choose 'first' or 'all'.")
        caller, worker = self._mediator, _Worker(self.verb, function, steps)
        worker.batch_group = None if whole else self._group
        interleaver = caller.interleaver
        interleaver.mediators.insert(interleaver.mediators.index(caller), worker)
        worker.start(interleaver)
        self._serve(worker)
        if worker.pending is not None and caller.occurrence(worker.pending.provider):
            place = worker.place
            interleaver.mediators.remove(worker)
            worker.worker.throw(GreenletExit)
            raise ValueError(
                f"{self.verb} comes too late: the model has run past {place} in this block; write {self.verb}(…) above "
                "the lines that read what comes after it, or in an empty `with tracer.invoke():`."
            )
        if worker.alive:
            worker.worker.parent = caller.worker.parent  # not this block, which has other things to wait for
        interleaver.reindex()

    def _serve(self, worker: _Worker) -> None:
        """Serve what the worker asks for at the place that the model is at, where the block has read already."""
        caller, here = self._mediator, self._mediator.pending
        if here is None or here.provider is None or caller.occurrence(here.provider):
            return
        try:
            caller.batch_group = worker.batch_group
            while (pending := worker.pending) is not None and pending.provider == here.provider:
                if pending.event is Event.VALUE:
                    worker.pending = worker.switch(Mediator.value(here.provider))
                else:
                    Mediator.swap(here.provider, pending.value)
                    worker.pending = worker.switch()
        finally:
            caller.batch_group = self._group


class _Worker(Mediator):
    """What a verb does in a run, served before the block that called it."""

    def __init__(self, verb: str, function: Callable[[int], None], steps: str) -> None:
        super().__init__(None, {}, {})
        self.verb, self.function, self.steps = verb, function, steps

    @property
    def place(self) -> str:
        """What it waits for, as users write it."""
        return str(self.pending.provider).removeprefix("model.")

    def _run(self) -> None:
        step = 0
        try:
            for step in Iterations()[:] if self.steps == "all" else (0,):
                self.function(step)
                self.flush()
        except OutOfOrderError as error:  # the run has ended; a stopped one has no result
            if step == 0 and self.occurrence("result"):
                raise ValueError(f"{self.verb} waited for {self.place}, which the model did not run.") from error


def end_run() -> None:
    """Inside a verb's function: end the model's run here, as `tracer.stop` does."""
    raise EarlyStopException
