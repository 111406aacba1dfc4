"""Several layouts of one prompt, answered together (VP: *Visual Prompting via Image Inpainting*, NeurIPS 2022, §4.4).

>>> layouts = [Layout(order=order) for order in ("vertical", "horizontal")]
>>> prompts = [tasks.segmentation.prompts(images, n=10, seed=0, layout=layout) for layout in layouts]
>>> canvas = ensembles.generate(model, prompts, "softmax")       # [batch, 3, height, width]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from vtv_nnsight.prompts import VisualPrompt

RULES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.log_softmax(-1).logsumexp(0) - math.log(len(logits)),
    "logits": lambda logits: logits.mean(0),
    "product": lambda logits: logits.log_softmax(-1).sum(0),
    "maximum": lambda logits: logits.log_softmax(-1).amax(0),
}
"""Logits [prompt, ..., code] → scores [..., code], by name: the mean of the softmaxes, the mean of the logits, the
product and the maximum of the softmaxes. Scores are the logarithms of those, and the mean itself for the logits."""


def combine(logits: Sequence[torch.Tensor], rule: str = "softmax") -> torch.Tensor:
    """One set of scores [..., code] from several of logits of that shape.

    Raises:
        ValueError: when there are none, or the rule is unknown.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not a way to ensemble; choose one of {', '.join(RULES)}.")
    if not logits:
        raise ValueError("there is nothing to ensemble; give the logits of at least one prompt.")
    return RULES[rule](torch.stack(list(logits)).float())


@torch.no_grad()
def generate(model: Any, prompts: Sequence[VisualPrompt], rule: str = "softmax", paste: bool = True) -> torch.Tensor:
    """Complete the canvases of the first of `prompts` with the codes that all of them agree on.

    Args:
        model: A MAEVQGAN.
        prompts: The same examples and queries in several layouts or colours, one VisualPrompt each. As in VP's released
            code, scores are combined patch by patch over the canvas, so the outputs must lie in the same place.
        rule: One of `RULES`.
        paste: Keep the canvas's own pixels at the visible patches.

    Returns:
        [batch, 3, height, width] in [0, 1].

    Raises:
        ValueError: when there are none, or they differ in number, in where their outputs lie, or in what the decoder
            sees; or the rule is unknown.
    """
    if not prompts:
        raise ValueError("there is nothing to ensemble; give at least one VisualPrompt.")
    for prompt in prompts[1:]:
        _check(prompts[0], prompt)
    outputs = []
    for prompt in prompts:
        with model.trace(prompt):
            outputs.append(model.output.save())
    combined = replace(outputs[0], logits=combine([output.logits for output in outputs], rule))
    return model.paint(combined, prompts[0].to(model.device), paste)


def _check(first: VisualPrompt, other: VisualPrompt) -> None:
    if len(first) != len(other):
        raise ValueError(
            f"{len(first)} and {len(other)} prompts cannot be ensembled; give the same ones in each layout."
        )
    a, b = first.layout, other.layout
    if a.canvas_size != b.canvas_size or a.cells["output"] != b.cells["output"]:
        raise ValueError(f"the output lies elsewhere in {a} than in {b}; ensemble layouts that share its place.")
    if not torch.equal(first.decoded.cpu(), other.decoded.cpu()):
        raise ValueError(
            "prompts whose decoders see other patches cannot be ensembled; do not call query_only() on them."
        )
