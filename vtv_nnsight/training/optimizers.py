"""What minimises the losses: AdamW, and Muon for the matrices of a transformer's blocks."""

from __future__ import annotations

import torch
from torch import nn

from vtv_nnsight.training.recipes import Recipe


def build_optimizers(module: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW; and Muon for the matrices of the transformer's blocks, where the recipe has a rate for it."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    matrices = {n for n, p in trained.items() if recipe.matrix_learning_rate and p.ndim == 2 and "blocks." in n}
    decayed = [p for n, p in trained.items() if n not in matrices and p.ndim > 1]
    plain = [p for n, p in trained.items() if n not in matrices and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.learning_rate, betas=(0.9, 0.95))
    ]
    if matrices:
        rate, decay = recipe.matrix_learning_rate, recipe.weight_decay
        optimizers.append(torch.optim.Muon([trained[n] for n in sorted(matrices)], lr=rate, weight_decay=decay))
    return optimizers


def has_fast_bf16(device: torch.device) -> bool:
    """Not on CPUs before AVX-512: they emulate it, and a step of the embedded size took eight times as long."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")
