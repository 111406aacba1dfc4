"""The released files of Painter and SegGPT (`.pth`): their names of tensors, and sizes read off their shapes.

Nothing of them is run (see `torch_files`).
"""

from __future__ import annotations

import math

import torch
from transformers import SegGptConfig, SegGptForImageSegmentation

from vtv_nnsight.models.torch_files import StrPath, Tensors, cast, check_ranks, check_tensors

TYPE_TOKENS = ("type_token_cls", "type_token_ins")
"""SegGPT's tokens for "semantic" and "instance", as released; Painter has none."""

_NAMES = (
    ("model.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("model.embeddings.position_embeddings", "pos_embed"),
    ("model.embeddings.segment_token_input", "segment_token_x"),
    ("model.embeddings.segment_token_prompt", "segment_token_y"),
    ("model.embeddings.type_token_semantic", "type_token_cls"),
    ("model.embeddings.type_token_instance", "type_token_ins"),
    ("model.embeddings.", ""),
    ("model.encoder.layers", "blocks"),
    ("model.encoder.layernorm", "norm"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention", "attn"),
    ("mlp.lin", "mlp.fc"),
    ("decoder.decoder_embed", "decoder_embed"),
    ("decoder.decoder_pred.conv", "decoder_pred.0"),
    ("decoder.decoder_pred.layernorm", "decoder_pred.1"),
    ("decoder.decoder_pred.head", "decoder_pred.3"),
)
"""Parts of transformers' names, and of the released ones."""


def released_name(name: str) -> str:
    """What the released files call a tensor of transformers'."""
    for part, released in _NAMES:
        name = name.replace(part, released)
    return name


_SIZES = {
    "segment_token_x": 4,
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "blocks.0.attn.rel_pos_h": 2,
    "blocks.0.attn.rel_pos_w": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "decoder_embed.weight": 2,
    "decoder_pred.0.weight": 4,
}
"""The tensors that sizes are read off, and their ranks."""


def config_of(tensors: Tensors, source: StrPath) -> SegGptConfig:
    """The sizes of a released file, read off the shapes of its tensors (by released name).

    The layer after which the streams merge is the released code's (2), and so are the layers whose features the decoder
    sees: the last of each quarter.

    Raises:
        ValueError: naming the tensors that are missing or of another shape.
    """
    check_ranks(_SIZES, tensors, source, "no Painter and no SegGPT")
    shapes = {name: tensors[name].shape for name in _SIZES}
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    offsets, head_dim = shapes["blocks.0.attn.rel_pos_h"]
    rows, columns = ((n + 1) // 2 for n in (offsets, shapes["blocks.0.attn.rel_pos_w"][0]))
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    features = shapes["decoder_embed.weight"][1] // width
    if width % head_dim or not features or depth % features:
        raise ValueError(f"{source}: a width of {width}, heads of {head_dim} and {depth} layers do not go together.")
    return SegGptConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // head_dim,
        image_size=(rows * patch, columns * patch),
        patch_size=patch,
        mlp_dim=shapes["blocks.0.mlp.fc1.weight"][0],
        pretrain_image_size=math.isqrt(shapes["pos_embed"][1] - 1) * patch,
        decoder_hidden_size=shapes["decoder_pred.0.weight"][0],
        intermediate_hidden_state_indices=[depth // features * (i + 1) - 1 for i in range(features)],
    )


def read_weights(
    tensors: Tensors, source: StrPath, config: SegGptConfig, model: str, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The weights in a released file under transformers' names, with zeros for the type tokens that a Painter lacks.

    Args:
        tensors: What the file holds.
        source: The file.
        config: As `config_of` gives it.
        model: What the model is called.
        dtype: Of the weights; None keeps the file's.

    Raises:
        ValueError: naming the tensors that are missing, unknown or of another shape.
    """
    with torch.device("meta"):
        expected = SegGptForImageSegmentation(config).state_dict()
    names = {released_name(name): name for name in expected}
    lacking = () if any(name in tensors for name in TYPE_TOKENS) else TYPE_TOKENS
    shapes = {released: expected[name].shape for released, name in names.items() if released not in lacking}
    check_tensors(shapes, tensors, source, model)
    weights = {names[released]: cast(tensor, dtype) for released, tensor in tensors.items()}
    blank = weights[names["segment_token_x"]]
    return weights | {names[token]: torch.zeros_like(blank) for token in lacking}
