"""Is a ranking of units a circuit? The field's own measures: faithfulness curves, patched in and ablated out."""

from vtv_nnsight.circuits import plots
from vtv_nnsight.circuits.counterfactuals import counterfactual
from vtv_nnsight.circuits.curves import SIZES, Curves
from vtv_nnsight.circuits.faithfulness import DIRECTIONS, faithfulness
from vtv_nnsight.circuits.ground_truth import KnownCircuit, auroc
from vtv_nnsight.circuits.measures import Measure, answer_loss, answer_metric, log_ratio
from vtv_nnsight.circuits.nodes import by_head, nodes, write_nodes
from vtv_nnsight.circuits.rankings import RANKINGS, Kept, rank

__all__ = [
    "DIRECTIONS",
    "RANKINGS",
    "SIZES",
    "Curves",
    "Kept",
    "KnownCircuit",
    "Measure",
    "answer_loss",
    "answer_metric",
    "auroc",
    "by_head",
    "counterfactual",
    "faithfulness",
    "log_ratio",
    "nodes",
    "plots",
    "rank",
    "write_nodes",
]
