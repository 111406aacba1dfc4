"""Several processes that train one model, each on canvases of its own, their gradients averaged: as many as torchrun
starts, on cores or GPUs of their own.

    torchrun --nproc-per-node 2 -m vtv_nnsight pretrain mae --out runs/tiny
"""

from __future__ import annotations

import torch
from accelerate.utils import reduce
from torch import nn

from vtv_nnsight.search.objective import processes


def average_gradients(module: nn.Module) -> None:
    """Give every process the mean of all processes' gradients."""
    if processes().num_processes == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    mean = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, own in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(own.view_as(gradient))
