"""Files that are whole or not there: written under a temporary name and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its name when the block ends without an error."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} in.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_tensors(path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """A safetensors file; `kind` and `facts` (JSON) go into its metadata, with the version of this package."""
    metadata = {"vtv_nnsight": package_version(), "kind": kind, "facts": json.dumps(facts)}
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the facts of a file that `write_tensors` wrote.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is incomplete, or of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != kind:
                raise ValueError(f"{path} holds {metadata.get('kind', 'something else')}; expected {kind}.")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["facts"])  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); make it again.") from error


def package_version() -> str:
    try:
        return version("vtv-nnsight")
    except PackageNotFoundError:
        return "unknown"
