"""What a run found, in one folder that others can use: task vectors, and the units that take them.

    >>> bundle = bundles.load("runs/scenes")               # or "tiny": the one that the package carries
    >>> with model.generate(prompts.query_only()) as tracer:
    ...     patch(model, *bundle["segmentation"])
    ...     answers = tracer.result.save()

A folder has `vectors.safetensors` (`TaskVectors`) and `search/TASK.safetensors` (`SearchResult`), as `vtv run` writes
them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from vtv_nnsight.layouts import positions
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.patches import PatchSet
from vtv_nnsight.search.result import SearchResult
from vtv_nnsight.stages import check_compatible, device_of, fingerprint
from vtv_nnsight.vectors import TaskVector, TaskVectors

EMBEDDED = "tiny"
"""The bundle that the package carries, of the model of that name."""
VECTORS = "vectors.safetensors"


@dataclass(frozen=True, eq=False)
class Bundle(Mapping[str, tuple[TaskVector, PatchSet]]):
    """Task → its vector and the units that take it, as `patch` wants them.

    Args:
        vectors: The vectors; some may be of tasks without units.
        found: Task → what a search found for it.
        name: Where it is from, for messages.
        model: The source of its model, as `models.load_model` takes it, where that is known.
        options: With what else it takes: SegGPT's `embedding_type`, ….
    """

    vectors: TaskVectors
    found: Mapping[str, SearchResult]
    name: str = "these vectors"
    model: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, task: str) -> tuple[TaskVector, PatchSet]:
        if task not in self.found:
            raise KeyError(f"the bundle of {self.name} has nothing of {task!r}; choose from {', '.join(self)}.")
        return self.vectors[task], self.found[task].patches

    def __iter__(self) -> Iterator[str]:
        return (task for task in self.vectors if task in self.found)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Bundle({self.name}: {', '.join(f'{task} at {len(self[task][1])} units' for task in self)})"

    def check(self, model: InContextModel) -> None:
        """Refuse a model that the vectors are not of, naming what differs.

        Raises:
            ValueError: so.
        """
        device_of(model)
        owner = next(iter(self.vectors.values())).fingerprint
        check_compatible(f"the bundle of {self.name}", owner, "this model", fingerprint(model, cached=True))

    def compact(self) -> Bundle:
        """The same, of the positions that a query-only prompt shows: all that patching without an example needs."""
        layout = next(iter(self.found.values())).patches.space.layout
        kept = torch.zeros(layout.num_positions, dtype=torch.bool).index_fill(0, positions(layout.query_band), True)
        return replace(self, vectors=TaskVectors({name: _keep(v, kept) for name, v in self.vectors.items()}))

    def save(self, folder: str | os.PathLike, dtype: torch.dtype = torch.float32) -> None:
        """Write a folder, which is made; vectors in float16 take half the room, and lose a part in two thousand."""
        folder = Path(folder)
        (folder / "search").mkdir(parents=True, exist_ok=True)
        self.vectors.save(folder / VECTORS, dtype)
        for task in self:
            self.found[task].save(folder / "search" / f"{task}.safetensors")


def load(source: str | os.PathLike = EMBEDDED) -> Bundle:
    """The bundle of a folder that `vtv run` or `Bundle.save` wrote, or "tiny": that of the embedded model.

    Raises:
        FileNotFoundError: when there is no such folder, or it has no vectors or no units.
        ValueError: when a file in it is damaged or something else.
    """
    folder = Path(str(files("vtv_nnsight") / "weights" / "tiny")) if str(source) == EMBEDDED else Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give one that `vtv run` wrote, or {EMBEDDED!r}.")
    if not (folder / VECTORS).is_file():
        folds = sorted(path.name for path in folder.glob("fold*") if (path / VECTORS).is_file())
        instead = f"give one of its folds ({', '.join(folds)})" if folds else "give a folder that `vtv run` wrote"
        raise FileNotFoundError(f"{folder} has no {VECTORS}; {instead}.")
    vectors = TaskVectors.load(folder / VECTORS)
    paths = {task: folder / "search" / f"{task}.safetensors" for task in vectors}
    found = {task: SearchResult.load(path) for task, path in paths.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(f"{folder} has no units in search/; let the same `vtv run` finish.")
    model, options = (EMBEDDED, {}) if str(source) == EMBEDDED else _model_of(folder)
    return Bundle(vectors, found, str(source), model, options)


def _model_of(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The model of the run that a folder is of, or is a fold of, and how it was loaded."""
    from vtv_nnsight.experiment.record import read_record  # which is further along, and imports this package's searches

    for place in (folder, folder.parent):
        if (place / "run.json").is_file():
            settings = read_record(place)["settings"]
            known = {name: settings.get(name) for name in ("vqgan", "embedding_type", "dtype")}
            return settings.get("model"), {name: value for name, value in known.items() if value is not None}
    return None, {}


def _keep(vector: TaskVector, kept: torch.Tensor) -> TaskVector:
    mean = vector.mean.map(lambda values: values.masked_fill(~kept[:, None, None], torch.nan))
    variance = vector.variance and vector.variance.map(lambda values: values.masked_fill(~kept[:, None], torch.nan))
    return replace(vector, mean=mean, variance=variance)
