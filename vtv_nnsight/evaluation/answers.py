"""What a model answers when some units go some of the way to a task vector: many answers to one query, in few forwards.

>>> strip = generate_with_gates(model, prompts[0], vector, space, torch.linspace(0, 1, 11)[:, None] * patches.choices)
"""

from __future__ import annotations

import torch

from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import InContextModel, default_batch_size
from vtv_nnsight.patching import PatchSpace, patch
from vtv_nnsight.prompts import VisualPrompt, crop
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
    """The answers to queries, with no example shown, under a row of gates each.

    Args:
        model: The model.
        prompts: One prompt for all rows of gates, or one for each.
        vector: What is patched in.
        space: The units.
        gates: [row, unit]: how far each unit goes, from 0 (its own activation) to 1 (the vector's).
        batch_size: Rows in a forward; None is `stages.default_batch_size`, 32 for MAE-VQGAN.

    Returns:
        [row, 3, cell, cell] in [0, 1], on the CPU.

    Raises:
        ValueError: when there are neither one prompt nor as many as rows, or as `patch`.
    """
    gates = torch.as_tensor(gates).float()
    if len(prompts) not in (1, len(gates)):
        raise ValueError(f"{len(prompts)} prompts go with {len(gates)} rows of gates; give one, or one for each row.")
    device, batch_size = device_of(model), batch_size or default_batch_size(model)
    prompts = prompts.query_only().to(device)
    vector = vector.to(device)
    rows = prompts if len(prompts) == len(gates) else prompts[[0] * len(gates)]
    cells = []
    for batch, own in zip(rows.split(batch_size), gates.split(batch_size)):
        with model.trace(batch):
            patch(model, vector, space.mask(own))
            output = model.output.save()
        cells.append(crop(model.paint(output, batch), "output", batch.layout).float().cpu())
    return torch.cat(cells)
