"""How much the look of a prompt matters, and what the model looks at (VP: *Visual Prompting via Image Inpainting*,
NeurIPS 2022, §4.4).

    >>> scores = prompt_engineering.compare(model, images, n=100)     # layout × colours → IoU of every prompt
    >>> print(prompt_engineering.table(scores))
    >>> attention = prompt_engineering.attention_to_regions(MAEVQGAN(..., attn_implementation="eager"), prompts)
    >>> attention["query"]                                            # [decoder layer]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from vtv_nnsight.layouts import ORDERS, positions
from vtv_nnsight.prompts import VisualPrompt, crop
from vtv_nnsight.tasks import PURPLE, YELLOW, Segmentation
from vtv_nnsight.visual_prompting import ensembles

COLOURS = {
    "black/white": Segmentation(),
    "purple/yellow": Segmentation(YELLOW, PURPLE),
}
ENSEMBLE = " + ".join(ORDERS)


def compare(
    model: Any,
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
        model: A MAEVQGAN.
        images: Rows with image, mask and (where there are classes) label.
        n, seed: As for `Task.prompts`.
        tasks: Name → how a mask looks; edges or textures (`Segmentation(fill=...)`) can stand beside the colours.
        rule: How layouts are ensembled (`ensembles.RULES`).

    Returns:
        (layout, colours) → scores [n], one a prompt: IoU. The layouts are "vertical", "horizontal" and their ensemble.
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


@torch.no_grad()
def attention_to_regions(model: Any, prompts: VisualPrompt) -> dict[str, torch.Tensor]:
    """How much of the decoder's attention goes from the output's patches to CLS and to each cell's patches.

    Args:
        model: A MAEVQGAN or a ViTMAE loaded with attn_implementation="eager".
        prompts: One-shot prompts, or zero-shot ones (`query_only`), whose decoder sees fewer cells.

    Returns:
        "cls" and names of regions → [decoder layer]: the share of attention, averaged over prompts, heads and the
        output's patches. Where cells share no patches the shares sum to 1.

    Raises:
        ValueError: when the model has no decoder, or its attention is not eager.
    """
    stages = {stage.name: stage for stage in model.stages}
    if "decoder" not in stages:
        raise ValueError(
            f"this is the attention of a decoder, and {type(model).__name__} has the stages {', '.join(stages)}; "
            "give a MAEVQGAN or a ViTMAE."
        )
    layout = prompts.layout
    seen = prompts.decoded.cpu()
    groups = {
        name: layout.index(seen, patches) for name, patches in layout.regions.items() if torch.isin(patches, seen).all()
    }
    output = groups["output"]
    groups = {"cls": positions(seen)[:1], **groups}
    with model.trace(prompts):
        layers = [
            _shares(model.attention("decoder", layer).pattern, output, groups)
            for layer in range(stages["decoder"].layers)
        ].save()
    return dict(zip(groups, torch.stack(layers, dim=1).cpu()))


def _shares(pattern: torch.Tensor, queries: torch.Tensor, groups: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Pattern [batch, head, query, key] → mean share of each group of keys, [group]."""
    mean = pattern.float().mean((0, 1))[queries.to(pattern.device)].mean(0)
    return torch.stack([mean[keys.to(mean.device)].sum() for keys in groups.values()])
