"""What an algorithm sees of a search: masks to propose, losses to read, a budget, and held-out prompts to be judged on.

An algorithm is a function of a `Run` that returns a set of units and a score for each of them. `algorithm` makes the
public function of it:

    >>> @algorithm
    ... def coin(run):
    ...     "One set by the toss of a coin."
    ...     choices = torch.rand(run.units, generator=run.generator) < 0.5
    ...     run.validate(choices)
    ...     return choices, choices.double()
    >>> result = coin(model, vector, task, prompts, space, budget=1000, seed=0)
    >>> result = coin.on(objective, budget=1000, seed=0)           # any loss of masks on prompts
"""

from __future__ import annotations

import functools
import inspect
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from vtv_nnsight.patches import PatchSet
from vtv_nnsight.progress import tqdm
from vtv_nnsight.search.journal import Answer, Journal, digest
from vtv_nnsight.search.objective import Objective, processes
from vtv_nnsight.search.result import SearchResult, Step

BUDGET = 8000
"""Patched evaluations that a search may spend unless told otherwise."""

GRADIENT_COST = 3
"""Evaluations that a forward and a backward of one prompt count as: a backward is the work of two forwards."""


class Run:
    """One search under way.

    Attributes:
        units: Number of choosable units.
        train, held_out: LongTensors of prompt numbers; consecutive training prompts are of different tasks.
        generator: The only source of chance.
        budget, evaluations: What may be spent and what has been.
        step: The algorithm's own count of its steps, for errors.
        history: A Step for every set tried on the held-out prompts.
    """

    def __init__(
        self,
        name: str,
        objective: Objective,
        budget: int | None,
        seed: int,
        settings: dict[str, Any],
        resume: str | os.PathLike | None = None,
        progress: bool = True,
    ) -> None:
        if budget is not None and budget < 1:
            raise ValueError(f"budget={budget} pays for nothing; give the evaluations that the search may spend.")
        self.name, self.objective, self.seed, self.settings = name, objective, seed, settings
        self.limited = budget is not None
        self.budget = budget if budget is not None else BUDGET
        self.units = len(objective.space)
        self.train, self.held_out = objective.train, objective.held_out
        self.generator = torch.Generator().manual_seed(seed)
        self.evaluations, self.step, self.history = 0, 0, []
        self._offset, self._judged = 0, {}
        self._journal = self._open(resume)
        self._clock = time.perf_counter()
        self._bar = tqdm(
            total=self.budget, desc=name, unit="eval", disable=not (progress and processes().is_main_process)
        )

    @property
    def left(self) -> int:
        """Evaluations that may still be spent."""
        return self.budget - self.evaluations

    @property
    def seconds(self) -> float:
        """Time spent, that of interrupted runs before this one included."""
        return time.perf_counter() - self._clock

    def allow(self, evaluations: int) -> None:
        """Set the budget, where the caller has not."""
        if not self.limited:
            self.budget = self._bar.total = evaluations

    def require(self, evaluations: int, what: str) -> None:
        """Refuse a budget that does not pay for `what`."""
        if self.left < evaluations:
            raise ValueError(
                f"budget={self.budget} is too small for {self.name}: {what} takes {evaluations} evaluations and "
                f"{self.left} are left; give more, or fewer prompts."
            )

    def steps(self, count: int | None = None) -> Iterator[int]:
        """Count the steps of a loop, up to `count`."""
        while count is None or self.step < count:
            yield self.step
            self.step += 1

    def draw(self, count: int) -> torch.Tensor:
        """The next training prompts [count], in turn; over again when all have been seen."""
        index = (self._offset + torch.arange(count)) % len(self.train)
        self._offset += count
        return self.train[index]

    def losses(self, choices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The loss of every set on its prompts.

        Args:
            choices: Bool [set, unit].
            rows: Prompt numbers, [prompt] for all sets alike or [set, prompt].

        Returns:
            Float64 [set, prompt].
        """
        sets, (rows, which) = choices, _pairs(choices, rows)

        def ask(piece: slice) -> tuple[tuple, Callable]:
            pairs = sets[which[piece]], rows.flatten()[piece]
            return pairs, lambda: self.objective(*pairs)

        return torch.cat(self._answers(ask, rows.numel(), cost=1)).view(rows.shape)

    def gradient(self, gates: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [row], and their gradients [row, unit] at gates between 0 (as it is) and 1 (patched).

        Args:
            gates: Float [row, unit].
            rows: Prompt numbers [row].
        """

        def ask(piece: slice) -> tuple[tuple, Callable]:
            pairs = gates[piece], rows[piece]
            return pairs, lambda: torch.column_stack(self.objective.gradient(*pairs)).flatten()

        values = torch.cat(self._answers(ask, len(rows), cost=GRADIENT_COST)).view(len(rows), -1)
        return values[:, 0], values[:, 1:]

    def mean(self, losses: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Mean over prompts of losses [..., prompt], every task counting alike."""
        return losses @ self._weights(rows)

    def validate(self, choices: torch.Tensor, train_loss: float = float("nan")) -> torch.Tensor:
        """Try a set [unit] on the held-out prompts: a line of the history. Returns the losses [prompt]."""
        losses = self.losses(choices[None], self.held_out)[0]
        held_out = self.mean(losses, self.held_out).item()
        size = int(choices.sum())
        self._judged[digest(choices)] = held_out
        self.history.append(Step(self.evaluations, self.seconds, float(train_loss), held_out, size))
        self._bar.set_postfix_str(f"held-out loss {held_out:.4f}, {size} units")
        return losses

    def smallest_best(self, sets: torch.Tensor, losses: torch.Tensor, rows: torch.Tensor, tolerance: float) -> int:
        """The smallest of several sets that is within `tolerance` standard errors of the best: its number.

        The error is that of the mean paired difference to the best over the prompts (the one-standard-error rule of
        Breiman et al., Classification and Regression Trees, 1984, §3.4.3, on pairs).

        Args:
            sets: Bool [set, unit].
            losses: [set, prompt], on prompts `rows` [prompt].
        """
        weights = self._weights(rows)
        excess = losses - losses[(losses @ weights).argmin()]
        mean = excess @ weights
        error = ((excess - mean[:, None]) * weights).square().sum(1).sqrt()
        sizes = sets.sum(1).double().masked_fill(mean > tolerance * error, torch.inf)
        ties = torch.where(sizes == sizes.min(), mean, torch.inf)
        return int(ties.argmin())

    def cut(
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
            size, _ = self._best_size(order, coarse, rows, tolerance)
            at = coarse.index(size)
            fine = sizes(coarse[max(0, at - 1)], coarse[min(at + 1, len(coarse) - 1)])
            size, train_loss = self._best_size(order, fine, rows, tolerance)
        self.require(len(self.held_out), "the held-out loss")
        chosen = prefixes(order, self.units, [size])[0]
        self.validate(chosen, train_loss)
        return chosen

    def _best_size(
        self, order: torch.Tensor, lengths: list[int], rows: torch.Tensor, tolerance: float
    ) -> tuple[int, float]:
        """Of the first units of an order, how many to keep, and their mean loss on the prompts `rows`."""
        sets = prefixes(order, self.units, lengths)
        losses = self.losses(sets, rows)
        best = self.smallest_best(sets, losses, rows, tolerance)
        return lengths[best], self.mean(losses[best], rows).item()

    def result(self, choices: torch.Tensor, scores: torch.Tensor, probabilistic: bool = False) -> SearchResult:
        """What a search found: a set [unit] that was validated, and the scores of the units."""
        return SearchResult(
            algorithm=self.name,
            patches=PatchSet(self.objective.space, choices),
            scores=scores.double(),
            probabilistic=probabilistic,
            held_out_loss=self._judged[digest(choices)],
            evaluations=self.evaluations,
            history=tuple(self.history),
            settings=self.settings,
            seed=self.seed,
        )

    def close(self) -> None:
        self._bar.close()
        self._journal.close()

    def _answers(self, ask: Callable, count: int, cost: int) -> list[torch.Tensor]:
        """Values for `count` rows, piece by piece: from the journal as far as it goes, then from the objective."""
        answers, start, stride = [], 0, getattr(self.objective, "stride", count)
        while start < count:
            known = self._journal.peek()
            piece = slice(start, min(count, start + (known.count if known else stride)))
            arguments, evaluate = ask(piece)
            query = digest(*arguments)
            if known:
                known = self._journal.take(query)
                self._clock = time.perf_counter() - known.seconds
            else:
                known = Answer(query, piece.stop - start, self.seconds, evaluate().double())
                self._journal.write(known)
            self.evaluations += cost * (piece.stop - start)
            self._bar.update(cost * (piece.stop - start))
            self._check(known.values)
            answers.append(known.values)
            start = piece.stop
        return answers

    def _check(self, values: torch.Tensor) -> None:
        if not values.isfinite().all():
            value = values[~values.isfinite()][0].item()
            raise ValueError(
                f"step {self.step} of {self.name}, after {self.evaluations} evaluations: a loss is {value}; look for "
                f"{value} in the vector, or try dtype=torch.float32."
            )

    def _weights(self, rows: torch.Tensor) -> torch.Tensor:
        """Float64 [prompt] that sums to one, each task's share the same."""
        groups, inverse, counts = self.objective.group[rows].unique(return_inverse=True, return_counts=True)
        return 1 / (len(groups) * counts[inverse].double())

    def _open(self, path: str | os.PathLike | None) -> Journal:
        """The journal, which every process reads as the first has it, and the first writes."""
        state = processes()
        facts = {"algorithm": self.name, "seed": self.seed, "budget": self.budget} | self.settings
        facts |= getattr(self.objective, "fingerprint", {})
        journal = Journal(path if state.is_main_process else None, facts)
        if state.num_processes > 1:
            answers = [journal.answers]
            broadcast_object_list(answers)
            journal.answers = answers[0]
        return journal


def algorithm(function: Callable[..., tuple]) -> Callable[..., SearchResult]:
    """The public function of an algorithm: `function(run, …) -> (choices, scores[, whether they are probabilities])`
    with the arguments that all algorithms share (see `vtv_nnsight.search`). `.on(objective, …)` runs it on any
    objective."""
    own = list(inspect.signature(function).parameters.values())[1:]

    def on(
        objective: Objective,
        *,
        budget: int | None = None,
        seed: int = 0,
        resume: str | os.PathLike | None = None,
        progress: bool = True,
        **options: Any,
    ) -> SearchResult:
        if unknown := options.keys() - {parameter.name for parameter in own}:
            names = ", ".join(parameter.name for parameter in own)
            raise TypeError(f"{function.__name__} has no option {', '.join(sorted(unknown))}; its own are: {names}.")
        if missing := [p.name for p in own if p.default is p.empty and p.name not in options]:
            raise TypeError(f"{function.__name__} needs {', '.join(missing)}; see its docstring.")
        settings = {parameter.name: options.get(parameter.name, parameter.default) for parameter in own}
        run = Run(function.__name__, objective, budget, seed, _plain(settings), resume, progress)
        try:
            return run.result(*function(run, **options))
        finally:
            run.close()

    @functools.wraps(function)
    def search(
        model: Any,
        vector: Any,
        task: Any,
        prompts: Any,
        space: Any,
        *,
        budget: int | None = None,
        loss: str = "tokens",
        seed: int = 0,
        batch_size: int | None = None,
        held_out: Any = 0.25,
        resume: str | os.PathLike | None = None,
        progress: bool = True,
        **options: Any,
    ) -> SearchResult:
        objective = Objective(
            model, vector, task, prompts, space, loss=loss, batch_size=batch_size, held_out=held_out, seed=seed
        )
        return on(objective, budget=budget, seed=seed, resume=resume, progress=progress, **options)

    shared = list(inspect.signature(search, follow_wrapped=False).parameters.values())[:-1]
    search.__signature__ = inspect.Signature(shared + own, return_annotation=SearchResult)
    search.on = on
    return search


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


def _pairs(choices: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [set, prompt], and for each of them, flattened, the number of its set."""
    rows = rows.expand(len(choices), rows.shape[-1])
    return rows, torch.arange(len(choices)).repeat_interleave(rows.shape[1])


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON can hold them; tensors by their digest."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return digest(value)
        return tuple(map(plain, value)) if isinstance(value, (tuple, list)) else value

    return {name: plain(value) for name, value in settings.items()}
