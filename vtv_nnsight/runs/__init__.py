"""The paper from end to end, in a folder."""

from vtv_nnsight.runs.pipeline import run
from vtv_nnsight.runs.resuming import STEPS
from vtv_nnsight.runs.settings import PUBLISHED, QUICK, Settings

__all__ = ["PUBLISHED", "QUICK", "STEPS", "Settings", "run"]
