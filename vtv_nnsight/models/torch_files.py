"""PyTorch's checkpoint files (`.pth`, `.ckpt`), read without running anything of them.

    >>> tensors = read_tensors("checkpoint-3400.pth")          # name → tensor

They are pickles, and pickles can run code. `torch.load` reads them here with a pickle module that imports nothing (see
`restricted_pickle`): whatever they hold that is not a tensor becomes an inert placeholder. Weights stay on disk
(memory-mapped, copy-on-write) until somebody uses them, except those of files from before torch 1.6.

`weights_only=True` refuses a file that names anything of `os`, or an object like a list or a dict (Lightning's
hyperparameters), even when only its tensors are wanted.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch.serialization import SourceChangeWarning

from vtv_nnsight.files import check_file
from vtv_nnsight.models.nnsight_compat import real_tensors
from vtv_nnsight.models.restricted_pickle import MAX_PICKLED, Refused, RestrictedUnpickler, refusing
from vtv_nnsight.text import join_names

StrPath = str | os.PathLike[str]
Tensors = Mapping[str, torch.Tensor]
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


def read_tensors(path: StrPath) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file by name: those under "model" or "state_dict", or its own. Of a file that holds a
    whole module, as DALL-E's tokenizer, those of the module's parameters and buffers.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file, when it is truncated, no checkpoint, or holds no state dict.
    """
    path = Path(path)
    content = _read_file(path)
    if isinstance(content, _Inert):
        content = _state_of(content)
    if isinstance(content, dict):
        content = next((content[key] for key in ("model", "state_dict") if key in content), content)
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no state dict; expected tensors by name under 'model' or 'state_dict'.")
    size = path.stat().st_size
    if cut := [name for name, value in tensors.items() if math.prod(value.shape) * value.itemsize > size]:
        raise ValueError(f"{path} is truncated or damaged: {join_names(cut)} should lie beyond its {size:,} bytes.")
    return tensors


def _read_file(path: Path) -> Any:
    """What a checkpoint file holds."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a checkpoint is one file (from_pretrained reads folders).")
    options: Any = {"map_location": "cpu", "pickle_module": PICKLES, "weights_only": False}
    with check_file(path).open("rb") as file:
        head = file.read(64)
        if not head.startswith((b"PK", _LEGACY_MAGIC)):
            raise ValueError(f"{path} is not a PyTorch checkpoint: it begins with {head[:24]!r}.")
        with (
            warnings.catch_warnings(),
            refusing(path, f"({path.stat().st_size:,} bytes) is truncated or damaged"),
            real_tensors(),
        ):
            warnings.simplefilter("ignore", SourceChangeWarning)  # of a pickled module's class, which is inert
            if head.startswith(b"PK"):
                _check_zip(file)
                return torch.load(path, mmap=True, **options)
            # mapped, it reads no more than there is, whatever is asked of it
            mapped: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return torch.load(mapped, **options)


def _check_zip(file: BinaryIO) -> None:
    """Refuse an archive that torch does not write: packed ones, and programs, which `torch.load` would run."""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name = entry.filename.split("/", 1)[-1]
            if entry.compress_type != zipfile.ZIP_STORED or (name == "data.pkl" and entry.file_size > MAX_PICKLED):
                raise Refused(f"its {name} has {entry.file_size:,} bytes, is packed, or both, which torch does not do")
    if "constants.pkl" in torch._C.PyTorchFileReader(file.name).get_all_records():
        raise Refused("it is a program of TorchScript's")


def cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor in one piece, in another dtype; None keeps its own."""
    return tensor.to(dtype=dtype).contiguous()


def check_ranks(ranks: Mapping[str, int], tensors: Tensors, source: StrPath, kind: str) -> None:
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


def check_tensors(shapes: Mapping[str, Sequence[int]], tensors: Tensors, source: StrPath, model: str) -> None:
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


class _Inert:
    """Stands for every class and function that a file names: it can be called, filled and given a state, and does
    nothing but keep the state."""

    state: Any = None
    dump_patches = False

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
    """An unpickler in which all classes and functions but those that tensors are made of are `_Inert`."""

    def __init__(self, file: BinaryIO, **_: Any) -> None:
        super().__init__(file, _CHECKPOINT_NAMES)

    def find_class(self, module: str, name: str) -> Any:
        return self._known.get((module, name), _Inert)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> torch.Tensor | _Inert:
    """A tensor of a storage of numbers; anything else that is called one is not."""
    try:
        return torch.empty(0, dtype=storage.dtype).set_(storage, offset, shape, stride)
    except (AttributeError, TypeError):
        return _Inert()


_CHECKPOINT_NAMES = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}
PICKLES = SimpleNamespace(
    __name__="restricted", Unpickler=_CheckpointUnpickler, load=lambda file, **_: _CheckpointUnpickler(file).load()
)
"""In the place of the module `pickle`, for `torch.load`."""
