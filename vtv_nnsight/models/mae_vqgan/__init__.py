"""MAE-VQGAN in plain torch: a transformers model that nnsight, or anybody else, can wrap."""

from vtv_nnsight.models.mae_vqgan.config import MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.transformer import MAEVQGANModel

__all__ = ["MAEVQGANConfig", "MAEVQGANModel"]
