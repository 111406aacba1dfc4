"""One query, looked at closely: its answer as the vector comes in, without each unit, and through every task's vector;
and where the answer looks while an example is shown.

The query has the median score of those that were evaluated. A report shows it, and lets its reader play with it, since
all pictures were computed before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from vtv_nnsight.files import read_tensors, write_tensors
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.report.attention import answer_positions, attention_maps
from vtv_nnsight.report.gates import generate_with_gates
from vtv_nnsight.search.result import SearchResult
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import TaskVectors

SCALES = tuple(round(0.05 * step, 2) for step in range(21))
"""How far the vector goes: as the model's own activation, to the vector's."""
MAX_UNITS = 60
"""Units that are left out one by one, at most: those of the highest scores."""
MAX_LOOKS = 5
"""Heads to keep the attention of, at most: those of the highest scores."""
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
        vectors: The tasks of the vectors that answer, each at the units of its search.
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

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        facts = {name: value for name, value in vars(self).items() if name not in ("pictures", "attention")}
        write_tensors(path, KIND, self.pictures | {"attention": self.attention}, facts)

    @classmethod
    def load(cls, path: str | Path) -> QueryExplorer:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: when there is no such file, or it is damaged or something else.
        """
        pictures, facts = read_tensors(path, KIND)
        try:
            return cls(attention=pictures.pop("attention"), pictures=pictures, **facts)
        except (KeyError, TypeError) as error:
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
    results: Mapping[str, SearchResult],
    *,
    batch_size: int | None = None,
) -> QueryExplorer:
    """Look closely at the query of the median score.

    Args:
        prompts: Of the task, with the truth in their output cells.
        scores: Of each, patched with the task's vector, [prompt].
        vectors: Of all tasks.
        results: Task → its search.
    """
    row = median(scores, prompts.queries)
    prompt, truth, result = prompts[row], prompts[row].region("output"), results[task.name]
    space, choices = result.patches.space, result.patches.choices
    units = result.scores.masked_fill(~choices, -torch.inf).argsort(descending=True)
    units = units[: min(MAX_UNITS, len(result.patches))].sort().values
    without = choices.float().repeat(len(units), 1)
    without[torch.arange(len(units)), units] = 0
    names = [name for name in vectors if name in results]
    answer = partial(generate_with_gates, model, prompt, space=space, batch_size=batch_size)
    cells = {
        "scale": answer(vectors[task.name], gates=torch.tensor(SCALES)[:, None] * choices),
        "without": answer(vectors[task.name], gates=without) if len(units) else truth[:0],
        "vectors": torch.cat([answer(vectors[name], gates=results[name].patches.choices[None]) for name in names]),
    }
    measured: dict[str, list[float]] = {
        name: task.score(answers, truth.cpu().expand(len(answers), -1, -1, -1)).tolist() if len(answers) else []
        for name, answers in cells.items()
    }
    cells |= {"query": prompt.region("query"), "truth": truth}
    looks = _looks(model, prompt.one_shot(), result)
    return QueryExplorer(
        task.name,
        {name: _small(part) for name, part in cells.items()} | {"canvas": _small(prompt.shown()["prompt"], 2 * SIDE)},
        measured,
        list(SCALES),
        [space.names[i] for i in units.tolist()],
        names,
        len(prompts.queries.unique()),
        list(looks),
        torch.stack(list(looks.values())) if looks else torch.zeros(0, 0),
    )


def _looks(model: InContextModel, prompt: VisualPrompt, result: SearchResult) -> dict[str, torch.Tensor]:
    """What looks → [position]: all heads of each stage that holds the answer, then the heads that are patched at the
    answer, those of the highest scores first."""
    maps, space = attention_maps(model, prompt), result.patches.space
    looks = {f"{stage}, all heads": layers.mean((0, 1)) for stage, layers in maps.items()}
    answers = {str(key): answer_positions(model, key.stage, space.layout) for key in space.groups if str(key) in maps}
    order = result.scores.argsort(descending=True, stable=True)
    heads: dict[str, torch.Tensor] = {}
    for i in order[result.patches.choices[order]].tolist():
        stage, layer, head, group = (int(part[i]) for part in space.units)
        key = space.stages[stage].key
        places = list(space.groups[key].values())[group]
        if str(key) in maps and torch.isin(places, answers[str(key)]).any():
            heads.setdefault(f"{key}, layer {layer}, head {head}", maps[str(key)][layer, head])
    return looks | dict(list(heads.items())[:MAX_LOOKS])


def _small(cells: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Pixels [n, 3, height, width] in [0, 1] as uint8, of at most `side` pixels a side."""
    if len(cells) and cells.shape[-1] > side:
        cells = F.interpolate(cells, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return cells.clamp(0, 1).mul(255).round().byte().cpu()
