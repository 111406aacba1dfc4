"""Several layouts of one prompt, answered together (VP: *Visual Prompting via Image Inpainting*, NeurIPS 2022, §4.4).

>>> layouts = [Layout(order=order) for order in ("vertical", "horizontal")]
>>> prompts = [tasks.segmentation.prompts(images, n=10, seed=0, layout=layout) for layout in layouts]
>>> canvas = ensembles.generate(model, prompts, "softmax")       # [batch, 3, height, width]
>>> answer = ensembles.average(model, prompts[0])                 # [batch, 3, cell, cell]: the mean of several views
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from vtv_nnsight.layouts import ORDERS
from vtv_nnsight.patching.forward import forward
from vtv_nnsight.prompts import VisualPrompt, crop

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
        model: One that scores the codes of each patch by itself and says so by its loss "tokens": a MAEVQGAN, or a BEiT
            with its tokenizer's encoder.
        prompts: The same examples and queries in several layouts or colours, one VisualPrompt each. As in VP's released
            code, scores are combined patch by patch over the canvas, so the outputs must lie in the same place.
        rule: One of `RULES`.
        paste: Keep the canvas's own pixels at the visible patches.

    Returns:
        [batch, 3, height, width] in [0, 1].

    Raises:
        ValueError: when the model has no such loss, as ViTMAE, SegGPT and Net2Net have none; when there are no prompts,
            or they differ in number, in where their outputs lie, or in what the decoder sees; or when the rule is
            unknown.
    """
    if not any(loss.name == "tokens" for loss in model.losses):
        raise ValueError(
            f"{type(model).__name__} has no loss 'tokens', so it gives no scores of codes to ensemble; give a "
            "MAEVQGAN, or a BEiT with its tokenizer's encoder."
        )
    if not prompts:
        raise ValueError("there is nothing to ensemble; give at least one VisualPrompt.")
    for prompt in prompts[1:]:
        _check(prompts[0], prompt)
    outputs = [forward(model, prompt)[0] for prompt in prompts]
    combined = replace(outputs[0], logits=combine([output.logits for output in outputs], rule))
    return model.paint(combined, prompts[0].to(model.device), paste)


VIEWS = ("plain", "transposed", "swapped", "swapped transposed")
"""Ways to show a prompt: as it is, its canvas transposed, with each answer in the place of its input, or both."""


@torch.no_grad()
def average(model: Any, prompts: VisualPrompt, views: Sequence[str] = ("swapped transposed", "plain")) -> torch.Tensor:
    """The mean of the answers to several views of the same prompts, turned back: the test-time ensembles of VP's
    reasoning study (released code).

    Args:
        model: A MAEVQGAN.
        prompts: One-shot prompts.
        views: Some of `VIEWS`. The released code has "plain", "swapped transposed", both, these with "transposed", and
            "transposed" alone.

    Returns:
        [batch, 3, cell, cell] in [0, 1].

    Raises:
        ValueError: when there are no views, or one is unknown.
    """
    if not views:
        raise ValueError("there is nothing to average; give at least one view.")
    answers = []
    for name in views:
        turned, cell = view(prompts, name)
        output, _ = forward(model, turned)
        answer = crop(model.paint(output, turned.to(model.device)), cell, turned.layout)
        answers.append(answer.transpose(2, 3) if name.endswith("transposed") else answer)
    return torch.stack(answers).mean(0)


def view(prompts: VisualPrompt, name: str) -> tuple[VisualPrompt, str]:
    """Prompts in one of `VIEWS`, and the name of the cell that is then to be painted.

    Raises:
        ValueError: when the view is unknown.
    """
    if name not in VIEWS:
        raise ValueError(f"view {name!r} is unknown; choose from {', '.join(VIEWS)}.")
    layout, canvas, hidden = prompts.layout, prompts.canvas.clone(), "output"
    if name.startswith("swapped"):
        hidden, cells = "query", list(layout.cells.values())
        for question, answer in zip(cells[::2], cells[1::2]):
            canvas[(..., *question)] = prompts.canvas[(..., *answer)]
            canvas[(..., *answer)] = prompts.canvas[(..., *question)]
    if name.endswith("transposed"):
        canvas = canvas.transpose(2, 3)
        layout = replace(layout, order=next(order for order in ORDERS if order != layout.order))
    patches = layout.all_patches
    visible = patches[~torch.isin(patches, layout.regions[hidden])]
    return VisualPrompt(canvas, visible.to(canvas.device), patches.to(canvas.device), layout), hidden


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
