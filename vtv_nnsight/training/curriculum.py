"""What MAE-VQGAN learns from: pairs of a corruption of the input and a target, drawn apart.

Were only low-light prompts dark, a model would brighten whatever is dark and never look at the example. So every input
meets every target, a dark query must sometimes stay dark, and the commonest answer (the inverse mask) is the answer of
none of the papers' tasks: what a query wants can be read off its example only. The more there are of both, the more the
example is read.

`HELD_OUT` are tasks that training never shows: two of the papers' sums of known parts, and two new targets.
"""

from __future__ import annotations

from collections.abc import Callable
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
        """The cell with a square of one tone: [3, size, size]."""
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
        """The cell with noise: [3, size, size]."""
        seed = hash((*place, float(cell.double().mean()))) % 2**31
        noise = torch.randn(cell.shape, generator=torch.Generator().manual_seed(seed))
        return (cell + self.strength * noise).clamp(0, 1)


@dataclass(frozen=True)
class Copy(Task):
    """The input as it is."""

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        """The corrupted cell: [3, size, size]."""
        return corrupted


@dataclass(frozen=True)
class Matte(Task):
    """The object alone, its ground painted over."""

    ground: float = 1.0
    needs = "mask"

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor | None:
        """The cell where the mask is white, `ground` elsewhere: [3, size, size]; None where there is no mask."""
        alpha = tasks.segmentation.target(row, cell, corrupted)
        return None if alpha is None else alpha * cell + (1 - alpha) * self.ground


@dataclass(frozen=True)
class Change(Task):
    """What is common to `Corruption` and `Target`: a function of the cell, and a number where it takes one."""

    kind: str
    amount: float | None = None

    @property
    def name(self) -> str:
        """The kind, and the number in brackets."""
        return self.kind if self.amount is None else f"{self.kind}({self.amount:g})"


@dataclass(frozen=True)
class Corruption(Change):
    """What one of `CORRUPTING` leaves of the image → image."""

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        """The cell as the function leaves it: [3, size, size]."""
        return CORRUPTING[self.kind](cell, self.amount)


@dataclass(frozen=True)
class Target(Change):
    """Image → what one of `CHANGING` makes of it."""

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        """The clean cell as the function changes it: [3, size, size]."""
        return CHANGING[self.kind](cell, self.amount)


def _coarse(cell: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """A cell without the detail that `size` pixels cannot hold."""
    return F.interpolate(F.interpolate(cell[None], size=size, mode="area"), size=cell.shape[-1], mode=mode)[0]


def _turn_hue(cell: torch.Tensor, degrees: float) -> torch.Tensor:
    """Colours turned about the grey axis."""
    angle = np.deg2rad(degrees)
    along, across = (1 - np.cos(angle)) / 3, np.sin(angle) / 3**0.5
    turn = cell.new_tensor([[along, along - across, along + across]] * 3)
    turn = torch.stack([row.roll(i) for i, row in enumerate(turn)]) + np.cos(angle) * torch.eye(3)
    return einsum(turn, cell, "to of, of h w -> to h w").clamp(0, 1)


def _brighter_than_median(cell: torch.Tensor, inverse: float) -> torch.Tensor:
    """White where the image is brighter than its median, black elsewhere; or the inverse."""
    grey = cell.mean(0, keepdim=True)
    return ((grey > grey.median()) ^ bool(inverse)).to(cell.dtype).expand(3, -1, -1)


def _enlarge(cell: torch.Tensor, _: float | None) -> torch.Tensor:
    """The middle of the image, twice as large."""
    size, edge = cell.shape[-1], cell.shape[-1] // 4
    middle = cell[None, :, edge : size - edge, edge : size - edge]
    return F.interpolate(middle, size=size, mode="bicubic")[0].clamp(0, 1)


CORRUPTING: dict[str, Callable[..., torch.Tensor]] = {
    "blurring": lambda cell, factor: _coarse(cell, cell.shape[-1] // factor, "bilinear").clamp(0, 1),
    "pixelated": lambda cell, factor: _coarse(cell, -(-cell.shape[-1] // factor), "nearest"),
    "faded": lambda cell, contrast: 0.5 + contrast * (cell - 0.5),
    "inverted": lambda cell, _: 1 - cell,
    "mixed": lambda cell, _: cell.roll(-1, 0),  # red, green and blue change places
}
"""A cell [3, size, size] and a number → what is left of it."""

CHANGING: dict[str, Callable[..., torch.Tensor]] = {
    "negative": lambda cell, _: 1 - cell,
    "swapped": lambda cell, _: cell.roll(1, 0),  # red, green and blue in another order
    "mirrored": lambda cell, _: cell.flip(2),
    "upsidedown": lambda cell, _: cell.flip(1),
    "luminance": _brighter_than_median,
    "turned": lambda cell, quarters: cell.rot90(quarters, (1, 2)),  # to the left
    "hue": _turn_hue,
    "grey": lambda cell, _: luma(cell).expand(3, -1, -1),
    "relit": lambda cell, gamma: cell**gamma,
    "posterised": lambda cell, tones: (cell * tones).floor().clamp(max=tones - 1) / (tones - 1),
    "enlarged": _enlarge,
}
"""A clean cell [3, size, size] and a number → what is wanted."""

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
    Corruption("blurring", 5): 0.03,
    Corruption("blurring", 3): 0.02,
    Noisy(0.1): 0.02,
    Noisy(0.25): 0.02,
    Corruption("pixelated", 4): 0.02,
    Corruption("faded", 0.35): 0.02,
    Corruption("inverted"): 0.02,
    Corruption("mixed"): 0.02,
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
    Target("negative"): 0.04,
    Target("swapped"): 0.03,
    Target("mirrored"): 0.03,
    Target("turned", 1): 0.01,
    Target("turned", 2): 0.01,
    Target("turned", 3): 0.01,
    Target("hue", 60): 0.01,
    Target("hue", 180): 0.01,
    Target("grey"): 0.02,
    Target("relit", 0.5): 0.01,
    Target("relit", 2.0): 0.01,
    Target("posterised", 3): 0.01,
    Target("enlarged"): 0.02,
}
"""How often each target is drawn for a picture with a mask; the identity wants the clean image."""

MASKLESS: dict[Task, Task] = {
    **{target: tasks.identity for target in TARGETS if target.needs == "mask"},
    tasks.segmentation: Target("luminance", 0),
    INVERSE_MASK: Target("luminance", 1),
}
"""What stands for a target of masks where a picture has none."""

HELD_OUT: tuple[Task, ...] = (
    tasks.inpainting + tasks.lowlight,
    tasks.segmentation + tasks.inpainting,
    PURPLE_MASK,
    Target("upsidedown"),
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
