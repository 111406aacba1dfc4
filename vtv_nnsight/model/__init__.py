"""MAE-VQGAN in plain torch: a transformers model that nnsight, or anybody else, can wrap."""

from vtv_nnsight.model.config import MAEVQGANConfig
from vtv_nnsight.model.mae_vqgan import MAEVQGANModel, MAEVQGANOutput

__all__ = ["MAEVQGANConfig", "MAEVQGANModel", "MAEVQGANOutput"]
