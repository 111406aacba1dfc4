"""What a found set of units must beat before it means anything: units drawn at random, noise, the vectors of other
tasks and their mean, and an example that tells nothing.

>>> conditions = comparison(vector, result) | controls(vector, result, vectors, prompts=48)
>>> table = evaluate(model, task, prompts, conditions)      # intervals over draws and queries
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from vtv_nnsight.evaluation import conditions as names
from vtv_nnsight.evaluation.conditions import Condition, sets_of
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.vectors import TaskVector, TaskVectors

DRAWS = 16
"""One draw says little: with 16, the mIoU of segmentation at random units of the embedded model went from 0.12 to
0.74."""
_STRIDE = 1_000_003


def random_units(patches: Any, draws: int = DRAWS, *, matched: bool = False, seed: int = 0) -> list[PatchSet]:
    """As many units as a set has, drawn at random, several times.

    Args:
        patches: A PatchSet or a SearchResult.
        draws: How often.
        matched: Take as many units of each stage and group of positions (such as the decoder's output) as the set has;
            else all units are as likely.
        seed: Of what is drawn.

    Raises:
        ValueError: when draws is less than 1.
    """
    if draws < 1:
        raise ValueError(f"draws={draws} draws nothing; give 1 or more.")
    patches = sets_of(patches)
    space, sets = patches.space, []
    kind = torch.zeros(len(space), dtype=torch.long)
    if matched:
        _, kind = torch.stack([space.units.stage, space.units.group]).unique(dim=1, return_inverse=True)
    counts = torch.bincount(kind[patches.choices], minlength=int(kind.max()) + 1)
    for draw in range(draws):
        order = torch.randperm(
            len(space), generator=torch.Generator().manual_seed(names.CONTROL + seed + _STRIDE * draw)
        )
        choices = torch.zeros(len(space), dtype=torch.bool)
        for number, count in enumerate(counts.tolist()):
            choices[order[kind[order] == number][:count]] = True
        sets.append(PatchSet(space, choices))
    return sets


def controls(
    vector: TaskVector,
    patches: Any,
    others: Mapping[str, TaskVector] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    prompts: int | None = None,
) -> dict[str, Condition | list[Condition]]:
    """Conditions for `evaluate`: the vector at random units and at units matched by stage and region (see
    `random_units`; several draws each); and at the units that were found noise of the vector's norm, the mean over
    tasks, and the vector of every other task.

    Args:
        vector: The task's.
        patches: A PatchSet or a SearchResult.
        others: Vectors of all tasks by name.
        draws: Of the random units.
        seed: Of the random units and of the noise; the first draw is the one of `comparison`.
        prompts: Ask only so many prompts, the first ones, with noise and other vectors, and a quarter of them with each
            draw. Tables say how many; None asks all.
    """
    quarter = prompts and -(-prompts // 4)
    conditions: dict[str, Condition | list[Condition]] = {}
    for name, matched in ((names.RANDOM, False), (names.MATCHED, True)):
        sets = random_units(patches, draws, matched=matched, seed=seed)
        conditions[name] = [Condition("zero", vector, units, prompts=quarter) for units in sets]
    at_units = {names.NOISE: noise_vector(vector, seed)} | ({names.MEAN: TaskVectors(others).mean()} if others else {})
    at_units |= {f"{names.OTHER}{name}": other for name, other in (others or {}).items() if name != vector.task}
    return conditions | {name: Condition("zero", other, patches, prompts=prompts) for name, other in at_units.items()}


def noise_vector(vector: TaskVector, seed: int = 0) -> TaskVector:
    """Noise in the place of a task's vector: a random direction at every head and position, of the same norm."""
    generator = torch.Generator().manual_seed(names.CONTROL + seed)

    def noise(mean: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(mean.shape, generator=generator).to(mean)
        scale: torch.Tensor = torch.linalg.vector_norm(mean, dim=-1) / torch.linalg.vector_norm(drawn, dim=-1)
        return drawn * scale[..., None]

    return replace(vector, task=f"noise for {vector.task}", mean=vector.mean.map(noise), variance=None)


def with_other_examples(prompts: VisualPrompt, others: VisualPrompt, asked: int | None = None) -> dict[str, Condition]:
    """Conditions for `evaluate`: the same queries under the examples of another task's prompts, and under blank ones.

    Args:
        prompts: Those that are evaluated.
        others: As many of another task.
        asked: As `prompts` of `controls`.
    """
    shown = {names.WRONG: prompts.with_examples(others), names.BLANK: prompts.with_examples(None)}
    return {name: Condition(prompts_override=rows, prompts=asked) for name, rows in shown.items()}
