"""The weights of a model, told from others by digests, for `vectors.compatibility.fingerprint`.

A digest is taken of all that the weights hold, so that no change escapes it.
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

_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any, dict[str, str]]] = weakref.WeakKeyDictionary()
"""A model → its weights, how they were when its digests were taken (see `_touched`), and the digests."""


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
    weights, touched, digests = _known.get(module, ((), None, {}))
    if cached and touched is not None and _touched(weights) == touched:
        return digests
    first = next(module.parameters(), None)
    tensors: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    if first is None or any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors.values()):
        return None
    with torch.no_grad(), unset_fake_temporarily():
        held = module.state_dict()
        digests = {name: _digest(held, dtype) for name, dtype in ROUNDED.items()}
    digests["dtype"] = str(first.dtype).removeprefix("torch.")
    weights = [weakref.ref(tensor) for tensor in tensors.values()]
    _known[module] = weights, _touched(weights), digests
    return digests


def _touched(tensors: Sequence[weakref.ref[torch.Tensor]]) -> list[Any] | None:
    """What PyTorch knows of tensors: where they lie, and how often they were written to; None when one is gone.
    Inference tensors have no count."""
    held = [tensor() for tensor in tensors]
    gone = any(tensor is None for tensor in held)
    return None if gone else [(t.data_ptr(), None if t.is_inference() else t._version) for t in held if t is not None]


def _digest(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> str:
    """A digest of tensors, their names and shapes; those that are floating point rounded to `dtype`."""
    hasher = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        hasher.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        hasher.update(tensor_bytes(tensor))
    return hasher.hexdigest()
