"""What a reader of a report can play with, all of it computed before: see `report.explorer`."""

from __future__ import annotations

import io
from typing import Any

import pandas as pd
import torch
from torch.nn import functional as F

from vtv_nnsight.images import luma
from vtv_nnsight.layouts import Layout
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.report.explorer import QueryExplorer
from vtv_nnsight.report.hero import animation, save_animation
from vtv_nnsight.report.labels import cell_in_words
from vtv_nnsight.report.pictures import data_uri, sprite
from vtv_nnsight.tasks import Task

GLOW = (0.95, 0.33, 0.0)
"""The colour of attention, which is seen on black, grey and white."""
MAX_GLOW = 0.85
"""How far the most looked at patch has that colour."""


def moving_and_still(explorer: QueryExplorer) -> dict[str, str]:
    """The animation of a query's answers ("moving"), and its last frame for readers who want nothing to move ("still"),
    as data URIs."""
    frames, moving, still = animation(explorer), io.BytesIO(), io.BytesIO()
    save_animation(frames, moving, "webp")
    frames[-1].save(still, "WEBP", quality=85)
    return {"moving": data_uri(moving.getvalue(), "webp"), "still": data_uri(still.getvalue(), "webp")}


def playground(explorer: QueryExplorer, task: Task, space: PatchSpace) -> dict[str, Any]:
    """What the templates show of one query's answers."""
    return {"explorer": explorer, "maps": _loss_maps(explorer, task, space)}


def unit_maps(space: PatchSpace) -> dict[str, list[list[str]]]:
    """Stage and group of positions ("encoder, query") → names of units, rows of layers and columns of heads. None for a
    space with a unit a token, which has too many."""
    if space.granularity == "token":
        return {}
    index = space.split(torch.arange(len(space)))
    return {
        f"{stage}, {group}": [[space.names[i] for i in row] for row in index[stage][..., number].tolist()]
        for stage, groups in space.groups.items()
        for number, group in enumerate(groups)
    }


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


def attention_pictures(explorer: QueryExplorer, layout: Layout) -> dict[str, Any] | None:
    """What the templates show: a picture for each of `explorer.looks`, and the cell that it looks at most. None without
    any."""
    if not explorer.looks:
        return None
    table, pictures = shares(explorer, layout), overlays(explorer, layout)
    maps = [
        {"name": name, "uri": sprite(pixels[None]), "most": cell_in_words(str(row.idxmax())), "share": float(row.max())}
        for pixels, (name, row) in zip(pictures, table.set_index("attention of").iterrows())
    ]
    return {"explorer": explorer, "maps": maps}


def _loss_maps(explorer: QueryExplorer, task: Task, space: PatchSpace) -> list[dict[str, Any]]:
    """Of each stage and group: rows of layers, cells of heads, which are None where the unit is not patched and tell
    otherwise how much the answer loses without it."""
    sign = 1 if task.higher_is_better else -1
    scores = explorer.scores["without"]
    losses = [sign * (explorer.scores["scale"][-1] - score) for score in scores]
    largest = max(map(abs, losses), default=0) or 1.0
    units = {
        name: {"name": name, "number": i, "score": score, "share": round(max(loss, 0) / largest, 3)}
        for i, (name, score, loss) in enumerate(zip(explorer.units, scores, losses))
    }
    return [
        {"title": title, "rows": [[units.get(name) for name in row] for row in rows]}
        for title, rows in unit_maps(space).items()
    ]
