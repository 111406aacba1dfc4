"""What a reader of a report can play with, all of it computed before: see `evaluation.explorer`."""

from __future__ import annotations

import io
from typing import Any

import torch

from vtv_nnsight.evaluation.explorer import SIDE, QueryExplorer
from vtv_nnsight.images import png_of, strip
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.report.figures import Keep
from vtv_nnsight.report.hero import animation, save_animation
from vtv_nnsight.report.numbers import of_playground
from vtv_nnsight.report.pictures import data_uri
from vtv_nnsight.tasks import Task


def moving_and_still(explorer: QueryExplorer) -> dict[str, str]:
    """The animation of a query's answers ("moving"), and its last frame for readers who want nothing to move ("still"),
    as data URIs."""
    frames, moving, still = animation(explorer), io.BytesIO(), io.BytesIO()
    save_animation(frames, moving, "webp")
    frames[-1].save(still, "WEBP", quality=85)
    return {"moving": data_uri(moving.getvalue(), "webp"), "still": data_uri(still.getvalue(), "webp")}


def playground(explorer: QueryExplorer, task: Task, space: PatchSpace, keep: Keep) -> dict[str, Any]:
    """What the templates show of one query's answers."""
    tenths = zip(explorer.scales[::2], explorer.pictures["scale"][::2])
    sheet = strip({f"{scale:.1f}": pixels.float() / 255 for scale, pixels in tenths}, side=SIDE)
    name = f"{explorer.task}-answers"
    links = {"CSV": keep(f"{name}.csv", of_playground(explorer)), "PNG": keep(f"{name}.png", png_of(sheet))}
    return {"explorer": explorer, "maps": _loss_maps(explorer, task, space), "links": links}


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
