"""Where the answer looks, as pictures: attention laid over the prompt (see `evaluation.attention`)."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch.nn import functional as F

from vtv_nnsight.evaluation.explorer import QueryExplorer
from vtv_nnsight.images import luma, png_of, strip
from vtv_nnsight.layouts import Layout
from vtv_nnsight.report.figures import Keep
from vtv_nnsight.report.labels import cell_in_words
from vtv_nnsight.report.pictures import sprite

GLOW = (0.95, 0.33, 0.0)
"""The colour of attention, which is seen on black, grey and white."""
MAX_GLOW = 0.85
"""How far the most looked at patch has that colour."""


def overlays(explorer: QueryExplorer, layout: Layout) -> torch.Tensor:
    """The prompt in grey with the attention of each of `explorer.looks` over it, the strongest patch of each equally
    strong: uint8 [look, 3, side, side]."""
    canvas = luma(explorer.pictures["canvas"][0].float() / 255)
    grid = layout.on_grid(explorer.attention).nan_to_num()
    strength = grid / grid.amax((-2, -1), keepdim=True).clamp(min=1e-12)
    strength = MAX_GLOW * F.interpolate(strength[:, None], canvas.shape[-2:], mode="nearest")
    glow = torch.tensor(GLOW).view(1, 3, 1, 1)
    return torch.lerp(canvas.expand(1, 3, -1, -1), glow, strength).mul(255).round().byte()


def shares(explorer: QueryExplorer, layout: Layout) -> pd.DataFrame:
    """The share of attention that goes to CLS and to each cell: a row for each of `explorer.looks`."""
    columns = {name: share.tolist() for name, share in layout.shares(explorer.attention).items()}
    return pd.DataFrame({"attention of": explorer.looks} | columns)


def attention_pictures(explorer: QueryExplorer, layout: Layout, keep: Keep) -> dict[str, Any] | None:
    """What the templates show: a picture for each of `explorer.looks`, and the cell that it looks at most. None without
    any."""
    if not explorer.looks:
        return None
    table, pictures = shares(explorer, layout), overlays(explorer, layout)
    sheet = strip({name: pixels.float() / 255 for name, pixels in zip(explorer.looks, pictures)}, side=336)
    name = f"{explorer.task}-attention"
    links = {"CSV": keep(f"{name}.csv", table), "PNG": keep(f"{name}.png", png_of(sheet))}
    maps = [
        {"name": name, "uri": sprite(pixels[None]), "most": cell_in_words(str(row.idxmax())), "share": float(row.max())}
        for pixels, (name, row) in zip(pictures, table.set_index("attention of").iterrows())
    ]
    return {"explorer": explorer, "maps": maps, "links": links}
