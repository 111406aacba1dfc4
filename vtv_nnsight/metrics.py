"""How far an answer is from the truth: pure functions, one value for each picture or text.

Pixels are [batch, 3, height, width] in [0, 1]; results are [batch]. The papers score the output cell only
(`prompt.region("output")`).

A `Metric` is such a function with a name, a direction and a label. Yours serves a task like the others:

    >>> psnr = metrics.register(Metric("psnr", my_psnr, higher_is_better=True, label="PSNR ↑"))
    >>> tasks.Colorization(metric="psnr")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from einops import rearrange
from scipy import ndimage
from torch.nn import functional as F

from vtv_nnsight.finite import WHERE, check_finite
from vtv_nnsight.images import IMAGENET_STD

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
Colour = tuple[int, int, int]
MOST = 2
"""Pixels beyond it are of another scale, such as 0 to 255, and not the overshoot of a network."""


@dataclass(frozen=True)
class Metric:
    """How answers are scored.

    Args:
        name: A short name in lower case, as tables and files have it.
        function: Predictions and targets, as `reads` says → scores [batch].
        higher_is_better: The direction; searches minimise, and turn the sign where it is True.
        label: What people read, with an arrow to the better side, as "mIoU ↑".
        reads: What it is given: "pixels", both [batch, 3, height, width] in [0, 1]; of texts "logits", those of the
            answer's first token [batch, vocabulary] and the ids of that token [batch, 1], or [batch, 2] of the right
            answer's and the wrong one's; or "text", lists of what was said, up to the template's stop, and of the
            answers.
    """

    name: str
    function: Callable[[Any, Any], torch.Tensor]
    higher_is_better: bool = field(compare=False)
    label: str = field(compare=False)
    reads: str = field(default="pixels", compare=False)

    def __call__(self, prediction: Any, target: Any) -> torch.Tensor:
        """Scores [batch] of predictions and targets, as `reads` says.

        Raises:
            ValueError: when a score is not finite.
        """
        for what, values in (("the prediction", prediction), ("the target", target)):
            if isinstance(values, torch.Tensor):
                check_finite(values, what, f"{self.name!r} scores finite numbers")
        scores = self.function(prediction, target)
        check_finite(scores, f"the score {self.name!r}", "have the metric give a number for every answer")
        return scores

    def better(self, score: float, other: float) -> bool:
        """Whether a score is better than another."""
        return score > other if self.higher_is_better else score < other

    def __str__(self) -> str:
        return self.name


def iou(
    prediction: torch.Tensor, target: torch.Tensor, foreground: Colour = WHITE, background: Colour = BLACK
) -> torch.Tensor:
    """Intersection over union of the foregrounds, after every pixel of both went to the nearer of the two colours
    (squared RGB distance, ties to the foreground). As in ECCV 2024's released code, but for two empty foregrounds: they
    agree here, 1, and are 0 / 0, which is nan, there.
    """
    _check_pair(prediction, target)
    return overlap(*(nearest(pixels, (foreground, background)) == 0 for pixels in (prediction, target)))


def squared_off(prediction: torch.Tensor, foreground: Colour = WHITE, background: Colour = BLACK) -> torch.Tensor:
    """The filled bounding rectangle of the largest connected piece of foreground, in the two colours: what VP scores of
    a detection (§4.2, released code). Pieces are connected through their pixels' eight neighbours; of equal pieces the
    last one counts, as there."""
    inside = nearest(prediction, (foreground, background)) == 0
    boxes = torch.stack([largest_box(row) for row in inside])[:, None]
    near, far = (prediction.new_tensor(colour).view(3, 1, 1) / 255 for colour in (foreground, background))
    return torch.where(boxes, near, far)


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of bool [batch, height, width], 1 where both are empty: [batch]."""
    union = (a | b).flatten(1).sum(1)
    return torch.where(union > 0, (a & b).flatten(1).sum(1) / union.clamp(min=1), 1.0)


def mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of ImageNet-normalised values over pixels and channels, as in both papers."""
    _check_pair(prediction, target)
    std = prediction.new_tensor(IMAGENET_STD, dtype=torch.float64).view(3, 1, 1)
    return ((prediction.double() - target.double()) / std).square().flatten(1).mean(1)


def lpips(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Perceptual distance (Zhang et al., CVPR 2018, with AlexNet) as VP reports of colorization (§4.2).

    Raises:
        ImportError: without the optional package: `pip install 'vtv-nnsight[lpips]'`. It fetches AlexNet's weights.
    """
    _check_pair(prediction, target)
    with torch.no_grad():
        distance: torch.Tensor = _lpips_network(prediction.device)(2 * prediction.float() - 1, 2 * target.float() - 1)
    return distance.flatten()


def first_token(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """1 where the likeliest token is the first of the true answer (Todd et al., ICLR 2024): logits [batch, vocabulary]
    and ids [batch, 1 or 2] → [batch]."""
    check_finite(logits, "the logits", WHERE)
    return (logits.argmax(-1) == ids[:, 0]).double()


def preference(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """1 where the right answer's first token is likelier than the wrong one's: logits [batch, vocabulary] and ids
    [batch, 2] → [batch]."""
    check_finite(logits, "the logits", WHERE)
    right, wrong = logits.gather(-1, ids).unbind(-1)
    return (right > wrong).double()


def exact_match(said: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
    """1 where what was said is the answer, but for the space around it: [batch]."""
    return torch.tensor([a.strip() == b.strip() for a, b in zip(said, answers)], dtype=torch.float64)


IOU = Metric("iou", iou, higher_is_better=True, label="mIoU ↑")
MSE = Metric("mse", mse, higher_is_better=False, label="MSE ↓")
LPIPS = Metric("lpips", lpips, higher_is_better=False, label="LPIPS ↓")
FIRST_TOKEN = Metric("first_token", first_token, True, "first-token accuracy ↑", "logits")
PREFERENCE = Metric("preference", preference, True, "right preferred to wrong ↑", "logits")
EXACT_MATCH = Metric("exact_match", exact_match, True, "exact match ↑", "text")
_BUILTIN = (IOU, MSE, LPIPS, FIRST_TOKEN, PREFERENCE, EXACT_MATCH)
METRICS = {metric.name: metric for metric in _BUILTIN}
"""The metrics that `get` knows."""


def get(name: str | Metric, reads: Sequence[str] | None = None) -> Metric:
    """The metric of a name, and of a kind: one of `reads`.

    Raises:
        ValueError: naming the metrics there are.
    """
    metric = name if isinstance(name, Metric) else METRICS.get(name)
    if metric is None or (reads and metric.reads not in reads):
        known = [other.name for other in METRICS.values() if not reads or other.reads in reads]
        raise ValueError(f"metric={str(name)!r} is not a metric here; choose from {', '.join(known)}, or register one.")
    return metric


def register(metric: Metric) -> Metric:
    """Let `get`, tasks and tables find a metric by its name.

    Raises:
        ValueError: when the name is one of this module's metrics. A metric of yours is replaced.
    """
    if any(metric.name == builtin.name and metric != builtin for builtin in _BUILTIN):
        raise ValueError(f"{metric.name!r} is the name of another metric; choose another.")
    METRICS[metric.name] = metric
    return metric


def token_loss(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits [batch, patch, code] against the tokenizer's codes [batch, patch] of the truth."""
    rows = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none")  # faster than [b, code, p]
    return rows.view(codes.shape).mean(1)


@cache
def _lpips_network(device: torch.device) -> Any:
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise ImportError("LPIPS needs the package lpips; pip install 'vtv-nnsight[lpips]'.") from error
    return LPIPS(net="alex", verbose=False).eval().to(device)


def nearest(pixels: torch.Tensor, palette: Sequence[Colour]) -> torch.Tensor:
    """Pixels [batch, 3, height, width] → which colour of the palette is nearest, [batch, height, width]."""
    check_finite(pixels, "a picture", "give pixels from 0 to 1")
    values = pixels.double().mul(255).round(decimals=3)
    distances = [(values - values.new_tensor(colour).view(3, 1, 1)).square().sum(1) for colour in palette]
    return torch.stack(distances).argmin(0)


def largest_box(inside: torch.Tensor) -> torch.Tensor:
    """Bool [height, width] → the bounding rectangle of its largest connected piece, filled.

    Of equal pieces it is the last one, in the order of the first 2x2 block of pixels that each touches: OpenCV numbers
    them so, and VP's released code takes the last of the largest."""
    labels, pieces = ndimage.label(inside.cpu().numpy(), np.ones((3, 3)))
    box = torch.zeros_like(inside)
    if pieces:
        sizes = np.bincount(labels.ravel())[1:]
        padded = np.pad(labels, [(0, side % 2) for side in labels.shape])
        blocks = rearrange(padded, "(h p) (w q) -> (h w p q)", p=2, q=2)
        largest = max(np.flatnonzero(sizes == sizes.max()), key=lambda piece: np.argmax(blocks == piece + 1))
        box[ndimage.find_objects(labels)[largest]] = True
    return box


def _check_pair(prediction: torch.Tensor, target: torch.Tensor) -> None:
    for name, pixels in (("the prediction", prediction), ("the target", target)):
        if not isinstance(pixels, torch.Tensor) or not pixels.is_floating_point():
            kind = pixels.dtype if isinstance(pixels, torch.Tensor) else f"a {type(pixels).__name__}"
            raise TypeError(f"{name} is {kind}; score float tensors with pixels from 0 to 1.")
        check_finite(pixels, name, "score pictures with pixels from 0 to 1")
        if pixels.numel() and pixels.abs().max() > MOST:
            raise ValueError(f"{name} holds {pixels.abs().max():.3g}; score pictures with pixels from 0 to 1.")
    if prediction.shape != target.shape or prediction.ndim != 4 or prediction.shape[1] != 3:
        raise ValueError(f"{[*prediction.shape]} and {[*target.shape]} must both be [batch, 3, height, width].")
