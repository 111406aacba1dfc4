"""The report of a run, and the comparison of several.

`explorer` looks closely at one query while a run is under way, and `attention` at where its answer looks. `reading`
fetches what a run left, `figures` and `pictures` draw, `play` and `hero` make what one query shows, `page` and
`comparison` put it together, and `rendering` knows the templates; `labels` has the words.
"""

from vtv_nnsight.report.comparison import compare
from vtv_nnsight.report.page import write
from vtv_nnsight.report.pictures import overview
from vtv_nnsight.report.reading import load_run

__all__ = ["compare", "load_run", "overview", "write"]
