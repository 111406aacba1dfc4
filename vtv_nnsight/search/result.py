"""What a search found, and how it got there."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vtv_nnsight.patches import PatchSet


class Step(NamedTuple):
    """A moment of a search at which a set was tried on the held-out prompts.

    Args:
        evaluations: Patched evaluations spent so far, one mask on one prompt each, those of this moment included.
        seconds: Time spent so far.
        train_loss: Mean loss on the training prompts, as the algorithm saw it; NaN where it saw none.
        held_out_loss: Mean loss of the set on the held-out prompts.
        size: Number of units in the set.
    """

    evaluations: int
    seconds: float
    train_loss: float
    held_out_loss: float
    size: int
