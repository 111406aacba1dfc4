"""REINFORCE as published (ECCV 2024, §4.3 and released code), to the letter."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vtv_nnsight.search.budget import Search


class Recipe(NamedTuple):
    """The paper's settings (ECCV 2024, §4.3 and released code)."""

    init: float = -1.0
    lr: float = 0.1
    steps: int = 500
    masks: int = 320
    images: int = 10
    validate_every: int = 50
    epsilon: float = 1e-6


PUBLISHED = Recipe()


def published(search: Search) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The paper's REINFORCE: `search.reinforce(…, recipe="published")`.

    Each step draws 320 masks, 32 for each of the same 10 training prompts; the advantage is the loss standardised over
    the step (within each task first, when there are several); the log-probability is the mean over units; after every
    50th step one sampled mask is tried on the held-out prompts, and the best of these is the result. Without a budget
    it runs its 500 steps.

    Returns:
        Its probabilities are those that the best sample was drawn from.
    """
    recipe, held_out = PUBLISHED, len(search.held_out)
    search.settings = {"recipe": "published", **recipe._asdict()}
    search.set_default_budget(recipe.steps * recipe.masks + -(-recipe.steps // recipe.validate_every) * held_out)
    search.require(recipe.masks + held_out, "one step")
    images = search.train[: recipe.images]
    rows = images[torch.arange(recipe.masks) % len(images)]
    logits = torch.full((search.units,), recipe.init, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], recipe.lr)
    best, best_loss = None, float("inf")
    for step in search.steps(recipe.steps):
        validates = step % recipe.validate_every == 0
        if search.left < recipe.masks + validates * held_out:
            break
        bernoulli = torch.distributions.Bernoulli(logits.sigmoid().clamp(recipe.epsilon, 1 - recipe.epsilon))
        u = torch.rand(recipe.masks, search.units, dtype=torch.float64, generator=search.generator)
        choices = u < bernoulli.probs
        losses = search.losses(choices, rows[:, None])[:, 0]
        advantage = losses.clone()
        groups = search.objective.group[rows]
        if len(groups.unique()) > 1:
            for group in groups.unique():
                advantage[groups == group] = _standardised(advantage[groups == group], recipe.epsilon)
        advantage = _standardised(advantage, recipe.epsilon)
        adam.zero_grad()
        (bernoulli.log_prob(choices.double()).mean(-1) * advantage).mean().backward()
        adam.step()
        if validates:
            probabilities = logits.detach().sigmoid().clamp(recipe.epsilon, 1 - recipe.epsilon)
            chosen = torch.rand(search.units, dtype=torch.float64, generator=search.generator) < probabilities
            loss = search.mean(search.validate(chosen, losses.mean()), search.held_out).item()
            search.trajectory.append((search.evaluations, chosen, probabilities))
            if loss < best_loss:
                best, best_loss = (chosen, probabilities), loss
    return *best, True


def _standardised(losses: torch.Tensor, epsilon: float) -> torch.Tensor:
    return (losses - losses.mean()) / (losses.std() + epsilon)
