"""What a model is asked under: with an example or without, with vectors patched in or units silenced.

>>> Condition(vectors=vectors["segmentation"], patches=result, scale=0.8)     # zero-shot, patched
>>> Condition(shot="one", patches=result, ablation="zero")                    # one-shot, the same units silenced
>>> Condition(shot="zero", run=lambda model: ...)                             # whatever one does inside a trace
>>> Condition(prompts_override=border(prompts))                               # the same queries, shown otherwise
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vtv_nnsight.patching import PatchSet, ablate, patch
from vtv_nnsight.patching.patching import as_vectors, planned, silence
from vtv_nnsight.prompts import Prompts
from vtv_nnsight.text import check_choice, quoted
from vtv_nnsight.vectors import TaskVector

SHOTS = {
    "one": "the examples are shown",
    "zero": "no example is shown",
    "copy": "the query as its own answer, the floor",
    "ceiling": "what the model's own parts make of the truth, such as its tokenizer's own picture of it",
}
"""What a condition shows, or takes for the answer without asking the model."""
BASELINE, ZERO_SHOT = "one-shot", "zero-shot"
PATCHED, BOTH, OTHER = "task vector", "one-shot + task vector", "vector of "
RANDOM, MATCHED = "random units", "matched random units"
NOISE, MEAN = "noise vector", "mean over tasks"
WRONG, BLANK = "wrong example", "blank example"
FLOOR, CEILING = "copy", "tokenizer"
"""The names of conditions: the same in tables, under pictures and in files. The others are compared with `BASELINE`."""
SHORT = {BASELINE: "one", ZERO_SHOT: "zero", FLOOR: "copy", CEILING: "ceiling", "ceiling": "ceiling"}
"""Short forms: a condition without patches, by its name in tables."""
FEW_SHOT = "few-shot"
"""What tables and reports of texts call `BASELINE`."""
CONTROL = 104_729
"""Added to the seed of the control's units, so that a user's own random set of the same seed is another one."""


@dataclass(frozen=True, eq=False)
class Condition:
    """One way to ask a model.

    Args:
        shot: One of `SHOTS`; by default "one" where nothing is patched or `prompts_override` is given, and "zero" where
            something is patched.
        vectors: A task vector to patch in, or several.
        patches: Where: a PatchSet or a SearchResult (its set), or as many of them as there are vectors.
        scale: How far to go from the model's own activation to the vector's; see `patch`.
        mode: "replace": the vector instead of the activation; "add": on top of it; see `patch`.
        ablation: Instead of vectors: what `patches` are silenced with, "zero" or a task vector such as
            `vectors.mean()`.
        run: A function that is called with the model inside the trace, after the patches.
        prompts: Ask only so many of the prompts, the first ones; None asks all.
        prompts_override: One-shot prompts of the same queries, row for row, to ask in place of those that are
            evaluated: with other examples, with more of them in another layout, or with a border (see
            `studies.prompting`). Of several prompts, one after the other is asked: the mean of their answers is
            scored, and the loss is the mean of theirs. A loss is to the truth of the prompt that is shown: a
            tokenizer's codes of an answer depend on what else the canvas shows.

    Raises:
        ValueError: when these do not go together.
    """

    shot: str | None = None
    vectors: Any = None
    patches: Any = None
    scale: float = 1.0
    mode: str = "replace"
    ablation: str | TaskVector | None = None
    run: Callable[[Any], None] | None = None
    prompts: int | None = None
    prompts_override: Prompts | Sequence[Prompts] | None = None

    def __post_init__(self) -> None:
        patched = self.patches is not None or self.run is not None
        object.__setattr__(self, "shot", self.shot or ("zero" if patched and self.prompts_override is None else "one"))
        object.__setattr__(self, "patches", sets_of(self.patches))
        check_choice(SHOTS, shot=self.shot)
        if patched and self.shot in ("copy", "ceiling"):
            raise ValueError(f"shot={self.shot!r} does not ask the model; patches go with 'one' or 'zero'.")
        if (self.vectors is not None or self.ablation is not None) != (self.patches is not None):
            raise ValueError("vectors, or an ablation, and patches go together: what to put there, and where.")
        if self.vectors is not None and self.ablation is not None:
            raise ValueError("a condition patches vectors in or silences units; for both, give a function as run.")
        if self.vectors is not None:
            as_vectors(self.vectors)
        if self.prompts is not None and self.prompts < 1:
            raise ValueError(f"prompts={self.prompts} asks nothing; give 1 or more, or None for all.")
        if self.prompts_override is not None and self.shot != "one":
            raise ValueError(f"shot={self.shot!r} shows no example; prompts_override= goes with shot='one'.")
        if self.prompts_override is not None and not self._overrides:
            raise ValueError("prompts_override=[] shows nothing; give prompts, or several.")

    @classmethod
    def of(cls, value: Condition | str | tuple[Any, ...] | None, name: str = "") -> Condition:
        """A condition of a short form: None, a name of `SHORT`, (vector, patches), (vector, patches, "one-shot").

        Raises:
            ValueError: when it is none of them, naming the condition.
        """
        if isinstance(value, Condition):
            return value
        vectors, patches, shot = None, None, value or BASELINE
        if isinstance(value, tuple) and len(value) in (2, 3):
            vectors, patches, shot = (*value, ZERO_SHOT)[:3]
        allowed = list(SHORT) if vectors is None else [BASELINE, ZERO_SHOT]
        if not isinstance(shot, str) or shot not in allowed:
            raise ValueError(f"condition {quoted(name)} is {quoted(shot)}; choose one of {', '.join(allowed)}.")
        return cls(SHORT[shot], vectors, patches)

    def to(self, device: torch.device) -> Condition:
        """The same with its vectors on a device."""
        several = isinstance(self.vectors, (list, tuple))
        vectors = [v.to(device) for v in self.vectors] if several else self.vectors and self.vectors.to(device)
        ablation = self.ablation.to(device) if isinstance(self.ablation, TaskVector) else self.ablation
        return replace(self, vectors=vectors, ablation=ablation)

    @property
    def patches_alone(self) -> bool:
        """Whether the model is asked the evaluated prompts, under nothing but patches."""
        return self.shot in ("one", "zero") and self.run is None and self.prompts_override is None

    @property
    def _overrides(self) -> list[Prompts]:
        override = self.prompts_override if self.prompts_override is not None else []
        return [override] if isinstance(override, Prompts) else list(override)

    def check_override(self, prompts: Prompts, name: str = "") -> None:
        """Refuse `prompts_override` that are not of the queries of these prompts, row for row.

        Raises:
            ValueError: naming the condition.
        """
        for override in self._overrides:
            if len(override) != len(prompts):
                raise ValueError(f"condition {name!r} shows {len(override)} prompts for {len(prompts)} queries.")
            if override.layout != self._overrides[0].layout:
                raise ValueError(f"condition {name!r} shows prompts of several layouts; their answers have no mean.")
            if not override.same_queries(prompts):
                raise ValueError(f"condition {name!r} shows prompts of other queries or truths than are evaluated.")

    def prompts_for(self, batch: Prompts, start: int, device: torch.device) -> list[Prompts]:
        """The one-shot prompts to ask for a batch of the evaluated ones, its first row being row `start`."""
        rows = slice(start, start + len(batch))
        return [override[rows].to(device).one_shot() for override in self._overrides] or [batch]

    def apply(self, model: Any) -> None:
        """Inside a trace: patch, silence, run."""
        if self.ablation is not None:
            ablate(model, self.patches, self.ablation)
        elif self.patches is not None:
            patch(model, self.vectors, self.patches, scale=self.scale, mode=self.mode)
        if self.run is not None:
            self.run(model)

    def planned(self, model: Any, layout: Any) -> list[Any]:
        """What `apply` does to prompts of a layout, to be done where the model runs (see `patching.planned`).

        Raises:
            ValueError: for `run`, which is here.
        """
        if self.run is not None:
            raise ValueError("a condition's run= is your own function and stays here; patch or ablate there.")
        if self.patches is None:
            return []
        to = silence(model, self.patches, self.ablation) if self.ablation is not None else self.vectors
        return planned(model, to, self.patches, layout, self.scale, self.mode)


def comparison(
    vector: TaskVector, patches: Any, others: Mapping[str, TaskVector] | None = None, seed: int = 0
) -> dict[str, Condition]:
    """The conditions that tell what a vector and its patches are worth.

    One-shot; zero-shot; zero-shot and one-shot with patches; the vector at as many units drawn at random; the vector of
    another task (the next of `others`) at the same units; the tokenizer's own picture of the truth (the ceiling); the
    query as its own answer (the floor).

    Args:
        vector: The task's.
        patches: A PatchSet or a SearchResult.
        others: Vectors of all tasks by name.
        seed: Of the random units.
    """
    patches = sets_of(patches)
    conditions = {
        BASELINE: Condition("one"),
        ZERO_SHOT: Condition("zero"),
        PATCHED: Condition("zero", vector, patches),
        BOTH: Condition("one", vector, patches),
        RANDOM: Condition("zero", vector, PatchSet.random(patches.space, len(patches), CONTROL + seed)),
    }
    others = others or {}
    names = list(others)
    if rest := [name for name in names if name != vector.task]:
        after = names[(names.index(vector.task) + 1) % len(names)] if vector.task in names else rest[0]
        conditions[f"{OTHER}{after}"] = Condition("zero", others[after], patches)
    return conditions | {CEILING: Condition("ceiling"), FLOOR: Condition("copy")}


def sets_of(patches: Any) -> Any:
    """The sets of search results, one or a list; all else as it is."""
    if isinstance(patches, list):
        return [sets_of(item) for item in patches]
    return getattr(patches, "patches", patches)
