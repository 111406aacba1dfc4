"""What masked autoencoders have in common: an encoder of the visible patches, and a decoder of all that are decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vtv_nnsight import metrics
from vtv_nnsight.layouts import Layout, index_of, named_positions, positions, take, tile
from vtv_nnsight.models.interface import InContextModel, Stage, group_positions
from vtv_nnsight.prompts import VisualPrompt


class MaskedAutoencoder(InContextModel):
    """A model of two stages: "encoder" sees CLS and the visible patches, "decoder" CLS and the decoded patches. The
    config has the names of transformers' ViTMAEConfig."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Encoder and decoder."""
        config = self._module.config
        return tuple(
            Stage(name, layers, heads, width // heads)
            for name, layers, heads, width in (
                ("encoder", config.num_hidden_layers, config.num_attention_heads, config.hidden_size),
                (
                    "decoder",
                    config.decoder_num_hidden_layers,
                    config.decoder_num_attention_heads,
                    config.decoder_hidden_size,
                ),
            )
        )

    @property
    def parts(self) -> dict[str, str]:
        """What it is made of, for `vtv info`: name → words."""
        return {s.name: f"{s.layers} blocks of width {s.heads * s.head_dim}, {s.heads} heads" for s in self.stages}

    def attention(self, stage: str, layer: int) -> Any:
        """The attention of a block: `encoder.blocks[layer].attn`."""
        return getattr(self, stage).blocks[layer].attn

    def outputs(self, stage: str, layer: int) -> dict[str, Any]:
        """The attention, the MLP, and the block itself."""
        block = getattr(self, stage).blocks[layer]
        return {"attn": block.attn, "mlp": block.mlp, "residual": block}

    def positions(self, stage: str, prompts: VisualPrompt | None = None) -> torch.Tensor:
        """CLS, then the patches that the stage sees, in the prompt's order: LongTensor [token]."""
        if prompts is None:
            return getattr(self, stage).positions
        return positions(prompts.visible if stage == "encoder" else prompts.decoded)

    def groups(self, stage: str, granularity: str, layout: Layout | None = None) -> dict[str, torch.Tensor]:
        """As *Finding Visual Task Vectors* has them (ECCV 2024, §4.3): by quadrant, CLS and query of the encoder, CLS,
        query and output of the decoder. By cell, the example's input and output, too."""
        return groups(stage, granularity, layout or self.layout)

    def restrict_to_output(self, prompts: VisualPrompt) -> VisualPrompt:
        """Compute the predictions of the output's patches alone."""
        output = prompts.layout.regions["output"].to(prompts.device)
        kept = positions(index_of(prompts.decoded, output))
        self.decoder.norm.output = self.decoder.norm.output[:, kept]
        return prompts._with(decoded=output)


def groups(stage: str, granularity: str, layout: Layout) -> dict[str, torch.Tensor]:
    """The groups of positions of a masked autoencoder's stage."""
    names, shown = {
        "encoder": (("query",), layout.regions["query"]),
        "decoder": (("query", "output"), layout.query_band),
    }[stage]
    regions = named_positions({name: layout.regions[name] for name in names})
    cells = named_positions(layout.disjoint_regions)
    if stage == "encoder":
        cells.pop("output")
    return group_positions(granularity, positions(layout.all_patches), regions, positions(shown), cells)


def paint_canvas(
    draw: Callable[[torch.Tensor], torch.Tensor],
    predicted: torch.Tensor,
    canvas: torch.Tensor,
    visible: torch.Tensor,
    decoded: torch.Tensor,
    layout: Layout,
    paste: bool,
) -> torch.Tensor:
    """The canvas that predictions of the decoded patches make. When only some rows or columns are decoded, they are
    repeated over the canvas: zero-shot, MAE-VQGAN's bottom half stands for the top half, too.

    Args:
        draw: Predictions of every patch of the grid → pixels [batch, 3, height, width] in [0, 1].
        predicted: [batch, decoded patch, ...].
        canvas: [batch, 3, height, width] in [0, 1].
        visible: LongTensor [patch] of ids; these keep the canvas's own pixels if `paste`.
        decoded: LongTensor [patch] of ids.

    Returns:
        [batch, 3, height, width] in [0, 1], in steps of 1/255 (truncated, as published).

    Raises:
        ValueError: when each row has patches of its own, or the decoded ones are no block.
    """
    if decoded.ndim != 1 or visible.ndim != 1:
        raise ValueError("canvases are painted with patches that they share; give visible and decoded as [patch].")
    painted = draw(take(predicted, tile(decoded.to(predicted.device), layout.grid))).to(canvas)
    if paste:
        painted = torch.where(layout.pixels(visible.to(canvas.device)), canvas, painted)
    return painted.mul(255).floor().div(255)


def token_loss(output: Any, prompts: VisualPrompt, codes: torch.Tensor) -> torch.Tensor:
    """Losses [batch] of an output's logits [batch, decoded patch, code] against the codes of the truth [batch, output
    patch]: their mean cross-entropy."""
    patches, logits = prompts.layout.regions["output"].to(prompts.device), output.logits
    if prompts.decoded is not patches:  # as `restrict_to_output` leaves them
        logits = logits[:, index_of(prompts.decoded, patches)]
    return metrics.token_loss(logits, codes)
