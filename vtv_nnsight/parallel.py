"""The processes that share a job out: what `torchrun` or `accelerate launch` started."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def processes() -> PartialState:
    """The processes that a launcher started, and which this is. Accelerate looks for CPU processes only if told to."""
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=cpu, timeout=timedelta(hours=12))  # one may wait long for what another does alone
