"""Names for what bytes, files, tensors and JSON values hold: equal content has equal ones, on every machine.

Weights have a faster one, beside the models (`models.digests`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch


def bytes_digest(content: bytes | memoryview, size: int = 16) -> str:
    """A name for some bytes: BLAKE2b of `size` bytes, as hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=size).hexdigest()


def file_digest(path: str | Path) -> str:
    """A name for what a file holds, that of `bytes_digest`, without reading the whole of it into memory.

    Raises:
        OSError: when it cannot be read.
    """
    hasher = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            hasher.update(part)
    return hasher.hexdigest()


def tensor_digest(*tensors: torch.Tensor) -> str:
    """A name for the shapes and values of tensors, on any device: 16 hexadecimal digits."""
    hasher = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        hasher.update(str(tuple(tensor.shape)).encode())
        hasher.update(tensor_bytes(tensor))
    return hasher.hexdigest()


def json_digest(value: Any) -> str:
    """A name for what JSON can hold: 16 hexadecimal digits, whatever the order of a dict's keys."""
    return bytes_digest(json.dumps(value, sort_keys=True).encode(), 8)


def text_number(value: object) -> int:
    """A number from 0 to 2^63 - 1 that stands for what is written of a value."""
    return int(bytes_digest(str(value).encode("utf-8", "replace"), 8), 16) >> 1


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor; of one that lies on another device, or not in one piece, that of a copy."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data  # the stride of a single value may be 0
