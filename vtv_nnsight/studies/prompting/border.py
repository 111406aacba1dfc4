"""A border around the example's pictures, learned by gradient (*Instruct Me More*, InMeMo, arXiv 2311.03648, §3).

    >>> border = learn_border(model, task.prompts(images, n=100, seed=0, layout=model.layout))
    >>> evaluate(model, task, prompts, {"learned border": Condition(prompts_override=border(prompts))})

The same pixels are added to the input and to the output of every example, whatever they show; the query stays as it is.
In the paper they lie 30 pixels wide within pictures of 224, which gives 69,840 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vtv_nnsight.layouts import Layout
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.prompts import VisualPrompt, crop
from vtv_nnsight.studies.learning import Descent, descend


@dataclass(frozen=True, eq=False)
class Border:
    """A function from prompts to prompts: the same with pixels added to the cells of their examples.

    Args:
        pixels: Float [3, cell, cell], what is added to each cell; 0 within the border. Sums are cut to [0, 1].
        layout: Of the prompts that it fits.
    """

    pixels: torch.Tensor
    layout: Layout

    def __call__(self, prompts: VisualPrompt) -> VisualPrompt:
        """The prompts with the border; gradients flow to `pixels`.

        Raises:
            ValueError: when the prompts are of another layout.
        """
        if prompts.layout != self.layout:
            raise ValueError(f"a border of {self.layout} does not fit prompts of {prompts.layout}; learn one for them.")
        canvas, pixels = prompts.canvas.clone(), self.pixels.to(prompts.canvas)
        for name in _example_cells(self.layout):
            crop(canvas, name, self.layout)[:] = (crop(prompts.canvas, name, self.layout) + pixels).clamp(0, 1)
        return prompts._with(canvas=canvas)


def learn_border(model: InContextModel, prompts: VisualPrompt, *, width: int | None = None, **options: Any) -> Border:
    """The border that lowers a model's loss most.

    Adam goes down the gradient of the loss from no border at all. The held-out prompts are looked at ten times, and the
    border that was best on them is returned: there it is never worse than none.

    Args:
        model: The model, on its device and in its dtype.
        prompts: One-shot prompts of the task with the truth in their output cells.
        width: Of the border in pixels; None is the paper's share of a cell's side, 30 of 224.
        **options: Those of `learning.Descent`, such as `steps=60`; pixels are in [0, 1].

    Raises:
        ValueError: when the model has no such loss, the prompts show no example, or nothing is to be learned.
    """
    layout, how = prompts.layout, Descent(**options)
    size = layout.cell_size
    width = max(1, round(size * 30 / 224)) if width is None else width
    if not 1 <= width <= (size + 1) // 2 or how.steps < 1:
        raise ValueError(
            f"a border of {width} pixels and {how.steps} steps leave nothing to learn on cells of {size} pixels; give "
            f"a width from 1 to {(size + 1) // 2}, and 1 step or more."
        )
    examples = torch.cat([layout.regions[name] for name in _example_cells(layout)])
    if not torch.isin(examples, prompts.visible.cpu()).any():
        raise ValueError("these prompts show no example to put a border around; give one-shot prompts.")
    frame = torch.ones(size, size, device=device_of(model))
    frame[width : size - width, width : size - width] = 0
    pixels = torch.zeros(3, size, size, device=frame.device, requires_grad=True)
    (best,) = descend(model, prompts, [pixels], how, show=lambda rows: Border(frame * pixels, layout)(rows))
    return Border(frame * best, layout)


def _example_cells(layout: Layout) -> list[str]:
    return [name for name in layout.cells if name not in ("query", "output")]
