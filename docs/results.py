"""Make the tables of docs/results.md of the files in benchmarks/results/; first those files, where asked.

    python docs/results.py                              # the page's tables, of what is there
    python docs/results.py --plan                       # what each table takes, and what is missing
    nohup python docs/results.py --run > results.log &  # what is missing, in the plan's order; goes on where it was
    python docs/results.py --run --only pictures,matrix --again

Between `<!-- NAME -->` and `<!-- end -->` of the page stands what this writes; all else is written by hand. The rows of
the README's table are printed.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, RUNS = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md", ROOT / "runs"
CONDITIONS = {
    "copy": "copy, the floor",
    "one-shot": "one-shot",
    "wrong example": "wrong example",
    "blank example": "blank example",
    "zero-shot": "zero-shot",
    "random units": "random units",
    "noise vector": "noise vector",
    "mean over tasks": "mean over tasks",
    "task vector": "task vector",
    "tokenizer": "the tokenizer's own picture of the truth",
}
SOURCE = "https://github.com/OWNER/vtv-nnsight/blob/main"
README = ("one-shot", "zero-shot", "task vector")
SPENT = ("evaluations", "seconds")


class Part(NamedTuple):
    """One table of the page.

    Args:
        command: What makes it, run in the repository's folder.
        minutes: Of one core of an AMD EPYC, estimated from its evaluations at the rate measured there.
        seeds: How many.
        files: File in benchmarks/results → where the command leaves it; None where it writes there itself.
        table: Markdown of the files' contents, by name.
    """

    command: str
    minutes: int
    seeds: int
    files: Mapping[str, str | None]
    table: Callable[[dict[str, Any]], str]


def of_run(contents: dict[str, Any]) -> str:
    """The conditions of a run's merged table: a row for each task."""
    rows = []
    for name, lines in _scores(contents).items():
        cells = [_cell(lines.loc[c]) if c in lines.index else "" for c in CONDITIONS]
        rows.append([name, lines.measure.iloc[0].replace("iou", "mIoU ↑").replace("mse", "MSE ↓"), *cells])
    queries = max(int(lines.images.max()) for lines in _scores(contents).values())
    head = ["task", "metric", *CONDITIONS.values()]
    return f"{_markdown(head, rows)}\n\n{queries} prompts a task, all seeds together."


def of_matrix(contents: dict[str, Any]) -> str:
    """Both matrices, and in how many seeds a task needs its own vector."""
    (content,) = contents.values()
    pairs, parts = pd.DataFrame(content["pairs"]), []
    titles = {"fixed": "transfer at fixed units", "anew": "units searched for each pair"}
    for units, title in titles.items():
        own = pairs[pairs.units == units]
        wide = own.pivot(index="task", columns="vector", values="mean").loc[own.task.unique(), own.vector.unique()]
        body = [[task, *(f"{value:.3f}" for value in row)] for task, row in wide.iterrows()]
        parts.append(_markdown([f"{title}: task, vector of", *wide.columns], body))
    specific = pd.DataFrame(content["specific"])
    counts = [f"{task} {int(row.sum())} of {len(row)}" for task, row in specific.iterrows()]
    return "\n\n".join([*parts, f"Seeds in which no other vector does as well, searched for: {', '.join(counts)}."])


def of_lines(contents: dict[str, Any]) -> str:
    """Lines of conditions, as `held_out_tasks` has them."""
    (content,) = contents.values()
    lines = pd.DataFrame(content["lines"])
    names = [name for name in CONDITIONS if name in set(lines.condition)]
    rows = [
        [task, *(_cell(own.set_index("condition").loc[name]) for name in names)]
        for task, own in lines.groupby("task", sort=False)
    ]
    return _markdown(["task", *(CONDITIONS[name] for name in names)], rows)


def of_rows(contents: dict[str, Any]) -> str:
    """Means over seeds, and the least and the most, as `learned_vectors` has them."""
    (content,) = contents.values()
    rows = pd.DataFrame(content["rows"])
    tasks = list(rows.task.unique())
    body = []
    for name, own in rows.groupby("row", sort=False):
        of_task = [own[own.task == task].score for task in tasks]
        body.append([name, *(f"{s.mean():.3f} ({s.min():.3f} to {s.max():.3f})" for s in of_task)])
    return _markdown(["", *tasks], body)


def of_file(contents: dict[str, Any]) -> str:
    """Where the values are that the text below a mark is about."""
    names = ", ".join(f"[{name}]({SOURCE}/benchmarks/results/{name})" for name in contents)
    return f"Values in {names}."


def of_language(contents: dict[str, Any]) -> str:
    """First-token accuracy of each model: every method in the mean, with what it took, and by task."""
    (content,), parts = contents.values(), []
    for model, found in content["models"].items():
        methods = found["methods"]
        against = [name for name in next(iter(methods.values()))["less"] if name != "random units"]
        rows = []
        for name, facts in methods.items():
            less = [facts["less"][other] if other != name else None for other in against]
            rows.append([name, "{:.3f} [{:.3f}, {:.3f}]".format(*facts["mean"])])
            rows[-1] += ["" if values is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values) for values in less]
            rows[-1] += ["" if math.isnan(facts[key]) else f"{facts[key]:.0f}" for key in SPENT]
            rows[-1].append(str(facts["seeds"]))
        head = ["", "mean", *(f"less {name}" for name in against), *SPENT, "seeds"]
        shown = [name for name in methods if ", k=" not in name]
        tasks = [[task, *(f"{scores[name]:.2f}" for name in shown)] for task, scores in found["by_task"].items()]
        parts += [f"{model}:", _markdown(head, rows), _markdown([f"{model}, by task", *shown], tasks)]
    return "\n\n".join(parts)


def of_bench(name: str, minutes: int, seeds: int, options: str = "") -> Part:
    """A benchmark that writes NAME.json."""
    command = f"vtv bench {name} {options} --out benchmarks/results".replace("  ", " ")
    return Part(command, minutes, seeds, {f"{name}.json": None}, of_file)


def of_seeds(data: str, minutes: int, options: str = "", seeds: int = 5) -> Part:
    """`vtv run` over several seeds."""
    folder = f"runs/seeds-{data}"
    files = {f"run_{data}.csv": f"{folder}/table.csv", f"seeds_{data}.csv": f"{folder}/seeds.csv"}
    command = f"vtv run --data {data} --seeds {seeds} {options} --out {folder}".replace("  ", " ")
    return Part(command, minutes, seeds, files, of_run)


SPECIFICITY = "vtv bench specificity --runs runs/seeds-pictures --seeds 5 --out benchmarks/results"
PARTS = {
    "pictures": of_seeds("pictures", 45, "--budget 4000 --matrix"),
    "matrix": Part(SPECIFICITY, 1, 5, {"specificity.json": None}, of_matrix),
    "scenes": of_seeds("scenes", 15, "--budget 2000", seeds=3),
    "held_out": of_bench("held_out_tasks", 15, 3, "--runs runs/held-out-tasks")._replace(table=of_lines),
    "learned": of_bench("learned_vectors", 35, 3)._replace(table=of_rows),
    "language": of_bench("language", 720, 5)._replace(table=of_language),
    "circuits": of_bench("circuits", 30, 2, "--seeds 2"),
    "search_efficiency": of_bench("search_efficiency", 60, 2, "--seeds 2 --budgets 1000 4000 --published-steps 200"),
    "patch_sets": of_bench("patch_sets", 20, 1, "--seeds 1 --budget 2000"),
    "open_ends": of_bench("open_ends", 15, 1),
    "prompt_side": of_bench("prompt_side", 15, 1),
    "ablations": of_bench("ablations", 25, 1, "--seeds 1 --budget 2000"),
    "attention": of_bench("attention", 3, 1),
}
"""Name → table, in the order in which `--run` makes what is missing. All but "language" are cut in seeds and budgets to
fit six hours together."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print what each table takes, and what is missing")
    parser.add_argument("--run", action="store_true", help="make what is missing")
    parser.add_argument("--again", action="store_true", help="with --run, make what is there, too")
    parser.add_argument("--only", help=f"some tables, with commas between: {','.join(PARTS)}")
    args = parser.parse_args()
    asked = {name: PARTS[name] for name in (args.only.split(",") if args.only else PARTS)}
    if args.plan:
        return print(plan())
    for name, part in asked.items() if args.run else ():
        if args.again or missing(part):
            print(f"{time.strftime('%H:%M')} {name}: {part.command}", flush=True)
            make(part)
            write_page()
    write_page()
    if (RESULTS / "run_pictures.csv").is_file():
        print("\n".join(readme_rows()))


def plan() -> str:
    """A row for each table: what makes it, its minutes and seeds."""
    rows = [
        [name, f"`{part.command}`", part.minutes, part.seeds, "no" if missing(part) else "yes"]
        for name, part in PARTS.items()
    ]
    rows.append(["together", "", sum(part.minutes for part in PARTS.values()), "", ""])
    return _markdown(["table", "command", "minutes of one core", "seeds", "made"], rows)


def missing(part: Part) -> list[str]:
    """The files that are not there."""
    return [name for name in part.files if not (RESULTS / name).is_file()]


def make(part: Part) -> None:
    """Run a part's command, and keep its files with how long it took."""
    began = time.perf_counter()
    RUNS.mkdir(exist_ok=True)
    command = shlex.split(part.command)
    again = ["--redo"] * (command[1] == "run")  # of a run that is as it was asked for nothing is done again
    subprocess.run([sys.executable, "-m", "vtv_nnsight", *command[1:], *again], check=True, cwd=ROOT)
    for name, source in part.files.items():
        if source:
            shutil.copyfile(ROOT / source, RESULTS / name)
    seconds = json.loads((RESULTS / "seconds.json").read_text()) if (RESULTS / "seconds.json").is_file() else {}
    seconds[part.command] = round(time.perf_counter() - began)
    (RESULTS / "seconds.json").write_text(json.dumps(seconds, indent=1) + "\n")


def write_page() -> None:
    """Put every table that can be made into the page."""
    page = PAGE.read_text(encoding="utf-8")
    texts = {"plan": plan()} | {name: section(part) for name, part in PARTS.items()}
    for name, text in texts.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        page = before + mark + text + "\n" + rest[rest.index("<!-- end -->") :]
    PAGE.write_text(page, encoding="utf-8")


def section(part: Part) -> str:
    """A table, and the line that says how it is made."""
    if missing(part):
        return f"Not made yet: `{part.command}` ({part.minutes} minutes)."
    contents = {name: _read(RESULTS / name) for name in part.files}
    file = RESULTS / "seconds.json"
    seconds = json.loads(file.read_text()).get(part.command) if file.is_file() else None
    table, seeds = part.table(contents), f"{part.seeds} seed{'s' * (part.seeds > 1)}"
    if seconds is None:
        table += "\n\n" if table.endswith("|") else " "
        return f"{table}Of an earlier run; made again by `{part.command}`, {part.minutes} minutes."
    return f"{table}\n\n`{part.command}`, {seconds} s, {seeds}."


def readme_rows() -> list[str]:
    """The rows of the README's table, of the page's numbers."""
    rows = []
    for task, lines in _scores({"run_pictures.csv": _read(RESULTS / "run_pictures.csv")}).items():
        means = " | ".join(f"{lines.loc[name]['mean']:.3f}" for name in README)
        rows.append(f"| {task} | {lines.measure.iloc[0]} | {means} |")
    return rows


def _scores(contents: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """Task → the lines of its metric, by condition."""
    frame = next(iter(contents.values()))
    frame = frame[frame.measure.isin(["iou", "mse"])]
    return {str(task): own.set_index("condition") for task, own in frame.groupby("task", sort=False)}


def _cell(line: Any) -> str:
    return f"{line['mean']:.3f} [{line['low']:.3f}, {line['high']:.3f}]"


def _read(path: Path) -> Any:
    return pd.read_csv(path) if path.suffix == ".csv" else json.loads(path.read_text(encoding="utf-8"))


def _markdown(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    main()
