"""Procedural scenes: objects of twenty classes on eight kinds of ground, with exact masks.

A class is a shape, a texture and a hue, so a grey picture still tells which colour its object had; a ground's colour
can be told from its pattern in the same way. Classes come in four folds of five, as in Pascal-5i: the embedded model
is trained on folds 0, 1 and 2 only. In fold 3 the heart is a shape no other fold has, and the other three classes are
known shapes in a texture they have nowhere else.

A picture is two fields, one for the ground and one for the object. Each lies in [0, 1] and runs from the darker to the
lighter of two colours; dark objects lie on light grounds and light ones on dark grounds. No detail is much finer than a
sixteenth of the side.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from einops import einsum, rearrange
from PIL import Image as PILImage

from vtv_nnsight.data.checks import SPLITS
from vtv_nnsight.images import LUMA as LUMA_WEIGHTS
from vtv_nnsight.text import check_choice

FOLDS = (0, 1, 2, 3)
HUES = {  # degrees; each row is a fold, and the two classes of a shape have neighbouring hues
    "striped disc": 15, "checkered square": 262, "plain triangle": 110, "fading star": 45, "plain ring": 155,
    "ringed disc": 30, "dotted square": 278, "plain cross": 300, "striped crescent": 75, "fading arrow": 225,
    "striped triangle": 128, "ringed star": 58, "striped ring": 172, "fading drop": 190, "checkered cross": 315,
    "dotted heart": 340, "plain heart": 355, "checkered arrow": 240, "plain crescent": 90, "ringed drop": 205,
}  # fmt: skip
NAMES = tuple(HUES)
MIN_SIZE = 32
CHUNK = 64  # scenes drawn at once: enough to vectorise over, few enough to stay in cache
LUMA = np.array(LUMA_WEIGHTS, np.float32)
Array = Any  # numpy's arrays: what their arithmetic returns has no type


class Scenes(NamedTuple):
    """A batch of scenes as arrays."""

    images: np.ndarray  # uint8 [n, size, size, 3]
    masks: np.ndarray  # uint8 [n, size, size], 0 or 255
    labels: np.ndarray  # int64 [n], indices into NAMES


def scenes(
    split: str = "train", n: int = 500, seed: int = 0, *, folds: Sequence[int] = (0, 1, 2), size: int = 64
) -> Dataset:
    """The first `n` scenes of a split, with columns image (RGB), mask (L, 0 or 255) and label (one of 20 names).

    Row i depends on split, seed, folds and size, never on `n`, and the splits share no scene.
    """
    drawn = render(split, range(n), seed, folds=folds, size=size)
    columns = {
        "image": [PILImage.fromarray(image) for image in drawn.images],
        "mask": [PILImage.fromarray(mask) for mask in drawn.masks],
        "label": drawn.labels,
    }
    return Dataset.from_dict(columns, Features(image=Image(), mask=Image(), label=ClassLabel(names=list(NAMES))))


def render(
    split: str, indices: Sequence[int], seed: int = 0, *, folds: Sequence[int] = (0, 1, 2), size: int = 64
) -> Scenes:
    """The scenes at `indices` of a split, as arrays: what `scenes` wraps and what training streams."""
    check_choice(SPLITS, split=split)
    if not len(folds) or not set(folds) <= set(FOLDS):
        raise ValueError(f"folds={folds} was passed and some of {FOLDS} were expected: pass, say, folds=(0, 1, 2).")
    if size < MIN_SIZE:
        raise ValueError(f"size={size} is too small to draw and at least {MIN_SIZE} was expected: pass a larger size.")
    rows = np.asarray(indices, np.int64)
    if rows.ndim != 1 or not len(rows) or rows.min() < 0:
        raise ValueError(f"indices={rows} was passed and a list of rows from 0 was expected: pass, say, range(100).")
    keys = _mix(_mix(_mix(np.full(1, SPLITS.index(split))) + np.uint64(seed % 2**64)) + rows.astype(np.uint64))
    classes = rearrange(np.arange(len(NAMES)), "(fold i) -> fold i", fold=len(FOLDS))[sorted(set(folds))].ravel()
    chunks = [_draw(keys[start : start + CHUNK], classes, size) for start in range(0, len(keys), CHUNK)]
    return Scenes(*map(np.concatenate, zip(*chunks)))


def _draw(keys: Array, classes: Array, size: int) -> Scenes:
    """One scene for every key [n], its label drawn from `classes`."""
    x = ((np.arange(size, dtype=np.float32) + 0.5) / size)[None, None, :]
    y = rearrange(x, "1 1 x -> 1 x 1")
    which, natural, gain, slant_x, slant_y = _uniform(keys, 0, 5)
    labels = classes[(which * len(classes)).astype(int).ravel()]
    names = np.array(NAMES)[labels]
    hue = np.array([HUES[name] for name in names], np.float32)
    bright = (_pure(hue) @ LUMA > 0.5) == (natural.ravel() < 0.7)  # yellow is usually a light colour, blue a dark one

    distance, pattern = _object(keys, names, x, y)
    coverage = np.clip(0.5 - distance * size, 0, 1)[..., None]
    picture = _ground(keys, ~bright, x, y)
    picture += coverage * (_object_colours(keys, hue, bright, pattern) - picture)
    light = 0.9 + 0.14 * gain + 0.2 * (slant_x - 0.5) * (x - 0.5) + 0.2 * (slant_y - 0.5) * (y - 0.5)
    picture *= 255 * light[..., None]
    images = np.clip(picture, 0, 255, out=picture).astype(np.uint8)
    return Scenes(images, np.where(distance <= 0, np.uint8(255), np.uint8(0)), labels)


def _object(keys: Array, names: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Signed distance to the object's edge in picture widths (negative inside), and its texture: both [n, y, x].

    In a quarter of the scenes there are two objects, either side of a point; a pixel belongs to the nearer one.
    """
    area, pair, ratio, place_x, place_y, turn, apart, period, phase = _uniform(keys, 1, 9)
    textures, shapes = np.array([name.split() for name in names]).T
    pair = pair < 0.25
    unit_area = np.array([UNIT_AREA[shape] for shape in shapes], np.float32)[:, None, None]
    radius = np.sqrt((0.13 + 0.29 * area) / np.where(pair, 2, 1) / unit_area, dtype=np.float32)
    radius = np.minimum(radius, np.where(pair, np.float32(0.24), np.float32(0.46)))
    away_x, away_y = (1.05 * pair * radius * wave(2 * np.pi * apart) for wave in (np.cos, np.sin))
    centre_x = 0.5 + (2 * place_x - 1) * np.maximum(0.5 - 0.95 * radius - np.abs(away_x), 0)
    centre_y = 0.5 + (2 * place_y - 1) * np.maximum(0.5 - 0.95 * radius - np.abs(away_y), 0)

    side = np.where((x - centre_x) * away_x + (y - centre_y) * away_y >= 0, np.float32(1), np.float32(-1))
    radius = np.where(side > 0, radius, radius * (0.8 + 0.2 * ratio))
    dx, dy = x - centre_x - side * away_x, y - centre_y - side * away_y
    angle = (turn - 0.5) * np.pi / 2.5
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx

    distance, pattern = np.empty_like(u), np.empty_like(u)
    for shape, signed_distance in SHAPES.items():
        rows = shapes == shape
        distance[rows] = signed_distance(u[rows] / radius[rows], v[rows] / radius[rows]) * radius[rows]
    frequency = 2 * np.pi / (0.15 + 0.05 * period)
    for texture, paint in TEXTURES.items():
        rows = textures == texture
        pattern[rows] = paint(u[rows], v[rows], radius[rows], frequency[rows], 2 * np.pi * phase[rows])
    return distance, pattern


def _object_colours(keys: Array, hue: Array, bright: Array, pattern: Array) -> Array:
    """The texture in the class's hue, in light or in dark tones: RGB [n, y, x, 3] in [0, 1]."""
    jitter, vivid, level, spread = _uniform(keys, 2, 4)[..., 0, 0]
    hue, saturation = hue + 10 * (jitter - 0.5), 0.7 + 0.2 * vivid
    middle = np.where(bright, 0.73, 0.29) + 0.06 * (level - 0.5)
    half = 0.11 + 0.03 * spread
    return _ramp(pattern, _colour(middle - half, hue, saturation), _colour(middle + half, hue, saturation))


def _ground(keys: Array, bright: Array, x: Array, y: Array) -> Array:
    """What is behind the object: RGB [n, y, x, 3] in [0, 1]."""
    which, jitter, vivid, level, period, phase = _uniform(keys, 3, 6)
    grid = rearrange(_uniform(keys, 4, 64), "(i j) n 1 1 -> n i j", i=8)
    kinds = (which * len(GROUNDS)).astype(int).ravel()
    pattern = np.empty((len(keys), y.size, x.size), np.float32)
    colours = np.empty((len(GROUNDS), 4), np.float32)
    for kind, (paint, *colour) in enumerate(GROUNDS.values()):
        rows, colours[kind] = kinds == kind, colour
        pattern[rows] = paint(x, y, grid[rows], 0.8 + 0.4 * period[rows], 2 * np.pi * phase[rows])
    dark_hue, dark_vivid, light_hue, light_vivid = colours[kinds].T
    jitter, vivid, level = (12 * (jitter - 0.5)).ravel(), 0.8 + 0.2 * vivid.ravel(), level.ravel()
    middle = np.where(bright, 0.72, 0.28) + 0.08 * (level - 0.5)
    dark = _colour(middle - 0.12, dark_hue + jitter, dark_vivid * vivid)
    light = _colour(middle + 0.12, light_hue + jitter, light_vivid * vivid)
    return _ramp(pattern, dark, light)


# Shapes: signed distances (negative inside) of points (u, v), v pointing down, for an object of radius about 1.


def _star(u: Array, v: Array) -> Array:
    fifth = 2 * np.pi / 5
    angle, r = np.abs((np.arctan2(u, -v) + fifth / 2) % fifth - fifth / 2), np.hypot(u, v)
    return 0.67 * (r * np.cos(angle) - 1.05) + 0.74 * r * np.sin(angle)


def _cross(u: Array, v: Array) -> Array:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 0.95, v - 0.34), np.maximum(u - 0.34, v - 0.95))


def _heart(u: Array, v: Array) -> Array:
    u, v = np.abs(u), 0.15 - v
    return np.minimum(np.maximum(u + v, u - v) * 0.707 - 0.6, np.hypot(u - 0.42, v - 0.42) - 0.6)


def _arrow(u: Array, v: Array) -> Array:
    v = np.abs(v)
    head = np.maximum(0.707 * (u + v) - 0.707, -u)
    return np.minimum(head, np.maximum(np.abs(u + 0.4) - 0.55, v - 0.38))


def _drop(u: Array, v: Array) -> Array:
    v = v - 0.35
    tip = np.maximum(0.866 * np.abs(u) - 0.5 * v - 0.7, v + 0.35)
    return np.minimum(np.hypot(u, v) - 0.7, tip)


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda u, v: np.hypot(u, v) - 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.85,
    "triangle": lambda u, v: np.maximum(0.866 * np.abs(u) - 0.5 * (v - 0.2), v - 0.2) - 0.5,
    "star": _star,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.73) - 0.27,
    "cross": _cross,
    "heart": _heart,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.75 - np.hypot(u - 0.5, v)),
    "arrow": _arrow,
    "drop": _drop,
}
_POINTS = np.mgrid[-1.5:1.5:0.02, -1.5:1.5:0.02]
UNIT_AREA = {shape: 9 * np.mean(inside(*_POINTS[::-1]) < 0) for shape, inside in SHAPES.items()}

# Textures: (u, v) in picture widths around an object of the given radius -> tones in [0, 1], 1 is lighter.


def _sharpen(wave: Array) -> Array:
    return np.clip(0.5 + 1.5 * wave, 0, 1)


TEXTURES: dict[str, Callable[..., Array]] = {
    "plain": lambda u, v, radius, frequency, phase: np.clip(0.75 - 0.4 * (u + v) / radius, 0, 1),
    "striped": lambda u, v, radius, frequency, phase: _sharpen(np.sin(frequency * v + phase)),
    "checkered": lambda u, v, radius, frequency, phase: _sharpen(
        2 * np.sin(0.8 * frequency * u + phase) * np.sin(0.8 * frequency * v + phase)
    ),
    "dotted": lambda u, v, radius, frequency, phase: _sharpen(
        np.cos(frequency * u + phase) + np.cos(frequency * v + phase) - 0.6
    ),
    "ringed": lambda u, v, radius, frequency, phase: _sharpen(np.cos(frequency * np.hypot(u, v) + phase)),
    "fading": lambda u, v, radius, frequency, phase: np.clip(0.5 + 0.6 * v / radius, 0, 1),
}

# Grounds: (x, y) in [0, 1], random numbers grid [n, 8, 8], a scale near 1 and a phase -> tones in [0, 1], 1 is lighter.


def _noise(grid: Array, x: Array, y: Array) -> Array:
    """Smooth noise of about [0, 1] through the grid's values: [n, i, j] -> [n, y, x]."""

    def weights(at: Array, nodes: int) -> Array:
        near = np.exp(-(((at.ravel()[:, None] * (nodes - 1) - np.arange(nodes)) / 0.6) ** 2))
        return (near / near.sum(1, keepdims=True)).astype(np.float32)

    across, down = weights(x, grid.shape[2]), weights(y, grid.shape[1])
    return 0.5 + 1.4 * (np.matmul(np.matmul(down, grid), across.T) - 0.5)


def _sky(x: Array, y: Array, grid: Array, scale: Array, phase: Array) -> Array:
    return np.clip(y + 0.3 * (_noise(grid[:, :3, :3], x, y) - 0.5), 0, 1)


def _grass(x: Array, y: Array, grid: Array, scale: Array, phase: Array) -> Array:
    return np.clip(1.6 * _noise(grid[:, :4], x, y) - 0.3, 0, 1)


def _sand(x: Array, y: Array, grid: Array, scale: Array, phase: Array) -> Array:
    return 0.5 + 0.3 * np.sin(2 * np.pi * (x + 2 * y + 1.2 * _noise(grid[:, :3, :3], x, y)) / (0.7 * scale) + phase)


def _water(x: Array, y: Array, grid: Array, scale: Array, phase: Array) -> Array:
    return 0.5 + 0.4 * np.sin(2 * np.pi * y / (0.22 * scale) + 1.2 * np.sin(2 * np.pi * x / (0.5 * scale) + phase))


def _brick(x: Array, y: Array, grid: Array, scale: Array, phase: Array) -> Array:
    height, width = 0.21 * scale, 0.4 * scale
    row, down = np.divmod(y / height + phase, 1)
    across = (x / width + row / 2 + phase) % 1
    to_mortar = np.minimum(height * (0.5 - np.abs(down - 0.5)), width * (0.5 - np.abs(across - 0.5)))
    return np.clip(1.5 - to_mortar / 0.022, 0, 1)


def _wood(x: Array, y: Array, grid: Array, scale: Array, phase: Array) -> Array:
    return 0.5 + 0.4 * np.sin(2 * np.pi * (x / (0.25 * scale) + 0.9 * _noise(grid[:, :2, :4], x, y)) + phase)


def _clouds(x: Array, y: Array, grid: Array, scale: Array, phase: Array) -> Array:
    return np.clip(2.6 * _noise(grid[:, :6, :4], x, y) - 0.9, 0, 1)


def _dusk(x: Array, y: Array, grid: Array, scale: Array, phase: Array) -> Array:
    hills = 0.68 + 0.1 * np.sin(2 * np.pi * x / scale + phase) + 0.05 * np.sin(5 * np.pi * x / scale + 2 * phase)
    return np.where(y < hills, 0.25 + 0.75 * y / hills, 0) * np.ones_like(x)


# How a ground is painted, then the hue in degrees and the saturation of its darker and of its lighter colour.
GROUNDS: dict[str, tuple[Any, ...]] = {
    "sky": (_sky, 218, 0.8, 200, 0.5),
    "grass": (_grass, 115, 0.7, 82, 0.7),
    "sand": (_sand, 36, 0.5, 44, 0.5),
    "water": (_water, 190, 0.7, 172, 0.6),
    "brick": (_brick, 10, 0.65, 30, 0.1),
    "wood": (_wood, 22, 0.7, 32, 0.65),
    "clouds": (_clouds, 214, 0.7, 210, 0.1),
    "dusk": (_dusk, 270, 0.5, 18, 0.8),
}


def _pure(hue: Array) -> Array:
    """The fully saturated colour of hues in degrees: [n] -> RGB [n, 3]."""
    sixths = np.abs((hue[:, None] / 60 - np.array([0, 2, 4], np.float32) + 3) % 6 - 3)
    return np.clip(2 - sixths, 0, 1)


def _colour(luma: Array, hue: Array, saturation: Array) -> Array:
    """The colour of a given luma and hue at a fraction of the largest saturation RGB allows: [n] -> [n, 3]."""
    tint = _pure(hue) - (_pure(hue) @ LUMA)[:, None]
    room = np.minimum(luma / -tint.min(1), (1 - luma) / tint.max(1))
    return (luma[:, None] + (saturation * room)[:, None] * tint).astype(np.float32)


def _ramp(pattern: Array, dark: Array, light: Array) -> Array:
    """From the dark colour at 0 to the light one at 1: [n, y, x] and two of [n, 3] -> [n, y, x, 3]."""
    return einsum(pattern, light - dark, "n y x, n rgb -> n y x rgb") + dark[:, None, None]


def _uniform(keys: Array, stream: int, k: int) -> Array:
    """`k` independent numbers in [0, 1) for every key [n], always the same ones: [k, n, 1, 1]."""
    counters = np.arange(k, dtype=np.uint64)[:, None] + np.uint64(1000 * stream + 1)
    bits = _mix(keys + counters * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(40)).astype(np.float32)[..., None, None] / 2**24


def _mix(x: Array) -> Array:
    """SplitMix64's finaliser: a bijection of 64-bit integers; its outputs look independent."""
    x = x.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
