"""What mkdocs does to pages: the search algorithms are listed from their registry."""

from __future__ import annotations

from typing import Any

MARK = "<!-- search.ALGORITHMS -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table of algorithms, and the reference of each, in the place of the mark."""
    return markdown.replace(MARK, algorithms()) if MARK in markdown else markdown


def algorithms() -> str:
    from vtv_nnsight.search import ALGORITHMS

    lines = ["| algorithm | how it searches | what it reads |", "| --- | --- | --- |"]
    for algorithm in ALGORITHMS.values():
        reads = ["losses"] + ["gradients"] * algorithm.needs_gradient + ["task scores"] * algorithm.needs_scores
        lines.append(f"| `{algorithm.name}` | {algorithm.description} | {', '.join(reads)} |")
    pages = [f"::: {algorithm.__module__}.{algorithm.name}" for algorithm in ALGORITHMS.values()]
    return "\n".join(lines) + "\n\n" + "\n\n".join(pages)
