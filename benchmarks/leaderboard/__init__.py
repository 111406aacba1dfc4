"""What sets of units are worth: those in files, or those that searches find now, side by side on the same prompts.

    >>> options = Leaderboard(algorithms=("reinforce", "gates"), tasks=("segmentation", "lowlight"))
    >>> rows = measure_sets(options, ["runs/scenes/search/segmentation.safetensors"])
    >>> print(markdown(rows)); draw(rows).savefig("patch_sets.png")

`vtv bench patch_sets` is a thin script over this; its help tells what the columns are.
"""

from leaderboard.drawing import draw
from leaderboard.measuring import agree, gap_closed, measure_sets
from leaderboard.sets import UNSEEN, Leaderboard, best_scored, prunings, read, stability
from leaderboard.tables import markdown

__all__ = [
    "UNSEEN", "Leaderboard", "agree", "best_scored", "draw", "gap_closed", "markdown", "measure_sets", "prunings",
    "read", "stability",
]  # fmt: skip
