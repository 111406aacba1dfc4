"""Conditions side by side on the same prompts, with intervals."""

from vtv_nnsight.evaluation.evaluate import (
    BASELINE,
    CONTROL,
    Condition,
    Line,
    Table,
    bootstrap,
    comparison,
    evaluate,
    select_prompts,
)

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
