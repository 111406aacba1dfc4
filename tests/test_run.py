"""`vtv run` and `vtv report`: what is written, what is done again, what is refused, and what the report says."""

import html
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import warnings
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import run
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm
from typer.testing import CliRunner

from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, cli, data, parallel, tasks
from vtv_nnsight.cli import start
from vtv_nnsight.digests import file_digest
from vtv_nnsight.evaluation import Table
from vtv_nnsight.files import read_json, write_json
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.progress import numbered_steps, progress_bar
from vtv_nnsight.report import comparison, explorer, figures, labels, pictures, reading
from vtv_nnsight.report import page as report
from vtv_nnsight.report.seeds import merge
from vtv_nnsight.report.verdicts import beats_copying, rank_among_draws, specific_tasks, vector_pairs, verdicts
from vtv_nnsight.runs import STEPS, bundles, outputs, pipeline
from vtv_nnsight.runs import folds as of_folds
from vtv_nnsight.runs import steps as runs
from vtv_nnsight.runs.settings import PUBLISHED, QUICK, Settings
from vtv_nnsight.search import Objective, SearchResult
from vtv_nnsight.vectors import TaskVectors

pytestmark = pytest.mark.timeout(900)

TASKS = ("segmentation", "lowlight")
SMALL = dict(tasks=TASKS, max_images=40, prompts=8, candidates=30, budget=200, test_prompts=8, draws=2, matrix=110)


@pytest.fixture(scope="module")
def model(tmp_path_factory, small_config):
    """A folder with a tiny untrained model."""
    folder = tmp_path_factory.mktemp("model")
    MAEVQGANModel(small_config()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    """A finished run. Copy it before you change it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    run(out, Settings(model=model, **SMALL), progress=False, jobs=1)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def done(monkeypatch):
    """The steps that did something, in order; the report is not drawn, which takes the longest."""
    steps = []
    monkeypatch.setattr(report, "write", lambda out: out / "report.html")
    for name in ("select", "collect", "search", "evaluate"):
        monkeypatch.setattr(runs, name, _noting(getattr(runs, name), name, steps))
    return steps


def _noting(function, name, steps):
    def noted(*args, **options):
        steps.append(name)
        return function(*args, **options)

    return noted


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".safetensors", ".csv")}


def test_a_run_writes_what_the_rest_of_the_library_reads(finished, model):
    facts = json.loads((finished / "run.json").read_text())
    assert facts["settings"]["budget"] == 200 and facts["settings"]["tasks"] == list(TASKS)
    assert list(facts["seconds"]) == [*STEPS, "report"] and all(s >= 0 for s in facts["seconds"].values())
    assert {"python", "torch", "nnsight"} <= facts["versions"].keys() and facts["notes"] == []
    vectors = TaskVectors.load(finished / "vectors.safetensors")
    assert [(name, vector.count) for name, vector in vectors.items()] == [(name, 8) for name in TASKS]
    for name in TASKS:
        found = SearchResult.load(finished / "search" / f"{name}.safetensors")
        assert found.evaluations <= 200 and len(found.patches.space) == 2 * 4 * 2 + 2 * 3
        table = Table.load(finished / "evaluation" / f"{name}.parquet")
        assert len(table.values(name, "task vector")) == 8
    units = (finished / "scores.csv").read_text().splitlines()
    assert units[0] == "unit,score" and len(units) == 1 + 22 and "attn.heads[" in units[1]
    assert not [path for path in finished.rglob("*") if path.suffix in (".journal", ".state", ".tmp")]


def test_every_vector_is_searched_for_on_every_task_where_asked(finished):
    for name, other in (TASKS, TASKS[::-1]):
        table = Table.load(finished / "matrix" / f"{name}.parquet")
        assert set(table.frame.condition) == {"task vector", f"vector of {other}"}
        assert len(table.values(name, f"vector of {other}")) == 8
    page = html.unescape((finished / "report.html").read_text())
    assert "Of units searched for each pair, no other vector does as well" in page
    conditions = set(Table.load(finished / "evaluation" / "lowlight.parquet").frame.condition)
    assert conditions >= {"noise vector", "mean over tasks", "wrong example", "blank example", "matched random units"}


def test_kept_prompts_are_exact(tmp_path, model):
    layout = MAEVQGAN(model).layout
    rows = data.scenes("train", 40, 0)
    made = runs.select(runs.Setup(Settings(**SMALL | {"prompts": 20}), MAEVQGAN(model)), tasks.lowlight, rows)
    assert (made.canvas == tasks.lowlight.prompts(rows, 20, 0, layout).canvas).all()
    outputs.write_prompts(tmp_path / "prompts.safetensors", made)
    read = outputs.read_prompts(tmp_path / "prompts.safetensors", layout)
    assert (read.canvas == made.canvas).all()


def test_a_finished_run_is_not_done_again(copy, model, done):
    before = times(copy)
    assert run(copy, Settings(model=model, **SMALL), progress=False) == copy / "report.html"
    assert done == [] and times(copy) == before


def test_an_interrupted_run_goes_on_and_ends_the_same(finished, model, tmp_path, monkeypatch, done):
    settings = Settings(model=model, **SMALL)
    asked = []

    def interrupt(*args, **options):
        asked.append(args)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return losses(*args, **options)

    losses = Objective._losses
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Objective, "_losses", interrupt)
        run(tmp_path / "run", settings, progress=False)
    assert (tmp_path / "run" / "search" / "segmentation.journal").exists()
    assert done == ["select", "select", "collect", "search"]
    run(tmp_path / "run", settings, progress=False)
    assert done[4:] == ["search", "search", "evaluate", "evaluate"]
    for name in TASKS:
        one, other = (SearchResult.load(out / "search" / f"{name}.safetensors") for out in (finished, tmp_path / "run"))
        assert one.patches == other.patches and one.held_out_loss == other.held_out_loss
        one, other = (Table.load(out / "evaluation" / f"{name}.parquet") for out in (finished, tmp_path / "run"))
        assert one.frame.equals(other.frame)


def test_a_changed_setting_is_refused_or_done_again(copy, model, done):
    changed = Settings(model=model, **SMALL | {"test_prompts": 4})
    before = times(copy)
    with pytest.raises(ValueError, match=r"test_prompts was 8 and is 4, .*\. Name another folder, or do evaluate"):
        run(copy, changed, progress=False)
    assert times(copy) == before and done == []
    vectors, found = (copy / "vectors.safetensors").read_bytes(), times(copy / "search")
    run(copy, changed, redo=True, progress=False)
    assert done == ["evaluate", "evaluate"]
    assert (copy / "vectors.safetensors").read_bytes() == vectors and times(copy / "search") == found
    assert len(Table.load(copy / "evaluation" / "lowlight.parquet").values("lowlight", "one-shot")) == 4


def flip(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(folder):
    """Give two searches each other's names."""
    one, other = (folder / "search" / f"{name}.safetensors" for name in TASKS)
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)


@pytest.mark.parametrize(
    ("damage", "name", "again"),
    [
        (lambda out: flip(out / "prompts" / "lowlight.safetensors"), "prompts", ["select"]),
        (lambda out: flip(out / "vectors.safetensors"), "vectors", ["collect"]),
        (swap, "search/segmentation.safetensors, .*search/lowlight", ["search"] * 2),
        (lambda out: flip(out / "search" / "lowlight.safetensors"), "lowlight", ["search"]),
        (lambda out: flip(out / "evaluation" / "lowlight.safetensors"), "lowlight", ["evaluate"]),
        (lambda out: flip(out / "evaluation" / "lowlight.parquet"), "lowlight.parquet", ["evaluate"]),
    ],
)
def test_a_file_that_was_changed_is_named_and_made_again(copy, finished, model, done, damage, name, again):
    settings = Settings(model=model, **SMALL)
    damage(copy)
    with pytest.raises(ValueError, match=f"{name}.*not as this run wrote it; put it back, or do .*redo"):
        run(copy, settings, progress=False)
    for read in (reading.load_run, *([bundles.load] if "search" in again else [])):
        with pytest.raises(ValueError, match=f"{name}.*not as it was written"):
            read(copy)
    assert done == []
    run(copy, settings, redo=True, progress=False)
    assert done == again  # what was made of it is as it was
    assert files(copy) == files(finished)


def files(folder):
    """Name → content of what the steps of a run wrote."""
    kinds = (".safetensors", ".csv", ".parquet")
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.suffix in kinds}
    return {name: path.read_bytes() for name, path in found.items() if name != "table.csv"}


def test_a_file_that_no_run_wrote_is_not_used(copy, finished, model, done):
    """As when the program was killed between a file and its record, or somebody put one there."""
    record = read_json(copy / "run.json")
    del record["files"]["search/lowlight.safetensors"]
    write_json(copy / "run.json", record)
    (copy / "search" / "lowlight.safetensors").write_bytes(b"not a search")
    run(copy, Settings(model=model, **SMALL), progress=False)
    assert done == ["search"] and files(copy) == files(finished)


def replace_text(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out: (out / "run.json").write_text('{"kind": "vtv run"}'), "run.json is not as it was written"),
        (lambda out: (out / "run.json").write_text(""), "run.json is not as it was written"),
        (lambda out: replace_text(out / "run.json", '"seed": 0', '"seed": 1'), "run.json is not as it was written"),
        (
            lambda out: write_json(
                out / "run.json", read_json(out / "run.json") | {"files": {"../thesis.safetensors": "0"}}
            ),
            "names files that no run writes",
        ),
        (
            lambda out: ((out / "vectors.safetensors").unlink(), (out / "vectors.safetensors").mkdir()),
            "is a folder where a run keeps a file|vectors.safetensors: not as it was written",
        ),
    ],
)
def test_a_damaged_folder_is_one_sentence(copy, model, done, damage, words):
    damage(copy)
    for call in (lambda: run(copy, Settings(model=model, **SMALL), progress=False), lambda: reading.load_run(copy)):
        with pytest.raises(ValueError, match=words):
            call()
    assert done == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda out, path: path.write_bytes((out / "evaluation" / "segmentation.parquet").read_bytes()),
            "is of segmentation; expected an evaluation of lowlight",
        ),
        (
            lambda out, path: Table(Table.load(path).frame.query("condition != 'one-shot'")).to_parquet(path),
            "lacks the conditions one-shot",
        ),
    ],
)
def test_an_evaluation_of_something_else_is_one_sentence(copy, damage, words):
    """Whatever the record says."""
    path = copy / "evaluation" / "lowlight.parquet"
    damage(copy, path)
    record = read_json(copy / "run.json")
    record["files"]["evaluation/lowlight.parquet"] = file_digest(path)
    write_json(copy / "run.json", record)
    with pytest.raises(ValueError, match=words):
        reading.load_run(copy)


@pytest.mark.parametrize("method", ["default", pytest.param("spawn", marks=pytest.mark.slow)])
def test_jobs_write_what_one_process_writes(finished, model, tmp_path, monkeypatch, method, done):
    if method == "spawn":  # as where processes cannot be forked
        pool = partial(parallel.ProcessPoolExecutor, mp_context=get_context("spawn"))
        monkeypatch.setattr(parallel, "ProcessPoolExecutor", pool)
    run(tmp_path / "run", Settings(model=model, **SMALL), progress=False, jobs=2)
    steps = {name: content for name, content in files(finished).items()}
    assert files(tmp_path / "run") == steps and done == ["collect"]  # all else in the workers


def test_jobs_that_are_stopped_go_on(finished, model, tmp_path, monkeypatch, done):
    """One worker fails in the middle of a search: the others end with it, and the same command goes on."""
    settings, losses = Settings(model=model, **SMALL), Objective._losses

    def fail(self, *args, **options):
        if self.tasks[0].name == "lowlight" and self.evaluations > 60:
            raise OSError("the disk is gone")
        return losses(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(Objective, "_losses", fail)
        run(tmp_path / "run", settings, progress=False, jobs=2)
    assert not multiprocessing.active_children() and (tmp_path / "run/search/lowlight.journal").exists()
    run(tmp_path / "run", settings, progress=False, jobs=1)
    steps = {name: content for name, content in files(finished).items()}
    assert files(tmp_path / "run") == steps


@pytest.mark.slow
def test_two_processes_write_what_one_writes(finished, model, tmp_path):
    script = tmp_path / "run.py"
    settings = f"Settings(model={model!r}, **{SMALL!r})"
    script.write_text(
        "from vtv_nnsight.report import explorer, page\nfrom vtv_nnsight.runs import Settings, run\n"
        f"run({str(tmp_path / 'run')!r}, {settings}, progress=False, explore=explorer.demonstrate, report=page.write)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", script]
    package = str(Path(__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": package}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files(tmp_path / "run") == files(finished)
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": 20}, "budget=20 is too small for reinforce"),
        ({"search": "greedy", "budget": 30}, "budget=30 is too small for greedy"),
        ({"search": "gates", "loss": "pixels"}, "loss='pixels' has no gradient"),
        ({"loss": "taste"}, "loss='taste' is unknown; choose from tokens, pixels"),
        ({"search": "ranking", "tasks": ("lowlight",)}, "give two tasks or more"),
        ({"candidates": 5}, "candidates=5 are fewer than the prompts=8"),
        ({"prompts": 1}, "1 prompts and held_out=0.25 leave 0 to train on"),
    ],
)
def test_settings_are_tried_before_the_first_step(model, tmp_path, done, change, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "run", Settings(model=model, **SMALL | change), progress=False)
    assert done == [] and not (tmp_path / "run").exists()


def test_single_steps_are_those_of_a_run(finished, model, tmp_path):
    """`vtv collect` and `vtv search` write what `vtv run` writes."""
    args = ["--max-images", 40, "--prompts", 8, "--candidates", 30, "--tasks", ",".join(TASKS)]
    vectors, found = tmp_path / "vectors.safetensors", tmp_path / "found.safetensors"
    for command in (
        ["collect", model, *args, "-o", vectors],
        ["search", model, *args[:-1], "lowlight", "--vectors", vectors, "--budget", 200, "-o", found],
    ):
        result = CliRunner().invoke(cli.app, list(map(str, command)))
        assert result.exit_code == 0, result.output
    assert vectors.read_bytes() == (finished / "vectors.safetensors").read_bytes()
    assert found.read_bytes() == (finished / "search" / "lowlight.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed was 0 and is 1.*or do select, collect, score, search, evaluate, demonstrate, matrix again"),
        ({"budget": 300}, "budget was 200 and is 300.*or do search, evaluate, demonstrate, matrix again"),
        ({"tasks": ("lowlight",)}, "tasks was segmentation, lowlight and is lowlight"),
    ],
)
def test_what_depends_on_a_setting_is_named(finished, model, change, words):
    with pytest.raises(ValueError, match=words):
        run(finished, Settings(model=model, **SMALL | change), progress=False)


def test_other_weights_are_noticed(finished, small_config, tmp_path, model):
    MAEVQGANModel(small_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights was .* and is"):
        run(finished, Settings(model=str(tmp_path), **SMALL), progress=False)


def test_a_folder_of_something_else_is_left_alone(tmp_path, model):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run(tmp_path, Settings(model=model, **SMALL), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture
def photographs(tmp_path):
    """A folder of pictures of all kinds, two of which are broken and one tiny."""
    folder = tmp_path / "photographs"
    (folder / "deeper").mkdir(parents=True)
    for i, row in enumerate(data.scenes("train", 10)):
        picture = row["image"].resize((40 + 9 * i, 64)).convert("L" if i == 3 else "RGB")
        picture.save(folder / f"{i}.{'jpg' if i % 2 else 'png'}")
    (folder / "deeper" / "cut.jpg").write_bytes((folder / "1.jpg").read_bytes()[:300])
    (folder / "broken.png").write_text("not a picture")
    Image.new("RGB", (3, 3)).save(folder / "dot.png")
    return folder


@pytest.mark.slow
def test_ones_own_pictures(photographs, model, tmp_path):
    """Tasks are those that need no masks; of one task there is no score to show."""
    settings = Settings(model=model, data=str(photographs), **SMALL | {"tasks": ("inpainting",)})
    page = run(tmp_path / "run", settings, progress=False).read_text()
    broken, few, *shared = json.loads((tmp_path / "run" / "run.json").read_text())["notes"]
    assert all("share pictures with training prompts" in note and note in page for note in shared)
    assert "3 of 13 files" in broken and all(name in broken for name in ("broken.png", "deeper/cut.jpg", "dot.png"))
    assert "8 pictures to learn from are few" in few and "deeper/cut.jpg" in page
    assert "Which heads" not in page and not (tmp_path / "run" / "scores.csv").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = data.folder(photographs)
    servable = runs.servable(Settings(), rows)
    assert [task.name for task in servable] == ["lowlight", "identity", "inpainting", "colorization"]
    (photographs / "new.png").write_bytes((photographs / "0.png").read_bytes())
    with pytest.raises(ValueError, match="pictures was"):
        run(tmp_path / "run", settings, progress=False)


def test_what_pictures_cannot_serve(photographs, model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="'segmentation' needs a column 'mask', and the data have image"):
            run(tmp_path / "run", Settings(model=model, data=str(photographs), **SMALL), progress=False)
    with pytest.raises(ValueError, match="'pictures' has no folds"):
        run(tmp_path / "run", Settings(model=model, folds=(1,), **SMALL), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"search": "luck"},
        {"dtype": "int8"},
        {"prompts": 0},
        {"test_prompts": -1},
        {"draws": 2.5},
        {"seed": "1"},
        {"seed": True},
        {"folds": 4},
    ],
)
def test_settings_that_lead_nowhere_are_refused_at_once(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"^{name}={value!r} "):
        Settings(**wrong if name != "folds" else {"folds": (0, value)})


def test_doubled_names_count_once_in_every_list(vtv):
    names = {"tasks": ("lowlight", "identity", " lowlight"), "sites": ("mlp", "heads", "mlp"), "folds": (2, 0, 2)}
    settings = Settings(data="pascal:/voc", **names)
    assert (settings.tasks, settings.sites, settings.folds) == (("lowlight", "identity"), ("heads", "mlp"), (0, 2))
    doubled = {"tasks": "lowlight,identity,lowlight", "sites": "mlp,heads, mlp", "folds": "2,0,2"}
    options = [word for name, value in doubled.items() for word in (f"--{name}", value)]
    assert vtv("run", "--data", "pascal:/voc", *options)[2][1] == settings
    with pytest.raises(ValueError, match="named twice"):
        comparison.compare(["a", "b", "./a"], "page.html")


def test_tasks_come_from_what_the_data_serve(photographs):
    """In every command that has not been told them, `vtv run --quick` too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pictures, masks = data.folder(photographs), data.pictures("test", 4)
    quick, one = Settings(**QUICK), Settings(most_tasks=1)
    for given, names in (
        ((quick, masks), ["segmentation", "lowlight"]),
        ((quick, pictures), ["lowlight", "identity"]),
        ((one, masks), ["segmentation"]),
        ((one, pictures), ["lowlight"]),
        ((one, pictures, ["segmentation", "inpainting"]), ["inpainting"]),
    ):
        assert [task.name for task in runs.servable(*given)] == names
    with pytest.raises(ValueError, match="which serve none of segmentation"):
        runs.servable(one, pictures, ["segmentation"])


def test_the_report_is_one_file_with_everything(finished):
    page = (finished / "report.html").read_text()
    links = re.findall(r"(?:src|href|srcset)\s*=\s*['\"]?([^'\">\s]{1,60})", page)
    inside = ("data:image/png;base64,", "data:image/webp;base64,", "#")
    beside = {link for link in links if not link.startswith(inside)}
    assert links and beside == {"table.csv", "table.md", "answers.png"}
    assert all((finished / name).is_file() for name in beside)
    assert page.count("url(") == page.count("url(data:image/webp;base64,")
    assert "://" not in page and "prefers-color-scheme: dark" in page and "viewport" in page
    assert re.search(r'alt="(segmentation|lowlight): a query, and its answer as the task vector goes from', page)
    first = page[page.index("<h1") : page.index("<section")]
    marks = ("With no example shown, the task vector is", "<figure", "<table", "<details>")
    places = [first.index(mark) for mark in marks]
    assert places == sorted(places) and page.index("<nav") < page.index("<h1")
    assert page.count('<p class="badges"><span>') == len(TASKS) and "of 2 draws of random units" in page
    assert len(page) < 3_000_000
    specific = specific_tasks(vector_pairs(reading.load_run(finished).anew))
    for name in TASKS:
        badge = "needs its own vector" if specific[name] else "another vector may do as well"
        section = page[page.index(f'<section id="{name}">') :]
        section = section[: section.index("</section>")]
        assert f"<span>{badge}</span></p>" in section
        row = section[section.index('<div class="row">') : section.index('<div class="play"')]
        assert row.count("<figure><img") == 4 * len(labels.PICTURES)
        assert section.count("<button") == len(SearchResult.load(finished / "search" / f"{name}.safetensors").patches)
        assert section.count('<figure class="wide">') == 1 and "Probability of every unit" in section
        table = Table.load(finished / "evaluation" / f"{name}.parquet")
        patched = next(line for line in table.lines() if line.condition == "task vector")
        units = len(SearchResult.load(finished / "search" / f"{name}.safetensors").patches)
        assert f"<b>{patched.mean:.3f}</b>" in section and f"With {units} of 22 units" in section
        assert f"{patched.low:.3f} to {patched.high:.3f}" in section
        assert "random units, 2 draws" in section and "The floor, copying the query, is" in section
        for drawn in ("random units", "matched random units"):
            place = rank_among_draws(table, name, drawn)
            assert f"2 draws of {drawn} {place.worst:.3f} to {place.best:.3f}: p = {place.p:.3f} by rank" in section
    assert "Transfer at fixed units" in page
    assert "A <b>unit</b> is one attention head at one place: cls, query or output." in page
    section = page[page.index('<section id="searches">') :]
    section = section[: section.index("</section>")]
    assert section.count('<figure class="wide">') == 1 and "The searches (reinforce)" in section
    assert "Which units tasks share" in page and "units serve both tasks" in page
    assert "Which heads tell the tasks apart" in page and '"budget": 200' in html.unescape(page)


@pytest.mark.parametrize(
    ("searched", "evaluated", "lines"),
    [("tokens", "token loss", True), ("smooth_l1", "smooth l1 loss", True), ("pixels", "token loss", False)],
)
def test_searches_stand_beside_lines_of_the_same_loss(finished, monkeypatch, searched, evaluated, lines):
    found, drawn = reading.load_run(finished), []
    found.record["settings"]["loss"] = searched
    found.table.frame["loss_name"] = evaluated
    monkeypatch.setattr(report, "draw", lambda figure, caption, **kwargs: drawn.append((figure(), caption)))
    report._searches(found, found.lines())
    ((figure, caption),) = drawn
    assert ("Lines: the loss without a vector" in caption) == lines
    assert [len(panel.lines) for panel in figure.axes] == [3 if lines else 1] * len(TASKS)


@pytest.mark.slow
def test_a_run_over_other_sites_of_the_layers(tmp_path, model):
    own = SMALL | {"prompts": 4, "budget": 60, "test_prompts": 4, "search": "mediation"}
    page = run(tmp_path / "run", Settings(model=model, sites=("mlp", "heads"), **own), progress=False).read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["sites"] == ["heads", "mlp"]
    result = SearchResult.load(tmp_path / "run" / "search" / "lowlight.safetensors")
    assert result.patches.space.sites == ("heads", "mlp")
    names = (tmp_path / "run" / "scores.csv").read_text()
    assert ".mlp @ query," in names and ".attn.heads[0] @ query," in names
    assert "A <b>unit</b> is one attention head or one MLP at one place: cls, query or output." in page
    assert "Which heads and MLPs tell the tasks apart" in page
    with pytest.raises(ValueError, match="sites was heads, mlp and is heads. .* do collect, score, search, evaluate"):
        run(tmp_path / "run", Settings(model=model, **own), progress=False)


def test_the_same_figure_is_the_same_bytes():
    def figure():
        made = Figure(figsize=(2, 1), layout="constrained")
        made.subplots().set_title("unit_a")
        return made

    one, other = (figures.draw(figure, "") for _ in range(2))
    assert one == other and one.width == 192 and one.uri.startswith("data:image/png;base64,")


@pytest.mark.slow
def test_runs_are_compared(finished, copy, model, tmp_path, done):
    run(copy, Settings(model=model, **SMALL | {"budget": 300}), redo=True, progress=False)
    page = comparison.compare([finished, copy], tmp_path / "comparison.html").read_text()
    assert '<th scope="col">budget' in page and "<td>200" in page and "<td>300" in page
    assert '<th scope="col">seed' not in page
    assert page.count('<th scope="row">finished') == page.count('<th scope="row">copy') == 1 + 2 * len(TASKS)
    found = [reading.load_run(folder) for folder in (finished, copy)]
    for name in TASKS:
        section = page[page.index(f'<section id="{name}">') :]
        section = section[: section.index("</section>")]
        assert section.count(f'alt="{name}, query ') == 4 * pictures.MAX_ROWS and "asked other queries" not in section
        for one in found:
            score = one.table.values(name, "task vector")[1]
            assert f'alt="{name}, query 2: {one.name}, {score:.3f}"' in section.replace("\u2212", "-")
        sets = [one.results[name][""].patches for one in found]
        assert f"{len(sets[0] & sets[1])} unit" in section and "How alike the runs" in html.unescape(section)


@pytest.mark.slow
def test_runs_that_asked_other_queries_are_not_set_side_by_side(finished, copy, tmp_path):
    record = read_json(copy / "run.json")
    record["settings"]["test pictures"] = "others"
    write_json(copy / "run.json", record)
    page = comparison.compare([finished, copy], tmp_path / "comparison.html").read_text()
    assert page.count("copy: asked other queries") == len(TASKS) and 'alt="segmentation, query' not in page


def test_units_of_other_names_are_not_compared(finished):
    found = reading.load_run(finished)
    sets = found.sets
    space = sets["lowlight"].space
    by_head = PatchSpace.from_metadata(space.metadata | {"granularity": "head"})
    assert comparison._agreement({"a": sets["lowlight"], "b": PatchSet.random(by_head, 2)}) is None
    assert comparison._agreement({"a": sets["lowlight"], "b": sets["lowlight"]})["shared"] == list(sets["lowlight"])


def test_answers_png_shows_the_prompt_of_the_median_score(finished):
    found = reading.load_run(finished)
    query = pictures.overview(found).axes[list(labels.PICTURES).index("query")].images[0].get_array()
    shown = found.cells(found.tasks[0])["query"].permute(0, 2, 3, 1).numpy()
    kept = found.table.values(TASKS[0], "task vector")[: len(shown)]
    rows = [i for i, one in enumerate(shown) if np.array_equal(one, query)]  # prompts can share a query
    assert np.sort(kept)[(len(kept) - 1) // 2] in kept[rows]


def test_an_unfinished_run_has_no_report(copy, tmp_path):
    (copy / "evaluation" / "lowlight.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="is not finished: lowlight is not evaluated yet"):
        report.write(copy)
    with pytest.raises(FileNotFoundError, match="holds no run.json"):
        comparison.compare([tmp_path / "nowhere", copy], tmp_path / "page.html")


@pytest.fixture
def vtv(monkeypatch):
    """vtv(*args) → (exit code, what was said, the Settings that a run was asked for)."""
    asked = []
    monkeypatch.setattr(pipeline, "run", lambda out, settings, **options: asked.append((out, settings, options)) or out)
    monkeypatch.setattr(start, "_photographs", lambda images: {})

    def call(*args):
        result = CliRunner().invoke(cli.app, list(map(str, args)), env={"COLUMNS": "200"})
        return result.exit_code, result.output, asked[-1] if asked else None

    return call


def test_options_become_settings(vtv, tmp_path, monkeypatch):
    code, said, (out, settings, options) = vtv("run")
    assert (code, settings, str(out)) == (0, Settings(), "runs/pictures") and "wrote runs/pictures" in said
    written = []
    with monkeypatch.context() as patched:
        patched.setattr(reading, "load_run", lambda folder: f"what is in {folder}")
        patched.setattr(report, "write", lambda *given: written.append(given))
        options.pop("report")(out)
    assert written == [(out, f"what is in {out}")]
    steps = {"explore": explorer.demonstrate, "remote": None}
    assert options == {"redo": False, "device": None, "batch_size": None, "jobs": torch.get_num_threads()} | steps
    args = ("--images", tmp_path, "--tasks", "lowlight,identity", "--redo", "--seed", 3)
    _, _, (out, settings, options) = vtv("run", *args)
    assert settings == Settings(data=str(tmp_path), tasks=("lowlight", "identity"), seed=3)
    assert out.name == tmp_path.name and options["redo"]
    args = ("--model", "m.pth", "--data", "pascal:VOCdevkit", "--folds", "0,2", "--published", "--test-prompts", 50)
    _, _, (out, settings, _) = vtv("run", *args)
    published = PUBLISHED | {"test_prompts": 50}
    assert settings == Settings(model="m.pth", data="pascal:VOCdevkit", folds=(0, 2), **published)
    assert str(out) == "runs/pascal"
    assert vtv("run", "--quick", "--budget", 9)[2][1] == Settings(**QUICK | {"budget": 9})
    code, said, (out, settings, _) = vtv("run", "--quick", "--tasks", "identity")
    assert settings == Settings(**QUICK | {"tasks": ("identity",)}) and str(out) == "runs/pictures-quick"
    assert "Open it in a browser" in said and "Next: vtv run --images" in said
    opened = []
    monkeypatch.setattr(start.webbrowser, "open", opened.append)
    assert vtv("run", "--open", "-o", tmp_path)[0] == 0 and opened == [(tmp_path / "report.html").as_uri()]
    code, said, _ = vtv("run", "--images", tmp_path, "--data", "pascal:VOCdevkit")
    assert code == 1 and "give one" in said


def test_a_dry_run_says_what_it_would_take(vtv, tmp_path, model):
    sizes = "--data scenes --max-images 40 --prompts 8 --candidates 30 --budget 200 --test-prompts 6 --draws 2"
    words = f"{sizes} --tasks segmentation,lowlight --model {model} --out {tmp_path / 'run'} --dry-run"
    code, said, asked = vtv("run", *words.split())
    assert code == 0 and asked is None and not (tmp_path / "run").exists()
    assert [line.split(", ")[0] for line in said.splitlines()[:4]] == [
        "select: 60 answers",
        "collect: 16 prompts",
        "search: 400 evaluations",
        "evaluate: 76 answers",
    ]


def test_a_run_is_read_once_for_its_report_and_its_summary(monkeypatch, tmp_path):
    read, said = [], []
    monkeypatch.setattr(pipeline, "run", lambda out, settings, report, **options: report(out))
    monkeypatch.setattr(reading, "load_run", lambda folder: read.append(folder) or "results")
    monkeypatch.setattr(report, "write", lambda folder, results: said.append(results))
    monkeypatch.setattr(start, "summarise", said.append)
    assert CliRunner().invoke(cli.app, ["run", "--out", str(tmp_path / "run")]).exit_code == 0
    assert read == [tmp_path / "run"] and said == ["results", "results"]


def test_a_run_ends_with_its_table(finished, capsys):
    start.summarise(reading.load_run(finished))
    said = capsys.readouterr().out
    table = Table.load(finished / "evaluation" / "lowlight.parquet")
    assert all(name in said for name in (*TASKS, "mIoU ↑", "MSE ↓", "one-shot", "zero-shot", "task vector"))
    assert all(f"{table.values('lowlight', name).mean():.3f}" in said for name in labels.FLOOR_TO_CEILING)
    assert verdicts(table)[0] in said.replace("\n", " ")


def test_interrupting_says_how_to_go_on(vtv, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupt)
    assert vtv("run")[:2] == (130, "Stopped. The same command goes on where it stopped.\n")


def test_sigterm_stops_like_ctrl_c():
    script = (
        "import sys, time\nfrom vtv_nnsight import cli\n"
        "@cli.app.command('run')\ndef wait():\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "sys.argv = ['vtv', 'run']\ncli.main()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(30) == 143
        assert process.stderr.read() == b"Stopped. The same command goes on where it stopped.\n"


@pytest.mark.parametrize("name", ["plain", "$x", "a_$b$", "_hidden", "m[bold]", "conv[red]", "\\frac$"])
def test_names_are_shown_as_they_are(finished, name, capsys, vtv, monkeypatch):
    found = reading.load_run(finished)
    figure = figures.searches({name: [found.results["lowlight"][""]]})
    (label,) = figure.axes[0].get_legend().get_texts()
    figure.savefig(io.BytesIO())
    assert label.get_text().replace("\\$", "$").replace("\\\\", "\\").strip() == name
    assert f"wrote {name}" in vtv("run", "-o", name)[1]


def test_help_begins_with_the_whole(vtv):
    said = vtv("--help")[1]
    assert said.index("From end to end") < said.index("run ") < said.index("report ") < said.index("Model")


def test_folds_have_folders_of_their_own(monkeypatch, tmp_path):
    asked = []
    rows = [data.scenes(split, 8) for split in ("train", "test")]
    monkeypatch.setattr(data, "split_data", lambda spec, *args: asked.append(spec) or rows)
    folds, _ = of_folds.load_folds(tmp_path, Settings(data="pascal:data/VOCdevkit", folds=(3, 1, 3)))
    assert [(fold.name, fold.folder, fold.number) for fold in folds] == [
        ("fold1", tmp_path / "fold1", 1),
        ("fold3", tmp_path / "fold3", 3),
    ]
    assert asked == [f"pascal:data/VOCdevkit:{fold}" for fold in (1, 3)]


def test_a_quarter_is_set_aside_of_data_without_splits(photographs, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ((fold,), _) = of_folds.load_folds(tmp_path, Settings(data=str(photographs)))
    sizes = [[row["image"].width for row in rows] for rows in (fold.train, fold.test)]
    assert sorted(sizes[0] + sizes[1]) == [40 + 9 * i for i in range(10)] and len(sizes[1]) == 2


def test_progress_is_a_line_for_each_step(capsys):
    step = numbered_steps(2)
    with step("collect") as working_on:
        working_on("segmentation")
        for _ in progress_bar(range(3)):
            pass
    with step("score"):
        pass
    out, err = capsys.readouterr()
    steps = re.findall(r"✓ (\d/\d \w+)  (.*)", err)
    assert out == "" and steps == [("1/2 collect", "0.0 s"), ("2/2 score", "done before")]
    assert "it/s" not in on_screen(err) and "1/2 collect segmentation" in err
    list(progress_bar(range(3)))
    out, err = capsys.readouterr()
    assert out == "" and "it/s" in on_screen(err)


def test_no_progress_is_shown_where_none_is_wanted(capsys):
    with numbered_steps(1, disable=True)("collect") as working_on:
        working_on("segmentation")
        list(progress_bar(range(3), disable=True))
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_closed_when_its_loop_raises(capsys):
    with pytest.raises(ZeroDivisionError), numbered_steps(1)("collect"), progress_bar(range(3)) as bar:
        for number in bar:
            1 / number
    assert not tqdm._instances and "✓" not in capsys.readouterr().err


def on_screen(printed: str) -> str:
    """What a terminal shows at the end of what was printed."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\r|\n|\x1b\[A|[^\r\n\x1b]+", printed):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif part == "\x1b[A":
            row -= 1
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return "\n".join(line.rstrip() for line in lines)


def test_seeds_are_runs_of_their_own_and_one_table(finished, copy, model, tmp_path, done):
    """A seed is a row of seeds.csv, and one more picture that rows may share."""
    other = tmp_path / "other"
    run(other, Settings(model=model, **SMALL | {"seed": 1, "matrix": 0}), progress=False)
    assert not (other / "matrix").exists()  # nothing of a step that was not asked for
    badges = [badge for task in report._content(reading.load_run(other))["tasks"] for badge in task["badges"]]
    assert badges and not any("own vector" in badge or "another vector" in badge for badge in badges)
    sentences = merge(tmp_path, {0: copy, 1: other})
    rows = pd.read_csv(tmp_path / "seeds.csv")
    assert set(rows.seed) == {0, 1} and set(rows.task) == set(TASKS)
    table = pd.read_csv(tmp_path / "table.csv").set_index(["task", "measure", "condition"])
    for name in TASKS:
        own = rows[(rows.task == name) & (rows.condition == "task vector")]
        line = table.loc[name, tasks.get(name).metric.name, "task vector"]
        assert line["mean"] == pytest.approx(own["mean"].mean(), abs=1e-5) and line.images == 16
        assert line.low <= line["mean"] <= line.high
    assert [sentence.partition(":")[0] for sentence in sentences] == list(TASKS)
    assert all("against one-shot, of 2 seeds: " in sentence for sentence in sentences)
    assert (tmp_path / "table.md").read_text().rstrip().endswith(sentences[-1])


def test_the_vector_is_called_better_only_where_copying_is_worse():
    def line(mean):
        return reading.Table(pd.DataFrame(
            {"task": "lowlight", "metric": "mse", "condition": "x", "fold": 0, "image": [0], "score": [mean]}
        )).lines()[0]  # fmt: skip

    metric = tasks.lowlight.metric
    lines = {"one-shot": line(0.3), "task vector": line(0.2)}
    assert beats_copying(metric, lines) and beats_copying(metric, lines | {"copy": line(0.4)})
    assert not beats_copying(metric, lines | {"copy": line(0.25)})
