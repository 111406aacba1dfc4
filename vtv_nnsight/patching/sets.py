"""Sets of units: what a search finds, and what is patched.

>>> patches = PatchSet.random(space, 40)
>>> patches.save("patches.json")
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from vtv_nnsight import maps
from vtv_nnsight.files import check_file, refusing, write_text
from vtv_nnsight.finite import check_whole
from vtv_nnsight.models.interface import ByStage
from vtv_nnsight.patching.spaces import PatchSpace
from vtv_nnsight.text import quoted
from vtv_nnsight.vectors.compatibility import check_compatible

KIND = "patch set"


@dataclass(frozen=True, eq=False)
class PatchSet:
    """Some units of a space, as a set: `|`, `&`, `-`, `in`, `len`, and iteration over names.

    Args:
        space: The space.
        choices: bool [n], or 0 and 1, one for each of its units.

    Raises:
        ValueError: when choices are not one for each unit, or others than these, such as probabilities; or when two
            sets are of different spaces.
    """

    space: PatchSpace
    choices: torch.Tensor

    def __post_init__(self) -> None:
        if not (hasattr(self.space, "fingerprint") and hasattr(self.space, "__len__")):  # or units of another kind
            raise TypeError(f"a {type(self.space).__name__} was given as the space; write PatchSet(space, choices).")
        try:
            choices = torch.as_tensor(self.choices).detach().cpu()
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError("choices are True and False, one for each unit; PatchSet.named takes names.") from error
        if choices.shape != (len(self.space),):
            raise ValueError(f"choices of shape {list(choices.shape)} are not one for each of {len(self.space)} units.")
        if len(others := choices[(choices != 0) & (choices != 1)]):
            raise ValueError(f"choices hold {others[0].item():.3g} and a unit is in a set or not; give True and False.")
        object.__setattr__(self, "choices", choices.bool())

    @classmethod
    def named(cls, space: PatchSpace, names: Iterable[str]) -> PatchSet:
        """The units of these names."""
        choices = torch.zeros(len(space), dtype=torch.bool)
        for name in [names] if isinstance(names, str) else names:
            if name not in space.index_of:
                raise ValueError(f"{quoted(name)} is not a unit of {quoted(space)}.")
            choices[space.index_of[name]] = True
        return cls(space, choices)

    @classmethod
    def random(cls, space: PatchSpace, k: int, seed: int = 0) -> PatchSet:
        """`k` units drawn without replacement."""
        check_whole(k=k, seed=seed)
        if not 0 <= k <= len(space):
            raise ValueError(f"k={k} units were asked for; {space!r} has {len(space)}.")
        choices = torch.zeros(len(space), dtype=torch.bool)
        choices[torch.randperm(len(space), generator=torch.Generator().manual_seed(seed))[:k]] = True
        return cls(space, choices)

    @cached_property
    def mask(self) -> ByStage:
        """By stage, bool [layer, position, head]."""
        return self.space.mask(self.choices)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of its space."""
        return self.space.fingerprint

    def __or__(self, other: PatchSet) -> PatchSet:
        return self._combine(other, torch.logical_or)

    def __and__(self, other: PatchSet) -> PatchSet:
        return self._combine(other, torch.logical_and)

    def __sub__(self, other: PatchSet) -> PatchSet:
        return self._combine(other, torch.gt)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PatchSet):
            return NotImplemented
        return self.fingerprint == other.fingerprint and torch.equal(self.choices, other.choices)

    def __hash__(self) -> int:
        return hash((json.dumps(self.fingerprint, sort_keys=True), self.choices.numpy().tobytes()))

    def __len__(self) -> int:
        return int(self.choices.sum())

    def __iter__(self) -> Iterator[str]:
        return (self.space.names[i] for i in self.choices.nonzero()[:, 0].tolist())

    def __contains__(self, name: str) -> bool:
        return name in self.space.index_of and bool(self.choices[self.space.index_of[name]])

    def __repr__(self) -> str:
        return f"PatchSet({len(self)} of {self.space!r})"

    def jaccard(self, other: PatchSet) -> float:
        """Size of the intersection over that of the union; 1 for two empty sets."""
        union = len(self | other)
        return len(self & other) / union if union else 1.0

    def save(self, path: str | Path) -> None:
        """Write a JSON file: the space and the units' names."""
        content = {"kind": KIND, "space": self.space.metadata, "patches": list(self)}
        text = re.sub(r"\[[\d\s,]+\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(content, indent=1))
        write_text(path, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PatchSet:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: when there is no such file, it is incomplete, or it is something else.
        """
        text = check_file(path).read_text()
        with refusing(path, "is no whole patch set"):
            content = json.loads(text)
            if content["kind"] != KIND:
                raise ValueError(f"its kind is {quoted(content['kind'])}")
            return cls.named(PatchSpace.from_metadata(content["space"]), content["patches"])

    def _repr_png_(self) -> bytes | None:
        """Its maps, in a notebook; none of single tokens, which are too many to draw."""
        return None if self.space.granularity == "token" else maps.png(self.figure())

    def figure(self) -> Figure:
        """Its units (dark) as layer × head maps, one a stage and region.

        Raises:
            ValueError: for a space with a unit a token, which has too many regions to draw.
        """
        heading = f"{len(self)} of {len(self.space)} units"
        return maps.unit_maps(self.space.by_region(self.choices.float()), (0, 1.3), cmap="GnBu", heading=heading)

    def _combine(self, other: PatchSet, function: Any) -> PatchSet:
        if not isinstance(other, PatchSet):
            return NotImplemented
        check_compatible("a patch set", other.fingerprint, "the other", self.fingerprint)
        return PatchSet(self.space, function(self.choices, other.choices))
