"""Both papers' main tables from end to end, with the published weights and data, beside the papers' numbers.

    python benchmarks/published.py --model mae-vqgan --data pascal:VOCdevkit --imagenet ILSVRC2012 --device cuda
    python benchmarks/published.py --model mae-vqgan --data pascal:VOCdevkit --quick

- *Finding Visual Task Vectors* (ECCV 2024): every task on every fold, one-shot, zero-shot and with the task vector, by
  the released protocol (`vtv run --published`).
- *Visual Prompting via Image Inpainting* (NeurIPS 2022): segmentation on every fold and copying the query (of the same
  run), single objects in the released order (`detection:ROOT:0.2`), and with `--imagenet FOLDER` the released
  1000 pairs of colorization in `FOLDER/val`, by MSE and, with the extra `lpips`, LPIPS.

`--full`, the default, is as released; `--quick` is the same with few prompts and a short search. The first minute is
spent on timing both kinds of forward on this machine; what every part will take is printed before it begins. All parts
are kept in `--out`, and the same command goes on where it stopped. The papers' numbers are in `papers.csv`, each with
its source; a number that is not there is shown as "–".
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import options, save, table
from matplotlib.figure import Figure

from vtv_nnsight import VisualPrompt, data, runs, tasks
from vtv_nnsight.evaluation import Table, evaluate
from vtv_nnsight.evaluation.conditions import BASELINE, FLOOR, PATCHED, ZERO_SHOT
from vtv_nnsight.models.interface import default_batch_size
from vtv_nnsight.patching.forward import forward
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.report import page
from vtv_nnsight.runs import PUBLISHED, Settings, protocol, steps
from vtv_nnsight.runs.folds import is_published_pascal
from vtv_nnsight.search.score_function import PUBLISHED as RECIPE
from vtv_nnsight.tasks import Draw

PAPERS = {"VTV": "Finding Visual Task Vectors, ECCV 2024", "VP": "Visual Prompting via Image Inpainting, NeurIPS 2022"}
ROWS = (FLOOR, BASELINE, ZERO_SHOT, PATCHED)
DETECTION, COLORIZATION = "detection(fit=bilinear)", "colorization(fit=crop)"
QUICK = {"search": "gates", "loss": None, "budget": 240, "candidates": 8, "prompts": 4, "test_prompts": 8}
QUICK |= {"draws": 1, "control_prompts": 4}
COLORIZED, COLORIZATION_SEED = 1000, 5
"""Of VP's released evaluation of colorization: its pairs, and the seed that they are drawn with."""


def colorization_pairs(images: int) -> Draw:
    """The pairs of VP's released evaluation of colorization (NeurIPS 2022, §4.2), of so many images in the order of
    their paths: ImageNet's validation half, in a folder for each class.

    As there, queries are drawn from all images but the last, without repetition, and examples from the first 999, which
    are of ImageNet's first twenty classes; a query may be its own example.

    Raises:
        ValueError: when there are too few images.
    """
    if images <= COLORIZED:
        raise ValueError(f"{images} images are too few for {COLORIZED} released pairs; give {COLORIZED + 1} or more.")
    generator = np.random.RandomState(COLORIZATION_SEED)
    queries = generator.choice(images - 1, COLORIZED, replace=False)
    examples = [generator.choice(COLORIZED - 1) for _ in queries]
    return Draw(np.stack([examples, queries], axis=1), np.zeros((COLORIZED, 2)))


def main() -> None:
    parser = options(__file__, __doc__, "few prompts and a short search; with the embedded model")
    parser.add_argument("--full", action="store_true", help="as released; the default")
    parser.add_argument("--model", default="tiny", help="as SOURCE of `vtv info`")
    parser.add_argument("--vqgan", help="the tokenizer's own checkpoint, for a .pth that has none")
    parser.add_argument("--dtype", help="precision of the weights; by default that of the source")
    parser.add_argument("--data", default="scenes", help="pascal:ROOT; other data have one fold and no paper's numbers")
    parser.add_argument("--imagenet", type=Path, metavar="FOLDER", help="with its folder val, for colorization")
    args = parser.parse_args()
    if args.quick and args.full:
        parser.error("--quick and --full are opposites; give one.")
    given = dict(model=args.model, vqgan=args.vqgan, dtype=args.dtype, data=args.data, seed=args.seed)
    settings = Settings(**PUBLISHED | (QUICK if args.quick else {}) | given)
    setup = steps.set_up(settings, args.device)
    rates = measure(setup, 2 if args.quick else 60)
    print(plan(settings, rates, args.imagenet is not None), flush=True)
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    runs.run(args.out / "run", settings, device=args.device, report=page.write)
    tables = {"VTV": read(args.out / "run", settings)}
    tables["VP"] = Table.cat([tables["VTV"], *visual_prompting(setup, args)])
    rows = [row for paper, found in tables.items() for row in compared(found, paper)]
    for paper, title in PAPERS.items():
        print(f"\n{title}\n{markdown([row for row in rows if row['paper'] == paper])}")
    spent = time.perf_counter() - began
    print(
        f"\n{spent / 60:.1f} minutes of this call; one-shot {rates['one']:.3g} s and zero-shot {rates['zero']:.3g} s."
    )
    save(args, {"rows": rows, "seconds an evaluation": rates, "settings of the run": asdict(settings)}, draw(rows))


def measure(setup: steps.Setup, spend: float) -> dict[str, float]:
    """Seconds that a painted answer takes, with an example ("one") and without ("zero"); `spend` go into both."""
    layout, rates = setup.layout, {}
    pixels = torch.rand(default_batch_size(setup.model), 3, layout.canvas_size, layout.canvas_size)
    prompts = VisualPrompt.from_canvas(pixels, layout).to(next(setup.model.parameters()).device)
    for shot, asked in (("one", prompts), ("zero", prompts.query_only())):
        count, began = 0, None
        while began is None or time.perf_counter() - began < spend / 2:
            with torch.no_grad():
                setup.model.answers(forward(setup.model, asked)[0], asked)[0].cpu()
            if began is None:  # the first is warming up
                began = time.perf_counter()
            else:
                count += len(asked)
        rates[shot] = (time.perf_counter() - began) / max(1, count)
    return rates


def plan(settings: Settings, rates: dict[str, float], imagenet: bool) -> str:
    """What every part is, in evaluations, and how long it will take."""
    folds = 4 if is_published_pascal(settings) else 1
    searched = protocol.SEARCHED - RECIPE.images
    published = RECIPE.steps * RECIPE.masks + searched * RECIPE.steps // RECIPE.validate_every
    drawn = 2 * settings.draws * -(-settings.control_prompts // 4) + 4 * settings.control_prompts
    per_task = {  # part → one-shot and zero-shot evaluations of a task
        "select": (settings.candidates * (len(protocol.VECTOR_FOLDS) if folds > 1 else 1), 0),
        "collect": (settings.prompts, 0),
        "search": (0, settings.budget or published),
        "evaluate": (2 * folds * settings.test_prompts, 2 * folds * settings.test_prompts + folds * drawn),
    }
    parts = {name: tuple(len(tasks.VTV) * count for count in counts) for name, counts in per_task.items()}
    parts |= {"detection": (settings.test_prompts, 0)} if folds > 1 else {}
    parts |= {"colorization": (settings.test_prompts, 0)} if imagenet else {}
    minutes = {name: (one * rates["one"] + zero * rates["zero"]) / 60 for name, (one, zero) in parts.items()}
    body = [[name, *parts[name], f"{minutes[name]:.1f}"] for name in parts]
    body.append(["together", *map(sum, zip(*parts.values())), f"{sum(minutes.values()):.1f}"])
    return table(["part", "one-shot", "zero-shot", "minutes at this rate"], body)


def read(run: Path, settings: Settings) -> Table:
    """The evaluations of all tasks and folds of a run."""
    paths = sorted(run.glob("**/evaluation/*.parquet"))
    order = [task.name for task in tasks.VTV]
    return Table.cat([Table.load(path) for path in sorted(paths, key=lambda path: order.index(path.stem))])


def visual_prompting(setup: steps.Setup, args: argparse.Namespace) -> list[Table]:
    """VP's other tasks, each kept in a file: detection of Pascal's single objects, and colorization of ImageNet."""
    found, conditions = [], {name: name for name in (BASELINE, FLOOR)}
    if is_published_pascal(setup.settings):
        root, _, _ = data.pascal_argument(args.data.removeprefix("pascal:"))
        single = replace(setup.settings, data=f"detection:{root}:0.2")
        asked = replace(setup, settings=single)
        task = tasks.get(DETECTION)

        def detect() -> Table:
            rows = data.load(single.data, "test", None, single.seed)
            prompts = steps.prompts_to_test(asked, task, rows)
            return evaluate(setup.model, task, prompts, conditions, keep=0)

        found.append(kept(args.out / "detection.parquet", detect))
    if args.imagenet:
        metrics = ["mse", "lpips"] if find_spec("lpips") else ["mse"]
        for metric in metrics:
            task = tasks.scored_by(tasks.get(COLORIZATION), metric)

            def colorize(task: Any = task) -> Table:
                rows = data.load(f"folder:{args.imagenet / 'val'}")
                pairs, parts = colorization_pairs(len(rows))[: setup.settings.test_prompts], []
                for start in progress_bar(range(0, len(pairs), 100), desc=task.name):
                    prompts = task.compose(rows, pairs[start : start + 100], setup.layout)
                    table = evaluate(setup.model, task, prompts, conditions, keep=0, progress=False)
                    parts.append(table.frame.assign(image=table.frame.image + start))
                return Table(pd.concat(parts, ignore_index=True))

            found.append(kept(args.out / f"colorization-{metric}.parquet", colorize))
    return found


def kept(path: Path, make: Any) -> Table:
    """The table in a file, which is made where it is not there."""
    if not path.is_file():
        make().to_parquet(path)
    return Table.load(path)


def compared(found: Table, paper: str) -> list[dict[str, Any]]:
    """A row for each number of a paper's table that was measured: every task, condition and fold."""
    known = pd.read_csv(Path(__file__).with_name("papers.csv"), dtype={"fold": str}, keep_default_na=False)
    known = {(k.paper, k.row, k.task, k.metric, k.fold): k for k in known.itertuples()}
    frame = found.frame[found.frame.condition.isin(ROWS)]
    frame = frame.assign(kind=frame.task.str.partition("(")[0], measure=frame.label.str.split().str[0])
    several = frame.fold.nunique() > 1
    rows = []
    for (task, kind, measure, row, fold), part in frame.groupby(
        ["task", "kind", "measure", "condition", "fold"], sort=False
    ):
        place = str(fold) if several and kind != "detection" and "fit" not in task else ""
        in_paper = known.get((paper, row, kind, measure, place))
        ours, theirs = float(part.score.mean()), None if in_paper is None else float(in_paper.value)
        source = "" if in_paper is None else str(in_paper.source)
        rows.append(dict(paper=paper, task=task, metric=measure, fold=place, row=row, here=ours, queries=len(part)))
        rows[-1] |= dict(theirs=theirs, difference=None if theirs is None else ours - theirs, source=source)
    if paper == "VP":  # of the run's tasks, the paper's table has segmentation alone
        rows = [
            r for r in rows if r["row"] in (BASELINE, FLOOR) and (r["task"] == "segmentation" or "fit" in r["task"])
        ]
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """A paper's table: here, there and the difference."""
    names = ("task", "metric", "fold", "row", "queries", "here", "theirs", "difference", "source")
    body = [["–" if row[name] is None else row[name] for name in names] for row in rows]
    return table(["task", "metric", "fold", "row", "queries", "here", "the paper", "difference", "its source"], body)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """One-shot against the task vector, a point a task and fold."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = dict(zip(("mIoU", "MSE"), figure.subplots(1, 2)))
    scores = {(r["task"], r["fold"], r["row"]): r for r in rows if r["paper"] == "VTV"}
    for (task, fold, row), one in scores.items():
        if row == BASELINE and one["metric"] in panels:
            vector = scores[task, fold, PATCHED]["here"]
            panels[one["metric"]].plot(one["here"], vector, "o")
            panels[one["metric"]].annotate(f"{task} {fold}", (one["here"], vector), fontsize=7)
    for name, panel in panels.items():
        panel.axline((0, 0), slope=1, color="tab:gray", linewidth=0.8)
        panel.set(xlabel=f"one-shot, {name}", ylabel=f"task vector, {name}")
    return figure


if __name__ == "__main__":
    main()
