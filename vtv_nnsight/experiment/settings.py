"""What `vtv run` can be told. Apart from the steps, so that `vtv --help` need not import what they need."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MOST = 10_000_000
"""No count of prompts or pictures may be larger."""


@dataclass(frozen=True)
class Settings:
    """What the numbers of a run depend on.

    Args:
        model, vqgan: As for `models.load_model`.
        data: As for `data.load`: "scenes", a folder of pictures, "pascal:ROOT", …
        folds: Folds of Pascal-5i; by default all four where the data are "pascal:ROOT".
        tasks: Names; by default those of VTV's five that the data can serve.
        order: "vertical" or "horizontal" prompts.
        max_images: The most pictures to draw prompts from.
        prompts: Prompts per task to collect and to search on.
        candidates: Random prompts per task to select them from. With fewer than four pictures per prompt none are
            selected: prompts are drawn at random.
        granularity: "head", "quadrant" or "token".
        search: One of `search.ALGORITHMS`, or "published" for the paper's own recipe.
        loss: "tokens" or "pixels".
        budget: Evaluations (one mask on one prompt each) that a search may spend; None leaves it to the algorithm.
        test_prompts: Prompts per task to evaluate on, of pictures that were neither collected nor searched on.
        seed: Of all that is random.

    Raises:
        ValueError: naming the setting that cannot be, and what it can be.
    """

    model: str = "tiny"
    vqgan: str | None = None
    data: str = "scenes"
    folds: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    order: str = "vertical"
    max_images: int = 1000
    prompts: int = 100
    candidates: int = 400
    granularity: str = "quadrant"
    search: str = "reinforce"
    loss: str = "tokens"
    budget: int | None = 8000
    test_prompts: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        from vtv_nnsight import tasks
        from vtv_nnsight.models.interface import QUERY_ONLY
        from vtv_nnsight.search import ALGORITHMS
        from vtv_nnsight.search.objective import LOSSES

        choices = {
            "search": (*ALGORITHMS, "published"),
            "loss": LOSSES,
            "granularity": QUERY_ONLY,
            "order": ("vertical", "horizontal"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {', '.join(known)}.")
        for name in ("max_images", "prompts", "candidates", "budget", "test_prompts"):
            value = getattr(self, name)
            if value is None and name == "budget":
                continue
            if value < 1:
                raise ValueError(f"{name}={value} leaves nothing to do; give 1 or more.")
            if value > MOST and name != "budget":
                raise ValueError(f"{name}={value} is more than can be done; give {MOST:,} or fewer.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} is not a seed; give a number from 0 to {2**32 - 1}.")
        for name in self.tasks:
            tasks.get(name)

    @property
    def name(self) -> str:
        """Of the data, for a folder."""
        kind, _, rest = self.data.partition(":")
        return Path(self.data).name if Path(self.data).is_dir() else re.sub(r"\W+", "-", kind if rest else self.data)


PUBLISHED = {"candidates": 1000, "search": "published", "loss": "pixels", "budget": None, "test_prompts": 1000}
"""The settings with which the paper's experiment differs from the defaults."""

QUICK = {"tasks": ("segmentation", "lowlight"), "max_images": 160, "prompts": 32, "candidates": 64, "budget": 1000}
QUICK |= {"test_prompts": 16}
"""The settings of a first look, which takes about half a minute."""

RENAMED = {"images": "max_images", "evaluations": "test_prompts"}
"""Names of 0.1, in run.json → today's."""
