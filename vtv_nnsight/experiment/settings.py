"""What `vtv run` can be told. Apart from `run`, so that `vtv --help` need not import what a run needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What the numbers of a run depend on.

    Args:
        model, vqgan: As for `MAEVQGAN`.
        data: As for `data.load`: "scenes", a folder of pictures, "pascal:ROOT", …
        folds: Folds of Pascal-5i; by default all four where the data are "pascal:ROOT".
        tasks: Names; by default those of VTV's five that the data can serve.
        order: "vertical" or "horizontal" prompts.
        images: The most pictures to draw prompts from.
        prompts: Prompts to collect and to search on, a task.
        candidates: Random prompts to pick them from. With fewer than four pictures a prompt they are not picked.
        granularity: "head", "quadrant" or "token".
        search: One of `search.ALGORITHMS`, or "published" for the paper's own recipe.
        loss: "tokens" or "pixels".
        budget: Evaluations that a search may spend.
        evaluations: Prompts to evaluate on, a task, of pictures that were not searched on.
        seed: Of all that is random.
    """

    model: str = "tiny"
    vqgan: str | None = None
    data: str = "scenes"
    folds: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    order: str = "vertical"
    images: int = 1000
    prompts: int = 100
    candidates: int = 400
    granularity: str = "quadrant"
    search: str = "reinforce"
    loss: str = "tokens"
    budget: int | None = 8000
    evaluations: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        from vtv_nnsight.search import ALGORITHMS
        from vtv_nnsight.search.objective import LOSSES

        for name, known in (("search", (*ALGORITHMS, "published")), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {', '.join(known)}.")
        for name in ("prompts", "candidates", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} leaves nothing to do; give 1 or more.")

    @property
    def name(self) -> str:
        """Of the data, for a folder."""
        kind, _, rest = self.data.partition(":")
        return Path(self.data).name if Path(self.data).is_dir() else re.sub(r"\W+", "-", kind if rest else self.data)


PUBLISHED = {"candidates": 1000, "search": "published", "loss": "pixels", "budget": None, "evaluations": 1000}
"""The settings with which the paper's experiment differs from the defaults."""
