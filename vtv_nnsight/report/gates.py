"""Answers to queries as a vector comes in, unit by unit or all at once.

>>> gates = torch.linspace(0, 1, 11)[:, None] * result.patches.choices
>>> strip = generate_with_gates(model, prompts[0], vector, space, gates)
"""

from __future__ import annotations

from functools import partial

import torch

from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import InContextModel, batch_size_of
from vtv_nnsight.patching import PatchSpace, patch
from vtv_nnsight.patching.forward import forward
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.vectors import TaskVector


@torch.no_grad()
def generate_with_gates(
    model: InContextModel,
    prompts: VisualPrompt,
    vector: TaskVector,
    space: PatchSpace,
    gates: torch.Tensor,
    *,
    batch_size: int | None = None,
) -> torch.Tensor:
    """The answers to queries, zero-shot, under a row of gates each: many answers to one query, in few forwards.

    Args:
        model: The model.
        prompts: One prompt for all rows of gates, or one for each.
        vector: What is patched in.
        space: The units.
        gates: [row, unit]: how far each unit goes, from 0 (the model's own activation) to 1 (the vector's).
        batch_size: Rows in a forward; None is `models.interface.default_batch_size`, 32 for MAE-VQGAN.

    Returns:
        [row, 3, cell, cell] in [0, 1], on the CPU.

    Raises:
        ValueError: when there are neither one prompt nor as many as rows, or as `patch`.
    """
    gates = torch.as_tensor(gates).float()
    if len(prompts) not in (1, len(gates)):
        raise ValueError(f"{len(prompts)} prompts go with {len(gates)} rows of gates; give one, or one for each row.")
    device, batch_size = device_of(model), batch_size_of(model, batch_size)
    prompts, vector = prompts.query_only().to(device), vector.to(device)
    rows = prompts if len(prompts) == len(gates) else prompts[[0] * len(gates)]
    cells = []
    for batch, batch_gates in zip(rows.split(batch_size), gates.split(batch_size)):
        output, _ = forward(model, batch, partial(patch, vector=vector, patches=space.mask(batch_gates)))
        cells.append(model.answers(output, batch)[0].float().cpu())
    return torch.cat(cells)
