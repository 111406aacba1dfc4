"""What the numbers of `vtv run` depend on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtv_nnsight import tasks as registry
from vtv_nnsight.models.interface import QUERY_ONLY, SITES
from vtv_nnsight.search import ALGORITHMS

DTYPES = ("float32", "bfloat16", "float16")

FOLDS = (0, 1, 2, 3)
"""Of Pascal-5i."""
MAX_COUNT = 10_000_000
"""No count of prompts or pictures may be larger."""


@dataclass(frozen=True)
class Settings:
    """What the numbers of a run depend on.

    Args:
        model, vqgan, embedding_type: As for `models.load_model`.
        dtype: Precision of the weights, one of `DTYPES`; None is that of the source.
        data: As for `data.load`: "pictures" (those in the package), "scenes", a folder of pictures, "pascal:ROOT", …
        folds: Folds of Pascal-5i to test on, by their numbers; by default all four where the data are "pascal:ROOT".
        protocol: "own", or "published": what the released code does. On "pascal:ROOT" that is `runs.protocol`,
            with vectors and sets for all folds; elsewhere it removes duplicates among selected prompts as released.
        search_fold: With the published protocol, the fold of the training half that is searched on.
        tasks: Names; by default those of VTV's five that the data can serve. Doubled ones count once, in every list.
        most_tasks: Of tasks that are not named, at most so many.
        order: "vertical" or "horizontal" prompts.
        max_images: The most pictures to draw prompts from.
        prompts: Prompts per task to collect and to search on.
        candidates: Random prompts per task to select them from. With fewer than four pictures per prompt none are
            selected: prompts are drawn at random.
        granularity: "head", "quadrant" or "token".
        sites: What of a layer is collected and patched, as for `PatchSpace`.
        search: One of `search.ALGORITHMS`, or "published" for the paper's own recipe.
        loss: The name of one of the model's `losses` or "pixels", the task's own; None is the model's first.
        budget: Evaluations (one mask on one prompt each) that a search may spend; None leaves it to the algorithm.
        sparsity: The price of all units, as `search.reinforce` and "published" have it: the released code's
            `regularization_strength`.
        fold_draws: With the published protocol on "pascal:ROOT", draw other units for each fold from the
            probabilities of the search's best sample, as the released code does; else the sample serves all folds.
        test_prompts: Prompts per task to evaluate on, of pictures that were neither collected nor searched on.
        draws: Times that random units are drawn to compare with: uniform, and matched by stage and region.
        control_prompts: Of the test prompts, those that noise, the vectors of other tasks, and other examples are tried
            on; each draw of random units is tried on a quarter of them.
        matrix: Evaluations of each search for every vector on every task (`evaluation.searched_anew`); 0 leaves it out.
        seed: Of all that is random.

    Raises:
        ValueError: naming the setting that cannot be, and what it can be.
    """

    model: str = "tiny"
    vqgan: str | None = None
    embedding_type: str | None = None
    dtype: str | None = None
    data: str = "pictures"
    folds: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    most_tasks: int = 5
    order: str = "vertical"
    protocol: str = "own"
    search_fold: int = 0
    max_images: int = 1000
    prompts: int = 100
    candidates: int = 400
    granularity: str = "quadrant"
    sites: tuple[str, ...] = ("heads",)
    search: str = "reinforce"
    loss: str | None = None
    budget: int | None = 4000
    sparsity: float = 0.0
    fold_draws: bool = False
    test_prompts: int = 128
    draws: int = 16
    control_prompts: int = 32
    matrix: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "search": (*ALGORITHMS, "published"),
            "dtype": (None, *DTYPES),
            "granularity": QUERY_ONLY,
            "order": ("vertical", "horizontal"),
            "protocol": ("own", "published"),
            "search_fold": FOLDS,
            "sites": SITES,
            "folds": FOLDS,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
            if strange := [one for one in values or ("",) * (name == "sites") if one not in known]:
                offered = ", ".join(str(choice) for choice in known if choice is not None)
                raise ValueError(f"{name}={strange[0]!r} is unknown; choose from {offered}.")
            if values != (value,):
                object.__setattr__(self, name, tuple(one for one in known if one in values))
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(registry.get(name).name for name in self.tasks)))
        counts = ("most_tasks", "max_images", "prompts", "candidates", "test_prompts", "draws", "control_prompts")
        ranges = dict.fromkeys(counts, (1, MAX_COUNT)) | {"seed": (0, 2**32 - 1), "matrix": (0, MAX_COUNT)}
        for name, (least, most) in (ranges if self.budget is None else ranges | {"budget": (1, 2**63)}).items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name}={value!r} is not a whole number from {least} to {most:,}.")
        if not 0 <= self.sparsity < math.inf:
            raise ValueError(f"sparsity={self.sparsity} is no price; give 0 or more.")
        if (self.sparsity or self.fold_draws) and self.search not in ("reinforce", "published"):
            raise ValueError(f"search={self.search!r} has no probabilities; sparsity and fold_draws go with published.")
        if self.fold_draws and not (self.protocol == "published" and self.data.startswith("pascal:")):
            raise ValueError("fold_draws goes with the published protocol on pascal:ROOT; leave it out.")

    @property
    def name(self) -> str:
        """Of the data, for a folder."""
        kind, _, rest = self.data.partition(":")
        return Path(self.data).name if Path(self.data).is_dir() else re.sub(r"\W+", "-", kind if rest else self.data)


PUBLISHED = {"candidates": 1000, "search": "published", "loss": "pixels", "budget": None, "test_prompts": 1000}
PUBLISHED |= {"protocol": "published"}
"""The settings with which the paper's experiment differs from the defaults."""

QUICK: dict[str, Any] = {"most_tasks": 2, "max_images": 160, "prompts": 32, "candidates": 64}
QUICK |= {"search": "gates", "budget": 400, "test_prompts": 16, "draws": 4}
"""The settings of a first look. Its search is the one that finds most with few evaluations: on the embedded model, sets
of `gates` after 240 are about as good as those of `reinforce` after 1000, in a quarter of the time."""
