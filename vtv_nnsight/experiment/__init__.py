"""The paper from end to end, in a folder."""

from vtv_nnsight.experiment.settings import PUBLISHED, Settings
from vtv_nnsight.experiment.steps import STEPS, run

__all__ = ["PUBLISHED", "STEPS", "Settings", "run"]
