"""The numbers behind the figures of a page, one table a figure: what its CSV links hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from vtv_nnsight.models.interface import ByStage
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.report.explorer import QueryExplorer
from vtv_nnsight.report.plots import best_so_far
from vtv_nnsight.search.result import SearchResult


def of_units(result: SearchResult) -> pd.DataFrame:
    """Of `plots.score_maps`: a row for each unit."""
    kind = "probability" if result.probabilistic else "score"
    return pd.DataFrame(
        {"unit": result.patches.space.names, kind: result.scores.tolist(), "patched": result.patches.choices.tolist()}
    )


def of_searches(results: Mapping[str, Sequence[SearchResult]]) -> pd.DataFrame:
    """Of `figures.all_searches`: a row for each time that a search looked at its held-out prompts."""
    parts = []
    for name, folds in results.items():
        for number, result in enumerate(folds):
            at = np.array([step.evaluations for step in result.history])
            best = {"evaluations": at, "best held-out loss": best_so_far(result, at)}
            parts.append(pd.DataFrame({"task": name, "search": number, **best}))
    return pd.concat(parts)


def of_sets(sets: Mapping[str, PatchSet]) -> pd.DataFrame:
    """Of `plots.overlap`: a row for each unit, and which sets have it."""
    first = next(iter(sets.values()))
    return pd.DataFrame(
        {"unit": first.space.names} | {name: patches.choices.tolist() for name, patches in sets.items()}
    )


def of_scores(scores: ByStage, layout: Any) -> pd.DataFrame:
    """Of `plots.score_map`: a row for each head and region."""
    parts = []
    for stage, values in scores.items():
        for region, places in layout.places.items():
            layers, heads = np.indices(values.shape[:2])
            means = values[..., places].nanmean(-1).numpy()
            columns = {"layer": layers.ravel(), "head": heads.ravel(), "region": region, "score": means.ravel()}
            parts.append(pd.DataFrame({"stage": str(stage)} | columns))
    return pd.concat(parts).dropna()


def of_playground(explorer: QueryExplorer) -> pd.DataFrame:
    """Of what can be played with: a row for each answer."""
    changes = {"scale": explorer.scales, "without": explorer.units, "vector of": explorer.vectors}
    scores = (explorer.scores[kind] for kind in ("scale", "without", "vectors"))
    return pd.concat(
        pd.DataFrame({"changed": change, "to": values, "score": score})
        for (change, values), score in zip(changes.items(), scores)
    )
