"""Which devices and dtypes there are."""

from __future__ import annotations

from typing import Any

import torch

from vtv_nnsight.text import quoted

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""What transformers takes for a `device_map` besides devices."""


def available_devices() -> list[str]:
    """Names of this machine's devices: "cpu", and "cuda:0", "mps:0" and the like."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]


def resolve_device(device: str | int | torch.device) -> torch.device:
    """The device of that name, if there is one.

    Args:
        device: As for torch: "cuda" is the current one of its kind, an int the accelerator of that number.

    Raises:
        ValueError: naming the devices that there are.
    """
    names = available_devices()
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        place = torch.device("meta")  # which is nobody's
    first = place.type if place.type == "cpu" else f"{place.type}:0"
    if str(place) in names or (place.index in (None, 0) and first in names):
        return place
    raise ValueError(f"there is no device {quoted(str(device))} here; choose one of {', '.join(names)}.")


def remote_of(model: Any, remote: bool | str | None = None) -> bool | str:
    """Where a model runs, if not here: what the caller says, else what it was made with.

    Raises:
        ValueError: for a model that does not travel.
    """
    remote = getattr(model, "remote", False) if remote is None else remote
    if remote and not hasattr(model, "places"):
        raise ValueError(f"a {type(model).__name__} does not travel; its server must have this package (see the docs).")
    return remote


def device_of(model: Any, remote: bool | str = False) -> torch.device:
    """Where prompts must go. Loads the weights if they are not loaded yet; of a model that runs elsewhere, the CPU."""
    if (remote or getattr(model, "remote", False)) not in (False, "local"):
        return torch.device("cpu")
    if hasattr(model, "dispatch"):
        model.dispatch()
    return model.device


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
