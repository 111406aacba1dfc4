"""What a run found, as a page to read: one HTML file with everything in it, for a screen or a phone, light or dark.

    >>> report.write("runs/scenes")                                   # runs/scenes/report.html
    >>> report.compare(["runs/a", "runs/b"], "comparison.html")       # or `vtv report runs/a runs/b`

Beside report.html stand the same numbers (table.csv, table.md), a picture of some answers (answers.png), and in
figures/ each figure as PNG and SVG with its numbers as CSV, which the page links to. The pages are Jinja2 templates
(templates/), which escape all that they are given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import partial, reduce
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vtv_nnsight import plots
from vtv_nnsight.evaluation import Line, best_others, vector_pairs, verdicts
from vtv_nnsight.evaluation.conditions import BASELINE, CEILING, FLOOR, OTHER, PATCHED, RANDOM, ZERO_SHOT
from vtv_nnsight.evaluation.random_controls import specific_sentence, task_verdict
from vtv_nnsight.files import write_picture, write_text
from vtv_nnsight.models import PAPERS
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.report import numbers
from vtv_nnsight.report.attention import looks
from vtv_nnsight.report.pictures import (
    Drawn,
    Keep,
    all_searches,
    draw,
    keep_file,
    overview,
    plain_label,
    prompt_cells,
    searches,
    uri,
)
from vtv_nnsight.report.play import moving, playground, still
from vtv_nnsight.report.reading import CONDITIONS, PICTURES, RunResults, load_run
from vtv_nnsight.search import plots as search_plots
from vtv_nnsight.tasks import Task
from vtv_nnsight.text import duration, in_words, join_words

ROWS = 4
"""Rows of pictures per task."""

SUMMARY = (BASELINE, ZERO_SHOT, PATCHED, RANDOM, CEILING, FLOOR)
"""The conditions of the table on top."""

Lines = dict[str, dict[str, Line]]
"""Of a task: "score" or "loss" → condition → its line of the table."""


def write(run: str | os.PathLike) -> Path:
    """Write report.html, table.csv, table.md, answers.png and figures/ in a run's folder."""
    run, found = Path(run), load_run(run)
    keep = partial(keep_file, run)
    found.table.to_csv(run / "table.csv")
    write_text(run / "table.md", "\n\n".join([found.table.markdown(), *verdicts(found.table)]) + "\n")
    write_picture(run / "answers.png", overview(found).savefig, dpi=150)
    lines, record = found.lines(), found.record
    shared = _shared(found)
    page = _render(
        "run.html",
        title=f"Visual task vectors: {found.name}",
        settings=record["settings"],
        machine=record["machine"],
        notes=record["notes"],
        seconds=record["seconds"],
        spent=duration(found.seconds),
        record=json.dumps(record, indent=1),
        patched=PATCHED,
        paper=PAPERS.get(_space(found).fingerprint.get("model")),
        prompt=prompt_cells(found),
        marked=[(1, 2)],
        units=len(_space(found)),
        places=_places(found),
        parts=join_words(PARTS[site][0] for site in _space(found).sites),
        unit=_unit(found),
        summary=_summary(found, lines),
        words=_words(condition for task in lines.values() for condition in task["score"]),
        tasks=[_task(found, task, lines[task.name], keep) for task in found.tasks],
        scores=[
            draw(
                partial(plots.score_map, scores, found.layout),
                f"{fold or f'Each cell is {_unit(found)}'}: the variance between tasks over that within a task, at "
                "each place.",
                wide=True,
                keep=keep,
                name=_file_name("scores", fold),
                numbers=numbers.of_scores(scores, found.layout),
            )
            for fold, scores in found.scores.items()
        ],
        searches=_searches(found, lines, keep),
        matrix=_matrix(found, keep),
        overlap=_overlap(found, keep),
        shared=shared,
        hero=_hero(found),
        script=(files("vtv_nnsight.report") / "report.js").read_text(encoding="utf-8"),
    )
    write_text(run / "report.html", page)
    return run / "report.html"


def compare(runs: Sequence[str | os.PathLike], path: str | os.PathLike) -> Path:
    """Write a page that sets several runs side by side: their settings where they differ; for each task that they share
    their scores, their answers to the same queries, and how far the units agree that they found."""
    found = [load_run(run) for run in runs]
    if len({one.name for one in found}) < len(found):
        found = [one._replace(name=str(run)) for one, run in zip(found, runs)]
    shared = [task for task in found[0].tasks if all(task in one.tasks for one in found)]
    if not shared:
        raise ValueError(f"{', '.join(one.name for one in found)} have no task in common; there is nothing to compare.")
    settings = [
        name
        for name in found[0].record["settings"]
        if len({json.dumps(one.record["settings"].get(name)) for one in found}) > 1
    ]
    lines = {one.name: one.lines() for one in found}
    page = _render(
        "comparison.html",
        title="Visual task vectors: runs compared",
        settings=settings,
        runs=[
            {
                "name": one.name,
                "settings": [in_words(one.record["settings"].get(name)) for name in settings],
                "seconds": one.seconds,
            }
            for one in found
        ],
        patched=PATCHED,
        words=_words((BASELINE, ZERO_SHOT, PATCHED)),
        script="",
        tasks=[
            _compared(found, task, {name: own[task.name]["score"] for name, own in lines.items()}) for task in shared
        ],
    )
    write_text(path, page)
    return Path(path)


def _summary(found: RunResults, lines: dict[str, Lines]) -> dict[str, Any]:
    shown = [name for name in SUMMARY if any(name in own["score"] for own in lines.values())]
    rows = [
        {
            "task": task.name,
            "metric": task.metric.label,
            "scores": [own.mean if (own := lines[task.name]["score"].get(name)) else None for name in shown],
            "size": _size(found, task),
        }
        for task in found.tasks
    ]
    return {"head": ["task", "metric", *shown, "units patched"], "rows": rows}


def _task(found: RunResults, task: Task, lines: Lines, keep: Keep) -> dict[str, Any]:
    scores, results, shown = lines["score"], found.results[task.name], found.shown.get(task.name)
    patched, copied = scores[PATCHED], scores.get(FLOOR)
    sure = patched.difference_low > 0 or patched.difference_high < 0
    better = (patched.difference > 0) == task.metric.higher_is_better
    maps = [
        draw(
            partial(search_plots.score_maps, result),
            f"{'Probability' if result.probabilistic else 'Score'} of every unit{f', {fold}' if fold else ''}: each "
            f"cell is {_unit(found)}, each panel a place. The ringed units are patched.",
            wide=True,
            keep=keep,
            name=_file_name(task.name, "units", fold),
            numbers=numbers.of_units(result),
        )
        for fold, result in results.items()
        if result.patches.space.granularity != "token"
    ]
    return {
        "name": task.name,
        "size": _size(found, task),
        "metric": task.metric.label,
        "patched": patched.mean,
        "one_shot": scores[BASELINE].mean,
        "zero_shot": scores[ZERO_SHOT].mean,
        "verdict": ("better than" if better else "worse than") if sure else "not told apart from",
        "copied": copied.mean if copied else None,
        "ceiling": scores[CEILING].mean if CEILING in scores else None,
        "controls": task_verdict(found.table, task.name)[1:],
        "pictures": _pictures(found, task),
        "rows": min(ROWS, len(found.table.pictures[task.name]["truth"])),
        "queries": patched.images,
        "loss": f"{lines['loss'][PATCHED].measure} ↓",
        "lines": [(line, lines["loss"][name]) for name, line in scores.items()],
        "low": min(line.low for line in scores.values()),
        "high": max(line.high for line in scores.values()),
        "figures": maps,
        "play": playground(shown, task, _space(found), keep) if shown else None,
        "looks": looks(shown, found.layout, keep) if shown else None,
    }  # fmt: skip


def _searches(found: RunResults, lines: dict[str, Lines], keep: Keep) -> Drawn:
    """The searches of all tasks. Lines of other conditions stand beside them where they are of the same loss."""
    results = {name: list(folds.values()) for name, folds in found.results.items()}
    searched = str(found.record["settings"].get("loss"))
    same = f"{searched.removesuffix('s').replace('_', ' ')} loss" == found.table.frame.loss_name.iloc[0]
    bounds = {
        name: {condition: own["loss"][condition].mean for condition in (BASELINE, ZERO_SHOT)} if same else {}
        for name, own in lines.items()
    }
    algorithm = next(iter(results.values()))[0].algorithm
    beside = " Lines: the loss without a vector, on the test prompts." if same else ""
    caption = f"The searches ({algorithm}): best held-out loss so far; lower is better.{beside}"
    curves, drawn = numbers.of_searches(results), partial(all_searches, results, bounds)
    return draw(drawn, caption, wide=True, keep=keep, name="searches", numbers=curves)


def _hero(found: RunResults) -> dict[str, Any] | None:
    """The demonstration that the page begins with: of the first task that has one."""
    shown = next((found.shown[task.name] for task in found.tasks if task.name in found.shown), None)
    if shown is None:
        return None
    metric = next(task.metric.label for task in found.tasks if task.name == shown.task)
    scores = shown.scores["scale"]
    about = {"task": shown.task, "metric": metric, "first": scores[0], "last": scores[-1], "queries": shown.queries}
    return about | {"moving": moving(shown), "still": still(shown)}


def _pictures(found: RunResults, task: Task) -> list[dict[str, Any]]:
    cells = found.cells(task)
    scores = {name: found.table.values(task.name, name) for name in PICTURES if name in CONDITIONS}
    return [
        {
            "uri": uri(cells[name][row]),
            "row": row + 1,
            "label": label,
            "score": float(scores[name][row]) if name in scores else None,
        }
        for row in range(min(ROWS, len(cells["truth"])))
        for name, label in PICTURES.items()
    ]


def _compared(found: list[RunResults], task: Task, scores: dict[str, dict[str, Line]]) -> dict[str, Any]:
    everything = [line for own in scores.values() for line in own.values()]
    return {
        "name": task.name,
        "metric": task.metric.label,
        "low": min(line.low for line in everything),
        "high": max(line.high for line in everything),
        "runs": [
            {
                "name": one.name,
                "unpatched": [scores[one.name][name] for name in (BASELINE, ZERO_SHOT)],
                "patched": scores[one.name][PATCHED],
                "size": _size(one, task),
            }
            for one in found
        ],
        "answers": _answers(found, task),
        "others": [one.name for one in found if _asked(one) != _asked(found[0])],
        "searches": draw(
            partial(searches, {one.name: list(one.results[task.name].values()) for one in found}),
            "The searches: best held-out loss so far; lower is better.",
        ),
        "overlap": _agreement({one.name: _sets(one)[task.name] for one in found}),
    }


def _asked(found: RunResults) -> list[Any]:
    """What runs must have in common to have asked the same queries in the same order."""
    names = ("data", "test pictures", "test_prompts", "protocol", "seed")
    return [found.record["settings"].get(name) for name in names]


def _answers(found: list[RunResults], task: Task) -> list[dict[str, Any]]:
    """Rows of pictures: the first queries, their truths, and the answers of each run that asked them."""
    same = [one for one in found if _asked(one) == _asked(found[0])]
    cells = [one.cells(task) for one in same]
    count = min(ROWS, *(len(own["truth"]) for own in cells))
    rows = [
        {"name": name, "cells": [{"uri": uri(cell), "score": None} for cell in cells[0][name][:count]]}
        for name in ("query", "truth")
    ]
    for one, own in zip(same, cells):
        scores = one.table.values(task.name, PATCHED)
        answers = [{"uri": uri(cell), "score": float(score)} for cell, score in zip(own[PATCHED][:count], scores)]
        rows.append({"name": one.name, "cells": answers})
    return rows


def _agreement(sets: dict[str, PatchSet]) -> dict[str, Any] | None:
    """How far runs agree on units, which are compared by name, whatever the weights; None where names differ, or units
    are too many to draw."""
    space = next(iter(sets.values())).space
    if space.granularity == "token" or any(own.space.names != space.names for own in sets.values()):
        return None
    own = {plain_label(name): PatchSet(space, patches.choices) for name, patches in sets.items()}
    caption = "How alike the runs' sets are (Jaccard similarity), and how many runs patch each unit."
    shared = list(reduce(lambda a, b: a & b, own.values()))
    return {"figure": draw(partial(search_plots.overlap, own), caption, wide=True), "shared": shared}


def _sets(found: RunResults) -> dict[str, PatchSet]:
    """Of each task, the units that were found in every fold."""
    return {
        name: reduce(lambda a, b: a & b, (result.patches for result in folds.values()))
        for name, folds in found.results.items()
    }


def _shared(found: RunResults) -> list[str]:
    """The units that were found for every task."""
    return list(reduce(lambda a, b: a & b, _sets(found).values()))


def _overlap(found: RunResults, keep: Keep) -> list[Drawn]:
    sets = _sets(found)
    if len(sets) < 2 or _space(found).granularity == "token":
        return []
    caption = "How alike the tasks' sets are (Jaccard similarity), and how many tasks patch each unit."
    drawn = partial(search_plots.overlap, {plain_label(name): own for name, own in sets.items()})
    return [draw(drawn, caption, wide=True, keep=keep, name="overlap", numbers=numbers.of_sets(sets))]


def _matrix(found: RunResults, keep: Keep) -> dict[str, Any]:
    """Every task's vector at every task's units, and which tasks need their own."""
    if not found.table.frame.condition.str.startswith(OTHER).any():
        return {}
    pairs = vector_pairs(found.table)
    caption = (
        f"Every vector at the units of every task, on {pairs.images.min()} queries. The task's own is framed; a star "
        "marks the best of another task where the own is not surely better."
    )
    best = {row.task: row for row in best_others(pairs).itertuples()}
    return {
        "figure": draw(partial(plots.matrix, pairs), caption, wide=True, keep=keep, name="matrix", numbers=pairs),
        "specific": [name for name, row in best.items() if row.specific],
        "others": {name: specific_sentence(row) for name, row in best.items() if not row.specific},
    }


def _space(found: RunResults) -> Any:
    return next(iter(next(iter(found.results.values())).values())).patches.space


def _unit(found: RunResults) -> str:
    """What a unit is, in words, but for its place."""
    return join_words((PARTS[site][1] for site in _space(found).sites), "or")


def _places(found: RunResults) -> str:
    """Where a unit's head can be, in words."""
    space = _space(found)
    if space.granularity == "token":
        return "a single token"
    return join_words(dict.fromkeys(name for groups in space.groups.values() for name in groups), "or")


PARTS = {
    "heads": ("heads", "one attention head"),
    "attn": ("attention layers", "one attention layer"),
    "mlp": ("MLPs", "one MLP"),
    "residual": ("residual streams", "one layer's residual stream"),
}
"""Site → what lies there, and what a unit is."""


def _words(conditions: Iterable[str]) -> dict[str, str]:
    """What the conditions are that a page shows."""
    names = set(conditions)
    others = any(name.startswith(OTHER) for name in names)
    return {name: text for name, text in CONDITIONS.items() if name in names or (others and name.endswith("…"))}


def _size(found: RunResults, task: Task) -> str:
    results = found.results[task.name].values()
    return f"{', '.join(str(len(result.patches)) for result in results)} of {len(_space(found))}"


def _file_name(*names: str) -> str:
    """Names of what a figure shows, those that are not empty, as its file's name."""
    return "-".join(filter(None, names))


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}".replace("-", "−")


def _render(template: str, **content: Any) -> str:
    environment = Environment(
        loader=PackageLoader("vtv_nnsight.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": _number, "duration": duration}
    style = (files("vtv_nnsight.report") / "report.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(style=style, **content) + "\n"
