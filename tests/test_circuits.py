import json
import re

import numpy as np
import pytest
import torch

from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, TaskVectors, data, patch, search, tasks
from vtv_nnsight.models.interface import ByStage
from vtv_nnsight.search import NamedUnits, Objective
from vtv_nnsight.studies.circuits import (
    RANKINGS,
    ComplementObjective,
    Curves,
    KnownCircuit,
    answer_loss,
    answer_metric,
    auroc,
    by_head,
    centroid_accuracy,
    counterfactual,
    faithfulness,
    log_ratio,
    nodes,
    rank_units,
    write_nodes,
)
from vtv_nnsight.vectors import Activations, zero_vector


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


def test_prompts_that_share_a_picture_are_resampled_together():
    values = np.array([[0.0, 0, 2, 2], [2.0] * 4])
    alone = made_up({("a", "signed", 0): values})
    shared = Curves(*(getattr(alone, name) for name in alone.__dataclass_fields__ if name != "identifiers"),
                    np.array([1, 2, 1, 2]))  # fmt: skip
    widths = [one.interval("a")[1][0] - one.interval("a")[0][0] for one in (alone, shared)]
    assert widths == [1, 0]  # each picture has one prompt that works and one that does not


def test_unit_counts_and_the_marked_pair_are_mibs(model, prompts, vectors, space):
    """int(share * units), and CPR of the signed order beside CMD of the absolute one."""
    rows, scores = prompts["segmentation"], {"a": torch.randn(96, generator=torch.Generator().manual_seed(0))}
    curves = faithfulness(model, vectors["segmentation"], rows, space, scores, answer_loss(model, rows), progress=False)
    assert len(space) == 96 and curves.counts == (0, 0, 0, 0, 1, 4, 9, 19, 48, 96)
    signed, absolute = (line for line in repr(curves).splitlines() if " signed " in line or " absolute " in line)
    marked = [re.findall(r"\](\*?)(?: |$)", line) for line in (signed, absolute)]
    assert marked == [["*", ""] * 2, ["", "*"] * 2]  # CPR linear, CMD linear, CPR log, CMD log


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
    assert out.faithfulness("first")[-1] == pytest.approx(1, abs=1e-12) and (out.empty < out.full).all()


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
    from vtv_nnsight.studies.circuits.faithfulness_curves import _orders

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
    with pytest.raises(ValueError, match="loss='pixels' is unknown; choose from tokens"):
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
    both = PatchSpace(model, granularity="head", sites=("heads", "mlp"))
    found = nodes(both, torch.arange(len(both)).double())
    assert len(found) == len(both) == 50 and found["m0"]["score"] == 24 and found["a6.h0"]["score"] == 30
    assert found["m9"]["score"] == 49
    with pytest.raises(ValueError, match="residual is no node of MIB; use a space of sites heads, mlp"):
        nodes(PatchSpace(model, granularity="head", sites="residual"), torch.zeros(10))
    values = torch.arange(96).double()
    summed = by_head(PatchSpace(model), values)
    assert summed.shape == (len(heads),) and summed[0] == 0 + 1 and summed[-1] == 93 + 94 + 95


def named_by_eap_ig(layers, heads):
    """Nodes and edges of EAP-IG's graph of a model of these sizes (attention before MLP): all the names it knows."""
    stream, edges = ["input"], set()
    for layer in range(layers):
        attention = [f"a{layer}.h{head}" for head in range(heads)]
        edges |= {f"{start}->{end}<{letter}>" for start in stream for end in attention for letter in "qkv"}
        stream += attention
        edges |= {f"{start}->m{layer}" for start in stream}
        stream.append(f"m{layer}")
    return {*stream, "logits"}, edges | {f"{start}->logits" for start in stream}


def test_written_nodes_are_a_graph_of_eap_ig(model, tmp_path):
    """Its `Graph.from_json` wants cfg, nodes and edges, knows every name by the sizes in cfg, and keeps what has no
    score; a circuit is connected, so that pruning leaves it."""
    heads = PatchSpace(model, granularity="head")
    for number, circuit in enumerate((None, PatchSet.named(heads, [heads.names[0], heads.names[-1]]))):
        write_nodes(tmp_path / "nodes.json", heads, torch.arange(len(heads)), circuit)
        graph = json.loads((tmp_path / "nodes.json").read_text())
        assert graph["cfg"] == {"n_layers": 10, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 128}
        names, edges = named_by_eap_ig(10, 4)
        assert set(graph["nodes"]) == names and set(graph["edges"]) <= edges
        inside = {name for name, node in graph["nodes"].items() if node["in_graph"]}
        assert (
            len(inside) == len(names)
            if circuit is None
            else inside == {"input", "logits", "a0.h0", "a9.h3"} | {f"m{layer}" for layer in range(10)}
        )
        ends = (edge.split("<")[0].split("->") for edge in edges)
        expected = {edge for edge, (start, end) in zip(edges, ends) if start in inside and end in inside}
        assert set(graph["edges"]) == expected and all(edge["in_graph"] for edge in graph["edges"].values())
        assert "score" not in graph["nodes"]["m3"] and graph["nodes"]["a9.h3"]["score"] == 39, number


def test_a_counterfactual_is_the_same_query_under_another_example(model, prompts):
    rows, others = prompts["segmentation"], prompts["identity"]
    made = counterfactual(rows, others)
    for cell in prompts["segmentation"].layout.cells:
        source = rows if cell in ("query", "output") else others
        assert torch.equal(made.region(cell), source.region(cell))
    assert not torch.equal(made.canvas, rows.canvas) and torch.equal(made.visible, rows.visible)
    with pytest.raises(ValueError, match="2 prompts of .* cannot lend 3 of"):
        counterfactual(rows, others[:2])


def test_ablating_by_another_tasks_example(model, prompts, tmp_path, monkeypatch):
    """All units ablated is the model under the other example, as far as heads go; one file keeps what was answered."""
    rows, space = prompts["segmentation"], PatchSpace(model, granularity="cell")
    other = Activations.collect(model, counterfactual(rows, prompts["identity"]), progress=False)
    scores = {"first": torch.arange(len(space)).flip(0).double()}
    measures = [answer_loss(model, rows), answer_metric(model, tasks.segmentation, rows)]
    options = dict(direction="out", sizes=(0.25, 1.0), orders=["signed"], progress=False, batch_size=2)
    loss, metric = faithfulness(
        model, other, rows, space, scores, measures, resume=tmp_path / "answers.jsonl", **options
    )
    assert loss.faithfulness("first")[-1] == pytest.approx(1, abs=1e-12) and metric.measure == "segmentation's metric"
    with torch.no_grad(), model.trace(rows):
        patch(model, other, PatchSet(space, torch.arange(len(space)) >= len(space) // 4))
        output = model.output.save()
    truth = model.truth(rows)
    assert np.allclose(loss.kept["first", "signed", 0][0], -model.losses[0].value(output, rows, truth), atol=1e-4)
    alone = faithfulness(model, other, rows, space, scores, measures[0], **options)
    assert np.allclose(alone.empty, loss.empty, atol=1e-5)

    monkeypatch.setattr(model, "trace", None)  # nothing is left to ask
    again, _ = faithfulness(model, other, rows, space, scores, measures, resume=tmp_path / "answers.jsonl", **options)
    assert np.array_equal(again.empty, loss.empty) and again.summary().equals(loss.summary())
    with pytest.raises(ValueError, match="answers.jsonl is of another search: its data is"):
        faithfulness(model, other, rows[[1, 0, 2]], space, scores, measures, resume=tmp_path / "answers.jsonl",
                     **options)  # fmt: skip
    measures[0] = answer_loss(model, prompts["identity"])  # of the same name, and another truth
    with pytest.raises(ValueError, match="answers.jsonl is of another search: its data is"):
        faithfulness(model, other, rows, space, scores, measures, resume=tmp_path / "answers.jsonl", **options)
    with pytest.raises(ValueError, match="activations of 3 prompts were given for 2"):
        faithfulness(model, other, rows[:2], space, scores, measures[0], **options)


def test_searching_with_a_row_for_each_prompt(model, prompts):
    rows, space = prompts["segmentation"], PatchSpace(model, granularity="cell")
    shown = counterfactual(rows, prompts["identity"])
    other = Activations.collect(model, shown, progress=False)
    objective = Objective(model, other, tasks.segmentation, rows[:2], space, held_out=rows[2:])
    choices = torch.rand(3, len(space), generator=torch.Generator().manual_seed(0)) < 0.5
    numbers = torch.tensor([2, 0, 1])
    for row, chosen, found in zip(numbers.tolist(), choices, objective(choices, numbers)):
        with torch.no_grad(), model.trace(rows[row]):
            patch(model, other[row], PatchSet(space, chosen))
            output = model.output.save()
        expected = model.losses[0].value(output, rows[row], model.truth(rows[row]))
        torch.testing.assert_close(found.float(), expected[0], rtol=1e-4, atol=1e-4)
    for wrong, held_out in ((other[:2], rows[2:]), (other, 0.25)):
        with pytest.raises(ValueError, match="activations of . prompts were given for 3"):
            Objective(model, wrong, tasks.segmentation, rows[: 2 if held_out != 0.25 else 3], space, held_out=held_out)


UNSEARCHED = ("random", "between/within variance", "nearest centroid")


class Additive:
    """An objective without a model: patching a unit raises the loss by its weight."""

    def __init__(self, weights):
        self.weights = weights
        self.space = NamedUnits([f"unit {i}" for i in range(len(weights))])
        self.train, self.held_out, self.group = torch.arange(8), torch.arange(8, 12), torch.zeros(12, dtype=torch.long)

    def __call__(self, choices, rows):
        return choices.double() @ self.weights

    def gradient(self, gates, rows):
        return gates.double() @ self.weights, self.weights.expand(len(gates), -1)


@pytest.mark.parametrize("name", [name for name, own in RANKINGS.items() if own.signed and name not in UNSEARCHED])
@pytest.mark.parametrize("direction", ["in", "out"])
def test_rankings_put_first_what_matters(name, direction):
    weights = torch.tensor([0.0, 0.1, 2.0, 0.0, -0.5, 3.0], dtype=torch.float64)  # of ablating, for "out"
    objective = Additive(weights if direction == "out" else -weights)
    scores = rank_units(name, objective, direction, budget=800, progress=False)
    first = scores.argsort(descending=True)[:2]
    assert set(first.tolist()) == {2, 5}, scores
    assert scores[4] < scores[[1, 2, 5]].min()


class Noisy(Additive):
    """The same, but a unit's effect is its weight times what a prompt makes of it: [prompt, unit]."""

    def __init__(self, weights, factors):
        super().__init__(weights)
        self.factors = factors

    def __call__(self, choices, rows):
        return (choices.double() * self.factors[rows]) @ self.weights

    def gradient(self, gates, rows):
        return (gates.double() * self.factors[rows]) @ self.weights, self.weights * self.factors[rows]


def test_what_bootstrap_samples_disagree_about_is_not_kept():
    factors = torch.ones(12, 3).double()
    factors[:8, 0] = torch.tensor([30.0, -9, -9, 9, -9, 9, -9, 9])  # the largest mean, of one prompt
    objective = Noisy(torch.tensor([-1.0, -1.0, 1.0]).double(), factors)
    plain = search.attribution.on(objective, 600, size=1, progress=False)
    kept = search.consistent_attribution.on(objective, 600, size=1, progress=False)
    assert plain.scores.tolist() == [2.625, 1, -1] and plain.patches.choices.tolist() == [True, False, False]
    assert kept.scores.tolist() == [0, 1, -1] and kept.patches.choices.tolist() == [False, True, False]
    assert kept.evaluations == 5 * 3 * 8 + 4  # as many as attribution at five points
    with pytest.raises(ValueError, match="samples=0 leave nothing to agree about"):
        search.consistent_attribution.on(objective, 600, samples=0, progress=False)


def test_units_that_tell_tasks_apart_are_right_more_often(model):
    """By hand: a unit with a direction for each task, one of noise, and one that differs in length alone."""
    space = PatchSpace(model, granularity="head")
    generator, activations = torch.Generator().manual_seed(0), {}
    for task, number in (("a", 0), ("b", 1)):
        values = model_sized(space, 6).map(lambda shape: torch.randn(shape, generator=generator))
        first = values["encoder"][:, 0, :, 0]
        first[...] = torch.eye(first.shape[-1])[number] + 0.1 * first
        values["encoder"][:, 0, :, 1] = (1 + 9 * number) * torch.ones_like(first)
        activations[task] = Activations(values, space.fingerprint)
    accuracy = centroid_accuracy(activations, space)
    assert accuracy[0] == 1 and accuracy[1] == 0.5 and 0.1 < accuracy[2:].mean() < 0.9
    objective = Additive(torch.zeros(len(space)).double())
    objective.space = space
    scores = rank_units("nearest centroid", objective, activations=activations, budget=800, progress=False)
    assert torch.equal(scores, accuracy)
    for wrong in (None, {"a": activations["a"]}, {"a": activations["a"], "b": activations["b"][:1]}):
        with pytest.raises(ValueError, match="two tasks or more are told apart, two or more of each"):
            rank_units("nearest centroid", objective, activations=wrong, budget=800, progress=False)


def model_sized(space, rows):
    """By stage, the shape of activations of so many rows."""
    positions = space.layout.num_positions
    return ByStage({s.key: (rows, s.layers, positions, s.heads, s.head_dim) for s in space.stages})


def test_units_that_stay():
    objective = Additive(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    kept = ComplementObjective(objective)
    choices = torch.tensor([[True, False, False]])
    assert kept(choices, torch.zeros(1, dtype=torch.long)).item() == 6
    losses, gradients = kept.gradient(choices.float(), torch.zeros(1, dtype=torch.long))
    assert losses.item() == 6 and gradients.tolist() == [[-1, -2, -4]]
    with pytest.raises(ValueError, match="ranking 'best' is unknown; choose from attribution"):
        rank_units("best", objective)
    assert torch.equal(rank_units("random", objective, seed=3), rank_units("random", objective, seed=3))


@pytest.fixture(scope="module")
def known():
    return KnownCircuit()


@pytest.fixture(scope="module")
def known_rows(known):
    images = data.scenes("train", n=24, seed=0)
    return [task.prompts(images, n=12, seed=0, layout=known.layout) for task in (tasks.segmentation, tasks.identity)]


@pytest.fixture(scope="module")
def known_objective(known, known_rows):
    own, others = known_rows
    other = Activations.collect(known, counterfactual(own, others), progress=False)
    space = PatchSpace(known, granularity="head")
    return Objective(known, other, tasks.segmentation, own[:8], space, held_out=own[8:])


def test_only_the_circuit_has_an_effect(known, known_objective):
    truth = known.circuit(known_objective.space)
    assert truth.sum() == 4 and len(truth) == 24
    rows = torch.zeros(24, dtype=torch.long)
    whole = known_objective(torch.zeros(1, 24, dtype=torch.bool), rows[:1])
    losses = known_objective(torch.eye(24, dtype=torch.bool), rows)
    assert (losses[~truth] - whole).abs().max() < 1e-6 < 1e-3 < (losses[truth] - whole).abs().min()


@pytest.mark.parametrize("name", [n for n, own in RANKINGS.items() if own.algorithm != "ranking"])
def test_what_is_there_is_found(known, known_objective, name):
    truth = known.circuit(known_objective.space)
    scores = rank_units(name, known_objective, "out", budget=400, progress=False)
    found = auroc(scores.abs() if name == "attribution" else scores, truth)
    if name == "random":
        assert found < 0.9
    else:
        assert found > {"reinforce": 0.6, "consistent attribution": 0.6}.get(name, 0.95), found
        # these evaluations are few steps of REINFORCE, and few prompts to agree


def test_auroc():
    truth = torch.tensor([True, True, False, False])
    assert auroc(torch.tensor([4.0, 3, 2, 1]), truth) == 1 and auroc(torch.tensor([1.0, 2, 3, 4]), truth) == 0
    assert auroc(torch.tensor([3.0, 1, 2, 1]), truth) == (1 + 1 + 0 + 0.5) / 4
    assert auroc(torch.tensor([1.0, torch.nan, 0, torch.nan]), truth) == (1 + 1 + 0 + 0.5) / 4
    with pytest.raises(ValueError, match="4 of 4 units are of the circuit"):
        auroc(torch.zeros(4), torch.ones(4, dtype=torch.bool))


def test_gradients_pass_a_dropped_layer_by(known, known_objective):
    """`drop` against a plain hook that detaches what a layer adds."""
    space, rows = known_objective.space, known_objective.train[:3]
    gates = torch.rand(3, len(space), generator=torch.Generator().manual_seed(0))
    losses, whole = known_objective.gradient(gates, rows)
    layers = [*known._module.encoder.blocks, *known._module.decoder.blocks]
    assert known_objective.layers == len(layers) == 6
    assert torch.isfinite(whole).all() and (whole[:, known.circuit(space)] != 0).all()
    for number in (3, 4):
        handle = layers[number].register_forward_hook(lambda _, args, out: args[0] + (out - args[0]).detach())
        _, expected = known_objective.gradient(gates, rows)
        handle.remove()
        found_losses, found = known_objective.gradient(gates, rows, drop=number)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found_losses, losses, rtol=1e-4, atol=1e-5)
        own = (space.units.stage == 1) & (space.units.layer == number - 3)
        assert not found[:, own].any() and not torch.allclose(found, whole)
    _, again = known_objective.gradient(gates, rows)
    torch.testing.assert_close(again, whole)  # nothing is left behind


def test_dropped_attributions_are_means_of_absolute_values(known_objective):
    result = search.attribution.on(known_objective, 600, drop=True, size=3, progress=False)
    rows = known_objective.train[: 600 // 2 // (3 * 6)]
    zero = torch.zeros(len(rows), len(result.scores))
    parts = [known_objective.gradient(zero, rows, drop=layer)[1].abs().mean(0) for layer in range(6)]
    torch.testing.assert_close(result.scores, sum(parts) / 5, rtol=1e-4, atol=1e-9)
    assert len(result.patches) == 3 and result.evaluations == 3 * 6 * len(rows) + 4
    with pytest.raises(ValueError, match="drop=True needs two layers or more"):
        search.attribution.on(Additive(torch.ones(3).double()), 100, drop=True, progress=False)
