"""Training pictures that are put together: crops at many scales, and cut-out objects pasted over them.

A composed picture shows one to three objects, one of which its mask shows: scaled, turned, relit, with a soft shadow,
at the edges of their alpha, over a crop of a photograph or a texture, or a plain ground. All of it is done by Pillow on
pictures of `SIZE` pixels, which tasks then bring to the size of a cell.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from vtv_nnsight.tasks import Row
from vtv_nnsight.training.corpus import CUTOUT, PHOTO, TEXTURE, Corpus, Picture

SIZE = 80
LUMA = np.array([0.299, 0.587, 0.114])
SMALLEST_CROP = 40
"""Crops are at least this wide in the kept picture, where it is larger: less would be magnified into a blur."""
GROUNDS = {PHOTO: 0.62, TEXTURE: 0.28, "plain": 0.10}
"""How often objects stand on each kind of ground."""
OBJECTS = (0.7, 0.2, 0.1)
"""How often a picture has one, two and three objects."""
SAME = 0.4
"""Share of the prompts that show the very same object in example and query, not another of its class."""
SHADOW = 0.4
LEAST_SHOWN = 0.05
"""A mask covers at least this share of the picture."""


def crop(picture: Picture, generator: np.random.Generator, size: int = SIZE) -> Image.Image:
    """A part of a picture, about square, from all of it to a small detail; mirrored and recoloured at random."""
    image = picture.image
    longest = min(image.size)
    side = max(min(SMALLEST_CROP, longest), longest * generator.uniform(0.25, 1.0) ** 0.8)
    stretch = np.exp(generator.uniform(-0.25, 0.25))
    width, height = min(side * stretch, image.width), min(side / stretch, image.height)
    left, top = generator.random() * (image.width - width), generator.random() * (image.height - height)
    cut = image.resize(
        (size, size), Image.Resampling.BICUBIC, (left, top, left + width, top + height), reducing_gap=2.0
    )
    if generator.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return recolour(cut, generator)


def recolour(image: Image.Image, generator: np.random.Generator, reach: float = 1.0) -> Image.Image:
    """Another light on an RGB picture: brightness, contrast, saturation and white balance, by one matrix."""
    gain, contrast, saturation, red, green, blue = 1 + reach * generator.uniform(-1, 1, 6) * (
        *(0.25, 0.2, 0.3), *(0.06, 0.06, 0.06)
    )  # fmt: skip
    matrix = gain * contrast * np.diag([red, green, blue]) @ (saturation * np.eye(3) + (1 - saturation) * LUMA)
    offset = np.full((3, 1), 128 * gain * (1 - contrast))
    return image.convert("RGB", tuple(np.hstack([matrix, offset]).ravel().tolist()))


def compose(corpus: Corpus, n: int, generator: np.random.Generator) -> list[Row]:
    """`n` pictures, the examples and the query of a prompt; their masks all show an object of one class."""
    first = corpus.draw(CUTOUT, generator)
    alike = generator.random() < SAME
    wanted = [first, *(first if alike else corpus.another(first, generator) for _ in range(n - 1))]
    return [_composed(corpus, cutout, generator) for cutout in wanted]


def _composed(corpus: Corpus, wanted: Picture, generator: np.random.Generator) -> Row:
    scene = _ground(corpus, generator)
    others = [corpus.draw(CUTOUT, generator) for _ in range(generator.choice(len(OBJECTS), p=OBJECTS))]
    objects = [(wanted, True), *((other, False) for other in others if other.label != wanted.label)]
    order = generator.permutation(len(objects))
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for place, index in enumerate(order):
        picture, is_wanted = objects[index]
        scene, alpha = _paste(scene, picture, generator, largest=1.0 if len(objects) == 1 else 0.75)
        mask = alpha if is_wanted else np.minimum(mask, 255 - alpha)
        hidden = (mask >= 128).mean() < LEAST_SHOWN
        if hidden and place == len(order) - 1:
            scene, mask = _paste(scene, wanted, generator, least=0.5)
    return {"image": scene, "mask": Image.fromarray(np.where(mask >= 128, np.uint8(255), np.uint8(0)))}


def _paste(
    scene: Image.Image, picture: Picture, generator: np.random.Generator, least: float = 0.3, largest: float = 1.0
) -> tuple[Image.Image, np.ndarray]:
    """The scene with the object on it, and the object's alpha there."""
    side = SIZE * (least + (largest - least) * generator.random())
    scale, stretch = side / max(picture.image.size), np.exp(generator.uniform(-0.15, 0.15))
    width, height = (max(4, round(scale * s * k)) for s, k in zip(picture.image.size, (stretch, 1 / stretch)))
    cutout = picture.image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    if generator.random() < 0.5:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if generator.random() < 0.6:
        cutout = cutout.rotate(generator.normal(0, 20), Image.Resampling.BICUBIC, expand=True)
    alpha = cutout.getchannel("A")
    cutout = recolour(cutout.convert("RGB"), generator)
    left, top = (
        round(generator.uniform(-0.15 * s, SIZE - 0.85 * s)) if s < SIZE else round((SIZE - s) * generator.random())
        for s in cutout.size
    )
    placed = Image.new("L", scene.size)
    placed.paste(alpha, (left, top))
    if generator.random() < SHADOW:
        scene = _shadowed(scene, placed, generator)
    else:
        scene = scene.copy()
    scene.paste(cutout, (left, top), alpha)
    return scene, np.asarray(placed)


def _shadowed(scene: Image.Image, alpha: Image.Image, generator: np.random.Generator) -> Image.Image:
    depth, strength = generator.uniform(1, 4), generator.uniform(0.2, 0.6)
    across = round(generator.uniform(-1.5, 1.5) * depth)
    shade = Image.new("L", scene.size)
    shade.paste(alpha, (across, round(depth)))
    shade = shade.filter(ImageFilter.BoxBlur(depth)).point(lambda value: int(strength * value))
    return Image.composite(Image.new("RGB", scene.size), scene, shade)


def _ground(corpus: Corpus, generator: np.random.Generator) -> Image.Image:
    kinds = [kind for kind in GROUNDS if kind == "plain" or corpus.has(kind)]
    shares = np.array([GROUNDS[kind] for kind in kinds])
    kind = kinds[generator.choice(len(kinds), p=shares / shares.sum())]
    if kind != "plain":
        return crop(corpus.draw(kind, generator), generator)
    corners = generator.integers(0, 256, 3) + generator.uniform(0, 1, (2, 2, 1)) * generator.integers(-96, 97, 3)
    return Image.fromarray(corners.clip(0, 255).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
