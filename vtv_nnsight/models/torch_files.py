"""PyTorch's checkpoint files (`.pth`, `.ckpt`), read without running anything of them.

    >>> tensors = read_tensors("checkpoint-3400.pth")          # name → StoredTensor, no weights read
    >>> tensors["pos_embed"].shape, tensors["pos_embed"].read()

They are pickles, and pickles can run code. Nothing here can (see `restricted_pickle`): whatever they hold that is not a
tensor becomes an inert placeholder. Weights stay on disk (memory-mapped, copy-on-write) until somebody uses them.

`torch.load(weights_only=True, mmap=True)` is not used, because it cannot do three things that these files need. It
refuses a file that names anything of `os`, or an object like a list or a dict (Lightning's hyperparameters), even when
stand-ins are allowed for them and only the tensors are wanted. It cannot memory-map files from before torch 1.6. And
weights that are cast as they are read take 1.5 times the file, since its pages are never given back.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from vtv_nnsight.files import check_file
from vtv_nnsight.models.restricted_pickle import MAX_PICKLED, Refused, RestrictedUnpickler, refusing
from vtv_nnsight.text import join_names, quoted

StrPath = str | os.PathLike[str]


class StoredTensor(NamedTuple):
    """A tensor on disk: its shape, its dtype, and `read(dtype)`, which maps it into memory, or reads it in another
    dtype than its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[..., torch.Tensor]


def read_tensors(path: StrPath) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint file by name: those under "model" or "state_dict", or its own. Of a file that holds a
    whole module, as DALL-E's tokenizer, those of the module's parameters and buffers.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file, when it is truncated, no checkpoint, or holds no state dict.
    """
    path = Path(path)
    content, starts = _read_file(path)
    if isinstance(content, _Inert):
        content = _state_of(content)
    if isinstance(content, dict):
        content = next((content[key] for key in ("model", "state_dict") if key in content), content)
    entries = content.items() if isinstance(content, dict) else ()
    stored = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, _Stored)}
    if not stored:
        raise ValueError(f"{path} holds no state dict; expected tensors by name under 'model' or 'state_dict'.")
    size = path.stat().st_size
    if cut := [name for name, value in stored.items() if not value.fits(starts, size)]:
        raise ValueError(f"{path} is truncated or damaged: {join_names(cut)} should lie beyond its {size:,} bytes.")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {
        name: StoredTensor(value.shape, value.dtype, partial(_read, mapped, value, value.span(starts)))
        for name, value in stored.items()
    }


def check_ranks(ranks: Mapping[str, int], tensors: Mapping[str, StoredTensor], source: StrPath, kind: str) -> None:
    """Refuse a file in which tensors that sizes are read off are missing, or of another rank.

    Args:
        ranks: Name → number of dimensions.
        tensors: What the file holds.
        source: The file.
        kind: What the file is not, when they are missing: "not a MAE-VQGAN checkpoint".

    Raises:
        ValueError: naming the file and the tensors.
    """
    if missing := [name for name in ranks if name not in tensors]:
        raise ValueError(f"{source} is {kind}: it has no {join_names(missing)}, but {join_names(tensors)}.")
    for name, rank in ranks.items():
        shape = list(tensors[name].shape)
        if len(shape) != rank:
            raise ValueError(f"{source}: {name} has shape {shape}; expected {rank} dimensions.")
        if 0 in shape:
            raise ValueError(f"{source}: {name} has shape {shape}, which is empty.")


def check_tensors(
    shapes: Mapping[str, Sequence[int]], tensors: Mapping[str, StoredTensor], source: StrPath, model: str
) -> None:
    """Refuse the tensors of a file that are not those of a model: missing, unknown, of other shapes, or whole numbers.

    Args:
        shapes: Name → shape of all that the model has.
        tensors: What the file holds.
        source: The file.
        model: What the model is called.

    Raises:
        ValueError: naming the file and the tensors.
    """
    held = {name: tensors[name].shape for name in shapes if name in tensors}
    misshapen = [(name, shape, shapes[name]) for name, shape in held.items() if tuple(shape) != tuple(shapes[name])]
    missing, unknown = (
        (name for name in shapes if name not in tensors),
        (name for name in tensors if name not in shapes),
    )
    refuse_differences(source, model, missing, unknown, misshapen)
    for name in held:
        if not (dtype := tensors[name].dtype).is_floating_point:
            raise ValueError(f"{source}: {name} of dtype {str(dtype).removeprefix('torch.')}; expected floating point.")


def refuse_differences(
    source: StrPath,
    model: str,
    missing: Iterable[str],
    unknown: Iterable[str],
    misshapen: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    wanted_by: str = "the sizes of the other tensors",
) -> None:
    """Say in one sentence how the tensors of a file or folder differ from those of a model, if they do.

    Args:
        source: The file or folder.
        model: What the model is called.
        missing: Names that the model has and the source lacks.
        unknown: Names that the source has and the model lacks.
        misshapen: Name, shape there and shape of the model, of those that differ.
        wanted_by: What tells the shapes of the model.

    Raises:
        ValueError: naming the source and the tensors.
    """
    if names := list(missing):
        raise ValueError(f"{source}: {join_names(names)} missing; it is incomplete, or of another model.")
    if names := list(unknown):
        raise ValueError(f"{source}: {join_names(names)} unknown to {model}; it is of another model.")
    for name, shape, expected in misshapen:
        raise ValueError(f"{source}: {name} of shape {list(shape)}; {wanted_by} ask for {list(expected)}.")


def floating_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its name, such as "bfloat16"; None for None and "auto", which keep the file's.

    Raises:
        ValueError: when there is no such floating-point dtype.
    """
    if dtype is None or dtype == "auto":
        return None
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"dtype={quoted(dtype)} is unknown; give a floating-point one, such as float32 or bfloat16.")
    return named


def _read(mapped: mmap.mmap, stored: _Stored, span: range, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor on a private view of its file: read when it is used, and writing to it leaves the file as it is.

    In another dtype it is a copy, and the memory that held the file's part is given back.
    """
    if not span:
        return torch.empty(stored.shape, dtype=dtype or stored.dtype)
    aligned = span.start % stored.dtype.itemsize == 0
    source = mapped if aligned else bytearray(mapped[span.start : span.stop])
    count = len(span) // stored.dtype.itemsize
    values = torch.frombuffer(source, dtype=stored.dtype, count=count, offset=span.start if aligned else 0)
    values = values.as_strided(stored.shape, stored.stride).contiguous()
    if dtype in (None, stored.dtype):
        return values
    values = values.to(dtype)
    if hasattr(mapped, "madvise"):
        page = span.start - span.start % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, page, span.stop - page)
    return values


# torch's file formats. A pickle describes the objects and refers to storages by key; the storages' bytes lie elsewhere
# in the same file: in a zip archive as entries "<name>/data/<key>", before torch 1.6 one after another behind the
# pickles.

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


class _Stored(NamedTuple):
    """A tensor as its pickle describes it: elements of a storage."""

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def span(self, starts: Mapping[str, int]) -> range:
        """Its bytes in the file, by where each storage begins; a storage that is not there begins at infinity."""
        first = starts.get(self.key, sys.maxsize) + self.offset * self.dtype.itemsize
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride))
        return range(first, first + (0 if 0 in self.shape else last + 1) * self.dtype.itemsize)

    def fits(self, starts: Mapping[str, int], size: int) -> bool:
        """Whether it can lie in a file of that size: also when its strides show one element many times."""
        sound = all(type(n) is int and n >= 0 for n in (self.offset, *self.shape, *self.stride))
        return (
            sound
            and len(self.shape) == len(self.stride)
            and self.span(starts).stop <= size
            and math.prod(self.shape) * self.dtype.itemsize <= size
        )


class _Inert:
    """Stands for every class and function that a file names: it can be called, filled and given a state, and does
    nothing but keep the state."""

    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def _ignore(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    __call__ = __setitem__ = append = extend = add = update = _ignore

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state


def _state_of(module: _Inert) -> dict[str, Any]:
    """The state dict of a pickled `torch.nn.Module`: parameters and buffers by name. A module that is there twice has
    the first of its names."""
    tensors: dict[str, Any] = {}
    seen: set[int] = set()
    waiting = [("", module)]
    while waiting:
        prefix, current = waiting.pop()
        if not isinstance(current, _Inert) or not isinstance(current.state, dict) or id(current) in seen:
            continue
        seen.add(id(current))
        for kind in ("_parameters", "_buffers", "_modules"):
            held = current.state.get(kind)
            named = [(f"{prefix}{name}", value) for name, value in held.items()] if isinstance(held, dict) else []
            if kind == "_modules":
                waiting += [(f"{name}.", value) for name, value in reversed(named)]
            else:
                tensors |= dict(named)
    return tensors


class _CheckpointUnpickler(RestrictedUnpickler):
    """Tensors become `_Stored`, all classes and functions besides `_Inert`."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, _CHECKPOINT_NAMES)
        self.dtypes: dict[str, torch.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        return self._known.get((module, name), _Inert)

    def persistent_load(self, pid: Any) -> Any:
        """("storage", class, key, device, elements, …) → key and dtype."""
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":  # ("module", class, file, source)
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 3 or not isinstance(pid[2], str):
            return _Inert()
        _, dtype, key, *_ = pid
        self.dtypes[key] = dtype
        return key, dtype


def _stored_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Stored | _Inert:
    """A tensor of a storage of numbers; anything else that is called one is not."""
    tuples = isinstance(storage, tuple) and isinstance(shape, tuple) and isinstance(stride, tuple)
    if not tuples or len(storage) != 2 or not isinstance(storage[1], torch.dtype):
        return _Inert()
    return _Stored(storage[0], storage[1], offset, shape, stride)


_CHECKPOINT_NAMES = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _stored_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _stored_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
}


def _read_file(path: Path) -> tuple[Any, dict[str, int]]:
    """What a checkpoint file holds, its tensors as `_Stored`; and where in the file each storage begins."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a checkpoint is one file (from_pretrained reads folders).")
    with check_file(path).open("rb") as file:
        head = file.read(64)
        file.seek(0)
        if not head.startswith((b"PK", _LEGACY_MAGIC)):
            raise ValueError(f"{path} is not a PyTorch checkpoint: it begins with {head[:24]!r}.")
        with refusing(path, f"({path.stat().st_size:,} bytes) is truncated or damaged"):
            return _read_zip(file) if head.startswith(b"PK") else read_legacy(_mapped(file))


def _mapped(file: BinaryIO) -> Any:
    """A file that reads no more than it has, whatever is asked of it."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_zip(file: BinaryIO) -> tuple[Any, dict[str, int]]:
    with zipfile.ZipFile(file) as archive:
        (pickled,) = (name for name in archive.namelist() if name.split("/", 1)[-1] == "data.pkl")
        folder = pickled.removesuffix("data.pkl") + "data/"
        entry = archive.getinfo(pickled)
        if entry.file_size > MAX_PICKLED or entry.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"its data.pkl has {entry.file_size:,} bytes, is packed, or both, which torch does not do")
        content = _CheckpointUnpickler(io.BytesIO(archive.read(pickled))).load()
        starts = {}
        for entry in archive.infolist():
            if entry.filename.startswith(folder) and entry.compress_type == zipfile.ZIP_STORED:
                file.seek(entry.header_offset + 26)
                starts[entry.filename.removeprefix(folder)] = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))
    return content, starts


def read_legacy(file: Any) -> tuple[Any, dict[str, int]]:
    """What a file from before torch 1.6 holds, as `_read_file` gives it; of a storage by itself its key and dtype."""
    for _ in ("magic number", "protocol", "system"):
        _CheckpointUnpickler(file).load()
    unpickler = _CheckpointUnpickler(file)
    content = unpickler.load()
    starts = {}
    for key in _CheckpointUnpickler(file).load():
        (elements,) = struct.unpack("<q", file.read(8))
        starts[key] = file.tell()
        file.seek(elements * unpickler.dtypes[key].itemsize, os.SEEK_CUR)
    return content, starts
