"""The files that the released code of *Finding Visual Task Vectors* (ECCV 2024) leaves behind, read safely.

    >>> vectors, residuals = read_activations(model, "outputs")            # {task}_mean_activations.pkl of a folder
    >>> patches = read_patches(model, "outputs/bernoullis_0_1_..._best.pkl")

Both are pickles, and pickles can run code. The reader here knows tensors and arrays only: a file that names anything
else is refused before anything of it runs.

The files hold heads after the output projection, each with the whole bias added: y = W z + b, with W the head's columns
of the projection. W has more rows than columns, so z = argmin |W z + b - y| recovers the head's own output.
"""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from vtv_nnsight.files import refusing
from vtv_nnsight.layouts import positions
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import QUERY_ONLY, ByStage
from vtv_nnsight.models.torch_files import PICKLES, RestrictedUnpickler, StrPath
from vtv_nnsight.patching import PatchSet, PatchSpace
from vtv_nnsight.vectors import TaskVector, TaskVectors
from vtv_nnsight.vectors.compatibility import fingerprint

ACTIVATIONS, BERNOULLIS = "_mean_activations.pkl", "bernoullis_"
TASKS = {"lowlight_enhance": "lowlight", "inpaint": "inpainting"}
"""Names of the released files → names of tasks, where they differ."""
MAX_RESIDUAL = 0.1
"""Activations with a residual of more than this share of their norm are another model's."""


def find(paths: StrPath | Iterable[StrPath]) -> tuple[list[Path], list[Path]]:
    """The files of mean activations and those of Bernoulli logits among some files and in some folders.

    Raises:
        FileNotFoundError: when a file or a folder is not there, or none is left.
        ValueError: when a file is called otherwise.
    """
    places = [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    every: list[Path] = []
    for path in places:
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}.")
        every += sorted(path.glob("*.pkl")) if path.is_dir() else [path]
    activations = [file for file in every if file.name.endswith(ACTIVATIONS)]
    bernoullis = [file for file in every if file.name.startswith(BERNOULLIS)]
    if misnamed := [file for file in places if file.is_file() and file not in activations + bernoullis]:
        raise ValueError(f"{misnamed[0]} is called neither TASK{ACTIVATIONS} nor {BERNOULLIS}….pkl.")
    if not activations + bernoullis:
        raise FileNotFoundError(
            f"there is no TASK{ACTIVATIONS} and no {BERNOULLIS}….pkl in {', '.join(map(str, places))}."
        )
    return activations, bernoullis


def read_activations(model: Any, paths: StrPath | Iterable[StrPath]) -> tuple[TaskVectors, dict[str, ByStage]]:
    """Task vectors of the released code's mean activations.

    Args:
        model: The MAEVQGAN that made them; its output projections are needed.
        paths: A folder, or some files named `{task}_mean_activations.pkl`. A file is a list of the number of prompts,
            the encoder's activations [layer, 1, token, head, width] and the decoder's, one-shot.

    Returns:
        The vectors, which have no variance; and task → by stage, the relative residual |W z + b - y| / |y - b|, of the
        order of the files' precision.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when a file names anything but tensors and arrays, is damaged, or is not of this model's outputs.
    """
    device_of(model)
    read = [_vector(model, path) for path in find(paths)[0]]
    return TaskVectors({vector.task: vector for vector, _ in read}), {v.task: residual for v, residual in read}


def read_patches(model: Any, path: StrPath, seed: int | None = None) -> PatchSet:
    """The patch set of the released code's Bernoulli logits, one a unit; their number tells the granularity.

    Args:
        model: The MAEVQGAN that they were found in.
        path: A file `bernoullis_….pkl`: a list of numbers.
        seed: None takes the units that are more likely in than out; a seed draws a sample, as the released evaluation
            does.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it names anything but arrays, is damaged, or has another number of logits than the model has
            units.
    """
    content = load(path)
    try:
        logits = torch.tensor([float(value) for value in content])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a list of logits; expected bernoullis_….pkl of the released code.") from error
    if logits.isnan().any():
        raise ValueError(f"{path} holds {int(logits.isnan().sum())} logits that are NaN.")
    spaces = [PatchSpace(model, granularity=granularity) for granularity in QUERY_ONLY]
    space = next((space for space in spaces if len(space) == len(logits)), None)
    if space is None:
        counts = ", ".join(f"{len(space)} by {space.granularity}" for space in spaces)
        raise ValueError(f"{path} holds {len(logits)} logits; this model has {counts}.")
    if seed is None:
        return PatchSet(space, logits > 0)
    return PatchSet(space, torch.rand(len(logits), generator=torch.Generator().manual_seed(seed)) < logits.sigmoid())


def load(path: StrPath) -> Any:
    """What a pickle holds, if that is tensors, arrays, numbers, text, and lists, tuples and dicts of those.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it names anything else, or is damaged. Nothing that it names is imported or called.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    with open(path, "rb") as file, refusing(path, "is truncated, damaged or no pickle"):
        return _plain(RestrictedUnpickler(file, _NAMES).load(), {})


def _vector(model: Any, path: Path) -> tuple[TaskVector, ByStage]:
    content = load(path)
    kinds = (int, torch.Tensor, torch.Tensor)
    if not isinstance(content, list) or len(content) != 3 or not all(map(isinstance, content, kinds)):
        raise ValueError(
            f"{path} is not [count, encoder activations, decoder activations] as the released code writes."
        )
    layout = model.layout
    means, residuals = ByStage(), ByStage()
    for stage, values, seen in zip(model.stages, content[1:], (layout.visible, layout.all_patches)):
        name, expected = stage.name, (stage.layers, 1, 1 + len(seen), stage.heads, stage.width)
        if values.shape not in (expected, (expected[0], *expected[2:])):
            raise ValueError(f"{path}: the {name}'s activations are {list(values.shape)}; expected {list(expected)}.")
        if not values.isfinite().all():
            raise ValueError(f"{path}: the {name}'s activations are not all finite (NaN or infinite).")
        outputs = enumerate(values.reshape(expected).squeeze(1))
        z, missed, total = zip(*(_recover(y, model.attention(name, layer).proj) for layer, y in outputs))
        means[name] = torch.full((stage.layers, layout.num_positions, stage.heads, stage.head_dim), torch.nan)
        means[name][:, positions(seen)] = torch.stack(z).float()
        residuals[name] = float((sum(missed) / sum(total)) ** 0.5)
        if residuals[name] > MAX_RESIDUAL:
            raise ValueError(
                f"{path}: the {name}'s activations are not outputs of this model's projections (residual "
                f"{residuals[name]:.2g} of their norm); give the checkpoint that made them."
            )
    task = path.name.removesuffix(ACTIVATIONS)
    vector = TaskVector(TASKS.get(task, task), means, None, content[0], fingerprint(model, layout))
    return vector, residuals


def _recover(y: torch.Tensor, proj: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer's y = W z + b, [token, head, width] → z [token, head, head_dim], |W z + b - y|² and |y - b|²."""
    weight, bias = (parameter.detach().cpu().double() for parameter in (proj.weight, proj.bias))
    weight = rearrange(weight, "width (head dim) -> head width dim", head=y.shape[1])
    y = rearrange(y.cpu().double() - bias, "token head width -> head width token")
    z = torch.linalg.lstsq(weight, y).solution
    missed = (weight @ z - y).square().sum()
    return rearrange(z, "head dim token -> token head dim"), missed, y.square().sum()


class _Dtype:
    """A numpy dtype as its pickle describes it."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def array(self, data: bytes | str) -> np.ndarray:
        """The numbers in some bytes, [number]; old pickles hold bytes as text."""
        if not isinstance(self.name, str) or self.name.lstrip("<>=|")[:1] not in set("biuf"):
            raise ValueError(f"it holds an array of dtype {self.name!r}, which is not a number's")
        dtype = np.dtype(self.order + self.name if self.order in ("<", ">") else self.name)
        return np.frombuffer(data.encode("latin-1") if isinstance(data, str) else data, dtype)


class _Array:
    """A numpy array as its pickle describes it: empty until it is given its state."""

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.array = dtype.array(data).reshape(shape, order="F" if fortran else "C")


def _storage(data: bytes) -> torch.Tensor:
    """The numbers of a storage that torch pickled: a small file in torch's old format."""
    try:
        storage = torch.load(io.BytesIO(data), "cpu", PICKLES, weights_only=False)
        return torch.empty(0, dtype=storage.dtype).set_(storage)
    except Exception as error:
        raise ValueError("it holds a storage that is damaged, or is more than numbers") from error


def _tensor(storage: torch.Tensor, offset: int, shape: Any, stride: Any, *_: Any) -> torch.Tensor:
    return storage.as_strided(shape, stride, offset).clone()  # which stays inside the storage


_NAMES = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): lambda text, _: text.encode("latin-1"),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}
for _core in ("numpy.core", "numpy._core"):
    _NAMES |= {
        (f"{_core}.multiarray", "_reconstruct"): _Array,
        (f"{_core}.multiarray", "scalar"): lambda dtype, data: dtype.array(data)[0],
        (f"{_core}.numeric", "_frombuffer"): lambda data, dtype, shape, order, *_: dtype.array(data).reshape(
            shape, order=order
        ),
    }
"""What tensors and arrays are made of, by the names that pickles have for it."""


def _plain(content: Any, seen: dict[int, Any]) -> Any:
    """Arrays in the place of `_Array`s, and lists in that of tuples, each once however often it is referred to."""
    if isinstance(content, _Array):
        return content.array
    if not isinstance(content, (list, tuple, dict)):
        return content
    if id(content) in seen:
        return seen[id(content)]
    if isinstance(content, dict):
        plain = seen[id(content)] = {}
        plain.update({key: _plain(value, seen) for key, value in content.items()})
        return plain
    items = seen[id(content)] = []
    items.extend(_plain(value, seen) for value in content)
    return items
