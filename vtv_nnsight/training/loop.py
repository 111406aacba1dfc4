"""The loop that both stages share: bf16, warm-up, a constant rate and a linear decay at the end, clipping, averaged
weights, checkpoints to resume from.

The rate does not depend on how long the run will be until its last `decay` steps, so a run can be stopped anywhere,
gone on with, and ended later: with `steps` and `decay` that end it.

Several processes train one model, as many as torchrun starts, each on other canvases and on other cores or another GPU:

    torchrun --nproc-per-node 2 -m vtv_nnsight pretrain mae --out runs/tiny
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import reduce
from torch import nn
from torch.utils.data import DataLoader

from vtv_nnsight.files import make_folder, naming, replacing
from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig
from vtv_nnsight.parallel import processes
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.training.corpus import Corpus
from vtv_nnsight.training.optimizers import build_optimizers, has_fast_bf16
from vtv_nnsight.training.recipes import Recipe

SAVE_EVERY = 120.0
"""Seconds between checkpoints."""
CHECKPOINT = "checkpoint.pt"
AHEAD = 8
"""Batches that wait for the trainer."""

Batch = tuple[torch.Tensor, ...]
Batches = Callable[[int], Batch]
LossValue = tuple[torch.Tensor, dict[str, float]]
Loss = Callable[[Any, Any, torch.Generator], LossValue]
Validation = Callable[[Any], dict[str, float]]


def train(
    module: nn.Module,
    batches: Batches,
    loss: Loss,
    validate: Validation,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Any:
    """Minimise `loss(module, batches(step), generator)` and return the moving average of the weights.

    What happens in a step depends on the seed and the step alone, so a run that is killed and resumed ends as one that
    was not. Where several processes train, each takes a batch a step, gradients are averaged, and the first one writes.
    `out` receives `checkpoint.pt` every `SAVE_EVERY` seconds and `log.jsonl`, a line a validation, with the mean loss
    since the last one.

    Args:
        batches: The tensors of a batch by its number, which is the step's where one process trains; called in another
            process, a few steps ahead.
        loss: Returns a scalar, and numbers for the progress bar. It runs under bf16 autocast where bf16 is fast.
        validate: Numbers about the averaged module, such as {"psnr": 23.1}.

    Raises:
        FileExistsError: when `out` already holds a run that `resume` does not continue.
        FloatingPointError: naming the step at which the loss is not finite.
    """
    ours = processes()
    make_folder(make_folder(out.parent) / out.name)
    checkpoint, device = out / CHECKPOINT, torch.device(device)
    if checkpoint.exists() and not resume:
        raise FileExistsError(f"{checkpoint} is there already; continue it with resume, or choose another folder.")
    run = _Run(module.to(device).train(), recipe)
    if checkpoint.exists():
        run.load(checkpoint, device)
    losses: list[float] = []
    began, saved_at = time.monotonic() - run.seconds, time.monotonic()
    with progress_bar(
        total=recipe.steps, initial=run.step, desc=out.name, unit="step", disable=not ours.is_main_process
    ) as bar:
        for batch in _load_ahead(batches, run.step, recipe.steps, device):
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + run.step)
            with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bf16(device)):
                value, numbers = loss(module, tuple(tensor.to(device) for tensor in batch), generator)
            run.descend(value)
            losses.append(value.item())
            run.seconds = time.monotonic() - began
            bar.update()
            bar.set_postfix_str(", ".join(f"{n} {number:.3g}" for n, number in {"loss": losses[-1], **numbers}.items()))
            if not ours.is_main_process:
                continue
            ended = run.step == recipe.steps
            if run.step % recipe.validate == 0 or ended:
                line = {"step": run.step, "seconds": round(run.seconds, 1), "loss": sum(losses) / len(losses)}
                line |= {**numbers, **validate(run.average)}
                losses.clear()
                with naming(out / "log.jsonl"), (out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                print(json.dumps({k: round(v, 4) for k, v in line.items()}), flush=True)
            if time.monotonic() - saved_at > SAVE_EVERY or ended:
                run.save(checkpoint)
                saved_at = time.monotonic()
    return run.average


@dataclass(frozen=True)
class Job:
    """What every stage is trained with.

    Args:
        config: The model's sizes.
        recipe, out, resume, seed, device: As for `train`.
        corpus, validation: Pictures to train on and to validate on, beside scenes.
    """

    config: MAEVQGANConfig
    recipe: Recipe
    out: Path
    corpus: Corpus | None = None
    validation: Corpus | None = None
    resume: bool = False
    seed: int = 0
    device: str = "cpu"

    def train(self, module: nn.Module, batches: Batches, loss: Loss, validate: Validation) -> Any:
        """As `train`."""
        options: dict[str, Any] = {"resume": self.resume, "seed": self.seed, "device": self.device}
        return train(module, batches, loss, validate, self.recipe, self.out, **options)


class _Run:
    """What a checkpoint keeps of a run: a module, the moving average of its weights, its optimizers and its step."""

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        self.module, self.recipe, self.step, self.seconds = module, recipe, 0, 0.0
        self.average = deepcopy(module).eval().requires_grad_(False)
        self.optimizers = build_optimizers(module, recipe)
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def load(self, path: Path, device: torch.device) -> None:
        """Take the state that a checkpoint has."""
        state = torch.load(path, map_location=device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        state = {
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def descend(self, loss: torch.Tensor) -> None:
        """One step down the gradient of a loss.

        Raises:
            FloatingPointError: when the loss is not finite.
        """
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of step {self.step} is {loss.item()}; lower the learning rate.")
        for optimizer, rates in zip(self.optimizers, self.peaks):
            optimizer.zero_grad(set_to_none=True)
            for group, peak in zip(optimizer.param_groups, rates):
                group["lr"] = peak * _schedule(self.step, self.recipe)
        loss.backward()
        _average_gradients(self.module)
        nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        _update_average(self.average, self.module, min(self.recipe.ema, self.step / (self.step + 10)))


def _load_ahead(batches: Batches, step: int, steps: int, device: torch.device) -> DataLoader[Batch]:
    """The batches from a step to the last, this process's share of them, made by others a few steps ahead."""
    ours, load = processes(), cast(Any, DataLoader)  # its types ask for a Dataset; numbers of batches will do
    return load(
        range(*(n * ours.num_processes for n in (step, steps)))[ours.process_index :: ours.num_processes],
        batch_size=None,
        collate_fn=batches,
        num_workers=1 if device.type == "cpu" else max(1, (os.cpu_count() or 1) - 2),
        prefetch_factor=AHEAD,
    )


def _average_gradients(module: nn.Module) -> None:
    """Give every process the mean of all processes' gradients."""
    if processes().num_processes == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    mean = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, values in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(values.view_as(gradient))


def _schedule(step: int, recipe: Recipe) -> float:
    """The share of the peak rate that a step has."""
    rising, left = (step + 1) / max(1, recipe.warmup), (recipe.steps - step) / max(1, recipe.decay)
    return min(1.0, rising, left)


@torch.no_grad()
def _update_average(average: nn.Module, module: nn.Module, keep: float) -> None:
    for old, new in zip(average.state_dict().values(), module.state_dict().values()):
        if old.is_floating_point():
            old.lerp_(new, 1 - keep)
        else:
            old.copy_(new)
