"""What a run writes beside vectors, sets and tables: prompts, pictures, scores, and what its numbers depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from vtv_nnsight import data
from vtv_nnsight.digests import json_digest
from vtv_nnsight.evaluation import Table
from vtv_nnsight.files import package_version, read_tensors, write_tensors, write_text
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.models.sites import validate_sites
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.patching.forward import find_loss
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.runs.folds import Fold
from vtv_nnsight.runs.settings import Settings
from vtv_nnsight.tasks import Task
from vtv_nnsight.text_prompts import TextPrompts
from vtv_nnsight.vectors import TaskVectors
from vtv_nnsight.vectors.compatibility import fingerprint

SIXTEENTH = 255 * 128
"""Prompts are kept as 16-bit numbers: pixels of 8 bits, and those darkened to a half, are kept exactly."""


def write_prompts(path: Path, prompts: Any) -> None:
    """The canvases of prompts, of any layout, or their texts, as a safetensors file."""
    if isinstance(prompts, TextPrompts):
        write_tensors(path, "prompts", {"identifiers": prompts.identifiers}, prompts.facts)
    else:
        write_tensors(path, "prompts", {"canvas": prompts.canvas.mul(SIXTEENTH).round().short().cpu()}, {})


def read_prompts(path: Path, layout: Any) -> Any:
    """What `write_prompts` wrote, in the layout that canvases had; texts have their own."""
    tensors, facts = read_tensors(path, "prompts")
    if facts:
        return TextPrompts.of(facts, tensors["identifiers"])
    return VisualPrompt.from_canvas(tensors["canvas"].float() / SIXTEENTH, layout)


def write_pictures(path: Path, table: Table, task: Task) -> None:
    """The first answers of an evaluation, pictures or texts, which a Parquet file has no place for."""
    answers = table.pictures[task.name]
    pictures = {name: answer for name, answer in answers.items() if isinstance(answer, torch.Tensor)}
    texts = {name: answer for name, answer in answers.items() if name not in pictures}
    write_tensors(path, "answers", pictures, {"names": list(answers)} | ({"texts": texts} if texts else {}))


def write_scores(path: Path, vectors: TaskVectors, space: PatchSpace) -> None:
    """Units and how well each tells the tasks apart (ECCV 2024, §4.2), the highest first, as CSV."""
    scores = space.average(vectors.score())
    order = scores.nan_to_num(-1).argsort(descending=True).tolist()
    table = pd.DataFrame({"unit": [space.names[i] for i in order], "score": scores[order].numpy()})
    write_text(path, table.to_csv(index=False, float_format="%.6g", na_rep="nan", lineterminator="\n"))


def identity(settings: Settings, model: InContextModel, folds: Sequence[Fold], tasks: Sequence[Task]) -> dict[str, Any]:
    """What the numbers of a run depend on, as run.json has it: settings, weights, pictures and version."""
    named = {name: value for name, value in asdict(settings).items() if name != "most_tasks"}
    return named | {
        "loss": find_loss(model, settings.loss, tasks[0]).name,
        "sites": validate_sites(model, settings.sites),
        "tasks": [task.name for task in tasks],
        "folds": [fold.number for fold in folds if fold.name],
        "weights": json_digest(fingerprint(model)),
        "pictures": json_digest([data.identities(fold.train) for fold in folds if not fold.shares]),
        "search pictures": json_digest([data.identities(fold.search) for fold in folds[:1] if fold.search is not None]),
        "test pictures": json_digest([data.identities(fold.test) for fold in folds]),
        "version": package_version(),
    }
