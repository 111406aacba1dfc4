"""Folders of your pictures: one of them, or inputs and answers, of which any change of pictures is a task.

>>> images = pairs("sketches")                       # sketches/inputs/cat.png, sketches/answers/cat.png, …
>>> prompts = tasks.pairs.prompts(images, n=50, layout=model.layout)
"""

import math
import warnings
from pathlib import Path

from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from vtv_nnsight.files import check_file
from vtv_nnsight.images import MIN_SIDE
from vtv_nnsight.text import join_names, printable

PAIRS = ("inputs", "answers")
"""The folders of `pairs`."""


def folder(path: str | Path) -> Dataset:
    """Every picture in a folder and the folders inside it, sorted by path, as column image (size and mode are kept).

    A picture is anything that has a suffix which Pillow knows how to open; hidden files are passed over. What turns out
    to be broken, too small or too large for tasks, no file, or of a name that is not UTF-8 is left out, with a warning
    that names it. The Dataset refers to the files where they lie.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when it holds no picture that can be read.

    Warns:
        UserWarning: naming the files that are left out.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder and a folder of pictures was expected: check the path.")
    readable = {suffix for suffix, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN}
    files = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in readable and f.name[0] != "." and not f.is_dir()]
    if broken := {file for file in files if not _usable(file)}:
        names = ", ".join(str(file.relative_to(path)) for file in sorted(broken))
        warnings.warn(
            f"{len(broken)} of {len(files)} files in {path} cannot be read, or have fewer than {MIN_SIDE} pixels on a "
            f"side or more than {PILImage.MAX_IMAGE_PIXELS:,} in all, and are left out: {printable(names)}.",
            stacklevel=2,
        )
    pictures = [str(file.absolute()) for file in files if file not in broken]
    if not pictures:
        raise ValueError(f"{path} holds no picture that can be read; add PNG or JPEG files.")
    return Dataset.from_dict({"image": pictures}, Features(image=Image()))


def _usable(file: Path) -> bool:
    """Whether a picture is neither too small nor too large, and whole: reading only its header would miss one that was
    cut short."""
    try:
        str(file).encode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its size and its metadata
            picture = PILImage.open(check_file(file))
        with picture:
            if picture.width * picture.height > (PILImage.MAX_IMAGE_PIXELS or math.inf):
                return False
            large = min(picture.size) >= MIN_SIDE
            picture.draft("RGB", (64, 64))  # a JPEG is then decoded at an eighth of its size
            picture.load()
    except Exception:  # what a broken file raises depends on its format: OSError, SyntaxError, struct.error…
        return False
    return large


def pairs(path: str | Path) -> Dataset:
    """Pictures and their answers, columns image and answer, sorted by name: PATH/inputs and PATH/answers hold a picture
    of each name, of any suffix, in folders inside them or not. The Dataset refers to the files where they lie.

    Raises:
        FileNotFoundError: when a folder is missing.
        ValueError: when a picture has no partner, two have one name, or there are none.
    """
    by_name = []
    for name in PAIRS:
        inside = Path(path).expanduser() / name
        if not inside.is_dir():
            raise FileNotFoundError(f"there is no folder {inside}; expected {' and '.join(PAIRS)}, of the same names.")
        rows = folder(inside).cast_column("image", Image(decode=False))
        files = [Path(cell["path"]) for cell in rows["image"]]
        names = {file.relative_to(inside.absolute()).with_suffix("").as_posix(): str(file) for file in files}
        if len(names) < len(files):
            raise ValueError(f"{inside} holds several pictures of one name and other suffixes; give each another name.")
        by_name.append(names)
    inputs, answers = by_name
    if alone := sorted(inputs.keys() ^ answers.keys()):
        raise ValueError(f"{len(alone)} pictures in {path} have no partner in the other folder: {join_names(alone)}.")
    columns = {"image": list(inputs.values()), "answer": [answers[name] for name in inputs]}
    return Dataset.from_dict(columns, Features(image=Image(), answer=Image()))
