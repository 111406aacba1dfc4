"""Where the answer looks, as pictures: attention laid over the prompt (see `evaluation.attention`)."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch.nn import functional as F

from vtv_nnsight.evaluation.explorer import QueryExplorer
from vtv_nnsight.images import luma, png_of, strip
from vtv_nnsight.layouts import Layout
from vtv_nnsight.report.pictures import Keep
from vtv_nnsight.report.play import sprite

GLOW = (0.95, 0.33, 0.0)
"""The colour of attention, which is seen on black, grey and white."""
MOST = 0.85
"""How far the most looked at patch has that colour."""


def overlays(shown: QueryExplorer, layout: Layout) -> torch.Tensor:
    """The prompt in grey with the attention of every `looks` of a demonstration over it, the strongest patch of each as
    strong: uint8 [look, 3, side, side]."""
    canvas = luma(shown.pictures["canvas"][0].float() / 255)
    grid = layout.on_grid(shown.attention).nan_to_num()
    strength = grid / grid.amax((-2, -1), keepdim=True).clamp(min=1e-12)
    strength = MOST * F.interpolate(strength[:, None], canvas.shape[-2:], mode="nearest")
    glow = torch.tensor(GLOW).view(1, 3, 1, 1)
    return torch.lerp(canvas.expand(1, 3, -1, -1), glow, strength).mul(255).round().byte()


def shares(shown: QueryExplorer, layout: Layout) -> pd.DataFrame:
    """The share of attention that goes to CLS and to each cell: a row for each `looks`."""
    found = {name: own.tolist() for name, own in layout.shares(shown.attention).items()}
    return pd.DataFrame({"attention of": shown.looks} | found)


def looks(shown: QueryExplorer, layout: Layout, keep: Keep) -> dict[str, Any] | None:
    """What the templates show: a picture for each `looks`, and the cell that it looks at most. None without any."""
    if not shown.looks:
        return None
    table, pictures = shares(shown, layout), overlays(shown, layout)
    sheet = strip({name: picture.float() / 255 for name, picture in zip(shown.looks, pictures)}, side=336)
    name = f"{shown.task}-attention"
    links = {"CSV": keep(f"{name}.csv", table), "PNG": keep(f"{name}.png", png_of(sheet))}
    rows = table.set_index("attention of").iterrows()
    shown_at = [
        {"name": name, "uri": sprite(picture[None]), "most": _words(row.idxmax()), "share": float(row.max())}
        for picture, (name, row) in zip(pictures, rows)
    ]
    return {"prompt": sprite(shown.pictures["canvas"]), "maps": shown_at, "links": links}


def _words(cell: str) -> str:
    """A cell of the layout in a sentence."""
    words = {"example_input": "the example", "example_output": "the example's answer", "query": "the query"}
    words |= {"output": "the answer itself", "cls": "CLS", "background": "the background"}
    name, _, number = cell.rpartition("_")
    return f"{words[name]} ({number})" if number.isdecimal() else words[cell]
