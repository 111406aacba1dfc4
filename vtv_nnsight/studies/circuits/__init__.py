"""Is a ranking of units a circuit? The field's own measures: faithfulness curves, patched in and ablated out."""

from vtv_nnsight.studies.circuits import plots
from vtv_nnsight.studies.circuits.counterfactuals import counterfactual
from vtv_nnsight.studies.circuits.curves import SIZES, Curves
from vtv_nnsight.studies.circuits.faithfulness_curves import DIRECTIONS, faithfulness
from vtv_nnsight.studies.circuits.ground_truth import auroc
from vtv_nnsight.studies.circuits.known_circuit import KnownCircuit
from vtv_nnsight.studies.circuits.measures import Measure, answer_loss, answer_metric, log_ratio
from vtv_nnsight.studies.circuits.mib_nodes import by_head, nodes, write_nodes
from vtv_nnsight.studies.circuits.nearest_centroid import centroid_accuracy
from vtv_nnsight.studies.circuits.rankings import RANKINGS, ComplementObjective, rank_units

__all__ = [
    "DIRECTIONS", "RANKINGS", "SIZES", "Curves", "ComplementObjective", "KnownCircuit", "Measure", "answer_loss",
    "answer_metric", "auroc", "by_head", "centroid_accuracy", "counterfactual", "faithfulness", "log_ratio", "nodes",
    "plots", "rank_units", "write_nodes",
]  # fmt: skip
