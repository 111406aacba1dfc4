"""The report of a run, and the comparison of several."""

from vtv_nnsight.report.page import compare, write
from vtv_nnsight.report.pictures import overview
from vtv_nnsight.report.reading import load_run

__all__ = ["compare", "overview", "load_run", "write"]
