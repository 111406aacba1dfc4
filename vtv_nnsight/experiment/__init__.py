"""The paper from end to end, in a folder."""

from vtv_nnsight.experiment.record import STEPS
from vtv_nnsight.experiment.settings import PUBLISHED, QUICK, Settings
from vtv_nnsight.experiment.steps import run

__all__ = ["PUBLISHED", "QUICK", "STEPS", "Settings", "run"]
