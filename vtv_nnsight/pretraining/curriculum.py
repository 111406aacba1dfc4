"""What MAE-VQGAN is shown in training: pairs of a corruption of the input and a target, drawn apart.

Were only low-light prompts dark, a model would brighten whatever is dark and never look at the example. So every input
meets every target, a dark query must sometimes stay dark, and the commonest answer (the inverse mask) is the answer of
none of the papers' tasks: what a query wants can be read off its example only.

`HELD_OUT` are tasks that training never shows: two of the papers' sums, whose parts are known, and two new targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from vtv_nnsight import tasks
from vtv_nnsight.tasks import Place, Row, Segmentation, Task


@dataclass(frozen=True)
class Blurring(Task):
    """Image without detail → image."""

    factor: int = 5

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        size = cell.shape[-1]
        coarse = F.interpolate(cell[None], size=size // self.factor, mode="area")
        return F.interpolate(coarse, size=size, mode="bilinear")[0].clamp(0, 1)


@dataclass(frozen=True)
class Copy(Task):
    """The input as shown."""

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        return shown


@dataclass(frozen=True)
class Negative(Task):
    """One minus the image."""

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        return 1 - cell


@dataclass(frozen=True)
class Swapped(Task):
    """Red, green and blue in another order."""

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        return cell.roll(1, 0)


@dataclass(frozen=True)
class Mirrored(Task):
    """Left for right."""

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        return cell.flip(2)


@dataclass(frozen=True)
class UpsideDown(Task):
    """Top for bottom."""

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        return cell.flip(1)


@dataclass(frozen=True)
class Luminance(Task):
    """White where the image is brighter than its median, black elsewhere; or the inverse."""

    inverse: bool = False

    def target(self, row: Row, cell: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        luma = cell.mean(0, keepdim=True)
        return ((luma > luma.median()) ^ self.inverse).to(cell.dtype).expand(3, -1, -1)


INVERSE_MASK = Segmentation("black", "white")
PURPLE_MASK = Segmentation(tasks.YELLOW, tasks.PURPLE)

CORRUPTIONS: dict[Task, float] = {
    tasks.identity: 0.30,
    tasks.lowlight: 0.18,
    tasks.inpainting: 0.18,
    tasks.colorization: 0.18,
    Blurring(): 0.08,
    tasks.colorization + tasks.lowlight: 0.04,
    tasks.colorization + tasks.inpainting: 0.04,
}
"""How often each corruption of the input is drawn; the identity leaves it clean."""

TARGETS: dict[Task, float] = {
    tasks.identity: 0.20,
    Copy(): 0.10,
    tasks.segmentation: 0.22,
    INVERSE_MASK: 0.26,
    Negative(): 0.10,
    Swapped(): 0.06,
    Mirrored(): 0.06,
}
"""How often each target is drawn for a picture with a mask; the identity wants the clean image."""

MASKLESS = {tasks.segmentation: Luminance(), INVERSE_MASK: Luminance(inverse=True)}
"""What stands for a mask where a picture has none."""

HELD_OUT: tuple[Task, ...] = (
    tasks.inpainting + tasks.lowlight,
    tasks.segmentation + tasks.inpainting,
    PURPLE_MASK,
    UpsideDown(),
)
"""Tasks that training never shows."""


def draw_task(generator: np.random.Generator, masks: bool) -> Task:
    """A corruption and a target, drawn independently; again where the sum is held out, or is a mere copy twice."""
    while True:
        corruption = _draw(CORRUPTIONS, generator)
        target = _draw(TARGETS, generator)
        if not masks:
            target = MASKLESS.get(target, target)
        task = corruption + target
        copied_clean = corruption == tasks.identity and isinstance(target, Copy)
        if not copied_clean and not any(set(task.parts) >= set(_parts(held)) for held in HELD_OUT):
            return task


def _draw(weights: dict[Task, float], generator: np.random.Generator) -> Task:
    options, p = list(weights), np.array(list(weights.values()))
    return options[generator.choice(len(options), p=p / p.sum())]


def _parts(task: Task) -> tuple[Task, ...]:
    return task.parts if isinstance(task, tasks.Sum) else (task,)
