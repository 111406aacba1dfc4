"""How sure a mean is: 95 % percentile intervals by the bootstrap, of rows that share pictures.

Rows of one query, example or source are not independent. Each such identifier is a factor: the resamples draw its
levels with replacement, and a row counts as often as the product of its levels' draws (the pigeonhole bootstrap, Owen,
*Annals of Applied Statistics* 2007). It errs on the wide side where many factors cross.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

RESAMPLES = 2000


def bootstrap(
    values: np.ndarray, folds: np.ndarray | None = None, identifiers: np.ndarray | None = None, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of values [image] and its 95 % percentile interval; see `intervals`."""
    return intervals([np.asarray(values)], folds, identifiers, seed)[0]


def intervals(
    series: Sequence[np.ndarray], folds: np.ndarray | None = None, identifiers: np.ndarray | None = None, seed: int = 0
) -> list[tuple[float, float, float]]:
    """The mean of each of several series of values and its 95 % percentile interval, from the same
    `RESAMPLES` resamples.

    Images are resampled within folds (see `product_weights`), and the folds' means averaged. Where a series has draws,
    these are resampled as well.

    Args:
        series: [image] or [image, draw] each.
        folds: [image]; one fold by default.
        identifiers: [image] or [image, identifier]: images that have a number in common share a picture; by default
            each stands alone. `VisualPrompt.factors` has them.
        seed: Of what is drawn.

    Returns:
        (mean, low, high) of each series.
    """
    columns = [one[:, None] if one.ndim == 1 else one for one in series]
    values = np.hstack(columns)
    folds = np.zeros(len(values)) if folds is None else np.asarray(folds)
    identifiers = np.arange(len(values)) if identifiers is None else np.asarray(identifiers)
    generator = np.random.default_rng(seed)
    means, resampled = [], []
    for fold in np.unique(folds):
        part = values[folds == fold]
        weights = product_weights(identifiers[folds == fold], RESAMPLES, generator)
        means.append(part.mean(0))
        with np.errstate(invalid="ignore"):  # a resample can leave nothing
            resampled.append((weights @ part) / weights.sum(1, keepdims=True))
            resampled[-1][~weights.any(1)] = np.inf
    mean, again = np.mean(means, axis=0), np.mean(resampled, axis=0)
    again = again[~np.isinf(again).any(1)]
    numbers, ends = [], np.cumsum([column.shape[1] for column in columns])[:-1]
    for part, draws in zip(np.split(mean, ends), np.split(again, ends, axis=1)):
        if draws.shape[1] > 1:
            drawn = np.random.default_rng(seed).integers(draws.shape[1], size=draws.shape)
            draws = np.take_along_axis(draws, drawn, axis=1)
        low, high = np.quantile(draws.mean(1), [0.025, 0.975])
        numbers.append((float(part.mean()), float(low), float(high)))
    return numbers


def product_weights(identifiers: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each row counts in each resample, [resample, row]: the product of how often its level of every factor
    was drawn.

    A factor that splits another one's levels further adds nothing, and is left out, as is one of a single level: the
    levels of the coarser one are drawn whole. Rows that share nothing are drawn one by one, in the plain way.

    Args:
        identifiers: [row] or [row, identifier].
        resamples: How many.
        generator: Of what is drawn.
    """
    table = identifiers.reshape(len(identifiers), -1).T
    factors = {tuple(codes): codes for codes in (pd.factorize(column)[0] for column in table)}  # each partition once
    crossed = [codes for codes in factors.values() if codes.max()] or list(factors.values())[:1]
    levels = [len(np.unique(codes)) for codes in crossed]
    weights = np.ones((resamples, len(identifiers)))
    for i, codes in enumerate(crossed):
        finer = (np.unique([codes, other], axis=1).shape[1] == levels[i] for j, other in enumerate(crossed) if j != i)
        if any(finer):
            continue
        drawn = generator.integers(levels[i], size=(resamples, levels[i]))
        offsets = levels[i] * np.arange(resamples)[:, None]
        weights *= np.bincount((drawn + offsets).ravel(), minlength=drawn.size).reshape(drawn.shape)[:, codes]
    return weights
