"""Photographs as large as they are: answered at the model's size, and each answer carried over to the photograph.

>>> pictures = answers(model, tasks.lowlight, vector, patches, Image.open("dog.jpg"))
>>> strip(pictures, side=320).save("dog.png")
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtv_nnsight.evaluation.conditions import BASELINE, PATCHED, ZERO_SHOT
from vtv_nnsight.files import write_text
from vtv_nnsight.images import as_rgb, carry_over, enlarge, psnr, to_tensor
from vtv_nnsight.metrics import MSE
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.patching.forward import forward
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.report.gates import generate_with_gates
from vtv_nnsight.report.pictures import sprite
from vtv_nnsight.report.rendering import render
from vtv_nnsight.runs.bundles import Bundle
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import TaskVector

PHOTOGRAPH, QUERY, CARRIED = "photograph", "query", "carried over to the photograph"
UNLIKE = 0.65
"""The tokenizer's MSE of a picture, above which it is unlike what the model knows. Of 138 photographs that the embedded
model never saw, half are below 0.13 and none is above 0.62; a checkerboard has 1.3 to 2.0."""
MAX_SIDE = 448
"""Pixels of a photograph on a page, at most."""


def answers(
    model: Any,
    task: Task,
    vector: TaskVector,
    patches: PatchSet,
    image: Any,
    prompt: VisualPrompt | None = None,
    *,
    scale: float = 1.0,
    as_it_is: bool = False,
) -> dict[str, torch.Tensor]:
    """The answers to a photograph, the last of them carried over to it.

    Args:
        image: A picture or its path.
        prompt: The prompt, where it has an example.
        scale: How far the vector goes.
        as_it_is: The photograph is the query, and the task's corruption is not applied.

    Returns:
        "photograph", "query" (where it is another), "zero-shot", "one-shot" (of a prompt), "task vector", and
        `CARRIED` for tasks that can be: pixels [3, height, width] in [0, 1], the answers of the cell's size.
    """
    photograph, layout = to_tensor(as_rgb(image)), patches.space.layout
    query = photograph if as_it_is else task.corrupt(photograph, (0.5, 0.5))
    pictures = {PHOTOGRAPH: photograph} | ({} if torch.equal(query, photograph) else {QUERY: query})
    alone = (
        VisualPrompt.from_cells({QUERY: task.cells(image, layout.cell_size)[0]}, layout) if prompt is None else prompt
    )
    gates = torch.tensor([0.0, scale])[:, None] * patches.choices
    pictures[ZERO_SHOT], patched = generate_with_gates(model, alone, vector, patches.space, gates)
    if prompt is not None:
        with torch.no_grad():
            answer, _ = model.answers(*forward(model, prompt.to(device_of(model))))
        pictures[BASELINE] = answer[0].float().cpu()
    pictures[PATCHED] = patched
    if task.change and task.fit != "crop":
        pictures[CARRIED] = carry_over(query, patched, task.change)
    return pictures


def psnrs(task: Task, pictures: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """PSNR against the photograph, in dB: of the query, of the answer with the vector, enlarged, and of the answer
    carried over. Empty for tasks with another answer than the photograph."""
    if QUERY not in pictures or type(task).target is not Task.target:
        return {}
    truth = pictures[PHOTOGRAPH]
    answer = enlarge(pictures[PATCHED], *truth.shape[-2:])
    compared = {QUERY: pictures[QUERY], "answer": answer, "answer carried over": pictures.get(CARRIED, answer)}
    return {name: psnr(pixels, truth) for name, pixels in compared.items()}


def warning(model: Any, layout: Any, image: Any) -> str:
    """A sentence where a picture is unlike those that a model knows: its tokenizer draws it badly (`UNLIKE`)."""
    prompt = VisualPrompt.from_cells({QUERY: as_rgb(image)}, layout).to(device_of(model))
    drawn = model.ceiling(prompt)
    if drawn is None:
        return ""
    error = float(MSE(VisualPrompt.from_canvas(drawn, layout).region(QUERY), prompt.region(QUERY))[0])
    unlike = f"this picture is unlike what the model has learned (its tokenizer's MSE is {error:.2f}): expect little."
    return unlike if error > UNLIKE else ""


def write(path: Path, model: Any, bundle: Bundle, tasks: Iterable[Task], files: Mapping[str, Path]) -> Path:
    """A page with the answers to photographs by a bundle's vectors: name → file."""
    rows, scores = [], defaultdict(list)
    layout = next(iter(bundle.values()))[1].space.layout
    for name, file in progress_bar(files.items(), desc="photographs"):
        image = as_rgb(file)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        answered = {}
        for task in tasks:
            pictures = answers(model, task, *bundle[task.name], image)
            scores[task.name].append(psnrs(task, pictures))
            uris = {
                picture: sprite(pixels[None].clamp(0, 1).mul(255).round().byte())
                for picture, pixels in pictures.items()
            }
            answered[task.name] = {"psnr": scores[task.name][-1], "uris": uris}
        rows.append({"name": name, "size": image.size, "warning": warning(model, layout, image), "tasks": answered})
    medians = {
        task: {name: float(np.median([score[name] for score in measured])) for name in measured[0]}
        for task, measured in scores.items()
        if measured[0]
    }
    title = f"{len(rows)} photographs"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render("photographs.html", title=title, rows=rows, medians=medians, bundle=bundle.name) + "\n")
    return path
