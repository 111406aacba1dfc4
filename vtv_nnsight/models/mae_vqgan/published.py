"""The papers' published files: a MAE-VQGAN `.pth`, and taming-transformers' `last.ckpt` for its tokenizer.

Nothing of them is run (see `models.torch_files`). No configuration travels with them, so every size is read off
the shapes of the tensors, and weights stay on disk until somebody uses them.

    >>> model = load_checkpoint("checkpoint-3400.pth")
    >>> model = load_checkpoint("checkpoint-3400.pth", vqgan="vqgan_imagenet_f16_1024/last.ckpt")
    >>> convert("checkpoint-3400.pth", "mae-vqgan")              # for MAEVQGANModel.from_pretrained("mae-vqgan")
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vtv_nnsight.files import check_folder, refusing
from vtv_nnsight.models.devices import floating_dtype
from vtv_nnsight.models.mae_vqgan.config import MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.transformer import MAEVQGANModel
from vtv_nnsight.models.torch_files import StrPath, Tensors, fill, read_tensors

TOKENIZER = "vae."
"""What the names of the tokenizer's tensors begin with in a published `.pth`."""
_PATCHES = "patch_embed.proj.weight"


def load_checkpoint(path: StrPath, vqgan: StrPath | None = None, *, dtype: Any = None, **heads: int) -> MAEVQGANModel:
    """The model of a published checkpoint, on the CPU, in eval mode.

    Args:
        path, vqgan, **heads: As for `describe`.
        dtype: As for `from_pretrained`; None and "auto" keep the file's.

    Raises:
        FileNotFoundError, ValueError: as `describe`; or when the file lacks tensors, or has some of other shapes.
    """
    config, tensors = describe(path, vqgan, **heads)
    with torch.device("meta"):
        model = MAEVQGANModel(config)
    fill(model, tensors, published_name, path if vqgan is None else f"{path} with {vqgan}", floating_dtype(dtype))
    config.dtype = model.dtype
    return model


def convert(path: StrPath, out_dir: StrPath, vqgan: StrPath | None = None, **kwargs: Any) -> Path:
    """Write a published checkpoint as a safetensors folder that `MAEVQGANModel.from_pretrained` reads.

    The folder appears only when it is complete.

    Args:
        path, vqgan, **kwargs: As for `load_checkpoint`.
        out_dir: A folder that does not exist yet, or is empty.

    Raises:
        FileExistsError: when there is something at `out_dir` already.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already and is not an empty folder; give a new name, or remove it.")
    save_whole(load_checkpoint(path, vqgan, **kwargs), out)
    return out


def save_whole(model: MAEVQGANModel, out: Path) -> None:
    """Write a model as a safetensors folder in the place of what is there, which stays until the new one is whole."""
    check_folder(out)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        new, old = Path(folder) / out.name, Path(folder) / "old"
        model.save_pretrained(new)
        if out.exists():
            out.rename(old)
        new.rename(out)


def published_name(name: str) -> str:
    """The published name of a parameter of MAEVQGANModel."""
    part, rest = name.split(".", 1)
    if part == "vqgan":
        return TOKENIZER + rest.replace("codebook.", "quantize.embedding.")
    if part == "encoder" or rest == "mask_token":
        return rest
    return "decoder_" + rest.replace("head.", "pred.")


def describe(
    path: StrPath, vqgan: StrPath | None = None, *, num_attention_heads: int = 16, decoder_num_attention_heads: int = 16
) -> tuple[MAEVQGANConfig, dict[str, torch.Tensor]]:
    """The sizes of a published checkpoint, read off the shapes of its tensors, and these, by published name, the
    convolution of patches as the linear map that it is.

    Args:
        path: The `.pth`: a dict with the state dict as "model".
        vqgan: The tokenizer's own checkpoint (a dict with it as "state_dict"), where `path` has none; where it has,
            this one is taken.
        num_attention_heads, decoder_num_attention_heads: The shapes do not tell; 16 in every published size.

    Raises:
        FileNotFoundError: when a file is not there.
        ValueError: naming the file, and the tensors, when a file is truncated, is no checkpoint, is one of something
            else, or when the tokenizer is nowhere or does not fit.
    """
    tensors = read_tensors(path)
    if vqgan is not None:
        tensors = {name: value for name, value in tensors.items() if not name.startswith(TOKENIZER)}
        tensors |= {TOKENIZER + name: value for name, value in read_tensors(vqgan).items()}
    elif "decoder_pred.weight" in tensors and not any(name.startswith(TOKENIZER) for name in tensors):
        raise ValueError(f"{path} has no tokenizer; give vqgan= the last.ckpt of vqgan_imagenet_f16_1024.")
    tensors = {name: value for name, value in tensors.items() if not name.startswith(f"{TOKENIZER}loss.")}
    tokenizer = tokenizer_sizes(tensors, vqgan or path, TOKENIZER)
    with refusing(path, "is not a MAE-VQGAN checkpoint"):
        _, num_positions, width = tensors["pos_embed"].shape
        *_, patch = tensors[_PATCHES].shape
        grid = math.isqrt(num_positions - 1)
        if grid**2 != num_positions - 1:
            raise ValueError(f"pos_embed has {num_positions} positions; expected CLS and a square grid of patches")
        if (classes := len(tensors["decoder_pred.weight"])) != tokenizer["num_codes"]:
            raise ValueError(f"it predicts {classes} codes, and its tokenizer has {tokenizer['num_codes']}")
        config = MAEVQGANConfig(
            image_size=grid * patch,
            patch_size=patch,
            hidden_size=width,
            num_hidden_layers=count_modules("blocks.", tensors),
            num_attention_heads=num_attention_heads,
            decoder_hidden_size=len(tensors["decoder_embed.weight"]),
            decoder_num_hidden_layers=count_modules("decoder_blocks.", tensors),
            decoder_num_attention_heads=decoder_num_attention_heads,
            mlp_ratio=len(tensors["blocks.0.mlp.fc1.weight"]) / width,
            **tokenizer,
        )
        tensors[_PATCHES] = tensors[_PATCHES].flatten(1)
    return config, tensors


def tokenizer_sizes(tensors: Tensors, file: StrPath, prefix: str) -> dict[str, Any]:
    """What a `MAEVQGANConfig` says of a tokenizer, by the shapes of its tensors.

    Args:
        tensors: What a file holds.
        file: The file.
        prefix: What the names of the tokenizer's tensors begin with.

    Raises:
        ValueError: naming the file, when tensors are missing or no VQGAN has such sizes.
    """
    with refusing(file, "is not a VQGAN checkpoint"):
        channels, inputs, *_ = tensors[f"{prefix}encoder.conv_in.weight"].shape
        levels = [f"{prefix}encoder.down.{i}" for i in range(count_modules(f"{prefix}encoder.down.", tensors))]
        widths = [len(tensors[f"{level}.block.0.conv2.weight"]) for level in levels]
        if odd := [size for size in (channels, *widths) if size % 32 or size % channels]:
            raise ValueError(f"it has a level of {odd[0]} channels; expected multiples of {channels}")
        num_codes, code_dim = tensors[f"{prefix}quantize.embedding.weight"].shape
        return {
            "num_codes": num_codes,
            "code_dim": code_dim,
            "vqgan_z_channels": len(tensors[f"{prefix}encoder.conv_out.weight"]),
            "vqgan_channels": channels,
            "vqgan_channel_multipliers": tuple(size // channels for size in widths),
            "vqgan_num_res_blocks": count_modules(f"{levels[0]}.block.", tensors),
            "vqgan_attention_levels": tuple(
                i for i, level in enumerate(levels) if count_modules(f"{level}.attn.", tensors)
            ),
            "vqgan_fold": max(1, math.isqrt(inputs // 3)),
        }


def code_size(tokenizer: Mapping[str, Any]) -> int:
    """The pixels along a side of what a tokenizer of these sizes makes one code of."""
    return tokenizer["vqgan_fold"] * 2 ** (len(tokenizer["vqgan_channel_multipliers"]) - 1)


def count_modules(prefix: str, tensors: Tensors) -> int:
    """How many modules of a list there are, by the names of their tensors."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})
