"""The example that looks most like the query, in the place of one by chance (*What Makes Good Examples for Visual
In-Context Learning?*, arXiv 2301.13670, §3.2: unsupervised prompt retrieval).

    >>> drawn = tasks.draw(images, 100, seed=0)
    >>> prompts = task.compose(images, drawn, model.layout)
    >>> nearest = task.compose(images, retrieve(model, task, images, drawn), model.layout)
    >>> evaluate(model, task, prompts, {"one-shot": None, "retrieved": Condition(prompts_override=nearest)})
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vtv_nnsight.images import digest
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import InContextModel, batch_size_of
from vtv_nnsight.models.sites import read_layers
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.tasks import CENTER, Draw, Place, Task, labels_of

Features = Callable[[torch.Tensor], torch.Tensor]
"""Pictures [batch, 3, height, width] in [0, 1] → features [batch, width]."""


def retrieve(
    model: InContextModel,
    task: Task,
    images: Any,
    drawn: Draw,
    *,
    features: Features | None = None,
    examples: int = 1,
    pool: Sequence[int] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Draw:
    """Choose the examples with the inputs most similar to each query, by the cosine of their features.

    Queries and places stay as they were drawn. As in `tasks.draw`, an example is of the query's class where the data
    has labels. A query's picture is never its example, in whatever row it lies.

    Args:
        model: Its cells are compared, by its `encoder_features` where no others are given.
        task: What is asked: pictures are compared as it shows them, such as darkened.
        images: A datasets.Dataset or a sequence of rows, those that were drawn from.
        drawn: What `tasks.draw` or `tasks.draw_queries` drew.
        features: Another way to look at pictures, such as CLIP's.
        examples: For each query, the most similar first.
        pool: Numbers of the rows that may be examples; None is all.
        batch_size: Pictures at once; None is `default_batch_size(model)`, 32 for MAE-VQGAN.
        progress: Show a progress bar.

    Returns:
        What `task.compose` makes prompts of, with these examples.

    Raises:
        ValueError: when a query has too few others to choose from, a row is not there, or features are not numbers
            [batch, width].
    """
    queries = drawn.rows[:, -1]
    candidates = np.arange(len(images)) if pool is None else np.unique(np.asarray(pool, dtype=np.int64))
    if outside := [int(row) for row in (*candidates, *queries) if not 0 <= row < len(images)]:
        raise ValueError(f"row {outside[0]} is not among the {len(images)} rows of these images.")
    features, batch_size = features or encoder_features(model), batch_size_of(model, batch_size)
    size = model.layout.cell_size
    with progress_bar(total=len(candidates) + len(queries), unit="picture", disable=not progress) as bar:

        def describe(rows: np.ndarray, places: list[Place]) -> tuple[np.ndarray, torch.Tensor]:
            """Digests of pictures [row], and features of unit length of them as the task shows them [row, width]."""
            digests: list[int] = []
            described = []
            for start in range(0, len(rows), batch_size):
                batch = zip(rows[start : start + batch_size], places[start : start + batch_size])
                pictures, cells, _ = zip(*(task._cells(images[int(row)], size, place) for row, place in batch))
                digests += map(digest, pictures)
                described.append(_normalised(features(torch.stack(cells)), len(cells)))
                bar.update(len(cells))
            return np.array(digests), torch.cat(described)

        query_digests, query_features = describe(queries, [tuple(place) for place in drawn.places.tolist()])
        candidate_digests, candidate_features = describe(candidates, [CENTER] * len(candidates))
    allowed = query_digests[:, None] != candidate_digests[None]
    allowed &= queries[:, None] != candidates[None]
    if (labels := labels_of(images)) is not None:
        allowed &= labels[queries][:, None] == labels[candidates][None]
    if (few := allowed.sum(1) < examples).any():
        row = int(np.flatnonzero(few)[0])
        others = "other pictures" if labels is None else "other pictures of its class"
        raise ValueError(
            f"row {queries[row]} has {allowed[row].sum()} {others} to choose from and a prompt needs {examples}; "
            "give a larger pool."
        )
    similarity = (query_features @ candidate_features.T).masked_fill(~torch.from_numpy(allowed), -torch.inf)
    nearest = candidates[similarity.topk(examples).indices.numpy()]
    return Draw(np.concatenate([nearest, queries[:, None]], axis=1), drawn.places)


def encoder_features(model: InContextModel) -> Features:
    """What a model's first stage makes of a picture that is shown as the query, alone: the mean over tokens of the
    residual stream that its last layer leaves, or of that layer's heads where the model does not tell."""
    stage, layout = model.stages[0], model.layout
    if "residual" in model.outputs(stage.name, stage.layers - 1):
        stage = stage.at("residual")
    last = [(stage, stage.layers - 1)]

    @torch.no_grad()
    def features(pictures: torch.Tensor) -> torch.Tensor:
        prompts = [VisualPrompt.from_cells({"query": picture}, layout) for picture in pictures.cpu()]
        means: list[torch.Tensor] = []
        with model.trace(VisualPrompt.cat(prompts).query_only().to(device_of(model))):
            read_layers(model, last, lambda step, stage, layer, z, seen: means.append(z.mean(1).flatten(1)), stop=True)
        return means[0]

    return features


def _normalised(features: Any, rows: int) -> torch.Tensor:
    """Features of unit length, [row, width], on the CPU."""
    if isinstance(features, torch.Tensor) and features.shape[:-1] == (rows,) and features.isfinite().all():
        return F.normalize(features.detach().float().cpu(), dim=1)
    shape = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
    raise ValueError(f"features of {rows} pictures are {shape}; expected finite numbers [{rows}, width].")
