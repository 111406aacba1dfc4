"""How nnsight cuts a batch into the rows of its invokes: for `nnsight_compat`."""

from __future__ import annotations

from typing import Any

import torch
from nnsight.intervention.batching import Batcher

from vtv_nnsight.prompts import Canvases


class PromptBatcher(Batcher):
    """Rows of invokes are rows of canvases. Patch ids that the batch shares stay whole, also when there are as many as
    rows. Where a stage has two streams, tensors are [batch * stream, …], and inside the attention [batch * stream *
    head, query, key]."""

    def _narrow_tensor(self, tensor: torch.Tensor, group: list[int]) -> torch.Tensor:
        if not (rows := self._rows_each(tensor)):
            return tensor
        start, size = (rows * n for n in group)
        view: Any = tensor.narrow(0, start, size)
        if isinstance(tensor, Canvases):
            return Canvases.of(view, tensor.canvas_layout)
        view._nnsight_batch = True  # by which nnsight knows that its gradient comes by the whole tensor
        return view

    def _widen_tensor(self, full: torch.Tensor, group: list[int], edited: torch.Tensor) -> torch.Tensor:
        if not (rows := self._rows_each(full)):
            return edited
        start, size = (rows * n for n in group)
        if edited.is_set_to(full.narrow(0, start, size)):
            return full  # edited in place
        return torch.cat([full[:start], edited, full[start + size :]])

    def _rows_each(self, tensor: torch.Tensor) -> int:
        """The rows that a tensor has for each canvas: one, or one for each stream, head or both; 0 of what is not of
        the batch."""
        if tensor.ndim == 0 or (tensor.ndim == 1 and tensor.dtype == torch.long):
            return 0
        counts = {1}
        if (streams := max((stage.streams for stage in self.envoy.stages), default=1)) > 1 and tensor.ndim > 2:
            heads = self.envoy.stages[0].heads
            counts |= {heads, streams * heads} if tensor.ndim == 3 else {streams}
        rows, rest = divmod(len(tensor), self.total)
        return rows if rows in counts and not rest else 0
