"""What a run found, as a page to read: one HTML file with everything in it, for a screen or a phone, light or dark.

    >>> report.write("runs/scenes")                                   # runs/scenes/report.html

Beside report.html stand the same numbers (table.csv, table.md) and a picture of some answers (answers.png).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from operator import and_
from pathlib import Path
from typing import Any

from vtv_nnsight.evaluation.conditions import BASELINE, CEILING, FEW_SHOT, FLOOR, OTHER, PATCHED, RANDOM, ZERO_SHOT
from vtv_nnsight.evaluation.table import ENOUGH
from vtv_nnsight.files import write_picture, write_text
from vtv_nnsight.models import PAPERS
from vtv_nnsight.report import plots
from vtv_nnsight.report.figures import Drawn, all_searches, draw
from vtv_nnsight.report.labels import SITES, legend, plain_label
from vtv_nnsight.report.pictures import first_pictures, overview, prompt_cells
from vtv_nnsight.report.play import attention_pictures, moving_and_still, playground
from vtv_nnsight.report.reading import Lines, RunResults, load_run
from vtv_nnsight.report.rendering import render
from vtv_nnsight.report.verdicts import (
    beats_copying,
    best_others,
    rank_among_draws,
    specific_tasks,
    specificity_sentences,
    task_verdict,
    transfer_sentence,
    vector_pairs,
    verdicts,
)
from vtv_nnsight.tasks import Task
from vtv_nnsight.text import join_words

SUMMARY = (BASELINE, ZERO_SHOT, PATCHED, RANDOM, CEILING, FLOOR)
"""The conditions of the table on top."""


def write(run: str | os.PathLike, results: RunResults | None = None) -> Path:
    """Write report.html, table.csv, table.md and answers.png in a run's folder; `results`, where they are at hand, are
    what `load_run` gives of it."""
    folder, results = Path(run), results or load_run(run)
    results.table.to_csv(folder / "table.csv")
    write_text(folder / "table.md", "\n\n".join([results.table.markdown(), *verdicts(results.table)]) + "\n")
    if not results.of_texts:
        write_picture(folder / "answers.png", overview(results).savefig, dpi=150)
    write_text(folder / "report.html", render("run.html", **_content(results)) + "\n")
    return folder / "report.html"


def _content(run: RunResults) -> dict[str, Any]:
    lines, space = run.lines(), run.space
    nearest = sorted(run.tasks, key=lambda task: _left(lines[task.name]))
    anew = None if run.anew is None else vector_pairs(run.anew)
    specific = {} if anew is None else specific_tasks(anew[anew.pictures >= ENOUGH])
    tasks = [_task(run, task, lines[task.name], specific) for task in nearest]
    groups = dict.fromkeys(name for groups in space.groups.values() for name in groups)
    return {
        "title": f"{'Task vectors' if run.of_texts else 'Visual task vectors'}: {run.name}",
        "run": run,
        "paper": PAPERS.get(space.fingerprint.get("model", "")),
        "prompt": prompt_cells(run),
        "places": "a single token" if space.granularity == "token" else join_words(groups, "or"),
        "parts": join_words(SITES[site][0] for site in space.sites),
        "unit": _unit(run),
        "asked": list(dict.fromkeys(task["scores"][PATCHED].asked for task in tasks)),
        "summary": [name for name in SUMMARY if any(name in task["scores"] for task in tasks)],
        "words": legend((condition for task in lines.values() for condition in task["score"]), run.of_texts),
        "shot": FEW_SHOT if run.of_texts else BASELINE,
        "tasks": tasks,
        "scores": [_scores(run, fold) for fold in run.scores],
        "searches": _searches(run, lines),
        "matrix": _matrix(run, anew),
        "overlap": _overlap(run),
        "shared": list(reduce(and_, run.sets.values())),
        "hero": _hero(run, nearest),
        "verdict": _verdict(run, tasks),
    }


def _task(run: RunResults, task: Task, lines: Lines, specific: Mapping[str, bool]) -> dict[str, Any]:
    scores, explorer = lines["score"], run.explorers.get(task.name)
    patched = scores[PATCHED]
    differs = patched.difference_low > 0 or patched.difference_high < 0
    better = (patched.difference > 0) == task.metric.higher_is_better
    ahead = "better than" if beats_copying(task.metric, scores) else "by the metric alone (see the floor) ahead of"
    verdict = (ahead if better else "worse than") if differs else "not told apart from"
    enough = patched.pictures >= ENOUGH
    return {
        "name": task.name,
        "metric": task.metric.label,
        "size": run.size(task),
        "scores": scores,
        "losses": lines["loss"],
        "verdict": verdict if enough else "no verdict against",
        "badges": _badges(run, task, verdict, specific) if enough else [f"{patched.asked}: too few for a verdict"],
        "controls": task_verdict(run.table, task.name)[enough:],
        "pictures": first_pictures(run, task),
        "figures": _units(run, task),
        "play": playground(explorer, task, run.space) if explorer else None,
        "looks": attention_pictures(explorer, run.layout) if explorer else None,
    }


def _units(run: RunResults, task: Task) -> list[Drawn]:
    """Which units were found for a task, in each fold."""
    if run.space.granularity == "token":
        return []
    figures = []
    for fold, result in run.results[task.name].items():
        caption = (
            f"{'Probability' if result.probabilistic else 'Score'} of every unit{f', {fold}' if fold else ''}: each "
            f"cell is {_unit(run)}, each panel a place. The ringed units are patched."
        )
        figures.append(draw(partial(plots.score_maps, result), caption))
    return figures


def _scores(run: RunResults, fold: str) -> Drawn:
    """Which places tell the tasks apart."""
    caption = (
        f"{fold or f'Each cell is {_unit(run)}'}: the variance between tasks over that within a task, at each place."
    )
    return draw(partial(plots.score_map, run.scores[fold], run.layout), caption)


def _searches(run: RunResults, lines: dict[str, Lines]) -> Drawn:
    """The searches of all tasks. Lines of other conditions stand beside them where they are of the same loss."""
    results = {name: list(folds.values()) for name, folds in run.results.items()}
    loss = f"{str(run.settings.get('loss')).removesuffix('s').replace('_', ' ')} loss"
    same = loss == run.table.frame.loss_name.iloc[0]
    bounds = {
        name: {condition: line["loss"][condition].mean for condition in (BASELINE, ZERO_SHOT)} if same else {}
        for name, line in lines.items()
    }
    algorithm = next(iter(results.values()))[0].algorithm
    beside = " Lines: the loss without a vector, on the test prompts." if same else ""
    caption = f"The searches ({algorithm}): best held-out loss so far; lower is better.{beside}"
    return draw(partial(all_searches, results, bounds), caption)


def _matrix(run: RunResults, anew: Any) -> dict[str, Any]:
    """Every task's vector at every task's units, and, where there are pairs, at units searched for each of these."""
    if not run.table.frame.condition.str.startswith(OTHER).any():
        return {}
    pairs = vector_pairs(run.table)
    asked = f"{pairs.pictures.min()} {'queries' if run.of_texts else 'pictures'}"
    caption = (
        f"Every vector at the units of every task, on {asked}. The task's own is framed; a star marks the best of "
        "another task where the own is not surely better."
    )
    best: Any = best_others(pairs).itertuples()
    titled = {"transfer at fixed units": pairs}
    if anew is not None:
        titled["units searched for each pair"] = anew
    return {
        "anew": [] if anew is None else specificity_sentences(anew),
        "figure": draw(partial(plots.matrix, titled), caption),
        "best": {row.task: transfer_sentence(row) for row in best if row.pictures >= ENOUGH},
    }


def _overlap(run: RunResults) -> list[Drawn]:
    """How alike the tasks' sets are."""
    sets = run.sets
    if len(sets) < 2 or run.space.granularity == "token":
        return []
    caption = "How alike the tasks' sets are (Jaccard similarity), and how many tasks patch each unit."
    figure = partial(plots.overlap, {plain_label(name): patches for name, patches in sets.items()})
    return [draw(figure, caption)]


def _hero(run: RunResults, tasks: Sequence[Task]) -> dict[str, Any] | None:
    """The moving picture that the page begins with: of the first of the tasks that was looked at closely."""
    for task in tasks:
        if explorer := run.explorers.get(task.name):
            return {"explorer": explorer, "metric": task.metric.label} | moving_and_still(explorer)
    return None


def _left(lines: Lines) -> float:
    """The share of the way from zero-shot to the ceiling that the vector leaves: the least is led with."""
    means = {name: line.mean for name, line in lines["score"].items()}
    way = means.get(CEILING, means[BASELINE]) - means[ZERO_SHOT]
    return abs(means.get(CEILING, means[BASELINE]) - means[PATCHED]) / (abs(way) or 1.0)


def _verdict(run: RunResults, tasks: Sequence[dict[str, Any]]) -> str:
    """What the run says of all tasks, in one sentence."""
    groups: dict[str, list[str]] = {}
    for task in tasks:
        groups.setdefault(task["verdict"], []).append(task["name"])
    parts = [f"{verdict} {run.example} on {join_words(names)}" for verdict, names in groups.items()]
    return f"With no example shown, the task vector is {'; '.join(parts)}."


def _badges(run: RunResults, task: Task, verdict: str, specific: Mapping[str, bool]) -> list[str]:
    """What is said of a task at a glance: against one example, against random units, and, where units were searched for
    each pair of a task and a vector, whether another vector may do as well."""
    badges = [f"{verdict} {run.example}"]
    if run.table.frame.query("task == @task.name").condition.eq(RANDOM).any():
        place = rank_among_draws(run.table, task.name)
        badges.append(f"beats {place.beaten} of {place.draws} draws of random units")
    if task.name in specific:
        badges.append("needs its own vector" if specific[task.name] else "another vector may do as well")
    return badges


def _unit(run: RunResults) -> str:
    """What a unit is, in words, but for its place."""
    return join_words((SITES[site][1] for site in run.space.sites), "or")
