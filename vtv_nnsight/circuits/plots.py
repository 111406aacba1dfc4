"""Pictures of faithfulness curves."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from vtv_nnsight.circuits.curves import Curves


def draw(curves: Sequence[Curves], order: str = "signed") -> Figure:
    """f(k) of every ranking against the share of the units, on a log axis, with 95 % intervals: a panel for each of
    `curves`. Grey lines are the whole model (1) and nothing (0)."""
    figure = Figure(figsize=(1.2 + 3.9 * len(curves), 3.8), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, one in zip(panels, curves):
        for level in (0, 1):
            axes.axhline(level, color="grey", linewidth=0.8)
        for number, (ranking, by) in enumerate(name for name in one.names if name[1] == order):
            low, high = one.interval(ranking, by)
            style = {"color": f"C{number}"} | ({"linestyle": ":"} if ranking == "random" else {})
            axes.plot(one.sizes, one.faithfulness(ranking, by), label=ranking.replace("$", r"\$"), **style)
            axes.fill_between(one.sizes, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(xscale="log", xlabel="share of the units", title=f"{one.direction}: m = {one.measure}")
        axes.title.set_fontsize(9)
    panels[0].set_ylabel("faithfulness f")
    panels[-1].legend(fontsize=7)
    return figure
