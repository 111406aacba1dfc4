"""What a run found, as a page to read: one HTML file with everything in it, for a screen or a phone, light or dark.

    >>> report.write("runs/scenes")                                   # runs/scenes/report.html
    >>> report.compare(["runs/a", "runs/b"], "comparison.html")       # or `vtv report runs/a runs/b`

Beside report.html stand the same numbers (table.csv, table.md) and a picture of the first answers (answers.png).
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure

from vtv_nnsight import plots
from vtv_nnsight import tasks as registry
from vtv_nnsight.evaluation import BASELINE, Line, Table
from vtv_nnsight.files import read_tensors, write_tensors, write_text
from vtv_nnsight.images import to_pil
from vtv_nnsight.layouts import Layout
from vtv_nnsight.progress import duration, quiet
from vtv_nnsight.prompts import crop
from vtv_nnsight.search import plots as search_plots
from vtv_nnsight.search.result import SearchResult
from vtv_nnsight.stages import ByStage
from vtv_nnsight.tasks import Task
from vtv_nnsight.vectors import TaskVectors

PATCHED = "task vector"
CONDITIONS = {
    "one-shot": "An example is shown; nothing is patched.",
    "zero-shot": "No example is shown; nothing is patched.",
    PATCHED: "No example is shown; the task vector is patched in at the units that were found.",
    "one-shot + task vector": "An example is shown, and the task vector is patched in as well.",
    "random units": "No example is shown; the task vector at as many units drawn at random.",
    "vector of …": "No example is shown; the vector of another task at the same units.",
    "tokenizer": "The tokenizer's own drawing of the truth: no answer can be better.",
    "copy": "The query as its own answer.",
}
"""What is compared, in words."""

SHOWN = {
    "example_input": "example",
    "example_output": "its answer",
    "query": "query",
    "one-shot": "one-shot",
    "zero-shot": "no example, nothing patched",
    PATCHED: "no example, task vector",
    "truth": "truth",
}
"""The pictures of a row, and what is written under them."""

ROWS = 4
"""Rows of pictures, a task."""

BAR = "&nbsp;"
"""The head of a column of bars, which phones do without."""

INK = {"light": "#1c2126", "dark": "#e8e6e1"}


class Found(NamedTuple):
    """What a run left in its folder.

    Args:
        facts: run.json.
        results: Task → name of the fold ("" where there are none) → what its search found.
        scores: Name of the fold → `TaskVectors.score()`; none of a single task.
    """

    name: str
    facts: dict[str, Any]
    table: Table
    results: dict[str, dict[str, SearchResult]]
    scores: dict[str, ByStage]
    layout: Layout

    @property
    def tasks(self) -> list[Task]:
        return [registry.get(name) for name in self.facts["settings"]["tasks"]]


def read(run: str | os.PathLike) -> Found:
    """What a run left.

    Raises:
        FileNotFoundError: when the folder holds no run, or an unfinished one.
    """
    run = Path(run)
    if not (run / "run.json").is_file():
        raise FileNotFoundError(f"{run} holds no run.json; make it with `vtv run --out {run}`.")
    facts = json.loads((run / "run.json").read_text())
    names = facts["settings"]["tasks"]
    parts = {f"fold{fold}": run / f"fold{fold}" for fold in facts["settings"]["folds"]} or {"": run}
    for folder in parts.values():
        for name in names:
            if not (folder / "evaluation" / f"{name}.parquet").is_file():
                raise FileNotFoundError(f"{run} is not finished: {name} is not evaluated yet; run the same `vtv run`.")
    with quiet():
        tables = [
            _read_table(folder / "evaluation" / f"{name}.parquet", name) for name in names for folder in parts.values()
        ]
    results = {
        name: {part: SearchResult.load(folder / "search" / f"{name}.safetensors") for part, folder in parts.items()}
        for name in names
    }
    scores = {}
    if len(names) > 1:
        scores = {part: TaskVectors.load(folder / "vectors.safetensors").score() for part, folder in parts.items()}
    layout = next(iter(results[names[0]].values())).patches.space.layout
    return Found(run.name, facts, Table.cat(tables), results, scores, layout)


def write_pictures(path: Path, table: Table, task: Task) -> None:
    """Keep the first answers of an evaluation, which a Parquet file has no place for."""
    shown = table.pictures[task.name]
    write_tensors(path, "answers", shown, {"names": list(shown)})


def _read_table(path: Path, task: str) -> Table:
    tensors, facts = read_tensors(path.with_suffix(".safetensors"), "answers")
    return Table(Table.load(path).frame, {task: {name: tensors[name] for name in facts["names"]}})


def write(run: str | os.PathLike) -> Path:
    """Write report.html, table.csv, table.md and answers.png in a run's folder."""
    run, found = Path(run), read(run)
    found.table.csv(run / "table.csv")
    write_text(run / "table.md", found.table.markdown() + "\n")
    overview(found).savefig(run / "answers.png", dpi=150)
    lines = found.table.lines()
    body = [_head(found), _summary(found, lines)]
    body += [_task(found, task, [line for line in lines if line.task == task.name]) for task in found.tasks]
    body += [_scores(found), _legend(lines), _facts(found)]
    write_text(run / "report.html", _page(f"Visual task vectors: {found.name}", body))
    return run / "report.html"


def compare(runs: Sequence[str | os.PathLike], path: str | os.PathLike) -> Path:
    """Write a page that sets several runs side by side: their settings where they differ, the tasks that they share."""
    found = [read(run) for run in runs]
    if len({one.name for one in found}) < len(found):
        found = [one._replace(name=str(run)) for one, run in zip(found, runs)]
    shared = [task for task in found[0].tasks if all(task in one.tasks for one in found)]
    if not shared:
        raise ValueError(f"{', '.join(one.name for one in found)} have no task in common; there is nothing to compare.")
    body = [f"<h1>{len(found)} runs compared</h1>", _differences(found)]
    lines = {one.name: one.table.lines() for one in found}
    for task in shared:
        body.append(
            _compared(
                found, task, {name: [line for line in own if line.task == task.name] for name, own in lines.items()}
            )
        )
    body.append(_legend([line for own in lines.values() for line in own]))
    write_text(path, _page("Visual task vectors: runs compared", body))
    return Path(path)


def overview(found: Found, row: int = 0) -> Figure:
    """A row of pictures for every task: example, query, answers, truth."""
    figure = Figure(figsize=(1.5 * len(SHOWN), 1.65 * len(found.tasks)), layout="constrained")
    panels = figure.subplots(len(found.tasks), len(SHOWN), squeeze=False)
    for number, (task, across) in enumerate(zip(found.tasks, panels)):
        pictures = _cells(found, task)
        for panel, (name, label) in zip(across, SHOWN.items()):
            panel.imshow(pictures[name][row].permute(1, 2, 0).numpy())
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            if number == 0:
                panel.set_title(label.replace(", ", ",\n"), fontsize=8)
        across[0].set_ylabel(task.name, fontsize=8)
    return figure


def _cells(found: Found, task: Task) -> dict[str, torch.Tensor]:
    """The pictures of `SHOWN`, uint8 [row, 3, height, width], of the first prompts."""
    pictures = found.table.pictures[task.name]
    names = {"example_input", "example_output", "query"}
    return {n: crop(pictures["prompt"], n, found.layout) if n in names else pictures[n] for n in SHOWN}


def _head(found: Found) -> str:
    settings, machine = found.facts["settings"], found.facts["machine"]
    spent = duration(sum(found.facts["seconds"].values()))
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in found.facts["notes"])
    return f"""<h1>Visual task vectors</h1>
<p class=lead>Model <b>{escape(settings["model"])}</b>, pictures from <b>{escape(settings["data"])}</b>.
For every task, the mean activations of the attention heads over {settings["prompts"]} prompts were patched into
the model at units found by search (<i>{escape(settings["search"])}</i>), and the model was then asked to do the task
<b>with no example</b>, on {settings["evaluations"]} new queries. {spent} on {machine["processors"]} processors
({escape(machine["device"])}).</p>{notes}"""


def _summary(found: Found, lines: list[Line]) -> str:
    rows = []
    for task in found.tasks:
        scores = {line.condition: line for line in lines if line.task == task.name and line.measure == task.metric.name}
        cells = "".join(f"<td>{_number(scores[name].mean)}</td>" for name in ("one-shot", "zero-shot", PATCHED))
        rows.append(
            f"<tr><th scope=row><a href='#{escape(task.name)}'>{escape(task.name)}</a><td>{_metric(task)}{cells}"
            f"<td>{_size(found, task)}</tr>"
        )
    head = ("task", "metric", "one-shot", "no example, nothing patched", "no example, task vector", "units patched")
    return _table(head, rows)


def _task(found: Found, task: Task, lines: list[Line]) -> str:
    results = found.results[task.name]
    maps = [
        _figure(
            lambda result=result: search_plots.score_maps(result),
            f"{_scored(result)} of every unit{f', {part}' if part else ''}; the chosen ones are ringed.",
            wide=True,
        )
        for part, result in results.items()
        if result.patches.space.granularity != "token"
    ]
    searched = _figure(
        lambda: search_plots.curves({task.name: list(results.values())}),
        f"The search ({next(iter(results.values())).algorithm}): best held-out loss so far.",
    )
    return f"""<section id="{escape(task.name)}"><h2>{escape(task.name)}</h2>
<p>{_sentence(found, task, lines)}</p>
{_pictures(found, task)}
{_results(task, lines)}
<div class=figures>{"".join(maps)}{searched}</div></section>"""


def _sentence(found: Found, task: Task, lines: list[Line]) -> str:
    scores = {line.condition: line for line in lines if line.measure == task.metric.name}
    patched, shown, bare = scores[PATCHED], scores[BASELINE], scores["zero-shot"]
    sure = patched.difference_low > 0 or patched.difference_high < 0
    better = (patched.difference > 0) == task.higher_is_better
    verdict = ("better than" if better else "worse than") if sure else "not told apart from"
    return (
        f"With {_size(found, task)} units patched and no example, {_metric(task)} is <b>{_number(patched.mean)}</b>: "
        f"{verdict} one-shot ({_number(shown.mean)}). With nothing patched it is {_number(bare.mean)}."
    )


def _pictures(found: Found, task: Task) -> str:
    cells = _cells(found, task)
    rows = min(ROWS, len(cells["truth"]))
    figures = []
    for i in range(rows):
        for name, label in SHOWN.items():
            score = _number(found.table.values(task.name, name)[i]) if name in CONDITIONS else "&nbsp;"
            alt = f"{label}, row {i + 1}"
            figures.append(
                f"<figure><img src='{_uri(cells[name][i])}' alt='{escape(alt)}'>"
                f"<figcaption><b>{label}</b> <span>{score}</span></figcaption></figure>"
            )
    return f"<div class=row>{''.join(figures)}</div>"


def _results(task: Task, lines: list[Line]) -> str:
    scores = [line for line in lines if line.measure == task.metric.name]
    losses = {line.condition: line for line in lines if line.measure != task.metric.name}
    low, high = min(line.low for line in scores), max(line.high for line in scores)
    rows = []
    for line in scores:
        mark = " class=mark" if line.condition == PATCHED else ""
        loss = losses[line.condition]
        rows.append(
            f"<tr{mark}><th scope=row>{escape(line.condition)}<td class=bar>{_bar(line, low, high)}"
            f"<td>{_interval(line.mean, line.low, line.high)}"
            f"<td>{_interval(line.difference, line.difference_low, line.difference_high, sign='+')}"
            f"<td>{_interval(loss.mean, loss.low, loss.high)}</tr>"
        )
    head = ("", BAR, _metric(task), f"difference to {BASELINE}", "token loss ↓")
    return _table(head, rows) + f"<p class=small>{scores[0].images} queries; 95 % bootstrap intervals.</p>"


def _scores(found: Found) -> str:
    if not found.scores:
        return ""
    figures = [
        _figure(
            lambda scores=scores: plots.score_map(scores, found.layout),
            part or "Variance between tasks over variance within a task, head by head.",
            wide=True,
        )
        for part, scores in found.scores.items()
    ]
    return f"""<section><h2>Which heads tell the tasks apart</h2>
<p>A head whose mean differs between tasks more than it varies within one carries the task.</p>
<div class=figures>{"".join(figures)}</div></section>"""


def _differences(found: list[Found]) -> str:
    """The settings, of which those that do not differ are left out."""
    names = [
        name
        for name in found[0].facts["settings"]
        if len({json.dumps(one.facts["settings"].get(name)) for one in found}) > 1
    ]
    rows = [
        f"<tr><th scope=row>{escape(one.name)}"
        + "".join(f"<td>{escape(_word(one.facts['settings'].get(name)))}" for name in names)
        + f"<td>{duration(sum(one.facts['seconds'].values()))}</tr>"
        for one in found
    ]
    return _table(("run", *map(escape, names), "time"), rows)


def _compared(found: list[Found], task: Task, lines: dict[str, list[Line]]) -> str:
    metric = task.metric.name
    scores = {one.name: {line.condition: line for line in lines[one.name] if line.measure == metric} for one in found}
    everything = [line for own in scores.values() for line in own.values()]
    low, high = min(line.low for line in everything), max(line.high for line in everything)
    rows = []
    for one in found:
        own = scores[one.name]
        cells = "".join(
            f"<td>{_interval(own[name].mean, own[name].low, own[name].high)}" for name in (BASELINE, "zero-shot")
        )
        patched = own[PATCHED]
        rows.append(
            f"<tr><th scope=row>{escape(one.name)}{cells}<td class=bar>{_bar(patched, low, high)}"
            f"<td>{_interval(patched.mean, patched.low, patched.high)}<td>{_size(one, task)}</tr>"
        )
    head = ("run", BASELINE, "zero-shot", BAR, f"{PATCHED}, {_metric(task)}", "units")
    figure = _figure(
        lambda: search_plots.curves({one.name: list(one.results[task.name].values()) for one in found}),
        "The searches: best held-out loss so far.",
    )
    return f"<section><h2>{escape(task.name)}</h2>{_table(head, rows)}<div class=figures>{figure}</div></section>"


def _legend(lines: Iterable[Line]) -> str:
    names = {line.condition for line in lines}
    words = {n: text for n, text in CONDITIONS.items() if n in names or n.endswith("…")}
    items = "".join(f"<dt>{escape(name)}<dd>{escape(text)}" for name, text in words.items())
    return f"<section><h2>What is compared</h2><dl>{items}</dl></section>"


def _facts(found: Found) -> str:
    facts = found.facts
    times = "".join(f"<tr><th scope=row>{escape(step)}<td>{duration(s)}</tr>" for step, s in facts["seconds"].items())
    return f"""<section><h2>How it was made</h2>
<table class=times>{times}</table>
<details><summary>Settings, versions, machine</summary><pre>{escape(json.dumps(facts, indent=1))}</pre></details>
<p class=small>The method: Hojel et al., <i>Finding Visual Task Vectors</i>, ECCV 2024. The model: Bar et al., <i>Visual
Prompting via Image Inpainting</i>, NeurIPS 2022.</p></section>"""


def _size(found: Found, task: Task) -> str:
    sizes = [len(result.patches) for result in found.results[task.name].values()]
    total = len(next(iter(found.results[task.name].values())).patches.space)
    return f"{', '.join(map(str, sizes))} of {total}"


def _scored(result: SearchResult) -> str:
    return "Probability" if result.probabilistic else "Score"


def _metric(task: Task) -> str:
    return task.metric.label


def _word(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}".replace("-", "−")


def _interval(mean: float, low: float, high: float, sign: str = "") -> str:
    if mean != mean:
        return "<span class=none>–</span>"
    return f"{_number(mean, sign)} <small>{_number(low, sign)} to {_number(high, sign)}</small>"


def _bar(line: Line, low: float, high: float) -> str:
    """A mean with its interval, on the scale from `low` to `high`."""
    spread = (high - low) or 1.0
    mean, left, right = (3 + 94 * (value - low) / spread for value in (line.mean, line.low, line.high))
    return (
        f"<svg viewBox='0 0 100 10' width=100 height=10 aria-hidden=true><path d='M0 5H100' class=rail />"
        f"<path d='M{left:.1f} 5H{right:.1f}' class=range /><circle cx={mean:.1f} cy=5 r=2.8 /></svg>"
    )


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    top = "".join(f"<th scope=col{' class=bar' if cell == BAR else ''}>{cell}" for cell in head)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _figure(draw: Callable[[], Figure], caption: str, wide: bool = False) -> str:
    """A figure drawn twice, in light and in dark, on no background."""
    uris = {}
    for theme, ink in INK.items():
        keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        with matplotlib.rc_context(dict.fromkeys(keys, ink) | {"legend.framealpha": 0.0, "font.size": 9}):
            buffer, figure = io.BytesIO(), draw()
            figure.savefig(buffer, format="png", dpi=144, transparent=True)
            uris[theme] = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    width = int(96 * figure.get_figwidth())
    return (
        f"<figure class='{'wide' if wide else ''}'><div class=scroll><picture>"
        f"<source media='(prefers-color-scheme: dark)' srcset='{uris['dark']}'>"
        f"<img src='{uris['light']}' width={width} alt='{escape(caption, quote=True)}'></picture></div>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _uri(pixels: torch.Tensor) -> str:
    """A picture, uint8 [3, height, width], as a data URI."""
    buffer = io.BytesIO()
    to_pil(pixels.float() / 255).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _page(title: str, body: Iterable[str]) -> str:
    style = (files("vtv_nnsight.report") / "report.css").read_text()
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta name=viewport content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{style}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
