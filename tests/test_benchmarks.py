"""The benchmarks run, and what they write holds together."""

import importlib
import io
import json
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import leaderboard
import leaderboard.measuring as measuring
import numpy as np
import pytest
import torch
from helpers import random_module, random_prompts

from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, TaskVectors, cli, tasks
from vtv_nnsight.search import SearchResult
from vtv_nnsight.studies.learning import learn_vector

FOLDER = Path(__file__).parent.parent / "benchmarks"


pytestmark = pytest.mark.timeout(900)


def read(name, folder):
    """What a script wrote."""
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / f"{name}.json").read_text())


def quick(name, folder, *options):
    """What `--quick` of a script writes, and what it prints. It runs here: a process of its own would first import
    torch, which takes longer than many a benchmark."""
    arguments = [FOLDER / f"{name}.py", "--quick", "--device", "cpu", "--out", folder, *options]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [str(part) for part in arguments])
        patch.syspath_prepend(FOLDER)
        runpy.run_path(sys.argv[0], run_name="__main__")
    return read(name, folder), printed.getvalue()


@pytest.fixture
def script(monkeypatch):
    """script(name) → the module of a benchmark."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture(scope="module")
def space():
    return PatchSpace(MAEVQGAN("tiny"))


@pytest.mark.nightly
def test_computation(tmp_path):
    found, printed = quick("computation", tmp_path)
    (case,) = found["cases"]
    transformer, whole = case["GFLOPs of the transformer a canvas"], case["GFLOPs a canvas"]
    for way in ("one-shot", "zero-shot"):
        assert whole[way] > transformer[way] > 0
    drawing = [whole[way] - transformer[way] for way in ("one-shot", "zero-shot")]
    assert drawing[0] == pytest.approx(drawing[1])  # the VQGAN draws as many patches either way
    assert 0 < case["saved"]["FLOPs"] < case["saved"]["FLOPs of the transformer"] < 100
    assert "saved (%)" in printed


@pytest.mark.nightly
def test_reasoning(tmp_path):
    found, printed = quick("reasoning", tmp_path)
    (row,) = found["rows"]
    assert row["task"] == "color" and "views" in row["means"]["iou"] and "shape_accuracy, tiny, 4 prompts" in printed


@pytest.mark.nightly
def test_prompt_looks(tmp_path):
    found, printed = quick("prompt_looks", tmp_path)
    assert len(found["rows"]) == 12 and all(len(row["iou"]) == 4 for row in found["rows"])
    assert "vertical + horizontal" in printed


@pytest.mark.nightly
def test_patch_sets(tmp_path, space):
    PatchSet(space, torch.ones(len(space))).save(tmp_path / "all.json")
    found, printed = quick("patch_sets", tmp_path, tmp_path / "all.json", "--algorithms", "ranking")
    rows = {(row["task"], row["set"]): row for row in found["leaderboard"]}
    names = ["one-shot", "zero-shot", "everything patched", "all", "ranking"]
    assert sorted(rows) == sorted((task, name) for task in ("segmentation", "lowlight") for name in names)
    assert printed.count("\n| segmentation ") == printed.count("\n| lowlight ") == 5
    for task in ("segmentation", "lowlight"):
        assert {row["loss_name"] for row in found["leaderboard"]} == {"token loss"}
        losses = [row["loss"][0] for row in found["leaderboard"] if row["task"] == task]
        assert losses == sorted(losses)
        one_shot, zero_shot, everything, whole, ranking = (rows[task, name] for name in names)
        assert (one_shot["gap_closed"], zero_shot["gap_closed"]) == (1, 0)
        for same in (whole, whole["random_units"], ranking["sufficiency"][-1]):
            assert same["metric"] == pytest.approx(everything["metric"], abs=1e-4)
            assert same["loss"] == pytest.approx(everything["loss"], rel=1e-4)
        assert whole["other_data"]["loss"] == pytest.approx(everything["other_data"]["loss"], rel=1e-4)
        assert whole["units"] == [whole["of_units"]] == [96] and whole["sufficiency"] == []
        assert whole["jaccard_over_seeds"] is None and whole["cost_to_other_tasks"] == {}

        assert len(ranking["units"]) == len(ranking["loss_by_seed"]) == 2
        assert sum(ranking["loss_by_seed"]) / 2 == pytest.approx(ranking["loss"][0], rel=1e-4)
        assert all(0 <= value <= 1 for value in ranking["jaccard_over_seeds"].values())
        assert [point["units"] for point in ranking["sufficiency"]][:2] == [1, 2]
        gap = (zero_shot["loss"][0] - ranking["loss"][0]) / (zero_shot["loss"][0] - one_shot["loss"][0])
        assert ranking["gap_closed"] == pytest.approx(gap)
        assert one_shot["floor"] != one_shot["ceiling"] and f"\n{task} (" in printed
        for name in ("random_units", "matched_random_units"):
            drawn = ranking[name]
            assert drawn["draws"] == 16 and 0 <= drawn["beaten"] <= 16 and drawn["prompts"] == 4
            assert drawn["least"] < drawn["metric"][0] < drawn["most"]
            assert whole[name]["draws"] == 16 and whole[name]["least"] == pytest.approx(whole[name]["most"], abs=1e-6)
            assert drawn["pictures"] == 4 and "ranking: no verdict on 4 pictures" in printed
        (other,) = {"segmentation", "lowlight"} - {task}
        assert ranking["other_vectors"][other]["difference"][0] == pytest.approx(
            ranking["other_vectors"][other]["metric"][0] - ranking["metric"][0]
        )
        assert sorted(ranking["other_vectors"]) == sorted({t.name for t in tasks.VTV} - {task})
        assert whole["other_vectors"][other]["loss"] != whole["loss"]
        cost = ranking["loss_on_other_tasks"][other] - rows[other, "ranking"]["loss"][0]
        assert ranking["cost_to_other_tasks"] == {other: pytest.approx(cost)}
        for row in (whole, ranking):
            cost = row["cost_of_pruning_a_tenth"]
            assert cost["least"] <= cost["mean"] <= cost["most"]
            ablated = row["mean_ablated_one_shot"]["loss"]
            assert ablated[0] > one_shot["loss"][0] and ablated[1] <= ablated[0] <= ablated[2]
    assert all(0 <= value <= 1 for (task, _), row in rows.items() if task == "segmentation" for value in row["metric"])


@pytest.mark.nightly
def test_circuits(tmp_path):
    resumed = ("--resume", tmp_path / "answers", "--measures", "loss", "log ratio")
    found, printed = quick("circuits", tmp_path, *resumed)
    rows = {(row["way"], row["measure"], row["ranking"], row["order"]): row for row in found["curves"]}
    assert len(rows) == 2 * 2 * 3 * 2 and printed.count("\n| random ") == 2 * 2 + 1
    assert found["units"] == {"in": 96, "out": 24 * 4 + 16 * 5}
    for (way, measure, ranking, order), row in rows.items():
        assert row["CPR log low"] <= row["CPR log"] <= row["CPR log high"] and row["CMD linear"] >= 0
        if ranking == "mediation" and order == "signed":
            assert row["CPR log"] > rows[way, measure, "random", order]["CPR log"]
    whole = json.loads((tmp_path / "circuits" / "out-counterfactual-loss.json").read_text())
    assert all(kept[-1] == whole["full"] for *_, kept in whole["kept"])
    nodes = json.loads((tmp_path / "circuits" / "nodes-in-mediation.json").read_text())["nodes"]
    assert (
        len([name for name in nodes if ".h" in name]) == 40
        and nodes["a6.h3"]["label"] == "decoder.blocks.0.attn.heads[3]"
    )
    known = {row["ranking"]: row for row in found["known"]}
    assert known["mediation"]["signed"] == [1.0] and 0 <= known["random"]["signed"][0] < 1
    assert {path.name for path in (tmp_path / "answers").iterdir()} >= {"curves-in.jsonl", "mediation-in-0.jsonl"}


@pytest.mark.nightly
def test_specificity(tmp_path):
    found, printed = quick("specificity", tmp_path)
    rows = {(row["units"], row["task"], row["vector"]): row for row in found["pairs"]}
    assert len(rows) == 2 * 2 * 2 and list(found["specific"]) == ["0"]
    assert all(np.isnan(row["difference"]) == (task == vector) for (_, task, vector), row in rows.items())
    assert printed.count("no other vector does as well in") == 2
    again, _ = quick("specificity", tmp_path, "--runs", tmp_path / "specificity")
    assert str(again["pairs"]) == str(found["pairs"])


@pytest.mark.nightly
def test_held_out_tasks(tmp_path):
    found, _ = quick("held_out_tasks", tmp_path)
    lines = {(line["task"], line["condition"]): line for line in found["lines"]}
    assert {task for task, _ in lines} == {"inpainting+lowlight", "segmentation+inpainting"} and len(lines) == 2 * 5
    assert lines["inpainting+lowlight", "tokenizer"]["mean"] < lines["inpainting+lowlight", "zero-shot"]["mean"]


@pytest.mark.nightly
def test_learned_vectors(tmp_path):
    found, _ = quick("learned_vectors", tmp_path)
    rows = {row["row"]: row for row in found["rows"]}
    assert len(rows) == 7 and rows["one-shot"]["units"] == 0 and found["steps of learning"] == 3
    assert rows["learned from noise"]["units"] == rows["learned"]["units"] == rows["learned at random units"]["units"]
    assert len({row["score"] for row in rows.values()}) > 4


@pytest.mark.nightly
def test_open_ends(tmp_path):
    found, printed = quick("open_ends", tmp_path)
    rows = {row["vector"]: row for row in found["arithmetic"]}
    assert rows["one-shot"]["token loss"] < rows["nothing"]["token loss"]
    assert rows["its own"]["cosine to its own"] == pytest.approx(1, abs=1e-4)
    assert rows["identity"]["cosine to its own"] == 0 and "| lowlight + inpainting - identity |" in printed
    cosines = {row["task"]: row for row in found["geometry"]}
    assert len(cosines) == 5 and cosines["identity"]["identity"] == pytest.approx(1, abs=1e-4)
    assert cosines["lowlight"]["identity"] == pytest.approx(cosines["identity"]["lowlight"], abs=1e-5)
    assert cosines["lowlight"]["identity"] < 0.999
    assert {stage: (len(rows), len(rows[0])) for stage, rows in found["distance"].items()} == {
        "encoder": (6, 4),
        "decoder": (4, 4),
    }


@pytest.mark.nightly
def test_language(tmp_path):
    found, printed = quick("language", tmp_path)
    methods = found["models"]["random"]["methods"]
    assert list(found["models"]["random"]["by_task"]) == ["antonym", "plural"] and "| few-shot " in printed
    assert {"reinforce", "gates", "random units", "all units", "function vector", "published recipe"} <= set(methods)
    assert all(m["less"]["few-shot"][0] == pytest.approx(m["mean"][0] - methods["few-shot"]["mean"][0])
               for m in methods.values())  # fmt: skip
    assert methods["reinforce"]["evaluations"] <= 150 and methods["frequent"]["mean"][0] == 1  # a space
    again, _ = quick("language", tmp_path)
    assert again["models"]["random"]["methods"] == methods  # of the files that are there
    _, printed = quick("language", tmp_path, "--speed")
    assert "random: evaluations a second" in printed and "| plural  | gradients of 16 rows" in printed


@pytest.mark.nightly
def test_prompt_side(tmp_path):
    found, printed = quick("prompt_side", tmp_path)
    rows = {row["prompts"]: row for row in found["rows"]}
    assert list(rows) == [
        "one-shot",
        "zero-shot",
        "retrieved example",
        "learned border",
        "retrieved example + border",
        "2 examples, one canvas",
        "2 examples, mean answer",
        "task vector",
        "task vector, learned",
    ]
    base = rows["task vector"]
    for name, row in rows.items():
        assert row["task"] == "segmentation" and row["images"] == 8 and f"| {name} " in printed
        for measure in ("score", "loss"):
            assert row[measure][1] <= row[measure][0] <= row[measure][2]
            if name != "task vector":
                change = row[f"{measure}_difference"]
                assert change[0] == pytest.approx(row[measure][0] - base[measure][0]) and change[1] <= change[2]
    assert base["score_difference"] is None
    assert max(rows["one-shot"]["loss"][0], base["loss"][0]) < rows["zero-shot"]["loss"][0]
    assert len({row["loss"][0] for row in rows.values()}) >= 8


def test_every_unit_is_pruned(space):
    whole = PatchSet.random(space, 25)
    parts = [whole - rest for rest in leaderboard.prunings(whole, seed=1)]
    assert [len(part) for part in parts] == [3] * 9
    assert all((part & whole) == part for part in parts)
    assert PatchSet(space, torch.stack([part.choices for part in parts]).any(0)) == whole
    assert [len(rest) for rest in leaderboard.prunings(PatchSet.random(space, 2))] == [1, 1]
    assert list(leaderboard.prunings(PatchSet.random(space, 0))) == []


def test_stability_is_jaccard_against_chance(space):
    a, b = (PatchSet.random(space, 48, seed) for seed in (0, 1))
    assert leaderboard.stability([a]) is None
    assert leaderboard.stability([a, a])["mean"] == 1
    found = leaderboard.stability([a, b])
    assert found == {"mean": a.jaccard(b), "by_chance": pytest.approx(1 / 3)}


def test_units_are_ranked_by_score_and_chosen_ones_lead_among_equals(space):
    scores = torch.zeros(len(space), dtype=torch.float64)
    scores[[3, 5]], scores[0] = torch.tensor([2.0, 1.0], dtype=torch.float64), torch.nan
    chosen = PatchSet.named(space, [space.names[i] for i in (5, 90, 91)])
    result = SearchResult("x", chosen, scores, False, 0.0, 0, (), {}, 0)
    best = leaderboard.best_scored(result, count=96)
    assert list(best)[0] == 1 and list(best)[-1] == len(space)
    assert best[1].choices.nonzero()[:, 0].tolist() == [3]
    assert best[4].choices.nonzero()[:, 0].tolist() == [3, 5, 90, 91]
    assert max(k for k, one in best.items() if not one.choices[0]) < len(space)
    assert leaderboard.best_scored(chosen) == {}


def test_gap_closed():
    bounds = {name: {"loss": [loss]} for name, loss in (("zero-shot", 5.0), ("one-shot", 3.0))}
    assert leaderboard.gap_closed({"loss": [3.5]}, bounds) == 0.75
    assert leaderboard.gap_closed({"loss": [3.5]}, bounds | {"zero-shot": {"loss": [3.0]}}) is None


def test_losses_that_differ_end_the_benchmark():
    leaderboard.agree(2.0, 2.0001, "x")
    with pytest.raises(RuntimeError, match="x: the loss is 2.0 to a search and 2.1 to an evaluation"):
        leaderboard.agree(2.0, 2.1, "x")


def test_whose_a_file_is(space, tmp_path):
    chosen = {name: tasks.get(name) for name in ("segmentation", "lowlight")}
    files = {name: tmp_path / f"{name}.json" for name in ("segmentation", "mine", "one-shot", "identity")}
    for file in files.values():
        PatchSet.random(space, 3).save(file)
    found = leaderboard.read([str(files["segmentation"]), str(files["mine"])], chosen)
    assert {name: list(by_task) for name, by_task in found.items()} == {
        str(tmp_path): ["segmentation"],
        "mine": ["segmentation", "lowlight"],
    }
    assert list(leaderboard.read([f"lowlight={files['mine']}"], chosen)["mine"]) == ["lowlight"]
    for wrong, sentence in (
        ([files["identity"]], "is of 'identity' and --tasks is segmentation,lowlight; add it"),
        ([files["mine"], files["mine"]], "is a second set of 'segmentation' that is called 'mine'"),
        ([files["one-shot"]], "would be called 'one-shot', as another row is"),
    ):
        with pytest.raises(ValueError, match=sentence):
            leaderboard.read(list(map(str, wrong)), chosen)


def test_sets_are_measured_as_their_run_was(script, tmp_path, monkeypatch, capsys, space):
    """Data, queries, seed and vectors are those of run.json, unless an option says otherwise: then a line warns."""
    asked = []
    patch_sets = script("patch_sets")
    monkeypatch.setattr(patch_sets, "measure_sets", lambda options, sets: asked.append(options) or [])
    monkeypatch.setattr(patch_sets, "markdown", lambda rows: "")
    monkeypatch.setattr(patch_sets, "draw", lambda rows: None)
    monkeypatch.setattr(patch_sets.common, "save", lambda *args: None)
    (tmp_path / "search").mkdir()
    files = [tmp_path / "search" / f"{name}.json" for name in ("segmentation", "lowlight")]
    for file in (*files, tmp_path / "vectors.safetensors"):
        PatchSet.random(space, 3).save(file)
    known = dict(model="tiny", vqgan=None, embedding_type=None, dtype=None, data="pictures", max_images=1000)
    known |= dict(test_prompts=128, seed=3)
    record = {"settings": known | {"tasks": ["segmentation", "lowlight"]}, "files": {}}

    def measured(*arguments):
        monkeypatch.setattr(sys, "argv", ["patch_sets.py", *map(str, arguments)])
        patch_sets.main()
        return asked[-1], capsys.readouterr().out

    options, printed = measured(files[0], "--tasks", "segmentation")
    assert options.data == "scenes" and "warning: no run.json says" in printed
    monkeypatch.setattr(leaderboard.sets, "check_files", lambda *args, **options: (record, []))
    options, printed = measured(*files)
    assert {name: getattr(options, name) for name in known} == known and options.tasks == ("segmentation", "lowlight")
    assert options.vectors == tmp_path / "vectors.safetensors"
    assert "tiny, pictures, 128 prompts a task, seed 3, as their run" in printed
    options, printed = measured(*files, "--data", "scenes", "-n", 8)
    assert (options.data, options.test_prompts, options.seed) == ("scenes", 8, 3)
    assert "warning: sets of another run are here, which differs or is not known in data, test_prompts" in printed


def test_everything_patched_is_of_each_kind_of_units(space):
    heads = PatchSpace(MAEVQGAN("tiny"), granularity="head")
    assert list(measuring.everything([space, space])) == ["everything patched"]
    assert measuring.everything([heads, space, heads]) == {
        "everything patched, 40 units by head of heads": heads,
        "everything patched, 96 units by quadrant of heads": space,
    }


def test_options_that_make_no_sense():
    good = dict(budget=1, seeds=1, prompts=1, test_prompts=1, batch_size=1, algorithms=("gates",), tasks=("lowlight",))
    assert list(leaderboard.Leaderboard(**good).by_name) == ["lowlight"]
    for wrong, sentence in (
        ({"test_prompts": 0}, "test_prompts=0 leaves nothing"),
        ({"algorithms": ("gate",)}, "'gate' is not an algorithm"),
    ):
        with pytest.raises(ValueError, match=sentence):
            leaderboard.Leaderboard(**good | wrong)


@pytest.mark.nightly
def test_throughput(tmp_path):
    found, printed = quick("throughput", tmp_path)
    assert [(case["size"], case["dtype"], case["batch"]) for case in found["cases"]] == [
        ("embedded", "float32", 1),
        ("embedded", "float32", 16),
    ]
    for case in found["cases"]:
        assert case["rounds"] >= 3 and all(rate > 0 for rate in case["a second"].values())
        assert case["peak MiB"].keys() == case["a second"].keys()
    (goal,) = found["goals"]
    assert goal["measured"] == max(case["ratios"]["tokens over bare"] for case in found["cases"])
    assert goal["met"] == (goal["measured"] >= goal["goal"]) and "released collection" in printed


def test_throughput_ends_where_its_sides_differ(script, monkeypatch):
    throughput = script("throughput")
    module, prompts = script("common").made_up("embedded", 2, seed=0, device="cpu")
    model = MAEVQGAN(module)
    throughput.same_collection(module, model, prompts)
    honest = throughput.released_collection
    monkeypatch.setattr(throughput, "released_collection", lambda *args: {k: 2 * v for k, v in honest(*args).items()})
    with pytest.raises(AssertionError, match="not close"):
        throughput.same_collection(module, model, prompts)


@pytest.mark.nightly
def test_tracing_overhead(tmp_path):
    found, _ = quick("tracing_overhead", tmp_path)
    for case in found["cases"]:
        assert case["size"] == "embedded" and case["rounds"] >= 5
        assert case["met"] == (max(case["trace over hooks"].values()) <= 1.03)


@pytest.mark.nightly
def test_memory_format(tmp_path):
    found, _ = quick("memory_format", tmp_path)
    assert [(case["size"], case["dtype"]) for case in found["cases"]] == [
        ("embedded", "float32"),
        ("embedded", "bfloat16"),
    ]
    assert all(case["times as fast"] > 0 for case in found["cases"])


@pytest.mark.nightly
def test_search_efficiency(tmp_path):
    found, _ = quick("search_efficiency", tmp_path)
    paper, *others = found["searches"]
    assert paper["label"] == "reinforce, published" and paper["evaluations"] == [2 * 320 + 8]
    names = ["reinforce", "gates", "ranking", "gates, bank of 3", "gates, learned vector"]
    names.append("ranking, nearest centroid")
    assert [row["label"] for row in others] == names
    bank, learned = others[-3:-1]
    assert all(row["evaluations"][0] > 180 and 0 < row["units"][0] <= 96 for row in (bank, learned))
    assert learned["test loss"] != others[1]["test loss"] != bank["test loss"]
    assert all(spent <= row["budget"] for row in others for spent in row["evaluations"])
    assert found["references"]["one-shot"] < found["references"]["nothing patched"]
    (curve,) = paper["curves"]
    assert [moment["evaluations"] for moment in curve] == [320 + 8]
    assert curve[-1]["sample"] == pytest.approx(paper["test loss"][0], abs=1e-5)
    assert found["reached by itself"]["sample"]["mean"] == min(
        moment["evaluations"] for moment in curve if moment["sample"] <= paper["test loss"][0] + 1e-9
    )


@pytest.mark.parametrize(("steps", "held_out"), [(1, 3), (12, 2), (25, 1)])
def test_what_learning_a_vector_costs(script, monkeypatch, steps, held_out):
    """The benchmark counts what is asked: a gradient as three evaluations, and looks at held-out prompts."""
    efficiency, spent, model = script("search_efficiency"), [], MAEVQGAN(random_module())
    (loss,) = model.losses

    def counted(output, prompts, truth):
        spent.append((3 if torch.is_grad_enabled() else 1) * len(prompts))
        return loss.value(output, prompts, truth)

    monkeypatch.setattr(MAEVQGAN, "losses", (replace(loss, value=counted),))
    prompts = random_prompts(16 + held_out).query_only()
    vector = TaskVectors.collect(model, {"a": prompts}, progress=False)["a"]
    chosen, train, apart = PatchSet.random(PatchSpace(model), 4), prompts[held_out:], prompts[:held_out]
    learn_vector(model, vector, chosen, train, steps=steps, held_out=apart, progress=False)
    assert efficiency.cost_of(steps, held_out) == sum(spent)
    assert efficiency.steps_for(sum(spent), held_out) == steps
    assert efficiency.steps_for(sum(spent) - 1, held_out) == steps - 1


def test_what_a_search_needs_to_reach_the_published_one(script):
    def row(label, budget, loss):
        return {"label": label, "budget": budget, "test loss": [loss, loss + 0.2], "held-out loss": [loss + 1] * 2}

    efficiency = script("search_efficiency")
    rows = [row("paper", 9, 2.0), row("a", 1, 3.0), row("a", 2, 2.0), row("a", 4, 1.0), row("b", 1, 4.0)]
    first, second = efficiency.summarise(rows)
    assert (first["label"], first["needed by test loss"], first["needed by held-out loss"]) == ("a", 2, 2)
    assert first["area"] == pytest.approx(2.1) and second["area"] == pytest.approx(4.1)
    assert second["needed by test loss"] is None and first["times fewer, whole budget"] == 9 / 2
    assert first["times fewer, sample"] is None and second["times fewer, whole budget"] is None
    curve = [{"evaluations": n, "sample": s, "thresholded": t} for n, s, t in ((2, 5, 3), (6, 3, 1), (9, 1, 1))]
    rows[0]["curves"] = [curve, [moment | {"sample": moment["sample"] + 1.15} for moment in curve]]
    assert efficiency.reached_by_itself(rows[0]) == {
        "sample": {"mean": 9, "seeds": [9, None]},
        "thresholded": {"mean": 6, "seeds": [6, 6]},
    }
    first = efficiency.summarise(rows)[0]
    assert (first["times fewer, sample"], first["times fewer, thresholded"]) == (9 / 2, 6 / 2)


@pytest.mark.nightly
def test_data_size(tmp_path):
    found, printed = quick("data_size", tmp_path)
    few, all_of_it = found["rows"]
    assert [(row["kind"], row["share"], row["canvases"]) for row in (few, all_of_it)] == [
        ("figures", 0.1, 8),
        ("figures", 1.0, 80),
    ]
    for row in (few, all_of_it):
        assert list(row["tasks"]) == [task.name for task in tasks.VTV]
        for own in row["tasks"].values():
            for measure in ("score", "loss"):
                mean, low, high = own[measure]["one-shot"]
                assert low <= mean <= high
            assert own["loss"]["zero-shot"] != own["loss"]["one-shot"]
    assert few["seen"] < few["unseen"] and few["unseen"] != all_of_it["unseen"]  # eight canvases, ten times
    assert printed.count("\n| figures ") == 2
    folders = {path.parent.name for path in (tmp_path / "data_size").rglob("checkpoint.pt")}
    assert folders == {"tokenizer", "figures-0.1", "figures-1"}


@pytest.mark.nightly
def test_attention_by_the_command_line(tmp_path):
    command = [sys.executable, "-m", "vtv_nnsight", "bench", "attention", "--quick", "--device", "cpu", "--out"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, zero = read("attention", tmp_path)["rows"]
    assert (one["prompts"], zero["prompts"]) == ("one-shot", "zero-shot")
    assert set(one["shares"]) - set(zero["shares"]) == {"example_input", "example_output"}
    for row in (one, zero):
        assert np.allclose(np.sum(list(row["shares"].values()), 0), 1, atol=1e-4)
        assert sum(row["even"].values()) == pytest.approx(1)
    assert done.stdout.count("\n| example_output ") == 1


@pytest.mark.nightly
def test_embedded_model(tmp_path):
    numbers = quick("embedded_model", tmp_path)[0]["numbers"]
    means = {name: value[0] for name, value in numbers.items() if name.startswith("scenes, segmentation, ")}
    assert means["scenes, segmentation, ceiling"] >= means["scenes, segmentation, one-shot"] > 0.7
    assert means["scenes, segmentation, zero-shot"] < 0.5


@pytest.mark.nightly
def test_ablations(tmp_path):
    found, text = quick("ablations", tmp_path)
    rows = {(row["varies"], row["value"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) and {row["task"] for row in found["rows"]} == {"segmentation"}
    most = max(found["settings"]["prompts"])
    bases = [row for row in rows.values() if row["is_base"]]
    assert {(row["varies"], row["value"]) for row in bases} == {
        ("stages", "both"),
        ("granularity", "quadrant"),
        ("training_prompts", most),
        ("averaged_prompts", most),
        ("masks", "one each"),
    }
    for row in bases:
        assert row["score"] == bases[0]["score"] and row["score"]["difference_high"] == 0
    for row in rows.values():
        for measure in (row["score"], row["token_loss"]):
            assert measure["low"] <= measure["mean"] <= measure["high"]
            assert np.mean(measure["of_seeds"]) == pytest.approx(measure["mean"])
            assert f"{measure['mean']:.3f} [" in text
        several = len(tasks.VTV) if row["value"] == "one for all" else 1
        assert all(spent <= several * found["settings"]["budget"] for spent in row["evaluations"])
        assert all(units <= row["units_to_choose_from"] for units in row["units_patched"])

    def units(*key):
        return rows[key]["units_to_choose_from"]

    assert units("stages", "encoder") + units("stages", "decoder") == units("stages", "both")
    assert units("granularity", "head") < units("granularity", "quadrant") < units("granularity", "token")
    assert rows["masks", "all positions"]["units_patched"] == [units("masks", "one each")]
    assert rows["masks", "random units"]["units_patched"] == rows["masks", "one each"]["units_patched"]
    assert rows["masks", "one for all"]["evaluations"][0] > found["settings"]["budget"]
    one_shot, zero_shot = (rows["reference", name] for name in ("one-shot", "zero-shot"))
    assert one_shot["score"]["mean"] > zero_shot["score"]["mean"]
    assert one_shot["token_loss"]["mean"] < zero_shot["token_loss"]["mean"]


def test_a_variation_changes_one_thing(script):
    ablations = script("ablations")
    asked = ablations.plan([30, 1, 100])
    base = asked["masks", "one each"]
    assert base == ("both", "quadrant", 100, 100)
    for (varies, value), setting in asked.items():
        if varies == "masks":
            assert setting in (base, value)
        else:
            assert getattr(setting, varies) == value and setting == base._replace(**{varies: value})
    assert [value for varies, value in asked if varies == "training_prompts"] == [1, 30, 100]


def test_differences_are_paired(script):
    summary = script("ablations").summary
    base = np.random.default_rng(0).normal(size=(3, 50))
    found = summary(base + 1, base)
    assert found["mean"] == pytest.approx(base.mean() + 1) and found["low"] < found["mean"] < found["high"]
    assert [found[f"difference_{end}"] for end in ("mean", "low", "high")] == pytest.approx([1, 1, 1])
    assert found["of_seeds"] == pytest.approx(base.mean(1) + 1)


def test_a_search_that_evaluate_contradicts_stops_the_ablations(script):
    agree = script("ablations").agree
    judged = SimpleNamespace(values=lambda *_: np.array([1.0, 3.0]))
    agree("identity", {"a": SimpleNamespace(held_out_loss=2.0)}, judged)
    for loss in (2.01, float("nan")):
        with pytest.raises(SystemExit, match="identity, a: the search ended with a held-out loss of .* do not compute"):
            agree("identity", {"a": SimpleNamespace(held_out_loss=loss)}, judged)


@pytest.mark.nightly
def test_scaling(tmp_path):
    found, text = quick("scaling", tmp_path)
    assert [row["granularity"] for row in found["units"]] == ["head", "quadrant", "token"]
    counts = [row["units"] for row in found["units"]]
    assert counts == sorted(counts)
    for row in found["units"]:
        assert row["seconds_per_search_step"] > row["seconds_per_evaluation"] > 0
    assert found["prompts"][-1]["seconds_to_set_up"] > found["prompts"][0]["seconds_to_set_up"] > 0
    for row in found["masks"]:
        assert row["seconds_per_call"] == pytest.approx(row["masks_in_a_call"] * row["seconds_per_evaluation"])
    assert found["masks"][-1]["seconds_per_call"] > found["masks"][0]["seconds_per_call"]
    one, *more = found["processes"]
    assert (one["processes"], one["threads_each"], one["times_as_fast"]) == (1, 1, 1)
    assert [row["processes"] for row in more] == found["settings"]["processes"][1:]
    for row in found["processes"]:
        assert row["largest_difference_of_a_loss"] <= 1e-5
        gain = row["evaluations_per_second"] / one["evaluations_per_second"]
        assert row["times_as_fast"] == pytest.approx(gain)
    for part in ("units", "prompts", "masks", "processes"):
        assert f"\n{part}\n" in text


def test_more_processes_than_cores_are_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--device", "cpu", "--processes", "1", "100000"])
    with pytest.raises(SystemExit):
        script("scaling").main()
    assert "cores for processes" in capsys.readouterr().err


def test_losses_that_differ_stop_the_timing(script):
    same = script("scaling").same
    losses = torch.tensor([1.0, 2.0])
    assert same("calls", {"a": losses, "b": losses + 1e-6}, 1e-5)["b"] == pytest.approx(1e-6, rel=0.2)
    for wrong in (losses + 1e-3, losses * torch.nan):
        with pytest.raises(SystemExit, match="calls: the losses of b are up to .* off those of a"):
            same("calls", {"a": losses, "b": wrong}, 1e-5)


def test_intervals_and_tables(script):
    common = script("common")
    mean, half = common.interval([1, 2, 3, 4, 5])
    assert mean == 3 and half == pytest.approx(2.776 * (2.5 / 5) ** 0.5, rel=2e-3)
    assert common.interval([2.0])[0] == 2
    assert common.table(["a", "long"], [["xyz", 1 / 3]]).splitlines() == [
        "| a   | long   |",
        "|-----|--------|",
        "| xyz | 0.3333 |",
    ]


def test_sides_take_turns(script):
    common, called = script("common"), []
    sides = {name: lambda name=name: called.append(name) for name in "abc"}
    rounds = common.alternate(sides, "cpu", spend=0, least=3)
    assert "".join(called) == "abcbcacab" and [len(times) for times in rounds.values()] == [3, 3, 3]
    assert common.ratio({"a": [2, 6, 1], "b": [1, 2, 1]}, "a", "b") == 2


def test_vtv_bench_lists_and_runs(monkeypatch, capsys):
    def vtv(*args):
        monkeypatch.setattr(sys, "argv", ["vtv", "bench", *args])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    names = {path.stem for path in FOLDER.glob("*.py")} - {"common"}
    code, out, _ = vtv()
    assert code == 0 and {line.split()[0] for line in out.splitlines()} == names
    assert "'speed' is not a benchmark; choose from ablations" in vtv("speed")[2]
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command: commands.append(command) or SimpleNamespace(returncode=3))
    assert vtv("throughput", "--quick", "--seed", "1")[0] == 3
    assert [command[1:] for command in commands] == [[str(FOLDER / "throughput.py"), "--quick", "--seed", "1"]]


def test_every_package_is_installed():
    settings = (FOLDER.parent / "pyproject.toml").read_text()
    for init in (FOLDER.parent / "vtv_nnsight").rglob("__init__.py"):
        assert f'"{".".join(init.parent.relative_to(FOLDER.parent).parts)}",' in settings
