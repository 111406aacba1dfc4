"""Where the answer looks: the decoder's attention from the output to CLS and to each cell (NeurIPS 2022, §4.4).

    python benchmarks/attention.py [--quick] [--model tiny] [--tasks segmentation colorization]

Shares of the attention of the output's patches, by layer, averaged over prompts, heads and patches; one-shot, and with
the query alone: the decoder sees no example. "Even" is the share of a region were attention spread evenly over all
tokens.
"""

from __future__ import annotations

import argparse

import torch
from common import options, save, table
from einops import einsum
from matplotlib.figure import Figure

from vtv_nnsight import MAEVQGAN, VisualPrompt, data, tasks
from vtv_nnsight.report.attention import attention_maps


def attention_to_regions(model: MAEVQGAN, prompts: VisualPrompt) -> dict[str, torch.Tensor]:
    """ "cls" and names of regions → [layer] of the last stage that holds the output, such as the decoder: the share of
    attention from the output's patches, averaged over prompts, heads and these patches (`Layout.shares`)."""
    *_, last = attention_maps(model, prompts).values()
    return {name: share for name, share in prompts.layout.shares(last.mean(1)).items() if share.any()}


def looked_at(model: MAEVQGAN, prompts: VisualPrompt) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Region → share of the attention by decoder layer, over prompts; and what would be even."""
    parts = list(prompts.split(16))
    by_part = [attention_to_regions(model, part) for part in parts]
    weights = torch.tensor([len(part) for part in parts], dtype=torch.float32) / len(prompts)
    shares = {
        name: einsum(weights, torch.stack([shares_of[name] for shares_of in by_part]), "part, part layer -> layer")
        for name in by_part[0]
    }
    tokens = 1 + len(prompts.decoded)
    even = {name: 1 / tokens if name == "cls" else len(prompts.layout.regions[name]) / tokens for name in shares}
    return {name: shares_of.tolist() for name, shares_of in shares.items()}, even


def measured(args: argparse.Namespace, model: MAEVQGAN) -> list[dict]:
    """A row for each task, with and without the example."""
    scenes, rows = data.scenes("test", n=4 * args.test, seed=args.seed), []
    for name in args.tasks:
        prompts = tasks.get(name).prompts(scenes, args.test, args.seed, model.layout).to(args.device)
        for form, batch in {"one-shot": prompts, "zero-shot": prompts.query_only()}.items():
            shares, even = looked_at(model, batch)
            rows.append({"task": name, "prompts": form, "shares": shares, "even": even})
    return rows


def draw(rows: list[dict]) -> Figure:
    """A heat map for each task one-shot: regions by layers, zero-shot beside it."""
    figure = Figure(figsize=(3.4 * len(rows), 2.8), layout="constrained")
    for panel, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows):
        values = torch.tensor(list(row["shares"].values()))
        picture = panel.imshow(values, vmin=0, vmax=1, aspect="auto")
        for (i, j), value in zip(torch.cartesian_prod(*map(torch.arange, values.shape)).tolist(), values.flatten()):
            panel.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value < 0.6 else "k")
        panel.set_yticks(range(len(values)), [name.replace("_", " ") for name in row["shares"]], fontsize=8)
        panel.set_xticks(range(values.shape[1]))
        panel.set_xlabel("decoder layer")
        panel.set_title(f"{row['task']}, {row['prompts']}", fontsize=9)
    figure.colorbar(picture, ax=figure.axes, label="share of attention")
    return figure


def main() -> None:
    parser = options(__file__, __doc__, "one task, few prompts")
    parser.add_argument("--model", default="tiny", help="a MAE-VQGAN")
    parser.add_argument("--tasks", nargs="+", default=["segmentation", "colorization"], metavar="TASK")
    parser.add_argument("--test", type=int, default=64, help="prompts of each task")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.test = args.tasks[:1], 4

    model = MAEVQGAN(args.model).to(args.device)
    rows = measured(args, model)
    for row in rows:
        print(f"\n{args.model}, {row['task']}, {row['prompts']}, {args.test} prompts")
        layers = range(len(next(iter(row["shares"].values()))))
        body = [[name, *shares, row["even"][name]] for name, shares in row["shares"].items()]
        print(table(["from the output to", *(f"layer {layer}" for layer in layers), "even"], body))
    save(args, {"rows": rows}, draw(rows))


if __name__ == "__main__":
    main()
