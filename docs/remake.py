"""Make again all that is made of the embedded model, with one command, when the model has changed:

    python docs/remake.py [--run runs/scenes]

- the run itself, as `vtv run --data scenes` does it (it goes on where it stopped, and is not done again when it is
  finished);
- vtv_nnsight/weights/tiny/: the task vectors and units that the package carries;
- docs/hero.gif and docs/answers.png, the pictures of the README; docs/pictures/, those of "What a task vector is".

It prints the rows of the README's table on scenes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import pictures

from vtv_nnsight.report import load_run, page
from vtv_nnsight.report.explorer import QueryExplorer, demonstrate
from vtv_nnsight.report.hero import animation, save_animation
from vtv_nnsight.report.labels import FLOOR_TO_CEILING
from vtv_nnsight.runs import bundles, run
from vtv_nnsight.runs.settings import Settings

DOCS = Path(__file__).parent
WEIGHTS = DOCS.parent / "vtv_nnsight" / "weights" / "tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run of the embedded model, in place of a new one")
    parser.add_argument("--task", default="segmentation", help="the task that the moving picture shows")
    args = parser.parse_args()
    folder = args.run or Path("runs/scenes")
    if args.run is None:
        run(folder, Settings(data="scenes"), redo=True, explore=demonstrate, report=page.write)

    shutil.rmtree(WEIGHTS / "search", ignore_errors=True)
    bundles.load(folder).compact().save(WEIGHTS, torch.float16)
    shown = QueryExplorer.load(folder / "shown" / f"{args.task}.safetensors")
    save_animation(animation(shown), DOCS / "hero.gif")
    shutil.copyfile(folder / "answers.png", DOCS / "answers.png")
    pictures.main(["--task", args.task])

    found = load_run(folder)
    for task in found.tasks:
        lines = found.lines()[task.name]["score"]
        cells = [f"{lines[name].mean:.3f} [{lines[name].low:.3f}, {lines[name].high:.3f}]" for name in FLOOR_TO_CEILING]
        print(f"| {task.name} | {task.metric.label} | {' | '.join(cells)} |")
    print(f"hero: the median of {shown.queries} queries, {shown.scores['scale'][-1]:.3f}")


if __name__ == "__main__":
    main()
