"""The VQGAN's drawing with contiguous maps and with channels-last ones.

    python benchmarks/memory_format.py [--quick] [--sizes embedded small vit-l] [--batch 8]

`VQGAN.decode_latent` starts from a view in channels-last format, and every layer keeps the format that it is
given. On a CPU it makes the view of a narrow VQGAN contiguous first, because torch's GroupNorm of channels-last maps is
slow where a group has few channels; this is what tells whether that is still right. Both sides draw the same codes with
made-up weights, and must draw the same.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from common import SIZES, alternate, made_up, options, ratio, save, table
from einops import rearrange
from matplotlib.figure import Figure

from vtv_nnsight.progress import progress_bar

FORMATS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}


@torch.no_grad()
def drawn(vqgan: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
    return vqgan.decoder(vqgan.post_quant_conv(z))


def draw(cases: list[dict]) -> Figure:
    figure = Figure(figsize=(1.5 + 1.3 * len(cases), 3.5), layout="constrained")
    axes = figure.add_subplot(ylabel="times as fast when contiguous")
    axes.bar(range(len(cases)), [case["times as fast"] for case in cases], 0.5)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cases)), [f"{case['size']}\n{case['dtype']}" for case in cases])
    return figure


def main() -> None:
    parser = options(__file__, __doc__, "the embedded size only, 3 rounds")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="rounds a case, at least")
    parser.add_argument("--seconds", type=float, default=10, help="time to spend on a case, at least")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.rounds, args.seconds = ["embedded"], 3, 0
    cases = []
    for size, dtype in progress_bar([(size, dtype) for size in args.sizes for dtype in args.dtypes], unit="case"):
        module, prompts = made_up(size, args.batch, args.seed, args.device)
        vqgan = module.vqgan.to(getattr(torch, dtype))
        codes = vqgan.encode(prompts.canvas.to(getattr(torch, dtype)))
        z = rearrange(vqgan.codebook(codes), "b (h w) c -> b c h w", h=prompts.layout.grid)
        sides = {name: partial(drawn, vqgan, z.contiguous(memory_format=f)) for name, f in FORMATS.items()}
        pictures = [run() for run in sides.values()]
        close = 1e-4 if dtype == "float32" else 0.2
        torch.testing.assert_close(*pictures, rtol=0, atol=close)
        rounds = alternate(sides, args.device, args.seconds, args.rounds)
        each = {name: 1e3 * statistics.median(times) / args.batch for name, times in rounds.items()}
        case = {"size": size, "dtype": dtype, "batch": args.batch, "milliseconds a canvas": each}
        cases.append(case | {"times as fast": ratio(rounds, *FORMATS)})
    head = ["size", "dtype", *(f"{name} (ms a canvas)" for name in FORMATS), "times as fast"]
    rows = [[c["size"], c["dtype"], *c["milliseconds a canvas"].values(), c["times as fast"]] for c in cases]
    print(table(head, rows))
    save(args, {"cases": cases}, draw(cases))


if __name__ == "__main__":
    main()
