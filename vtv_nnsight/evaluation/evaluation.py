"""How well a model does a task under several conditions, on the same prompts, and how sure that is.

    >>> table = evaluate(model, task, prompts, comparison(vectors["segmentation"], result, vectors))
    >>> print(table)                                    # means, 95 % intervals, paired differences to one-shot
    >>> table.to_parquet("values.parquet")                 # one row for each image and condition

The metric is the task's own, of the output cell; beside it stands the model's own loss. Of MAE-VQGAN that is the token
loss, the mean cross-entropy of the output's logits against the tokenizer's codes of the true canvas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from vtv_nnsight.evaluation.conditions import BASELINE, CEILING, FLOOR, ZERO_SHOT, Condition
from vtv_nnsight.evaluation.table import Table
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import InContextModel, Loss, default_batch_size
from vtv_nnsight.patching.forward import forward, output_cell
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import VisualPrompt, crop
from vtv_nnsight.tasks import Task

UNPATCHED = (BASELINE, ZERO_SHOT, CEILING, FLOOR)
"""What is compared where no conditions are given."""


def evaluate(
    model: InContextModel,
    task: Task,
    prompts: VisualPrompt,
    conditions: Mapping[str, Condition | str | tuple | None | Sequence[Condition]] | None = None,
    *,
    fold: int = 0,
    batch_size: int | None = None,
    keep: int = 6,
    progress: bool = True,
) -> Table:
    """Run a model on the same prompts under every condition.

    Args:
        model: A model, on its device and in its dtype.
        task: What the prompts ask, and how answers are scored.
        prompts: With the truth in their output cells; every condition shows the stages what it needs of them.
        conditions: Name → Condition, or in short "one-shot" or None, "zero-shot", "tokenizer" (the ceiling), "copy"
            (the floor), (vector, patches) for zero-shot with patches, or (vector, patches, "one-shot"). A list of
            Conditions is one that is drawn several times, such as random units: its intervals are over draws, too. By
            default the four without patches; `comparison` and `controls` give them all. Differences are to the one
            named "one-shot". A ceiling is left out where nothing bounds the model.
        fold: A number to tell parts of the data apart. `Table.cat` of several folds averages the folds' means, as is
            done for Pascal-5i (NeurIPS 2022, §4.2).
        batch_size: Rows in a trace; None is `stages.default_batch_size`, 32 for MAE-VQGAN.
        keep: Answers to keep for `plots.answers`.
        progress: Show a progress bar.

    Raises:
        ValueError: when there are no prompts or no conditions, or a condition is none of those above, or shows other
            queries.
    """
    if not len(prompts):
        raise ValueError(f"there are no prompts of {task.name!r} to evaluate on; give at least one.")
    if conditions is None:
        conditions = {name: name for name in UNPATCHED}
    if not conditions:
        raise ValueError("there are no conditions to compare; give {name: condition}.")
    drawn = {name: value if isinstance(value, list) else [value] for name, value in conditions.items()}
    plans = {(name, i): Condition.of(value, name) for name, own in drawn.items() for i, value in enumerate(own)}
    device = device_of(model)
    for (name, _), condition in plans.items():
        condition.check_shown(prompts, name)
    plans = {key: condition.to(device) for key, condition in plans.items()}
    loss = next(iter(model.losses), None)
    values: dict[tuple[str, int], list[torch.Tensor]] = {key: [] for key in plans}
    pictures: dict[str, list[torch.Tensor]] = {name: [] for name in ("prompt", "truth", *conditions)}
    kept = start = 0
    counts = {key: min(len(prompts), condition.prompts or len(prompts)) for key, condition in plans.items()}
    with torch.no_grad(), progress_bar(total=sum(counts.values()), unit="answer", disable=not progress) as bar:
        for batch in prompts.split(batch_size or default_batch_size(model)):
            batch = batch.to(device).one_shot()
            truth, codes = batch.region("output"), loss and model.truth(batch)
            more = min(len(batch), keep - kept)
            asked = batch.canvas[:more].clone()
            crop(asked, "output", batch.layout)[:] = 0.5
            shown = {"prompt": asked, "truth": truth}
            for (name, i), condition in plans.items():
                asks = min(len(batch), counts[name, i] - start)
                if asks <= 0:
                    continue
                bar.set_postfix_str(f"{task.name}, {name}")
                own = condition.asked(batch[:asks], start)
                alike = condition.prompts_override is None and codes is not None
                aims = [codes[:asks]] if alike else [loss and model.truth(rows) for rows in own]
                found = [_answer(model, rows, condition, loss, aim) for rows, aim in zip(own, aims)]
                answers, losses = zip(*found)
                if answers[0] is not None:
                    answer = torch.stack(answers).mean(0)
                    shown.setdefault(name, answer)
                    scores = task.score(answer, own[0].region("output"))
                    losses = torch.stack(losses).double().mean(0)
                    values[name, i].append(torch.stack([scores.double(), losses], 1).cpu())
                bar.update(asks)
            for name, cells in shown.items():
                pictures[name].append(cells[:more].mul(255).round().byte().cpu())
            kept += more
            start += len(batch)
    about = {"task": task.name, "metric": task.metric.name, "label": task.metric.label, "fold": fold}
    about |= {"loss_name": _label(loss)}
    asked = pd.DataFrame({"image": range(len(prompts)), "query": prompts.queries.numpy()})
    frames = []
    for (name, i), parts in ((key, parts) for key, parts in values.items() if parts):
        scores, losses = torch.cat(parts).T.numpy()
        found = about | {"condition": name, "draw": i, "score": scores, "loss": losses}
        frames.append(asked.iloc[: len(scores)].assign(**found))
    shown = {task.name: {name: torch.cat(parts) for name, parts in pictures.items() if parts}}
    if not frames:
        raise ValueError("nothing bounds this model: there is no ceiling to compare; give other conditions.")
    return Table(pd.concat(frames, ignore_index=True), shown)


def _answer(
    model: InContextModel, prompts: VisualPrompt, condition: Condition, loss: Loss | None, truth: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The output cells [batch, 3, cell, cell] of one-shot prompts, or None for a ceiling that there is not; and the
    losses [batch], NaN where the model was not asked or has none."""
    losses = torch.full((len(prompts),), torch.nan, device=prompts.device)
    if condition.shot == "copy":
        return prompts.region("query"), losses
    if condition.shot == "ceiling":
        best = model.ceiling(prompts)
        return None if best is None else crop(best, "output", prompts.layout), losses
    prompts = prompts.query_only() if condition.shot == "zero" else prompts
    output, _ = forward(model, prompts, condition.apply)
    if loss is not None:
        losses = loss.value(output, prompts, truth)
    return output_cell(model, output, prompts), losses


def _label(loss: Loss | None) -> str:
    """What a loss is called in tables: "token loss" of "tokens"."""
    return f"{loss.name.removesuffix('s').replace('_', ' ')} loss" if loss else "loss"
