"""REINFORCE over independent Bernoullis: score-function gradients of the expected loss.

The update itself, which a server can run, is `loops.climb`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vtv_nnsight.search.budget import Search
from vtv_nnsight.search.loops import climb, sample
from vtv_nnsight.search.registry import algorithm
from vtv_nnsight.text import check_choice

MIN_PROMPTS = 4
"""With fewer prompts the effect of dropping a unit is not worth measuring."""


class Recipe(NamedTuple):
    """The paper's settings (ECCV 2024, §4.3 and released code)."""

    init: float = -1.0
    lr: float = 0.1
    steps: int = 500
    masks: int = 320
    images: int = 10
    validate_every: int = 50
    epsilon: float = 1e-6
    sparsity: float = 0.0
    judge: str | None = None


PUBLISHED = Recipe()


@algorithm("score-function gradients of Bernoullis; also the paper's own")
def reinforce(
    search: Search,
    *,
    recipe: str = "leave-one-out",
    init: float = -1.0,
    lr: float | None = None,
    decay: float = 0.9,
    steps: int | None = None,
    images: int | None = None,
    masks: int = 8,
    sparsity: float = 0.0,
    judge: str | None = None,
    last_stage: float = 0.0,
    prune: bool = True,
    tolerance: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Score-function gradients of the expected loss (Williams, 1992) over a Bernoulli for every unit.

    The default differs from the paper's in three ways, which `benchmarks/search_efficiency.py --ablations` measures:

    - *A baseline per prompt*: a mask's loss is compared with that of the other masks of the same prompt only
      (leave-one-out: Kool et al., 2019), since how hard a prompt is says nothing about a mask.
    - *Prompts in turn*, not the same ten: the set does not fit itself to ten pictures.
    - *Threshold, then prune*: not a sample, but the smallest good set of likely units, less what it does without.

    Args:
        recipe: "leave-one-out" or "published". The second takes no decay, masks, last_stage, prune or tolerance.
        init: Initial logit of every unit.
        lr: Adam's learning rate at the start; None is 0.3, published 0.1.
        decay: The share of it that is gone when the budget is, linearly.
        steps: Steps at most; None is what the budget pays for, published 500.
        images: Prompts a step; None is 2, published 10. With many units, a GPU or several processes, give more.
        masks: Masks for each of these prompts, 2 or more.
        sparsity: Times the mean probability, added to the objective: the released code's `regularization_strength`.
        judge: The one of several tasks that the held-out loss is of; in the released code segmentation. None: all.
        last_stage: The share of the steps' evaluations for units of the last stage alone: decoder first.
        prune: End with the pruning; False returns the units more likely than not.
        tolerance: How much worse a smaller set may be, in standard errors of the paired difference.

    Raises:
        ValueError: when the recipe, the judge or an option is not among those there are, or masks is below two.
    """
    search.held_out = _held_out_of(search, judge)
    check_choice(("leave-one-out", "published"), recipe=recipe)
    if recipe == "published":
        return published(search, _published_options(search.settings))
    if masks < 2:
        raise ValueError(f"masks={masks} leaves none to compare with; give 2 or more.")
    lr, images = 0.3 if lr is None else lr, 2 if images is None else images
    search.settings |= {"lr": lr, "images": images}
    logits = torch.full((search.units,), init, dtype=torch.float64)
    cost, held_out = images * masks, len(search.held_out)
    reserve = (search.budget // 3 if prune else 0) + held_out
    search.require(reserve + cost + held_out, "one step and the end")
    best, best_loss = logits.sigmoid(), float("inf")

    def judged(choices: torch.Tensor, train_loss: torch.Tensor) -> torch.Tensor:
        nonlocal best, best_loss
        losses = search.validate(choices, train_loss)
        if (loss := search.mean(losses, search.held_out).item()) < best_loss:
            best, best_loss = logits.sigmoid(), loss
        return losses

    late, most = getattr(search.objective, "late", None), search.budget if steps is None else steps
    every, spend = max(1, search.budget // 12 // cost), search.budget - reserve
    settings = {"seed": search.seed, "logits": logits, "late": late, "steps": most, "every": every, "spend": spend}
    settings |= {"train": search.train, "held_out": search.held_out, "groups": search.objective.group}
    settings |= {"images": images, "masks": masks, "lr": lr, "decay": decay}
    settings |= {"sparsity": sparsity, "last_stage": last_stage}
    search.follow(climb, settings, judge=judged)
    if not search.history:  # too few steps to be judged on the way
        best = logits.sigmoid()
    if not prune:
        search.validate(best > 0.5)
        return best > 0.5, best, True
    return _prune(search, best, tolerance), best, True


def published(search: Search, recipe: Recipe = PUBLISHED) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The paper's REINFORCE: `search.reinforce(…, recipe="published")`.

    Each step draws 320 masks, 32 for each of the same 10 training prompts; the advantage is the loss standardised over
    the step (within each task first, when there are several); the log-probability is the mean over units; after the
    first step and every 50th from there one sampled mask is tried on the held-out prompts, and the best of these is the
    result. Without a budget
    it runs its 500 steps.

    Returns:
        Its probabilities are those that the best sample was drawn from.
    """
    held_out = len(search.held_out)
    search.settings = {"recipe": "published", **recipe._asdict()}
    search.set_default_budget(recipe.steps * recipe.masks + -(-recipe.steps // recipe.validate_every) * held_out)
    search.require(recipe.masks + held_out, "one step")
    images = search.train[: recipe.images]
    rows = images[torch.arange(recipe.masks) % len(images)]
    logits = torch.full((search.units,), recipe.init, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], recipe.lr)
    best, best_loss = (torch.zeros(0), torch.zeros(0)), float("inf")
    for step in search.steps(recipe.steps):
        validates = step % recipe.validate_every == 0
        if search.left < recipe.masks + validates * held_out:
            break
        bernoulli = torch.distributions.Bernoulli(logits.sigmoid().clamp(recipe.epsilon, 1 - recipe.epsilon))
        choices = sample(bernoulli.probs, (recipe.masks,), search.generator)
        losses = search.losses(choices, rows[:, None])[:, 0]
        advantage = losses.clone()
        groups = search.objective.group[rows]
        if len(groups.unique()) > 1:
            for group in groups.unique():
                advantage[groups == group] = _standardised(advantage[groups == group], recipe.epsilon)
        advantage = _standardised(advantage, recipe.epsilon)
        adam.zero_grad()
        expected = (bernoulli.log_prob(choices.double()).mean(-1) * advantage).mean()
        (expected + recipe.sparsity * bernoulli.probs.mean()).backward()
        adam.step()
        if validates:
            probabilities = logits.detach().sigmoid().clamp(recipe.epsilon, 1 - recipe.epsilon)
            drawn = sample(probabilities, (), search.generator)
            loss = search.mean(search.validate(drawn, losses.mean()), search.held_out).item()
            search.trajectory.append((search.evaluations, drawn, probabilities))
            if loss < best_loss:
                best, best_loss = (drawn, probabilities), loss
    return *best, True


def _held_out_of(search: Search, judge: str | None) -> torch.Tensor:
    """The numbers of a task's held-out prompts, or of all."""
    if judge is None:
        return search.held_out
    names = [task.name for task in getattr(search.objective, "tasks", ())]
    if judge not in names:
        raise ValueError(f"judge={judge!r} is not searched for; choose from {', '.join(names)}.")
    return search.held_out[search.objective.group[search.held_out] == names.index(judge)]


def _published_options(settings: dict[str, Any]) -> Recipe:
    """The paper's recipe with those of its script's options that are given."""
    fixed = ("decay", "masks", "last_stage", "prune", "tolerance")
    if given := [name for name in fixed if settings[name] != reinforce.options[name]]:
        raise ValueError(f"recipe='published' takes no {', '.join(given)}; leave that out, or the recipe.")
    names = ("init", "lr", "steps", "images", "sparsity", "judge")
    return PUBLISHED._replace(**{name: settings[name] for name in names if settings[name] is not None})


def _standardised(losses: torch.Tensor, epsilon: float) -> torch.Tensor:
    return (losses - losses.mean()) / (losses.std() + epsilon)


def _prune(search: Search, probabilities: torch.Tensor, tolerance: float) -> torch.Tensor:
    """The smallest good set of the likeliest units, less the units that it does without: [unit]. Where the budget does
    not pay for trying all of them, the least likely ones are tried."""
    order = probabilities.argsort(descending=True, stable=True)
    likely = order[: max(1, 3 * int((probabilities > 0.5).sum()) // 2)]
    choices = search.top_units(likely, tolerance=tolerance, spend=search.left // 2)
    ranked = order[choices[order]]
    left = search.left - len(search.held_out)
    tried = ranked.flip(0)[: max(0, left // MIN_PROMPTS - 1) // 2].sort().values
    if not len(tried) or len(search.train) < MIN_PROMPTS:
        return choices
    rows = search.train[: left // (2 * len(tried) + 1)]
    without = choices.repeat(len(tried), 1)
    without[torch.arange(len(tried)), tried] = False
    needs = search.mean(search.losses(without, rows), rows)
    kept = ranked[: len(ranked) - len(tried)]
    order = torch.cat([kept, tried[needs.argsort(descending=True, stable=True)]])
    choices, loss = search.best_prefix(order, list(range(len(kept), len(ranked) + 1)), rows, tolerance)
    search.validate(choices, loss)
    return choices
