"""The first stage: a VQGAN that draws canvases from one code a patch.

The codebook follows the encoder's outputs by moving averages (van den Oord et al., *Neural Discrete Representation
Learning*, NeurIPS 2017, appendix A.1); it starts from a batch of outputs, and entries that nobody uses are re-seeded
from the current one. The decoder learns from the pixels' absolute and squared errors, the absolute error of their differences between neighbours (which
keeps edges sharp), and a distance of features (`PerceptualDistance`); the encoder also from its distance to the codes
that it chose. Most pictures are canvases, whose gutters must survive; some are crops without one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from vtv_nnsight import tasks
from vtv_nnsight.files import replacing
from vtv_nnsight.model import MAEVQGANConfig
from vtv_nnsight.model.vqgan import VQGAN
from vtv_nnsight.pretraining.corpus import PHOTO, Corpus
from vtv_nnsight.pretraining.perceptual import PerceptualDistance
from vtv_nnsight.pretraining.recipes import Recipe
from vtv_nnsight.pretraining.stream import training_crops, training_prompts, validation_prompts
from vtv_nnsight.pretraining.training import train

CODEBOOK_DECAY = 0.98
DEAD = 0.1
"""An entry that a step chooses fewer times than this, on average, is re-seeded."""
COMMITMENT = 0.25
EDGES = 0.5
SQUARES = 2.0
CROPS = 0.125
"""Share of a batch that are pictures without a canvas."""
LOOKED_AT = 0.25
"""Share of a batch, from its end, whose perceptual distance is measured."""
WEIGHTS = "vqgan.safetensors"


class TokenizerTraining(nn.Module):
    """A VQGAN and the moving averages of its codebook; `perceptual` is the weight of the distance of features."""

    def __init__(self, config: MAEVQGANConfig, perceptual: float = 0.0) -> None:
        super().__init__()
        self.perceptual = perceptual
        # in a tuple, so that its weights are neither saved nor averaged
        self.distance = (PerceptualDistance(),) if perceptual else ()
        self.vqgan = VQGAN(config)
        self.vqgan.codebook.weight.requires_grad_(False)
        self.register_buffer("uses", torch.zeros(config.num_codes))
        self.register_buffer("sums", torch.zeros(config.num_codes, config.code_dim))

    def loss(
        self, batch: tuple[torch.Tensor], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Of a batch of pixels [batch, 3, height, width] in [0, 1]; moves the codebook."""
        (pixels,) = batch
        vqgan, target = self.vqgan, 2 * pixels - 1
        latent = vqgan.latent(pixels).float()
        if not self.uses.any():
            self._seed(torch.ones_like(self.uses, dtype=torch.bool), latent.detach(), generator)
        codes = vqgan.nearest(latent.detach())
        quantised = vqgan.codebook(codes)
        drawn = vqgan.decode_latent(latent + (quantised - latent).detach()).float()
        commitment = F.mse_loss(latent, quantised)
        pixel_loss = (drawn - target).abs().mean()
        squares = F.mse_loss(drawn, target)
        edge_loss = sum((drawn.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (2, 3))
        value = pixel_loss + SQUARES * squares + EDGES * edge_loss + COMMITMENT * commitment
        if self.perceptual:
            few = -max(1, round(LOOKED_AT * len(drawn)))
            value = value + self.perceptual * self.distance[0].to(drawn.device)(drawn[few:], target[few:])
        self._follow(latent.detach(), codes, generator)
        used = (self.uses > DEAD).float().mean().item()
        return value, {"used": used, "squares": squares.item() / 4}

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
    corpus: Corpus | None = None,
    validation: Corpus | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Train a tokenizer on the canvases of the training stream; `out` receives `checkpoint.pt`, `log.jsonl` and the
    averaged weights, `vqgan.safetensors`, whose path is returned. `validation` are the pictures to validate on, beside
    scenes."""
    torch.manual_seed(seed)
    layout = config.layout

    def batches(step: int) -> tuple[torch.Tensor]:
        plain = round(CROPS * recipe.batch_size) if corpus is not None and corpus.has(PHOTO) else 0
        canvas = training_prompts(step, recipe.batch_size - plain, layout, seed, corpus).canvas
        if plain:
            canvas = torch.cat([canvas, training_crops(step, plain, layout.canvas_size, seed, corpus)])
        return (canvas,)

    held_out = {
        name: prompts.canvas.to(device)
        for name, prompts in validation_prompts(tasks.identity, 64, layout, validation).items()
    }
    module = TokenizerTraining(config, recipe.perceptual)

    def validate(module: TokenizerTraining) -> dict[str, float]:
        found = {name: reconstruction(module.vqgan, canvas) for name, canvas in held_out.items()}
        return {f"{key}, {name}": value for name, numbers in found.items() for key, value in numbers.items()}

    average = train(
        module, batches, TokenizerTraining.loss, validate, recipe, out, resume=resume, seed=seed, device=device
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
