"""The sizes that are trained here, and how: recipes.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


SIZES: dict[str, Any] = json.loads(Path(__file__).with_name("recipes.json").read_text(encoding="utf-8"))
"""Name → what its config and the recipes of its stages have in the place of the defaults."""


def get(name: str) -> Size:
    """The size of a name: "tiny" (the embedded model), "small" (about 40 M parameters), "published" (ViT-L, which VP
    trains from MAE's recipe: AdamW, base learning rate 1e-4 for each 256 canvases, 3400 epochs on figures), or "smoke",
    which only shows that training runs.

    Raises:
        ValueError: naming the sizes there are.
    """
    if name not in SIZES:
        raise ValueError(f"{name!r} is not a size; choose from {', '.join(SIZES)}.")
    config, *stages = SIZES[name].values()
    return Size(MAEVQGANConfig(**config), *(Recipe(**stage) for stage in stages))
