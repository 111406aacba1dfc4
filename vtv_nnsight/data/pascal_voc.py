"""Pascal VOC 2012 as both papers use it: Pascal-5i for segmentation, single objects for detection.

    >>> images = pascal("/data", fold=0, split="val")          # datasets.Dataset: image, mask, label
    >>> prompts = tasks.segmentation.prompts(images, n=1000, seed=0, layout=model.layout)
    >>> boxes = detection("/data", split="val")
    >>> prompts = tasks.detection.prompts(boxes, n=1000, seed=0, layout=model.layout)

ROOT holds `VOCdevkit/VOC2012`, as the VOC archive unpacks (or is `VOCdevkit` itself). Which pictures and classes make a
fold is read from the published lists, which are in the package: those of OSLSM (Shaban et al., BMVC 2017), by way of
HSNet, as both papers' code has them. They hold names of pictures and classes, no picture.

Pictures and masks are decoded when a row is read; `images.with_format(None)["label"]` reads labels alone. A mask shows
one class: its pixels are 255 and all others 0, the boundary (255 in the files) among them, as in the papers' released
code. Labels are classes from 0; the files count them from 1.

Episodes are drawn by `Task.prompts`: a seed, a query, and an example of the query's class that is another picture.
"""

from __future__ import annotations

import lzma
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features
from PIL import Image

from vtv_nnsight.text import check_choice, join_names

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
FOLDS = (0, 1, 2, 3)
PER_FOLD = len(CLASSES) // len(FOLDS)
SPLITS = ("trn", "val")
DrawMask = Callable[..., Image.Image]
VOC = "VOCtrainval_11-May-2012.tar (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/)"
SBD = (
    "SegmentationClassAug, VOC2012's masks with SBD's (see the data preparation of Volumetric-Aggregation-Transformer)"
)
DOWNLOADS = {"SegmentationClassAug": SBD}
DOWNLOADS |= dict.fromkeys(("JPEGImages", "ImageSets/Segmentation", "ImageSets/Main", "Annotations"), VOC)
"""The folders of VOC2012 that are read, and what to download for them."""


class Entry(NamedTuple):
    """A line of a list: a picture, and one of the classes that it shows, from 0."""

    name: str
    label: int


def pascal(
    root: str | os.PathLike[str], fold: int | Sequence[int] | None = 0, split: str = "val", *, published: bool = True
) -> Dataset:
    """One fold of Pascal-5i: columns image, mask ("L", 0 or 255, of the row's class) and label.

    A picture with several classes of the fold is as many rows.

    Args:
        root: The folder that holds `VOCdevkit/VOC2012`, with `JPEGImages` and `SegmentationClassAug`.
        fold: 0 to 3, for classes 5 fold to 5 fold + 4; several, one after the other; None for all twenty.
        split: "trn", where VTV collects and searches, or "val", where both papers report.
        published: The lists in the package. Else every picture with every class in its mask, where "val" is VOC's
            (`ImageSets/Segmentation/val.txt`) and all other masks are "trn".

    Raises:
        FileNotFoundError: when a folder is missing, naming it and what to download.
        ValueError: when fold or split is unknown, a list names pictures that are not there, or the fold is empty.

    Warns:
        UserWarning: when a class has a single picture, which can have no example.
    """
    folds = FOLDS if fold is None else (fold,) if isinstance(fold, int) else tuple(fold)
    if not folds or not set(folds) <= set(FOLDS):
        raise ValueError(f"fold={fold!r} is not a fold of Pascal-5i; choose 0, 1, 2, 3, or None for all classes.")
    check_choice(SPLITS, split=split)
    voc = _voc(root, "JPEGImages", "SegmentationClassAug")
    if published:
        entries = [entry for f in folds for entry in published_list(split, f)]
        source = "the published list (the source pascal:ROOT:FOLD:masks lists what is there)"
        _check_files(source, [entry.name for entry in entries], voc, JPEGImages=".jpg", SegmentationClassAug=".png")
    else:
        entries = [entry for entry in _entries_of_masks(voc, split) if entry.label // PER_FOLD in folds]
    where = f"{split} of fold {fold}" if fold is not None else split
    if not entries:
        raise ValueError(f"{where} is empty: {voc} has no picture with a mask of these classes; check the files.")
    for label, count in Counter(entry.label for entry in entries).items():
        if count == 1:
            warnings.warn(f"{where} has one picture of {CLASSES[label]}: it has no example.", stacklevel=2)
    names, labels = zip(*entries)
    masks = [{"path": f"{voc}/SegmentationClassAug/{name}.png", "value": label + 1} for name, label in entries]
    return _dataset(voc, names, masks, labels, _class_mask)


@cache
def _published_lists() -> dict[str, list[Entry]]:
    """Name of the file, such as "trn/fold0.txt" → its entries."""
    lists: dict[str, list[Entry]] = {}
    packed = Path(__file__).with_name("embedded") / "pascal-5i.txt.xz"
    for line in lzma.decompress(packed.read_bytes()).decode().splitlines():
        if line.endswith(".txt"):
            entries = lists.setdefault(line, [])
        else:
            name, _, number = line.rpartition("__")
            entries.append(Entry(name, int(number) - 1))
    return lists


def published_list(split: str, fold: int) -> list[Entry]:
    """The pictures and classes of a fold, in the order of the published list."""
    return list(_published_lists()[f"{split}/fold{fold}.txt"])


def detection(root: str | os.PathLike[str], split: str = "val", *, largest: float = 0.5) -> Dataset:
    """VOC's pictures of a single object (VP §4.2): columns image, mask ("L", the object's box filled) and label.

    Pictures with several objects or none are left out, and those with a box of more than `largest` of the picture.

    Args:
        root: The folder that holds `VOCdevkit/VOC2012`, with `JPEGImages`, `Annotations` and `ImageSets/Main`.
        split: "trn" (VOC's train.txt) or "val".
        largest: Share of the picture.

    Raises:
        FileNotFoundError: when a folder is missing, naming it and what to download.
        ValueError: when an annotation cannot be read, a list names pictures that are not there, or none is left.
    """
    check_choice(SPLITS, split=split)
    voc = _voc(root, "JPEGImages", "Annotations", "ImageSets/Main")
    file = voc / "ImageSets" / "Main" / ("train.txt" if split == "trn" else "val.txt")
    names = _lines(file)
    _check_files(file, names, voc, JPEGImages=".jpg", Annotations=".xml")
    kept = []
    for name in names:
        size, objects = _annotation(voc / "Annotations" / f"{name}.xml")
        if len(objects) == 1:
            ((label, box),) = objects
            left, top, right, bottom = box
            if 0 < (right - left) * (bottom - top) <= largest * size[0] * size[1]:
                kept.append((name, size, box, label))
    if not kept:
        raise ValueError(f"none of the {len(names)} pictures of {file} has a single object that is small enough.")
    pictures, sizes, boxes, labels = zip(*kept)
    masks = [{"size": size, "box": box} for size, box in zip(sizes, boxes)]
    return _dataset(voc, pictures, masks, labels, _box_mask)


def released_detection_order(root: str | os.PathLike[str], count: int) -> list[int]:
    """Row numbers of `detection(root, "val", …)`, which has `count` rows, in the order in which VP's released code asks
    them: only its front part, with repeats.

    The code's list (`2012_val_flattened_set.pth`) has a pair of number and class for every class of every validation
    picture, and takes these numbers as indices into the pictures that are left of a single object.
    """
    voc = _voc(root, "Annotations", "ImageSets/Main")
    order: list[int] = []
    for number, name in enumerate(_lines(voc / "ImageSets" / "Main" / "val.txt")):
        _, objects = _annotation(voc / "Annotations" / f"{name}.xml")
        order += [number] * len({label for label, _ in objects})
        if len(order) >= count:
            break
    return order[:count]


def _dataset(
    voc: Path, names: Iterable[str], masks: list[dict[str, Any]], labels: Iterable[int], draw: DrawMask
) -> Dataset:
    """Rows with masks that are drawn, `draw(**mask)`, when they are read."""
    columns = {"image": [f"{voc}/JPEGImages/{name}.jpg" for name in names], "label": list(labels)}
    features = Features(image=datasets.Image(), label=ClassLabel(names=list(CLASSES)))
    rows = Dataset.from_dict(columns, features).add_column("mask", masks)
    rows = rows.select_columns(["image", "mask", "label"])
    return rows.with_transform(partial(_with_masks, draw=draw))


def _with_masks(batch: dict[str, list[Any]], draw: DrawMask) -> dict[str, list[Any]]:
    return batch | {"mask": [draw(**mask) for mask in batch["mask"]]} if "mask" in batch else batch


def _class_mask(path: str, value: int) -> Image.Image:
    """One class of a label map on disk: PIL "L", 255 where the map has the value and else 0."""
    return Image.fromarray(np.where(_label_map(path) == value, np.uint8(255), np.uint8(0)))


def _box_mask(size: list[int], box: tuple[int, int, int, int]) -> Image.Image:
    """A filled box: PIL "L" of a picture's size, 255 inside and else 0."""
    mask = Image.new("L", size)
    mask.paste(255, (*box,))
    return mask


def _voc(root: str | os.PathLike[str], *needed: str) -> Path:
    """The folder VOC2012, once the sub-folders that are needed are known to be there."""
    voc = Path(root).expanduser().absolute() / "VOCdevkit" / "VOC2012"
    if not voc.is_dir() and (voc.parent.parent / "VOC2012").is_dir():
        voc = voc.parent.parent / "VOC2012"
    for folder in needed:
        if not (voc / folder).is_dir():
            raise FileNotFoundError(f"there is no folder {voc / folder}; download {DOWNLOADS[folder]}.")
    return voc


def _entries_of_masks(voc: Path, split: str) -> list[Entry]:
    """Every picture of a split with every class in its mask."""
    masks = sorted((voc / "SegmentationClassAug").glob("*.png"))
    if not masks:
        raise ValueError(f"{voc / 'SegmentationClassAug'} has no masks (.png); download {SBD}.")
    _voc(voc.parent, "ImageSets/Segmentation")
    held_out = set(_lines(voc / "ImageSets" / "Segmentation" / "val.txt"))
    entries = []
    for mask in masks:
        if (mask.stem in held_out) == (split == "val"):
            values = np.unique(_label_map(mask)).tolist()
            entries += [Entry(mask.stem, value - 1) for value in values if value not in (0, 255)]
    if strange := [entry for entry in entries if entry.label >= len(CLASSES)]:
        name, label = strange[0]
        raise ValueError(f"the mask {name}.png holds the value {label + 1}; expected 1 to {len(CLASSES)}, 0 and 255.")
    _check_files(voc / "SegmentationClassAug", {entry.name for entry in entries}, voc, JPEGImages=".jpg")
    return entries


def _label_map(path: str | Path) -> np.ndarray:
    """Class numbers [height, width] of a mask file, with a palette or without."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the mask {path} cannot be decoded: {error}.") from error
    if values.ndim != 2:
        raise ValueError(f"the mask {path} is a picture in colours; expected one class number a pixel.")
    return values


def _annotation(file: Path) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Width and height of a picture; and label and box (left, top, right, bottom) of its objects.

    VOC's corners are pixels, counted from 1 and inside the box.
    """
    try:
        tree = ElementTree.parse(file).getroot()
        size = [int(tree.findtext(f"size/{side}", "")) for side in ("width", "height")]
        objects = []
        for item in tree.findall("object"):
            left, top, right, bottom = (
                round(float(item.findtext(f"bndbox/{side}", ""))) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            if (name := item.findtext("name")) not in CLASSES:
                raise ValueError(f"{name!r} is not a class of VOC")
            objects.append((CLASSES.index(name), [left - 1, top - 1, right, bottom]))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{file} is not an annotation as VOC writes them: {error}.") from error
    return size, objects


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}.")
    return [line for line in file.read_text().splitlines() if line.strip()]


def _check_files(source: Path | str, names: Iterable[str], voc: Path, **suffixes: str) -> None:
    """Refuse names without a file in some folders of VOC2012, counted and listed: folder → suffix of its files."""
    for folder, suffix in suffixes.items():
        files = set(os.listdir(voc / folder))
        if absent := sorted({name for name in names if name.strip() + suffix not in files}):
            listed = f"{suffix} in {voc / folder}: {join_names(absent)}"
            raise ValueError(f"{source} names {len(absent)} pictures that have no {listed}.")
