"""The first stage: a VQGAN that draws canvases from one code a patch.

Its codes are chosen before (`PatchCodes`), so its encoder learns to find a patch's principal components, whose nearest
entry of the codebook is the code, and its decoder to draw pictures from codes; neither waits for the other.
The decoder learns from the pixels' absolute and squared errors, the absolute error of their differences between
neighbours (which keeps edges sharp), and a distance of features (`PerceptualDistance`). Most pictures are canvases,
whose gutters must survive; some are crops without one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from vtv_nnsight import tasks
from vtv_nnsight.files import replacing
from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.vqgan import VQGAN
from vtv_nnsight.pretraining.codes import PatchCodes
from vtv_nnsight.pretraining.corpus import PHOTO, Corpus
from vtv_nnsight.pretraining.perceptual import PerceptualDistance
from vtv_nnsight.pretraining.recipes import Recipe
from vtv_nnsight.pretraining.stream import SAMPLED_FROM, training_crops, training_prompts, validation_prompts
from vtv_nnsight.pretraining.training import begin, train

EDGES = 0.5
SQUARES = 2.0
CROPS = 0.125
"""Share of a batch that are pictures without a canvas."""
LOOKED_AT = 0.25
"""Share of a batch, from its end, whose perceptual distance is measured."""
CODES, WEIGHTS = "codes.safetensors", "vqgan.safetensors"
SAMPLE = 1600
"""Pictures that the codes are found on."""


class TokenizerTraining(nn.Module):
    """A VQGAN over given codes; `perceptual` is the weight of the distance of features."""

    def __init__(self, config: MAEVQGANConfig, codes: PatchCodes, perceptual: float = 0.0) -> None:
        super().__init__()
        self.codes, self.perceptual = codes, perceptual
        # in a tuple, so that its weights are neither saved nor averaged
        self.distance = (PerceptualDistance(),) if perceptual else ()
        self.vqgan = VQGAN(config)
        self.vqgan.codebook.weight.requires_grad_(False).copy_(codes.codebook)

    def loss(self, batch: tuple[torch.Tensor], generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        """Of a batch of pixels [batch, 3, height, width] in [0, 1]."""
        (pixels,) = batch
        target = 2 * pixels - 1
        with torch.autocast(pixels.device.type, enabled=False):  # distances of bf16 confuse codes
            principal, codes = self.codes.principal(pixels), self.codes.encode(pixels)
        found = F.mse_loss(self.vqgan.latent(pixels).float(), principal)
        drawn = self.vqgan.decode_latent(self.codes.codebook[codes]).float()
        squares = F.mse_loss(drawn, target)
        edges = sum((drawn.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (2, 3))
        value = (drawn - target).abs().mean() + SQUARES * squares + EDGES * edges + found
        if self.perceptual:
            few = -max(1, round(LOOKED_AT * len(drawn)))
            value = value + self.perceptual * self.distance[0].to(drawn.device)(drawn[few:], target[few:])
        return value, {"squares": squares.item() / 4, "principal": found.item()}


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
    """Train a tokenizer on the canvases of the training stream; `out` receives first of all `codes.safetensors`, with
    which the transformer's training can begin, then `checkpoint.pt`, `log.jsonl` and the averaged weights,
    `vqgan.safetensors`, whose path is returned. `validation` are the pictures to validate on, beside scenes."""
    begin(out, resume)
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
    if not (resume and (out / CODES).exists()):
        sample = torch.cat([batches(SAMPLED_FROM + i)[0] for i in range(-(-SAMPLE // recipe.batch_size))])
        PatchCodes.find(config, sample, torch.Generator().manual_seed(seed)).save(out / CODES)
    codes = PatchCodes.load(config, out / CODES)
    module = TokenizerTraining(config, codes, recipe.perceptual)

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
        raise FileNotFoundError(f"{path} is not there; end the tokenizer's training (vtv pretrain tokenizer --resume).")
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
