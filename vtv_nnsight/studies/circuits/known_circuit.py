"""A small MAE-VQGAN with a circuit known by construction, to tell what a search is worth."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange

from vtv_nnsight.models.interface import StageSite
from vtv_nnsight.models.mae_vqgan.config import MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.traced import MAEVQGAN
from vtv_nnsight.models.mae_vqgan.transformer import MAEVQGANModel
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.prompts import VisualPrompt

SIZES: dict[str, Any] = dict(
    image_size=64,
    patch_size=8,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    decoder_hidden_size=64,
    decoder_num_hidden_layers=3,
    decoder_num_attention_heads=4,
    num_codes=32,
    code_dim=8,
    vqgan_z_channels=8,
    vqgan_channels=32,
    vqgan_channel_multipliers=(1,),
    vqgan_num_res_blocks=1,
    vqgan_attention_levels=(),
    vqgan_fold=8,
)


class KnownCircuit(MAEVQGAN):
    """A small MAE-VQGAN of random weights in which all heads but some of the decoder's have no effect.

    What it was asked to do is what it does: the truth of a prompt is its own one-shot answer, so that whatever its
    heads do is right, and whatever stops them is wrong.

    Args:
        heads: How many of the decoder's heads make the circuit.
        seed: Of the weights and the choice.

    Attributes:
        heads: LongTensor [head, 2]: decoder layer and head of each, in order.
    """

    def __init__(self, heads: int = 4, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = MAEVQGANModel(MAEVQGANConfig(**SIZES)).eval()
            for name, parameter in module.named_parameters():
                if parameter.ndim == 2 and not name.startswith("vqgan"):
                    torch.nn.init.normal_(parameter, std=2 / parameter.shape[1] ** 0.5)
            blocks = module.decoder.blocks
            number = blocks[0].attn.num_heads
            order = torch.randperm(len(blocks) * number)[:heads].sort().values
        circuit = torch.stack([order // number, order % number], dim=1)
        with torch.no_grad():
            for stage in (module.encoder, module.decoder):
                for layer, block in enumerate(stage.blocks):
                    speaks = torch.zeros(number, dtype=torch.bool)
                    if stage is module.decoder:
                        speaks[circuit[circuit[:, 0] == layer, 1]] = True
                    listens = rearrange(block.attn.proj.weight, "out (head dim) -> out head dim", head=number)
                    listens *= speaks[:, None]
        super().__init__(module)
        self.heads = circuit

    def truth(self, prompts: VisualPrompt) -> torch.Tensor:
        """The codes of its own one-shot answers: LongTensor [batch, output patch]."""
        prompts = prompts.one_shot()
        with torch.no_grad():
            logits = self(prompts).logits
        return logits[:, prompts.layout.regions["output"].to(logits.device)].argmax(-1)

    def circuit(self, space: PatchSpace) -> torch.Tensor:
        """Which units are of heads that are listened to: bool [unit]."""
        decoder = [stage.key for stage in space.stages].index(StageSite("decoder"))
        units = torch.stack([space.units.layer, space.units.head], dim=1)
        listed = (units[:, None] == self.heads).all(-1).any(-1)
        return listed & (space.units.stage == decoder)
