"""Packages of Debian, PyPI and npm as what they are here: archives with pictures inside.

    >>> archive = fetch("npm", "uikit", folder)
    >>> for name, read in members(archive):        # "package/tests/images/photo.jpg", …
    ...     picture = Image.open(io.BytesIO(read()))

A picture in an archive inside an archive is named `outer!inner`, as in `models.sh3f!chairs/chair.png`.
"""

from __future__ import annotations

import io
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

Member = tuple[str, Callable[[], bytes]]
"""A file's name, and how to read it."""

CLIENTS = {
    "apt": ["apt-get", "download", "{name}"],
    "pip": ["pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check", "{name}"],
    "npm": ["npm", "pack", "--silent", "{name}"],
}
"""How each package manager is asked for a package's archive, in the folder where it shall lie."""

NESTED_ZIP = (".sh3f", ".pk3", ".zip")
MINUTES = 10


def fetch(client: str, name: str, folder: Path, version: str = "") -> Path:
    """The archive of a package, downloaded into an empty folder by its package manager's ordinary client.

    Args:
        client: One of `CLIENTS`.
        name: The package's name.
        version: One version of it; the newest that the client offers without.

    Raises:
        LookupError: in one sentence, when the client is not installed, does not know the package or takes too long.
    """
    if client not in CLIENTS:
        raise ValueError(f"{client!r} is not a package manager; choose one of {', '.join(CLIENTS)}.")
    wanted = name + {"apt": "=", "pip": "==", "npm": "@"}[client] + version if version else name
    command = [part.format(name=wanted) for part in CLIENTS[client]]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60 * MINUTES)
    except FileNotFoundError as error:
        raise LookupError(f"{name}: {command[0]} is not installed; install it or leave the package out.") from error
    except subprocess.TimeoutExpired as error:
        raise LookupError(f"{name}: {command[0]} had not answered after {MINUTES} minutes; try again.") from error
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if done.returncode or not files:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise LookupError(f"{name}: {command[0]} cannot give it ({said[-1].strip() if said else 'it said nothing'}).")
    return files[0]


def members(archive: Path) -> Iterator[Member]:
    """The files of a .deb, .whl, .zip, .tar.gz or .tgz, and of archives inside it, in the archive's order.

    Raises:
        ValueError: when it is another kind of file or is broken.
    """
    try:
        if archive.suffix == ".deb":
            yield from _deb(archive)
        elif archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as file:
                yield from _zip(file)
        elif archive.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
            with tarfile.open(archive) as file:
                yield from _tar(file)
        else:
            raise ValueError(f"{archive.name} is not an archive that is known; expected .deb, .whl, .zip or .tar.gz.")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{archive.name} is not a whole archive ({error}); download it again.") from error


def _deb(archive: Path) -> Iterator[Member]:
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as file,
    ):
        yield from _tar(file)


def _tar(file: tarfile.TarFile) -> Iterator[Member]:
    for member in file:
        if member.isfile():
            yield from _nested(member.name.removeprefix("./"), partial(_extract, file, member))


def _extract(file: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = file.extractfile(member)
    return content.read() if content else b""


def _zip(file: zipfile.ZipFile) -> Iterator[Member]:
    for name in file.namelist():
        if not name.endswith("/"):
            yield from _nested(name, partial(file.read, name))


def _nested(name: str, read: Callable[[], bytes]) -> Iterator[Member]:
    if name.endswith(NESTED_ZIP):
        with zipfile.ZipFile(io.BytesIO(read())) as file:
            yield from ((f"{name}!{inner}", reader) for inner, reader in _zip(file))
    elif name.endswith(".rcc"):
        yield from ((f"{name}!{inner}", reader) for inner, reader in _qt_resources(read()))
    else:
        yield name, read


def _qt_resources(data: bytes) -> Iterator[Member]:
    """The files of a Qt resource collection: a tree of nodes, their names and their data, each part at its offset."""
    if data[:4] != b"qres":
        raise ValueError("a file ends in .rcc and is not a Qt resource collection.")
    version, tree, blobs, names = struct.unpack_from(">4I", data, 4)
    node_size, folder, zlib_compressed, zstd_compressed = (22 if version >= 2 else 14), 2, 1, 4

    def content(offset: int, flags: int) -> bytes:
        length = struct.unpack_from(">I", data, offset)[0]
        raw = data[offset + 4 : offset + 4 + length]
        return zlib.decompress(raw[4:]) if flags & zlib_compressed else raw

    def walk(index: int, path: str) -> Iterator[Member]:
        name, flags = struct.unpack_from(">IH", data, tree + node_size * index)
        if index:
            letters = struct.unpack_from(">H", data, names + name)[0]
            start = names + name + 6
            path = f"{path}/{data[start : start + 2 * letters].decode('utf-16-be')}".removeprefix("/")
        if flags & folder:
            count, first = struct.unpack_from(">II", data, tree + node_size * index + 6)
            for child in range(first, first + count):
                yield from walk(child, path)
        elif not flags & zstd_compressed:
            offset = blobs + struct.unpack_from(">I", data, tree + node_size * index + 10)[0]
            yield path, lambda: content(offset, flags)

    yield from walk(0, "")
