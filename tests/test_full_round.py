"""The whole paper on every family of models, by the commands that a user types: small random weights, in a folder that
save_pretrained wrote."""

import json
import sys

import numpy as np
import pytest
import torch
from helpers import DATA, small_painter, vit_mae_config
from leaderboard import Leaderboard, markdown, measure_sets
from PIL import Image
from transformers import ViTMAEForPreTraining

from vtv_nnsight import PatchSet, TaskVectors, cli
from vtv_nnsight.demo.playing import Player
from vtv_nnsight.evaluation import Table
from vtv_nnsight.report import reading
from vtv_nnsight.search import SearchResult

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TASKS = "segmentation,lowlight"
LOSSES = {"SegGPT": "smooth_l1", "Painter": "smooth_l1", "ViTMAE": "squared_error"}
SIZES = ("--tasks", TASKS, "--max-images", 30, "--prompts", 6, "--candidates", 12)


def vtv(*args):
    """A command, as if typed."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["vtv", *map(str, args)])
        cli.main()
    assert end.value.code == 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind → a folder with a small model of random weights."""
    torch.manual_seed(0)
    vit_mae = ViTMAEForPreTraining(vit_mae_config())
    for parameter in vit_mae.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    made = {"SegGPT": small_painter(True), "Painter": small_painter(False), "ViTMAE": vit_mae}
    folders = {kind: tmp_path_factory.mktemp("models") / kind for kind in made}
    for kind, module in made.items():
        module.save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """kind → the folder of a finished `vtv run` on it."""
    done = {}

    def run(kind):
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp("runs") / kind
            own = {"SegGPT": ("--embedding-type", "semantic"), "Painter": ("--dtype", "bfloat16")}.get(kind, ())
            vtv(
                "run", "--model", folders[kind], *SIZES, "--search", "gates", "--budget", 150, "--test-prompts", 4,
                "--draws", 2, "--out", done[kind], *own,
            )  # fmt: skip
        return done[kind]

    return run


@pytest.mark.parametrize("kind", LOSSES)
def test_a_run(runs, folders, kind):
    out = runs(kind)
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["loss"] == LOSSES[kind] and settings["model"] == str(folders[kind])
    assert settings["embedding_type"] == ("semantic" if kind == "SegGPT" else None)
    vectors = TaskVectors.load(out / "vectors.safetensors")
    assert vectors["lowlight"].fingerprint["model"] == kind
    assert vectors["lowlight"].fingerprint.get("embedding_type") == settings["embedding_type"]
    found = reading.load_run(out)
    (result,) = found.results["segmentation"].values()
    assert result.algorithm == "gates" and 0 < result.evaluations <= 150
    table = Table.load(out / "evaluation" / "segmentation.parquet")
    assert set(table.frame.loss_name) == {f"{LOSSES[kind].replace('_', ' ')} loss"}
    assert np.isfinite(table.values("segmentation", "task vector", "loss")).all()
    assert "copy" in set(table.frame.condition) and "tokenizer" not in set(table.frame.condition)
    page = (out / "report.html").read_text()
    paper = {"SegGPT": "Segmenting Everything", "Painter": "Images Speak", "ViTMAE": "Scalable Vision"}[kind]
    assert paper in page and "Visual Prompting via Image Inpainting" not in page and "tokenizer" not in page
    assert "Where the answer looks" in page
    places = "query+output" if kind != "ViTMAE" else "cls"
    assert places in page and result.patches.space.names[0] in (out / "scores.csv").read_text()


def test_the_steps_one_by_one(runs, folders, tmp_path):
    """On Painter, by its folder: search, evaluate, prompt, info; and what `vtv run` wrote is what they read."""
    model, run = folders["Painter"], runs("Painter")
    vectors, units, out = run / "vectors.safetensors", tmp_path / "units.json", tmp_path / "out"
    vtv("collect", model, *SIZES, "-o", tmp_path / "vectors.safetensors")
    again, first = (TaskVectors.load(path) for path in (tmp_path / "vectors.safetensors", vectors))
    assert list(again) == list(first) == TASKS.split(",")
    vtv(
        "search", model, *SIZES[2:], "--tasks", "segmentation", "--vectors", vectors, "--algorithm", "random",
        "--budget", 40, "-o", units,
    )  # fmt: skip
    assert len(PatchSet.load(units).space) > 0
    vtv(
        "evaluate", model, "--tasks", "segmentation", "--vectors", vectors, "--patches", units, "--prompts", 4,
        "-o", out,
    )  # fmt: skip
    assert "smooth l1 loss" in (out / "table.md").read_text()
    example, query = DATA / "support_image.png", DATA / "query_image.png"
    vtv(
        "prompt", "--model", model, "--task", "colorization", "--example", example, "--query", query,
        "-o", tmp_path / "painted.png",
    )  # fmt: skip
    assert Image.open(tmp_path / "painted.png").size == (64, 64)


def test_runs_of_two_models_are_compared(runs, tmp_path):
    vtv("report", runs("Painter"), runs("SegGPT"), "-o", tmp_path / "both.html")
    assert "2 runs compared" in (tmp_path / "both.html").read_text()


def test_an_answer_with_the_vectors_of_a_run(runs, tmp_path):
    """By its model, of its type."""
    query = DATA / "query_image.png"
    vtv("prompt", "--vectors", runs("SegGPT"), "--task", "lowlight", "--query", query, "-o", tmp_path / "strip.png")
    assert Image.open(tmp_path / "strip.png").width > 3 * 32
    assert Player.load(str(runs("SegGPT"))).model.embedding_type == "semantic"


def test_the_leaderboard(runs, folders):
    out = runs("SegGPT")
    options = Leaderboard(
        model=str(folders["SegGPT"]), embedding_type="semantic", tasks=("segmentation", "lowlight"), prompts=6,
        test_prompts=4, vectors=out / "vectors.safetensors",
    )  # fmt: skip
    rows = measure_sets(options, [str(out / "search" / f"{task}.safetensors") for task in options.tasks])
    own = [row for row in rows if "units" in row]
    found = SearchResult.load(out / "search" / "lowlight.safetensors")
    assert [row["units"] for row in own if row["task"] == "lowlight"] == [[len(found.patches)]]
    assert {row["loss_name"] for row in rows} == {"smooth l1 loss"}
    assert "smooth l1 loss" in markdown(rows).splitlines()[0]


def test_info(folders, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for kind, loss in LOSSES.items():
        vtv("info", folders[kind])
        printed = capsys.readouterr().out
        assert f"{kind}, canvas 64x64" in printed and f"{loss}, pixels" in printed and "MB on disk" in printed
        assert "tokenizer" not in printed


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("Painter", ["--loss", "tokens"], "loss='tokens' is unknown; choose from smooth_l1, pixels"),
        ("Painter", ["--loss", "pixels", "--search", "gates"], 'has no gradient; use loss="smooth_l1"'),
        ("SegGPT", ["--order", "horizontal"], "order='horizontal'"),
        ("Painter", ["--embedding-type", "semantic"], "is for SegGPT, not Painter"),
        ("SegGPT", ["--embedding-type", "class"], "choose from semantic, instance"),
        ("ViTMAE", ["--vqgan", "last.ckpt"], "is for MAEVQGAN, not ViTMAE"),
        ("ViTMAE", ["--dtype", "int8"], "dtype='int8' is unknown; choose from float32, bfloat16, float16"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_done(folders, tmp_path, capsys, kind, options, words):
    with pytest.raises(AssertionError):
        vtv("run", "--model", folders[kind], *SIZES, "--budget", 150, "--out", tmp_path / "run", *options)
    complaint = capsys.readouterr().err
    assert words in complaint and complaint.count("\n") == 1 and not (tmp_path / "run").exists()
