"""What is shown of a run: answers under gates, the demonstration of one query, its animation, where its answer looks,
and bundles."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, TaskVectors, data, patch, tasks
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.models.mae_vqgan.traced import AttentionEnvoy
from vtv_nnsight.prompts import crop
from vtv_nnsight.report import play
from vtv_nnsight.report.attention import attention_maps
from vtv_nnsight.report.explorer import MAX_LOOKS, SCALES, QueryExplorer, demonstrate, median
from vtv_nnsight.report.gates import generate_with_gates
from vtv_nnsight.report.hero import animation, save_animation
from vtv_nnsight.runs import bundles
from vtv_nnsight.search.result import SearchResult, Step


@pytest.fixture(scope="module")
def model(small_config):
    torch.manual_seed(0)
    return MAEVQGAN(MAEVQGANModel(small_config()).eval())


@pytest.fixture(scope="module")
def prompts(model):
    rows = data.scenes("train", n=24, seed=0)
    return {task.name: task.prompts(rows, 5, layout=model.layout) for task in (tasks.segmentation, tasks.lowlight)}


@pytest.fixture(scope="module")
def vectors(model, prompts):
    return TaskVectors.collect(model, prompts, progress=False)


LEVEL = {"rtol": 0, "atol": 1.01 / 255}
"""Pictures are rounded to 8 bits, and sums differ with the batch."""


@pytest.fixture(scope="module")
def found(model, vectors):
    """Task → a result, as a search would give it."""
    space, steps = PatchSpace(model), (Step(10, 0.1, 1.0, 1.0, 6),)
    return {
        name: SearchResult("random", PatchSet.random(space, 6, seed), torch.rand(len(space)).double(), False, 1.0, 10,
                           steps, {}, seed)
        for seed, name in enumerate(vectors)
    }  # fmt: skip


@pytest.fixture(scope="module")
def shown(model, prompts, vectors, found):
    scores = np.array([0.5, 0.1, 0.4, 0.9, 0.2])
    return demonstrate(model, tasks.segmentation, prompts["segmentation"], scores, vectors, found)


def test_answers_under_gates_are_those_of_patching(model, prompts, vectors, found):
    asked, patches = prompts["segmentation"], found["segmentation"].patches
    gates = torch.stack([torch.zeros(len(patches.space)), patches.choices.float(), 0.5 * patches.choices])
    cells = generate_with_gates(model, asked[1], vectors["segmentation"], patches.space, gates)
    for row, scale in zip(cells, (0.0, 1.0, 0.5)):
        with torch.no_grad(), model.generate(asked[1].query_only()) as tracer:
            patch(model, vectors["segmentation"], patches, scale=scale)
            canvas = tracer.result.save()
        torch.testing.assert_close(row, crop(canvas, "output", asked.layout)[0], **LEVEL)
    small = generate_with_gates(model, asked[1], vectors["segmentation"], patches.space, gates, batch_size=2)
    torch.testing.assert_close(small, cells, **LEVEL)
    several = generate_with_gates(model, asked[:3], vectors["segmentation"], patches.space, gates)
    assert several.shape == cells.shape
    with pytest.raises(ValueError, match="2 prompts go with 3 rows"):
        generate_with_gates(model, asked[:2], vectors["segmentation"], patches.space, gates)


def test_the_median_is_of_different_queries():
    queries = torch.tensor([7, 7, 7, 8, 9])
    assert median(np.array([0.9, 0.8, 0.7, 0.1, 0.5]), queries) == 4


def test_a_demonstration(model, prompts, vectors, found, shown, tmp_path):
    patches = found["segmentation"].patches
    assert shown.queries == len(prompts["segmentation"].queries.unique())
    assert [len(shown.pictures[name]) for name in ("query", "truth", "scale", "without", "vectors")] == [
        1, 1, len(SCALES), len(patches), 2,
    ]  # fmt: skip
    assert shown.units == list(patches) and shown.vectors == list(vectors)
    whole, own = shown.pictures["scale"][-1].int(), shown.pictures["vectors"][0].int()
    assert (whole - own).abs().max() <= 1  # of another batch: its sums may differ in the last digit
    row = prompts["segmentation"][2]
    left = (row.region("query") * 255).round().byte()
    assert torch.equal(shown.pictures["query"], left)
    first = patches - PatchSet.named(patches.space, [shown.units[0]])
    cell = generate_with_gates(model, row, vectors["segmentation"], patches.space, first.choices[None])
    assert shown.scores["without"][0] == pytest.approx(float(tasks.segmentation.score(cell, row.region("output"))))
    shown.save(tmp_path / "shown.safetensors")
    again = QueryExplorer.load(tmp_path / "shown.safetensors")
    assert again.scores == shown.scores and torch.equal(again.pictures["scale"], shown.pictures["scale"])
    assert again.looks == shown.looks and torch.equal(again.attention, shown.attention)
    with pytest.raises(ValueError, match="expected demonstration"):
        vectors.save(tmp_path / "vectors.safetensors")
        QueryExplorer.load(tmp_path / "vectors.safetensors")


@pytest.mark.parametrize("query_only", [False, True])
def test_attention_maps_are_the_rows_of_the_answer(model, prompts, query_only):
    asked = prompts["segmentation"].query_only() if query_only else prompts["segmentation"]
    maps, layout = attention_maps(model, asked), asked.layout
    assert set(maps) == {"decoder"}  # the encoder holds no token of the answer
    patterns, module = [], model._module
    assert module.config._attn_implementation == "sdpa"
    module.set_attn_implementation("eager")
    layers = [block.attn.softmax for block in module.decoder.blocks]
    hooks = [layer.register_forward_hook(lambda *args: patterns.append(args[-1])) for layer in layers]
    with torch.no_grad():
        module(asked.canvas, asked.visible, asked.decoded)
    module.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()
    rows = layout.index(asked.decoded, layout.regions["output"])
    expected = torch.stack([pattern[:, :, rows].mean((0, 2)) for pattern in patterns])
    seen = model.positions("decoder", asked)
    torch.testing.assert_close(maps["decoder"][..., seen], expected)
    unseen = torch.ones(layout.num_positions, dtype=torch.bool).index_fill(0, seen, False)
    assert maps["decoder"][..., unseen].isnan().all() and bool(unseen.any()) == query_only
    shares = layout.shares(maps["decoder"])
    torch.testing.assert_close(sum(shares.values()), torch.ones(expected.shape[:2]))
    assert bool(shares["example_output"].any()) != query_only
    grid = layout.on_grid(maps["decoder"])
    assert torch.equal(grid.flatten(-2)[..., seen[1:] - 1], maps["decoder"][..., seen[1:]])


def test_a_demonstration_keeps_the_attention_of_the_heads_patched_at_the_answer(model, prompts, vectors, found):
    asked, space = prompts["segmentation"], found["segmentation"].patches.space
    everything = replace(found["segmentation"], patches=PatchSet(space, torch.ones(len(space))))
    shown = demonstrate(model, tasks.segmentation, asked, np.arange(5), vectors, found | {"segmentation": everything})
    maps = attention_maps(model, asked[2])["decoder"]
    assert shown.looks[0] == "decoder, all heads"
    torch.testing.assert_close(shown.attention[0], maps.mean((0, 1)))
    order = sorted(space.names, key=lambda name: -everything.scores[space.index_of[name]])
    heads = [name for name in order if name.startswith("decoder") and name.endswith("@ output")][:MAX_LOOKS]
    assert len(heads) == len(shown.looks) - 1 == 2
    for name, look, own in zip(heads, shown.looks[1:], shown.attention[1:]):
        layer, head = int(name.split(".")[2]), int(name.split("[")[1].split("]")[0])
        assert look == f"decoder, layer {layer}, head {head}"
        torch.testing.assert_close(own, maps[layer, head])


def test_attention_is_laid_over_the_prompt(model, shown):
    layout = model.layout
    one = torch.zeros(layout.num_positions).index_fill(0, torch.tensor([6]), 0.25)  # patch 5: row 1, column 1
    even = QueryExplorer(shown.task, shown.pictures, {}, [], [], [], 1, ["one", "none"], torch.stack([one, 0 * one]))
    picture, plain = play.overlays(even, layout).long()
    covered = layout.pixels(torch.tensor([5]))
    assert torch.equal(picture[:, ~covered], plain[:, ~covered]) and (plain[0] == plain[1]).all()
    red, green, blue = picture[:, covered]
    assert (red > 180).all() and (red > green + 60).all() and (green > blue).all()
    table = play.shares(shown, layout).set_index("attention of")
    assert list(table.index) == shown.looks and list(table) == ["cls", *layout.disjoint_regions]
    np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-5)
    said = play.attention_pictures(shown, layout)
    assert [own["share"] for own in said["maps"]] == table.max(axis=1).tolist()
    assert {own["most"] for own in said["maps"]} <= {
        "CLS", "the example", "the example's answer", "the query", "the answer itself",
    }  # fmt: skip


def test_models_without_patterns_show_none(model, prompts, vectors, found, monkeypatch):
    monkeypatch.delattr(AttentionEnvoy, "pattern")
    assert attention_maps(model, prompts["segmentation"]) == {}
    scores = np.arange(5) / 5
    plain = demonstrate(model, tasks.segmentation, prompts["segmentation"], scores, vectors, found)
    assert plain.looks == [] and play.attention_pictures(plain, model.layout) is None


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_an_animation_moves_and_repeats(shown, tmp_path, kind):
    frames = animation(shown)
    assert len(frames) == len(SCALES) and len({frame.tobytes() for frame in frames}) == len(frames)
    save_animation(frames, tmp_path / f"hero.{kind}", kind)
    with Image.open(tmp_path / f"hero.{kind}") as picture:
        assert picture.n_frames == len(SCALES) and picture.info["loop"] == 0 and picture.size == frames[0].size
    assert (tmp_path / f"hero.{kind}").stat().st_size < 600_000


def test_a_bundle_comes_back(model, prompts, vectors, found, tmp_path):
    bundle = bundles.Bundle(vectors, found)
    bundle.compact().save(tmp_path, torch.float16)
    again = bundles.load(tmp_path)
    assert list(again) == ["segmentation", "lowlight"] and again["lowlight"][1] == found["lowlight"].patches
    kept = again.vectors["lowlight"].present["decoder"].nonzero()[:, 0]
    assert kept.tolist() == [0, *(1 + model.layout.query_band).tolist()]
    mean = again.vectors["lowlight"].mean["decoder"][:, kept]
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, vectors["lowlight"].mean["decoder"][:, kept], rtol=1e-3, atol=1e-4)
    again.check(model)
    cells = [
        generate_with_gates(
            model, prompts["lowlight"][0], b["lowlight"][0], b["lowlight"][1].space, b["lowlight"][1].choices[None]
        )
        for b in (bundle, again)
    ]
    assert cells[0].shape == cells[1].shape
    with pytest.raises(KeyError, match="nothing of 'identity'; choose from segmentation, lowlight"):
        again["identity"]


def test_what_is_no_bundle_is_one_sentence(vectors, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        bundles.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no vectors.safetensors; give a folder that `vtv run` wrote"):
        bundles.load(tmp_path)
    (tmp_path / "fold1").mkdir()
    vectors.save(tmp_path / "fold1" / "vectors.safetensors")
    with pytest.raises(FileNotFoundError, match=r"give one of its folds \(fold1\)"):
        bundles.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no run.json, which says what is in it; let `vtv run` make it"):
        bundles.load(tmp_path / "fold1")


def test_a_notebook_shows_maps(model, vectors, found):
    result = found["segmentation"]
    for shown in (vectors, result, result.patches):
        with Image.open(io.BytesIO(shown._repr_png_())) as picture:
            assert picture.width > picture.height
    alone = TaskVectors({"lowlight": vectors["lowlight"]})
    assert alone._repr_png_() is None
    assert PatchSet.random(PatchSpace(model, granularity="token"), 3)._repr_png_() is None


def test_a_model_makes_prompts_in_its_layout(model, tmp_path):
    row, other = data.scenes("train", n=2, seed=3)
    row["image"].save(tmp_path / "a.png")
    made = model.prompt("segmentation", {"image": tmp_path / "a.png", "mask": row["mask"]}, other["image"])
    expected = tasks.segmentation.prompt(row, {"image": other["image"]}, model.layout)
    assert torch.equal(made.canvas, expected.canvas)
    shown = model.prompt(None, (row["image"], row["mask"]), other["image"])
    assert torch.equal(shown.region("query"), made.region("query"))
    with pytest.raises(ValueError, match="without a task the example is a pair"):
        model.prompt(None, row["image"], other["image"])
