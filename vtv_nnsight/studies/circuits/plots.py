"""Pictures of faithfulness curves."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from vtv_nnsight.studies.circuits.curves import Curves


def draw(
    curves: Sequence[Curves], order: str = "signed", columns: int | None = None, titles: Sequence[str] | None = None
) -> Figure:
    """f(k) of every ranking against the share of the units, on a log axis, with 95 % intervals: a panel for each of
    `curves`. Grey lines are the whole model (1) and nothing (0).

    Args:
        curves: What to draw.
        order: "signed" or "absolute".
        columns: Panels beside each other; all of them by default.
        titles: One for each panel; by default its direction and measure.
    """
    columns = columns or len(curves)
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(2.8 + 3.9 * columns, 3.4 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in panels[len(curves) :]:
        axes.axis("off")
    for place, (axes, one) in enumerate(zip(panels, curves)):
        for level in (0, 1):
            axes.axhline(level, color="grey", linewidth=0.8)
        for number, (ranking, by) in enumerate(name for name in one.names if name[1] == order):
            low, high = one.interval(ranking, by)
            style = {"color": f"C{number}"} | ({"linestyle": ":"} if ranking == "random" else {})
            axes.plot(one.sizes, one.faithfulness(ranking, by), label=ranking.replace("$", r"\$"), **style)
            axes.fill_between(one.sizes, low, high, color=style["color"], alpha=0.15, linewidth=0)
        title = titles[place] if titles else f"{one.direction}: m = {one.measure}"
        axes.set(xscale="log", xlabel="share of the units", title=title)
        axes.title.set_fontsize(9)
        if place % columns == 0:
            axes.set_ylabel("faithfulness f")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure
