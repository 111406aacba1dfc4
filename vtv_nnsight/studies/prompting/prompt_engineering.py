"""How much the look of a prompt matters, and what the model looks at (VP: *Visual Prompting via Image Inpainting*,
NeurIPS 2022, §4.4).

    >>> scores = prompt_engineering.compare(model, images, n=100)     # layout × colours → IoU of every prompt
    >>> print(prompt_engineering.table(scores))
    >>> attention = prompt_engineering.attention_to_regions(model, prompts)
    >>> attention["query"]                                            # [layer] of the decoder
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from vtv_nnsight.layouts import ORDERS
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.prompts import VisualPrompt, crop
from vtv_nnsight.report.attention import attention_maps
from vtv_nnsight.studies.prompting import ensembles
from vtv_nnsight.tasks import PURPLE, YELLOW, Segmentation

COLOURS = {"black/white": Segmentation(), "purple/yellow": Segmentation(YELLOW, PURPLE)}
ENSEMBLE = " + ".join(ORDERS)


def compare(
    model: InContextModel,
    images: Any,
    n: int = 100,
    seed: int = 0,
    *,
    tasks: Mapping[str, Segmentation] = COLOURS,
    rule: str = "softmax",
    batch_size: int = 32,
) -> dict[tuple[str, str], torch.Tensor]:
    """Segment the same queries by the same examples in every layout and colour, and in all layouts at once.

    Args:
        model: As for `ensembles.generate`.
        images: Rows with image, mask and (where there are classes) label.
        n, seed: As for `Task.prompts`.
        tasks: Name → how a mask looks; edges or textures (`Segmentation(fill=...)`) can stand beside the colours.
        rule: How layouts are ensembled (`ensembles.RULES`).

    Returns:
        (layout, colours) → scores [n], one a prompt: IoU. The layouts are "vertical", "horizontal" and their ensemble.

    Raises:
        ValueError: as `ensembles.generate`.
    """
    scores = {}
    for name, task in tasks.items():
        prompts = [task.prompts(images, n, seed, replace(model.layout, order=order)) for order in ORDERS]
        for layout, members in (*zip(ORDERS, ([rows] for rows in prompts)), (ENSEMBLE, prompts)):
            parts = []
            for batch in zip(*(rows.split(batch_size) for rows in members)):
                answer = crop(ensembles.generate(model, batch, rule), "output", batch[0].layout)
                parts.append(task.score(answer, batch[0].region("output").to(answer.device)).cpu())
            scores[layout, name] = torch.cat(parts)
    return scores


def table(scores: Mapping[tuple[str, str], torch.Tensor]) -> str:
    """Means of `compare`'s scores in plain text: a row for each layout, a column for each colour."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*scores))
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"  {name}" for name in columns)]
    for row in rows:
        means = (f"{scores[row, column].mean().item():.3f}" for column in columns)
        lines.append(f"{row:<{width}}" + "".join(f"  {mean:>{len(name)}}" for mean, name in zip(means, columns)))
    return "\n".join(lines)


def attention_to_regions(model: InContextModel, prompts: VisualPrompt) -> dict[str, torch.Tensor]:
    """How much of the attention goes from the output's patches to CLS and to each cell's patches.

    Args:
        model: A model whose attention has patterns, such as a MAEVQGAN.
        prompts: One-shot prompts, or zero-shot ones (`query_only`), which show fewer cells.

    Returns:
        "cls" and names of regions → [layer], of the last stage that holds the output, such as MAE-VQGAN's decoder: the
        share of attention, averaged over prompts, heads and the output's patches (`Layout.shares`).

    Raises:
        ValueError: when there are no patterns.
    """
    maps = attention_maps(model, prompts)
    if not maps:
        raise ValueError(f"the attention of {type(model).__name__} has no patterns to read; give such as a MAEVQGAN.")
    *_, last = maps.values()
    return {name: share for name, share in prompts.layout.shares(last.mean(1)).items() if share.any()}
