"""Conditions side by side on the same prompts, with intervals."""

from vtv_nnsight.evaluation.conditions import BASELINE, CONTROL, Condition, comparison
from vtv_nnsight.evaluation.evaluate import evaluate
from vtv_nnsight.evaluation.selection import select_prompts
from vtv_nnsight.evaluation.table import Line, Table, bootstrap

__all__ = [
    "BASELINE",
    "CONTROL",
    "Condition",
    "Line",
    "Table",
    "bootstrap",
    "comparison",
    "evaluate",
    "select_prompts",
]
