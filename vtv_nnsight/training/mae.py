"""The last stage: the transformer learns the codes of hidden patches (VP §3), with the tokenizer frozen.

Most steps hide the output as a prompt does, often with some of the other patches dropped; some show the query alone, as
zero-shot runs it, and some hide patches at random over the whole canvas.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from vtv_nnsight import tasks
from vtv_nnsight.layouts import Layout, take
from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig, MAEVQGANModel
from vtv_nnsight.models.mae_vqgan.published import save_whole
from vtv_nnsight.models.mae_vqgan.vqgan import VQGAN
from vtv_nnsight.parallel import processes
from vtv_nnsight.prompts import VisualPrompt, crop
from vtv_nnsight.training.loop import CHECKPOINT, Job, LossValue
from vtv_nnsight.training.stream import SAMPLED_FROM, training_prompts, validation_prompts

QUERY_ONLY, RANDOM = 0.08, 0.10
"""Shares of the steps that show the query alone, and that hide patches all over the canvas."""
DROPPING = 0.25
"""Share of the other steps that drop patches beside the output; they are also the cheaper ones."""
VALIDATION = 32
"""Prompts of each task and source that a validation answers."""
SAMPLE = 256
"""Prompts on which another model's codes are matched."""
MAX_DROPPED, LEAST_HIDDEN, MAX_HIDDEN = 0.75, 0.5, 0.8
HIDDEN = 0.75
"""Share of the patches that VP and MAE hide, anywhere on the canvas."""


def draw_mask(layout: Layout, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Visible and hidden patch ids of a step's `n` canvases, [patch] where they are the same for all and [n, patch]
    where they differ."""
    kind, share, device = *torch.rand(2, generator=generator, device=generator.device).tolist(), generator.device
    output, visible = layout.regions["output"].to(device), layout.visible.to(device)
    if kind < QUERY_ONLY:
        return layout.regions["query"].to(device), output
    if kind < QUERY_ONLY + RANDOM:
        kept = round(layout.num_patches * (1 - LEAST_HIDDEN - share * (MAX_HIDDEN - LEAST_HIDDEN)))
        order = _shuffled(layout.all_patches.to(device), n, generator)
        return order[:, :kept], order[:, kept:]
    if kind < QUERY_ONLY + RANDOM + DROPPING * (1 - QUERY_ONLY - RANDOM):
        kept = round(len(visible) * (1 - share * MAX_DROPPED))
        return _shuffled(visible, n, generator)[:, :kept], output.expand(n, -1)
    return visible, output


def random_mask(layout: Layout, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Visible and hidden patch ids [n, patch] of canvases that are no prompts (VP §3)."""
    order = _shuffled(layout.all_patches.to(generator.device), n, generator)
    kept = round((1 - HIDDEN) * layout.num_patches)
    return order[:, :kept], order[:, kept:]


def masked_loss(
    model: MAEVQGANModel, canvas: torch.Tensor, codes: torch.Tensor, visible: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of the hidden patches of canvases [batch, 3, height, width] against their codes
    [batch, patch]; a scalar."""
    logits = model(canvas, visible, torch.cat([visible, hidden], dim=-1), logits_to_keep=hidden.shape[-1]).logits
    target = take(codes[..., None], hidden)[..., 0]
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())


def train_mae(
    job: Job,
    vqgan: VQGAN,
    start: MAEVQGANModel | None = None,
    canvases: Callable[[int, int], torch.Tensor] | None = None,
    mask: Callable[[Layout, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]] = draw_mask,
) -> Path:
    """Train the transformer over a trained tokenizer; the job's folder receives `checkpoint.pt`, `log.jsonl` and the
    averaged model as a folder for `from_pretrained`; its path is returned.

    Args:
        start: A model of the same size to begin with, whatever its codes.
        canvases: A step and n → canvases, pixels [n, 3, height, width] in [0, 1]; by default the prompts of the
            training stream.
        mask: What they hide, as `draw_mask` says it.
    """
    torch.manual_seed(job.seed)
    model, layout = MAEVQGANModel(job.config), job.config.layout
    if start is not None:
        _take_over(model, start)
    model.vqgan.load_state_dict(vqgan.state_dict())
    model.vqgan.requires_grad_(False)
    _start_head(model)
    if start is not None:
        sample = training_prompts(SAMPLED_FROM, SAMPLE, layout, job.seed, job.corpus).canvas
        with torch.no_grad():
            recode(start.decoder.head, model.decoder.head, start.vqgan.encode(sample), vqgan.encode(sample))
    on_cpu = torch.device(job.device).type == "cpu"
    if on_cpu:
        model.set_attn_implementation("eager")  # twice as fast there: its fused kernel is slow on small heads
    canvases = canvases or (lambda step, n: training_prompts(step, n, layout, job.seed, job.corpus).canvas)
    held_out = [
        (f"{task.name}, {source}", task, prompts.to(job.device))
        for task in tasks.VTV
        for source, prompts in validation_prompts(task, VALIDATION, layout, job.validation).items()
    ]
    vqgan.to(job.device)
    ceilings = {f"{name}, ceiling": _ceiling(vqgan, task, prompts) for name, task, prompts in held_out}

    def batches(step: int) -> tuple[torch.Tensor, ...]:
        canvas = canvases(step, job.recipe.batch_size)
        if not on_cpu:
            return (canvas,)  # its codes are found on the GPU
        with torch.no_grad():
            return canvas, model.vqgan.encode(canvas)

    def loss(model: MAEVQGANModel, batch: tuple[torch.Tensor, ...], generator: torch.Generator) -> LossValue:
        canvas = batch[0]
        with torch.no_grad(), torch.autocast(canvas.device.type, enabled=False):
            codes = batch[1] if on_cpu else model.vqgan.encode(canvas)
        return masked_loss(model, canvas, codes, *mask(layout, len(canvas), generator)), {}

    def validate(model: MAEVQGANModel) -> dict[str, float]:
        numbers = dict(ceilings)
        for name, task, prompts in held_out:
            numbers[name] = one_shot(model, task, prompts)
            numbers[f"{name}, without example"] = one_shot(model, task, prompts.query_only())
        return numbers

    average = job.train(model, batches, loss, validate)
    average.vqgan.load_state_dict(vqgan.state_dict())  # its decoder may have learned on since the run began
    average.set_attn_implementation("sdpa")
    if processes().is_main_process:
        save_whole(average.cpu(), job.out / "model")
    return job.out / "model"


def _take_over(model: MAEVQGANModel, start: MAEVQGANModel) -> None:
    """Give a model the weights of another but for the head and the tokenizer: the codes may differ."""
    known = {n: p for n, p in start.state_dict().items() if not n.startswith(("vqgan.", "decoder.head."))}
    ours = model.state_dict()
    if differ := [n for n, p in known.items() if n not in ours or p.shape != ours[n].shape]:
        raise ValueError(f"the model to start from is of another size than this one: {differ[0]} differs.")
    model.load_state_dict(known, strict=False)


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


@torch.no_grad()
def _start_head(model: MAEVQGANModel) -> None:
    """Let codes that look alike begin with logits that are alike: the rows of the head are the codebook's, each
    direction at the same variance, in random directions of the decoder's width."""
    head, codebook = model.decoder.head.weight, model.vqgan.codebook.weight
    alike = (codebook - codebook.mean(0)) / codebook.std(0).clamp(min=1e-6)
    spread = torch.nn.init.orthogonal_(torch.empty(codebook.shape[1], head.shape[1]))
    head.copy_(head.std() * alike @ spread * (head.shape[1] / codebook.shape[1]) ** 0.5)


def averaged_model(config: MAEVQGANConfig, folder: Path) -> MAEVQGANModel:
    """What a run that may not have ended has learned so far: the moving average in its checkpoint."""
    model = MAEVQGANModel(config)
    model.load_state_dict(torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)["average"])
    return model.eval()


@torch.no_grad()
def one_shot(model: MAEVQGANModel, task: tasks.Task, prompts: VisualPrompt) -> float:
    """The task's mean metric of the model's answers to prompts."""
    painted = model.generate(prompts.canvas, prompts.visible, prompts.decoded)
    return task.score(crop(painted, "output", prompts.layout), prompts.region("output")).mean().item()


@torch.no_grad()
def _ceiling(vqgan: VQGAN, task: tasks.Task, prompts: VisualPrompt) -> float:
    """The same metric of the truth as the tokenizer draws it."""
    drawn = vqgan.decode(vqgan.encode(prompts.canvas))
    return task.score(crop(drawn, "output", prompts.layout), prompts.region("output")).mean().item()


def _shuffled(patches: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    return patches[torch.rand(n, len(patches), generator=generator, device=patches.device).argsort(1)]
