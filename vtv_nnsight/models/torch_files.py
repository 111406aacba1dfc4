"""PyTorch's checkpoint files (`.pth`, `.ckpt`), read without running anything of them.

    >>> tensors = read_tensors("checkpoint-3400.pth")          # name → StoredTensor, no weights read
    >>> tensors["pos_embed"].shape, tensors["pos_embed"].read()

They are pickles, and pickles can run code. Nothing here can: the files' own code is never imported, and whatever they
hold that is not a tensor becomes an inert placeholder. A pickle that is small and stands for something enormous is
refused before it is read. Weights stay on disk (memory-mapped, copy-on-write) until somebody uses them.

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
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from vtv_nnsight.text import join_names

MAX_PICKLED, MAX_STEPS, MAX_PARTS, MAX_DEPTH = 2**28, 1_000_000, 50_000_000, 200
"""Bounds of a pickle: its bytes, its instructions, the parts of all the objects that are hashed or given to a function,
counted as often as they are referred to, and how deep they are nested. The published MAE-VQGAN needs 70 kB and 20,000
instructions."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        read: Map it into memory, or read it in another dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    _load: Callable[[torch.dtype | None], torch.Tensor]

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Map it into memory, or read it in another dtype."""
        return self._load(dtype)


def is_checkpoint(source: str | os.PathLike) -> bool:
    """Whether a source names one file of weights, as the papers published them."""
    return Path(source).suffix in (".pth", ".pt", ".ckpt") or Path(source).is_file()


def read_tensors(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint file by name: those under "model" or "state_dict", or its own. Of a file that holds a
    whole module, as DALL-E's tokenizer, those of the module's parameters and buffers.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file, when it is truncated, no checkpoint, or holds no state dict.
    """
    path = Path(path)
    content, starts = _parse(path)
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


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, StoredTensor], file: Path, what: str
) -> None:
    """Refuse the tensors of a file that are not those of a model: missing, unknown, of other shapes, or whole numbers.

    Args:
        shapes: Name → shape of all that the model has.
        what: What the model is called.

    Raises:
        ValueError: naming the file and the tensors.
    """
    if missing := [name for name in shapes if name not in tensors]:
        raise ValueError(f"{file}: {join_names(missing)} missing; the file is incomplete, or of another model.")
    if strange := [name for name in tensors if name not in shapes]:
        raise ValueError(f"{file}: {join_names(strange)} unknown to {what}; the file is of another model.")
    for name, shape in shapes.items():
        found = tensors[name]
        if tuple(found.shape) != tuple(shape):
            asked = f"the sizes of the other tensors ask for {list(shape)}"
            raise ValueError(f"{file}: {name} of shape {list(found.shape)}; {asked}.")
        if not found.dtype.is_floating_point:
            kind = str(found.dtype).removeprefix("torch.")
            raise ValueError(f"{file}: {name} of dtype {kind}; expected floating point.")


class Refused(ValueError):
    """A pickle that is not read, and why."""


def check_pickle(stream: BinaryIO) -> int:
    """Refuse a pickle whose objects, because they refer to each other again and again, are larger than any that a
    checkpoint holds; reading one could take hours.

    Follows what the instructions do to the stack, with the number of parts and the depth of each object in the place of
    the object.

    Returns:
        Where in the stream it ends; the stream is left where it was.

    Raises:
        Refused: saying which bound is passed.
    """
    start, handled = stream.tell(), 0
    stack, marks, memo = [], [], {}
    for step, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
        if step >= MAX_STEPS:
            raise Refused(f"it has more than {MAX_STEPS:,} instructions")
        name, before = instruction.name, instruction.stack_before
        if name == "MARK":
            marks.append(len(stack))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            held = len(before)
            if pickletools.markobject in before:
                held = before.index(pickletools.markobject) + len(stack) - marks.pop()
            parts = stack[len(stack) - held :]
            del stack[len(stack) - held :]
            if name not in _BUILDING:
                handled += sum(size for size, _ in parts)
            number = argument.bit_length() if isinstance(argument, int) else 0
            grown = parts.pop(0) if name in _GROWING else [1 + number // 64, 0]
            grown[0] += sum(size for size, _ in parts)
            grown[1] = max([grown[1], *(1 + depth for _, depth in parts)])
            if handled > MAX_PARTS or grown[0] > MAX_PARTS:
                raise Refused(f"its objects refer to each other so often that they have over {MAX_PARTS:,} parts")
            if grown[1] > MAX_DEPTH:
                raise Refused(f"its objects are nested more than {MAX_DEPTH} deep")
            stack += [grown] * len(instruction.stack_after)
    end = stream.tell()
    stream.seek(start)
    return end


_BUILDING = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "APPEND", "APPENDS", "POP", "POP_MARK")
"""Instructions that look into none of the objects that they take."""
_GROWING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
"""Instructions that put objects into one that there is already."""


def _read(mapped: mmap.mmap, stored: _Stored, span: range, dtype: torch.dtype | None) -> torch.Tensor:
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
    found, seen, waiting = {}, set(), [("", module)]
    while waiting:
        prefix, own = waiting.pop()
        if not isinstance(own, _Inert) or not isinstance(own.state, dict) or id(own) in seen:
            continue
        seen.add(id(own))
        for kind in ("_parameters", "_buffers", "_modules"):
            held = own.state.get(kind)
            named = [(f"{prefix}{name}", value) for name, value in held.items()] if isinstance(held, dict) else []
            if kind == "_modules":
                waiting += [(f"{name}.", value) for name, value in reversed(named)]
            else:
                found |= dict(named)
    return found


class _Unpickler(pickle.Unpickler):
    """An unpickler that imports nothing: tensors become `_Stored`, all other classes and functions `_Inert`."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin-1")
        self._file = file
        self.dtypes: dict[str, torch.dtype] = {}
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            **{("torch", name): dtype for name, dtype in DTYPES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        return self.known.get((module, name), _Inert)

    def persistent_load(self, pid: Any) -> Any:
        """("storage", class, key, device, elements, …) → key and dtype."""
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":  # ("module", class, file, source)
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 3 or not isinstance(pid[2], str):
            return _Inert()
        _, dtype, key, *_ = pid
        self.dtypes[key] = dtype
        return key, dtype

    def load(self) -> Any:
        check_pickle(self._file)
        return super().load()

    @staticmethod
    def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Stored | _Inert:
        """A tensor of a storage of numbers; anything else that is called one is not."""
        known = isinstance(storage, tuple) and isinstance(shape, tuple) and isinstance(stride, tuple)
        if not known or len(storage) != 2 or not isinstance(storage[1], torch.dtype):
            return _Inert()
        return _Stored(*storage, offset, shape, stride)


def _parse(path: Path) -> tuple[Any, dict[str, int]]:
    """What a checkpoint file holds, its tensors as `_Stored`; and where in the file each storage begins."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a checkpoint is one file (from_pretrained reads folders).")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(0)
        if not head.startswith((b"PK", _LEGACY_MAGIC)):
            raise ValueError(f"{path} is not a PyTorch checkpoint: it begins with {head[:24]!r}.")
        try:
            return _parse_zip(file) if head.startswith(b"PK") else _parse_legacy(file)
        except Refused as error:
            raise ValueError(f"{path} was refused: {error}. Nothing of it was run.") from error
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(
                f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged: {error or type(error).__name__}."
            ) from error


def _parse_zip(file: BinaryIO) -> tuple[Any, dict[str, int]]:
    with zipfile.ZipFile(file) as archive:
        (pickled,) = (name for name in archive.namelist() if name.split("/", 1)[-1] == "data.pkl")
        folder = pickled.removesuffix("data.pkl") + "data/"
        if archive.getinfo(pickled).file_size > MAX_PICKLED:
            raise Refused(f"its data.pkl has more than {MAX_PICKLED:,} bytes")
        content = _Unpickler(io.BytesIO(archive.read(pickled))).load()
        starts = {}
        for entry in archive.infolist():
            if entry.filename.startswith(folder) and entry.compress_type == zipfile.ZIP_STORED:
                file.seek(entry.header_offset + 26)
                starts[entry.filename.removeprefix(folder)] = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))
    return content, starts


def _parse_legacy(file: BinaryIO) -> tuple[Any, dict[str, int]]:
    for _ in ("magic number", "protocol", "system"):
        _Unpickler(file).load()
    unpickler = _Unpickler(file)
    content = unpickler.load()
    starts = {}
    for key in _Unpickler(file).load():
        (elements,) = struct.unpack("<q", file.read(8))
        starts[key] = file.tell()
        file.seek(elements * unpickler.dtypes[key].itemsize, os.SEEK_CUR)
    return content, starts
