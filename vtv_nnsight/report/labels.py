"""What the pages call things, and how they write names and numbers."""

from __future__ import annotations

from collections.abc import Iterable

from vtv_nnsight.evaluation import conditions as of
from vtv_nnsight.evaluation.table import titled

CONDITIONS = {
    of.BASELINE: "An example is shown; nothing is patched.",
    of.ZERO_SHOT: "No example is shown; nothing is patched.",
    of.PATCHED: "No example is shown; the task vector is patched in at the units that were found.",
    of.BOTH: "An example is shown, and the task vector is patched in as well.",
    of.RANDOM: "No example is shown; the task vector is patched in at as many units drawn at random (many times).",
    of.MATCHED: "The same, with as many units of each stage and place as were found.",
    of.NOISE: "No example is shown; noise of the task vector's norm is patched in at the units that were found.",
    of.MEAN: "No example is shown; the mean of all tasks' vectors is patched in at the units that were found.",
    f"{of.OTHER}…": "No example is shown; the vector of another task is patched in at the same units.",
    of.WRONG: "An example of another task is shown; nothing is patched.",
    of.BLANK: "Blank cells are shown in the example's place; nothing is patched.",
    of.CEILING: "The tokenizer's own picture of the truth.",
    of.FLOOR: "The query as its own answer, a floor.",
}
"""What is compared, in words."""

FLOOR_TO_CEILING = (of.FLOOR, of.BASELINE, of.ZERO_SHOT, of.RANDOM, of.PATCHED, of.CEILING)
"""The columns of the table that ends a run, and of the README's."""

PICTURES = {
    "example_input": "example",
    "example_output": "its answer",
    "query": "query",
    of.BASELINE: of.BASELINE,
    of.ZERO_SHOT: of.ZERO_SHOT,
    of.PATCHED: of.PATCHED,
    "truth": "truth",
}
"""The pictures of a row, and what is written under them."""

CELLS = {
    "example_input": ("example", "the example"),
    "example_output": ("its answer", "the example's answer"),
    "query": ("query", "the query"),
    "output": ("to be painted", "the answer itself"),
    "cls": ("CLS", "CLS"),
    "background": ("background", "the background"),
}
"""Cell of a layout → its label, and what a sentence calls it."""

SITES = {
    "heads": ("heads", "one attention head"),
    "attn": ("attention layers", "one attention layer"),
    "mlp": ("MLPs", "one MLP"),
    "residual": ("residual streams", "one layer's residual stream"),
}
"""Site → what lies there, and what a unit is."""


def legend(conditions: Iterable[str], of_texts: bool = False) -> dict[str, str]:
    """The conditions that a page compares, each in words: those of `CONDITIONS` that are among `conditions`."""
    names = set(conditions)
    others = any(name.startswith(of.OTHER) for name in names)
    kept = {name: text for name, text in CONDITIONS.items() if name in names or (others and name.endswith("…"))}
    if of_texts:
        return {titled(name, "prompts"): text.replace("An example is", "Examples are") for name, text in kept.items()}
    return kept


def cell_label(cell: str) -> str:
    """What a page calls a cell of the layout: "example", or "example 2" of several."""
    name, number = _split_number(cell)
    return f"{CELLS[name][0]} {number}".rstrip()


def cell_in_words(cell: str) -> str:
    """A cell of the layout in a sentence: "the example", or "the example (2)" of several."""
    name, number = _split_number(cell)
    return f"{CELLS[name][1]} ({number})" if number else CELLS[name][1]


def _split_number(cell: str) -> tuple[str, str]:
    name, _, number = cell.rpartition("_")
    return (name, number) if number.isdecimal() else (cell, "")


def number(value: float, sign: str = "") -> str:
    """A score or a loss: three decimals and a real minus; `sign` "+" writes the plus as well."""
    return f"{value:{sign}.3f}".replace("-", "−")


def plain_label(name: str) -> str:
    """A label that matplotlib shows as it is written: `$` begins mathematics there, and `_` hides a label."""
    label = name.replace("\\", "\\\\").replace("$", r"\$") if "$" in name else name
    return f" {label}" if label.startswith("_") else label
