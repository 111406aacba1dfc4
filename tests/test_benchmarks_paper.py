"""The benchmarks of the paper's ablations and of scaling: what they write must hold together."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vtv_nnsight import tasks

ROOT = Path(__file__).parents[1]


def script(name, *options):
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)


def quick(name, folder):
    done = script(name, "--quick", "--device", "cpu", "--out", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / f"{name}.json").read_text()), done.stdout


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


# Ablations


@pytest.mark.timeout(900)
def test_ablations(tmp_path):
    found, text = quick("ablations", tmp_path)
    rows = {(row["varies"], row["value"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) and {row["task"] for row in found["rows"]} == {"segmentation"}
    most = max(found["settings"]["prompts"])
    bases = [row for row in rows.values() if row["is_base"]]
    assert {(row["varies"], row["value"]) for row in bases} == {
        ("stacks", "both"),
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

    assert units("stacks", "encoder") + units("stacks", "decoder") == units("stacks", "both")
    assert units("granularity", "head") < units("granularity", "quadrant") < units("granularity", "token")
    assert rows["masks", "all positions"]["units_patched"] == [units("masks", "one each")]
    assert rows["masks", "random units"]["units_patched"] == rows["masks", "one each"]["units_patched"]
    assert rows["masks", "one for all"]["evaluations"][0] > found["settings"]["budget"]
    one_shot, zero_shot = (rows["reference", name] for name in ("one-shot", "zero-shot"))
    assert one_shot["score"]["mean"] > zero_shot["score"]["mean"]
    assert one_shot["token_loss"]["mean"] < zero_shot["token_loss"]["mean"]


def test_a_variation_changes_one_thing(load):
    ablations = load("ablations")
    asked = ablations.plan([30, 1, 100])
    base = asked["masks", "one each"]
    assert base == ("both", "quadrant", 100, 100)
    for (varies, value), setting in asked.items():
        if varies == "masks":
            assert setting in (base, value)
        else:
            assert getattr(setting, varies) == value and setting == base._replace(**{varies: value})
    assert [value for varies, value in asked if varies == "training_prompts"] == [1, 30, 100]


def test_differences_are_paired(load):
    summary = load("ablations").summary
    base = np.random.default_rng(0).normal(size=(3, 50))
    found = summary(base + 1, base)
    assert found["mean"] == pytest.approx(base.mean() + 1) and found["low"] < found["mean"] < found["high"]
    assert [found[f"difference_{end}"] for end in ("mean", "low", "high")] == pytest.approx([1, 1, 1])
    assert found["of_seeds"] == pytest.approx(base.mean(1) + 1)


def test_a_search_that_evaluate_contradicts_stops_the_ablations(load):
    agree = load("ablations").agree
    judged = SimpleNamespace(values=lambda *_: np.array([1.0, 3.0]))
    agree("identity", {"a": SimpleNamespace(held_out_loss=2.0)}, judged)
    for loss in (2.01, float("nan")):
        with pytest.raises(SystemExit, match="identity, a: the search ended with a held-out loss of .* do not compute"):
            agree("identity", {"a": SimpleNamespace(held_out_loss=loss)}, judged)


# Scaling


@pytest.mark.timeout(900)
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


def test_more_processes_than_cores_are_refused():
    done = script("scaling", "--device", "cpu", "--processes", "1", "100000")
    assert done.returncode == 2 and "cores for processes" in done.stderr


def test_losses_that_differ_stop_the_timing(load):
    same = load("scaling").same
    losses = torch.tensor([1.0, 2.0])
    assert same("calls", {"a": losses, "b": losses + 1e-6}, 1e-5)["b"] == pytest.approx(1e-6, rel=0.2)
    for wrong in (losses + 1e-3, losses * torch.nan):
        with pytest.raises(SystemExit, match="calls: the losses of b are up to .* off those of a"):
            same("calls", {"a": losses, "b": wrong}, 1e-5)
