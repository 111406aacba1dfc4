"""Find, inspect and use visual task vectors in MAE-VQGAN: an nnsight plugin."""

from vtv_nnsight import data, metrics, tasks
from vtv_nnsight.evaluation import evaluate
from vtv_nnsight.layouts import Layout
from vtv_nnsight.patches import PatchSet, PatchSpace, ablate, patch
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.tracing import MAEVQGAN
from vtv_nnsight.vectors import TaskVector, TaskVectors

__all__ = [
    "MAEVQGAN",
    "Layout",
    "PatchSet",
    "PatchSpace",
    "TaskVector",
    "TaskVectors",
    "VisualPrompt",
    "ablate",
    "data",
    "evaluate",
    "metrics",
    "patch",
    "tasks",
]
