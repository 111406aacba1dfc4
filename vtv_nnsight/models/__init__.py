"""The models, one family each: plain torch first, then its traceable model.

    >>> model = load_model("BAAI/seggpt-vit-large")     # of whichever family the source is
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtv_nnsight.models.interface import InContextModel

FAMILIES = {
    "mae_vqgan": ("mae_vqgan.tracing", "MAEVQGAN"),
    "vit_mae": ("vit_mae", "ViTMAE"),
    "seggpt": ("painter", "SegGPT"),
    "painter": ("painter", "Painter"),
}
"""Kind of model → the module of its class, and its name. Kinds are transformers' `model_type`; Painter is a SegGPT
without type tokens."""


def load_model(source: str | os.PathLike = "tiny", **kwargs: Any) -> InContextModel:
    """The model of a source, of the family that its config or its weights tell.

    Args:
        source: "tiny" (the embedded MAE-VQGAN), a folder written by `save_pretrained`, a Hub id, or a published file.
        **kwargs: As for the model's class.

    Raises:
        ValueError, OSError: naming the source, and the families that there are.
    """
    source = os.fspath(source)
    module, name = FAMILIES[_family(source, kwargs)]
    return getattr(import_module(f"{__name__}.{module}"), name)(source, **kwargs)


def _family(source: str, kwargs: dict[str, Any]) -> str:
    from vtv_nnsight.models.folders import holds_numbers, read_model_type

    path = Path(source)
    if source == "tiny":
        return "mae_vqgan"
    if path.is_file() or path.suffix in (".pth", ".pt", ".ckpt"):
        from vtv_nnsight.models.checkpoint_files import read_tensors

        names = read_tensors(path)
        if "segment_token_x" not in names:
            return "mae_vqgan"
        return "seggpt" if "type_token_cls" in names else "painter"
    if source in ("BAAI/Painter", "BAAI/SegGPT"):  # repositories of one published file, without a config
        return "painter" if source == "BAAI/Painter" else "seggpt"
    if path.is_dir():
        family = read_model_type(path)
        if family == "seggpt" and not holds_numbers(path, "model.embeddings.type_token_semantic"):
            return "painter"
    else:
        from transformers import AutoConfig

        options = {name: kwargs[name] for name in ("revision", "token", "cache_dir") if name in kwargs}
        family = AutoConfig.from_pretrained(source, **options).model_type
    if family not in FAMILIES:
        raise ValueError(f"{source!r} is a {family} model; expected one of {', '.join(FAMILIES)}.")
    return family
