"""Model folders as `save_pretrained` writes them, looked at before transformers reads them: what is damaged, or lies,
is said in one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_folder(folder: str | os.PathLike) -> None:
    """Refuse a folder whose safetensors files are missing, cut or damaged, hold whole numbers, or are not those that
    its index tells of. Only their headers are read.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).exists():
        _names(folder / WEIGHTS)
    elif (folder / INDEX).exists():
        _check_index(folder)
    elif not any(folder.glob("*.bin")):
        raise ValueError(f"{folder} has no {WEIGHTS}; a model folder has one beside its config.json.")


def read_model_type(folder: str | os.PathLike) -> str:
    """The kind of model that a folder's config.json tells of.

    Raises:
        FileNotFoundError, ValueError: when there is no config.json, or it is not one.
    """
    return _json(Path(folder) / "config.json", "model_type", str)


def holds_numbers(folder: str | os.PathLike, name: str) -> bool:
    """Whether a tensor of a folder's model.safetensors has a number that is not zero. True where it cannot be told."""
    file = Path(folder) / WEIGHTS
    if not file.exists() or name not in _names(file):
        return True
    with safe_open(file, "pt") as tensors:
        return bool(tensors.get_tensor(name).any())


def _check_index(folder: Path) -> None:
    shards: dict[str, set[str]] = {}
    for name, shard in _json(folder / INDEX, "weight_map", dict).items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{folder / INDEX} looks for {name} in {shard!r}; expected a file of its folder.")
        if shard not in shards:
            if not (folder / shard).exists():
                raise ValueError(f"{folder / INDEX} looks for {name} in {shard}, which is not there.")
            shards[shard] = _names(folder / shard)
        if name not in shards[shard]:
            raise ValueError(f"{folder / INDEX} looks for {name} in {shard}, which does not have it.")


def _names(file: Path) -> set[str]:
    """The tensors in a file, all of floating point."""
    try:
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
            kinds = {name: tensors.get_slice(name).get_dtype() for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated, damaged or no safetensors file: {error}.") from error
    if whole := [name for name, kind in kinds.items() if not kind.startswith(("F", "BF"))]:
        raise ValueError(f"{file}: {whole[0]} holds {kinds[whole[0]]}; expected floating point.")
    return names


def _json(file: Path, key: str, kind: type) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; expected a folder that save_pretrained wrote.")
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(content, dict) or not isinstance(content.get(key), kind):
        raise ValueError(f"{file} does not say its {key}; it is damaged, or of something else.")
    return content[key]
