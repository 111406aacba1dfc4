"""Files that are whole or not there: written under a temporary name and renamed.

Those that are read again are sealed: somewhere in each stands a digest of all its other bytes, whatever its format.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SEAL = b"blake2b-"
UNSEALED = SEAL.decode() + "0" * 32
"""What a writer puts into a file's metadata, for `seal` to replace."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its name when the block ends without an error. Links are followed.

    The file has the permissions that the user's new files have, whatever the writer in the block gives it.

    Raises:
        OSError: naming the file: as `check_place`, or when the disk is full.
    """
    check_place(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            temporary.touch()
            permissions = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            temporary.chmod(permissions)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """What the system refuses while a file is written, in a sentence that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.") from error


def check_place(path: str | Path) -> None:
    """Refuse a path where no file can be written: nothing is made there.

    Raises:
        FileNotFoundError, PermissionError: when there is no folder to write in, or nothing may be written there.
        IsADirectoryError, OSError: when a folder, a device or a pipe has that name.
    """
    with naming(path):
        target = Path(os.path.realpath(path))
        folder, there = target.parent, target.exists() and not target.is_file()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to write {target.name} in.")
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder and a file was to be written there; name another, or remove it.")
    if there:
        raise OSError(f"{path} is a device or a pipe and a file was to be written there; name another.")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {folder} is not yours to write in.")


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Refuse a path where no folder to write in can be: nothing is made.

    Raises:
        FileNotFoundError: when the folder above it is missing too, unless that is "runs".
        NotADirectoryError: when something else has that name.
    """
    path = Path(path)
    with naming(path):
        there, above = path.exists(), path.absolute().parent.is_dir() or path.parent == Path("runs")
    if there and not path.is_dir():
        raise NotADirectoryError(f"{path} is no folder and a folder was to be written there; name another.")
    if not above:
        raise FileNotFoundError(f"there is no folder {path.parent} to make {path.name} in.")
    return path


def make_folder(path: str | os.PathLike[str]) -> Path:
    """A folder to write in, made where it is missing; of those above it only "runs" is, with the errors of
    `check_folder`."""
    path = check_folder(path)
    with naming(path):
        path.mkdir(exist_ok=True, parents=path.parent == Path("runs"))
    return path


def check_file(path: str | os.PathLike[str]) -> Path:
    """A path that a file can be read from.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is a folder, a device or a pipe.
    """
    path = Path(path)
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"there is no file {path}.") from error
    if not stat.S_ISREG(kind):
        raise ValueError(f"{path} is a {'folder' if stat.S_ISDIR(kind) else 'device or a pipe'}; expected a file.")
    return path


@contextmanager
def refusing(path: str | os.PathLike[str], damaged: str) -> Iterator[None]:
    """Whatever reading a file raises in the block, as one sentence that names it.

    Args:
        path: The file.
        damaged: What a file is that cannot be read, such as "is truncated or damaged".

    Raises:
        ValueError: when anything but an OSError, which names the file, is raised in the block.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # what is damaged can raise anything
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        if "Traceback (most recent call last)" in reason:  # of what was tried, as transformers tells it
            reason = reason.strip().splitlines()[-1]
        raise ValueError(f"{path} {damaged}: {' '.join(reason.split()).rstrip('.')}.") from error


def write_text(path: str | Path, text: str) -> None:
    """A text file, in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_picture(path: str | Path, save: Callable[..., Any], **options: Any) -> None:
    """A picture, of the kind that the path's ending says; PNG where it has none.

    Args:
        save: What writes it, such as `Image.save` or `Figure.savefig`: called with a path, the format and the options.

    Raises:
        ValueError: when it writes no such kind.
    """
    ending = Path(path).suffix.lower()
    kind = Image.registered_extensions().get(ending, ending[1:]) or "png"
    try:
        with replacing(path) as temporary:
            save(temporary, format=kind, **options)
    except KeyError as error:  # PIL's, of a format that it does not write
        raise ValueError(f"{path} cannot be a picture of that ending; give it another, such as .png.") from error


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """A sealed JSON file, of an object; `read_json` reads it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**content, "digest": UNSEALED}, indent=1) + "\n", encoding="utf-8")
        seal(temporary)


def read_json(path: str | Path) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        OSError, ValueError: when it cannot be read, or is not as it was written.
    """
    check_seal(path)
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if name != "digest"}


def seal(path: str | Path) -> None:
    """Put the digest of a file's other bytes in the place of `UNSEALED`."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        place = content.find(SEAL) + len(SEAL)
        content[place : place + 32] = _digest_around(content, place)


def check_seal(path: str | Path) -> None:
    """Refuse a file that is not as `seal` left it: each of its bytes counts.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it was changed, cut short, or never sealed.
    """
    with open(check_file(path), "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
        place = content.find(SEAL) + len(SEAL)
        if place < len(SEAL) or content[place : place + 32] != _digest_around(content, place):
            raise ValueError(f"{path} is not as it was written: it was changed, or cut short; make it again.")


def _digest_around(content: mmap.mmap | bytes, place: int) -> bytes:
    """The digest of all bytes but 32, as 32 hexadecimal digits."""
    hasher = hashlib.blake2b(digest_size=16)
    with memoryview(content) as view, view[:place] as before, view[place + 32 :] as after:
        hasher.update(before)
        hasher.update(after)
    return hasher.hexdigest().encode()


def write_tensors(
    path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> None:
    """A sealed safetensors file, the same bytes for the same content.

    Args:
        kind: What the file holds; `read_tensors` asks for it.
        metadata: What JSON can hold; it goes into the file's own metadata, with the version of this package.
    """
    strings = {"vtv_nnsight": package_version(), "kind": kind, "digest": UNSEALED, "facts": json.dumps(metadata)}
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, strings)
        _sort_metadata(temporary)
        seal(temporary)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: its writer's hash map has another one in every process."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise AssertionError(f"the header of {path} does not fit its place when it is sorted.")
        file.seek(8)
        file.write(text.ljust(length))


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file that `write_tensors` wrote.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not as it was written, or of another kind.
    """
    path = check_file(path)
    with refusing(path, "is not a complete safetensors file"), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("kind") != kind:
        raise ValueError(f"{path} holds {metadata.get('kind', 'something else')}; expected {kind}.")
    check_seal(path)
    with refusing(path, "is not a complete safetensors file"), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["facts"])  # noqa: SIM118


def physical_memory() -> float:
    """Bytes of this machine's memory; infinite where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return float("inf")


def package_version() -> str:
    """The version of this package; "unknown" where it is not installed."""
    try:
        return version("vtv-nnsight")
    except PackageNotFoundError:
        return "unknown"
