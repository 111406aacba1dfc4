"""Conditions side by side on the same prompts, with intervals."""

from vtv_nnsight.evaluation.conditions import BASELINE, CONTROL, Condition, comparison
from vtv_nnsight.evaluation.evaluation import evaluate
from vtv_nnsight.evaluation.random_controls import controls, noise_vector, random_units, with_other_examples
from vtv_nnsight.evaluation.resampling import bootstrap
from vtv_nnsight.evaluation.searched_anew import each_vector, search_each
from vtv_nnsight.evaluation.selection import select_prompts
from vtv_nnsight.evaluation.table import Line, Table

__all__ = [
    "BASELINE", "CONTROL", "Condition", "Line", "Table", "bootstrap", "comparison", "controls", "each_vector",
    "evaluate", "noise_vector", "random_units", "search_each", "select_prompts", "with_other_examples",
]  # fmt: skip
