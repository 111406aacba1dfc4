"""The files of task vectors and of activations: the positions that are present, with the fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vtv_nnsight.files import read_tensors, refusing, write_tensors
from vtv_nnsight.finite import check_finite
from vtv_nnsight.models.interface import SITES, ByStage, Stage
from vtv_nnsight.vectors.compatibility import layout_of, stages_of

KIND = "task vectors"
FIELDS = ("mean", "variance")
ACTIVATIONS = "activations"

Content = Mapping[str, tuple[ByStage, ByStage | None, int]]
"""Name of a vector → its mean, variance and count."""


def write_vectors(path: str | Path, vectors: Content, fingerprint: dict[str, Any], dtype: torch.dtype) -> None:
    """Write task vectors of one fingerprint as a safetensors file.

    Raises:
        ValueError: when a value is NaN, or too large for the dtype.
    """
    tensors = {}
    for name, (mean, variance, _) in vectors.items():
        for key, present in present_positions(mean, f"the mean of {name!r}").items():
            tensors[f"{name}/{key}/present"] = present
            for field, values in zip(FIELDS, (mean, variance)):
                if values:
                    kept = values[key][:, present].to(dtype)
                    if not kept.isfinite().all():
                        raise ValueError(f"the {field} of {name!r} is not finite in {dtype}; save it as float32.")
                    tensors[f"{name}/{key}/{field}"] = kept
    counts = {name: count for name, (_, _, count) in vectors.items()}
    sites = list(next(iter(vectors.values()))[0].sites)
    write_tensors(path, KIND, tensors, {"counts": counts, "fingerprint": fingerprint, "sites": sites})


def read_vectors(path: str | Path) -> tuple[Content, dict[str, Any]]:
    """What `write_vectors` wrote, in float32, and the fingerprint.

    Raises:
        FileNotFoundError, ValueError: when there is no such file, it is incomplete or damaged, or it is something else.
    """
    tensors, metadata = read_tensors(path, KIND)
    with refusing(path, "holds no whole task vectors"):
        owner = metadata["fingerprint"]
        places = layout_of(owner).num_positions
        stages = [stage.at(site) for stage in stages_of(owner) for site in metadata["sites"]]

        def values(name: str, field: str) -> ByStage:
            return ByStage({stage.key: _read_values(tensors, name, field, stage, places) for stage in stages})

        vectors = {}
        for name, count in metadata["counts"].items():
            varied = f"{name}/{stages[0].key}/variance" in tensors
            vectors[name] = values(name, "mean"), values(name, "variance") if varied else None, count
    return vectors, owner


def _read_values(tensors: Mapping[str, torch.Tensor], name: str, field: str, stage: Stage, places: int) -> torch.Tensor:
    """A field of a vector at a stage's site, from the tensors of a file."""
    values, present = tensors[f"{name}/{stage.key}/{field}"], tensors[f"{name}/{stage.key}/present"]
    expected = [stage.layers, int(present.sum()), stage.heads, stage.head_dim][: 4 if field == "mean" else 3]
    if present.shape != (places,) or list(values.shape) != expected:
        raise ValueError(f"{name}/{stage.key}/{field} has shape {list(values.shape)} of {places:,}, not {expected}")
    check_finite(values, f"{name}/{stage.key}/{field}", "make it again")
    return scatter(values.float(), present.nonzero()[:, 0], places)


def write_activations(path: str | Path, activations: ByStage, fingerprint: dict[str, Any]) -> None:
    """Write single prompts' activations as a safetensors file.

    Raises:
        ValueError: when one is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    places = max((values.shape[2] for values in activations.values()), default=0)
    for key, values in activations.items():
        there = ~values.isnan().flatten(-2).all(-1)
        layers, positions = (there.any(0).any(dim).nonzero()[:, 0] for dim in (1, 0))
        tensors |= {f"{key}/layers": layers, f"{key}/positions": positions}
        tensors[f"{key}/values"] = values[:, layers][:, :, positions]
        check_finite(values[there], f"what was captured of the {key}", "look for NaN in the model's weights")
    write_tensors(path, ACTIVATIONS, tensors, {"fingerprint": fingerprint, "places": places})


def read_activations(path: str | Path) -> tuple[ByStage, dict[str, Any]]:
    """What `write_activations` wrote, and the fingerprint.

    Raises:
        FileNotFoundError, ValueError: when there is no such file, it is incomplete or damaged, or it is something else.
    """
    tensors, metadata = read_tensors(path, ACTIVATIONS)
    with refusing(path, "holds no whole activations"):
        owner, places, activations = metadata["fingerprint"], metadata["places"], ByStage()
        for stage in (stage.at(site) for stage in stages_of(owner) for site in SITES):
            if f"{stage.key}/values" not in tensors:
                continue
            values, layers, positions = (tensors[f"{stage.key}/{name}"] for name in ("values", "layers", "positions"))
            expected = (len(values), len(layers), len(positions), stage.heads, stage.head_dim)
            if values.shape != expected or not _within(layers, stage.layers) or not _within(positions, places):
                raise ValueError(f"{stage.key}/values has shape {list(values.shape)}, not {list(expected)}")
            full = values.new_full((len(values), stage.layers, places, *expected[3:]), torch.nan)
            full[:, layers[:, None], positions] = values
            activations[stage.key] = full
        if len({len(values) for values in activations.values()}) != 1:
            raise ValueError("it has no rows, or not as many of each stage")
    return activations, owner


def _within(numbers: torch.Tensor, count: int) -> bool:
    return numbers.dtype == torch.long and bool(((numbers >= 0) & (numbers < count)).all())


def check_floating(values: ByStage, label: str, axes: str) -> None:
    """Refuse, as a TypeError, values that are not floating-point tensors of these axes."""
    for key, tensor in values.items():
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != axes.count(",") + 1:
            given = list(tensor.shape) if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
            raise TypeError(f"{label} is {given} at the {key}; give a tensor {axes}.")
        if not tensor.is_floating_point():
            raise TypeError(f"{label} is {tensor.dtype} at the {key}, which drops fractions; give floating point.")


def present_positions(mean: ByStage, label: str = "the vector") -> ByStage:
    """By stage, bool [position]: the positions of means [layer, position, head, head_dim] that are not absent, which is
    NaN throughout.

    Raises:
        ValueError: when a position is neither absent nor finite throughout.
    """
    absent = mean.map(lambda values: values.isnan().flatten(2).all(-1).all(0))
    for key, values in mean.items():
        bad = ~values.isfinite().all(-1) & ~absent[key][:, None]
        if bad.any():
            layer, position, head = bad.nonzero()[0]
            where = f"layer {layer}, position {position} and head {head} of the {key}"
            raise ValueError(f"{label} is not finite at {where}; look for NaN and infinity where it was made.")
    return absent.map(torch.logical_not)


def scatter(values: torch.Tensor, at: torch.Tensor, places: int) -> torch.Tensor:
    """[layer, token, ...] → [layer, position, ...], NaN at the positions that no token has."""
    out = values.new_full((len(values), places, *values.shape[2:]), torch.nan)
    out[:, at] = values
    return out
