import json

import numpy as np
import pytest
import torch

from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, TaskVectors, data, patch, tasks
from vtv_nnsight.circuits import (
    Curves,
    answer_loss,
    answer_metric,
    faithfulness,
    log_ratio,
    nodes,
    write_nodes,
)
from vtv_nnsight.vectors import zero_vector


@pytest.fixture(scope="module")
def model():
    return MAEVQGAN("tiny", dispatch=True)


@pytest.fixture(scope="module")
def prompts(model):
    images = data.scenes("test", n=12)
    return {t.name: t.prompts(images, n=3, seed=0, layout=model.layout) for t in (tasks.segmentation, tasks.identity)}


@pytest.fixture(scope="module")
def vectors(model, prompts):
    return TaskVectors.collect(model, prompts, progress=False)


@pytest.fixture(scope="module")
def space(model):
    return PatchSpace(model)


def made_up(kept, sizes=(0.5, 1.0), direction="in"):
    """Curves of four prompts, from m = 0 to m = 2."""
    return Curves(direction, "m", sizes, tuple(range(len(sizes))), np.full(4, 2.0), np.zeros(4), kept)


def test_faithfulness_is_the_share_of_the_way_from_nothing_to_the_whole_model():
    curves = made_up({("a", "signed", 0): np.array([[1.0] * 4, [2.0] * 4])})
    assert curves.faithfulness("a").tolist() == [0.5, 1.0]
    low, high = curves.interval("a")
    assert np.allclose(low, [0.5, 1.0]) and np.allclose(high, [0.5, 1.0])  # all prompts alike: no doubt
    row = curves.summary().iloc[0]
    assert row["CPR linear"] == pytest.approx(0.75) and row["CMD linear"] == pytest.approx(0.25)


def test_integrals_over_log_k_weigh_small_circuits_more():
    sizes = (0.01, 0.1, 1.0)
    early = made_up({("a", "signed", 0): np.array([[0.0] * 4, [2.0] * 4, [2.0] * 4])}, sizes).summary().iloc[0]
    assert early["CPR linear"] == pytest.approx((0.5 * 0.09 + 0.9) / 0.99)
    assert early["CPR log"] == pytest.approx(0.75)


def test_an_overshoot_counts_for_cpr_and_against_cmd():
    row = made_up({("a", "signed", 0): np.full((2, 4), 4.0)}).summary().iloc[0]
    assert (row["CPR linear"], row["CMD linear"]) == (pytest.approx(2), pytest.approx(1))


def test_intervals_hold_the_doubt_of_prompts_and_of_seeds():
    prompts = made_up({("a", "signed", 0): np.array([[0.0, 0, 2, 2], [2.0] * 4])})
    low, high = prompts.interval("a")
    assert low[0] < 0.5 < high[0] and low[1] == high[1] == 1
    seeds = made_up({("a", "signed", seed): np.full((2, 4), 2.0 * seed) for seed in (0, 1)})
    low, high = seeds.interval("a")
    assert (low[0], high[0]) == (0, 1) and seeds.faithfulness("a")[0] == 0.5


def test_curves_save_and_load(tmp_path):
    curves = made_up({("a b", "signed", 0): np.random.default_rng(0).random((2, 4))})
    curves.save(tmp_path / "curves.json")
    again = Curves.load(tmp_path / "curves.json")
    assert again.summary().equals(curves.summary()) and again.names == curves.names
    (tmp_path / "curves.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no faithfulness curves"):
        Curves.load(tmp_path / "curves.json")
    with pytest.raises(ValueError, match="there is no curve of 'b'"):
        curves.faithfulness("b")


def test_the_ends_of_both_directions(model, vectors, prompts, space):
    rows, scores = prompts["segmentation"], {"first": torch.arange(len(space)).flip(0).double()}
    measure = answer_loss(model, rows)
    into = faithfulness(
        model, vectors["segmentation"], rows, space, scores, measure, sizes=(0.25, 1.0), orders=["signed"],
        progress=False,
    )  # fmt: skip
    query = rows.query_only()
    with torch.no_grad(), model.trace(query):
        patch(model, vectors["segmentation"], PatchSet(space, torch.arange(len(space)) < len(space) // 4))
        output = model.output.save()
    expected = -model.losses[0].value(output, query, model.truth(rows))
    assert np.allclose(into.kept["first", "signed", 0][0], expected, atol=1e-4)
    with torch.no_grad(), model.trace(rows):
        output = model.output.save()
    assert np.allclose(into.full, -model.losses[0].value(output, rows, model.truth(rows)), atol=1e-4)

    out = faithfulness(
        model, zero_vector(model), rows, space, scores, measure, direction="out", sizes=(0.25, 1.0), progress=False
    )
    assert np.allclose(out.full, into.full, atol=1e-5)  # nothing ablated is the model as it is
    assert out.faithfulness("first")[-1] == 1 and (out.empty < out.full).all()


def test_measures_are_higher_where_the_task_is_done(model, prompts):
    rows, others = prompts["segmentation"], prompts["identity"]
    ratio = log_ratio(model, rows, others)
    assert log_ratio(model, others, rows).name == ratio.name
    for measure in (ratio, answer_loss(model, rows), answer_metric(model, tasks.segmentation, rows)):
        values = []
        for shown in (rows, others):
            with torch.no_grad(), model.trace(shown):
                output = model.output.save()
            values.append(measure.value(output, shown, torch.arange(len(rows))).mean())
        assert values[0] > values[1], measure.name


def test_an_order_by_absolute_scores_puts_harmful_units_first(model, vectors, prompts, space):
    scores = torch.zeros(len(space), dtype=torch.float64)
    scores[3], scores[5] = -2.0, 1.0
    from vtv_nnsight.circuits.faithfulness import _orders

    orders = _orders({"a": scores}, ("signed", "absolute"), len(space))
    assert orders["a", "signed", 0][0] == 5 and orders["a", "signed", 0][-1] == 3
    assert orders["a", "absolute", 0][:2].tolist() == [3, 5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"direction": "sideways"}, "direction='sideways'"),
        ({"orders": ["best"]}, "orders=\\['best'\\]"),
        ({"sizes": [0.0, 1.0]}, "sizes=\\[0.0, 1.0\\]"),
        ({"sizes": [1.5]}, "sizes=\\[1.5\\]"),
    ],
)
def test_odd_settings_are_told(model, vectors, prompts, space, options, words):
    rows = prompts["segmentation"]
    with pytest.raises(ValueError, match=words):
        faithfulness(
            model, vectors["segmentation"], rows, space, {"a": torch.zeros(len(space))}, answer_loss(model, rows),
            **options,
        )  # fmt: skip


def test_odd_scores_losses_and_counterfactuals_are_told(model, vectors, prompts, space):
    rows = prompts["segmentation"]
    with pytest.raises(ValueError, match="the scores of 'a' have shape \\[3\\]"):
        faithfulness(model, vectors["segmentation"], rows, space, {"a": torch.zeros(3)}, answer_loss(model, rows))
    with pytest.raises(ValueError, match="loss='pixels' is not a loss of this model; it has tokens"):
        answer_loss(model, rows, "pixels")
    with pytest.raises(ValueError, match="are not of the queries"):
        log_ratio(model, rows, prompts["identity"][[1, 0, 2]])


def test_nodes_of_mib(model, tmp_path):
    heads = PatchSpace(model, granularity="head")
    scores = torch.arange(len(heads)).double()
    found = nodes(heads, scores, PatchSet.named(heads, heads.names[:2]))
    assert list(found)[:2] == ["a0.h0", "a0.h1"] and found["a0.h1"] == {"score": 1.0, "in_graph": True}
    assert len(found) == len(heads) and not found["a0.h2"]["in_graph"]
    write_nodes(tmp_path / "nodes.json", heads, scores)
    written = json.loads((tmp_path / "nodes.json").read_text())["nodes"]
    assert written["a6.h0"]["label"] == "decoder.blocks.0.attn.heads[0]"  # the encoder has six blocks
    with pytest.raises(ValueError, match='granularity="head"'):
        nodes(PatchSpace(model), torch.zeros(96))
