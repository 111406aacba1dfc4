"""Faithfulness curves and what is read off them: CPR and CMD, with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

from vtv_nnsight.evaluation.resampling import product_weights
from vtv_nnsight.files import write_text

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""MIB's ten shares of the units (arXiv 2504.13151, §3)."""

MIB = {("CPR", "signed"), ("CMD", "absolute")}
"""Which area MIB takes from which order of the units; marked with a star where both are shown."""

RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Curves:
    """m of every prompt under the first units of rankings.

    Args:
        direction: "in" or "out", see `faithfulness`.
        measure: The name of m.
        sizes: Shares of the units.
        counts: The numbers of units that they are, rounded down as MIB does: small spaces have the same number for
            several shares, and 0 for the smallest.
        full, empty: m of the whole model and with no unit: [prompt].
        kept: (ranking, order, seed) → m under its first units: [size, prompt].
        identifiers: What prompts share, [prompt, identifier]; by default each stands alone.
    """

    direction: str
    measure: str
    sizes: tuple[float, ...]
    counts: tuple[int, ...]
    full: np.ndarray
    empty: np.ndarray
    kept: dict[tuple[str, str, int], np.ndarray]
    identifiers: np.ndarray | None = None

    @property
    def names(self) -> list[tuple[str, str]]:
        """(ranking, order) of every curve."""
        return list(dict.fromkeys((ranking, order) for ranking, order, _ in self.kept))

    def faithfulness(self, ranking: str, order: str = "signed") -> np.ndarray:
        """f(k) of a ranking, its seeds' mean: [size]."""
        return self._resampled(ranking, order, np.ones((1, len(self.full))), self._seeds(ranking, order)[None])[0]

    def interval(self, ranking: str, order: str = "signed", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """95 % bootstrap interval of f(k): two arrays [size]. Prompts and seeds are resampled together, and prompts by
        what they share (see `evaluation.resampling`)."""
        low, high = np.quantile(self._bootstrap(ranking, order, seed), [0.025, 0.975], axis=0)
        return low, high

    def summary(self, seed: int = 0) -> pd.DataFrame:
        """CPR = ∫ f dk (higher is better) and CMD = ∫ |1 − f| dk (0 is best) of every curve, with 95 % intervals:
        by trapezoids on linear k, as MIB has them, and on log k. All are divided by the range of k, which MIB does not
        do: its areas are 0.999 times these on linear k, and 6.91 times on log k. MIB takes CPR from signed and CMD from
        absolute orders: print the curves, and that pair has a star."""
        rows = []
        for ranking, order in self.names:
            best, resampled = self.faithfulness(ranking, order), self._bootstrap(ranking, order, seed)
            row: dict[str, Any] = {"ranking": ranking, "order": order, "seeds": len(self._seeds(ranking, order))}
            for scale in ("linear", "log"):
                for name, function in (("CPR", _cpr), ("CMD", _cmd)):
                    low, high = np.quantile(function(resampled, self.sizes, scale), [0.025, 0.975])
                    value = float(function(best[None], self.sizes, scale)[0])
                    row |= {f"{name} {scale}": value, f"{name} {scale} low": low, f"{name} {scale} high": high}
            rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        frame, cells = self.summary(), {}
        for name in [column for column in frame.columns.astype(str) if column.endswith(("linear", "log"))]:
            columns = (frame[name], frame[f"{name} low"], frame[f"{name} high"])
            star = ["*" * ((name.split()[0], order) in MIB) for order in frame.order]
            cells[name] = [f"{m:.3f} [{low:.3f}, {high:.3f}]{mark}" for m, low, high, mark in zip(*columns, star)]
        head = f"direction {self.direction!r}, m = {self.measure}, {len(self.full)} prompts"
        rows = frame[["ranking", "order", "seeds"]].join(pd.DataFrame(cells)).to_string(index=False)
        return f"{head}\n{rows}\n* as MIB takes it"

    def save(self, path: str | Path) -> None:
        """Write a JSON file of all values."""
        content = {
            "kind": "faithfulness curves",
            "direction": self.direction,
            "measure": self.measure,
            "sizes": self.sizes,
            "counts": self.counts,
            "full": self.full.tolist(),
            "empty": self.empty.tolist(),
            "kept": [[*name, values.tolist()] for name, values in self.kept.items()],
            "identifiers": None if self.identifiers is None else self.identifiers.tolist(),
        }
        write_text(path, json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Curves:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: when there is no such file, or it is something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}.")
        try:
            content = json.loads(Path(path).read_text())
            kept = {(ranking, order, int(seed)): np.array(values) for ranking, order, seed, values in content["kept"]}
            arrays = (np.array(content["full"]), np.array(content["empty"]))
            shared = content.get("identifiers") and np.array(content["identifiers"])
            return cls(content["direction"], content["measure"], tuple(content["sizes"]), tuple(content["counts"]),
                       *arrays, kept, shared)  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no faithfulness curves; expected what Curves.save writes.") from error

    def _seeds(self, ranking: str, order: str) -> np.ndarray:
        seeds = [seed for name, by, seed in self.kept if (name, by) == (ranking, order)]
        if not seeds:
            known = ", ".join(f"{name!r} ({by})" for name, by in self.names)
            raise ValueError(f"there is no curve of {ranking!r} ({order}); there is {known}.")
        return np.array(seeds)

    def _bootstrap(self, ranking: str, order: str, seed: int) -> np.ndarray:
        """f(k) of resampled prompts and seeds: [resample, size]."""
        generator, seeds = np.random.default_rng(seed), self._seeds(ranking, order)
        shared = np.arange(len(self.full)) if self.identifiers is None else self.identifiers
        weights = product_weights(shared, RESAMPLES, generator)
        weights = weights[weights.any(1)]  # a resample can leave nothing
        return self._resampled(ranking, order, weights, generator.choice(seeds, size=(len(weights), len(seeds))))

    def _resampled(self, ranking: str, order: str, prompts: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """f(k) over prompts' weights [resample, prompt] and seeds [resample, seed]: [resample, size]. The quotient is
        that of mean m: a single prompt's could divide by nothing."""
        places = {seed: i for i, seed in enumerate(self._seeds(ranking, order).tolist())}
        stacked = np.stack([self.kept[ranking, order, seed] for seed in places])  # [seed, size, prompt]
        drawn = prompts / prompts.sum(1, keepdims=True)
        full, empty = drawn @ self.full, drawn @ self.empty
        weights = np.zeros((len(seeds), len(places)))
        np.add.at(weights, (np.arange(len(seeds))[:, None], np.vectorize(places.get)(seeds)), 1 / seeds.shape[1])
        m = np.einsum("rs,skp,rp->rk", weights, stacked, drawn, optimize=True)
        return (m - empty[:, None]) / (full - empty)[:, None]


def _cpr(f: np.ndarray, sizes: Sequence[float], scale: str) -> np.ndarray:
    """∫ f dk over the range of k: [resample, size] → [resample]."""
    k = np.log(sizes) if scale == "log" else np.asarray(sizes)
    return trapezoid(f, k, axis=-1) / (k[-1] - k[0])


def _cmd(f: np.ndarray, sizes: Sequence[float], scale: str) -> np.ndarray:
    """∫ |1 − f| dk over the range of k: [resample, size] → [resample]."""
    return _cpr(np.abs(1 - f), sizes, scale)
