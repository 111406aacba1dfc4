"""A transformer that begins with what a smaller one knows.

What a model learns first, to find in its example what is wanted, does not depend on its width or on its tokenizer.
`widen` keeps the function (Net2Net, Chen et al., ICLR 2016): the residual stream gets channels that nobody writes to
yet, attention gets heads and layers get hidden units with outputs of no weight yet, and further blocks add nothing
yet. `recode` gives the head the codes of another tokenizer.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig

from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig, MAEVQGANModel

WRITERS = ("patch_embed.proj", "cls_token", "mask_token", "pos_embed", "embed", "attn.proj", "mlp.fc2")
"""What writes to the residual stream, by the end of its name."""


@torch.no_grad()
def widen(small: MAEVQGANModel, config: MAEVQGANConfig) -> MAEVQGANModel:
    """A model of a config whose encoder and decoder do what those of a smaller one do; its head has fresh rows where
    the codes are not the same in number, and its tokenizer is fresh.

    A layer norm divides by the standard deviation over all channels, so its scale makes up for those that are empty;
    what is written loses its mean over the channels, which layer norms take away anyhow.

    Raises:
        ValueError: when the small one is not smaller, or its patches, canvas or heads are of another size.
    """
    _check(small.config, config)
    wide = MAEVQGANModel(config)
    known: dict[str, torch.Tensor] = dict(small.named_parameters())
    for name, parameter in wide.named_parameters():
        part, module = name.partition(".")[0], name.removesuffix(".weight").removesuffix(".bias")
        if part == "vqgan":
            continue
        writes, old = module.endswith(WRITERS), known.get(name)
        if writes:
            parameter.zero_()
        if old is None or name.startswith("decoder.head") and len(old) != len(parameter):
            continue
        if writes:
            old = old - old.mean(-1 if old.ndim != 2 else 0, keepdim=True)
        elif ".norm" in name and name.endswith("weight"):
            old = old * (len(old) / len(parameter)) ** 0.5
        if "qkv" in name:  # queries, keys and values lie one after another, each with its heads in order
            old, parameter = (tensor.unflatten(0, (3, -1)) for tensor in (old, parameter))
        parameter[tuple(map(slice, old.shape))] = old
    return wide


@torch.no_grad()
def recode(old_head: nn.Linear, head: nn.Linear, old: torch.Tensor, new: torch.Tensor) -> None:
    """Give `head` the rows that fit other codes: each the mean of the rows of `old_head` for the patches it now has.

    Args:
        old_head, head: Linear maps to the old and to the new codes; `head` may read more channels.
        old, new: The codes of the same patches before and after, of one shape.
    """
    together = torch.zeros(head.out_features, old_head.out_features)
    together.index_put_((new.flatten(), old.flatten()), torch.ones(()), accumulate=True)
    before, now = together.sum(0), together.sum(1)
    together += before / before.sum()  # a code that was never seen has the mean row
    shares = together / together.sum(1, keepdim=True)
    head.weight[:, : old_head.in_features] = shares @ old_head.weight
    head.bias.copy_(shares @ old_head.bias + ((now + 1) / (shares @ before + 1)).log())


def _check(small: PreTrainedConfig, config: MAEVQGANConfig) -> None:
    for size in ("image_size", "patch_size", "mlp_ratio", "layer_norm_eps"):
        if getattr(small, size) != getattr(config, size):
            raise ValueError(
                f"the model to start from has {size}={getattr(small, size)}, and this size {getattr(config, size)}; "
                "choose one that has the same."
            )
    for stage in ("", "decoder_"):
        dims = [getattr(c, f"{stage}hidden_size") // getattr(c, f"{stage}num_attention_heads") for c in (small, config)]
        if dims[0] != dims[1]:
            raise ValueError(f"the model to start from has heads of width {dims[0]}, and this size of {dims[1]}.")
        for size in ("hidden_size", "num_hidden_layers"):
            if getattr(small, stage + size) > getattr(config, stage + size):
                raise ValueError(
                    f"the model to start from has {stage}{size}={getattr(small, stage + size)}, "
                    f"more than this size's {getattr(config, stage + size)}; it can only grow."
                )
