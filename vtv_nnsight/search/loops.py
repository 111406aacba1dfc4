"""What a search computes beside its model, in plain functions that travel to where the model runs (see
`models.inside_trace`), and that searches here call, too. It imports torch and that module alone."""

from __future__ import annotations

from typing import Any

import torch

from vtv_nnsight.models.inside_trace import answer_loss, followed, forward


def batches_of(groups: torch.Tensor, size: int, tasks: int) -> list[torch.Tensor]:
    """Row numbers of at most `size` rows of one group, such as a task, of the groups of all rows [row]."""
    batches: list[torch.Tensor] = []
    for part in torch.arange(len(groups)).split(size * tasks):
        for group in groups[part].unique():
            batches += part[groups[part] == group].split(size)
    return batches


def evaluate(model: Any, choices: torch.Tensor, rows: torch.Tensor, data: Any) -> torch.Tensor:
    """Float64 [row, 1] losses of sets [row, unit] on prompts of these numbers; of float gates [row, 1 + unit], losses
    and gradients. What `data` holds is what `search.remote` sends."""
    gates = choices.is_floating_point()
    values = torch.zeros(len(rows), 1 + choices.shape[1] * gates, dtype=torch.float64)
    for batch in batches_of(data["kinds"][rows], data["size"], len(data["values"])):
        numbers = rows[batch].tolist()
        task, answers = int(data["group"][numbers[0]]), [data["answers"][i] for i in numbers]
        width = max(len(ids) for ids in answers)
        inputs = {"input_ids": followed([data["texts"][i] for i in numbers], answers, width), "use_cache": False}
        inputs = inputs | ({"logits_to_keep": width} if data["keeps"] else {})
        leaf = choices[batch].float().requires_grad_() if gates else choices[batch]
        padded = torch.cat([leaf, leaf.new_zeros(len(leaf), 1)], 1)
        writes = [
            (site, data["values"][task][site], padded[:, units], "replace") for site, units in data["units"].items()
        ]
        with torch.set_grad_enabled(gates):
            losses = answer_loss(forward(model, inputs, writes, width - 1), data["truth"][numbers])
        parts: Any = choices[batch, :0]
        if gates:
            flows: Any = torch.autograd.grad(losses.sum(), leaf, allow_unused=True) if losses.requires_grad else [None]
            if (parts := flows[0]) is None:
                raise RuntimeError(NO_GRADIENT)
        values[batch] = torch.column_stack([losses.detach().double().cpu(), parts.double().cpu()])
    return values


NO_GRADIENT = "no gradient comes to a block that is run apart from the model"
"""What a server says that does not trust the block."""


def job(model: Any, loop: Any, arguments: Any, known: torch.Tensor, most: int, data: Any) -> torch.Tensor:
    """A part of a search: the values [row, …] of the questions of a loop that come after the `known` ones, until there
    are `most`; and beside each a number that tells its question."""
    parts: list[torch.Tensor] = []

    def ask(choices: torch.Tensor, rows: torch.Tensor) -> Any:
        nonlocal known
        flat, sets = rows.flatten(), choices.repeat_interleave(rows.shape[1], 0)
        if len(known):
            values, known = known[: len(flat)], known[len(flat) :]
        elif sum(map(len, parts)) >= most:
            return None
        else:
            values = evaluate(model, sets, flat, data)
            parts.append(torch.column_stack([values, tags(sets, flat)]))
        return values[:, 0].view(rows.shape)

    loop(ask, **arguments)
    return torch.cat(parts)


def tags(sets: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A number for each question, [row]."""
    return sets.double() @ torch.arange(1, sets.shape[1] + 1).double() + rows.double() / 7


def once(ask: Any, choices: torch.Tensor, rows: torch.Tensor) -> None:
    """The loop of a single question."""
    ask(choices, rows)


def sample(probabilities: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Masks from independent Bernoullis: bool [*shape, unit]."""
    return torch.rand(*shape, len(probabilities), dtype=torch.float64, generator=generator) < probabilities


def gradient(choices: torch.Tensor, advantage: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Gradient of the expected loss in the logits: [unit].

    Args:
        choices: [prompt, mask, unit].
        advantage: [prompt, mask].
        probabilities: [unit], which the choices were drawn from.
    """
    score = choices.double() - probabilities
    return torch.einsum("pm,pmu->u", advantage, score) / advantage.numel()


def scale_of(advantage: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Root mean square of the advantages of each prompt's task: [prompt, 1]."""
    scale = torch.ones(len(advantage), 1, dtype=advantage.dtype)
    for group in groups.unique():
        rows = groups == group
        scale[rows] = advantage[rows].square().mean().sqrt().clamp(min=1e-12)
    return scale


def climb(
    ask: Any,
    seed: int,
    logits: torch.Tensor,
    train: torch.Tensor,
    held_out: torch.Tensor,
    groups: torch.Tensor,
    late: Any,
    images: int,
    masks: int,
    steps: int,
    spend: int,
    every: int,
    lr: float,
    decay: float,
    sparsity: float,
    last_stage: float,
    judge: Any = None,
) -> None:
    """The loop of `search.reinforce`: masks, losses, the update, and now and then the likely units on held-out prompts.

    Args:
        ask: Called with sets [set, unit] and prompts [set, prompt], gives losses [set, prompt], or None to end it.
        seed: Of the masks.
        logits: Of the units, changed in place.
        train, held_out: Numbers of prompts.
        groups: Of all prompts, the number of each one's task.
        late: Bool [unit], those of the last stage, or None.
        images, masks: Prompts a step, and masks for each.
        steps: At most.
        spend: Evaluations that may be spent, after which the rate has decayed.
        every: Steps between two looks at the held-out prompts.
        lr, decay, sparsity, last_stage: As for `search.reinforce`.
        judge: Called in place of `ask` for the held-out prompts, with the set [unit] and the mean loss of the step.
    """
    generator, adam = torch.Generator().manual_seed(seed), torch.optim.Adam([logits], lr)
    spent, cost = 0, images * masks
    for step in range(steps):
        if spend - spent < cost + len(held_out):
            return
        rows = train[(step * images + torch.arange(images)) % len(train)]
        probabilities = logits.sigmoid()
        if late is not None and spent / spend < last_stage:
            probabilities = probabilities * late
        choices = sample(probabilities, (images, masks), generator)
        losses = ask(choices.flatten(0, 1), rows.repeat_interleave(masks)[:, None])
        if losses is None:
            return
        losses = losses.view(images, masks)
        advantage = (losses - losses.mean(1, keepdim=True)) * masks / (masks - 1)  # against the prompt's other masks
        advantage = advantage / scale_of(advantage, groups[rows])
        adam.param_groups[0]["lr"] = lr * (1 - decay * (spent / spend))
        logits.grad = gradient(choices, advantage, probabilities) + sparsity * probabilities * (1 - probabilities)
        adam.step()
        spent += cost
        if step % every == every - 1:
            seen = judge(logits > 0, losses.mean()) if judge else ask((logits > 0)[None], held_out[None])
            if seen is None:
                return
            spent += len(held_out)
