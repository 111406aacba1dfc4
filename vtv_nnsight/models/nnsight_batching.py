"""How nnsight cuts a batch into the rows of its invokes: for `nnsight_compat`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nnsight.intervention.batching import Batcher
from nnsight.util import apply
from torch._subclasses.fake_tensor import FakeTensor

from vtv_nnsight.prompts import Canvases


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

        return self.whole.register_hook(on_whole)

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
