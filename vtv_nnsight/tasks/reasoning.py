"""VP's reasoning study (§4.3): a figure is changed in colour, shape or size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtv_nnsight import metrics
from vtv_nnsight.tasks.base import Task, answer_target

GREEN, BLUE = (0, 255, 0), (0, 0, 255)
"""The colours of VP's reasoning study."""
_PALETTES = {
    ("color",): (BLUE, GREEN, metrics.WHITE),
    ("shape",): (GREEN, metrics.WHITE),
    ("size",): (BLUE, GREEN, metrics.WHITE),
    ("color", "shape"): (GREEN, BLUE, metrics.WHITE),
    ("color", "size"): (GREEN, BLUE, metrics.WHITE),
    ("shape", "size"): (GREEN, metrics.WHITE),
}
"""The colours that the reasoning study (released code) allows an answer's pixels, nearest first on a tie."""


@dataclass(frozen=True)
class Reasoning(Task):
    """A green circle on white → the same, changed (VP §4.3). `data.reasoning` draws the rows; `+` joins changes:

        >>> (tasks.color + tasks.shape).name
        'color+shape'

    An answer is scored by its colour-aware IoU: every pixel goes to the nearest of black and the colours that the
    study allows its answers. The study's other measures are metrics, too: `metrics.COLOR_BLIND_IOU`, of all that is
    not white, and `metrics.SHAPE_ACCURACY`. Cells are bilinear, as in its released code.

    Args:
        changes: Some of "color" (to blue), "shape" (to a rectangle) and "size" (to a radius of 20 from 30).
        metric: `metrics.IOU`, or one of the two others, or their names.
    """

    changes: tuple[str, ...]
    metric: metrics.Metric | str = metrics.IOU  # type: ignore[assignment]
    needs = "answer"
    fit = "bilinear"
    target = answer_target

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "changes", tuple(sorted(set(self.changes))))
        if self.changes not in _PALETTES:
            known = ", ".join("+".join(changes) for changes in _PALETTES)
            raise ValueError(f"{'+'.join(self.changes) or 'nothing'!r} is not among the reasoning tasks: {known}.")

    @property
    def name(self) -> str:
        """The changes, joined by "+"."""
        return "+".join(self.changes)

    @property
    def palette(self) -> tuple[metrics.Colour, ...]:
        """The colours that pixels go to, nearest first on a tie."""
        return (*_PALETTES[self.changes], metrics.BLACK)

    def _merge(self, other: Task) -> Task | None:
        return Reasoning(self.changes + other.changes) if isinstance(other, Reasoning) else None

    def score(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The colour-aware IoU, or the other metric of pixels that went to the palette: [batch]."""
        if self.metric != metrics.IOU:
            return super().score(metrics.rounded(prediction, self.palette), metrics.rounded(target, self.palette))
        foreground = BLUE if "color" in self.changes else GREEN
        return metrics.colour_iou(prediction, target, foreground, self.palette)


color = Reasoning(("color",))
shape = Reasoning(("shape",))
size = Reasoning(("size",))

REASONING = (color, shape, size, color + shape, color + size, shape + size)
"""VP's reasoning study: three changes and their pairs."""
