"""The sizes that are trained here, and how."""

from __future__ import annotations

from dataclasses import dataclass

from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig


@dataclass(frozen=True)
class Recipe:
    """Settings of one stage.

    Args:
        steps: Optimiser steps.
        batch_size: Canvases a step.
        learning_rate: Peak of AdamW's; linear warm-up, constant, and a linear decay to zero.
        matrix_learning_rate: Peak of Muon's, for the transformer's weight matrices; 0 leaves them to AdamW.
        warmup: Steps to the peak.
        decay: Last steps, over which the rates fall to zero.
        weight_decay: Decoupled.
        clip: Largest norm of the gradient.
        ema: Share of the old in the moving average of the weights.
        validate: Steps between validations.
        perceptual: Weight of the tokenizer's distance of features; needs the package that carries them.
    """

    steps: int
    batch_size: int
    learning_rate: float
    matrix_learning_rate: float = 0.0
    warmup: int = 100
    decay: int = 0
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.998
    validate: int = 250
    perceptual: float = 0.0


@dataclass(frozen=True)
class Size:
    """A model and the recipes of its stages."""

    config: MAEVQGANConfig
    tokenizer: Recipe
    decoder: Recipe
    mae: Recipe


def get(name: str) -> Size:
    """The size of a name: "tiny" (the embedded model), "small" (about 40 M parameters), "published" (ViT-L), or
    "smoke", which only shows that training runs.

    Raises:
        ValueError: naming the sizes there are.
    """
    if name not in _SIZES:
        raise ValueError(f"{name!r} is not a size; choose from {', '.join(_SIZES)}.")
    return _SIZES[name]()


def _tiny() -> Size:
    config = MAEVQGANConfig(
        image_size=112,
        patch_size=8,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        decoder_hidden_size=128,
        decoder_num_hidden_layers=4,
        decoder_num_attention_heads=4,
        num_codes=2048,
        code_dim=16,
        vqgan_z_channels=64,
        vqgan_channels=64,
        vqgan_channel_multipliers=(1, 1),
        vqgan_num_res_blocks=1,
        vqgan_attention_levels=(),
        vqgan_fold=4,
    )
    return Size(
        config,
        tokenizer=Recipe(
            steps=7000, batch_size=16, learning_rate=2e-3, weight_decay=0.0, decay=2500, validate=500, perceptual=0.05
        ),
        decoder=Recipe(
            steps=8000, batch_size=16, learning_rate=1e-3, weight_decay=0.0, decay=3000, validate=500, perceptual=0.2
        ),
        mae=Recipe(
            steps=30_000,
            batch_size=32,
            learning_rate=8e-4,
            matrix_learning_rate=8e-3,
            warmup=100,
            decay=6000,
            ema=0.995,
            validate=400,
        ),
    )


def _small() -> Size:
    config = MAEVQGANConfig(
        image_size=112,
        patch_size=8,
        hidden_size=512,
        num_hidden_layers=10,
        num_attention_heads=8,
        decoder_hidden_size=256,
        decoder_num_hidden_layers=6,
        decoder_num_attention_heads=8,
        num_codes=1024,
        code_dim=32,
        vqgan_z_channels=128,
        vqgan_channels=64,
        vqgan_channel_multipliers=(1, 2),
        vqgan_num_res_blocks=2,
        vqgan_attention_levels=(1,),
        vqgan_fold=4,
    )
    return Size(
        config,
        tokenizer=Recipe(steps=20_000, batch_size=64, learning_rate=1e-3, weight_decay=0.0, validate=1000),
        decoder=Recipe(steps=20_000, batch_size=64, learning_rate=1e-3, weight_decay=0.0, decay=10_000, validate=1000),
        mae=Recipe(
            steps=50_000, batch_size=256, learning_rate=1e-3, matrix_learning_rate=1e-2, warmup=1000, validate=1000
        ),
    )


def _published() -> Size:
    """VP trains ViT-L from MAE's recipe: AdamW, base learning rate 1e-4 for each 256 canvases, 3400 epochs on
    figures."""
    return Size(
        MAEVQGANConfig(),
        tokenizer=Recipe(steps=500_000, batch_size=96, learning_rate=4.5e-4, weight_decay=0.0, validate=5000),
        decoder=Recipe(steps=100_000, batch_size=96, learning_rate=1e-4, weight_decay=0.0, decay=50_000, validate=5000),
        mae=Recipe(steps=600_000, batch_size=512, learning_rate=2e-4, warmup=10_000, validate=5000),
    )


def _smoke() -> Size:
    config = MAEVQGANConfig(
        image_size=56,
        patch_size=4,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        num_codes=64,
        code_dim=8,
        vqgan_z_channels=32,
        vqgan_channels=32,
        vqgan_channel_multipliers=(1,),
        vqgan_num_res_blocks=1,
        vqgan_attention_levels=(),
        vqgan_fold=4,
    )
    return Size(
        config,
        tokenizer=Recipe(steps=30, batch_size=8, learning_rate=3e-3, warmup=5, weight_decay=0.0, ema=0.9, validate=30),
        decoder=Recipe(steps=30, batch_size=8, learning_rate=3e-3, warmup=5, weight_decay=0.0, ema=0.9, validate=30),
        mae=Recipe(
            steps=30, batch_size=8, learning_rate=2e-3, matrix_learning_rate=1e-2, warmup=5, ema=0.9, validate=30
        ),
    )


_SIZES = {"tiny": _tiny, "small": _small, "published": _published, "smoke": _smoke}
