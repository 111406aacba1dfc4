"""REINFORCE over independent Bernoullis."""

from __future__ import annotations

import torch

from vtv_nnsight.search.budget import Search, prefixes
from vtv_nnsight.search.published import published
from vtv_nnsight.search.registry import algorithm

MIN_PROMPTS = 4
"""Prompts under which the effect of dropping a unit is not worth measuring."""


@algorithm("score-function gradients of Bernoullis; also the paper's own")
def reinforce(
    search: Search,
    *,
    recipe: str = "coupled",
    init: float = -1.0,
    lr: float = 0.3,
    decay: float = 0.9,
    images: int = 4,
    masks: int = 4,
    antithetic: bool = True,
    baseline: str = "prompt",
    patience: int | None = 5,
    prune: bool = True,
    tolerance: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Score-function gradients of the expected loss (Williams, 1992) over a Bernoulli for every unit.

    `recipe="published"` is the paper's, to the letter (`search.published.published`); its options are fixed.

    The default differs in five ways. What each is worth, `benchmarks/search_efficiency.py --ablations` measured on the
    embedded model's segmentation with 4000 evaluations and five seeds: the default's test loss is 1.386 ± 0.011 with 16
    units; the published recipe has 1.395 ± 0.015 with 32, after 160 000. No part is worth more than the seeds differ.

    - *A baseline per prompt.* How hard a prompt is says nothing about a mask, so a mask's loss is compared with that of
      the other masks of the same prompt only (leave-one-out: Kool et al., 2019). Without: 1.387 ± 0.004.
    - *Antithetic masks.* The masks of a prompt come in pairs that disagree wherever they can, drawn from u and 1 - u;
      the gradient is corrected for the coupling and stays unbiased (Dong et al., DisARM, 2020; Dimitriev and Zhou,
      ARMS, 2021). Without: 1.394 ± 0.015.
    - *Prompts in turn*, not the same ten: the set does not fit itself to ten pictures. With ten: 1.392 ± 0.012.
    - *Early stopping* on the held-out loss of the units more likely than not. It did not stop any of these searches.
    - *Threshold, then prune*: the result is not a sample. Of the sets of the most likely units the smallest good one is
      taken, then the units that it does without are dropped, by their own effect. Without: 1.379 ± 0.006, 32 units.

    Args:
        recipe: "coupled" or "published".
        init: Initial logit of every unit.
        lr: Adam's learning rate at the start.
        decay: The share of it that is gone when the budget is, linearly. (A constant rate of half of it does as well.)
        images, masks: Prompts a step, and masks for each of them. The default steps are small, which suits a hundred
            units; with more units, a GPU, or several processes to keep busy, give more images.
        antithetic: Draw the masks in pairs; False draws them independently.
        baseline: "prompt" (leave-one-out), or "batch" standardises over the step, as published.
        patience: Held-out evaluations without a better one before the search stops; None never does.
        prune: End with the pruning; False returns the units more likely than not.
        tolerance: How much worse a smaller set may be, in standard errors of the paired difference.
    """
    if recipe == "published":
        given = [name for name, value in search.settings.items() if value != reinforce.options[name]]
        if given := [name for name in given if name != "recipe"]:
            raise ValueError(f"recipe='published' has a {', '.join(given)} of its own; leave that out, or the recipe.")
        return published(search)
    if recipe != "coupled":
        raise ValueError(f"recipe={recipe!r} is unknown; choose 'coupled' or 'published'.")
    if baseline not in ("prompt", "batch"):
        raise ValueError(f"baseline={baseline!r} is unknown; choose 'prompt' or 'batch'.")
    if masks < 2 or antithetic and masks % 2:
        raise ValueError(f"masks={masks} has no pairs to compare; give an even number.")

    logits = torch.full((search.units,), init, dtype=torch.float64)
    adam = torch.optim.Adam([logits], lr)
    cost, held_out = images * masks, len(search.held_out)
    reserve = (search.budget // 3 if prune else 0) + held_out
    every = max(1, search.budget // 12 // cost)
    search.require(reserve + cost + held_out, "one step and the end")
    best, best_loss, waited = logits.sigmoid(), float("inf"), 0
    for step in search.steps():
        if search.left < reserve + cost + held_out or patience is not None and waited >= patience:
            break
        rows, probabilities = search.next_prompts(images), logits.sigmoid()
        choices = sample(probabilities, images, masks, antithetic, search.generator)
        losses = search.losses(choices.flatten(0, 1), rows.repeat_interleave(masks)[:, None]).view(images, masks)
        advantage = _loo(losses) if baseline == "prompt" else losses - losses.mean()
        advantage = advantage / _scale(advantage, search.objective.group[rows])
        adam.param_groups[0]["lr"] = lr * (1 - decay * search.evaluations / (search.budget - reserve))
        logits.grad = gradient(choices, advantage, probabilities, antithetic and baseline == "prompt")
        adam.step()
        if step % every == every - 1:
            chosen = logits > 0
            loss = search.mean(search.validate(chosen, losses.mean()), search.held_out).item()
            waited = 0 if loss < best_loss else waited + 1
            if loss < best_loss:
                best, best_loss = logits.sigmoid(), loss
    if not prune:
        search.validate(best > 0.5)
        return best > 0.5, best, True
    return _prune(search, best, tolerance), best, True


def sample(
    probabilities: torch.Tensor, prompts: int, masks: int, antithetic: bool, generator: torch.Generator
) -> torch.Tensor:
    """Masks from Bernoullis: bool [prompt, mask, unit]; antithetic ones in pairs, mask 2i + 1 the partner of 2i."""
    shape = (prompts, masks // 2 if antithetic else masks, len(probabilities))
    u = torch.rand(shape, dtype=torch.float64, generator=generator)
    if antithetic:
        u = torch.stack([u, 1 - u], dim=2).flatten(1, 2)
    return u < probabilities


def gradient(
    choices: torch.Tensor, advantage: torch.Tensor, probabilities: torch.Tensor, coupled: bool
) -> torch.Tensor:
    """Gradient of the expected loss in the logits: [unit].

    Args:
        choices: [prompt, mask, unit].
        advantage: [prompt, mask].
        coupled: The masks are antithetic pairs, and the advantage of each is against all others of its prompt. Then
            E[partner's loss x score] is the correlation times the gradient, which (1 - correlation) makes up for.
    """
    score = choices.double() - probabilities
    mean = torch.einsum("pm,pmu->u", advantage, score) / advantage.numel()
    if not coupled:
        return mean
    rare = torch.minimum(probabilities, 1 - probabilities)
    correlation = -rare / (1 - rare) / (choices.shape[1] - 1)
    return mean / (1 - correlation)


def _loo(losses: torch.Tensor) -> torch.Tensor:
    """Losses [prompt, mask] against the mean of the other masks of the same prompt."""
    count = losses.shape[1]
    return (losses - losses.mean(1, keepdim=True)) * count / (count - 1)


def _scale(advantage: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Root mean square of the advantages of each prompt's task: [prompt, 1]."""
    scale = torch.ones(len(advantage), 1, dtype=advantage.dtype)
    for group in groups.unique():
        own = groups == group
        scale[own] = advantage[own].square().mean().sqrt().clamp(min=1e-12)
    return scale


def _prune(search: Search, probabilities: torch.Tensor, tolerance: float) -> torch.Tensor:
    """The smallest good set of the likeliest units, less the units that it does without: [unit]. Where the budget does
    not pay for trying all of them, the least likely ones are tried."""
    order = probabilities.argsort(descending=True, stable=True)
    likely = order[: max(1, 3 * int((probabilities > 0.5).sum()) // 2)]
    chosen = search.top_units(likely, tolerance=tolerance, spend=search.left // 2)
    ranked = order[chosen[order]]
    left = search.left - len(search.held_out)
    tried = ranked.flip(0)[: max(0, left // MIN_PROMPTS - 1) // 2].sort().values
    if not len(tried) or len(search.train) < MIN_PROMPTS:
        return chosen
    rows = search.train[: left // (2 * len(tried) + 1)]
    without = chosen.repeat(len(tried), 1)
    without[torch.arange(len(tried)), tried] = False
    needs = search.mean(search.losses(without, rows), rows)
    kept = ranked[: len(ranked) - len(tried)]
    order = torch.cat([kept, tried[needs.argsort(descending=True, stable=True)]])
    sets = prefixes(order, search.units, list(range(len(kept), len(ranked) + 1)))
    losses = search.losses(sets, rows)
    best = search.smallest_best(sets, losses, rows, tolerance)
    search.validate(sets[best], search.mean(losses[best], rows))
    return sets[best]
