"""PyTorch's checkpoint files (`.pth`, `.ckpt`), read without running anything of them.

    >>> tensors = read_tensors("checkpoint-3400.pth")          # name → tensor

They are pickles, and pickles can run code. `torch.load` reads them here with a pickle module that imports nothing:
whatever they hold that is not a tensor becomes an inert placeholder. Weights stay on disk (memory-mapped,
copy-on-write) until somebody uses them, except those of files from before torch 1.6.

`weights_only=True` refuses a file that names anything of `os`, or an object like a list or a dict (Lightning's
hyperparameters), even when only its tensors are wanted.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch import nn
from torch.serialization import SourceChangeWarning

from vtv_nnsight.files import check_file, refusing
from vtv_nnsight.models.nnsight_compat import real_tensors
from vtv_nnsight.text import join_names

StrPath = str | os.PathLike[str]
Tensors = Mapping[str, torch.Tensor]
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that imports nothing.

    Args:
        file: A binary file; one pickle is read, from where it stands.
        known: (module, name) in a pickle → what stands for it.
        other: What stands for all other names; None refuses them.

    Raises:
        ValueError: from `load`, when the pickle names anything that is not known.
    """

    def __init__(self, file: BinaryIO, known: Mapping[tuple[str, str], Any], other: Any = None) -> None:
        super().__init__(file, encoding="latin-1")
        self._known, self._other = known, other

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a class or function that the pickle names."""
        known = self._known.get((module, name), self._other)
        if known is None:
            raise ValueError(f"it names {module}.{name}, which is neither a tensor nor an array; nothing of it was run")
        return known


def read_tensors(path: StrPath) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file by name: those under "model" or "state_dict", or its own. Of a file that holds a
    whole module, as DALL-E's tokenizer, those of the module's parameters and buffers.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file, when it is truncated, no checkpoint, or holds no state dict.
    """
    path = check_file(path)
    content = _read_file(path)
    if isinstance(content, _Inert):
        with refusing(path, "is no module that can be read"):
            content = _state_of(content)
    if isinstance(content, dict):
        content = next((content[key] for key in ("model", "state_dict") if key in content), content)
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no state dict; expected tensors by name under 'model' or 'state_dict'.")
    return tensors


def _read_file(path: Path) -> Any:
    """What a checkpoint file holds."""
    with path.open("rb") as file:
        head = file.read(24)
    zipped = head.startswith(b"PK")
    if not zipped and not head.startswith(_LEGACY_MAGIC):
        raise ValueError(f"{path} is not a PyTorch checkpoint: it begins with {head!r}.")
    with warnings.catch_warnings(), refusing(path, "is truncated or damaged"), real_tensors():
        warnings.simplefilter("ignore", SourceChangeWarning)  # of a pickled module's class, which is inert
        if zipped and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise ValueError("it is a program of TorchScript's, which torch.load would run")
        return torch.load(path, "cpu", PICKLES, weights_only=False, mmap=zipped)


def fill(
    module: nn.Module, tensors: Tensors, published: Callable[[str], str], source: StrPath, dtype: torch.dtype | None
) -> Any:
    """A module that was built on the meta device, with the weights of a file, in eval mode.

    Args:
        module: The module.
        tensors: What the file holds, by name.
        published: What the file calls a tensor of the module.
        source: The file.
        dtype: Of the weights; None keeps the file's.

    Raises:
        ValueError: naming the file and the tensors that are missing, unknown, of other shapes, or whole numbers.
    """
    names = {name: published(name) for name in module.state_dict()}
    shapes = {names[name]: list(value.shape) for name, value in module.state_dict().items()}
    misshapen = [
        (name, tensors[name].shape, shape)
        for name, shape in shapes.items()
        if name in tensors and list(tensors[name].shape) != shape
    ]
    missing, unknown = (
        (name for name in shapes if name not in tensors),
        (name for name in tensors if name not in shapes),
    )
    refuse_differences(source, missing, unknown, misshapen)
    for name in shapes:
        if not (kind := tensors[name].dtype).is_floating_point:
            raise ValueError(f"{source}: {name} of dtype {str(kind).removeprefix('torch.')}; expected floating point.")
    state = {name: tensors[released].to(dtype=dtype).contiguous() for name, released in names.items()}
    module.load_state_dict(state, assign=True)
    return module.eval()


def refuse_differences(
    source: StrPath,
    missing: Iterable[str],
    unknown: Iterable[str],
    misshapen: Iterable[tuple[str, Sequence[int], Sequence[int]]],
) -> None:
    """Say in one sentence how the tensors of a file or folder differ from those of a model, if they do.

    Args:
        source: The file or folder.
        missing: Names that the model has and the source lacks.
        unknown: Names that the source has and the model lacks.
        misshapen: Name, shape there and shape of the model, of those that differ.

    Raises:
        ValueError: naming the source and the tensors.
    """
    if names := list(missing):
        raise ValueError(f"{source}: {join_names(names)} missing; it is incomplete, or of another model.")
    if names := list(unknown):
        raise ValueError(f"{source}: {join_names(names)} unknown; it is of another model.")
    for name, shape, expected in misshapen:
        raise ValueError(f"{source}: {name} of shape {list(shape)}; the other sizes ask for {list(expected)}.")


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
    """The state dict of a pickled `torch.nn.Module`: parameters and buffers by name."""
    tensors: dict[str, Any] = {}
    state = module.state if isinstance(module.state, dict) else {}
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in state.get(kind, {}).items():
            inside = _state_of(value) if kind == "_modules" else {"": value}
            tensors |= {f"{name}.{rest}" if rest else name: part for rest, part in inside.items()}
    return tensors


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


class _CheckpointUnpickler(RestrictedUnpickler):
    """An unpickler in which all classes and functions but those that tensors are made of are `_Inert`."""

    def __init__(self, file: BinaryIO, **_: Any) -> None:
        super().__init__(file, _CHECKPOINT_NAMES, _Inert)


PICKLES = SimpleNamespace(
    __name__="restricted", Unpickler=_CheckpointUnpickler, load=lambda file, **_: _CheckpointUnpickler(file).load()
)
"""In the place of the module `pickle`, for `torch.load`."""
