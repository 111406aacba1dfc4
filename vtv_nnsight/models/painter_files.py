"""The released files of Painter and SegGPT (`.pth`): their names of tensors, and sizes read off their shapes.

Nothing of them is run (see `torch_files`).
"""

from __future__ import annotations

import math

import torch
from transformers import SegGptConfig

from vtv_nnsight.files import refusing
from vtv_nnsight.models.torch_files import StrPath, read_tensors

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


def describe(source: StrPath) -> tuple[SegGptConfig, dict[str, torch.Tensor]]:
    """The sizes of a released file, read off the shapes of its tensors, and these by released name, with zeros for the
    type tokens that a Painter lacks.

    The layer after which the streams merge is the released code's (2), and so are the layers that give the decoder
    its features: the last of each quarter.

    Raises:
        ValueError: naming the tensors that are missing or of another shape.
    """
    tensors = read_tensors(source)
    with refusing(source, "is no Painter and no SegGPT"):
        for token in () if any(name in tensors for name in TYPE_TOKENS) else TYPE_TOKENS:
            tensors[token] = torch.zeros_like(tensors["segment_token_x"])
        width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
        offsets, head_dim = tensors["blocks.0.attn.rel_pos_h"].shape
        rows, columns = ((n + 1) // 2 for n in (offsets, len(tensors["blocks.0.attn.rel_pos_w"])))
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        features = tensors["decoder_embed.weight"].shape[1] // width
        config = SegGptConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=width // head_dim,
            image_size=(rows * patch, columns * patch),
            patch_size=patch,
            mlp_dim=len(tensors["blocks.0.mlp.fc1.weight"]),
            pretrain_image_size=math.isqrt(tensors["pos_embed"].shape[1] - 1) * patch,
            decoder_hidden_size=len(tensors["decoder_pred.0.weight"]),
            intermediate_hidden_state_indices=[depth // features * (i + 1) - 1 for i in range(features)],
        )
    return config, tensors
