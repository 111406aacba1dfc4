"""An evaluation of a model that runs elsewhere: all that it is asked, in one job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from vtv_nnsight.evaluation.conditions import Condition
from vtv_nnsight.models.inside_trace import answer, deciding, width_of
from vtv_nnsight.models.nnsight_remote import there
from vtv_nnsight.prompts import Prompts
from vtv_nnsight.tasks.base import AnyTask

Plans = Mapping[tuple[str, int], Condition]
"""(name, number of the draw) → condition."""


def asked(
    plans: Plans, counts: Mapping[tuple[str, int], int], batch: Prompts, start: int, device: torch.device
) -> Iterator[tuple[tuple[str, int], Condition, list[Prompts]]]:
    """The conditions that are asked of a batch, with the one-shot prompts of each."""
    for key, condition in plans.items():
        if (count := min(len(batch), counts[key] - start)) > 0:
            yield key, condition, condition.prompts_for(batch if count == len(batch) else batch[:count], start, device)


def ask_there(
    model: Any,
    remote: bool | str,
    task: AnyTask,
    plans: Plans,
    counts: Mapping[tuple[str, int], int],
    batches: Sequence[Prompts],
) -> Iterator[Any]:
    """What the model says where it runs, in the order in which it is asked."""
    asks, start = list[Any](), 0
    for batch in batches:
        for _, condition, parts in asked(plans, counts, batch.one_shot(), start, torch.device("cpu")):
            if condition.shot in ("one", "zero"):
                shown = [rows.query_only() if condition.shot == "zero" else rows for rows in parts]
                asks += [question(model, rows, condition.planned(model, rows.layout), task) for rows in shown]
        start += len(batch)
    return iter(there(model, remote, answer, asks))


def question(model: Any, prompts: Any, writes: Any, task: AnyTask) -> dict[str, Any]:
    """What `inside_trace.answer` is asked, for prompts and what is written inside (see `patching.planned`)."""
    ((_, inputs),) = model.as_tokens([((prompts,), model.scoring)])
    truth, say = model.truth(prompts), {}
    if task.metric.reads == "text":
        say = {"input_ids": model.tokens(prompts.texts)} | model.saying(prompts, truth.shape[1])
    return {"inputs": inputs, "writes": writes, "after": width_of(truth) - 1, "truth": truth, "say": say}


def answered(model: Any, said: torch.Tensor, prompts: Any, task: AnyTask) -> tuple[Any, Any]:
    """The answers that `inside_trace.answer` gave and the true ones, as a model's `answers` has them."""
    if task.metric.reads == "text":
        return model.said(prompts, said), prompts.answers
    return said, deciding(model.truth(prompts))[1]
