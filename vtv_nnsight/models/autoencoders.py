"""The two kinds of canvas models that there are most of: masked autoencoders, of an encoder and a decoder, and models
that predict the codes of a tokenizer. MAE-VQGAN is both."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from vtv_nnsight import metrics
from vtv_nnsight.layouts import Layout, index_of, named_positions, positions
from vtv_nnsight.models.canvas import TraceableCanvas
from vtv_nnsight.models.interface import Loss, Stage, default_batch_size, group_positions
from vtv_nnsight.models.painting import Inputs, paint_canvas
from vtv_nnsight.prompts import VisualPrompt


class MaskedAutoencoder(TraceableCanvas):
    """A model of two stages: "encoder" sees CLS and the visible patches, "decoder" CLS and the decoded patches. The
    config has the names of transformers' ViTMAEConfig."""

    reread = ()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Encoder and decoder."""
        config = self.network.config
        sizes = {
            "encoder": (config.num_hidden_layers, config.num_attention_heads, config.hidden_size),
            "decoder": (
                config.decoder_num_hidden_layers,
                config.decoder_num_attention_heads,
                config.decoder_hidden_size,
            ),
        }
        return tuple(Stage(name, layers, heads, width // heads) for name, (layers, heads, width) in sizes.items())

    def positions(self, stage: str, prompts: VisualPrompt | None = None) -> torch.Tensor:
        """CLS, then the patches that the stage sees, in the prompt's order: LongTensor [token]."""
        if prompts is None:
            return getattr(self, stage).positions
        return positions(prompts.visible if stage == "encoder" else prompts.decoded)

    def groups(self, stage: str, granularity: str, layout: Layout | None = None) -> dict[str, torch.Tensor]:
        """As *Finding Visual Task Vectors* has them (ECCV 2024, §4.3): by quadrant, CLS and query of the encoder, CLS,
        query and output of the decoder. By cell, the example's input and output, too."""
        return autoencoder_groups(stage, granularity, layout or self.layout)

    def restrict_to_output(self, prompts: VisualPrompt) -> VisualPrompt:
        """Compute the predictions of the output's patches alone."""
        return keep_output(self.decoder.norm, prompts)


class CodeModel(TraceableCanvas):
    """A model that predicts a tokenizer's code for each decoded patch."""

    @abstractmethod
    def codes(self, canvas: torch.Tensor) -> torch.Tensor:
        """The tokenizer's codes of canvases [batch, 3, height, width]: LongTensor [batch, patch]."""

    _last: tuple[torch.Tensor, int, torch.Tensor] | None = None

    def _codes(self, canvas: torch.Tensor) -> torch.Tensor:
        """The codes of canvases; of those that were asked last, the same ones."""
        self.dispatch()
        if self._last is None or self._last[0] is not canvas or self._last[1] != canvas._version:
            codes = torch.cat([self.codes(part) for part in canvas.split(default_batch_size(self))])
            self._last = canvas, canvas._version, codes
        return self._last[2]

    @property
    def losses(self) -> tuple[Loss, ...]:
        """ "tokens": the mean cross-entropy of the output's logits against the tokenizer's codes of the truth."""
        return (Loss("tokens", token_loss),)

    def predictions(self, output: Any) -> torch.Tensor:
        """The arg-max codes: LongTensor [batch, decoded patch]."""
        return output.logits.argmax(-1)

    @torch.no_grad()
    def truth(self, prompts: VisualPrompt) -> torch.Tensor:
        """The tokenizer's codes of the truth: LongTensor [batch, output patch]."""
        patches = output_patches(prompts)
        return self._codes(prompts.canvas)[:, patches]

    @torch.no_grad()
    def ceiling(self, prompts: VisualPrompt) -> torch.Tensor | None:
        """The tokenizer's own pictures of the canvases: [batch, 3, height, width] in [0, 1]."""
        everything = prompts.layout.all_patches.to(prompts.device)
        inputs = Inputs(prompts.canvas, everything, everything)
        return paint_canvas(self.draw, self._codes(prompts.canvas), inputs, self.layout, paste=False)


def output_patches(prompts: VisualPrompt) -> torch.Tensor:
    """Ids of the output's patches, LongTensor [patch], where the truth is.

    Raises:
        ValueError: when prompts do not decode them, or have no truth.
    """
    prompts.check_truth()
    patches = prompts.layout.regions["output"].to(prompts.device)
    prompts.layout.index(prompts.decoded, patches)
    return patches


def keep_output(norm: Any, prompts: VisualPrompt) -> VisualPrompt:
    """Inside a trace: drop all tokens but the output's from what a norm gives, and say so of the prompts."""
    patches = prompts.layout.regions["output"].to(prompts.device)
    norm.output = norm.output[:, positions(index_of(prompts.decoded, patches))]
    return prompts._with(decoded=patches)


def autoencoder_groups(stage: str, granularity: str, layout: Layout) -> dict[str, torch.Tensor]:
    """The groups of positions of a masked autoencoder's stage, for `InContextModel.groups`."""
    names, query_only = {
        "encoder": (("query",), layout.regions["query"]),
        "decoder": (("query", "output"), layout.query_band),
    }[stage]
    regions = named_positions({name: layout.regions[name] for name in names})
    cells = named_positions(layout.disjoint_regions)
    if stage == "encoder":
        cells.pop("output")
    return group_positions(granularity, positions(layout.all_patches), regions, positions(query_only), cells)


def token_loss(output: Any, prompts: VisualPrompt, codes: torch.Tensor) -> torch.Tensor:
    """Losses [batch] of an output's logits [batch, decoded patch, code] against the codes of the truth [batch, output
    patch]: their mean cross-entropy."""
    patches, logits = prompts.layout.regions["output"].to(prompts.device), output.logits
    if prompts.decoded is not patches:  # as `restrict_to_output` leaves them
        logits = logits[:, index_of(prompts.decoded, patches)]
    return metrics.token_loss(logits, codes)
