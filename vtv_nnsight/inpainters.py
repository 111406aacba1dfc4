"""Other inpainting models behind the same VisualPrompt, for VP's comparison (NeurIPS 2022, §4.1).

    >>> mae = MAE.from_pretrained("facebook/vit-mae-large")
    >>> canvas = mae.generate(prompts)                        # [batch, 3, height, width], as MAEVQGAN.generate

Another model comes in as one class: subclass `Inpainter`, say what its canvas is (`layout`) and how it fills one in
(`fill`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import ViTMAEForPreTraining

from vtv_nnsight.images import IMAGENET_MEAN, IMAGENET_STD
from vtv_nnsight.layouts import Layout
from vtv_nnsight.prompts import VisualPrompt


class Inpainter(ABC):
    """A model that completes canvases one-shot."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The model's canvas and patches, with one example."""

    @abstractmethod
    def fill(self, canvas: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Pictures [batch, 3, height, width] in [0, 1] of canvases of that shape, of which only the patches `visible`
        [patch] may be looked at."""

    @torch.no_grad()
    def generate(self, prompts: VisualPrompt, paste: bool = True) -> torch.Tensor:
        """Complete canvases, as `MAEVQGAN.generate` does.

        Args:
            prompts: One-shot prompts in a layout of the model's canvas and patches.
            paste: Keep the canvas's own pixels at the visible patches.

        Returns:
            [batch, 3, height, width] in [0, 1], in steps of 1/255 (truncated).

        Raises:
            ValueError: when the prompts do not fit the model, or are `query_only`.
        """
        own, theirs = self.layout, prompts.layout
        if (own.canvas_size, own.patch_size) != (theirs.canvas_size, theirs.patch_size):
            raise ValueError(f"prompts of {theirs} do not fit a model of {own}; make them with its canvas and patches.")
        if len(prompts.decoded) != own.num_patches:
            raise ValueError(f"{type(self).__name__} decodes whole canvases; give prompts without query_only().")
        drawn = self.fill(prompts.canvas, prompts.visible).clamp(0, 1)
        if paste:
            shown = own.pixels(prompts.visible.to(drawn.device))
            drawn = torch.where(shown, prompts.canvas.to(drawn), drawn)
        return drawn.mul(255).floor().div(255)


class MAE(Inpainter):
    """A masked autoencoder that predicts pixels (He et al., CVPR 2022).

    Args:
        model: A ViTMAEForPreTraining that predicts pixels as they are: one trained with `norm_pix_loss` does not say
            how bright a patch is.

    Raises:
        ValueError: for a model of normalised pixels.
    """

    def __init__(self, model: ViTMAEForPreTraining) -> None:
        if model.config.norm_pix_loss:
            raise ValueError("this MAE predicts normalised pixels (norm_pix_loss); give one that predicts pixels.")
        self.model = model.eval()

    @classmethod
    def from_pretrained(cls, source: str, **kwargs: Any) -> MAE:
        """The model of a folder or a Hub id; arguments as for transformers' `from_pretrained`."""
        return cls(ViTMAEForPreTraining.from_pretrained(source, **kwargs))

    @property
    def layout(self) -> Layout:
        return Layout(canvas_size=self.model.config.image_size, patch_size=self.model.config.patch_size)

    def fill(self, canvas: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(v, device=self.model.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = ((canvas.to(self.model.device) - mean) / std).to(self.model.dtype)
        order = torch.ones(len(canvas), self.layout.num_patches, device=pixels.device)
        order[:, visible.to(pixels.device)] = 0  # the model keeps the patches of least "noise"
        with self._keeping(len(visible)):
            predicted = self.model.unpatchify(self.model(pixels, noise=order).logits)
        return predicted.float() * std + mean

    @contextmanager
    def _keeping(self, patches: int) -> Iterator[None]:
        config = self.model.config
        ratio, config.mask_ratio = config.mask_ratio, 1 - (patches + 0.5) / self.layout.num_patches
        try:
            yield
        finally:
            config.mask_ratio = ratio
