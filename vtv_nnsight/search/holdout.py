"""Training and held-out prompts that share no picture.

Prompts are drawn as pairs of pictures, so that one picture is in several of them: as an example here, as a query there.
A split by prompt would judge a search by pictures that it trained on.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components

from vtv_nnsight.prompts import Prompts

Some = TypeVar("Some", bound=Prompts)


def hold_out(prompts: Sequence[Some], held_out: float | Sequence[Some], seed: int = 0) -> list[tuple[Some, Some]]:
    """The prompts to train on and those to judge by, of each task.

    Args:
        prompts: Of each task.
        held_out: The share to hold out (see `split_prompts`), or separate prompts for each task.
        seed: Of the split.

    Raises:
        ValueError: when a side is left without prompts.
    """
    if isinstance(held_out, (int, float)):
        sides = split_prompts(prompts, held_out, seed)
        return [(rows[train], rows[held]) for rows, (train, held) in zip(prompts, sides)]
    for train, held in zip(prompts, held_out):
        _check_sides(len(train), len(held), f"{len(train)} prompts and {len(held)} held-out prompts")
    return list(zip(prompts, held_out))


def held_out_count(prompts: int, share: float) -> int:
    """How many of a task's prompts a share is: at least one.

    Raises:
        ValueError: when that leaves none to train on.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"held_out={share} is no share of the prompts; give a number from 0 to 1, or prompts.")
    count = max(1, round(share * prompts))
    _check_sides(max(0, prompts - count), count, f"{prompts} prompts and held_out={share}")
    return count


def _check_sides(train: int, held_out: int, given: str) -> None:
    if not train or not held_out:
        raise ValueError(f"{given} leave {train} to train on and {held_out} held out; give more prompts.")


def split_prompts(prompts: Sequence[Prompts], share: float, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Split the prompts of one task or of several, so that no held-out prompt shares a picture with a training prompt
    of any task.

    Prompts that share pictures, directly or through others, go to the same side. When so many hang together that a side
    would get less than half of its share, they are cut apart, and the prompts along the cut are left out of both sides.

    Args:
        prompts: Of each task.
        share: The part of each task's prompts to hold out, from 0 to 1.
        seed: Of the choice.

    Returns:
        For each task, LongTensors of the numbers of its training and its held-out prompts.

    Warns:
        UserWarning: When more than a tenth of the prompts is left out, or when too few pictures leave a task nothing to
            train on otherwise, so that its split is by prompt.
    """
    counts = [len(rows) for rows in prompts]
    task = np.repeat(np.arange(len(counts)), counts)
    wanted = np.array([held_out_count(count, share) for count in counts])
    places = np.concatenate([torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy() for n in counts])
    starts = np.cumsum([0, *counts])[task]
    shuffled = starts + places  # within each task
    turns = shuffled[np.argsort(np.arange(len(task)) - starts, kind="stable")]  # the tasks take turns
    named = all(rows.identifiers is not None for rows in prompts)
    linked = _linked([pictures for rows in prompts for pictures in rows.contents(named)])
    held = _choose(linked, task, wanted, turns)
    train = (linked @ held.astype(np.int64) == 0) & ~held  # a prompt that shows no picture is linked to none
    if not all(train[task == i].any() for i in range(len(counts))):
        warnings.warn(
            "the prompts have too few pictures to split them: held-out prompts share pictures with training prompts; "
            "draw prompts from more images.",
            stacklevel=2,
        )
        held[:] = False
        for i, number in enumerate(wanted):
            held[shuffled[task == i][:number]] = True
        train = ~held
    elif (left_out := int((~train & ~held).sum())) > len(held) / 10:
        warnings.warn(
            f"{left_out} of {len(held)} prompts are left out, as they share pictures with training prompts and with "
            "held-out prompts; draw prompts from more images.",
            stacklevel=2,
        )
    sides = []
    for i in range(len(counts)):
        rows = task == i
        train_rows, held_rows = (torch.from_numpy(places[rows][side[shuffled[rows]]]) for side in (train, held))
        sides.append((train_rows, held_rows))
    return sides


def _linked(digests: Sequence[set[int]]) -> csr_array:
    """Which prompts share a picture: bool [prompt, prompt]. A picture that all prompts show (a fixed example) does not
    count, for no split could keep it apart, unless they show nothing else."""
    anywhere: set[int] = set().union(*digests)
    everywhere = set.intersection(*digests) if len(digests) > 1 else set()
    everywhere = set() if everywhere == anywhere else everywhere
    number = {name: i for i, name in enumerate(sorted(anywhere))}
    pairs = [(row, number[name]) for row, names in enumerate(digests) for name in names - everywhere]
    rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    shows = csr_array((np.ones(len(rows), np.int64), (rows, columns)), shape=(len(digests), max(1, len(number))))
    return shows @ shows.T


def _choose(linked: csr_array, task: np.ndarray, wanted: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Which prompts to hold out: bool [prompt], of task i `wanted[i]` of them or a few less.

    Whole components are taken as they fit, in the order of `turns`; a task that gets less than half of what it wants
    gets the rest from the largest component, neighbours first."""
    held, missing = np.zeros(len(task), dtype=bool), wanted.copy()
    _, component = connected_components(linked, directed=False)
    for number in dict.fromkeys(component[turns].tolist()):
        sizes = np.bincount(task[component == number], minlength=len(wanted))
        if (sizes <= missing).all():
            held |= component == number
            missing -= sizes
    for i in np.flatnonzero(2 * missing > wanted):
        rest = turns[~held[turns] & (task[turns] == i)]
        if len(rest):
            start = rest[component[rest] == np.bincount(component[rest]).argmax()][0]
            order = breadth_first_order(linked, start, directed=False, return_predecessors=False)
            held[order[(task[order] == i) & ~held[order]][: missing[i]]] = True
    return held
