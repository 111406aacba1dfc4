"""Conditions side by side on the same prompts, with intervals."""

from vtv_nnsight.evaluation.conditions import BASELINE, CONTROL, Condition, comparison
from vtv_nnsight.evaluation.evaluation import evaluate
from vtv_nnsight.evaluation.random_controls import (
    RankAmongDraws,
    best_others,
    controls,
    random_units,
    rank_among_draws,
    specificity,
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
    "RankAmongDraws",
    "Table",
    "best_others",
    "bootstrap",
    "comparison",
    "controls",
    "evaluate",
    "random_units",
    "select_prompts",
    "specificity",
    "rank_among_draws",
    "vector_pairs",
    "verdicts",
]
