"""The first stage: a VQGAN that draws canvases from one code a patch.

Left to itself the codebook collapses: 2048 codes of width 16 came to differ in three directions, a patch's mean colour,
and what else the encoder found lay below the distance of two codes, where the decoder cannot see it and no gradient
makes it grow. So the latent starts as the patch's principal components, in units of the error that so many bits allow
(reverse water-filling), the codebook as their k-means, and a pull on the latent keeps it near: a code says what its
patch looks like, and hardly depends on the patches around.

From there on the codebook follows the encoder's outputs by moving averages (van den Oord et al., *Neural Discrete
Representation Learning*, NeurIPS 2017, appendix A.1); entries that nobody uses are re-seeded from the current batch.
The decoder learns from the pixels' absolute and squared errors, the absolute error of their differences between
neighbours (which keeps edges sharp), and a distance of features (`PerceptualDistance`). Most pictures are canvases,
their gutters must survive; some are crops without one.

The decoder is never done, and the transformer needs the codes only. So the decoder may go on learning by itself
(`train_decoder`) while the transformer is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from vtv_nnsight import tasks
from vtv_nnsight.files import replacing
from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.vqgan import VQGAN
from vtv_nnsight.parallel import processes
from vtv_nnsight.training.corpus import PHOTO, Corpus
from vtv_nnsight.training.loop import CHECKPOINT, Job, LossValue
from vtv_nnsight.training.perceptual import PerceptualDistance
from vtv_nnsight.training.stream import SAMPLED_FROM, training_crops, training_prompts, validation_prompts

CODEBOOK_DECAY = 0.98
DEAD = 0.1
"""An entry that a step chooses fewer times than this, on average, is re-seeded."""
COMMITMENT = 0.02
ANCHOR = 0.1
"""Weight of the latent's distance to the principal components."""
ALONE = 200
"""Steps in which the encoder only learns to find the principal components; the decoder draws their codes."""
SAMPLE, ITERATIONS = 500, 12
"""Pictures that the components and the first codebook are found on, and rounds of k-means."""
EDGES = 0.5
SQUARES = 2.0
CROPS = 0.125
"""Share of a batch that are pictures without a canvas."""
LOOKED_AT = 0.25
"""Share of a batch, from its end, on which the perceptual distance is measured."""
WEIGHTS = "vqgan.safetensors"


class Distance:
    """Of drawn pictures to their targets; `perceptual` is the weight of the distance of features.

    It is no module, so that the weights of the features are neither saved nor averaged.
    """

    def __init__(self, perceptual: float = 0.0) -> None:
        self.perceptual, self.features = perceptual, PerceptualDistance() if perceptual else None

    def __call__(self, drawn: torch.Tensor, target: torch.Tensor) -> LossValue:
        """Of pixels [batch, 3, height, width] in [-1, 1]."""
        squares = F.mse_loss(drawn, target)
        edges = sum((drawn.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (2, 3))
        value = (drawn - target).abs().mean() + SQUARES * squares + EDGES * edges
        if self.features is not None:
            few = -max(1, round(LOOKED_AT * len(drawn)))
            value = value + self.perceptual * self.features.to(drawn.device)(drawn[few:], target[few:])
        return value, {"squares": squares.item() / 4}


class TokenizerTraining(nn.Module):
    """A VQGAN and the moving averages of its codebook."""

    uses: torch.Tensor
    sums: torch.Tensor
    steps: torch.Tensor
    mean: torch.Tensor
    components: torch.Tensor

    def __init__(self, config: MAEVQGANConfig, perceptual: float = 0.0) -> None:
        super().__init__()
        self.distance = Distance(perceptual)
        self.vqgan = VQGAN(config)
        self.vqgan.codebook.weight.requires_grad_(False)
        self.patch_size = config.patch_size
        self.register_buffer("uses", torch.zeros(config.num_codes))
        self.register_buffer("sums", torch.zeros(config.num_codes, config.code_dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3 * config.patch_size**2))
        self.register_buffer("components", torch.zeros(3 * config.patch_size**2, config.code_dim))

    def loss(self, batch: tuple[torch.Tensor], generator: torch.Generator) -> LossValue:
        """Of a batch of pixels [batch, 3, height, width] in [0, 1]; moves the codebook."""
        (pixels,) = batch
        vqgan, target, alone = self.vqgan, 2 * pixels - 1, self.steps < ALONE
        latent = vqgan.latent(pixels).float()
        with torch.autocast(pixels.device.type, enabled=False):  # distances of bf16 confuse codes
            principal = self.principal(pixels)
            codes = vqgan.nearest(principal if alone else latent.detach())
        if alone:
            quantised, commitment = vqgan.codebook(codes), latent.new_zeros(())
        else:
            commitment = F.mse_loss(latent, vqgan.codebook(codes))
            quantised = latent + (vqgan.codebook(codes) - latent).detach()
            self._follow(latent.detach(), codes, generator)
        self.steps += 1
        anchor = F.mse_loss(latent, principal)
        value, numbers = self.distance(vqgan.decode_latent(quantised).float(), target)
        value = value + COMMITMENT * commitment + ANCHOR * anchor
        used = (self.uses > DEAD).float().mean().item()
        return value, {"used": used, "anchor": anchor.item(), **numbers}

    def principal(self, pixels: torch.Tensor) -> torch.Tensor:
        """The principal components of every patch: [batch, patch, code_dim]."""
        return (_patches(pixels, self.patch_size) - self.mean) @ self.components

    @torch.no_grad()
    def start(self, pixels: torch.Tensor, generator: torch.Generator) -> None:
        """Find the principal components and the first codebook, on a sample of pictures."""
        patches = _patches(pixels, self.patch_size).flatten(0, 1)
        variances, basis = torch.linalg.eigh(torch.cov(patches.T))
        variances, basis = variances.flip(0).clamp(min=1e-12), basis.flip(1)
        error = _water_level(variances, math.log2(len(self.uses)))
        self.mean.copy_(patches.mean(0))
        self.components.copy_(basis[:, : self.components.shape[1]] / error**0.5)
        points = (patches - self.mean) @ self.components
        codebook = points[torch.randperm(len(points), generator=generator)[: len(self.uses)]]
        for _ in range(ITERATIONS):
            self.vqgan.codebook.weight.copy_(codebook)
            codes = torch.cat([self.vqgan.nearest(some) for some in points.split(8192)])
            counts = torch.bincount(codes, minlength=len(codebook)).to(points.dtype)
            sums = torch.zeros_like(codebook).index_add_(0, codes, points)
            fresh = points[torch.randint(len(points), (len(codebook),), generator=generator)]
            codebook = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], fresh)
        self.vqgan.codebook.weight.copy_(codebook)
        self.uses.copy_(counts / counts.mean())
        self.sums.copy_(codebook * self.uses[:, None])

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
        drawn = torch.randint(len(flat), (count,), generator=generator, device=flat.device)
        self.uses[which] = 1.0
        self.sums[which] = flat[drawn]
        self.vqgan.codebook.weight[which] = flat[drawn]


def _patches(pixels: torch.Tensor, size: int) -> torch.Tensor:
    return rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=size, q=size)


def _water_level(variances: torch.Tensor, bits: float) -> torch.Tensor:
    """The error at which components of these variances, each coded as far as it exceeds it, cost so many bits."""
    low, high = variances.min().log(), variances.max().log()
    for _ in range(50):
        middle = (low + high) / 2
        cost = ((variances.log() - middle).clamp(min=0) / (2 * math.log(2))).sum()
        low, high = (middle, high) if cost > bits else (low, middle)
    return middle.exp()


def train_tokenizer(job: Job) -> Path:
    """Train a tokenizer on the canvases of the training stream; the job's folder receives `checkpoint.pt`, `log.jsonl`
    and the averaged weights, `vqgan.safetensors`; its path is returned.

    Raises:
        ValueError: when several processes train (`processes`).
    """
    if (many := processes().num_processes) > 1:
        raise ValueError(f"{many} processes train a tokenizer; its codebook follows one, so start it without torchrun.")
    torch.manual_seed(job.seed)
    batches, validate = partial(_pictures, job), _validation(job)
    module = TokenizerTraining(job.config, job.recipe.perceptual)
    if not (job.resume and (job.out / CHECKPOINT).exists()):
        sample = torch.cat([batches(SAMPLED_FROM + i)[0] for i in range(-(-SAMPLE // job.recipe.batch_size))])
        module.start(sample, torch.Generator().manual_seed(job.seed))
    average = job.train(module, batches, TokenizerTraining.loss, lambda module: validate(module.vqgan))
    return _save(average.vqgan, job.out)


def train_decoder(job: Job, vqgan: VQGAN) -> Path:
    """Train the decoder of a tokenizer on; the codes stay what they are. Otherwise as `train_tokenizer`."""
    distance = Distance(job.recipe.perceptual)
    for part in (vqgan.encoder, vqgan.quant_conv, vqgan.codebook):
        part.requires_grad_(False)

    def loss(vqgan: VQGAN, batch: tuple[torch.Tensor], generator: torch.Generator) -> LossValue:
        (pixels,) = batch
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            quantised = vqgan.codebook(vqgan.encode(pixels))
        return distance(vqgan.decode_latent(quantised).float(), 2 * pixels - 1)

    return _save(job.train(vqgan, partial(_pictures, job), loss, _validation(job)), job.out)


def _pictures(job: Job, step: int) -> tuple[torch.Tensor]:
    """What a step draws: canvases, and pictures without one where there are photographs."""
    corpus, layout, n = job.corpus or Corpus(()), job.config.layout, job.recipe.batch_size
    plain = round(CROPS * n) if corpus.has(PHOTO) else 0
    canvas = training_prompts(step, n - plain, layout, job.seed, corpus).canvas
    if plain:
        canvas = torch.cat([canvas, training_crops(step, plain, layout.canvas_size, job.seed, corpus)])
    return (canvas,)


def _validation(job: Job) -> Callable[[VQGAN], dict[str, float]]:
    prompts = validation_prompts(tasks.identity, 64, job.config.layout, job.validation)
    canvases = {name: batch.canvas.to(job.device) for name, batch in prompts.items()}

    def validate(vqgan: VQGAN) -> dict[str, float]:
        scores = {name: reconstruction(vqgan, canvas) for name, canvas in canvases.items()}
        return {f"{key}, {name}": value for name, numbers in scores.items() for key, value in numbers.items()}

    return validate


def _save(vqgan: VQGAN, out: Path) -> Path:
    path = out / WEIGHTS
    if not processes().is_main_process:
        return path
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in vqgan.cpu().state_dict().items()}, temporary)
    return path


def load_tokenizer(config: MAEVQGANConfig, folder: Path) -> VQGAN:
    """The tokenizer that `train_tokenizer`, or `train_decoder`, left in a folder.

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
    return {"psnr": (-10 * error.log10()).mean().item(), "codes": len(codes.unique()) / vqgan.codebook.num_embeddings}
