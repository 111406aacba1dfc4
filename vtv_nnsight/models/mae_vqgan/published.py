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

from vtv_nnsight.files import check_folder
from vtv_nnsight.models.devices import floating_dtype
from vtv_nnsight.models.mae_vqgan.config import MAX_LAYERS, MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.transformer import MAEVQGANModel
from vtv_nnsight.models.torch_files import StrPath, Tensors, cast, check_ranks, check_tensors, read_tensors

TOKENIZER = "vae."
"""What the names of the tokenizer's tensors begin with in a published `.pth`."""

_PATCHES = "patch_embed.proj.weight"
_SIZES = {
    "pos_embed": 3,
    _PATCHES: 4,
    "blocks.0.mlp.fc1.weight": 2,
    "decoder_embed.weight": 2,
    "decoder_pred.weight": 2,
}
_TOKENIZER_SIZES = {
    "quantize.embedding.weight": 2,
    "encoder.conv_in.weight": 4,
    "encoder.conv_out.weight": 4,
    "encoder.down.0.block.0.conv2.weight": 4,
}
"""The tensors that sizes are read off, and their ranks."""


def load_checkpoint(
    path: StrPath,
    vqgan: StrPath | None = None,
    *,
    num_attention_heads: int = 16,
    decoder_num_attention_heads: int = 16,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
) -> MAEVQGANModel:
    """The model of a published checkpoint, on the CPU, in eval mode.

    Args:
        path: The `.pth`: a dict whose "model" is the state dict.
        vqgan: The tokenizer's own checkpoint (a dict whose "state_dict" is), where `path` has none; where it has, this
            one is taken.
        num_attention_heads, decoder_num_attention_heads: The shapes do not tell; 16 in every published size.
        dtype: As for `from_pretrained`; None and "auto" keep the file's.
        attn_implementation: "sdpa" or "eager".

    Raises:
        FileNotFoundError: when a file is not there.
        ValueError: naming the file, and the tensors, when a file is truncated, is no checkpoint, is one of something
            else, lacks tensors or has some of other shapes, or when the tokenizer is nowhere or does not fit.
    """
    config, tensors = _describe(path, vqgan, num_attention_heads, decoder_num_attention_heads)
    config._attn_implementation = attn_implementation
    with torch.device("meta"):
        model = MAEVQGANModel(config)
    shapes = {_published(name): tuple(value.shape) for name, value in model.state_dict().items()}
    shapes |= {_PATCHES: (config.hidden_size, 3, config.patch_size, config.patch_size)}  # a convolution's
    check_tensors(shapes, tensors, path if vqgan is None else f"{path} with {vqgan}", "MAE-VQGAN")
    dtype = floating_dtype(dtype)
    state = {
        name: cast(tensors[_published(name)], dtype).reshape(value.shape) for name, value in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    config.dtype = model.dtype
    return model.eval()  # type: ignore[no-untyped-call]


def read_config(
    path: StrPath, vqgan: StrPath | None = None, *, num_attention_heads: int = 16, decoder_num_attention_heads: int = 16
) -> MAEVQGANConfig:
    """The sizes of a published checkpoint, read off the shapes of its tensors; no weights are read.

    Arguments and errors are `load_checkpoint`'s.
    """
    return _describe(path, vqgan, num_attention_heads, decoder_num_attention_heads)[0]


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


def _published(name: str) -> str:
    """The published name of a parameter of MAEVQGANModel."""
    part, rest = name.split(".", 1)
    if part == "vqgan":
        return TOKENIZER + rest.replace("codebook.", "quantize.embedding.")
    if part == "encoder" or rest == "mask_token":
        return rest
    return "decoder_" + rest.replace("head.", "pred.")


def _describe(
    path: StrPath, vqgan: StrPath | None, heads: int, decoder_heads: int
) -> tuple[MAEVQGANConfig, dict[str, torch.Tensor]]:
    """Sizes, and tensors by published name."""
    tensors = read_tensors(path)
    check_ranks(_SIZES, tensors, path, "not a MAE-VQGAN checkpoint")
    if vqgan is not None:
        tokenizer = read_tensors(vqgan)
        sizes = tokenizer_sizes(tokenizer, vqgan, "not a VQGAN checkpoint")
        tensors = {name: value for name, value in tensors.items() if not name.startswith(TOKENIZER)}
        tensors |= {TOKENIZER + name: value for name, value in tokenizer.items()}
    elif any(name.startswith(TOKENIZER) for name in tensors):
        sizes = tokenizer_sizes(tensors, path, "not a VQGAN checkpoint", TOKENIZER)
    else:
        raise ValueError(f"{path} has no tokenizer; give vqgan= the last.ckpt of vqgan_imagenet_f16_1024.")
    tensors = {name: value for name, value in tensors.items() if not name.startswith(f"{TOKENIZER}loss.")}
    return _config(tensors, sizes, path, vqgan or path, heads, decoder_heads), tensors


def _config(
    tensors: Tensors, tokenizer: dict[str, Any], path: StrPath, vqgan: StrPath, heads: int, decoder_heads: int
) -> MAEVQGANConfig:
    """The sizes of a model, by the shapes of its tensors, with those of its tokenizer."""
    _, num_positions, width = tensors["pos_embed"].shape
    patch = tensors[_PATCHES].shape[-1]
    decoder_width = tensors["decoder_embed.weight"].shape[0]
    grid = math.isqrt(max(num_positions - 1, 0))
    if grid**2 != num_positions - 1 or grid < 2:
        raise ValueError(f"{path}: pos_embed has {num_positions} positions; expected CLS and a square grid of patches.")
    num_codes, classes = tokenizer["num_codes"], tensors["decoder_pred.weight"].shape[0]
    if num_codes != classes:
        raise ValueError(f"the tokenizer of {vqgan} has {num_codes} codes but {path} predicts {classes}; give its own.")
    try:
        return MAEVQGANConfig(
            image_size=grid * patch,
            patch_size=patch,
            hidden_size=width,
            num_hidden_layers=count_modules("blocks.", tensors, path),
            num_attention_heads=heads,
            decoder_hidden_size=decoder_width,
            decoder_num_hidden_layers=count_modules("decoder_blocks.", tensors, path),
            decoder_num_attention_heads=decoder_heads,
            mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
            **tokenizer,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def tokenizer_sizes(tensors: Tensors, file: StrPath, kind: str, prefix: str = "") -> dict[str, Any]:
    """What a `MAEVQGANConfig` says of a tokenizer, by the shapes of its tensors.

    Args:
        tensors: What a file holds.
        file: The file.
        kind: What the file is not, where tensors are missing: "not a VQGAN checkpoint".
        prefix: What the names of the tokenizer's tensors begin with.

    Raises:
        ValueError: naming the file, when tensors are missing or no VQGAN has such sizes.
    """
    check_ranks({prefix + name: rank for name, rank in _TOKENIZER_SIZES.items()}, tensors, file, kind)
    channels, inputs = tensors[f"{prefix}encoder.conv_in.weight"].shape[:2]
    levels = [f"{prefix}encoder.down.{i}" for i in range(count_modules(f"{prefix}encoder.down.", tensors, file))]
    ends = [f"{level}.block.0.conv2.weight" for level in levels]
    check_ranks(dict.fromkeys(ends, 4), tensors, file, kind)
    widths = [tensors[name].shape[0] for name in ends]
    if odd := [size for size in (channels, *widths) if size % 32 or size % channels]:
        raise ValueError(f"the tokenizer of {file} has a level of {odd[0]} channels; expected multiples of {channels}.")
    num_codes, code_dim = tensors[f"{prefix}quantize.embedding.weight"].shape
    attending = (i for i, level in enumerate(levels) if count_modules(f"{level}.attn.", tensors, file))
    return {
        "num_codes": num_codes,
        "code_dim": code_dim,
        "vqgan_z_channels": tensors[f"{prefix}encoder.conv_out.weight"].shape[0],
        "vqgan_channels": channels,
        "vqgan_channel_multipliers": tuple(size // channels for size in widths),
        "vqgan_num_res_blocks": count_modules(f"{levels[0]}.block.", tensors, file),
        "vqgan_attention_levels": tuple(attending),
        "vqgan_fold": max(1, math.isqrt(inputs // 3)),
    }


def code_size(tokenizer: Mapping[str, Any]) -> int:
    """The pixels along a side of what a tokenizer of these sizes makes one code of."""
    return tokenizer["vqgan_fold"] * 2 ** (len(tokenizer["vqgan_channel_multipliers"]) - 1)


def count_modules(prefix: str, tensors: Tensors, file: StrPath, most: int = MAX_LAYERS) -> int:
    """How many modules of a list there are, by the names of their tensors.

    Raises:
        ValueError: when there are more than `most`.
    """
    numbers = (name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix))
    last = max((int(number) for number in numbers if number.isdecimal() and len(number) < 9), default=-1)
    if last >= most:
        raise ValueError(f"{file} declares {prefix}{last}; expected at most {most} of these.")
    return last + 1
