"""What sets of units are worth: those in files, or those that searches find now, side by side on the same prompts.

    >>> options = Leaderboard(algorithms=("reinforce", "gates"), tasks=("segmentation", "lowlight"))
    >>> rows = measure_sets(options, ["runs/scenes/search/segmentation.safetensors"])
    >>> print(markdown(rows)); draw(rows).savefig("patch_sets.png")

`vtv bench patch_sets` is a thin script over this; its help tells what the columns are.
"""

from leaderboard.drawing import draw
from leaderboard.measuring import agree, gap_closed, measure_sets
from leaderboard.sets import (
    OF_RUN,
    UNSEEN,
    Leaderboard,
    best_scored,
    heading,
    prunings,
    read,
    settings_of_runs,
    stability,
)
from leaderboard.tables import markdown

__all__ = [
    "OF_RUN", "UNSEEN", "Leaderboard", "agree", "best_scored", "draw", "gap_closed", "heading", "markdown",
    "measure_sets", "prunings", "read", "settings_of_runs", "stability",
]  # fmt: skip
