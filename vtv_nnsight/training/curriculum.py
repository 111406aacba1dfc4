"""What MAE-VQGAN learns from: pairs of a corruption of the input and a target, drawn apart.

Were only low-light prompts dark, a model would brighten whatever is dark and never look at the example. So every input
meets every target, a dark query must sometimes stay dark, and the commonest answer (the inverse mask) is the answer of
none of the papers' tasks: what a query wants can be read off its example only. The more there are of both, the more the
example is read.

`HELD_OUT` are tasks that training never shows: two of the papers' sums, whose parts are known, and two new targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum
from torch.nn import functional as F

from vtv_nnsight import tasks
from vtv_nnsight.images import luma
from vtv_nnsight.tasks import Place, Row, Segmentation, Task


@dataclass(frozen=True)
class Hole(Task):
    """Image with a grey square, not the papers' in size or in tone → image."""

    share: float
    level: float = 0.0

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        size = cell.shape[-1]
        side = round(self.share * size)
        top, left = (int(p * (size - side + 1)) for p in place)
        cell = cell.clone()
        cell[:, top : top + side, left : left + side] = self.level
        return cell


@dataclass(frozen=True)
class Noisy(Task):
    """Image with Gaussian noise → image. The noise is a function of the picture and the place."""

    strength: float

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        seed = hash((*place, float(cell.double().mean()))) % 2**31
        noise = torch.randn(cell.shape, generator=torch.Generator().manual_seed(seed))
        return (cell + self.strength * noise).clamp(0, 1)


@dataclass(frozen=True)
class Pixelated(Task):
    """Image in coarse blocks → image."""

    factor: int = 4

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        size = cell.shape[-1]
        coarse = F.interpolate(cell[None], size=-(-size // self.factor), mode="area")
        return F.interpolate(coarse, size=size, mode="nearest")[0]


@dataclass(frozen=True)
class Faded(Task):
    """Image of little contrast → image."""

    contrast: float = 0.35

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        return 0.5 + self.contrast * (cell - 0.5)


@dataclass(frozen=True)
class Inverted(Task):
    """Negative → image."""

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        return 1 - cell


@dataclass(frozen=True)
class Mixed(Task):
    """Image with red, green and blue in other places → image."""

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        return cell.roll(-1, 0)


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
    """The input as it is."""

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        return corrupted


@dataclass(frozen=True)
class Negative(Task):
    """One minus the image."""

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        return 1 - cell


@dataclass(frozen=True)
class Swapped(Task):
    """Red, green and blue in another order."""

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        return cell.roll(1, 0)


@dataclass(frozen=True)
class Mirrored(Task):
    """Left for right."""

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        return cell.flip(2)


@dataclass(frozen=True)
class UpsideDown(Task):
    """Top for bottom."""

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        return cell.flip(1)


@dataclass(frozen=True)
class Luminance(Task):
    """White where the image is brighter than its median, black elsewhere; or the inverse."""

    inverse: bool = False

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        luma = cell.mean(0, keepdim=True)
        return ((luma > luma.median()) ^ self.inverse).to(cell.dtype).expand(3, -1, -1)


@dataclass(frozen=True)
class Turned(Task):
    """A quarter turn to the left, as many times."""

    quarters: int

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        return cell.rot90(self.quarters, (1, 2))


@dataclass(frozen=True)
class Hue(Task):
    """Colours turned about the grey axis."""

    degrees: float

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        angle = np.deg2rad(self.degrees)
        along, across = (1 - np.cos(angle)) / 3, np.sin(angle) / 3**0.5
        turn = cell.new_tensor([[along, along - across, along + across]] * 3)
        turn = torch.stack([row.roll(i) for i, row in enumerate(turn)]) + np.cos(angle) * torch.eye(3)
        return einsum(turn, cell, "to of, of h w -> to h w").clamp(0, 1)


@dataclass(frozen=True)
class Grey(Task):
    """The image's luma."""

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        return luma(cell).expand(3, -1, -1)


@dataclass(frozen=True)
class Relit(Task):
    """The image in another light: value to the power of gamma."""

    gamma: float

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        return cell**self.gamma


@dataclass(frozen=True)
class Posterised(Task):
    """The image in a few tones a channel."""

    tones: int = 3

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        return (cell * self.tones).floor().clamp(max=self.tones - 1) / (self.tones - 1)


@dataclass(frozen=True)
class Enlarged(Task):
    """The middle of the image, twice as large."""

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        size, edge = cell.shape[-1], cell.shape[-1] // 4
        middle = cell[None, :, edge : size - edge, edge : size - edge]
        return F.interpolate(middle, size=size, mode="bicubic")[0].clamp(0, 1)


@dataclass(frozen=True)
class Matte(Task):
    """The object alone, its ground painted over."""

    ground: float = 1.0
    needs = "mask"

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor | None:
        alpha = tasks.segmentation.target(row, cell, corrupted)
        return None if alpha is None else alpha * cell + (1 - alpha) * self.ground


INVERSE_MASK = Segmentation("black", "white")
PURPLE_MASK = Segmentation(tasks.YELLOW, tasks.PURPLE)

CORRUPTIONS: dict[Task, float] = {
    tasks.identity: 0.36,
    tasks.lowlight: 0.14,
    tasks.inpainting: 0.14,
    tasks.colorization: 0.14,
    tasks.colorization + tasks.lowlight: 0.03,
    tasks.colorization + tasks.inpainting: 0.03,
    Hole(0.33): 0.03,
    Hole(0.25, level=0.5): 0.02,
    Hole(0.40, level=1.0): 0.02,
    tasks.Lowlight(0.3): 0.02,
    tasks.Lowlight(0.7): 0.02,
    Blurring(): 0.03,
    Blurring(3): 0.02,
    Noisy(0.1): 0.02,
    Noisy(0.25): 0.02,
    Pixelated(): 0.02,
    Faded(): 0.02,
    Inverted(): 0.02,
    Mixed(): 0.02,
}
"""How often each corruption of the input is drawn; the identity leaves it clean."""

TARGETS: dict[Task, float] = {
    tasks.identity: 0.22,
    INVERSE_MASK: 0.25,
    tasks.segmentation: 0.14,
    Segmentation("red", "black"): 0.01,
    Segmentation("lime", "navy"): 0.01,
    Segmentation("white", "maroon"): 0.01,
    Segmentation("blue", "white"): 0.01,
    Segmentation("teal", "orange"): 0.01,
    Segmentation(fill="edges"): 0.01,
    tasks.detection: 0.01,
    tasks.edges: 0.02,
    Matte(): 0.02,
    Matte(0.0): 0.01,
    Copy(): 0.06,
    Negative(): 0.04,
    Swapped(): 0.03,
    Mirrored(): 0.03,
    Turned(1): 0.01,
    Turned(2): 0.01,
    Turned(3): 0.01,
    Hue(60): 0.01,
    Hue(180): 0.01,
    Grey(): 0.02,
    Relit(0.5): 0.01,
    Relit(2.0): 0.01,
    Posterised(): 0.01,
    Enlarged(): 0.02,
}
"""How often each target is drawn for a picture with a mask; the identity wants the clean image."""

MASKLESS: dict[Task, Task] = {
    **{target: tasks.identity for target in TARGETS if target.needs == "mask"},
    tasks.segmentation: Luminance(),
    INVERSE_MASK: Luminance(inverse=True),
}
"""What stands for a target of masks where a picture has none."""

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
        if not copied_clean and not is_held_out(task):
            return task


def is_held_out(task: Task) -> bool:
    """Whether a task asks for one of `HELD_OUT`; a square of any kind counts as inpainting's, any dark as lowlight."""
    parts = {_papers(part) for part in _parts(task)}
    return any(parts >= set(_parts(held)) for held in HELD_OUT)


def _papers(part: Task) -> Task:
    """The papers' task that a part is a variant of, or the part."""
    if isinstance(part, Hole):
        return tasks.inpainting
    return tasks.lowlight if isinstance(part, tasks.Lowlight) else part


def _draw(weights: dict[Task, float], generator: np.random.Generator) -> Task:
    options, p = list(weights), np.array(list(weights.values()))
    return options[generator.choice(len(options), p=p / p.sum())]


def _parts(task: Task) -> tuple[Task, ...]:
    return task.parts if isinstance(task, tasks.Sum) else (task,)
