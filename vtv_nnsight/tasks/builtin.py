"""The tasks of pictures: VTV's five, the others that VP studies, and pairs of a folder."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageColor, ImageFilter
from torch.nn import functional as F

from vtv_nnsight import metrics
from vtv_nnsight.images import FITS, luma, resize, to_tensor, upright_size
from vtv_nnsight.tasks.base import Place, Row, Task, answer_target
from vtv_nnsight.text import check_choice

PURPLE, YELLOW = "#440154", "#fde725"
"""The colours of VP's other segmentation masks, (68, 1, 84) and (253, 231, 37)."""


@dataclass(frozen=True)
class Identity(Task):
    """Image → image."""


@dataclass(frozen=True)
class Segmentation(Task):
    """Image → mask of the row's class.

    Args:
        foreground, background: Colours of the mask, in any form that PIL knows ("white", "#440154").
        fill: "solid"; "edges" shows the outline of the mask only (VP §4.4).
    """

    foreground: str = "white"
    background: str = "black"
    fill: str = "solid"
    metric = metrics.IOU
    needs = "mask"
    change = "mask"

    def __post_init__(self) -> None:
        check_choice(("solid", "edges"), fill=self.fill)
        for colour in (self.foreground, self.background):
            if not isinstance(colour, str):
                raise ValueError(f"{colour!r} is not a colour; give one as PIL knows it, as 'white' or '#440154'.")
            ImageColor.getrgb(colour)

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor | None:
        """The mask in the colours of the task [3, size, size]; None where the row has no mask."""
        if row.get("mask") is None:
            return None
        size = cell.shape[-1]
        mask = self.mask(row)
        if self.fill == "edges":
            mask = _outline(resize(mask, size, self.fit))
        colours = Image.new("RGB", mask.size, self.background)
        colours.paste(self.foreground, mask=mask)
        return to_tensor(resize(colours, size, self.fit))

    def mask(self, row: Row) -> Image.Image:
        """The mask of a row that has one, PIL "L" of its image's size, 0 or 255.

        Raises:
            ValueError: when it has no foreground, or another size than the image.

        Warns:
            UserWarning: when its edges are soft, and are taken at half.
        """
        mask: Image.Image = row["mask"].convert("L")
        values = np.asarray(mask)
        size = upright_size(row["image"])
        if mask.size != size:
            raise ValueError(f"a mask of {mask.size} pixels belongs to an upright image of {size}; give equal sizes.")
        if (high := values.max()) < 128:
            raise ValueError(f"a mask holds no value above {high}; give one with foreground (255), or leave it out.")
        if ((values > 0) & (values < 255)).any():
            warnings.warn("a mask holds greys between 0 and 255; it is taken at half.", stacklevel=2)
        return mask.point(lambda value: 255 * (value > 127))

    @property
    def colours(self) -> tuple[metrics.Colour, metrics.Colour]:
        """Foreground and background as RGB, 0 to 255."""
        return ImageColor.getrgb(self.foreground)[:3], ImageColor.getrgb(self.background)[:3]

    def score(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The IoU of the two foregrounds: [batch]."""
        return metrics.iou(prediction, target, *self.colours)


@dataclass(frozen=True)
class Detection(Segmentation):
    """Image → the filled box around the mask; an answer is squared off before it is scored (VP §4.2).

    Args:
        fit: How pictures and masks are resized: "bicubic", or "bilinear" as in VP's released code of this study.
    """

    fit: str = "bicubic"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(FITS, fit=self.fit)

    def mask(self, row: Row) -> Image.Image:
        """The filled box around the mask of a row that has one, PIL "L", 0 or 255."""
        mask = super().mask(row)
        mask.paste(255, mask.getbbox())
        return mask

    def score(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The IoU of the target and the answer, squared off: [batch]."""
        return super().score(metrics.squared_off(prediction, *self.colours), target)


@dataclass(frozen=True)
class Edges(Task):
    """Image → its edges, white on black: Sobel's gradient of the luma, in steps of 1/255."""

    def target(self, row: Row, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        """The edges of the clean cell: [3, size, size]."""
        across = cell.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
        kernels = rearrange([across, across.T], "k h w -> k 1 h w")
        gradient = F.conv2d(F.pad(luma(cell)[None, None], (1, 1, 1, 1), mode="replicate"), kernels)[0]
        magnitude = gradient.square().sum(0).sqrt().clamp(max=1)
        return magnitude.mul(255).round().div(255).expand(3, -1, -1)


@dataclass(frozen=True)
class Lowlight(Task):
    """Darkened image → image.

    Args:
        brightness: What is left of the light.
    """

    brightness: float = 0.5
    change = "light"

    def __post_init__(self) -> None:
        if not isinstance(self.brightness, Real) or not 0 <= self.brightness <= 1:
            raise ValueError(f"brightness={self.brightness!r} is not a share of the light; give a number from 0 to 1.")

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        """The darkened cell: [3, size, size]."""
        return self.brightness * cell


@dataclass(frozen=True)
class Inpainting(Task):
    """Image with a black square, a quarter of its side → image.

    Args:
        position: "random" draws a place for each prompt, the same in example and query; "center".
    """

    position: str = "random"
    change = "hole"

    def __post_init__(self) -> None:
        check_choice(("random", "center"), position=self.position)

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        """The cell with a black square, or a picture of any size with its like: [3, height, width]."""
        cell = cell.clone()
        rows, columns = (_quarter(size, self.position, at) for size, at in zip(cell.shape[1:], place))
        cell[:, rows, columns] = 0
        return cell


@dataclass(frozen=True)
class Colorization(Task):
    """Luma of the image (ITU-R 601-2, as PIL's "L") in three channels → image.

    Args:
        metric: A `Metric` or its name: "mse", "lpips" (an optional package; see `metrics.lpips`), ….
        fit: "bicubic" resizes pictures, as VTV does; "crop" takes their middle, not resized, as VP does.
    """

    metric: metrics.Metric | str = metrics.MSE  # type: ignore[assignment]
    fit: str = "bicubic"
    change = "colour"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice((*FITS, "crop"), fit=self.fit)

    def corrupt(self, cell: torch.Tensor, place: Place) -> torch.Tensor:
        """The luma of the cell: [3, size, size]."""
        return luma(cell).expand(3, -1, -1)


@dataclass(frozen=True)
class Pairs(Task):
    """Image → the row's answer, whatever that is; `data.pairs` reads a folder of them.

    Args:
        metric: A `Metric` or its name: "mse", "iou" (white on black), "lpips", ….
    """

    metric: metrics.Metric | str = metrics.MSE  # type: ignore[assignment]
    needs = "answer"
    target = answer_target


segmentation = Segmentation()
lowlight = Lowlight()
identity = Identity()
inpainting = Inpainting()
colorization = Colorization()
detection = Detection()
edges = Edges()
pairs = Pairs()

VTV = (segmentation, lowlight, identity, inpainting, colorization)
"""The five tasks of VTV."""


def _quarter(size: int, position: str, at: float) -> slice:
    """A quarter of a side, in its middle or at a random place."""
    side = size // 4
    start = (size - side) // 2 if position == "center" else int(at * (size - side + 1))
    return slice(start, start + side)


def _outline(mask: Image.Image) -> Image.Image:
    """The edge of a mask, PIL "L", a thirtieth of its side thick."""
    mask = mask.point(lambda value: 255 * (value > 127))
    thick = 2 * max(1, round(mask.width / 60)) + 1
    inner = np.asarray(mask.filter(ImageFilter.MinFilter(thick)))
    return Image.fromarray(np.where(inner == 0, np.asarray(mask), np.uint8(0)))
