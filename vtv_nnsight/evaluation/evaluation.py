"""How well a model does a task under several conditions, on the same prompts, and how sure that is.

    >>> table = evaluate(model, task, prompts, comparison(vectors["segmentation"], result, vectors))
    >>> print(table)                                    # means, 95 % intervals, paired differences to one-shot
    >>> table.to_parquet("values.parquet")                 # one row for each image and condition

The metric is the task's own, of the output cell; beside it stands the model's own loss. Of MAE-VQGAN that is the token
loss, the mean cross-entropy of the output's logits against the tokenizer's codes of the true canvas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from vtv_nnsight.evaluation.conditions import BASELINE, CEILING, FLOOR, ZERO_SHOT, Condition
from vtv_nnsight.evaluation.elsewhere import answered, ask_there, asked
from vtv_nnsight.evaluation.table import Table
from vtv_nnsight.models.devices import device_of, remote_of
from vtv_nnsight.models.interface import InContextModel, Loss, batch_size_of
from vtv_nnsight.patching.forward import forward, remember
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import Prompts
from vtv_nnsight.tasks.base import AnyTask

Conditions = Mapping[str, Condition | str | tuple[Any, ...] | None | Sequence[Condition]]
"""Name → a condition, its short form (see `Condition.of`), or one that is drawn several times."""
UNPATCHED = (BASELINE, ZERO_SHOT, CEILING, FLOOR)
"""What is compared where no conditions are given."""


def evaluate(
    model: InContextModel,
    task: AnyTask,
    prompts: Prompts,
    conditions: Conditions | None = None,
    *,
    fold: int = 0,
    batch_size: int | None = None,
    keep: int = 6,
    progress: bool = True,
    remote: bool | str | None = None,
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
        batch_size: Rows in a trace; None is `models.interface.default_batch_size`, 32 for MAE-VQGAN.
        keep: Answers to keep for `plots.answers`.
        progress: Show a progress bar.
        remote: Where the model runs, as for nnsight's `trace`, by default where it was made to. It is one job.

    Raises:
        ValueError: when there are no prompts or no conditions, or a condition is none of those above, or shows other
            queries.
    """
    for value, kind in ((task, AnyTask), (prompts, Prompts), (conditions or {}, Mapping)):
        if not isinstance(value, kind):
            given = f"a {type(value).__name__} where a {kind.__name__} belongs"
            raise TypeError(f"evaluate was given {given}; write evaluate(model, task, prompts, {{name: condition}}).")
    task.check_model(model)
    if not len(prompts):
        raise ValueError(f"there are no prompts of {task.name!r} to evaluate on; give at least one.")
    prompts.check_truth()
    if conditions is None:
        conditions = {name: name for name in UNPATCHED}
    if not conditions or [] in conditions.values():
        raise ValueError("there are no conditions to compare; give {name: condition}.")
    remote = remote_of(model, remote)
    device = device_of(model, remote)
    plans = _plans(conditions, prompts, device)
    loss = next(iter(model.losses), None)
    counts = {key: min(len(prompts), condition.prompts or len(prompts)) for key, condition in plans.items()}
    values: dict[tuple[str, int], list[torch.Tensor]] = {key: [] for key in plans}
    pictures: dict[str, list[Any]] = {name: [] for name in ("prompt", "truth", *conditions)}
    start, batches = 0, list(prompts.split(batch_size_of(model, batch_size, prompts=prompts)))
    from_there = ask_there(model, remote, task, plans, counts, batches) if remote else None
    with torch.no_grad(), progress_bar(total=sum(counts.values()), unit="answer", disable=not progress) as bar:
        for batch in batches:
            batch = batch.to(device).one_shot()
            truth = model.truth(batch) if loss else None
            cells = batch.shown()
            cached = {} if from_there is not None else _cached(model, batch, list(plans.values()))
            for (name, draw), condition, parts in asked(plans, counts, batch, start, device):
                bar.set_postfix_str(f"{task.name}, {name}")
                override = condition.prompts_override is not None
                aims = [model.truth(rows) if loss else None for rows in parts] if override else [truth]
                more = cached, from_there
                parts_of = (_answer(model, rows, task, condition, loss, aim, *more) for rows, aim in zip(parts, aims))
                answers, truths, losses = zip(*parts_of)
                if answers[0] is not None:
                    answer = answers[0] if len(answers) == 1 else torch.stack(answers).mean(0)
                    cells.setdefault(name, model.show(answer))
                    scores = task.score(answer, truths[0]).double().cpu()
                    values[name, draw].append(torch.stack([scores, torch.stack(losses).double().mean(0).cpu()], 1))
                bar.update(len(parts[0]))
            for name, answer in cells.items():
                pictures[name].append(answer[: max(0, keep - start)])
            start += len(batch)
    kept = {task.name: {name: _joined(parts) for name, parts in pictures.items() if parts}}
    return Table(_frame(task, prompts, values, loss, fold), kept)


def _plans(conditions: Conditions, prompts: Prompts, device: torch.device) -> dict[tuple[str, int], Condition]:
    """(name, number of the draw) → condition on the model's device."""
    drawn = {name: value if isinstance(value, list) else [value] for name, value in conditions.items()}
    plans = {(name, i): Condition.of(value, name) for name, draws in drawn.items() for i, value in enumerate(draws)}
    for (name, _), condition in plans.items():
        condition.check_override(prompts, name)
    return {key: condition.to(device) for key, condition in plans.items()}


def _cached(model: InContextModel, batch: Prompts, plans: Sequence[Condition]) -> dict[str, list[Any] | None]:
    """What does not change of a batch where several conditions patch it, with an example ("one") or without."""
    patched = Counter(str(condition.shot) for condition in plans if condition.patches_alone)
    forms = {"one": batch, "zero": batch.query_only()}
    return {shot: remember(model, forms[shot], len(batch)) for shot, count in patched.items() if count > 1}


def _answer(
    model: Any,
    prompts: Prompts,
    task: AnyTask,
    condition: Condition,
    loss: Loss | None,
    truth: torch.Tensor | None,
    cached: Mapping[str, Any],
    from_there: Iterator[Any] | None,
) -> tuple[Any, Any, torch.Tensor]:
    """The answers to one-shot prompts, or None for a bound that there is not; the true ones; and the losses [batch],
    NaN where the model was not asked or has none."""
    losses = torch.full((len(prompts),), torch.nan)
    if condition.shot in ("copy", "ceiling"):
        return *(model.bound(condition.shot, prompts) or (None, None)), losses
    prompts = prompts.query_only() if condition.shot == "zero" else prompts
    if from_there is not None:
        losses, said = next(from_there)
        return *answered(model, said, prompts, task), losses
    known = cached.get(str(condition.shot)) if condition.patches_alone else None
    output, _ = forward(model, prompts, condition.apply, cached=known and known[: len(prompts)])
    if loss is not None and truth is not None:
        losses = loss.value(output, prompts, truth[: len(prompts)])
    return *model.answers(output, prompts, task, condition.apply), losses


def _joined(parts: Sequence[Any]) -> Any:
    """The answers of batches as one: pictures as uint8 [image, 3, height, width], strings as a list."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat([part.mul(255).round().byte().cpu() for part in parts])
    return [answer for part in parts for answer in part]


def _frame(
    task: AnyTask,
    prompts: Prompts,
    values: Mapping[tuple[str, int], Sequence[torch.Tensor]],
    loss: Loss | None,
    fold: int,
) -> pd.DataFrame:
    """The rows of a `Table`, of (condition, draw) → scores and losses [row, 2] of every batch.

    Raises:
        ValueError: when no condition has values.
    """
    facts: dict[str, Any] = {"task": task.name, "metric": task.metric.name, "label": task.metric.label, "fold": fold}
    facts["noun"] = prompts.noun
    facts["loss_name"] = f"{loss.name.removesuffix('s').replace('_', ' ')} loss" if loss else "loss"
    images = pd.DataFrame({"image": range(len(prompts))} | {n: i.numpy() for n, i in prompts.factors.items()})
    frames = []
    for (name, draw), parts in values.items():
        if parts:
            scores, losses = torch.cat(list(parts)).T.numpy()
            columns: dict[str, Any] = facts | {"condition": name, "draw": draw, "score": scores, "loss": losses}
            frames.append(images.iloc[: len(scores)].assign(**columns))
    if not frames:
        raise ValueError("nothing bounds this model: there is no ceiling to compare; give other conditions.")
    return pd.concat(frames, ignore_index=True)
