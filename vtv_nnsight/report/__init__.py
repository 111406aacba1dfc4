"""The report of a run, and the comparison of several."""

from vtv_nnsight.report.page import compare, overview, read, write, write_pictures

__all__ = ["compare", "overview", "read", "write", "write_pictures"]
