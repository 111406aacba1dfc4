"""Several processes that train one model, each on canvases of its own, their gradients averaged: as many as torchrun
starts, on cores or GPUs of their own.

    torchrun --nproc-per-node 2 -m vtv_nnsight pretrain mae --out runs/tiny
"""

from __future__ import annotations

import os

import torch
from torch import distributed, nn


def join() -> tuple[int, int]:
    """This process's number and how many there are; 0 and 1 where none was started beside it."""
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return 0, 1
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return distributed.get_rank(), distributed.get_world_size()


def average_gradients(module: nn.Module) -> None:
    """Give every process the mean of all processes' gradients."""
    if join()[1] == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / join()[1]).split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))
