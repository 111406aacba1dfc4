"""Conditions side by side on the same prompts, with intervals."""

from vtv_nnsight.evaluation.conditions import BASELINE, CONTROL, Condition, comparison
from vtv_nnsight.evaluation.evaluation import evaluate
from vtv_nnsight.evaluation.random_controls import (
    Standing,
    best_others,
    controls,
    random_units,
    specificity,
    standing,
    vector_pairs,
    verdicts,
)
from vtv_nnsight.evaluation.selection import select_prompts
from vtv_nnsight.evaluation.table import Line, Table, bootstrap

__all__ = [
    "BASELINE",
    "CONTROL",
    "Condition",
    "Line",
    "Standing",
    "Table",
    "best_others",
    "bootstrap",
    "comparison",
    "controls",
    "evaluate",
    "random_units",
    "select_prompts",
    "specificity",
    "standing",
    "vector_pairs",
    "verdicts",
]
