"""What fits what: the fingerprints of models, vectors and sets of units.

A fingerprint is a dict of JSON values that must agree before one thing is used with another: the heads of every stage,
the canvas, the kind of model and its weights. Two of them are compared in what both tell.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vtv_nnsight.layouts import Layout
from vtv_nnsight.models import digests as weights
from vtv_nnsight.models.interface import ByStage, InContextModel, Stage
from vtv_nnsight.models.nnsight_remote import PLAIN, SENDERS
from vtv_nnsight.text_prompts import TextLayout

_SIZES = ("layers", "heads", "head_dim", "streams")
RECORDED = ("template", "shots", "stop", "chat", "bos")
"""What a fingerprint tells of texts and is not compared: another template is an experiment, not a mistake."""


def fingerprint(model: InContextModel, layout: Any = None, *, cached: bool = False) -> dict[str, Any]:
    """What must agree before a vector or a set of units is used with a model.

    Weights are told by two digests, of all that `state_dict` holds rounded to bfloat16 and rounded to float16, and are
    the same if either agrees: so a model's copies in float32 and bfloat16, or in float32 and float16, on any device and
    from any file, are one model. A change is noticed when it shows in a single number at bfloat16's precision: one of a
    part in 128 always does, a smaller one when it crosses a rounding boundary, as that of a whole matrix does in many
    places. Lazy weights have no fingerprint before they are loaded.

    Args:
        model: The model.
        layout: Also tell the order and the examples of this layout.
        cached: Take the digests that were made before, unless PyTorch knows of a change since (see
            `models.digests`). It does not know of writes into `parameter.data` and NumPy's views: `patch`,
            which must be quick, does not see these; collecting reads all weights, and does.
    """
    digests = weights.weight_digests(model, cached=cached)
    return geometry(model, layout) | ({"weights": digests} if digests else {})


def geometry(model: InContextModel, layout: Any = None) -> dict[str, Any]:
    """The fingerprint without the weights."""
    facts: dict[str, Any] = {"stages": [stage.name for stage in model.stages]}
    for stage in model.stages:
        facts |= {f"{stage.name} {size}": getattr(stage, size) for size in _SIZES}
        facts |= {f"{stage.name} stream": stage.stream} if stage.stream else {}
    names = [field.name for field in fields(layout)] if layout else model.layout.MODEL_FACTS
    return facts | {name: getattr(layout or model.layout, name) for name in names} | model.identity()


def stages_of(facts: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages of a fingerprint."""
    return tuple(
        Stage(name, **{size: facts[f"{name} {size}"] for size in _SIZES}, stream=facts.get(f"{name} stream"))
        for name in facts["stages"]
    )


def layout_of(facts: Mapping[str, Any]) -> Any:
    """The layout of a fingerprint; of a canvas alone, the one with default order and examples."""
    kind: Any = Layout if "canvas_size" in facts else TextLayout
    return kind(**{field.name: facts[field.name] for field in fields(kind) if field.name in facts})


def differences(facts: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What two fingerprints say differently, of what both have."""
    shared = [name for name in expected if name in facts and name not in RECORDED]
    differ = [name for name in shared if not _agree(name, facts[name], expected[name])]
    return [
        "other weights" if name == "weights" else f"{name} {facts[name]!r}, not {expected[name]!r}" for name in differ
    ]


def check_compatible(what: str, facts: Mapping[str, Any], owner: str, expected: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the differences of two fingerprints, where there are any."""
    if differ := differences(facts, expected):
        raise ValueError(f"{what} does not fit {owner}: it has {'; '.join(differ)}.")


def _agree(name: str, facts: Any, expected: Any) -> bool:
    if name != "weights":
        facts, expected = (list(value) if isinstance(value, tuple) else value for value in (facts, expected))
        return bool(facts == expected)
    if any(facts[dtype] == expected[dtype] for dtype in weights.ROUNDED):
        return True
    if {facts["dtype"], expected["dtype"]} == set(weights.ROUNDED):
        warnings.warn(
            "weights in bfloat16 are compared with weights in float16, and whether they were the same before they were "
            "rounded cannot be told; load one of the two models in float32 to be sure.",
            stacklevel=4,
        )
        return True
    return False


def sent(what: str, of_it: Mapping[str, Any], values: ByStage) -> dict[str, Any]:
    """What travels of a vector or a set of units, by site, once it fits the model of the block that is being sent.

    Args:
        what: It, for errors.
        of_it: Its fingerprint.
        values: What it holds.
    """
    check_compatible(what, of_it, "this model", fingerprint(SENDERS[-1], cached=True))
    plain: dict[str, Any] = PLAIN[ByStage](values)
    return plain
