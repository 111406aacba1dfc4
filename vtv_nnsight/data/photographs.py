"""Real photographs, carried inside the wheels of scikit-image, scikit-learn and matplotlib: nothing is downloaded.

`PHOTOGRAPHS` lists them with their licences. The documents, drawings and scientific measurements beside them are left
out, and so are photographs whose terms nobody states.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, Features, Image, Value
from einops import rearrange
from PIL import Image as PILImage

from vtv_nnsight.images import LUMA as LUMA_WEIGHTS

SPLITS = ("train", "test")
PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
LUMA = np.array(LUMA_WEIGHTS, np.float32)


class Photograph(NamedTuple):
    """Where a photograph lies, on what terms, and in which split."""

    module: str
    file: str
    licence: str
    split: str
    grey: bool = False


PHOTOGRAPHS = {
    "astronaut": Photograph("skimage", "data/astronaut.png", "public domain (NASA)", "train"),
    "hubble": Photograph("skimage", "data/hubble_deep_field.jpg", "public domain (NASA)", "train"),
    "ihc": Photograph("skimage", "data/ihc.png", "no known restrictions (CMMI)", "train"),
    "retina": Photograph("skimage", "data/retina.jpg", "CC0 (Mikael Häggström)", "train"),
    "rocket": Photograph("skimage", "data/rocket.jpg", "public domain (SpaceX)", "train"),
    "china": Photograph("sklearn", "datasets/images/china.jpg", "CC BY 2.0 (danielbuechele, Flickr)", "train"),
    "flower": Photograph("sklearn", "datasets/images/flower.jpg", "CC BY 2.0 (vultilion, Flickr)", "train"),
    "brick": Photograph("skimage", "data/brick.png", "CC0 (CC0Textures)", "train", grey=True),
    "camera": Photograph("skimage", "data/camera.png", "CC0 (Lav Varshney)", "train", grey=True),
    "clock": Photograph("skimage", "data/clock_motion.png", "public domain (Stefan van der Walt)", "train", grey=True),
    "coins": Photograph("skimage", "data/coins.png", "no known restrictions (Brooklyn Museum)", "train", grey=True),
    "grass": Photograph("skimage", "data/grass.png", "CC0 (linolafett, DeviantArt)", "train", grey=True),
    "gravel": Photograph("skimage", "data/gravel.png", "CC0 (CC0Textures)", "train", grey=True),
    "chelsea": Photograph("skimage", "data/chelsea.png", "CC0 (Stefan van der Walt)", "test"),
    "coffee": Photograph("skimage", "data/coffee.png", "CC0 (Rachel Michetti)", "test"),
    "hopper": Photograph(
        "matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "public domain (United States Navy)", "test"
    ),
}


def photographs(split: str | None = None, *, grey: bool = True) -> Dataset:
    """The photographs of a split ("train" or "test"; None is both), with columns image (RGB), name and source.

    `grey=False` leaves out those that have no colour, from which colorization cannot be learned.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split={split!r} is unknown and one of {SPLITS} was expected: pass one of those, or None.")
    chosen = {
        name: photograph
        for name, photograph in PHOTOGRAPHS.items()
        if split in (None, photograph.split) and (grey or not photograph.grey)
    }
    files = [{"bytes": _read(photograph), "path": None} for photograph in chosen.values()]
    sources = [f"{PACKAGES[p.module]}, {p.file}: {p.licence}" for p in chosen.values()]
    features = Features(image=Image(mode="RGB"), name=Value("string"), source=Value("string"))
    return Dataset.from_dict({"image": files, "name": list(chosen), "source": sources}, features)


def crops(
    images: Sequence[PILImage.Image] | Dataset, indices: Sequence[int], seed: int = 0, size: int = 64
) -> np.ndarray:
    """Random resized crops, flipped and colour-jittered, for training: uint8 [n, size, size, 3].

    Crop number `index` of the same images is the same for a seed, whatever others are asked for. Pass a list of RGB
    pictures, such as `list(photographs("train")["image"])`: a Dataset decodes its files anew in every call.
    """
    pictures = images["image"] if isinstance(images, Dataset) else images
    if not len(pictures):
        raise ValueError("There are no images to crop and at least 1 was expected: pass a list of pictures.")
    draws = np.array([np.random.default_rng((seed, index)).random(12, np.float32) for index in indices])
    cut = [_crop(pictures[int(draw[0] * len(pictures))], draw[1:5], size) for draw in draws]
    return _jitter(np.stack(cut), *draws[:, 5:].T)


def _read(photograph: Photograph) -> bytes:
    spec = find_spec(photograph.module)
    if spec is None:
        raise ImportError(
            f"The photographs need {PACKAGES[photograph.module]}, which is not installed: "
            "pip install vtv-nnsight[pretraining]"
        )
    return Path(spec.submodule_search_locations[0], photograph.file).read_bytes()


def _crop(picture: PILImage.Image, draw: np.ndarray, size: int) -> np.ndarray:
    """A part of the picture, 8 % to all of its area and 3:4 to 4:3 in shape: uint8 [size, size, 3]."""
    area, ratio, left, top = draw.astype(float)
    side = np.sqrt((0.08 + 0.92 * area) * picture.width * picture.height)
    stretch = np.sqrt(4 / 3) ** (2 * ratio - 1)
    width = min(max(side * stretch, size), picture.width)
    height = min(max(side / stretch, size), picture.height)
    left, top = left * (picture.width - width), top * (picture.height - height)
    box = (left, top, min(left + width, picture.width), min(top + height, picture.height))
    cut = picture.resize((size, size), PILImage.Resampling.BICUBIC, box, reducing_gap=2.0)
    return np.asarray(cut.convert("RGB"))


def _jitter(pictures, flip, brightness, contrast, saturation, *balance) -> np.ndarray:
    """Pictures [n, y, x, 3] mirrored and recoloured a little by numbers in [0, 1), one of each a picture."""

    def around_one(number, reach):
        return (1 + reach * (2 * number - 1))[:, None, None, None]

    pictures = np.where(flip[:, None, None, None] < 0.5, pictures[:, :, ::-1], pictures).astype(np.float32)
    pictures *= around_one(brightness, 0.2) * (1 + 0.06 * (2 * rearrange(np.array(balance), "rgb n -> n 1 1 rgb") - 1))
    grey = (pictures @ LUMA)[..., None]
    pictures = grey + around_one(saturation, 0.25) * (pictures - grey)
    mean = grey.mean((1, 2), keepdims=True)
    pictures = mean + around_one(contrast, 0.2) * (pictures - mean)
    return np.clip(pictures + 0.5, 0, 255).astype(np.uint8)
