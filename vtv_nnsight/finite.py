"""Numbers that are numbers: NaN and infinity are refused where values come in, before they paint or score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


def check_finite(values: torch.Tensor | float, what: str, instead: str) -> None:
    """Refuse values of which one is NaN or infinite, in a sentence of what they are and what to do instead. Of tensors
    that are shapes alone nothing is known.

    Raises:
        ValueError: naming the first such value.
    """
    try:
        tensor = torch.as_tensor(values if isinstance(values, torch.Tensor) else float(values)).detach()
    except OverflowError:
        tensor = torch.tensor(math.inf)
    if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.sum().isfinite():
        return  # one pass over the values; a sum may be infinite though they are not
    if not (finite := tensor.isfinite()).all():
        raise ValueError(f"{what} {'is' if tensor.ndim == 0 else 'holds'} {tensor[~finite][0].item()}; {instead}.")


def check_whole(**values: Any) -> None:
    """Refuse counts and seeds that are no whole numbers, by their names, and seeds below 0.

    Raises:
        TypeError, ValueError: naming the first such value.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}={value!r} is no whole number; give one.")
        if name == "seed" and value < 0:
            raise ValueError(f"seed={value} is below 0; give 0 or more.")


def check_output(output: Any) -> None:
    """Refuse a network's output, a mapping of tensors, of which one is not finite: it would paint and score something.

    Raises:
        ValueError: naming the tensor.
    """
    for name, tensor in output.items() if isinstance(output, Mapping) else ():
        if isinstance(tensor, torch.Tensor):
            check_finite(tensor, f"the model's {name}", WHERE)


WHERE = "look for NaN and infinity in what is patched in, in edits and in the weights, or load them as torch.float32"
