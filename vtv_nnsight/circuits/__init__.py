"""Is a ranking of units a circuit? The field's own measures: faithfulness curves, patched in and ablated out."""

from vtv_nnsight.circuits import plots
from vtv_nnsight.circuits.curves import SIZES, Curves
from vtv_nnsight.circuits.faithfulness import DIRECTIONS, faithfulness
from vtv_nnsight.circuits.measures import Measure, answer_loss, answer_metric, log_ratio
from vtv_nnsight.circuits.nodes import nodes, write_nodes

__all__ = [
    "DIRECTIONS",
    "SIZES",
    "Curves",
    "Measure",
    "answer_loss",
    "answer_metric",
    "faithfulness",
    "log_ratio",
    "nodes",
    "plots",
    "write_nodes",
]
