"""For the tests of a model of your own: does it keep what `InContextModel` promises?

>>> from vtv_nnsight.testing import check_model
>>> check_model(model, prompts)
"""

from vtv_nnsight.testing.conformance import check_model

__all__ = ["check_model"]
