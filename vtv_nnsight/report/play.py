"""What a reader of a report can play with, all of it computed before: see `evaluation.demonstration`."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from einops import rearrange

from vtv_nnsight.evaluation.explorer import SIDE, QueryExplorer
from vtv_nnsight.images import png_of, strip, to_pil
from vtv_nnsight.patching import PatchSpace
from vtv_nnsight.report.hero import animation, save_animation
from vtv_nnsight.report.numbers import of_playground
from vtv_nnsight.report.pictures import Keep
from vtv_nnsight.tasks import Task


def moving(shown: QueryExplorer) -> str:
    """The animation of a demonstration, as a data URI."""
    buffer = io.BytesIO()
    save_animation(animation(shown), buffer, "webp")
    return _uri(buffer)


def still(shown: QueryExplorer) -> str:
    """Its last frame, for readers who want nothing to move."""
    buffer = io.BytesIO()
    animation(shown)[-1].save(buffer, "WEBP", quality=85)
    return _uri(buffer)


def playground(shown: QueryExplorer, task: Task, space: PatchSpace, keep: Keep) -> dict[str, Any]:
    """What the templates show of a demonstration."""
    scales = [picture.float() / 255 for picture in shown.pictures["scale"][::2]]
    sheet = strip({f"{scale:.1f}": picture for scale, picture in zip(shown.scales[::2], scales)}, side=SIDE)
    name = f"{shown.task}-answers"
    links = {"CSV": keep(f"{name}.csv", of_playground(shown)), "PNG": keep(f"{name}.png", png_of(sheet))}
    best = shown.scores["scale"][-1]
    sign = 1 if task.higher_is_better else -1
    worse = [sign * (best - score) for score in shown.scores["without"]]
    most = max([abs(loss) for loss in worse], default=0) or 1.0
    own = {
        name: {"number": i, "score": score, "share": round(max(loss, 0) / most, 3)}
        for i, (name, score, loss) in enumerate(zip(shown.units, shown.scores["without"], worse))
    }
    return {
        "query": sprite(shown.pictures["query"]),
        "truth": sprite(shown.pictures["truth"]),
        "scale": sprite(shown.pictures["scale"]),
        "strip": sprite(shown.pictures["scale"][::2], across=True),
        "scales": shown.scales,
        "scale_scores": shown.scores["scale"],
        "without": sprite(shown.pictures["without"]) if shown.units else None,
        "without_scores": shown.scores["without"],
        "maps": _maps(space, own) if space.granularity != "token" else [],
        "vectors": [
            {"name": name, "uri": sprite(picture[None]), "score": score}
            for name, picture, score in zip(shown.vectors, shown.pictures["vectors"], shown.scores["vectors"])
        ],
        "queries": shown.queries,
        "best": best,
        "links": links,
    }


def sprite(pictures: torch.Tensor, across: bool = False) -> str:
    """Pictures, uint8 [n, 3, height, width], as one below (or beside) the other: a data URI."""
    buffer = io.BytesIO()
    joined = rearrange(pictures, "n c h w -> c h (n w)" if across else "n c h w -> c (n h) w")
    to_pil(joined.float() / 255).save(buffer, "WEBP", quality=85, method=4)
    return _uri(buffer)


def _maps(space: PatchSpace, own: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each stage and group: rows of layers, cells of heads, which are None where the unit is not patched."""
    units, names = space.units, list(space.groups)
    maps: dict[tuple[int, int], dict[str, Any]] = {}
    for i, (stage, layer, _, group) in enumerate(zip(*(part.tolist() for part in units))):
        title = f"{names[stage]}, {list(space.groups[names[stage]])[group]}"
        rows = maps.setdefault((stage, group), {"title": title, "rows": []})["rows"]
        if layer == len(rows):
            rows.append([])
        name = space.names[i]
        rows[layer].append(own[name] | {"name": name} if name in own else None)
    return list(maps.values())


def _uri(webp: io.BytesIO) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp.getvalue()).decode()}"
