"""What an algorithm is given: a `Search`, through which it proposes sets of units and reads their losses.

An algorithm is a function of a `Search` that returns a set of units and a score for each of them. `registry.algorithm`
makes it public and puts it into `ALGORITHMS`, where the command line, the benchmarks and the docs find it. A file in
this folder is all that a new one takes:

    >>> from vtv_nnsight.search.registry import algorithm
    >>> @algorithm("the toss of a coin")
    ... def coin(search):
    ...     "One set by the toss of a coin."
    ...     choices = torch.rand(search.units, generator=search.generator) < 0.5
    ...     search.validate(choices)
    ...     return choices, choices.double()
    >>> result = coin(model, vector, task, prompts, space, budget=1000, seed=0)
    >>> result = coin.on(objective, budget=1000, seed=0)           # any SearchObjective: no model is needed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast_object_list

from vtv_nnsight.digests import tensor_digest
from vtv_nnsight.finite import check_whole
from vtv_nnsight.parallel import processes
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.search.journal import Journal
from vtv_nnsight.search.result import SearchResult, Step
from vtv_nnsight.vectors import TaskVectors

BUDGET = 4000
"""Patched evaluations that a search may spend where no budget is given."""

GRADIENT_COST = 3
"""Evaluations that a forward and a backward of one prompt count as: a backward is the work of two forwards."""


class SearchObjective(Protocol):
    """The loss of sets of units on prompts: all that an algorithm needs to know of a model. `Objective` is the one of
    task vectors; `search.greedy.on(objective)` takes any object that has these members.

    It may also have

    - `gradient(gates, rows)`: losses [row] and their gradients [row, unit] at gates [row, unit] between 0 (as it is)
      and 1 (patched), which `gates` and `attribution` read;
    - `layers`, a number, and `gradient(gates, rows, drop=layer)` without what flows through that layer, which
      `attribution(drop=True)` reads;
    - `among(sets)`: the objective for sets that are asked together, which may compute once what they share;
    - `stride`: how many rows to ask for at once (all of them, without it);
    - `fingerprint`: a dict of what its losses depend on, as JSON can hold it. A search is not resumed on an objective
      of another fingerprint.
    """

    space: Any
    """The units: a `PatchSpace`, `NamedUnits`, or another with `names`, a `fingerprint` and a length."""
    train: torch.Tensor
    """LongTensor [training prompt] of prompt numbers, tasks taking turns."""
    held_out: torch.Tensor
    """LongTensor [held-out prompt] of prompt numbers."""
    group: torch.Tensor
    """LongTensor [prompt]: the number of each prompt's task, 0 for all when there is one."""

    def __call__(self, choices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Losses [row] of the sets [row, unit] (bool), each on the prompt of its number `rows` [row]."""


class Search:
    """One search under way, as its algorithm sees it: masks to propose, losses to read, a budget to spend, chance, and
    held-out prompts to be judged by. It counts, keeps the journal and draws the progress bar.

    Args:
        name: The algorithm's.
        objective: The loss of sets of units on prompts.
        budget: Evaluations that may be spent; None is `BUDGET`, or what the algorithm sets.
        seed: Of the generator.
        settings: The algorithm's own options.
        vectors: The vectors of all tasks, for algorithms that compare tasks.
        resume: The journal's file, if one is kept.
        progress: Show a progress bar.

    Attributes:
        units: Number of choosable units.
        train, held_out: LongTensors of prompt numbers; consecutive training prompts are of different tasks.
        generator: The only source of chance.
        budget, evaluations: What may be spent and what has been.
        step: The algorithm's own count of its steps, for errors.
        history: A Step for every set tried on the held-out prompts.
        trajectory: What an algorithm leaves for those who follow it: `published` leaves (evaluations, set [unit],
            probabilities [unit]) each time that it tries a set.

    Raises:
        TypeError: when the objective lacks a member of `SearchObjective`.
        ValueError: when the budget pays for nothing, or the journal is of another search or damaged.
    """

    def __init__(
        self,
        name: str,
        objective: SearchObjective,
        budget: int | None = None,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
        vectors: TaskVectors | None = None,
        resume: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        images = (settings or {}).get("images")
        counts = {"budget": budget, "images": images}
        check_whole(seed=seed, **{name: count for name, count in counts.items() if count is not None})
        if budget is not None and budget < 1:
            raise ValueError(f"budget={budget} pays for nothing; give the evaluations that the search may spend.")
        if images is not None and images < 1:
            raise ValueError(f"images={images} asks no prompt; give the prompts that each set is tried on, 1 or more.")
        self.name, self.seed = name, seed
        self.objective: Any = objective
        self.settings, self.vectors = settings or {}, vectors
        self.limited = budget is not None
        self.budget = budget if budget is not None else BUDGET
        self.units = len(objective.space)
        self.train, self.held_out = objective.train, objective.held_out
        self.generator = torch.Generator().manual_seed(seed)
        self.evaluations, self.step, self._next_prompt = 0, 0, 0
        self.history: list[Step] = []
        self.trajectory: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._heard: list[torch.Tensor] = []
        self._held_out_losses: dict[str, float] = {}
        self._journal = self._open(resume)
        self._bar = progress_bar(
            total=self.budget, desc=name, unit="eval", disable=not (progress and processes().is_main_process)
        )

    @property
    def left(self) -> int:
        """Evaluations that may still be spent."""
        return self.budget - self.evaluations

    @property
    def seconds(self) -> float:
        """Time spent, that of interrupted runs before this one included."""
        return self._journal.seconds

    def set_default_budget(self, evaluations: int) -> None:
        """The budget, where the caller has given none."""
        if not self.limited:
            self.budget = self._bar.total = evaluations

    def require(self, evaluations: int, what: str) -> None:
        """Refuse a budget that does not pay for `what`."""
        if self.left < evaluations:
            words = f"{what} takes {evaluations} evaluations and {self.left} are left"
            raise ValueError(f"budget={self.budget} is too small for {self.name}: {words}; give more.")

    def steps(self, count: int | None = None) -> Iterator[int]:
        """Count the steps of a loop, up to `count`."""
        while count is None or self.step < count:
            yield self.step
            self.step += 1

    def next_prompts(self, count: int) -> torch.Tensor:
        """Numbers of the next training prompts [count], in turn; over again when all have been seen."""
        index = (self._next_prompt + torch.arange(count)) % len(self.train)
        self._next_prompt += count
        return self.train[index]

    def follow(self, loop: Callable[..., None], settings: dict[str, Any], **more: Any) -> None:
        """Run a loop of `loops`, which asks for losses. An objective elsewhere runs it there, too, ahead of us."""

        def ask(choices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            losses = self.losses(choices, rows)
            self.step += 1
            return losses

        self._heard = []
        if hasattr(self.objective, "ahead"):
            self.objective.ahead(loop, {name: deepcopy(value) for name, value in settings.items()}, self._heard)
        loop(ask, **settings, **more)
        if hasattr(self.objective, "ahead"):
            self.objective.ahead()

    def losses(self, choices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The loss of every set on its prompts.

        Args:
            choices: Bool [set, unit].
            rows: Prompt numbers, [prompt] for all sets alike or [set, prompt].

        Returns:
            Float64 [set, prompt].
        """
        rows = rows.expand(len(choices), rows.shape[-1])
        which = torch.arange(len(choices)).repeat_interleave(rows.shape[1])
        flat = rows.flatten()
        evaluate = self.objective.among(choices) if hasattr(self.objective, "among") else self.objective
        return self._answers(
            evaluate, lambda piece: (choices[which[piece]], flat[piece]), len(flat), width=1, cost=1
        ).view(rows.shape)

    def gradient(
        self, gates: torch.Tensor, rows: torch.Tensor, drop: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [row], and their gradients [row, unit] at gates between 0 (as it is) and 1 (patched).

        Args:
            gates: Float [row, unit].
            rows: Prompt numbers [row].
            drop: A layer that gradients do not flow through.

        Raises:
            TypeError: when the objective has no gradient.
        """
        options, layer = ({}, ()) if drop is None else ({"drop": drop}, (torch.tensor(drop),))
        values = self._answers(
            lambda gates, rows, *_: torch.column_stack(self.objective.gradient(gates, rows, **options)),
            lambda piece: (gates[piece], rows[piece], *layer),
            len(rows),
            width=1 + self.units,
            cost=GRADIENT_COST,
        )
        return values[:, 0], values[:, 1:]

    def mean(self, losses: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Mean over prompts of losses [..., prompt], every task counting alike."""
        return losses @ self._weights(rows)

    def validate(self, choices: torch.Tensor, train_loss: float | torch.Tensor = float("nan")) -> torch.Tensor:
        """Try a set [unit] on the held-out prompts: a line of the history. Returns the losses [prompt]."""
        losses = self.losses(choices[None], self.held_out)[0]
        held_out = self.mean(losses, self.held_out).item()
        size = int(choices.sum())
        self._held_out_losses[tensor_digest(choices)] = held_out
        self.history.append(Step(self.evaluations, self.seconds, float(train_loss), held_out, size))
        self._bar.set_postfix_str(f"held-out loss {held_out:.4f}, {size} units")
        return losses

    def top_units(
        self, order: torch.Tensor, size: int | None = None, tolerance: float = 0.5, spend: int | None = None
    ) -> torch.Tensor:
        """The first units of an order, as a set [unit], tried on the held-out prompts.

        Args:
            order: Unit numbers, the best first.
            size: How many to keep; None tries up to 16 sizes on the training prompts, then as many about the best of
                them, and keeps the smallest that is within `tolerance` standard errors of the best.
            spend: Evaluations that this may take; None is all that are left.
        """
        if size is not None and not 0 <= size <= self.units:
            raise ValueError(f"size={size} is not a number of units from 0 to {self.units}.")
        train_loss = float("nan")
        if size is None:
            coarse = sizes(0, len(order))
            images = ((spend or self.left) - len(self.held_out)) // (2 * len(coarse))
            images = min(len(self.train), max(1, images))
            self.require(2 * len(coarse) * images + len(self.held_out), "trying sizes")
            rows = self.train[:images]
            choices, _ = self.best_prefix(order, coarse, rows, tolerance)
            at = coarse.index(int(choices.sum()))
            fine = sizes(coarse[max(0, at - 1)], coarse[min(at + 1, len(coarse) - 1)])
            choices, train_loss = self.best_prefix(order, fine, rows, tolerance)
        else:
            choices = prefixes(order, self.units, [size])[0]
        self.require(len(self.held_out), "the held-out loss")
        self.validate(choices, train_loss)
        return choices

    def best_prefix(
        self, order: torch.Tensor, lengths: list[int], rows: torch.Tensor, tolerance: float
    ) -> tuple[torch.Tensor, float]:
        """The smallest of several prefixes of an order that is within `tolerance` standard errors of the best.

        The error is that of the mean paired difference to the best over the prompts (the one-standard-error rule of
        Breiman et al., Classification and Regression Trees, 1984, §3.4.3, on pairs).

        Args:
            order: Unit numbers, the best first.
            lengths: How many of them each prefix has.
            rows: Prompt numbers [prompt].

        Returns:
            A set [unit], and its mean loss.
        """
        sets, weights = prefixes(order, self.units, lengths), self._weights(rows)
        losses = self.losses(sets, rows)
        excess = losses - losses[(losses @ weights).argmin()]
        mean = excess @ weights
        error = ((excess - mean[:, None]) * weights).square().sum(1).sqrt()
        sizes = sets.sum(1).double().masked_fill(mean > tolerance * error, torch.inf)
        best = torch.where(sizes == sizes.min(), mean, torch.inf).argmin()
        return sets[best], self.mean(losses[best], rows).item()

    def result(self, choices: torch.Tensor, scores: torch.Tensor, probabilistic: bool = False) -> SearchResult:
        """What a search found: a set [unit] that was validated, and the scores of the units."""
        return SearchResult(
            algorithm=self.name,
            patches=PatchSet(self.objective.space, choices),
            scores=scores.double(),
            probabilistic=probabilistic,
            held_out_loss=self._held_out_losses[tensor_digest(choices)],
            evaluations=self.evaluations,
            history=tuple(self.history),
            settings=self.settings,
            seed=self.seed,
        )

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()

    def _answers(
        self,
        evaluate: Callable[..., torch.Tensor],
        questions: Callable[[slice], tuple[torch.Tensor, ...]],
        count: int,
        width: int,
        cost: int,
    ) -> torch.Tensor:
        """`evaluate` of the `questions` of `count` rows, piece by piece: from the journal as far as it goes, then from
        the objective. Values [row, width]; a row costs `cost` evaluations."""
        answers, start, stride = [], 0, getattr(self.objective, "stride", count)

        def checked(*rows: torch.Tensor) -> torch.Tensor:
            return self._checked(evaluate(*rows), (len(rows[0]), width))

        while start < count:
            size = min(count - start, self._journal.next_rows or stride)
            self.evaluations += cost * size
            answers.append(self._journal.answer(questions(slice(start, start + size)), checked))
            self._heard.append(answers[-1])
            if getattr(self.objective, "jobs", 0):
                self._bar.set_description_str(f"{self.name}, {self.objective.progress}")
            self._bar.update(cost * size)
            start += size
        return torch.cat(answers)

    def _checked(self, values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """What an objective gave, as float64 [row, width] on the CPU."""
        values = values.detach().cpu().double()
        if not values.isfinite().all():
            value = values[~values.isfinite()][0].item()
            where = f"step {self.step} of {self.name}, after {self.evaluations} evaluations"
            raise ValueError(f"{where}: a loss is {value}; look for it in the vector, or try dtype=torch.float32.")
        return values.view(shape)

    def _weights(self, rows: torch.Tensor) -> torch.Tensor:
        """Float64 [prompt] that sums to one, each task's share the same."""
        groups, inverse, counts = self.objective.group[rows].unique(return_inverse=True, return_counts=True)
        weights: torch.Tensor = 1 / (len(groups) * counts[inverse].double())
        return weights

    def _open(self, path: str | Path | None) -> Journal:
        """The journal. The main process reads it, sends its answers to the others, and is the only one to write it."""
        settings = {"algorithm": self.name, "seed": self.seed, "budget": self.budget} | self.settings
        settings |= getattr(self.objective, "fingerprint", {})
        journal, error = Journal(None, settings), None
        try:
            journal = Journal(path if processes().is_main_process else None, settings)
        except ValueError as raised:
            error = raised
        journal.answers, error = broadcast_object_list([journal.answers, error])
        if error is not None:
            raise error
        return journal


def sizes(low: int, high: int, count: int = 16) -> list[int]:
    """At most `count` set sizes from `low` to `high`, in about equal ratios."""
    ratios = torch.logspace(0, 1, count, base=high - low + 1, dtype=torch.float64)
    return sorted({low + int(size) - 1 for size in ratios.round()})


def prefixes(order: torch.Tensor, units: int, lengths: list[int]) -> torch.Tensor:
    """The first few units of an order, for several lengths, as sets: bool [length, unit]."""
    sets = torch.zeros(len(lengths), units, dtype=torch.bool)
    for row, length in enumerate(lengths):
        sets[row, order[:length]] = True
    return sets
