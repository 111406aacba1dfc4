"""One query, looked at closely: its answer as the vector comes in, without each unit, and through every task's vector;
and where the answer looks while an example is shown.

The query has the median score of those that were evaluated. A report shows it, and lets its reader play with it, since
all pictures were computed before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vtv_nnsight.evaluation.attention import answer_positions, attention_maps
from vtv_nnsight.evaluation.evaluation import without_answers
from vtv_nnsight.files import read_tensors, write_tensors
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.patching.forward import generate_with_gates
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.search.result import SearchResult
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import TaskVectors

SCALES = tuple(round(0.05 * step, 2) for step in range(21))
"""How far the vector goes: as the model's own activation, to the vector's."""
UNITS = 60
"""Units that are left out one by one, at most: those of the highest scores."""
LOOKS = 5
"""Heads whose attention is kept, at most: those of the highest scores."""
SIDE = 112
"""Pictures are made no larger than this, in pixels; the whole canvas, twice that."""
KIND = "demonstration"


@dataclass(frozen=True, eq=False)
class QueryExplorer:
    """Pictures are uint8 [n, 3, side, side]; scores are the task's metric.

    Args:
        task: Its name.
        pictures: "query", "truth" (one each), "scale" (one for each of `scales`), "without" (for each of `units`) and
            "vectors" (for each of `vectors`); and "canvas", the one-shot prompt, the answer's cell grey.
        scores: "scale", "without" and "vectors" → a score for each picture.
        scales: How far the vector goes.
        units: Names of the units that are left out, one in each picture.
        vectors: The tasks whose vectors answer, each at its own units.
        queries: Of how many different queries the one shown has the median score.
        looks: What looks: all heads of a stage, or one head that is patched at the answer.
        attention: [look, position]: how much the answer's patches look at every position of the one-shot prompt; see
            `attention_maps`. None where attention has no patterns.
    """

    task: str
    pictures: dict[str, torch.Tensor]
    scores: dict[str, list[float]]
    scales: list[float]
    units: list[str]
    vectors: list[str]
    queries: int
    looks: list[str] = field(default_factory=list)
    attention: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file."""
        told = ("task", "scores", "scales", "units", "vectors", "queries", "looks")
        tensors = self.pictures | {"attention": self.attention}
        write_tensors(path, KIND, tensors, {name: getattr(self, name) for name in told})

    @classmethod
    def load(cls, path: str | os.PathLike) -> QueryExplorer:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: when there is no such file, or it is damaged or something else.
        """
        tensors, told = read_tensors(path, KIND)
        attention = tensors.pop("attention", torch.zeros(0, 0))
        try:
            return cls(pictures=tensors, attention=attention, **told)
        except TypeError as error:
            raise ValueError(f"{path} is no whole demonstration: {error}; make it again.") from error


def median(scores: np.ndarray, queries: torch.Tensor) -> int:
    """The row of the median score, of rows that ask about different pictures (the first of each)."""
    _, first = np.unique(queries.numpy(), return_index=True)
    order = first[np.argsort(scores[first], kind="stable")]
    return int(order[len(order) // 2])


def demonstrate(
    model: InContextModel,
    task: Task,
    prompts: VisualPrompt,
    scores: np.ndarray,
    vectors: TaskVectors,
    found: Mapping[str, SearchResult],
    *,
    batch_size: int | None = None,
) -> QueryExplorer:
    """Look closely at the query of the median score.

    Args:
        prompts: Of the task, with the truth in their output cells.
        scores: Of each, patched with the task's vector, [prompt].
        vectors: Of all tasks.
        found: Task → the units that were found for it.
    """
    row = median(scores, prompts.queries)
    shown, truth = prompts[row], prompts[row].region("output")
    space, choices = found[task.name].patches.space, found[task.name].patches.choices
    scale = torch.tensor(SCALES)[:, None] * choices
    kept = found[task.name].scores.masked_fill(~choices, -torch.inf).argsort(descending=True)
    kept = kept[: min(UNITS, int(choices.sum()))].sort().values
    without = choices.float().repeat(len(kept), 1)
    without[torch.arange(len(kept)), kept] = 0
    names = [name for name in vectors if name in found]
    painted: dict[str, torch.Tensor] = {
        "scale": generate_with_gates(model, shown, vectors[task.name], space, scale, batch_size=batch_size),
        "without": generate_with_gates(model, shown, vectors[task.name], space, without, batch_size=batch_size)
        if len(kept)
        else truth[:0],
        "vectors": torch.cat(
            [
                generate_with_gates(model, shown, vectors[name], space, found[name].patches.choices[None])
                for name in names
            ]
        ),
    }
    measured: dict[str, Any] = {
        name: task.score(cells, truth.cpu().expand(len(cells), -1, -1, -1)).tolist() if len(cells) else []
        for name, cells in painted.items()
    }
    painted |= {"query": shown.region("query"), "truth": truth}
    looks = _looks(model, shown.one_shot(), found[task.name])
    return QueryExplorer(
        task.name,
        {name: _small(cells) for name, cells in painted.items()} | {"canvas": _small(without_answers(shown), 2 * SIDE)},
        measured,
        list(SCALES),
        [space.names[i] for i in kept.tolist()],
        names,
        len(prompts.queries.unique()),
        list(looks),
        torch.stack(list(looks.values())) if looks else torch.zeros(0, 0),
    )


def _looks(model: InContextModel, prompt: VisualPrompt, found: SearchResult) -> dict[str, torch.Tensor]:
    """What looks → [position]: all heads of each stage that holds the answer, then the heads that are patched at the
    answer, those of the highest scores first."""
    maps, space = attention_maps(model, prompt), found.patches.space
    looks = {f"{stage}, all heads": layers.mean((0, 1)) for stage, layers in maps.items()}
    stages = [str(stage.key) for stage in space.stages]
    at_answer = {
        str(key): [
            torch.isin(places, answer_positions(model, key.stage, space.layout)).any() for places in groups.values()
        ]
        for key, groups in space.groups.items()
        if str(key) in maps
    }
    order = found.scores.argsort(descending=True, stable=True)
    heads: dict[str, torch.Tensor] = {}
    for i in order[found.patches.choices[order]].tolist():
        stage, layer, head, group = (int(part[i]) for part in space.units)
        name = stages[stage]
        if name in maps and at_answer[name][group]:
            heads.setdefault(f"{name}, layer {layer}, head {head}", maps[name][layer, head])
    return looks | dict(list(heads.items())[:LOOKS])


def _small(cells: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Pixels [n, 3, height, width] in [0, 1] as uint8, of at most `side` pixels a side."""
    if len(cells) and cells.shape[-1] > side:
        cells = F.interpolate(cells, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return cells.clamp(0, 1).mul(255).round().byte().cpu()
