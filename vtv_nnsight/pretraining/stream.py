"""The endless stream of training prompts: a function of the seed and the step, so that a resumed run sees what an
unbroken one would have seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vtv_nnsight import tasks
from vtv_nnsight.data.photographs import crops
from vtv_nnsight.data.scenes import render
from vtv_nnsight.layouts import Layout
from vtv_nnsight.pretraining.curriculum import draw_task
from vtv_nnsight.prompts import VisualPrompt

PHOTOGRAPHS = 0.15
"""Share of the prompts that are made of photographs, where there are any."""


def training_prompts(
    step: int, n: int, layout: Layout, seed: int = 0, photographs: Sequence[Image.Image] = ()
) -> VisualPrompt:
    """The `n` one-shot prompts of a training step: scenes of the training split and crops of photographs, each prompt
    with a task of its own (`curriculum.draw_task`)."""
    generator = np.random.default_rng([seed, step])
    from_photographs = int(generator.binomial(n, PHOTOGRAPHS)) if len(photographs) else 0
    prompts = []
    for count, rows in (
        (n - from_photographs, _scene_rows(step, n, seed)),
        (from_photographs, _photograph_rows(step, 2 * from_photographs, photographs, seed)),
    ):
        if not count:
            continue
        for *examples, query in tasks.draw_rows(rows, count, layout.examples, generator).tolist():
            task = draw_task(generator, masks="mask" in rows[query])
            place = tuple(generator.random(2))
            prompts.append(task.prompt([rows[i] for i in examples], rows[query], layout, place))
    return VisualPrompt.cat(prompts)


def _scene_rows(step: int, n: int, seed: int) -> list[dict]:
    """Twice as many scenes as prompts and never few, so that most classes come in pairs."""
    count = max(2 * n, 32)
    drawn = render("train", range(step * count, (step + 1) * count), seed)
    return [
        {"image": Image.fromarray(image), "mask": Image.fromarray(mask), "label": int(label)}
        for image, mask, label in zip(*drawn)
    ]


def _photograph_rows(step: int, n: int, photographs: Sequence[Image.Image], seed: int) -> list[dict]:
    if not n:
        return []
    drawn = crops(photographs, range(step * n, (step + 1) * n), seed=seed)
    return [{"image": Image.fromarray(image)} for image in drawn]
