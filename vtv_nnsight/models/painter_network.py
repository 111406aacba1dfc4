"""The network of Painter and SegGPT: transformers' SegGPT on canvases, as the released code runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import nn
from transformers import SegGptForImageSegmentation
from transformers.models.seggpt.modeling_seggpt import SegGptEmbeddings, SegGptEncoder
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


class Embeddings(SegGptEmbeddings):
    """transformers' embeddings, with the two streams of a row side by side."""

    def __init__(self, embeddings: SegGptEmbeddings) -> None:
        nn.Module.__init__(self)
        self._parameters, self._modules = embeddings._parameters, embeddings._modules

    def forward(self, *inputs: Any) -> torch.Tensor:
        """Image and target [batch, 3, height, width], hidden patches and type → [batch * 2, row, column, width]."""
        return rearrange(super().forward(*inputs), "(stream batch) ... -> (batch stream) ...", stream=2)


class Encoder(nn.Module):
    """transformers' layers, with the two streams of a row side by side until they are averaged."""

    def __init__(self, encoder: SegGptEncoder) -> None:
        super().__init__()
        self.layers, self.layernorm, self.config = encoder.layers, encoder.layernorm, encoder.config

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Tokens [batch * 2, row, column, width] → those that the decoder sees, [batch, row, column, width] each."""
        features = []
        for i, layer in enumerate(self.layers):
            tokens = layer(tokens, ensemble_cond=1)[0]
            if i == self.config.merge_index:
                tokens = tokens.unflatten(0, (-1, 2)).mean(1)
            if i in self.config.intermediate_hidden_state_indices:
                features.append(self.layernorm(tokens))
        return features


class PainterNetwork(AdaptedNetwork):
    """transformers' SegGPT on canvases: its own modules, under the names that a trace uses.

    Args:
        seggpt: The network that has these modules and weights.

    Attributes:
        embeddings: Two pictures → tokens [batch * 2, row, column, width], those of a row's image before those of its
            target.
        encoder: `layers[i]` (layernorm_before, attention (qkv, proj), layernorm_after, mlp (lin1, lin2)), layernorm.
        decoder: Features of four layers, side by side → pixels.

    Raises:
        ValueError: when the network's pictures are not two squares, one upon the other.
    """

    def __init__(self, seggpt: SegGptForImageSegmentation) -> None:
        super().__init__(seggpt)
        self.layout = _layout(seggpt.config)
        self.embeddings, self.encoder = Embeddings(seggpt.model.embeddings), Encoder(seggpt.model.encoder)
        self.decoder = seggpt.decoder
        layers: Any = self.encoder.layers
        for i, layer in enumerate(layers):
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
            with _averaging_examples(self.encoder):
                encoded = self.encoder(tokens)
        else:
            encoded = self.encoder(tokens)
        seam = 1  # row of patches above the answer, of which the decoder's convolution sees one row of pixels
        features = torch.cat([f[:, -(rows + seam) :] for f in encoded], dim=-1)
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
def _averaging_examples(encoder: Any) -> Iterator[None]:
    """Average the attention's output at the query's half over the rows, stream by stream, as the released code does;
    transformers averages over both streams at once in the last layer before the merge, which mixes image and target."""

    def average(attention: Any, inputs: Any, outputs: Any) -> Any:
        z = outputs[0].unflatten(0, (-1, attention.streams))
        example, query = z.chunk(2, dim=2)
        z = torch.cat([example, query.mean(0, keepdim=True).expand_as(query)], dim=2)
        return (z.flatten(0, 1), *outputs[1:])

    handles = [layer.attention.register_forward_hook(average) for layer in encoder.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layout(config: Any) -> Layout:
    size, patch = config.image_size, config.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != 2 * width:
        raise ValueError(f"image_size={height}x{width} is not two square cells; expected a height of twice the width.")
    return Layout(canvas_size=height, patch_size=patch, gap=0)
