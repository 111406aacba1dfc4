"""Find, inspect and use visual task vectors in MAE-VQGAN: an nnsight plugin."""

from vtv_nnsight import data, metrics, tasks
from vtv_nnsight.layouts import Layout
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.tracing import MAEVQGAN

__all__ = ["MAEVQGAN", "Layout", "VisualPrompt", "data", "metrics", "tasks"]
