"""What minimises the losses: AdamW, and Muon for the matrices of a transformer's blocks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

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
        optimizers.append(Muon([trained[n] for n in sorted(matrices)], lr=rate, weight_decay=decay))
    return optimizers


def has_fast_bf16(device: torch.device) -> bool:
    """Not on CPUs before AVX-512: they emulate it, and a step of the embedded size took eight times as long."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


class Muon(torch.optim.Muon):
    """PyTorch's Muon, which makes one matrix orthogonal at a time and always in bf16; here those of a shape are done
    together, and in float32 where a CPU would emulate bf16."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for shape, parameters in alike.items():
                updates = orthogonal(
                    torch.stack([self._momentum(parameter, group) for parameter in parameters]),
                    group["ns_coefficients"],
                    group["ns_steps"],
                    group["eps"],
                )
                rate = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, updates):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(rate * update)

    def _momentum(self, parameter: Any, group: dict[str, Any]) -> torch.Tensor:
        """The gradient with Nesterov's momentum, which it moves."""
        state, keep, gradient = self.state[parameter], group["momentum"], parameter.grad
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - keep)
        return gradient.lerp(state["momentum_buffer"], keep)


def orthogonal(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Matrices [matrix, row, column] with all their singular values drawn near 1, by Newton and Schulz's iteration of a
    polynomial of fifth degree (Jordan et al., *Muon*, 2024)."""
    linear, cubic, quintic = coefficients
    x = matrices.bfloat16() if has_fast_bf16(matrices.device) else matrices.float()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = linear * x + (cubic * gram + quintic * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
