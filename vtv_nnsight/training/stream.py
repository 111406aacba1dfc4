"""The endless stream of training prompts: a function of the seed and the step, so that a resumed run sees what an
unbroken one would have seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from vtv_nnsight import tasks
from vtv_nnsight.data.drawn_scenes import render, scenes
from vtv_nnsight.layouts import Layout
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.tasks import Row, Task
from vtv_nnsight.training.composition import compose, crop
from vtv_nnsight.training.corpus import CUTOUT, PHOTO, TEXTURE, Corpus
from vtv_nnsight.training.curriculum import draw_task

SCENES = 0.12
"""Share of the prompts that show scenes; all do where there is no corpus."""
MIX = {CUTOUT: 0.66, PHOTO: 0.31, TEXTURE: 0.03}
"""What the other prompts show, where the corpus has it: composed pictures, crops of photographs, and of textures."""
SAMPLED_FROM = 10**9
"""The step from which on samples are drawn that no training sees: no run trains that far."""


def training_prompts(
    step: int, n: int, layout: Layout, seed: int = 0, corpus: Corpus | None = None, split: str = "train"
) -> VisualPrompt:
    """The `n` one-shot prompts of a training step: scenes of a split, pictures composed of the corpus and crops of it,
    each prompt with another task (`curriculum.draw_task`)."""
    generator, corpus = np.random.default_rng([seed, step]), corpus or Corpus(())
    from_scenes = int(generator.binomial(n, SCENES)) if len(corpus) else n
    groups = [*_scene_groups(step, from_scenes, n, layout.examples, seed, split, generator)]
    groups += [draw_rows(corpus, layout.examples + 1, generator) for _ in range(n - from_scenes)]
    prompts = []
    for *examples, query in groups:
        task = draw_task(generator, masks="mask" in query)
        prompts.append(task.prompt(examples, query, layout, tuple(generator.random(2))))
    return VisualPrompt.cat(prompts)


def draw_rows(corpus: Corpus, n: int, generator: np.random.Generator, kind: str | None = None) -> list[Row]:
    """The pictures of one prompt, drawn from a corpus: the examples, then the query. `kind` is one of `MIX`'s, by
    default any."""
    if kind is None:
        kinds = [kind for kind in MIX if corpus.has(kind)]
        shares = np.array([MIX[kind] for kind in kinds])
        kind = kinds[generator.choice(len(kinds), p=shares / shares.sum())]
    if kind == CUTOUT:
        return compose(corpus, n, generator)
    return [{"image": crop(corpus.draw(kind, generator), generator)} for _ in range(n)]


def validation_prompts(task: Task, n: int, layout: Layout, corpus: Corpus | None = None) -> dict[str, VisualPrompt]:
    """`n` prompts of a task by what they show: scenes of the validation split, and "pictures" of a corpus, composed
    ones for tasks that need a mask and crops of photographs for others."""
    prompts = {"scenes": task.prompts(scenes("validation", n=3 * n), n=n, layout=layout)}
    kind = CUTOUT if task.needs == "mask" else PHOTO
    if corpus is not None and corpus.has(kind):
        prompts["pictures"] = corpus_prompts(task, n, layout, corpus, kind)
    return prompts


def corpus_prompts(task: Task, n: int, layout: Layout, corpus: Corpus, kind: str, seed: int = 0) -> VisualPrompt:
    """`n` prompts of a task that show what a corpus has of one kind (`MIX`)."""
    generator = np.random.default_rng(seed)
    prompts = []
    for _ in range(n):
        *examples, query = draw_rows(corpus, layout.examples + 1, generator, kind)
        prompts.append(task.prompt(examples, query, layout, tuple(generator.random(2))))
    return VisualPrompt.cat(prompts)


def training_crops(step: int, n: int, size: int, seed: int, corpus: Corpus) -> torch.Tensor:
    """Whole pictures without a canvas, [n, 3, size, size] in [0, 1]: what the tokenizer sees besides canvases."""
    generator = np.random.default_rng([seed, step, size])
    kinds = [kind for kind in (PHOTO, TEXTURE) if corpus.has(kind)]
    drawn = [crop(corpus.draw(kinds[generator.integers(len(kinds))], generator), generator, size) for _ in range(n)]
    return as_batch(drawn)


def as_batch(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """PIL RGB of one size → float [picture, 3, height, width] in [0, 1]."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return rearrange(torch.from_numpy(pixels), "n h w c -> n c h w").float() / 255


def _scene_groups(
    step: int, count: int, n: int, examples: int, seed: int, split: str, generator: np.random.Generator
) -> Iterator[list[Row]]:
    """Twice as many scenes as prompts and never few, so that most classes come in pairs."""
    if not count:
        return
    many, most = max(2 * count, 32), max(2 * n, 32)
    drawn = render(split, range(step * most, step * most + many), seed)
    rows: list[Row] = [
        {"image": Image.fromarray(image), "mask": Image.fromarray(mask), "label": int(label)}
        for image, mask, label in zip(*drawn)
    ]
    for group in tasks.draw_rows(rows, count, examples, generator).tolist():
        yield [rows[i] for i in group]
