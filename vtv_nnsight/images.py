"""Pictures as people have them, to tensors and back; and a model's answer carried over to a photograph."""

from __future__ import annotations

import io
import os
import warnings
from typing import Any, BinaryIO

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from scipy.ndimage import uniform_filter
from torch.nn import functional as F

from vtv_nnsight.digests import bytes_digest, tensor_bytes
from vtv_nnsight.files import check_file
from vtv_nnsight.text import check_choice

MIN_SIDE = 8
"""Pictures with a side of fewer pixels than this are refused."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue in [0, 1]: how both papers' models normalise pixels, and what their MSE is measured in."""
LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601-2: the shares of red, green and blue in a colour's lightness."""


def open_picture(image: Image.Image | str | os.PathLike[str]) -> Image.Image:
    """A PIL image as it is, or the picture in a file (see `read_picture`).

    Raises:
        FileNotFoundError, ValueError: as `read_picture`.
        TypeError: when it is neither a PIL image nor a path.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_picture(os.path.expanduser(image))
    if not isinstance(image, Image.Image):
        raise TypeError(f"an image of type {type(image).__name__} was given; expected a PIL image or a picture's path.")
    return image


def read_picture(file: str | os.PathLike[str] | BinaryIO, name: str = "") -> Image.Image:
    """A picture file of anyone's, decoded: what is no picture, damaged or enormous is refused.

    Args:
        file: A path, or an open file.
        name: What it is called in messages; its path by default.

    Raises:
        FileNotFoundError, ValueError: in one sentence that names the file.
    """
    name = name or str(file)
    file = check_file(file) if isinstance(file, (str, os.PathLike)) else file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file)
            _load(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as a picture: {str(error).rstrip('.')}.") from error
    return image


def as_rgb(image: Image.Image | str | os.PathLike[str]) -> Image.Image:
    """A picture of any mode as RGB: turned upright (EXIF), transparency on white, 16 bits and floats scaled to 8 bits.

    Raises:
        FileNotFoundError, TypeError: as `open_picture`.
        ValueError: when it is smaller than `MIN_SIDE` pixels on a side, cannot be decoded, or holds numbers of which it
            cannot be told what is white.
    """
    image = open_picture(image)
    if min(image.size) < MIN_SIDE:
        width, height = image.size
        raise ValueError(f"the image is {width}x{height} pixels; expected at least {MIN_SIDE} on a side.")
    try:
        _load(image)
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the image {getattr(image, 'filename', '')!r} cannot be decoded: {error}") from error
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_as_bytes(np.asarray(image, dtype=np.float64), image.mode))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


_UNTOLD = "of which it cannot be told what is white; scale it so that white is {} and save it again"


def _load(image: Image.Image) -> None:
    """Decode a picture. Of colours of 16 bits PIL keeps the upper 8, which leave nothing of a file of 12.

    Raises:
        ValueError: when the colours use less than half of their 16 bits.
    """
    is_deep = ";16" in str(getattr(image, "tile", ""))
    image.load()
    extrema: Any = image.getextrema()
    if is_deep and image.mode.startswith("RGB") and (top := max(high for _, high in extrema[:3])) < 128:
        raise ValueError(f"the image has colours of 16 bits up to {256 * top}, {_UNTOLD.format(65535)}.")


def _as_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Numbers of one colour as 8 bits: floats from 0 to 1, or from 0 to 255 or 65535.

    Raises:
        ValueError: when they are neither.
    """
    low, top = values.min(), values.max()
    white = 1 if mode == "F" and top <= 1 else 255 if top <= 255 and not mode.startswith("I;16") else 65535
    is_untold = (white == 255 and mode == "F" and top < 32) or (white == 65535 and 0 < top < 2**15)
    if not (low >= 0 and top <= 65535) or is_untold:
        raise ValueError(f"the image holds {low:g} to {top:g}, {_UNTOLD.format(1 if mode == 'F' else 65535)}.")
    return (values * (255 / white)).round().astype(np.uint8)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of a picture when it is turned as its EXIF says."""
    on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size[::-1] if on_its_side else image.size


FITS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
"""How pictures are resized."""


def resize(image: Image.Image, size: int, method: str = "bicubic") -> Image.Image:
    """Bicubic, as both papers resize images and masks alike (edges of masks go grey); VP's released code is bilinear in
    its detection and reasoning studies."""
    return image.resize((size, size), FITS[method])


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle of a picture, not resized, on black where the picture is smaller; as torchvision's CenterCrop."""
    left, top = (int(round((side - size) / 2)) if side > size else -((size - side) // 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def luma(pixels: torch.Tensor) -> torch.Tensor:
    """ITU-R 601-2 luma of 8-bit pixels [3, height, width] in [0, 1], rounded as PIL's "L": [height, width]."""
    red, green, blue = (pixels * 255).round().long().unbind()
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(pixels.dtype) / 255


def to_tensor(image: Image.Image) -> torch.Tensor:
    """PIL RGB → float [3, height, width] in [0, 1]."""
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w").float().div(255)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [..., 3, height, width] in [0, 1] → less ImageNet's mean, over its deviation."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def denormalise(values: torch.Tensor) -> torch.Tensor:
    """The inverse of `normalise`."""
    mean, std = (values.new_tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    return values * std + mean


def as_cell(image: Any, size: int, method: str = "bicubic") -> torch.Tensor:
    """A picture or its path → the pixels of a square cell, float [3, size, size] in [0, 1]; `method` is one of `FITS`,
    or "crop" for its middle (`center_crop`)."""
    image = as_rgb(image)
    return to_tensor(center_crop(image, size) if method == "crop" else resize(image, size, method))


def digest(pixels: torch.Tensor) -> int:
    """A number from 0 to 2^63 - 1 that stands for some pixels: the same for the same values, whatever device."""
    return int(bytes_digest(tensor_bytes(pixels.float()), 8), 16) >> 1


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """Float [3, height, width] in [0, 1] → PIL RGB."""
    values = pixels.detach().float().clamp(0, 1).mul(255).round().byte().cpu()
    return Image.fromarray(rearrange(values, "c h w -> h w c").numpy())


def png_of(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=picture.mode == "P")
    return buffer.getvalue()


EPSILON = {"light": 1e-2, "colour": 1e-3}
"""Of the guided filter of `carry_over`, by what changes."""
RADIUS = 8
"""Of its windows, in pixels of the answer."""
CHANGES = (*EPSILON, "hole", "mask")
"""What `carry_over` knows how to do."""
OUTLINE = (0.95, 0.33, 0.0)
"""The colour of a mask's outline, which is seen on black, grey and white."""


def carry_over(photograph: torch.Tensor, answer: torch.Tensor, change: str) -> torch.Tensor:
    """An answer carried over to the photograph at full resolution: what it asks for, without its blur.

    "light" is the ratio of answer and query, "colour" the answer less its lightness: both are made locally linear in
    the query's lightness, and so follow the photograph's edges (He & Sun, *Fast Guided Filter*, 2015). "hole" fills
    what is black, and "mask" outlines what is bright in the answer.

    Args:
        photograph: The query as large as it is, [3, height, width] in [0, 1].
        answer: The answer to it, [3, size, size] in [0, 1].
        change: One of `CHANGES`; see `Task.change`.

    Returns:
        [3, height, width] in [0, 1].

    Raises:
        ValueError: when the change is unknown.
    """
    check_choice(CHANGES, change=change)
    height, width = photograph.shape[-2:]
    if change == "hole":
        return torch.where((photograph == 0).all(0), enlarge(answer, height, width), photograph)
    weights = answer.new_tensor(LUMA)[:, None, None]
    if change == "mask":
        inside = (enlarge((weights * answer).sum(0, keepdim=True), height, width) > 0.5).float()
        side = 2 * max(1, min(height, width) // 160) + 1
        edge = F.max_pool2d(inside, side, 1, side // 2) + F.max_pool2d(-inside, side, 1, side // 2)
        return torch.where(edge > 0, answer.new_tensor(OUTLINE)[:, None, None], photograph)
    query = F.interpolate(photograph[None], answer.shape[-2:], mode="bilinear", antialias=True)[0]
    wanted = (0.01 + answer).log() - (0.01 + query).log() if change == "light" else answer - (weights * answer).sum(0)
    slope, offset = _guided((weights * query).sum(0), wanted, EPSILON[change])
    lightness = (weights * photograph).sum(0)
    smooth = enlarge(slope, height, width) * lightness + enlarge(offset, height, width)
    return (photograph * smooth.exp() if change == "light" else lightness + smooth).clamp(0, 1)


def enlarge(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Values [channel, rows, columns] at another size, bilinear."""
    return F.interpolate(pixels[None], (height, width), mode="bilinear", align_corners=False)[0]


def psnr(pixels: torch.Tensor, truth: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of pixels in [0, 1], in dB."""
    return float(-10 * (pixels - truth).square().mean().log10())


def _guided(guide: torch.Tensor, values: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope and offset of the guided filter: `slope * guide + offset` are the values [channel, height, width], smooth
    but for the edges of the guide [height, width]."""

    def mean(pixels: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(uniform_filter(pixels.numpy(), 2 * RADIUS + 1, axes=(-2, -1)))

    slope = (mean(guide * values) - mean(guide) * mean(values)) / (mean(guide**2) - mean(guide) ** 2 + epsilon)
    return mean(slope), mean(mean(values) - slope * mean(guide))
