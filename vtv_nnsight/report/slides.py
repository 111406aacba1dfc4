"""Pictures to slide through in a notebook, all of them computed before: without a kernel, and without widgets.

>>> scales = [i / 10 for i in range(11)]
>>> cells = generate_with_gates(model, prompts[0], vector, space, torch.tensor(scales)[:, None] * patches.choices)
>>> Slides(dict(zip(map(str, scales), cells)), "scale of the vector")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image

from vtv_nnsight.images import png_of
from vtv_nnsight.report.pictures import sprite, strip
from vtv_nnsight.report.rendering import render

MAX_WIDTH, MAX_HEIGHT = 480, 320
"""Of the large picture, in pixels."""


@dataclass(frozen=True, eq=False)
class Slides:
    """Pictures of one size that a slider goes through. A notebook shows them as a strip, which is there wherever no
    script runs (a page of GitHub's, a print), and below it as one large picture with the slider.

    Args:
        pictures: Label → pixels [3, height, width] in [0, 1].
        title: What the slider changes.

    Raises:
        ValueError: when there are fewer than two pictures, or they differ in size.
    """

    pictures: Mapping[str, torch.Tensor]
    title: str

    def __post_init__(self) -> None:
        sizes = {tuple(pixels.shape) for pixels in self.pictures.values()}
        if len(self.pictures) < 2 or len(sizes) > 1:
            raise ValueError(
                f"{len(self.pictures)} pictures of the sizes {sorted(sizes)} cannot be slid through; give two or more "
                "[3, height, width] of one size."
            )

    def strip(self, side: int = 80) -> Image.Image:
        """All of them side by side with their labels, each `side` pixels wide."""
        return strip(self.pictures, side)

    def html(self) -> str:
        """The slider: nothing but what its own script makes."""
        frames = torch.stack([pixels.detach().float().cpu() for pixels in self.pictures.values()])
        height, width = frames.shape[-2:]
        content = {
            "title": self.title,
            "labels": list(self.pictures),
            "width": round(min(MAX_WIDTH, MAX_HEIGHT * width / height)),
            "ratio": f"{width} / {height}",
            "picture": sprite(frames.clamp(0, 1).mul(255).round().byte(), across=True),
        }
        return render("slides.html", slides=content)

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display
        from IPython.display import Image as Picture

        display(Picture(png_of(self.strip()), alt=f"{self.title}: {', '.join(self.pictures)}"))
        display(HTML(self.html()))
