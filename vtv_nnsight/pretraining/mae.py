"""The second stage: the transformer learns the codes of hidden patches (VP §3). It needs the codes that the tokenizer's
training finds first, and can be trained beside it; the tokenizer's networks join the model at the end.

Most steps hide the output as a prompt does, often with some of the other patches dropped; some show the query alone, as
zero-shot runs it, and some hide patches at random over the whole canvas.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch.nn import functional as F

from vtv_nnsight import tasks
from vtv_nnsight.layouts import Layout, take
from vtv_nnsight.models.mae import paint_canvas
from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig, MAEVQGANModel
from vtv_nnsight.pretraining.codes import PatchCodes
from vtv_nnsight.pretraining.corpus import Corpus
from vtv_nnsight.pretraining.growth import recode, widen
from vtv_nnsight.pretraining.recipes import Recipe
from vtv_nnsight.pretraining.stream import SAMPLED_FROM, training_prompts, validation_prompts
from vtv_nnsight.pretraining.tokenizer import CODES, load_tokenizer
from vtv_nnsight.pretraining.training import CHECKPOINT, train
from vtv_nnsight.prompts import VisualPrompt, crop
from vtv_nnsight.tasks import Task

QUERY_ONLY, RANDOM = 0.08, 0.10
"""Shares of the steps that show the query alone, and that hide patches all over the canvas."""
DROPPING = 0.6
"""Share of the other steps that drop patches beside the output; they are also the cheaper ones."""
VALIDATION = 32
"""Prompts of each task and source that a validation answers."""
SAMPLE = 256
"""Prompts on which another model's codes are matched."""
TOKENIZER = "tokenizer"
"""The folder beside a run's that holds its tokenizer."""
MOST_DROPPED, LEAST_HIDDEN, MOST_HIDDEN = 0.75, 0.5, 0.8
HIDDEN = 0.75
"""Share of the patches that VP and MAE hide, anywhere on the canvas."""


def draw_mask(layout: Layout, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Visible and hidden patch ids of a step's `n` canvases, [patch] where they are the same for all and [n, patch]
    where each has its own."""
    kind, share, device = *torch.rand(2, generator=generator, device=generator.device).tolist(), generator.device
    output, visible = layout.regions["output"].to(device), layout.visible.to(device)
    if kind < QUERY_ONLY:
        return layout.regions["query"].to(device), output
    if kind < QUERY_ONLY + RANDOM:
        shown = round(layout.num_patches * (1 - LEAST_HIDDEN - share * (MOST_HIDDEN - LEAST_HIDDEN)))
        order = _shuffled(layout.all_patches.to(device), n, generator)
        return order[:, :shown], order[:, shown:]
    if kind < QUERY_ONLY + RANDOM + DROPPING * (1 - QUERY_ONLY - RANDOM):
        shown = round(len(visible) * (1 - share * MOST_DROPPED))
        return _shuffled(visible, n, generator)[:, :shown], output.expand(n, -1)
    return visible, output


def random_mask(layout: Layout, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Visible and hidden patch ids [n, patch] of canvases that are no prompts (VP §3)."""
    order = _shuffled(layout.all_patches.to(generator.device), n, generator)
    shown = round((1 - HIDDEN) * layout.num_patches)
    return order[:, :shown], order[:, shown:]


def masked_loss(
    model: MAEVQGANModel, canvas: torch.Tensor, codes: torch.Tensor, visible: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of the hidden patches of canvases [batch, 3, height, width] against their codes
    [batch, patch]; a scalar."""
    logits = model(canvas, visible, torch.cat([visible, hidden], dim=-1), logits_to_keep=hidden.shape[-1]).logits
    target = take(codes[..., None], hidden)[..., 0]
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())


def train_mae(
    config: MAEVQGANConfig,
    tokenizer: Path,
    recipe: Recipe,
    out: Path,
    *,
    corpus: Corpus | None = None,
    validation: Corpus | None = None,
    start: MAEVQGANModel | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str = "cpu",
    canvases: Callable[[int, int], torch.Tensor] | None = None,
    mask: Callable[[Layout, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]] = draw_mask,
) -> Path:
    """Train the transformer over the codes in a tokenizer's folder; `out` receives `checkpoint.pt`, `log.jsonl` and the
    averaged model as a folder for `from_pretrained`, whose path is returned. `start` is a smaller model, or one of the
    same size, whose transformer it begins with. `canvases(step, n)` are the pixels [n, 3, height, width] of a step, by
    default those of the training stream's prompts, and `mask` says what they hide."""
    torch.manual_seed(seed)
    codes, layout = PatchCodes.load(config, tokenizer / CODES), config.layout
    model = MAEVQGANModel(config) if start is None else widen(start, config)
    _start_head(model, codes)
    if start is not None:
        sample = training_prompts(SAMPLED_FROM, SAMPLE, layout, seed, corpus).canvas
        recode(start.decoder.head, model.decoder.head, start.vqgan.encode(sample), codes.encode(sample))
    model.vqgan.requires_grad_(False)
    if torch.device(device).type == "cpu":
        model.set_attn_implementation("eager")  # twice as fast there: its fused kernel is slow on small heads
    canvases = canvases or (lambda step, n: training_prompts(step, n, layout, seed, corpus).canvas)
    held_out = [
        (f"{task.name}, {source}", task, prompts.to(device))
        for task in tasks.VTV
        for source, prompts in validation_prompts(task, VALIDATION, layout, validation).items()
    ]

    def batches(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        canvas = canvases(step, recipe.batch_size)
        return canvas, codes.encode(canvas)

    def loss(model: MAEVQGANModel, batch: tuple[torch.Tensor, ...], generator: torch.Generator):
        canvas, targets = batch
        return masked_loss(model, canvas, targets, *mask(layout, len(canvas), generator)), {}

    seen = deepcopy(codes).to(device)
    ceilings = {
        f"{name}, ceiling": _score(seen.decode(seen.encode(prompts.canvas)), task, prompts)
        for name, task, prompts in held_out
    }

    def validate(model: MAEVQGANModel) -> dict[str, float]:
        numbers = dict(ceilings)
        for name, task, prompts in held_out:
            numbers[name] = _one_shot(model, seen, task, prompts)
            numbers[f"{name}, without example"] = _one_shot(model, seen, task, prompts.query_only())
        return numbers

    average = train(model, batches, loss, validate, recipe, out, resume=resume, seed=seed, device=device)
    average.vqgan.load_state_dict(load_tokenizer(config, tokenizer).state_dict())
    average.set_attn_implementation("sdpa")
    average.cpu().save_pretrained(out / "model")
    return out / "model"


@torch.no_grad()
def _start_head(model: MAEVQGANModel, codes: PatchCodes) -> None:
    """Let codes that look alike begin with logits that are alike: the rows of the head are the codebook's, each
    direction at the same variance, in random directions of the decoder's width."""
    head, codebook = model.decoder.head.weight, codes.codebook
    alike = (codebook - codebook.mean(0)) / codebook.std(0).clamp(min=1e-6)
    spread = torch.nn.init.orthogonal_(torch.empty(codebook.shape[1], head.shape[1]))
    head.copy_(head.std() * alike @ spread * (head.shape[1] / codebook.shape[1]) ** 0.5)


def averaged_model(config: MAEVQGANConfig, folder: Path) -> MAEVQGANModel:
    """What a run that may not have ended has learned so far, the moving average in its checkpoint, with the tokenizer
    beside it."""
    model = MAEVQGANModel(config)
    model.load_state_dict(torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)["average"])
    model.vqgan = load_tokenizer(config, folder.parent / TOKENIZER)
    return model.eval()


@torch.no_grad()
def _one_shot(model: MAEVQGANModel, codes: PatchCodes, task: Task, prompts: VisualPrompt) -> float:
    """The task's mean metric of the model's answers to prompts, each code drawn as the mean of its patches."""
    predicted = model(prompts.canvas, prompts.visible, prompts.decoded).logits.argmax(-1)
    painted = paint_canvas(
        codes.decode, predicted, prompts.canvas, prompts.visible, prompts.decoded, prompts.layout, paste=False
    )
    return _score(painted, task, prompts)


def _score(canvas: torch.Tensor, task: Task, prompts: VisualPrompt) -> float:
    return task.score(crop(canvas, "output", prompts.layout), prompts.region("output")).mean().item()


def _shuffled(patches: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    return patches[torch.rand(n, len(patches), generator=generator, device=patches.device).argsort(1)]
