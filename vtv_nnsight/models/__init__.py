"""The models, one family each: plain torch first, then its traceable model.

>>> model = load_model("BAAI/seggpt-vit-large")     # of whichever family the source is
"""

from vtv_nnsight.models.sources import FAMILIES, PAPERS, family_of, load_model

__all__ = ["FAMILIES", "PAPERS", "family_of", "load_model"]
