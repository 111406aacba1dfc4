"""The network of Painter and SegGPT: transformers' SegGPT on canvases, as the released code runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import SegGptForImageSegmentation
from transformers.utils.generic import ModelOutput

from vtv_nnsight.images import normalise
from vtv_nnsight.layouts import Layout
from vtv_nnsight.models.canvas import AdaptedNetwork


@dataclass
class PainterOutput(ModelOutput):
    """What `PainterNetwork` gives.

    Args:
        prediction: The answer as the network gives it, normalised and not clipped, [batch, 3, cell, cell].
    """

    prediction: Any = None


class PainterNetwork(AdaptedNetwork):
    """transformers' SegGPT on canvases: its own modules, under the names that a trace uses.

    Args:
        seggpt: The network, whose modules and weights these are.

    Attributes:
        embeddings: Two pictures → tokens [2 * batch, row, column, width], those of all images before those of all
            targets.
        encoder: `layers[i]` (layernorm_before, attention (qkv, proj), layernorm_after, mlp (lin1, lin2)), layernorm.
        decoder: Features of four layers, side by side → pixels.

    Raises:
        ValueError: when the network's pictures are not two squares, one upon the other.
    """

    def __init__(self, seggpt: SegGptForImageSegmentation) -> None:
        super().__init__(seggpt)
        self.layout = _layout(seggpt.config)
        self.embeddings, self.encoder = seggpt.model.embeddings, seggpt.model.encoder
        self.decoder = seggpt.decoder
        for i, layer in enumerate(self.encoder.layers):
            layer.attention.streams = 2 if i <= self.config.merge_index else 1
            layer.attention.columns = self.layout.cell_size // self.layout.patch_size

    def forward(
        self,
        canvas: torch.Tensor,
        visible: torch.Tensor,
        decoded: torch.Tensor,
        embedding_type: str = "instance",
        feature_ensemble: bool = False,
    ) -> PainterOutput:
        """Paint the answer.

        Query only, the example is hidden: no token of the query's half attends to one of the example's, in any layer.
        What such a mask leaves is computed: the lower half alone, at its own places of the position embeddings and its
        own offsets. (Only the decoder's 3x3 convolution sees over the seam, so that the answer's first row of pixels
        is another than under a mask.)

        Args:
            canvas: [batch, 3, height, width] in [0, 1].
            visible: Ids of the patches that are shown: all but the answer's, or the query's alone.
            decoded: Ids of the patches that there are: all, or those of the query and the answer ("query only").
            embedding_type: "semantic" or "instance".
            feature_ensemble: All rows are examples of one query: average the attention's output at the query's half
                over the rows, in every layer (each stream on its own until they are merged), as the released code does.

        Returns:
            prediction [batch, 3, cell, cell].
        """
        rows = self.layout.cell_size // self.layout.patch_size
        image, target = normalise(canvas).to(self.dtype).chunk(2, dim=-1)
        hidden = torch.arange(2 * rows, device=canvas.device).ge(rows).repeat_interleave(rows)[None]
        tokens = self.embeddings(image, target, hidden, embedding_type)
        if len(decoded) < self.layout.num_patches:
            with _offsets_of_fewer_rows(self.encoder):
                encoded = self.encoder(tokens[:, rows:])
        elif feature_ensemble:
            with _merging_as_released(self.encoder):
                encoded = self.encoder(tokens, feature_ensemble=True)
        else:
            encoded = self.encoder(tokens)
        seam = 1  # row of patches above the answer, of which the decoder's convolution sees one row of pixels
        features = torch.cat([f[:, -(rows + seam) :] for f in encoded.intermediate_hidden_states], dim=-1)
        return PainterOutput(prediction=self.decoder(features)[:, :, -self.layout.cell_size :])


@contextmanager
def _offsets_of_fewer_rows(encoder: Any) -> Iterator[None]:
    """Give fewer rows of tokens than the whole grid's the position embeddings of their own offsets, which lie in the
    middle of all; transformers would stretch all over them."""

    def middle(get: Callable[..., torch.Tensor], queries: int, keys: int, offsets: torch.Tensor) -> torch.Tensor:
        none = len(offsets) // 2
        return get(queries, keys, offsets[none - keys + 1 : none + keys])

    for layer in encoder.layers:
        layer.attention.get_rel_pos = partial(middle, layer.attention.get_rel_pos)
    try:
        yield
    finally:
        for layer in encoder.layers:
            del layer.attention.get_rel_pos


@contextmanager
def _merging_as_released(encoder: Any) -> Iterator[None]:
    """Average over examples stream by stream in the last layer before the merge, too.

    The released code does (`merge_idx >= idx`); transformers averages there over both streams at once (`merge_index >
    i`), which mixes image and target.
    """
    last = encoder.layers[encoder.config.merge_index]
    handle = last.register_forward_pre_hook(lambda layer, inputs: (inputs[0], 2, *inputs[2:]))
    try:
        yield
    finally:
        handle.remove()


def _layout(config: Any) -> Layout:
    size, patch = config.image_size, config.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != 2 * width:
        raise ValueError(f"image_size={height}x{width} is not two square cells; expected a height of twice the width.")
    return Layout(canvas_size=height, patch_size=patch, gap=0)
