"""The papers' published files: a MAE-VQGAN `.pth`, and taming-transformers' `last.ckpt` for its tokenizer.

Nothing of them is run (see `models.checkpoint_files`). No configuration travels with them, so every size is read off
the shapes of the tensors, and weights stay on disk until somebody uses them.

    >>> model = load_checkpoint("checkpoint-3400.pth")
    >>> model = load_checkpoint("checkpoint-3400.pth", vqgan="vqgan_imagenet_f16_1024/last.ckpt")
    >>> convert("checkpoint-3400.pth", "mae-vqgan")              # for MAEVQGANModel.from_pretrained("mae-vqgan")
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vtv_nnsight.models.mae_vqgan.config import MAX_LAYERS, MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.transformer import MAEVQGANModel
from vtv_nnsight.models.torch_files import StoredTensor, read_tensors
from vtv_nnsight.text import join_names

TOKENIZER = "vae."
"""What the names of the tokenizer's tensors begin with in a published `.pth`."""

_SIZES = {
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "blocks.0.mlp.fc1.weight": 2,
    "decoder_embed.weight": 2,
    "decoder_pred.weight": 2,
}
TOKENIZER_SIZES = {
    "vae.quantize.embedding.weight": 2,
    "vae.encoder.conv_in.weight": 4,
    "vae.encoder.conv_out.weight": 4,
    "vae.encoder.down.0.block.0.conv2.weight": 4,
}
"""The tensors that sizes are read off, and their ranks."""

PathLike = str | os.PathLike


def load_checkpoint(
    path: PathLike,
    vqgan: PathLike | None = None,
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
    expected = {name: (_published(name), value.shape) for name, value in model.state_dict().items()}
    _check(dict(expected.values()), tensors, Path(path), Path(vqgan) if vqgan is not None else None)
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else _floating(dtype)
    state = {name: tensors[published].read(dtype).reshape(shape) for name, (published, shape) in expected.items()}
    model.load_state_dict(state, assign=True)
    config.dtype = model.dtype
    return model.eval()


def read_config(
    path: PathLike,
    vqgan: PathLike | None = None,
    *,
    num_attention_heads: int = 16,
    decoder_num_attention_heads: int = 16,
) -> MAEVQGANConfig:
    """The sizes of a published checkpoint, read off the shapes of its tensors; no weights are read.

    Arguments and errors are `load_checkpoint`'s.
    """
    return _describe(path, vqgan, num_attention_heads, decoder_num_attention_heads)[0]


def convert(path: PathLike, out_dir: PathLike, vqgan: PathLike | None = None, **kwargs: Any) -> Path:
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
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        new, old = Path(folder) / out.name, Path(folder) / "old"
        model.save_pretrained(new)
        if out.exists():
            out.rename(old)
        new.rename(out)


def _published(name: str) -> str:
    """The published name of a parameter of MAEVQGANModel."""
    stack, rest = name.split(".", 1)
    if stack == "vqgan":
        return TOKENIZER + rest.replace("codebook.", "quantize.embedding.")
    if stack == "encoder" or rest == "mask_token":
        return rest
    return "decoder_" + rest.replace("head.", "pred.")


def _describe(
    path: PathLike, vqgan: PathLike | None, heads: int, decoder_heads: int
) -> tuple[MAEVQGANConfig, dict[str, StoredTensor]]:
    """Sizes, and tensors by published name."""
    path = Path(path)
    tensors = read_tensors(path)
    require(_SIZES, tensors, path, "a MAE-VQGAN checkpoint")
    if vqgan is not None:
        vqgan = Path(vqgan)
        tensors = {name: value for name, value in tensors.items() if not name.startswith(TOKENIZER)}
        tensors |= {TOKENIZER + name: value for name, value in read_tensors(vqgan).items()}
    elif not any(name.startswith(TOKENIZER) for name in tensors):
        raise ValueError(
            f"{path} has no tokenizer (no tensors under {TOKENIZER!r}); give vqgan= the last.ckpt of "
            "vqgan_imagenet_f16_1024 from taming-transformers."
        )
    require(TOKENIZER_SIZES, tensors, vqgan or path, "a VQGAN checkpoint", TOKENIZER if vqgan else "")
    tensors = {name: value for name, value in tensors.items() if not name.startswith(TOKENIZER + "loss.")}
    config = _config({name: value.shape for name, value in tensors.items()}, path, vqgan, heads, decoder_heads)
    return config, tensors


def _config(
    shapes: Mapping[str, tuple[int, ...]], path: Path, vqgan: Path | None, heads: int, decoder_heads: int
) -> MAEVQGANConfig:
    _, num_positions, width = shapes["pos_embed"]
    patch = shapes["patch_embed.proj.weight"][-1]
    decoder_width = shapes["decoder_embed.weight"][0]
    grid = math.isqrt(max(num_positions - 1, 0))
    if grid**2 != num_positions - 1 or grid < 2:
        raise ValueError(f"{path}: pos_embed has {num_positions} positions; expected CLS and a square grid of patches.")
    for stack, size, number, option in (
        ("blocks", width, heads, "num_attention_heads"),
        ("decoder_blocks", decoder_width, decoder_heads, "decoder_num_attention_heads"),
    ):
        if number < 1 or size % number:
            raise ValueError(f"{path}: {stack} of width {size} cannot have {number} heads; give {option}=.")

    tokenizer = f"the tokenizer of {vqgan or path}"
    advice = "give vqgan= the checkpoint of the VQGAN that the model was trained with."
    num_codes, classes = shapes["vae.quantize.embedding.weight"][0], shapes["decoder_pred.weight"][0]
    if num_codes != classes:
        raise ValueError(
            f"{tokenizer} has {num_codes} codes (quantize.embedding.weight) but {path} predicts {classes} "
            f"(decoder_pred.weight); {advice}"
        )
    levels, reduction = _reduction(shapes, vqgan or path)
    if reduction != patch:
        raise ValueError(
            f"{tokenizer} makes one code of {reduction}x{reduction} pixels ({levels} levels in encoder.down) but "
            f"{path} has patches of {patch}x{patch} (patch_embed.proj.weight); {advice}"
        )
    sizes = dict(
        image_size=grid * patch,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=_count("blocks.", shapes, path),
        num_attention_heads=heads,
        decoder_hidden_size=decoder_width,
        decoder_num_hidden_layers=_count("decoder_blocks.", shapes, path),
        decoder_num_attention_heads=decoder_heads,
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / width,
        **tokenizer_sizes(shapes, vqgan or path, "" if vqgan else TOKENIZER),
    )
    try:
        return MAEVQGANConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def tokenizer_sizes(shapes: Mapping[str, tuple[int, ...]], file: Path, shown: str = "") -> dict[str, Any]:
    """What a `MAEVQGANConfig` says of the tokenizer whose tensors have these shapes, by their names under "vae.".

    Args:
        file: Where they are from.
        shown: What their names begin with there.

    Raises:
        ValueError: naming the file, when tensors are missing or no VQGAN has such sizes.
    """
    levels, reduction = _reduction(shapes, file)
    channels = shapes["vae.encoder.conv_in.weight"][0]
    ends = [f"vae.encoder.down.{level}.block.0.conv2.weight" for level in range(levels)]
    if absent := [shown + name.removeprefix(TOKENIZER) for name in ends if name not in shapes]:
        raise ValueError(f"{file}: {join_names(absent)} missing; the file is incomplete.")
    widths = [shapes[name][0] for name in ends]
    if odd := [size for size in (channels, *widths) if size % 32 or size % channels]:
        raise ValueError(
            f"the tokenizer of {file} has a level of {odd[0]} channels (encoder.down); expected multiples of 32 and of "
            f"the first convolution's {channels}."
        )
    num_codes, code_dim = shapes["vae.quantize.embedding.weight"]
    return dict(
        num_codes=num_codes,
        code_dim=code_dim,
        vqgan_z_channels=shapes["vae.encoder.conv_out.weight"][0],
        vqgan_channels=channels,
        vqgan_channel_multipliers=tuple(size // channels for size in widths),
        vqgan_num_res_blocks=_count("vae.encoder.down.0.block.", shapes, file),
        vqgan_attention_levels=tuple(i for i in range(levels) if _count(f"vae.encoder.down.{i}.attn.", shapes, file)),
        vqgan_fold=reduction // 2 ** (levels - 1),
    )


def _reduction(shapes: Mapping[str, tuple[int, ...]], file: Path) -> tuple[int, int]:
    """The levels of a tokenizer, and the pixels along a side of what it makes one code of."""
    levels = _count("vae.encoder.down.", shapes, file)
    return levels, max(1, math.isqrt(shapes["vae.encoder.conv_in.weight"][1] // 3)) * 2 ** (levels - 1)


def _count(prefix: str, shapes: Mapping[str, tuple[int, ...]], file: Path) -> int:
    """How many modules of a list there are, by the names of their tensors."""
    numbers = (name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix))
    last = max((int(number) for number in numbers if number.isdecimal() and len(number) < 9), default=-1)
    if last >= MAX_LAYERS:
        raise ValueError(f"{file} declares {prefix}{last}; expected at most {MAX_LAYERS} of these.")
    return last + 1


def require(
    ranks: Mapping[str, int], tensors: Mapping[str, StoredTensor], file: Path, what: str, prefix: str = ""
) -> None:
    """Refuse a file in which tensors that sizes are read off are missing or of another rank."""
    if missing := [name.removeprefix(prefix) for name in ranks if name not in tensors]:
        held = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        raise ValueError(f"{file} is not {what}: it has no {join_names(missing)}, but {join_names(held)}.")
    for name, rank in ranks.items():
        shape = tensors[name].shape
        if len(shape) != rank:
            raise ValueError(
                f"{file}: {name.removeprefix(prefix)} has shape {list(shape)}; expected {rank} dimensions."
            )
        if 0 in shape:
            raise ValueError(f"{file}: {name.removeprefix(prefix)} has shape {list(shape)}, which is empty.")


def _check(
    shapes: Mapping[str, torch.Size], tensors: Mapping[str, StoredTensor], path: Path, vqgan: Path | None
) -> None:
    """Refuse tensors that are missing, unknown, or of other shapes or kinds than the model's (by published name)."""
    if missing := [name for name in shapes if name not in tensors]:
        raise ValueError(f"{_label(missing, path, vqgan)} missing; the file is incomplete, or of another model.")
    if strange := [name for name in tensors if name not in shapes]:
        raise ValueError(f"{_label(strange, path, vqgan)} unknown to MAE-VQGAN; the file is of another model.")
    for name, shape in shapes.items():
        found = tensors[name].shape
        if name == "patch_embed.proj.weight":
            found = (found[0], math.prod(found[1:]))
        if tuple(found) != tuple(shape):
            raise ValueError(
                f"{_label([name], path, vqgan)} of shape {list(tensors[name].shape)}; the sizes of the other tensors "
                f"ask for {list(shape)}."
            )
        if not tensors[name].dtype.is_floating_point:
            kind = str(tensors[name].dtype).removeprefix("torch.")
            raise ValueError(f"{_label([name], path, vqgan)} of dtype {kind}; expected floating point.")


def _floating(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={name!r} is unknown; give a floating-point one, such as float32 or bfloat16.")
    return dtype


def _label(names: list[str], path: Path, vqgan: Path | None) -> str:
    """Published names, those of the first one's file, as that file has them: "FILE: NAME, NAME and 3 more"."""
    if vqgan is None or not names[0].startswith(TOKENIZER):
        return f"{path}: {join_names(name for name in names if vqgan is None or not name.startswith(TOKENIZER))}"
    return f"{vqgan}: {join_names(name.removeprefix(TOKENIZER) for name in names if name.startswith(TOKENIZER))}"
