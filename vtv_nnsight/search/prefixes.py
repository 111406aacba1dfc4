"""What layers leave before the first that a set patches, computed once a prompt and kept: evaluations start there.

At a few layers of a model, sets that patch nothing before, or the same as others that are asked with them, share what
the layers before have computed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from vtv_nnsight.models.inside_trace import first
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.patching.forward import give_like

MEMORY = 256 * 2**20
"""Bytes that are kept at most; what was not asked for longest goes first."""
AGREE = 8
"""More sets than these have to patch the same for it to be kept: it is computed for a chunk of prompts."""
Start = tuple[int, bytes]
"""A number of layers that are left out, and what is patched in them."""


class Prefixes:
    """What is kept for one objective.

    Args:
        model: The model; where its `reread` says nothing, it is always run whole.
        space: The units.
        compute: Given layers, a set of units and numbers of prompts, what these layers leave, [stream, prompt, ...]
            each. (Prompts of a chunk are computed together, so that no value depends on what was asked before.)
        chunks: Numbers of prompts that are computed together.
    """

    def __init__(
        self,
        model: InContextModel,
        space: PatchSpace,
        compute: Callable[[list[int], torch.Tensor, torch.Tensor], list[Any]],
        chunks: Sequence[torch.Tensor],
    ) -> None:
        self.compute, self.chunks = compute, chunks
        self.place_of = {row: (i, k) for i, part in enumerate(self.chunks) for k, row in enumerate(part.tolist())}
        self.reread = model.reread
        ends = list(accumulate(stage.layers for stage in model.stages))
        first = dict(zip((stage.name for stage in model.stages), [0, *ends]))
        cuts = {*first.values(), *range(0, ends[-1], -(-ends[-1] // 4))} - {0} if self.reread is not None else set()
        self.layer = torch.tensor([first[stage.name] for stage in space.stages])[space.units.stage] + space.units.layer
        self.order = self.layer.argsort(stable=True)
        self.before = {cut: int((self.layer < cut).sum()) for cut in sorted(cuts, reverse=True)}
        self.kept: OrderedDict[tuple[Start, int], dict[int, Any]] = OrderedDict()

    def shared(self, sets: torch.Tensor) -> set[Start]:
        """What many of these sets [set, unit] have in common."""
        if not self.before or sets.is_floating_point():
            return set()
        counts = Counter(start for units in self._ordered(sets) for start in self._starts(units))
        return {start for start, count in counts.items() if count > AGREE}

    def left(self, choices: torch.Tensor, rows: torch.Tensor, shared: set[Start]) -> dict[int, Any]:
        """What layers leave that the evaluations of a batch need not run (see `forward.start_from`).

        Args:
            choices: Bool [row, unit].
            rows: Numbers of prompts [row].
            shared: What `shared` gave of the sets that are asked together.
        """
        starts = [self._starts(units) for units in self._ordered(choices)] if self.before else []
        for number in range(len(self.before)):
            if all(b"\1" not in own[number][1] or own[number] in shared for own in starts):
                parts = [self._at(own[number], units, int(row)) for own, units, row in zip(starts, choices, rows)]
                return {
                    n: give_like(raw, torch.stack([first(part[n]) for part in parts], 1)) for n, raw in parts[0].items()
                }
        return {}

    def _at(self, start: Start, units: torch.Tensor, row: int) -> dict[int, Any]:
        """What the layers before a start leave of one prompt: [stream, ...] each."""
        chunk, place = self.place_of[row]
        if (start, chunk) not in self.kept:
            cut = start[0]
            layers = sorted({cut - 1, *(layer for layer in self.reread or () if layer < cut)})
            values = self.compute(layers, units & (self.layer < cut), self.chunks[chunk])
            self.kept[start, chunk] = dict(zip(layers, values))
            while len(self.kept) > 1 and self._bytes() > MEMORY:
                self.kept.popitem(last=False)
        self.kept.move_to_end((start, chunk))
        return {n: give_like(raw, first(raw)[:, place]) for n, raw in self.kept[start, chunk].items()}

    def _bytes(self) -> int:
        return sum(first(raw).nbytes for values in self.kept.values() for raw in values.values())

    def _ordered(self, sets: torch.Tensor) -> list[bytes]:
        """The units of each set, layer by layer."""
        return [units.tobytes() for units in sets[:, self.order].cpu().numpy()]

    def _starts(self, units: bytes) -> list[Start]:
        """At each layer where an evaluation may start, the last first, what is patched before."""
        return [(cut, units[:count]) for cut, count in self.before.items()]
