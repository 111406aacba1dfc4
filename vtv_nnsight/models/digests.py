"""The weights of a model, told from others by digests, for `vectors.compatibility.fingerprint`.

A digest is taken of all that the weights hold, so that no change escapes it, in one pass over the modules and one over
the memory. Rounding comes after, once for the same numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from vtv_nnsight.digests import tensor_bytes
from vtv_nnsight.models.nnsight_compat import network_of

ROUNDED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that weights are rounded to before they are told apart."""

_known: weakref.WeakKeyDictionary[nn.Module, tuple[_Touched, dict[str, str]]] = weakref.WeakKeyDictionary()
"""A model → its weights as they were when its digests were taken, and the digests."""


def weight_digests(model: Any, *, cached: bool = False) -> dict[str, str] | None:
    """The dtype of a model's weights, and a digest of all that `state_dict` holds in each of the `ROUNDED` dtypes; None
    while they are not loaded.

    Args:
        model: An nnsight model.
        cached: Take those that were made before, unless PyTorch knows that a tensor was written to, moved or dropped
            since. No numbers are read then, and not seen are writes that PyTorch does not count, into `parameter.data`
            and NumPy's views, and tensors that others stand in for while they are kept elsewhere.
    """
    module = network_of(model)
    if cached and module in _known and _known[module][0].is_as_it_was():
        return _known[module][1]
    first = next(module.parameters(), None)
    tensors: dict[str, torch.Tensor] = {}
    _gather(module, "", tensors)
    if first is None or any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors.values()):
        return None
    with torch.no_grad(), unset_fake_temporarily():
        exact = hash(tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())), _read(tensors)
        if exact not in _rounded:
            held = module.state_dict()
            _rounded[exact] = {name: _digest(held, dtype) for name, dtype in ROUNDED.items()}
    digests = {"dtype": str(first.dtype).removeprefix("torch."), **_rounded[exact]}
    _known[module] = _Touched(list(tensors.values())), digests
    return digests


class _Touched:
    """What PyTorch knows of tensors: where they lie, and how often they were written to."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = [weakref.ref(tensor) for tensor in tensors]
        # Inference tensors have no count.
        self.counted = [weakref.ref(tensor) for tensor in tensors if not tensor.is_inference()]
        self.state = self._state()

    def is_as_it_was(self) -> bool:
        return self._state() == self.state

    def _state(self) -> tuple[list[int], list[int]] | None:
        """None when one of them is gone."""
        try:
            places = [tensor().data_ptr() for tensor in self.tensors]  # type: ignore[union-attr]
            return places, [tensor()._version for tensor in self.counted]  # type: ignore[union-attr]
        except AttributeError:  # of None, which a reference to a dead tensor gives
            return None


def _gather(module: nn.Module, path: str, tensors: dict[str, torch.Tensor]) -> None:
    """Parameters and buffers by name, as `state_dict` finds them and without what makes it four times slower."""
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                tensors[path + name] = tensor
    for name, child in module._modules.items():
        if child is not None:
            _gather(child, f"{path}{name}.", tensors)


def _read(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of the numbers of tensors."""
    hasher = xxhash.xxh3_128()
    for tensor in tensors.values():
        hasher.update(tensor_bytes(tensor))
    return hasher.hexdigest()


_rounded: dict[tuple[int, str], dict[str, str]] = {}
"""Hash of names, shapes and dtypes, and digest of tensors as they are → their digests in each of the `ROUNDED`
dtypes. Rounding takes most of the time."""


def _digest(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> str:
    """A digest of tensors, their names and shapes; those that are floating point rounded to `dtype`."""
    hasher = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        hasher.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        hasher.update(tensor_bytes(tensor))
    return hasher.hexdigest()
