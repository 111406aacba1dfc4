"""Where a model comes from: an embedded name, a folder, a file, or an id of the Hugging Face Hub. This is told here and
nowhere else.

    >>> locate("facebook/vit-mae-base")                # Place(kind="hub", path="facebook/vit-mae-base")
    >>> model = load_model("BAAI/seggpt-vit-large")    # of whichever family the source is
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import hf_hub_download
from safetensors import safe_open
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vtv_nnsight.files import refusing
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.models.torch_files import StrPath, read_tensors

EMBEDDED = "tiny"
"""The name of the model that the package carries."""
HUB = "hub:"
"""Before an id of the Hub, where a path could be meant."""
GGUF = ".gguf"
"""How the name of a file of a quantized language model ends."""
HUB_OPTIONS = ("token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")
"""Options of transformers' `from_pretrained` that say how files come from the Hub."""

FAMILIES = {
    "mae_vqgan": ("mae_vqgan.traced", "MAEVQGAN"),
    "vit_mae": ("vit_mae", "ViTMAE"),
    "seggpt": ("painter", "SegGPT"),
    "painter": ("painter", "Painter"),
    "beit": ("baselines.beit", "BEiT"),
    "net2net": ("baselines.net2net", "Net2Net"),
    "causal_lm": ("causal_lm", "CausalLM"),
}
"""Kind of model → the module of its class, and its name. Kinds are transformers' `model_type`; Painter is a SegGPT
without type tokens, Net2Net is not transformers' at all, and all causal language models are of one class."""
PAPERS = {
    "MAEVQGAN": "Bar et al., Visual Prompting via Image Inpainting, NeurIPS 2022",
    "ViTMAE": "He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022",
    "BEiT": "Bao et al., BEiT: BERT Pre-Training of Image Transformers, ICLR 2022",
    "Net2Net": "Esser et al., Taming Transformers for High-Resolution Image Synthesis, CVPR 2021",
    "SegGPT": "Wang et al., SegGPT: Towards Segmenting Everything in Context, ICCV 2023",
    "Painter": "Wang et al., Images Speak in Images, CVPR 2023",
}
"""Kind of model, as fingerprints have it → the paper that it is from."""
FAMILY_ARGUMENTS = {"remote": "causal_lm", "vqgan": "mae_vqgan", "tokenizer": "beit", "embedding_type": "seggpt"}
"""Arguments that one family alone takes → the family."""
RELEASED = {"BAAI/Painter": ("painter", "painter_vit_large.pth"), "BAAI/SegGPT": ("seggpt", "seggpt_vit_large.pth")}
"""Hub ids that hold one released file and no config → the family, and the file's name."""

WEIGHTS = "model.safetensors"


class Place(NamedTuple):
    """Where a source lies.

    Args:
        kind: "folder", "file" or "hub".
        path: The path, or the id on the Hub.
    """

    kind: Literal["folder", "file", "hub"]
    path: str


def locate(source: StrPath) -> Place:
    """Tell an embedded name, a folder, a file and a Hub id from each other. Nothing is read.

    Args:
        source: "tiny"; a path; or an id of the Hub, as "OWNER/NAME" or, whatever paths there are, "hub:OWNER/NAME".

    Raises:
        FileNotFoundError: when the embedded model is not there, or nothing at a path that begins with ., / or ~.
    """
    source = os.fspath(source)
    if source == EMBEDDED:
        folder = files("vtv_nnsight") / "weights" / EMBEDDED
        if missing := [name for name in ("config.json", WEIGHTS) if not (folder / name).is_file()]:
            raise FileNotFoundError(f'the embedded model "{EMBEDDED}" has no {" and no ".join(missing)} in {folder}.')
        return Place("folder", str(folder))
    if source.startswith(HUB):
        return Place("hub", source.removeprefix(HUB))
    path = Path(source)
    if path.suffix in (".pth", ".pt", ".ckpt", GGUF) or (path.exists() and not path.is_dir()):
        return Place("file", source)
    if source.startswith((".", "/", "~")) and not path.is_dir():
        raise FileNotFoundError(f"there is no folder {source}; give one that holds a model, or a Hub id.")
    return Place("folder" if path.is_dir() else "hub", source)


def load_model(source: StrPath = EMBEDDED, **kwargs: Any) -> InContextModel:
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
    for argument, owner in FAMILY_ARGUMENTS.items():
        if argument in kwargs and owner != family:
            raise ValueError(f"{argument}={str(kwargs[argument])!r} is for {FAMILIES[owner][1]}, not {name}.")
    return getattr(import_module(f"vtv_nnsight.models.{module}"), name)(source, **kwargs)


def family_of(source: str, **kwargs: Any) -> str:
    """Which of `FAMILIES` a source is of; arguments are those of `load_model`. No weights are read."""
    kind, path = locate(source)
    if Path(path).suffix == GGUF:
        return "causal_lm"
    if kind == "file":
        names = read_tensors(path)
        if "transformer.tok_emb.weight" in names:
            return "net2net"
        if "segment_token_x" not in names:
            return "mae_vqgan"
        return "seggpt" if "type_token_cls" in names else "painter"
    if path in RELEASED:
        return RELEASED[path][0]
    options = {name: kwargs[name] for name in ("revision", *HUB_OPTIONS) if name in kwargs}
    with naming(source):
        family = PretrainedConfig.get_config_dict(path, **options)[0].get("model_type")
    if family == "seggpt" and not _has_values(path, "model.embeddings.type_token_semantic"):
        return "painter"
    if family not in FAMILIES and family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal_lm"
    if family not in FAMILIES:
        raise ValueError(f"{source!r} is a {family} model; expected one of {', '.join(FAMILIES)}.")
    return family


@contextmanager
def naming(source: str) -> Iterator[None]:
    """What reading a config raises in the block, naming the source where the Hub's own message does not.

    Raises:
        OSError: the same, or one that says that there is no such folder either.
    """
    try:
        yield
    except OSError as error:
        if source in str(error):
            raise
        reason = " ".join(str(error).split("\n")[0].split())
        raise OSError(f"{source!r} is no folder or file here, nor to be had from the Hub: {reason}") from error


def fetch_released(source: str, **options: Any) -> str:
    """The path of the released file, where a source is a Hub id that holds nothing else; else the source."""
    path = locate(source).path
    return hf_hub_download(path, RELEASED[path][1], **options) if path in RELEASED else source


def _has_values(folder: StrPath, name: str) -> bool:
    """Whether a tensor of a folder's model.safetensors has a number that is not zero. True where it cannot be told."""
    file = Path(folder) / WEIGHTS
    if not file.exists():
        return True
    with refusing(file, "is truncated or damaged"), safe_open(file, "pt") as tensors:
        return name not in tensors.keys() or bool(tensors.get_tensor(name).any())  # noqa: SIM118
