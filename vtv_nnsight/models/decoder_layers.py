"""Where the decoder layers of a causal language model are, and the modules in them, by the names that transformers'
families use."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""Names of an attention's output projection."""
NORMS = (("post_attention_layernorm", "post_feedforward_layernorm"), ("post_self_attn_layernorm", "post_mlp_layernorm"))
"""Names of the norms through which what attention and MLP add goes, where a family has them, as Gemma 3 and GLM-4."""


def find_layers(module: PreTrainedModel) -> tuple[str, str, str]:
    """Where a model's decoder layers are, the name of the attention in each, and of its output projection.

    Raises:
        ValueError: when there are none that are known.
    """
    count = module.config.get_text_config().num_hidden_layers
    for path, layers in module.named_modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == count:
            for name, attention in layers[0].named_children():
                projection = next((known for known in PROJECTIONS if hasattr(attention, known)), None)
                alike = all(type(getattr(layer, name, None)) is type(attention) for layer in layers)
                if type(attention).__name__.endswith("Attention") and projection and alike:
                    return path, name, projection
    raise ValueError(f"{type(module).__name__} has no decoder layers with an output projection that is known.")


def find_added(layer: Any, attention: str, config: Any) -> dict[str, str]:
    """Site → the module of a layer that puts out what attention and MLP add to the residual stream. None in Granite,
    which adds a part of it, nor in Bloom, where the modules' outputs have the stream in them."""
    if getattr(config, "residual_multiplier", 1) != 1:
        return {}
    normed = (norms for norms in NORMS if all(hasattr(layer, norm) for norm in norms))
    named = {
        site: name for site, name in zip(("attn", "mlp"), next(normed, (attention, "mlp"))) if hasattr(layer, name)
    }
    takes = {name: inspect.signature(type(getattr(layer, name)).forward).parameters for name in named.values()}
    return {site: name for site, name in named.items() if "residual" not in takes[name]}
