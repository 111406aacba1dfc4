"""Pictures as people have them, to tensors and back."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps

SMALLEST = 8
"""Pictures with a side of fewer pixels than this are refused."""


def as_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as RGB: turned upright (EXIF), transparency on white, 16 bits scaled to 8.

    Raises:
        TypeError: when it is not a PIL image.
        ValueError: when it is smaller than `SMALLEST` pixels on a side, or cannot be decoded.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"an image of type {type(image).__name__} was given; expected a PIL image: use PIL.Image.open.")
    if min(image.size) < SMALLEST:
        width, height = image.size
        raise ValueError(f"the image is {width}x{height} pixels; expected at least {SMALLEST} on a side.")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the image {getattr(image, 'filename', '')!r} cannot be decoded: {error}") from error
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        scale = 257 if image.mode.startswith("I;16") or values.max() > 255 else 1
        image = Image.fromarray((values / scale).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of a picture when it is turned as its EXIF says."""
    on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size[::-1] if on_its_side else image.size


def resize(image: Image.Image, size: int) -> Image.Image:
    """Bicubic, as both papers resize images and masks alike (edges of masks go grey)."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def luma(pixels: torch.Tensor) -> torch.Tensor:
    """ITU-R 601-2 luma of 8-bit pixels [3, height, width] in [0, 1], rounded as PIL's "L": [height, width]."""
    red, green, blue = (pixels * 255).round().long()
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(pixels.dtype) / 255


def to_tensor(image: Image.Image) -> torch.Tensor:
    """PIL RGB → float [3, height, width] in [0, 1]."""
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w").float().div(255)


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """Float [3, height, width] in [0, 1] → PIL RGB."""
    values = pixels.detach().float().clamp(0, 1).mul(255).round().byte().cpu()
    return Image.fromarray(rearrange(values, "c h w -> h w c").numpy())
