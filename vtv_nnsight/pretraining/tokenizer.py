"""The first stage: a VQGAN that draws canvases from one code a patch.

The codebook follows the encoder's outputs by moving averages (van den Oord et al., *Neural Discrete Representation
Learning*, NeurIPS 2017, appendix A.1); it starts from a batch of outputs, and entries that nobody uses are re-seeded
from the current one. The decoder learns from the pixels' absolute error, that of their differences between neighbours
(which keeps edges sharp), and the encoder also from its distance to the codes it chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from vtv_nnsight.files import replacing
from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.vqgan import VQGAN
from vtv_nnsight.pretraining.recipes import Recipe
from vtv_nnsight.pretraining.stream import training_prompts
from vtv_nnsight.pretraining.training import train

CODEBOOK_DECAY = 0.98
DEAD = 0.1
"""An entry that a step chooses fewer times than this, on average, is re-seeded."""
COMMITMENT = 0.25
EDGES = 0.5
WEIGHTS = "vqgan.safetensors"
VALIDATION_STEP = 10**9
"""The step of the stream whose canvases validate: no run trains that far."""


class TokenizerTraining(nn.Module):
    """A VQGAN and the moving averages of its codebook."""

    def __init__(self, config: MAEVQGANConfig) -> None:
        super().__init__()
        self.vqgan = VQGAN(config)
        self.vqgan.codebook.weight.requires_grad_(False)
        self.register_buffer("uses", torch.zeros(config.num_codes))
        self.register_buffer("sums", torch.zeros(config.num_codes, config.code_dim))

    def loss(self, pixels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        """Of pixels [batch, 3, height, width] in [0, 1]; moves the codebook."""
        vqgan, target = self.vqgan, 2 * pixels - 1
        latent = vqgan.latent(pixels).float()
        if not self.uses.any():
            self._seed(torch.ones_like(self.uses, dtype=torch.bool), latent.detach(), generator)
        codes = vqgan.nearest(latent.detach())
        quantised = vqgan.codebook(codes)
        drawn = vqgan.decode_latent(latent + (quantised - latent).detach()).float()
        commitment = F.mse_loss(latent, quantised)
        pixel_loss = (drawn - target).abs().mean()
        edge_loss = sum((drawn.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (2, 3))
        self._follow(latent.detach(), codes, generator)
        used = (self.uses > DEAD).float().mean().item()
        return pixel_loss + EDGES * edge_loss + COMMITMENT * commitment, {"used": used}

    @torch.no_grad()
    def _follow(self, latent: torch.Tensor, codes: torch.Tensor, generator: torch.Generator) -> None:
        flat, codes = rearrange(latent, "b p c -> (b p) c"), codes.flatten()
        counts = torch.bincount(codes, minlength=len(self.uses)).to(self.uses.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, flat)
        self.uses.lerp_(counts, 1 - CODEBOOK_DECAY)
        self.sums.lerp_(sums, 1 - CODEBOOK_DECAY)
        self.vqgan.codebook.weight.copy_(self.sums / self.uses.clamp(min=1e-5)[:, None])
        dead = self.uses < DEAD
        if dead.any():
            self._seed(dead, latent, generator)

    @torch.no_grad()
    def _seed(self, which: torch.Tensor, latent: torch.Tensor, generator: torch.Generator) -> None:
        flat = rearrange(latent, "b p c -> (b p) c")
        count = int(which.sum())
        chosen = torch.randint(len(flat), (count,), generator=generator, device=flat.device)
        self.uses[which] = 1.0
        self.sums[which] = flat[chosen]
        self.vqgan.codebook.weight[which] = flat[chosen]


def train_tokenizer(
    config: MAEVQGANConfig,
    recipe: Recipe,
    out: Path,
    *,
    photographs: Sequence[Image.Image] = (),
    resume: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Train a tokenizer on the canvases of the training stream; `out` receives `checkpoint.pt`, `log.jsonl` and the
    averaged weights, `vqgan.safetensors`, whose path is returned."""
    torch.manual_seed(seed)
    layout = config.layout

    def canvases(step: int, n: int = recipe.batch_size) -> torch.Tensor:
        canvas = training_prompts(step, n, layout, seed, photographs).canvas
        return canvas.contiguous(memory_format=torch.channels_last)

    held_out = canvases(VALIDATION_STEP, 64).to(device)
    module = TokenizerTraining(config).to(memory_format=torch.channels_last)
    average = train(
        module,
        canvases,
        TokenizerTraining.loss,
        lambda m: reconstruction(m.vqgan, held_out),
        recipe,
        out,
        resume=resume,
        seed=seed,
        device=device,
    )
    path = out / WEIGHTS
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in average.vqgan.cpu().state_dict().items()}, temporary)
    return path


def load_tokenizer(config: MAEVQGANConfig, folder: Path) -> VQGAN:
    """The tokenizer that `train_tokenizer` left in a folder.

    Raises:
        FileNotFoundError: when there is none.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; train the tokenizer to its end first (vtv pretrain tokenizer).")
    vqgan = VQGAN(config)
    vqgan.load_state_dict(load_file(path))
    return vqgan


@torch.no_grad()
def reconstruction(vqgan: VQGAN, canvas: torch.Tensor) -> dict[str, float]:
    """How well canvases [batch, 3, height, width] survive their codes: PSNR in dB, and the share of codes in use."""
    codes = vqgan.encode(canvas)
    error = (vqgan.decode(codes) - canvas).square().flatten(1).mean(1)
    return {
        "psnr": (-10 * error.log10()).mean().item(),
        "codes": len(codes.unique()) / vqgan.codebook.num_embeddings,
    }
