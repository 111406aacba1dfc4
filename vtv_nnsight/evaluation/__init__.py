"""Conditions side by side on the same prompts, with intervals."""

from vtv_nnsight.evaluation.conditions import BASELINE, CONTROL, Condition, comparison
from vtv_nnsight.evaluation.evaluation import evaluate
from vtv_nnsight.evaluation.random_controls import (
    RankAmongDraws,
    best_others,
    controls,
    random_units,
    rank_among_draws,
    transfer_at_fixed_units,
    vector_pairs,
    verdicts,
)
from vtv_nnsight.evaluation.resampling import bootstrap
from vtv_nnsight.evaluation.selection import select_prompts
from vtv_nnsight.evaluation.table import Line, Table

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
    "rank_among_draws",
    "transfer_at_fixed_units",
    "vector_pairs",
    "verdicts",
]
