"""Conditions side by side on the same prompts, with intervals."""

from vtv_nnsight.evaluation.conditions import BASELINE, CONTROL, Condition, comparison
from vtv_nnsight.evaluation.evaluation import evaluate
from vtv_nnsight.evaluation.random_controls import (
    RankAmongDraws,
    best_others,
    controls,
    noise_vector,
    random_units,
    rank_among_draws,
    vector_pairs,
    verdicts,
    with_other_examples,
)
from vtv_nnsight.evaluation.resampling import bootstrap
from vtv_nnsight.evaluation.searched_anew import each_vector, search_each, specific_tasks, specificity_sentences
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
    "each_vector",
    "evaluate",
    "noise_vector",
    "random_units",
    "search_each",
    "select_prompts",
    "specific_tasks",
    "specificity_sentences",
    "rank_among_draws",
    "vector_pairs",
    "verdicts",
    "with_other_examples",
]
