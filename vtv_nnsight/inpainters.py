"""Deprecated: `MAE` is `vtv_nnsight.ViTMAE`, a model like the others."""

import os
import warnings
from typing import Any

from transformers import ViTMAEForPreTraining

from vtv_nnsight.models.vit_mae import ViTMAE


class MAE(ViTMAE):
    """Deprecated: use `vtv_nnsight.ViTMAE`."""

    def __init__(self, model: str | os.PathLike | ViTMAEForPreTraining, **kwargs: Any) -> None:
        warnings.warn("inpainters.MAE is deprecated; use vtv_nnsight.ViTMAE.", DeprecationWarning, stacklevel=2)
        super().__init__(model, **kwargs)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **kwargs: Any) -> "MAE":
        """The model of a folder or a Hub id."""
        return cls(source, **kwargs)
