"""Files that are whole or not there: written under a temporary name and renamed."""

from __future__ import annotations

import json
import os
import re
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


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its name when the block ends without an error.

    The file has the permissions that the user's new files have, whatever the writer in the block gives it.

    Raises:
        FileNotFoundError, IsADirectoryError: when there is no folder to write in, or a folder has that name.
    """
    path = Path(path)
    check_place(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        permissions = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(permissions)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_place(path: str | Path) -> None:
    """Refuse a path where no file can be written, with the errors of `replacing`."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} in.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder and a file was to be written there; name another, or remove it.")


def file_name(*parts: Any) -> str:
    """Words with hyphens between them, of letters, digits, dots and underscores."""
    return re.sub(r"[^\w.]+", "-", "-".join(map(str, parts)))


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


def write_tensors(
    path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> None:
    """A safetensors file, the same bytes for the same content.

    Args:
        kind: What the file holds; `read_tensors` asks for it.
        metadata: What JSON can hold; it goes into the file's own metadata, with the version of this package.
    """
    strings = {"vtv_nnsight": package_version(), "kind": kind, "facts": json.dumps(metadata)}
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, strings)
        _sort_metadata(temporary)


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
        ValueError: when it is incomplete, of another kind, without metadata, or too large for this machine's memory.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a file with {kind}.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    if path.stat().st_size > (memory := physical_memory()):
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes and this machine's memory {memory:,}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != kind:
                raise ValueError(f"{path} holds {metadata.get('kind', 'something else')}; expected {kind}.")
            content = json.loads(metadata.get("facts", "null"))
            if not isinstance(content, dict):
                raise ValueError(f"{path} lacks the metadata that belong to {kind}; make it again.")
            return {name: file.get_tensor(name) for name in file.keys()}, content  # noqa: SIM118
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has metadata that cannot be read ({error}); make it again.") from error
    except (SafetensorError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); make it again.") from error


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
