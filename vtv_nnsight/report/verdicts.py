"""What a table of an evaluation says, in numbers that compare its conditions and in sentences: what the found units
beat, and which tasks need their own vector.

>>> print(*verdicts(table), sep="\n")
>>> plots.matrix(vector_pairs(table))                       # every vector at the same units
>>> specific_tasks(vector_pairs(searched_anew))             # does no other vector do as well?
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vtv_nnsight import metrics
from vtv_nnsight import tasks as registry
from vtv_nnsight.evaluation.conditions import BASELINE, CEILING, FLOOR, MATCHED, OTHER, PATCHED, RANDOM
from vtv_nnsight.evaluation.table import ENOUGH, Line, Table

NUMBERS = ("images", "pictures", "mean", "low", "high", "difference", "difference_low", "difference_high")
"""What `vector_pairs` takes of a `Line`."""
LEVEL = 0.05
_INTERVAL = 2 * NormalDist().inv_cdf(0.975)
"""Standard errors in a 95 % interval."""


class RankAmongDraws(NamedTuple):
    """Where a condition stands among the draws of another, by mean score on the same images.

    Args:
        beaten: Draws that it is better than.
        draws: All draws.
        worst, best: The mean scores of the worst and of the best draw.
        mean: Its own mean score.
    """

    beaten: int
    draws: int
    worst: float
    best: float
    mean: float

    @property
    def p(self) -> float:
        """The p-value by rank: (1 + draws at least as good) / (1 + draws)."""
        return (1 + self.draws - self.beaten) / (1 + self.draws)

    @property
    def least_p(self) -> float:
        """The smallest p-value that so many draws can give."""
        return 1 / (1 + self.draws)


def rank_among_draws(table: Table, task: str, among: str = RANDOM, condition: str = PATCHED) -> RankAmongDraws:
    """How many draws of random units the found ones beat.

    Args:
        table: What `evaluate` returned, with the conditions of `controls`.
        task: Its name.
        among: The condition that was drawn several times.
        condition: The one that is compared with each draw.

    Raises:
        ValueError: when the table lacks one of them.
    """
    draws = table.draws(task, among)
    (mean,) = table.draws(task, condition, same_images_as=among)
    sign = 1 if _metric(table, task).higher_is_better else -1
    drawn = pd.Series(sign * draws)
    beaten = int((sign * mean > drawn).sum())
    return RankAmongDraws(beaten, len(drawn), sign * drawn.min(), sign * drawn.max(), float(mean))


def vector_pairs(table: Table) -> pd.DataFrame:
    """Every vector on every task, of a table of evaluations with the vectors of other tasks: at the same units, as
    `controls` gives them, or at those that were searched for each, as `each_vector` does. All are compared on the
    images that every vector was asked.

    Returns:
        A row for each task and vector: task, vector, metric, label, higher_is_better, images, pictures; mean, low and
        high of the score with its 95 % interval; difference, difference_low and difference_high: the vector's score
        minus that of the task's own vector on the same prompts (NaN for its own).

    Raises:
        ValueError: when no task of the table has vectors of others.
    """
    return _pairs(table).copy()


@lru_cache(maxsize=4)
def _pairs(table: Table) -> pd.DataFrame:
    """What `vector_pairs` returns, resampled once a table: a report and a summary ask for it several times."""
    parts = []
    for name, rows in table.frame.groupby("task", sort=False):
        names = [c for c in rows.condition.unique() if c == PATCHED or c.startswith(OTHER)]
        if PATCHED not in names or len(names) < 2:
            continue
        rows = rows[rows.condition.isin(names)]
        shared = Table(rows[rows.groupby(["fold", "image"]).condition.transform("nunique") == len(names)])
        metric = _metric(shared, str(name))
        lines = pd.DataFrame(shared.lines(baseline=PATCHED)).set_index(["measure", "condition"])
        vectors = [name if condition == PATCHED else condition.removeprefix(OTHER) for condition in names]
        facts = {"metric": metric.name, "label": metric.label, "higher_is_better": metric.higher_is_better}
        numbers = lines.loc[metric.name].loc[names, list(NUMBERS)].reset_index(drop=True)
        parts.append(pd.DataFrame({"task": name, "vector": vectors} | facts).join(numbers))
    if not parts:
        raise ValueError("the table has no vector of another task to compare with; evaluate with `controls`.")
    return pd.concat(parts, ignore_index=True)


def verdicts(table: Table) -> list[str]:
    """What a table says of each task's found units, in a few sentences each: where they stand between floor and ceiling
    and among random units, and what the vectors of other tasks do there. None where fewer than `ENOUGH` different
    pictures were asked."""
    return [" ".join(sentences) for task in table.tasks if (sentences := task_verdict(table, task))]


def task_verdict(table: Table, task: str) -> list[str]:
    """The sentences of one task; see `verdicts`. What the table has not is left out."""
    metric = _metric(table, task)
    lines = {line.condition: line for line in table.lines() if line.task == task and line.measure == metric.name}
    if PATCHED not in lines:
        return []
    if lines[PATCHED].pictures < ENOUGH:
        asked, different = lines[PATCHED].asked, lines[PATCHED].queries
        return [f"{task}: {asked} are too few for a verdict; give {ENOUGH} different {different} or more."]
    mean = lines[PATCHED].mean
    known = {"copying the query": FLOOR, "the tokenizer's own picture of the truth": CEILING}
    bounds = [f"{what} has {lines[name].mean:.3f}" for what, name in known.items() if name in lines]
    end = f"; {' and '.join(bounds)}." if bounds else "."
    sentences = [f"{task}: {metric.label} {mean:.3f} with the task vector{end}"]
    if FLOOR in lines and metric.better(lines[FLOOR].mean, mean):
        sentences.append("Copying the query scores better than the task vector does.")
    for name in (RANDOM, MATCHED):
        if name in lines and lines[name].draws > 1 and lines[name].pictures >= ENOUGH:
            rank = rank_among_draws(table, task, name)
            sentences.append(
                f"On {lines[name].asked} the found units have {rank.mean:.3f} and {rank.draws} draws of {name} "
                f"{rank.worst:.3f} to {rank.best:.3f}: p = {rank.p:.3f} by rank, of {rank.least_p:.3f} at the least."
            )
    if any(name.startswith(OTHER) for name in lines):
        pairs = vector_pairs(table)
        best = best_others(pairs[pairs.task == task]).iloc[0]
        if best.pictures >= ENOUGH:
            sentences.append(f"Transfer at fixed units: {transfer_sentence(best)}")
    return sentences


def beats_copying(metric: metrics.Metric, lines: Mapping[str, Line]) -> bool:
    """Whether the task vector and one-shot are both better than copying the query: only then is one of them better than
    the other at the task.

    Args:
        lines: Condition → its line.
    """
    if FLOOR not in lines:
        return True
    return all(metric.better(lines[name].mean, lines[FLOOR].mean) for name in (PATCHED, BASELINE) if name in lines)


def transfer_sentence(best: Any) -> str:
    """What the best vector of another task does at a task's units, of a row of `best_others`."""
    change = f"{best.difference:+.3f} [{best.difference_low:+.3f}, {best.difference_high:+.3f}]"
    if best.worse:
        return f"the best other vector, of {best.vector}, is off by {change}; units searched for it may do better."
    return f"the vector of {best.vector} is not surely worse ({change})."


def best_others(pairs: pd.DataFrame) -> pd.DataFrame:
    """Of each task in what `vector_pairs` returned, the best vector of another task: worse is True where the
    interval of its difference to the task's own leaves no doubt, and there are `ENOUGH` pictures."""
    others = pairs[pairs.vector != pairs.task].copy()
    higher = others.higher_is_better
    others["worse"] = (others.difference_high < 0).where(higher, others.difference_low > 0)
    others["worse"] &= others.pictures >= ENOUGH
    goodness = others["mean"].where(higher, -others["mean"])
    return others.loc[goodness.groupby(others.task, sort=False).idxmax()].reset_index(drop=True)


def specific_tasks(pairs: pd.DataFrame) -> dict[str, bool]:
    """Task → whether its vector is better than every other: the paired differences leave out zero at 5 %, by Holm's
    correction over the others.

    Args:
        pairs: What `vector_pairs` returns of a table of `each_vector`; p-values are those of a normal distribution of
            the width of the bootstrap interval.
    """
    specific = {}
    for task, others in pairs[pairs.vector != pairs.task].groupby("task", sort=False):
        worse = -others.difference.where(others.higher_is_better, -others.difference)
        errors = (others.difference_high - others.difference_low) / _INTERVAL
        z = [max(0.0, d) / e if e else np.inf * (d > 0) for d, e in zip(worse, errors)]
        p = sorted(2 * NormalDist().cdf(-value) for value in z)
        specific[str(task)] = all(value <= LEVEL / (len(p) - i) for i, value in enumerate(p))
    return specific


def specificity_sentences(pairs: pd.DataFrame) -> list[str]:
    """Which tasks need their own vector, and for each of the others a vector that does as well; nothing of tasks that
    fewer than `ENOUGH` different pictures were asked of."""
    pairs = pairs[pairs.pictures >= ENOUGH]
    if pairs.empty:
        return []
    specific = specific_tasks(pairs)
    sure = [task for task, alone in specific.items() if alone]
    sentences = [f"Of units searched for each pair, no other vector does as well: {', '.join(sure) or 'no task'}."]
    rows: Any = best_others(pairs).itertuples()
    for row in rows:
        if not specific[row.task]:
            change = f"{row.difference:+.3f} [{row.difference_low:+.3f}, {row.difference_high:+.3f}]"
            sentences.append(f"{row.task}: the vector of {row.vector} is not surely worse ({change}).")
    return sentences


def _metric(table: Table, task: str) -> metrics.Metric:
    """What a table scores a task by, which need not be the task's own metric (`tasks.scored_by`)."""
    name = table.frame.metric[table.frame.task == task].iloc[0]
    return metrics.METRICS.get(name) or registry.get(task).metric
