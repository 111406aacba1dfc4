"""What a search returns: a set of units, their scores, and how it got there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from vtv_nnsight.files import read_tensors, write_tensors
from vtv_nnsight.maps import png, unit_maps
from vtv_nnsight.models.nnsight_remote import PLAIN
from vtv_nnsight.patching import PatchSet, PatchSpace

METADATA = ("algorithm", "probabilistic", "held_out_loss", "evaluations", "settings", "seed")
"""What a file has of a result beside its set, its scores and its history."""


class Step(NamedTuple):
    """A moment of a search at which a set was tried on the held-out prompts.

    Args:
        evaluations: Patched evaluations spent so far, one mask on one prompt each, those of this moment included.
        seconds: Time spent so far.
        train_loss: Mean loss on the training prompts, as the algorithm saw it; NaN where it saw none.
        held_out_loss: Mean loss of the set on the held-out prompts.
        size: Number of units in the set.
    """

    evaluations: int
    seconds: float
    train_loss: float
    held_out_loss: float
    size: int


class NamedUnits:
    """The space of an objective that has no model: units that are nothing but their names.

    Args:
        names: One for each unit.
        fingerprint: What tells the space from others, as JSON can hold it; the names, by default.
    """

    def __init__(self, names: Sequence[str], fingerprint: dict[str, Any] | None = None) -> None:
        self.names = list(names)
        self.fingerprint = {"units": self.names} if fingerprint is None else fingerprint

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Name of a unit → its number."""
        return {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"NamedUnits({len(self)} units)"


@dataclass(frozen=True, eq=False)
class SearchResult:
    """A set of units, and the search that found it.

    Args:
        algorithm: The function's name.
        patches: The set.
        scores: Float64 [unit]: what the algorithm thinks of every unit; its docstring says what that is.
        probabilistic: Whether the scores are probabilities.
        held_out_loss: Mean loss of the set on the held-out prompts.
        evaluations: Patched evaluations spent.
        history: The sets tried on the held-out prompts, in order.
        settings: The algorithm's options.
        seed: Of all that was random.
    """

    algorithm: str
    patches: PatchSet
    scores: torch.Tensor
    probabilistic: bool
    held_out_loss: float
    evaluations: int
    history: tuple[Step, ...]
    settings: dict[str, Any]
    seed: int

    @property
    def probabilities(self) -> torch.Tensor:
        """Probability of every unit, [unit].

        Raises:
            ValueError: when the algorithm gives scores of another kind.
        """
        if not self.probabilistic:
            raise ValueError(f"{self.algorithm} gives no probabilities; read result.scores.")
        return self.scores

    def __repr__(self) -> str:
        return (
            f"SearchResult({self.algorithm}, seed {self.seed}: {len(self.patches)} of {len(self.patches.space)} units, "
            f"held-out loss {self.held_out_loss:.4f} after {self.evaluations} evaluations)"
        )

    def _repr_png_(self) -> bytes | None:
        """The maps of its scores, in a notebook; none of units that are too many, or only names."""
        drawn = isinstance(self.patches.space, PatchSpace) and self.patches.space.granularity != "token"
        return png(self.figure()) if drawn else None

    def figure(self) -> Figure:
        """Probabilities or scores as layer × head maps, one a stage and region; the set's units are ringed.

        Raises:
            ValueError: for a space with a unit a token, which has too many regions to draw.
        """
        space, scores = self.patches.space, self.scores
        limits = (0.0, 1.0) if self.probabilistic else (scores.min().item(), scores.max().item())
        label, rings = "probability" if self.probabilistic else "score", space.by_region(self.patches.choices)
        return unit_maps(space.by_region(scores), limits, label=label, rings=rings)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {
            "choices": self.patches.choices,
            "scores": self.scores,
            "history": torch.tensor(self.history, dtype=torch.float64).view(-1, len(Step._fields)),
        }
        space = self.patches.space
        metadata = {"space": space.metadata if isinstance(space, PatchSpace) else space.fingerprint}
        metadata |= {name: getattr(self, name) for name in METADATA}
        if not isinstance(space, PatchSpace):
            metadata["names"] = list(space.names)
        write_tensors(path, "search result", tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read what `save` wrote. The space of a search without a model comes back as `NamedUnits`.

        Raises:
            FileNotFoundError, ValueError: when there is no such file, it is incomplete, or it is something else.
        """
        tensors, metadata = read_tensors(path, "search result")
        try:
            description, names = metadata.pop("space"), metadata.pop("names", None)
            space: Any = PatchSpace.from_metadata(description) if names is None else NamedUnits(names, description)
            rows = tensors["history"].tolist()
            history = tuple(Step(int(n), seconds, train, held, int(size)) for n, seconds, train, held, size in rows)
            patches, scores = PatchSet(space, tensors["choices"]), tensors["scores"]
            if scores.shape != patches.choices.shape:
                raise ValueError(f"scores of shape {list(scores.shape)} are not one for each of {len(space)} units.")
            return cls(patches=patches, scores=scores, history=history, **metadata)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged ({error})"
            raise ValueError(f"{path} is no whole search result: it {what}; search again.") from error


PLAIN[SearchResult] = lambda result: SimpleNamespace(patches=result.patches)
