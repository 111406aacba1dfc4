"""The released protocol of *Finding Visual Task Vectors* (ECCV 2024, released code) on Pascal-5i: what `--published`
follows where data are "pascal:ROOT".

- Vectors: of folds 1, 2 and 3 of the training half. In each, the first 1000 images of the list are queries, with an
  example of their class drawn at random; the 3000 pairs are the candidates that prompts are selected among, duplicates
  removed as released (see `evaluation.select_prompts`).
- Search: on one fold of the training half, of which the first 10 images are trained on and the next 490 judge.
- Evaluation: the one set on the validation half of all four folds, 1000 queries each, in the order of the list, which
  is begun again where it is shorter.

One vector and one set of units for each task therefore serve all folds. The released code keeps the search's Bernoullis
and draws a set from them for each fold: `Settings.fold_draws`, `fold_draw`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vtv_nnsight import data
from vtv_nnsight.data.pascal_voc import PER_FOLD
from vtv_nnsight.layouts import Layout
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.search.loops import sample
from vtv_nnsight.search.result import SearchResult
from vtv_nnsight.search.score_function import PUBLISHED
from vtv_nnsight.tasks import Draw, Task, draw_queries

VECTOR_FOLDS = (1, 2, 3)
"""Of the training half, the folds that vectors are collected on."""
PER_VECTOR_FOLD = 1000
"""Candidates of each."""
SEARCHED = 500
"""Images of a fold that a search sees; all but `PUBLISHED.images` of them judge."""


def candidates(images: Any, examples: int = 1, seed: int = 0, n: int = PER_VECTOR_FOLD) -> Draw:
    """The candidates for vectors: `n` queries of each fold that the images are of."""
    labels = np.asarray(images.with_format(None)["label"])
    folds = [np.flatnonzero(labels // PER_FOLD == fold) for fold in np.unique(labels // PER_FOLD)]
    queries = np.concatenate([np.resize(rows, n) for rows in folds])
    return draw_queries(images, queries.tolist(), examples, seed)


def search_prompts(task: Task, images: Any, layout: Layout, seed: int = 0) -> tuple[VisualPrompt, VisualPrompt]:
    """The prompts that a search trains on and those that judge it, of the first images of a fold.

    Raises:
        ValueError: when the fold has too few images for both.
    """
    if len(images) <= PUBLISHED.images:
        raise ValueError(f"the fold to search on has {len(images)} images; give more than {PUBLISHED.images}.")
    drawn = draw_queries(images, range(min(len(images), SEARCHED)), layout.examples, seed)
    prompts = task.compose(images, drawn, layout)
    return prompts[: PUBLISHED.images], prompts[PUBLISHED.images :]


def test_prompts(task: Task, images: Any, n: int, layout: Layout, seed: int = 0) -> VisualPrompt:
    """`n` prompts to evaluate on: the images in their order, from the first again where there are fewer."""
    queries = np.resize(np.arange(len(images)), n)
    return task.compose(images, draw_queries(images, queries.tolist(), layout.examples, seed), layout)


def fold_draw(result: SearchResult, fold: int, seed: int = 0) -> SearchResult:
    """The result with a set that is drawn for a fold from its probabilities, as the released code does."""
    choices = sample(result.scores, (), torch.Generator().manual_seed(seed + fold))
    return replace(result, patches=PatchSet(result.patches.space, choices))


def detection_prompts(task: Task, images: Any, settings: Settings, layout: Layout) -> VisualPrompt:
    """The prompts of VP's released evaluation of detection (NeurIPS 2022, §4.2): `images` in the order of
    `data.released_detection_order`, `settings.test_prompts` at most. Examples are other images of the same half."""
    root, _ = data.detection_argument(settings.data.removeprefix("detection:"))
    queries = data.released_detection_order(root, len(images))[: settings.test_prompts]
    return task.compose(images, draw_queries(images, queries, layout.examples, settings.seed), layout)
