"""What the look of a prompt is worth: order, colours, edges, textures, and several layouts at once (VP, §4.4).

    python benchmarks/prompt_looks.py [--quick] [--model tiny] [--data scenes] [--rule softmax] [--looks LOOK …]

The same queries are segmented by the same examples in both orders of a prompt, in several colours, and in both orders
at once: the codes of each patch are those that the layouts' scores agree on, combined by a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import options, save, table
from matplotlib.figure import Figure

from vtv_nnsight import VisualPrompt, data, tasks
from vtv_nnsight.layouts import ORDERS
from vtv_nnsight.models import load_model
from vtv_nnsight.patching.forward import forward
from vtv_nnsight.prompts import crop
from vtv_nnsight.tasks import PURPLE, YELLOW, Segmentation


@dataclass(frozen=True)
class Textured(Segmentation):
    """A mask filled with fourteen checks of two tones across, both nearer to the foreground's colour."""

    def target(self, row: Any, cell: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor | None:
        """The textured mask: [3, size, size]; None where the row has none."""
        target = super().target(row, cell, corrupted)
        if target is None:
            return None
        near, far = (target.new_tensor(colour).view(3, 1, 1) / 255 for colour in self.colours)
        stripes = torch.arange(target.shape[-1]) * 14 // target.shape[-1] % 2
        dimmed = (target == near).all(0) & (stripes[:, None] != stripes[None, :])
        return torch.where(dimmed, 0.65 * near + 0.35 * far, target)


LOOKS = (Segmentation(), Segmentation(YELLOW, PURPLE), Segmentation(fill="edges"), Textured())
BOTH = " + ".join(ORDERS)
RULES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.log_softmax(-1).logsumexp(0) - math.log(len(logits)),
    "logits": lambda logits: logits.mean(0),
    "product": lambda logits: logits.log_softmax(-1).sum(0),
    "maximum": lambda logits: logits.log_softmax(-1).amax(0),
}
"""Logits [prompt, ..., code] → scores [..., code], by name: the mean of the softmaxes, the mean of the logits, the
product and the maximum of the softmaxes. Scores are the logarithms of those, and the mean itself for the logits."""


@torch.no_grad()
def generate(model: Any, prompts: Sequence[VisualPrompt], rule: str = "softmax") -> torch.Tensor:
    """The canvases of the first of `prompts`, completed with the codes that all of them agree on: [batch, 3, height,
    width] in [0, 1]. As in VP's released code, scores are combined patch by patch over the canvas, so the outputs must
    lie in the same place.

    Args:
        model: One that scores the codes of each patch by itself and says so by its loss "tokens": a MAEVQGAN, or a BEiT
            with its tokenizer's encoder.
        prompts: The same examples and queries in several layouts or colours, one VisualPrompt each.

    Raises:
        ValueError: when the model has no such loss, or the outputs lie in different places.
    """
    if not any(loss.name == "tokens" for loss in model.losses):
        raise ValueError(
            f"{type(model).__name__} has no loss 'tokens', so it gives no scores of codes to ensemble; give a "
            "MAEVQGAN, or a BEiT with its tokenizer's encoder."
        )
    if len({str((len(p), p.layout.canvas_size, p.layout.cells["output"], p.decoded.tolist())) for p in prompts}) > 1:
        raise ValueError("these prompts differ in number, in their output's place or in what decoders see.")
    outputs = [forward(model, prompt)[0] for prompt in prompts]
    scores = RULES[rule](torch.stack([output.logits for output in outputs]).float())
    return model.paint(replace(outputs[0], logits=scores), prompts[0].to(model.device), True)


def compare(
    model: Any, images: Any, n: int = 100, seed: int = 0, *, looks: Sequence[Segmentation] = LOOKS,
    rule: str = "softmax", batch_size: int = 32,
) -> dict[tuple[str, str], torch.Tensor]:  # fmt: skip
    """(layout, name of the look) → IoU of every prompt [n]; the layouts are both orders and their ensemble."""
    scores = {}
    for task in looks:
        prompts = [task.prompts(images, n, seed, replace(model.layout, order=order)) for order in ORDERS]
        for layout, members in (*zip(ORDERS, ([rows] for rows in prompts)), (BOTH, prompts)):
            parts = []
            for batch in zip(*(rows.split(batch_size) for rows in members)):
                answer = crop(generate(model, batch, rule), "output", batch[0].layout)
                parts.append(task.score(answer, batch[0].region("output").to(answer.device)).cpu())
            scores[layout, task.name] = torch.cat(parts)
    return scores


def draw(scores: Mapping[tuple[str, str], torch.Tensor]) -> Figure:
    """A bar for each layout and look."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    panel = figure.subplots()
    panel.barh([" ".join(name) for name in scores], [float(values.mean()) for values in scores.values()])
    panel.set_xlabel("mIoU")
    panel.tick_params(labelsize=7)
    return figure


def main() -> None:
    parser = options(__file__, __doc__, "few prompts")
    parser.add_argument("--model", default="tiny", help="as SOURCE of `vtv info`")
    parser.add_argument("--data", default="scenes", help="as for `vtv run`, with masks")
    parser.add_argument("--test", type=int, default=64, help="prompts of each look")
    parser.add_argument("--rule", default="softmax", choices=RULES, help="how the layouts' answers are made one")
    parser.add_argument("--looks", nargs="+", type=tasks.get, default=LOOKS, help="segmentation tasks")
    args = parser.parse_args()
    if args.quick:
        args.test = 4
    model = load_model(args.model, dispatch=True).to(args.device)
    rows = data.load(args.data, "test", 2 * args.test, args.seed)
    scores = compare(model, rows, args.test, args.seed, looks=args.looks, rule=args.rule)
    names = [look.name for look in args.looks]
    body = [[layout, *(float(scores[layout, name].mean()) for name in names)] for layout in (*ORDERS, BOTH)]
    print(f"\nmIoU, {args.model}, {args.data}, {args.test} prompts\n{table(['layout', *names], body)}")
    args.looks = names
    save(args, {"rows": [{"layout": a, "look": b, "iou": v.tolist()} for (a, b), v in scores.items()]}, draw(scores))


if __name__ == "__main__":
    main()
