"""The rivals of a task vector in a language model: function vectors (Todd et al., *Function Vectors in Large Language
Models*, ICLR 2024) and the residual stream's task vector (Hendel et al., *In-Context Learning Creates Task Vectors*,
2023).

    >>> vector = TaskVectors.collect(model, {task.name: prompts}, sites=["heads", "residual"])[task.name]
    >>> effects = indirect_effects(model, vector, task, corrupted_prompts(task, train, n=8))
    >>> heads = top_heads(model, effects, 20)
    >>> best = best_layer(model, task, prompts, [function_vector(model, vector, heads)])
    >>> evaluate(model, task, test, {"function vector": best})
    >>> best_layer(model, task, prompts, [vector], mode="replace")          # Hendel et al.

A function vector is the sum of the mean outputs of some heads, as they stand in the residual stream, and is added to it
behind one layer, at the prompt's last token. Its heads are those that most raise the probability of the right answer
when their mean output is put into prompts with shuffled labels: the average indirect effect, over prompts and, where
`indirect_effects` of several tasks are averaged, over tasks, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from vtv_nnsight import search
from vtv_nnsight.evaluation import Condition, evaluate
from vtv_nnsight.finite import check_finite, check_whole
from vtv_nnsight.metrics import Metric
from vtv_nnsight.models.causal_lm import CausalLM
from vtv_nnsight.models.interface import ByStage, StageSite
from vtv_nnsight.models.nnsight_compat import network_of
from vtv_nnsight.models.nnsight_verbs import projection_of
from vtv_nnsight.models.sites import validate_sites
from vtv_nnsight.patching import PatchSet, PatchSpace
from vtv_nnsight.tasks import Row, Text, scored_by
from vtv_nnsight.text import check_kind
from vtv_nnsight.text_prompts import TextPrompts
from vtv_nnsight.vectors import TaskVector
from vtv_nnsight.vectors.compatibility import check_compatible, fingerprint

PROBABILITY = Metric(
    "probability",
    lambda logits, ids: logits.softmax(-1).gather(-1, ids[:, :1])[:, 0],
    higher_is_better=True,
    label="probability of the answer ↑",
    reads="logits",
)
"""Of the answer's first token: what an indirect effect is a difference of."""


def corrupted_prompts(task: Text, rows: Iterable[Row], n: int, seed: int = 0, *, shots: int = 8) -> TextPrompts:
    """The prompts that `task.prompts` makes of the same arguments, with the answers of each prompt's examples in a
    random order that is not their own: they say nothing of the task.

    Raises:
        ValueError: of fewer than two examples, which have no other order.
    """
    if shots < 2:
        raise ValueError(f"shots={shots} examples have one order; give 2 or more.")
    generator, prompts = np.random.default_rng(seed), []
    for examples, query in task.draw(rows, n, seed, shots=shots):
        order = np.arange(shots)
        while (order == np.arange(shots)).all():
            order = generator.permutation(shots)
        shuffled = [{**row, task.needs: examples[other][task.needs]} for row, other in zip(examples, order)]
        prompts.append(task.prompt(shuffled, query))
    return TextPrompts.cat(prompts)


def indirect_effects(model: CausalLM, vector: TaskVector, task: Text, corrupted: TextPrompts) -> torch.Tensor:
    """How much the probability of the right answer rises on corrupted prompts when one head at the last token has the
    vector's value, and nothing else is changed: the mean over the prompts but the last, which the search is judged by,
    for each unit of `PatchSpace(model)`, float64 [unit]. Costs an evaluation a unit and prompt, and one more a prompt.

    Raises:
        ValueError: of a single prompt.
    """
    if len(corrupted) < 2:
        raise ValueError(f"{len(corrupted)} corrupted prompt(s) were given; effects are measured on all but the last.")
    space, judged = PatchSpace(model), scored_by(task, PROBABILITY)
    budget = 2 * (len(space) + 2) * len(corrupted)  # mediation spends half of it on effects
    objective = search.Objective(
        model, vector, judged, corrupted[:-1], space, loss=PROBABILITY.name, held_out=corrupted[-1:]
    )
    return search.mediation.on(objective, budget, progress=False, size=0).scores


def top_heads(model: CausalLM, effects: torch.Tensor, k: int) -> PatchSet:
    """The `k` heads of the largest effects [unit].

    Raises:
        ValueError: when there are not so many, or an effect is not finite.
    """
    check_whole(k=k)
    check_finite(effects, "an effect", "measure it again")
    if not 1 <= k <= len(effects):
        raise ValueError(f"k={k} heads of {len(effects)} were asked for; give 1 to {len(effects)}.")
    choices = torch.zeros(len(effects), dtype=torch.bool)
    choices[effects.argsort(descending=True, stable=True)[:k]] = True
    return PatchSet(PatchSpace(model), choices)


def function_vector(model: CausalLM, vector: TaskVector, heads: PatchSet) -> TaskVector:
    """The sum of a vector's heads at the last token, each through its part of the output projection, behind every
    layer of the residual stream. Where a norm stands between the projection and the stream, as in Gemma 3, each head
    is scaled as that norm scales the mean output of all heads.

    Raises:
        ValueError: when the vector or the heads are of another model, or of other tokens than the last; or where what
            attention adds to the stream is no module's output.
    """
    check_compatible(f"the vector of {vector.task}", vector.fingerprint, "this model", fingerprint(model, cached=True))
    (stage,) = model.stages
    if not heads.choices.any() or any(mask[:, 1:].any() for mask in heads.mask.values()):
        raise ValueError("a function vector is of one head or more at the last token; give units of PatchSpace(model).")
    if stage.name not in vector.mean:
        raise ValueError(f"the vector of {vector.task} has no heads; collect it with sites=['heads', 'residual'].")
    validate_sites(model, "attn")
    (mask,), mean = heads.mask.values(), vector.mean[stage.name]
    total = torch.zeros(stage.width, dtype=mean.dtype)
    for layer in mask.any((1, 2)).nonzero()[:, 0].tolist():
        attention = model.attention(stage.name, layer)
        project, after = network_of(projection_of(attention)), model.outputs(stage.name, layer)["attn"]
        total += _projected(mean[layer, 0], mask[layer, 0], project, None if after is attention else network_of(after))
    everywhere = total.expand(stage.layers, 1, 1, -1).clone()
    named = ByStage({StageSite(stage.name, "residual"): everywhere})
    return replace(vector, task=f"function vector of {vector.task}, {len(heads)} heads", mean=named, variance=None)


@torch.no_grad()
def _projected(z: torch.Tensor, chosen: torch.Tensor, project: torch.nn.Module, norm: torch.nn.Module | None):
    """What some heads, bool [head], of z [head, head_dim] add to the residual stream: [width]."""
    weight = next(project.parameters())
    part = (z * chosen[:, None]).flatten().to(weight)[None]
    nothing = project(torch.zeros_like(part))
    added = project(part) - nothing
    if norm is not None:
        everything = project(z.flatten().to(weight)[None])
        added = added * norm(everything) / everything
    return added[0].to(z)


def best_layer(
    model: CausalLM, task: Text, prompts: TextPrompts, vectors: Sequence[TaskVector], mode: str = "add"
) -> Condition:
    """The vector and the layer that do the task best, zero-shot, on prompts (by their metric, then by their loss), when
    the vector is added behind that layer, or with mode="replace" stands there in the place of the residual stream."""
    check_kind(vectors, Sequence, "vectors", "a list of them")
    space = PatchSpace(model, prompts.layout, sites=["residual"])
    sets = [PatchSet(space, choice) for choice in torch.eye(len(space), dtype=torch.bool)]
    plans = [Condition(vectors=vector, patches=one, mode=mode) for vector in vectors for one in sets]
    table = evaluate(model, task, prompts, {str(i): plan for i, plan in enumerate(plans)}, keep=0, progress=False)
    means = table.frame.groupby("condition")[["score", "loss"]].mean()
    means["score"] *= -1 if task.higher_is_better else 1
    return plans[int(means.sort_values(["score", "loss"], kind="stable").index[0])]
