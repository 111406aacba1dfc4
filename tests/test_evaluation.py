import csv
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import FAST, random_module, vit_mae_config
from transformers import ViTMAEForPreTraining

from vtv_nnsight import (
    MAEVQGAN,
    PatchSet,
    PatchSpace,
    TaskVectors,
    ablate,
    data,
    evaluate,
    metrics,
    patch,
    search,
    tasks,
)
from vtv_nnsight.evaluation import (
    Condition,
    Table,
    bootstrap,
    comparison,
    controls,
    each_vector,
    noise_vector,
    random_units,
    search_each,
    select_prompts,
    selection,
    with_other_examples,
)
from vtv_nnsight.evaluation.resampling import intervals
from vtv_nnsight.models.vit_mae import ViTMAE
from vtv_nnsight.report.verdicts import (
    best_others,
    rank_among_draws,
    specific_tasks,
    specificity_sentences,
    vector_pairs,
    verdicts,
)
from vtv_nnsight.search.objective import Objective

table_module = sys.modules["vtv_nnsight.evaluation.table"]


@pytest.fixture(scope="module")
def model():
    return MAEVQGAN(random_module(**FAST))


@pytest.fixture(scope="module")
def images():
    return data.scenes("train", n=30, seed=0)


@pytest.fixture(scope="module")
def prompts(model, images):
    return tasks.segmentation.prompts(images, 7, seed=0, layout=model.layout)


@pytest.fixture(scope="module")
def vectors(model, images):
    chosen = {name: tasks.get(name).prompts(images, 4, layout=model.layout) for name in ("segmentation", "lowlight")}
    return TaskVectors.collect(model, chosen, progress=False)


@pytest.fixture(scope="module")
def patches(model):
    return PatchSet.random(PatchSpace(model), 12)


@pytest.fixture(scope="module")
def table(model, prompts, vectors, patches):
    conditions = comparison(vectors["segmentation"], patches, vectors)
    return evaluate(model, tasks.segmentation, prompts, conditions, batch_size=3, keep=2, progress=False)


def answer(model, prompts, *patched, edit=None, **options):
    """What the table must hold of one condition, by `generate` and the metrics alone: scores and token losses."""
    with model.generate(prompts) as tracer:
        if patched:
            patch(model, *patched, **options)
        if edit:
            edit(model)
        canvas = tracer.result.save()
    with torch.no_grad(), model.trace(prompts):
        if patched:
            patch(model, *patched, **options)
        if edit:
            edit(model)
        logits = model.output.logits.save()
    layout = prompts.layout
    with torch.no_grad():
        codes = model._module.vqgan.encode(prompts.canvas)[:, layout.regions["output"]]
    index = layout.index(prompts.decoded, layout.regions["output"]) - 1
    rows, columns = layout.cells["output"]
    scores = metrics.iou(canvas[:, :, rows, columns], prompts.canvas[:, :, rows, columns])
    return scores, metrics.token_loss(logits[:, index], codes)


def test_every_condition_is_what_it_says(table, model, prompts, vectors, patches):
    own, other = vectors["segmentation"], vectors["lowlight"]
    random = PatchSet.random(patches.space, 12, 104_729)
    assert random != patches
    zero_shot = prompts.query_only()
    expected = {
        "one-shot": answer(model, prompts),
        "zero-shot": answer(model, zero_shot),
        "task vector": answer(model, zero_shot, own, patches),
        "one-shot + task vector": answer(model, prompts, own, patches),
        "random units": answer(model, zero_shot, own, random),
        "vector of lowlight": answer(model, zero_shot, other, patches),
    }
    for name, (scores, losses) in expected.items():
        np.testing.assert_allclose(table.values("segmentation", name), scores, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(table.values("segmentation", name, "token_loss"), losses, atol=1e-5, err_msg=name)
    losses = [tuple(losses.tolist()) for _, losses in expected.values()]
    assert len(set(losses)) == len(losses)
    with torch.no_grad():
        drawn = model._module.vqgan.decode(model._module.vqgan.encode(prompts.canvas))
    rows, columns = prompts.layout.cells["output"]
    ceiling = metrics.iou((drawn * 255).floor()[:, :, rows, columns] / 255, prompts.region("output"))
    np.testing.assert_allclose(table.values("segmentation", "tokenizer"), ceiling, atol=1e-6)
    floor = metrics.iou(prompts.region("query"), prompts.region("output"))
    np.testing.assert_allclose(table.values("segmentation", "copy"), floor, atol=1e-6)
    assert np.isnan(table.values("segmentation", "copy", "token_loss")).all()
    assert list(dict.fromkeys(table.frame["condition"])) == [*expected, "tokenizer", "copy"]


def test_what_is_evaluated_is_of_its_kind(model, prompts):
    task, words = tasks.segmentation, "evaluate was given a {} where a {} belongs; write evaluate"
    for arguments, given in (
        (("segmentation", prompts), ("str", "AnyTask")),
        ((task, prompts.canvas), ("Tensor", "Prompts")),
        ((task, [prompts]), ("list", "Prompts")),
        ((task, prompts, ["one-shot"]), ("list", "Mapping")),
    ):
        with pytest.raises(TypeError, match=words.format(*given)):
            evaluate(model, *arguments, progress=False)
    with pytest.raises(ValueError, match="there are no conditions to compare"):
        evaluate(model, task, prompts, {"random": []}, progress=False)
    with pytest.raises(TypeError, match="a str as its vector"):
        evaluate(model, task, prompts, {"swapped": ("lowlight", "decoder.blocks.0.mlp")}, progress=False)


def test_answers_are_the_same_whatever_the_batch_and_however_prompts_come(table, model, prompts):
    again = evaluate(model, tasks.segmentation, prompts.query_only(), {"x": None}, batch_size=100, progress=False)
    with pytest.raises(ValueError, match="batch_size=0 holds nothing"):
        evaluate(model, tasks.segmentation, prompts, {"x": None}, batch_size=0, progress=False)
    losses = again.values("segmentation", "x", "token_loss")
    np.testing.assert_allclose(losses, table.values("segmentation", "one-shot", "token_loss"), atol=1e-5)
    assert np.isnan([line.difference for line in again.lines()]).all()


def test_pictures(table, prompts):
    shown = table.pictures["segmentation"]
    assert list(shown)[:3] == ["prompt", "truth", "one-shot"] and len(shown) == 10
    assert all(len(cells) == 2 for cells in shown.values())
    assert torch.equal(shown["truth"], (prompts[:2].region("output") * 255).round().byte())
    rows, columns = prompts.layout.cells["output"]
    assert len(shown["prompt"][:, :, rows, columns].unique()) == 1


def test_lines_pair_images(table):
    lines = {(line.condition, line.measure): line for line in table.lines()}
    assert len(lines) == 16
    one_shot, zero_shot = (table.values("segmentation", name, "token_loss") for name in ("one-shot", "zero-shot"))
    line = lines["zero-shot", "token loss"]
    assert line.images == 7 and line.mean == pytest.approx(zero_shot.mean())
    assert line.difference == pytest.approx((zero_shot - one_shot).mean())
    assert line.low < line.mean < line.high and line.difference_low < line.difference < line.difference_high
    assert np.isnan(lines["one-shot", "token loss"].difference)


def test_bootstrap_covers_the_mean_and_shrinks():
    generator = np.random.default_rng(1)
    hits = 0
    for i in range(100):
        values = generator.normal(2, 1, size=60)
        mean, low, high = bootstrap(values, seed=i)
        assert mean == pytest.approx(values.mean())
        hits += low < 2 < high
    assert 88 <= hits <= 99
    few, many = (np.subtract(*bootstrap(generator.normal(size=n))[:0:-1]) for n in (50, 5000))
    assert 6 < few / many < 16


def test_intervals_are_those_of_0_1_where_queries_differ():
    """One resample of all series at once gives the numbers of one resample each."""

    def alone(values, folds):
        generator = np.random.default_rng(0)
        parts = [values[folds == fold] for fold in np.unique(folds)]
        means = [part[generator.integers(len(part), size=(2000, len(part)))].mean(1) for part in parts]
        return np.mean([part.mean() for part in parts]), *np.quantile(np.mean(means, axis=0), [0.025, 0.975])

    generator = np.random.default_rng(1)
    for folds in (np.zeros(40), np.repeat([0, 1, 2], [20, 15, 5])):
        series = list(generator.normal(size=(3, 40)))
        for found, values in zip(intervals(series, folds), series):
            assert found == pytest.approx(alone(values, folds), abs=1e-12)
            assert bootstrap(values, folds) == pytest.approx(found, abs=1e-12)


def test_intervals_resample_queries_not_prompts():
    """Each of 30 queries asked eight times is worth 30 prompts, not 240."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=30)
    repeated, queries = np.repeat(values, 8), np.repeat(np.arange(30), 8)
    order = generator.permutation(240)
    few = bootstrap(values)
    for given in ((repeated, queries), (repeated[order], queries[order] * 7919)):
        mean, low, high = bootstrap(given[0], identifiers=given[1])
        assert mean == pytest.approx(few[0]) and high - low == pytest.approx(few[2] - few[1], rel=0.1)
    mean, low, high = bootstrap(repeated)
    assert high - low < 0.5 * (few[2] - few[1])
    frame = {"task": "t", "metric": "mse", "condition": "x", "fold": 0, "image": range(240), "score": repeated}
    (line, _) = Table(pd.DataFrame(frame | {"query": queries})).lines()
    assert (line.mean, line.low, line.high) == pytest.approx(
        bootstrap(repeated, identifiers=queries)
    ) and line.images == 240


def test_intervals_are_multiway():
    """Rows share queries and examples, each with an effect of its own: the interval covers the mean of 0 as often as it
    says, where one over queries alone, or over rows, is too sure."""
    generator = np.random.default_rng(0)
    hits = np.zeros(3)
    for _ in range(60):
        levels = generator.integers(25, size=(120, 2))
        effects = generator.normal(size=(2, 25))
        values = effects[0][levels[:, 0]] + effects[1][levels[:, 1]] + 0.5 * generator.normal(size=120)
        for i, shared in enumerate((levels, levels[:, 0], None)):
            _, low, high = bootstrap(values, identifiers=shared)
            hits[i] += low < 0 < high
    assert hits[0] >= 54 and hits[1] < 52 and hits[2] < 42


def test_factors_that_say_nothing_more_change_nothing():
    """A query that stands in one row, beside its example that several have, is drawn with that example; a second name
    for the same pictures, or one that all have, counts for nothing."""
    generator = np.random.default_rng(0)
    values, rows = generator.normal(size=40), np.arange(40)
    examples = rows % 13
    alone = bootstrap(values, identifiers=examples)
    for columns in ([rows, examples], [examples, 7 * examples], [examples, 0 * rows]):
        assert bootstrap(values, identifiers=np.stack(columns, 1)) == pytest.approx(alone, abs=1e-12)
    assert bootstrap(values, identifiers=np.stack([rows, rows + 100], 1)) == pytest.approx(bootstrap(values), abs=1e-12)
    two = np.stack([rows % 2, rows // 20], 1)  # crossed: one resample in four leaves nothing of two levels of each
    assert np.isfinite(bootstrap(values, identifiers=two)).all()


def test_a_table_knows_what_its_images_share(model):
    """Query, example, and what the rows of data tell of themselves: intervals are over all of them."""
    rows = data.pictures("test", 24)
    prompts = tasks.lowlight.prompts(rows, 16, layout=model.layout)
    assert list(prompts.factors) == ["query", "example", "object", "background", "source"]
    drawn = tasks.draw(rows, 16)
    names = [rows[i]["background"] for i in drawn.rows[:, 1].tolist()]
    same = torch.tensor([[a == b for b in names] for a in names])
    numbers = prompts[torch.arange(16)].factors["background"]
    assert torch.equal(numbers[:, None] == numbers[None], same) and same.sum() > 16
    table = evaluate(model, tasks.lowlight, prompts, {"copy": "copy"}, keep=0, progress=False)
    line = table.lines()[0]
    shared = torch.stack(list(prompts.factors.values()), 1).numpy()
    expected = bootstrap(table.values("lowlight", "copy"), identifiers=shared)
    assert (line.mean, line.low, line.high) == pytest.approx(expected)
    assert np.array_equal(table.identifiers("lowlight", "copy"), shared)


def test_intervals_are_over_draws_too():
    generator = np.random.default_rng(0)
    images, draws = generator.normal(size=(50, 1)), generator.normal(size=(1, 16))
    ((mean, low, high), one) = intervals([0.1 * images + draws, 0.1 * images[:, 0] + draws[0, 0]])
    assert mean == pytest.approx((0.1 * images + draws).mean())
    spread = 1.96 * np.hypot(0.1 * images.std() / 50**0.5, draws.std() / 4)
    assert high - low == pytest.approx(2 * spread, rel=0.15) and one[2] - one[1] < 0.1 * (high - low)


def test_a_table_of_five_tasks_is_shown_at_once(monkeypatch):
    """Every task's images are resampled once, and never again."""
    calls = []
    monkeypatch.setattr(
        table_module, "intervals", lambda series, *args: calls.append(len(series)) or intervals(series, *args)
    )
    names = ("one-shot", "zero-shot", "task vector", "copy")
    about = {"metric": "lpips", "fold": 0, "image": range(60), "score": 1.0, "token_loss": 2.0}
    rows = [pd.DataFrame({"task": f"t{i}", "condition": name} | about) for i in range(5) for name in names]
    table = Table(pd.concat(rows))
    assert repr(table) == repr(table) and table.markdown() and table._repr_html_() and len(table.lines()) == 40
    assert calls == [16] * 5 and "LPIPS ↓" in repr(table)


def test_conditions_are_values(model, prompts, vectors, patches, table):
    own, other = vectors["segmentation"], vectors["lowlight"]
    zero_shot, found = prompts.query_only(), SimpleNamespace(patches=patches)

    def silence(model):
        model.decoder.blocks[1].attn.heads[:] = 0

    conditions = {
        "one": Condition(),
        "found": Condition(vectors=own, patches=found),
        "pair": (own, found),
        "half": Condition(vectors=own, patches=patches, scale=0.5),
        "both": Condition(vectors=[own, other], patches=[found, patches]),
        "silenced": Condition("one", patches=found, ablation="zero"),
        "mean": Condition("one", patches=found, ablation=vectors.mean()),
        "run": Condition("one", run=silence),
        "floor": Condition("copy"),
    }
    found_table = evaluate(model, tasks.segmentation, prompts, conditions, keep=0, progress=False)
    mean = vectors.mean()
    expected = {
        "one": answer(model, prompts),
        "found": answer(model, zero_shot, own, patches),
        "pair": answer(model, zero_shot, own, patches),
        "half": answer(model, zero_shot, own, patches, scale=0.5),
        "both": answer(model, zero_shot, [own, other], [patches, patches]),
        "silenced": answer(model, prompts, edit=lambda model: ablate(model, patches)),
        "mean": answer(model, prompts, mean, patches),
        "run": answer(model, prompts, edit=silence),
    }
    for name, (scores, losses) in expected.items():
        np.testing.assert_allclose(found_table.values("segmentation", name), scores, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(found_table.values("segmentation", name, "loss"), losses, atol=1e-5, err_msg=name)
    assert len({tuple(losses.tolist()) for _, losses in expected.values()}) == len(expected) - 1
    np.testing.assert_allclose(found_table.values("segmentation", "floor"), table.values("segmentation", "copy"))
    assert Condition.of(None).shot == "one" and Condition.of("tokenizer").shot == "ceiling"
    assert Condition(run=silence).shot == "zero"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(shot="two"), "shot='two' is unknown; choose from one, zero, copy, ceiling"),
        (dict(shot="copy", run=print), "shot='copy' does not ask the model"),
        (dict(vectors="v"), "go together"),
        (dict(patches="p"), "go together"),
        (dict(patches="p", vectors="v", ablation="zero"), "patches vectors in or silences units"),
        (dict(prompts=0), "prompts=0 asks nothing"),
    ],
)
def test_conditions_that_make_no_sense_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Condition(**wrong)


def test_random_units_are_as_many_and_matched_where_asked(patches):
    space = patches.space

    def kinds(one):
        return sorted(zip(space.units.stage[one.choices].tolist(), space.units.group[one.choices].tolist()))

    for matched in (False, True):
        sets = random_units(SimpleNamespace(patches=patches), matched=matched, seed=5)
        assert len(sets) == 16 and {len(one) for one in sets} == {len(patches)}
        assert len({tuple(one.choices.tolist()) for one in sets}) == 16
        assert {kinds(one) == kinds(patches) for one in sets} == {matched}
        again = random_units(patches, 3, matched=matched, seed=5)
        assert all(torch.equal(a.choices, b.choices) for a, b in zip(sets, again))
    assert random_units(patches, 1)[0] == PatchSet.random(space, len(patches), 104_729)
    with pytest.raises(ValueError, match="draws=0"):
        random_units(patches, 0)


def test_controls_are_drawn_several_times(model, prompts, vectors, patches, table, tmp_path):
    own = vectors["segmentation"]
    conditions = {"one-shot": None} | controls(own, patches, vectors, draws=3)
    at_units = ["noise vector", "mean over tasks", "vector of lowlight"]
    assert list(conditions) == ["one-shot", "random units", "matched random units", *at_units]
    found = evaluate(model, tasks.segmentation, prompts, conditions, keep=2, progress=False)
    zero_shot, sets = prompts.query_only(), random_units(patches, 3)
    each = np.array([answer(model, zero_shot, own, one)[0].numpy() for one in sets])
    np.testing.assert_allclose(found.values("segmentation", "random units"), each.mean(0), atol=1e-6)
    np.testing.assert_allclose(each[0], table.values("segmentation", "random units"), atol=1e-6)
    line = next(line for line in found.lines() if line.condition == "random units")
    assert line.images == 7 and line.mean == pytest.approx(each.mean()) and line.low < line.mean < line.high
    one_shot = found.values("segmentation", "one-shot")
    assert line.difference == pytest.approx((each - one_shot).mean())
    assert [len(cells) for cells in found.pictures["segmentation"].values()] == [2] * 8
    mean = answer(model, zero_shot, 0.5 * own + 0.5 * vectors["lowlight"], patches)[0]
    np.testing.assert_allclose(found.values("segmentation", "mean over tasks"), mean, atol=1e-5)
    found.to_parquet(tmp_path / "values.parquet")
    assert repr(Table.load(tmp_path / "values.parquet")) == repr(found)


def test_controls_may_ask_fewer_prompts(model, prompts, vectors, patches, table):
    """They are compared with the others on the images that they were asked, and tables say how many these are."""
    own = vectors["segmentation"]
    few = controls(own, patches, vectors, draws=3, prompts=5)
    conditions = {"one-shot": None, "task vector": (own, patches), "copy": "copy"} | few
    found = evaluate(model, tasks.segmentation, prompts, conditions, batch_size=3, keep=0, progress=False)
    lines = {line.condition: line for line in found.lines() if line.measure == "iou"}
    counts = {name: (line.images, line.draws) for name, line in lines.items()}
    assert counts == {
        "one-shot": (7, 1),
        "task vector": (7, 1),
        "copy": (7, 1),
        "random units": (2, 3),
        "matched random units": (2, 3),
        "noise vector": (5, 1),
        "mean over tasks": (5, 1),
        "vector of lowlight": (5, 1),
    }
    zero_shot, sets = prompts.query_only(), random_units(patches, 3)
    each = np.array([answer(model, zero_shot[:2], own, one)[0].numpy() for one in sets])
    np.testing.assert_allclose(found.draws("segmentation", "random units"), each.mean(1), atol=1e-6)
    one_shot = table.values("segmentation", "one-shot")
    assert lines["random units"].difference == pytest.approx((each - one_shot[:2]).mean())
    other = table.values("segmentation", "vector of lowlight")[:5]
    mine = table.values("segmentation", "task vector")
    assert lines["vector of lowlight"].mean == pytest.approx(other.mean())
    beside = f"2 images; the task vector has {mine[:2].mean():.3f} there"
    assert f"random units, 3 draws, {beside}" in repr(found) and "vector of lowlight, 5 images; the" in repr(found)
    place = rank_among_draws(found, "segmentation")
    expected = (int((mine[:2].mean() > each.mean(1)).sum()), 3, each.mean(1).min(), each.mean(1).max(), mine[:2].mean())
    assert place == pytest.approx(expected)
    assert place.p == pytest.approx((4 - place.beaten) / 4) and place.least_p == 0.25
    pairs = vector_pairs(found).set_index("vector")
    assert list(pairs.index) == ["segmentation", "lowlight"] and set(pairs.images) == {5}
    assert pairs["mean"]["segmentation"] == pytest.approx(mine[:5].mean())
    assert pairs.difference["lowlight"] == pytest.approx((other - mine[:5]).mean())
    with pytest.raises(ValueError, match="no 'random units' of 'lowlight'"):
        rank_among_draws(found, "lowlight")
    with pytest.raises(ValueError, match="no vector of another task"):
        vector_pairs(evaluate(model, tasks.segmentation, prompts, {"x": None}, keep=0, progress=False))


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (0.2, "the vector of lowlight is not surely worse (+0.200 [+0.200, +0.200])."),
        (
            -0.2,
            "the best other vector, of lowlight, is off by -0.200 [-0.200, -0.200]; "
            "units searched for it may do better.",
        ),
    ],
)
def test_verdicts_are_sentences(shift, words):
    drawn = [("random units", 0, 0.25), ("random units", 1, 0.75), ("matched random units", 0, 0.875)]
    rows = [("task vector", 0, 0.5), ("copy", 0, 0.625), ("tokenizer", 0, 0.9375), *drawn]
    rows += [("matched random units", 1, 0.75), ("vector of lowlight", 0, 0.5 + shift)]
    about = {"task": "segmentation", "metric": "iou", "fold": 0, "image": range(8)}
    frames = [pd.DataFrame(about | {"condition": name, "draw": i, "score": score}) for name, i, score in rows]
    table = Table(pd.concat(frames))
    (said,) = verdicts(table)
    assert said == (
        "segmentation: mIoU ↑ 0.500 with the task vector; copying the query has 0.625 and the tokenizer's own picture "
        "of the truth has 0.938. Copying the query scores better than the task vector does. On 8 images the found "
        "units have 0.500 and 2 draws of random units 0.250 to 0.750: p = 0.667 by rank, of 0.333 at the least. "
        "On 8 images the found units have 0.500 and 2 draws of matched random units 0.750 to 0.875: p = 1.000 by rank, "
        f"of 0.333 at the least. Transfer at fixed units: {words}"
    )
    assert verdicts(Table(pd.concat(frames[1:3]))) == []
    (other,) = verdicts(Table(table.frame.assign(task="identity", metric="lpips", label="LPIPS ↓")))
    assert other.startswith("identity: LPIPS ↓ 0.500 with the task vector")
    assert "draws of random units 0.750 to 0.250" in other
    few = Table(table.frame.assign(query=table.frame.image % 7))
    assert verdicts(few) == [
        "segmentation: 7 pictures, 8 prompts are too few for a verdict; give 8 different pictures or more."
    ]
    assert "segmentation, 7 pictures, 8 prompts" in repr(few) and not best_others(vector_pairs(few)).worse.any()
    asked_less = table.frame[(table.frame.image < 7) | table.frame.condition.isin(["task vector", "copy"])]
    (said,) = verdicts(Table(asked_less))
    assert said.endswith("Copying the query scores better than the task vector does.")


def test_the_best_other_vector_decides():
    rows = [
        ("up", "up", True, 0.9, np.nan, np.nan),
        ("up", "a", True, 0.5, -0.5, -0.3),
        ("up", "b", True, 0.7, -0.3, -0.1),
        ("down", "down", False, 0.3, np.nan, np.nan),
        ("down", "a", False, 0.2, -0.2, 0.05),
        ("down", "b", False, 0.6, 0.1, 0.5),
    ]
    names = ("task", "vector", "higher_is_better", "mean", "difference_low", "difference_high")
    best = best_others(pd.DataFrame(rows, columns=names).assign(pictures=8))
    assert list(zip(best.task, best.vector, best.worse)) == [("up", "b", True), ("down", "a", False)]


def test_noise_has_the_norm_of_the_vector_everywhere(vectors):
    own, noise = vectors["segmentation"], noise_vector(vectors["segmentation"])
    for key, mean in own.mean.items():
        torch.testing.assert_close(noise.mean[key].norm(dim=-1), mean.norm(dim=-1), equal_nan=True)
        assert torch.nn.functional.cosine_similarity(noise.mean[key], mean, dim=-1).nanmean().abs() < 0.3
    again, other = noise_vector(own), noise_vector(own, seed=1)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(noise.mean.values(), again.mean.values()))
    assert not torch.equal(noise.mean["decoder"].nan_to_num(), other.mean["decoder"].nan_to_num())


def test_other_examples_leave_query_and_truth(model, images, prompts):
    dark = tasks.lowlight.prompts(images, 7, seed=0, layout=model.layout)
    conditions = with_other_examples(prompts, dark, 5)
    assert list(conditions) == ["wrong example", "blank example"] and conditions["wrong example"].prompts == 5
    wrong, blank = (condition.prompts_override for condition in conditions.values())
    for shown in (wrong, blank):
        assert all(torch.equal(shown.region(name), prompts.region(name)) for name in ("query", "output"))
    assert torch.equal(wrong.region("example_output"), dark.region("example_output"))
    assert (blank.region("example_input") == 1).all() and (prompts.region("example_input") < 1).any()
    found = evaluate(model, tasks.segmentation, prompts, conditions, keep=0, progress=False)
    np.testing.assert_allclose(found.values("segmentation", "blank example"), answer(model, blank)[0][:5], atol=1e-6)


def test_every_vector_is_searched_for_alike(model, images, vectors):
    """The task's own, too; and the table is read as that of vectors at fixed units is."""
    prompts, asked = (tasks.segmentation.prompts(images, n, seed=n, layout=model.layout) for n in (8, 5))
    space = PatchSpace(model)
    results = search_each(
        model, tasks.segmentation, prompts, vectors, space, budget=150, loss="tokens", seed=3, progress=False
    )
    again = search.gates(
        model, vectors["lowlight"], tasks.segmentation, prompts.query_only(), space, 150, seed=3, progress=False
    )
    assert results["lowlight"].patches == again.patches and list(results) == list(vectors)
    assert {result.algorithm for result in results.values()} == {"gates"}
    conditions = each_vector("segmentation", vectors, results)
    found = evaluate(model, tasks.segmentation, asked, conditions, keep=0, progress=False)
    assert list(vector_pairs(found).vector) == ["segmentation", "lowlight"]
    by_pixels = search_each(
        model, tasks.segmentation, prompts, vectors, space, budget=150, loss="pixels", progress=False
    )
    assert {result.algorithm for result in by_pixels.values()} == {"reinforce"}


@pytest.mark.parametrize(
    ("errors", "specific"),
    [((0.01, 0.01), True), ((0.01, 0.06), False), ((0.045, 0.045), False), ((0.04, 0.045), True)],
)
def test_a_task_is_specific_where_all_others_are_surely_worse(errors, specific):
    """Holm of two: the smaller p-value below 2.5 %, the other below 5 %."""
    half = 1.96 * np.array([np.nan, *errors])
    pairs = pd.DataFrame({"task": "t", "vector": ["t", "a", "b"], "higher_is_better": False, "mean": [0.2, 0.3, 0.3]})
    pairs = pairs.assign(difference=[np.nan, 0.1, 0.1], pictures=8)
    pairs = pairs.assign(difference_low=pairs.difference - half, difference_high=pairs.difference + half)
    assert specific_tasks(pairs) == {"t": specific}
    assert specific_tasks(pairs.assign(higher_is_better=True)) == {"t": False}
    sentences = specificity_sentences(pairs)
    assert sentences[0].endswith("does as well: t." if specific else "does as well: no task.")
    assert len(sentences) == 1 + (not specific) and specificity_sentences(pairs.assign(pictures=7)) == []


class Unbounded:
    """A model without a loss of its own or a ceiling."""

    def __init__(self, model):
        self.model, self.losses = model, ()

    def __getattr__(self, name):
        return getattr(self.model, name)

    def bound(self, kind, prompts):
        return self.model.bound(kind, prompts) if kind == "copy" else None


def test_nothing_is_encoded_twice_and_edited_canvases_are_again(model, prompts, monkeypatch):
    encoded, codes = [], type(model).codes
    monkeypatch.setattr(type(model), "codes", lambda self, canvas: encoded.append(len(canvas)) or codes(self, canvas))
    conditions = {name: name for name in ("one-shot", "zero-shot", "tokenizer")}
    evaluate(model, tasks.segmentation, prompts, conditions, batch_size=4, progress=False)
    assert sum(encoded) == len(prompts)
    own = prompts[[0, 1]]  # a copy: other tests have the same prompts
    before = model.truth(own)
    own.canvas.mul_(0)
    assert not torch.equal(model.truth(own), before)


def test_a_model_without_a_loss_or_a_ceiling(model, prompts, table):
    found = evaluate(Unbounded(model), tasks.segmentation, prompts, keep=1, progress=False)
    assert list(found.frame.condition.unique()) == ["one-shot", "zero-shot", "copy"]
    assert list(found.pictures["segmentation"]) == ["prompt", "truth", "one-shot", "zero-shot", "copy"]
    np.testing.assert_allclose(found.values("segmentation", "zero-shot"), table.values("segmentation", "zero-shot"))
    assert "nan" not in repr(found) and np.isnan(found.values("segmentation", "one-shot", "loss")).all()
    with pytest.raises(ValueError, match="nothing bounds this model"):
        evaluate(Unbounded(model), tasks.segmentation, prompts, {"x": "ceiling"}, progress=False)


def test_a_model_of_another_family(images):
    """All of it through the interface: selecting, conditions, controls, specificity."""
    torch.manual_seed(0)
    model = ViTMAE(ViTMAEForPreTraining(vit_mae_config()).eval())
    prompts = {
        name: select_prompts(model, tasks.get(name), images, 4, candidates=20, layout=model.layout, progress=False)
        for name in ("segmentation", "lowlight")
    }
    vectors = TaskVectors.collect(model, prompts, progress=False)
    units = PatchSet.random(PatchSpace(model, model.layout), 6)
    own = vectors["lowlight"]
    conditions = comparison(own, units, vectors) | controls(own, units, vectors, draws=2)
    found = evaluate(model, tasks.lowlight, prompts["lowlight"], conditions, keep=1, progress=False)
    assert "squared error loss ↓" in repr(found) and "tokenizer" not in repr(found)
    with torch.no_grad(), model.trace(prompts["lowlight"].query_only()):
        patch(model, own, units)
        output = model.output.save()
    rows, columns = model.layout.cells["output"]
    painted = model.paint(output, prompts["lowlight"].query_only())[:, :, rows, columns]
    scores = tasks.lowlight.score(painted, prompts["lowlight"].region("output"))
    np.testing.assert_allclose(found.values("lowlight", "task vector"), scores, atol=1e-6)
    pairs = vector_pairs(found)
    assert pairs.set_index("vector")["mean"]["lowlight"] == pytest.approx(float(scores.mean()))


def test_more_is_better_is_searched_for_the_right_way(model, images, vectors, patches):
    """A metric of one's own where more is better: what a search minimises is minus the score of a table."""
    closeness = metrics.Metric("closeness", lambda a, b: 1 / (1 + metrics.mse(a, b)), True, "closeness ↑")
    task = tasks.Colorization(closeness)
    prompts = task.prompts(images, 6, layout=model.layout)
    found = evaluate(model, task, prompts, {"x": (vectors["lowlight"], patches)}, keep=0, progress=False)
    zero_shot = prompts.query_only()
    objective = Objective(
        model, vectors["lowlight"], task, zero_shot[:2], patches.space, held_out=zero_shot[2:], loss="pixels"
    )
    losses = objective(patches.choices.expand(6, -1), torch.cat([objective.train, objective.held_out]))
    np.testing.assert_allclose(-losses, found.values(task.name, "x"), atol=1e-6)
    assert "closeness ↑" in repr(found) and (losses < 0).all()


def test_folds_average_as_published(table):
    """The mean of the folds' means, not of all images."""

    def fold(number, scores):
        rows = [
            {"task": "t", "metric": "iou", "condition": name, "fold": number, "image": i, "score": s + shift}
            | {"token_loss": float("nan")}
            for name, shift in (("one-shot", 0.0), ("other", 0.25))
            for i, s in enumerate(scores)
        ]
        return Table(pd.DataFrame(rows))

    joined = Table.cat([fold(0, [0.0] * 3), fold(1, [0.5] * 9)])
    one_shot, other = joined.lines()[:2]
    assert (one_shot.mean, one_shot.low, one_shot.high) == (0.25, 0.25, 0.25)
    assert other.difference == other.difference_low == 0.25 and other.images == 12


def test_tables_in_every_form(table, tmp_path):
    text, markdown, html = repr(table), table.markdown(), table._repr_html_()
    for form in (text, markdown, html):
        assert "segmentation, 7 images" in form and "mIoU ↑" in form and "one-shot + task vector" in form
        mean = table.values("segmentation", "zero-shot").mean()
        assert f"{mean:.4f} [" in form
    assert "nan" not in text and len({line.count("|") for line in markdown.splitlines()}) == 1
    table.to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and float(rows[1]["mean"]) == pytest.approx(mean)
    table.to_parquet(tmp_path / "values.parquet")
    loaded = Table.load(tmp_path / "values.parquet")
    assert repr(loaded) == text and sorted(p.name for p in tmp_path.iterdir()) == ["table.csv", "values.parquet"]
    with pytest.raises(FileNotFoundError, match="no file"):
        Table.load(tmp_path / "nothing")


def test_selected_prompts_are_the_best_that_share_no_image(model, images):
    selected = select_prompts(
        model, tasks.segmentation, images, 4, candidates=25, seed=3, batch_size=10, layout=model.layout, progress=False
    )
    candidates = tasks.segmentation.prompts(images, 25, seed=3, layout=model.layout)
    drawn = model.generate(candidates)
    rows, columns = model.layout.cells["output"]
    scores = metrics.iou(drawn[:, :, rows, columns], candidates.region("output"))
    generator = np.random.default_rng(3)
    pairs = tasks.draw_rows(images, 25, 1, generator).tolist()
    best, used = [], set()
    for i in (-scores).argsort(stable=True).tolist():
        if len(best) < 4 and not used & set(pairs[i]):
            best.append(i)
            used |= set(pairs[i])
    assert torch.equal(selected.canvas, candidates.canvas[best])
    with pytest.raises(ValueError, match="share no image; give more for 20"):
        select_prompts(model, tasks.segmentation, images, 20, candidates=25, progress=False)


@pytest.mark.parametrize("higher", [True, False])
def test_duplicates_are_removed_as_released(higher):
    """Of one example, then of one query, the lowest metric stays, even where more is better."""
    generator = np.random.default_rng(0)
    rows, metric = generator.integers(8, size=(60, 2)), torch.from_numpy(generator.permutation(60).astype(float))
    ordered = sorted(range(60), key=lambda i: metric[i])
    by_example = {}
    for i in ordered:
        by_example.setdefault(rows[i, 0], i)
    by_query = {}
    for i in by_example.values():
        by_query.setdefault(rows[i, 1], i)
    expected = sorted(by_query.values(), key=lambda i: metric[i], reverse=higher)
    assert selection._published(-metric if higher else metric, rows, higher) == expected


def test_candidates_of_ones_own(model, images):
    images = [{"image": row["image"]} for row in images]
    drawn = tasks.draw_queries(images, [3, 4, 5, 3], seed=2)
    assert drawn.rows[:, 1].tolist() == [3, 4, 5, 3] and len(drawn) == 4
    options = dict(layout=model.layout, progress=False, drawn=drawn)
    kept = select_prompts(model, tasks.lowlight, images, 2, duplicates="published", **options)
    canvases = tasks.lowlight.compose(images, drawn, model.layout).canvas
    assert all(any(torch.equal(canvas, other) for other in canvases) for canvas in kept.canvas)
    with pytest.raises(ValueError, match="4 candidates of 'lowlight' hold"):
        select_prompts(model, tasks.lowlight, images, 4, **options)
    with pytest.raises(ValueError, match="duplicates='all' is unknown; choose from apart, published"):
        select_prompts(model, tasks.lowlight, images, 1, duplicates="all", **options)
    few = [{"image": images[0]["image"], "label": i} for i in range(2)]
    with pytest.raises(ValueError, match="row 1 has 0 others of its class and a prompt needs 1"):
        tasks.draw_queries(few, [1])


def test_bad_input(model, prompts, vectors, patches, table):
    with pytest.raises(ValueError, match="no prompts of 'segmentation'"):
        evaluate(model, tasks.segmentation, prompts[:0])
    with pytest.raises(ValueError, match="no conditions"):
        evaluate(model, tasks.segmentation, prompts, {})
    with pytest.raises(ValueError, match="condition 'x' is 'two-shot'; choose one of one-shot, zero-shot"):
        evaluate(model, tasks.segmentation, prompts, {"x": "two-shot"}, progress=False)
    with pytest.raises(ValueError, match="condition 'x' is 'copy'"):
        evaluate(model, tasks.segmentation, prompts, {"x": (vectors["segmentation"], patches, "copy")}, progress=False)
    with pytest.raises(ValueError, match="no 'x' of 'segmentation'"):
        table.values("segmentation", "x")


def test_load_names_data(tmp_path):
    assert len(data.load("scenes", n=3)) == 3
    for i in range(5):
        data.scenes("train", n=5)[i]["image"].save(tmp_path / f"{i}.png")
    few = [data.load(str(tmp_path), n=3, seed=seed) for seed in (0, 0, 1)]
    assert [len(rows) for rows in few] == [3, 3, 3] and len(data.load(str(tmp_path))) == 5
    pixels = [[np.asarray(row["image"]).sum() for row in rows] for rows in few]
    assert pixels[0] == pixels[1] != pixels[2]
    with pytest.raises(ValueError, match="not a source of data"):
        data.load("nowhere")


@pytest.mark.slow
def test_command_line(vtv, model, patches, tmp_path):
    model._module.save_pretrained(tmp_path / "model")
    patches.save(tmp_path / "patches.json")
    file, made = tmp_path / "vectors.safetensors", tmp_path / "results"
    common = ("--data", "scenes", "--max-images", 12, "--n", 3, "--tasks", "segmentation,lowlight")
    code, out, _ = vtv("collect", tmp_path / "model", *common, "--select", 12, "-o", file)
    assert code == 0 and f"wrote {file}" in out and list(TaskVectors.load(file)) == ["segmentation", "lowlight"]
    patched = ("--vectors", file, "--patches", tmp_path / "patches.json")
    code, out, _ = vtv("evaluate", tmp_path / "model", *common, *patched, "-o", made)
    assert code == 0 and "vector of lowlight" in out and "vector of segmentation" in out
    names = {"table.md", "table.csv", "values.parquet", "segmentation.png", "lowlight.png"}
    assert {path.name for path in made.iterdir()} == names and all(f"wrote {made / name}" in out for name in names)
    assert Table.load(made / "values.parquet").values("lowlight", "task vector").shape == (3,)
    for wrong, message in (
        (("collect", tmp_path / "model", "--tasks", "swimming", "-o", file), "'swimming' is not a task"),
        (("evaluate", tmp_path / "model", "--vectors", file, "-o", made), "--vectors and --patches go together"),
        (("evaluate", tmp_path / "model", "--tasks", "identity", *patched, "-o", made), "no vector of 'identity'"),
    ):
        code, _, complaint = vtv(*wrong)
        assert code == 1 and message in complaint
    for command in ("collect", "evaluate"):
        assert f"vtv {command} " in vtv(command, "-h")[1].split("Example", 1)[1]


def test_a_condition_adds(model, prompts, vectors, patches):
    own, mode = vectors["segmentation"], dict(scale=0.3, mode="add")
    table = evaluate(
        model, tasks.segmentation, prompts, {"x": Condition(vectors=own, patches=patches, **mode)}, progress=False
    )
    losses = answer(model, prompts.query_only(), own, patches, **mode)[1]
    np.testing.assert_allclose(table.values("segmentation", "x", "token_loss"), losses, atol=1e-5)
    assert not np.allclose(losses, answer(model, prompts.query_only(), own, patches, scale=0.3)[1], atol=1e-3)


@pytest.mark.slow
def test_models_beside_one_another(vtv, model, tmp_path):
    """Of one kind and of another, on the same queries."""
    model._module.save_pretrained(tmp_path / "mine")
    torch.manual_seed(0)
    ViTMAEForPreTraining(vit_mae_config()).save_pretrained(tmp_path / "mae")
    out = tmp_path / "out"
    args = ("evaluate", tmp_path / "mine", "--beside", tmp_path / "mae", "--n", 3, "--tasks", "identity", "-o", out)
    code, said, complaint = vtv(*args)
    assert code == 0, complaint
    assert {path.name for path in out.iterdir()} == {"0_mine", "1_mae", "models.md"}
    text = (out / "models.md").read_text()
    assert text.strip() in said and text.count("identity, MSE ↓") == 2
    for name in ("0_mine", "1_mae"):
        table = Table.load(out / name / "values.parquet")
        assert f"{table.values('identity', 'one-shot').mean():.3f} [" in text
        assert (table.values("identity", "copy") == 0).all()
    assert vtv(*args, "--vectors", "v", "--patches", "p")[0] == 1
