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
    "mae_vqgan": ("mae_vqgan.traced", "MAEVQGAN"),
    "vit_mae": ("vit_mae", "ViTMAE"),
    "seggpt": ("painter", "SegGPT"),
    "painter": ("painter", "Painter"),
    "beit": ("baselines.beit", "BEiT"),
    "net2net": ("baselines.net2net", "Net2Net"),
}
"""Kind of model → the module of its class, and its name. Kinds are transformers' `model_type`; Painter is a SegGPT
without type tokens, and Net2Net is not transformers' at all."""


PAPERS = {
    "MAEVQGAN": "Bar et al., Visual Prompting via Image Inpainting, NeurIPS 2022",
    "ViTMAE": "He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022",
    "BEiT": "Bao et al., BEiT: BERT Pre-Training of Image Transformers, ICLR 2022",
    "Net2Net": "Esser et al., Taming Transformers for High-Resolution Image Synthesis, CVPR 2021",
    "SegGPT": "Wang et al., SegGPT: Towards Segmenting Everything in Context, ICCV 2023",
    "Painter": "Wang et al., Images Speak in Images, CVPR 2023",
}
"""Kind of model, as fingerprints have it → the paper that it is from."""

OWN = {"vqgan": "mae_vqgan", "tokenizer": "beit", "embedding_type": "seggpt"}
"""Arguments that one family alone takes → the family."""


def load_model(source: str | os.PathLike = "tiny", **kwargs: Any) -> InContextModel:
    """The model of a source, of the family that its config or its weights tell.

    Args:
        source: "tiny" (the embedded MAE-VQGAN), a folder written by `save_pretrained`, a Hub id, or a published file.
        **kwargs: As for the model's class; None leaves an argument out.

    Raises:
        ValueError, OSError: naming the source and the families that there are, or an argument of another family.
    """
    source = os.fspath(source)
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    family = family_of(source, **kwargs)
    module, name = FAMILIES[family]
    for argument, owner in OWN.items():
        if argument in kwargs and owner != family:
            raise ValueError(
                f"{argument}={str(kwargs[argument])!r} is for {FAMILIES[owner][1]}, and {source!r} is a {name}; leave "
                "it out."
            )
    return getattr(import_module(f"{__name__}.{module}"), name)(source, **kwargs)


def family_of(source: str, **kwargs: Any) -> str:
    """Which of `FAMILIES` a source is of; arguments are those of `load_model`. No weights are read."""
    from vtv_nnsight.models.sources import holds_numbers, read_model_type
    from vtv_nnsight.models.torch_files import is_checkpoint, read_tensors

    path = Path(source)
    if source == "tiny":
        return "mae_vqgan"
    if is_checkpoint(source):
        names = read_tensors(path)
        if "transformer.tok_emb.weight" in names:
            return "net2net"
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

        from vtv_nnsight.models.canvas import HUB_OPTIONS, drop_none

        family = AutoConfig.from_pretrained(source, **drop_none(kwargs, "revision", *HUB_OPTIONS)).model_type
    if family not in FAMILIES:
        raise ValueError(f"{source!r} is a {family} model; expected one of {', '.join(FAMILIES)}.")
    return family
