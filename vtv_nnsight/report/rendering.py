"""The Jinja2 templates of the pages (templates/), which escape all that they are given."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vtv_nnsight.evaluation.conditions import PATCHED
from vtv_nnsight.report.labels import PICTURES, number
from vtv_nnsight.report.pictures import sprite
from vtv_nnsight.text import duration, in_words

FILES = files("vtv_nnsight.report")
TEMPLATES = Environment(
    loader=PackageLoader("vtv_nnsight.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
TEMPLATES.filters |= {"duration": duration, "in_words": in_words, "json": json.dumps}
TEMPLATES.filters |= {"number": number, "sprite": sprite}
TEMPLATES.globals |= {"patched": PATCHED, "pictures": PICTURES, "asset": lambda name: (FILES / name).read_text("utf-8")}


def render(template: str, **content: Any) -> str:
    """One of the templates with its content."""
    return TEMPLATES.get_template(template).render(content)
