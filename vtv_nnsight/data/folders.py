"""A folder of your pictures."""

import warnings
from pathlib import Path

from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from vtv_nnsight.images import MIN_SIDE


def folder(path: str | Path) -> Dataset:
    """Every picture in a folder and the folders inside it, sorted by path, as column image (size and mode are kept).

    A picture is any file whose suffix Pillow knows how to open; hidden files are passed over. Files that turn out to be
    broken, or smaller than tasks take, are left out, with a warning that names them. The Dataset refers to the files
    where they lie.

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
    files = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in readable and f.name[0] != "." and f.is_file()]
    if broken := {file for file in files if not _usable(file)}:
        names = ", ".join(str(file.relative_to(path)) for file in sorted(broken))
        warnings.warn(
            f"{len(broken)} of {len(files)} files in {path} cannot be read or are smaller than {MIN_SIDE} pixels, and "
            f"are left out: {names}.",
            stacklevel=2,
        )
    pictures = [str(file.absolute()) for file in files if file not in broken]
    if not pictures:
        raise ValueError(
            f"{path} holds no picture that can be read and at least 1 was expected: add PNG or JPEG files."
        )
    return Dataset.from_dict({"image": pictures}, Features(image=Image()))


def _usable(file: Path) -> bool:
    """Whether a picture is large enough, and whole: reading only its header would miss one that was cut short."""
    try:
        with PILImage.open(file) as picture:
            large = min(picture.size) >= MIN_SIDE
            picture.draft("RGB", (64, 64))  # a JPEG is then decoded at an eighth of its size
            picture.load()
    except Exception:  # what a broken file raises depends on its format: OSError, SyntaxError, struct.error…
        return False
    return large
