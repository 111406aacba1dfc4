"""Training of a MAE-VQGAN from nothing: the tokenizer first, then the transformer.

    >>> pretrain("tokenizer", "tiny", "runs/tiny")   # runs/tiny/tokenizer/: checkpoint.pt, log.jsonl, vqgan.safetensors
    >>> pretrain("decoder", "tiny", "runs/tiny")     # if wanted, beside the next: the same in runs/tiny/decoder/
    >>> pretrain("mae", "tiny", "runs/tiny")            # runs/tiny/mae/: checkpoint.pt, log.jsonl, model/
    >>> model = MAEVQGAN("runs/tiny/mae/model")

The embedded model's card, weights/tiny/README.md, says how it was trained. VP's way, figures with random masks in the
place of prompts, is `pretrain("mae", …, data="my/figures")`, or data="cvf:ROOT" for VP's own Computer Vision Figures
(`figures.listed`).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vtv_nnsight.models.mae_vqgan.traced import MAEVQGAN
from vtv_nnsight.training import recipes
from vtv_nnsight.training.corpus import PHOTO, Corpus
from vtv_nnsight.training.figures import ListedFigures, cropped, listed
from vtv_nnsight.training.loop import Job
from vtv_nnsight.training.mae import random_mask, train_mae
from vtv_nnsight.training.tokenizer import WEIGHTS, load_tokenizer, train_decoder, train_tokenizer

STAGES = ("tokenizer", "decoder", "mae")
CVF = "cvf:"

__all__ = ["STAGES", "pretrain", "recipes", "train_decoder", "train_mae", "train_tokenizer"]


def pretrain(
    stage: str,
    size: str,
    out: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    start: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    decay: int | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> Path:
    """Train one stage of a size (`recipes.get`) in the folder `out`, and return what it wrote: the tokenizer's file or
    the model's folder.

    Args:
        images: A corpus (as `docs/gather_corpus.py` writes it) or a folder of pictures to train on beside the scenes;
            without it, the photographs that scikit-image and scikit-learn carry.
        data: For "mae", what is learned from, with random masks, in the place of prompts: a folder of figures or
            pictures, or "cvf:ROOT", the Computer Vision Figures that the released list says to train on
            (`figures.listed`).
        start: A model of the same size, by its name or folder, to begin the transformer with, whatever its codes.
        steps: Optimiser steps in place of the recipe's; a resumed run may change them.
        decay: Last steps, over which the rates fall to zero, in place of the recipe's. To end a long run early, resume
            it with fewer `steps` and some of them as `decay`.
        resume: Continue the run in `out`, if there is one.
        device: A torch device; by default the first GPU, or the CPU.

    Raises:
        ValueError: for a stage or a size that does not exist, or `data` that is not for the stage or holds no picture.
        FileExistsError: when `out` holds a run and `resume` is off.
        FileNotFoundError: when the tokenizer that "decoder" and "mae" build on has not been trained in `out`, or there
            is no folder `data`.
    """
    if stage not in STAGES:
        raise ValueError(f"{stage!r} is not a stage of training; choose one of {', '.join(STAGES)}.")
    if data is not None and stage != "mae":
        raise ValueError(
            f"data={os.fspath(data)!r} is for the stage 'mae'; the {stage} learns from images, leave data out."
        )
    out, sizes = Path(out), recipes.get(size)
    recipe: recipes.Recipe = getattr(sizes, stage)
    recipe = replace(
        recipe, steps=recipe.steps if steps is None else steps, decay=recipe.decay if decay is None else decay
    )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pictures = Corpus.read(images), _validation(images)
    job, options = Job(sizes.config, recipe, out / stage, *pictures, resume, seed, device), dict[str, Any]()
    if start is not None and stage != "mae":
        raise ValueError(f"start={str(start)!r} is for the stage mae; {stage} begins with what {out} holds.")
    if stage == "tokenizer":
        return train_tokenizer(job)
    if data is not None:
        figures = _figures(data)
        options["canvases"] = lambda step, n: cropped(step, n, sizes.config.image_size, seed, figures)
        options["mask"] = random_mask
    polished = stage == "mae" and (out / "decoder" / WEIGHTS).is_file()
    vqgan = load_tokenizer(sizes.config, out / ("decoder" if polished else "tokenizer"))
    if stage == "decoder":
        return train_decoder(job, vqgan)
    known = None if start is None else MAEVQGAN(start, dispatch=True).network
    return train_mae(job, vqgan, known, **options)


def _figures(data: str | os.PathLike[str]) -> Corpus | ListedFigures:
    """Those of a folder, or of VP's list."""
    if str(data).startswith(CVF):
        return listed(str(data).removeprefix(CVF))
    figures = Corpus.read(data)
    if not figures.has(PHOTO):
        raise ValueError(f"{data} lists no photographs; give a folder of figures or pictures.")
    return figures


def _validation(images: str | os.PathLike[str] | None) -> Corpus | None:
    """The validation split of a corpus that has one."""
    try:
        return Corpus.read(images, "validation")
    except ValueError:
        return None
