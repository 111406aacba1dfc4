import base64
import dataclasses
import importlib
import inspect
import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from helpers import make_config
from torch.nn import functional as F

from vtv_nnsight import MAEVQGAN, VisualPrompt, cli, plots, search, tasks
from vtv_nnsight.layouts import positions
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.parallel import processes
from vtv_nnsight.patching import PatchSet, PatchSpace, patch
from vtv_nnsight.prompts import crop
from vtv_nnsight.search.budget import GRADIENT_COST, Search
from vtv_nnsight.search.loops import gradient, sample
from vtv_nnsight.search.score_function import PUBLISHED, _prune
from vtv_nnsight.vectors import TaskVectors

ROOT = Path(__file__).parents[1]


class Planted:
    """An objective with a known best set: a weighted count of wrong units, on prompts that differ in level.

    `interaction` makes pairs of neighbouring units worth more together. Gates between 0 and 1 interpolate.
    """

    def __init__(self, space, prompts=32, held_out=8, seed=0, groups=1, interaction=0.0, fail_after=math.inf):
        generator = torch.Generator().manual_seed(seed)
        self.space, n = space, len(space)
        self.best = torch.rand(n, generator=generator) < 0.3
        self.weights = 0.5 + torch.rand(n, generator=generator)
        self.levels = 20 * torch.randn(prompts + held_out, generator=generator)
        self.train, self.held_out = torch.arange(prompts), prompts + torch.arange(held_out)
        self.group = torch.arange(prompts + held_out) % groups
        self.scales = 10.0 ** torch.arange(groups)
        self.interaction, self.fail_after = interaction, fail_after
        self.evaluations, self.stride = 0, 50

    def _loss(self, gates, rows):
        wrong = (gates - self.best.to(gates)).square() * self.weights
        pairs = wrong[:, :-1] * wrong[:, 1:]
        loss = wrong.sum(1) + self.interaction * pairs.sum(1)
        return (loss + self.levels[rows]) * self.scales[self.group[rows]]

    def __call__(self, choices, rows):
        if self.evaluations >= self.fail_after:
            raise KeyboardInterrupt
        self.evaluations += len(rows)
        return self._loss(choices.double(), rows)

    def gradient(self, gates, rows):
        if self.evaluations >= self.fail_after:
            raise KeyboardInterrupt
        self.evaluations += GRADIENT_COST * len(rows)
        gates = gates.double().clone().requires_grad_()
        losses = self._loss(gates, rows)
        return losses.detach(), torch.autograd.grad(losses.sum(), gates)[0]


def build_model():
    """A model of which every unit shows in the loss."""
    torch.manual_seed(0)
    config = make_config(num_hidden_layers=3, decoder_num_hidden_layers=2, vqgan_attention_levels=())
    module = MAEVQGANModel(config).eval()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return MAEVQGAN(module)


def build_prompts(model):
    canvas = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return VisualPrompt.from_canvas(canvas, model.layout)


def build_vectors(model, prompts):
    other = VisualPrompt.from_canvas(1 - prompts.canvas.flip(0).square(), model.layout)
    return TaskVectors.collect(model, {"identity": other, "segmentation": prompts}, progress=False)


def search_in_processes(path):
    """What each process of the launched test runs."""
    model = build_model()
    prompts = build_prompts(model)
    vector = build_vectors(model, prompts)["identity"]
    args = model, vector, tasks.identity, prompts.query_only(), PatchSpace(model)
    result = search.reinforce(*args, budget=300, batch_size=4, images=4, progress=False, resume=f"{path}.jsonl")
    print(f"one of {processes().num_processes}")
    if processes().is_main_process:
        timeless(result).save(path)
    with pytest.raises(ValueError, match="its budget is 300, this one's 301"):  # every process refuses, and none waits
        search.reinforce(*args, budget=301, batch_size=4, progress=False, resume=f"{path}.jsonl", images=4)
    return result


def timeless(result):
    return dataclasses.replace(result, history=tuple(step._replace(seconds=0.0) for step in result.history))


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def prompts(model):
    return build_prompts(model)


@pytest.fixture(scope="module")
def vectors(model, prompts):
    return build_vectors(model, prompts)


@pytest.fixture(scope="module")
def space(model):
    return PatchSpace(model)


@pytest.fixture
def objective(model, prompts, vectors, space):
    def make(**options):
        return search.Objective(model, vectors["identity"], tasks.identity, prompts.query_only(), space, **options)

    return make


@pytest.mark.parametrize("ask", ["losses", "gradient"])
def test_the_head_answers_where_the_loss_asks(objective, model, ask):
    """No work that the loss does not need: of the decoded patches, only the output's are given logits."""
    objective, seen, head = objective(), [], model._module.decoder.head
    hook = head.register_forward_hook(lambda _, args, logits: seen.append(tuple(args[0].shape[:2])))
    choices, rows = torch.ones(2, len(objective.space)), objective.train[:2]
    objective(choices.bool(), rows) if ask == "losses" else objective.gradient(choices, rows)
    hook.remove()
    layout = objective.prompts.layout
    assert seen == [(2, len(layout.regions["output"]))] and len(layout.regions["output"]) < len(layout.query_band)


def some_pairs(objective, count=6, seed=0):
    """Sets and prompts: a row each."""
    generator = torch.Generator().manual_seed(seed)
    choices = torch.rand(count, len(objective.space), generator=generator) < 0.4
    return choices, torch.randint(0, len(objective.prompts), (count,), generator=generator)


def one_by_one(objective, vector, choices, rows):
    """Logits [row, decoded patch, code] by hooks on the plain module, a set and a prompt at a time."""
    module = objective.model._module
    found = []
    for own, row in zip(choices, rows):
        prompt, mask, handles = objective.prompts[int(row)], objective.space.mask(own), []
        for name, seen in (("encoder", prompt.visible), ("decoder", prompt.decoded)):
            at = positions(seen)
            for layer, block in enumerate(getattr(module, name).blocks):
                new, where = vector.mean[name][layer, at], mask[name][layer, at]

                def hook(_, args, new=new, where=where):
                    return (torch.where(where[..., None], new, args[0].view(1, *new.shape)).flatten(-2),)

                handles.append(block.attn.proj.register_forward_pre_hook(hook))
        with torch.no_grad():
            found.append(module(prompt.canvas, prompt.visible, prompt.decoded).logits)
        for handle in handles:
            handle.remove()
    return torch.cat(found)


# The objective


def test_token_loss_is_the_cross_entropy_of_the_outputs_codes(objective, vectors):
    objective = objective(batch_size=4)
    choices, rows = some_pairs(objective)
    logits = one_by_one(objective, vectors["identity"], choices, rows)
    canvas, output = objective.prompts.canvas[rows], objective.prompts.layout.regions["output"]
    codes = objective.model._module.vqgan.encode(canvas)[:, output]
    at = (objective.prompts.decoded[:, None] == output).int().argmax(0)
    expected = torch.stack([F.cross_entropy(own, truth) for own, truth in zip(logits[:, at], codes)])
    losses = objective(choices, rows)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses.float(), expected, rtol=1e-5, atol=1e-5)
    nothing = objective(torch.zeros_like(choices), rows)
    assert (losses - nothing).abs().min() > 1e-4


@pytest.mark.parametrize("ask", ["together", "alone"])
def test_layers_before_the_first_patched_one_run_once_a_prompt(objective, model, ask):
    whole, late, ran = objective(batch_size=4), objective(batch_size=4), []
    whole._prefixes.before = {}
    choices, rows = some_pairs(late, count=24)
    choices[:, late._prefixes.layer < 3] = False  # the decoder alone
    choices[12:, late._prefixes.layer == 0] = True  # and what the second half have in common
    if ask == "alone":
        choices = choices[:12]
    rows = rows[: len(choices)]
    expected = whole(choices, rows)
    hook = model._module.encoder.blocks[0].attn.register_forward_hook(lambda _, __, out: ran.append(len(out)))
    for _ in range(3):
        torch.testing.assert_close(late.among(choices)(choices, rows), expected, rtol=0, atol=1e-5)
    hook.remove()
    assert sum(ran) <= len(late.prompts) * (2 if ask == "together" else 1)
    assert late.evaluations == 3 * len(rows)


def test_decoder_first_runs_the_encoder_once_a_prompt(objective, model):
    ran = []
    hook = model._module.encoder.blocks[0].attn.register_forward_hook(lambda _, __, out: ran.append(len(out)))
    first, choices = objective(batch_size=4), []
    losses = first._losses
    first._losses = lambda sets, rows, **options: choices.append(sets) or losses(sets, rows, **options)
    result = search.reinforce.on(first, budget=200, seed=0, last_stage=1.0, prune=False, progress=False)
    hook.remove()
    tried = torch.cat(choices).any(0)
    assert tried[first.late].all() and not tried[~first.late].any()
    assert len(first.prompts) <= sum(ran) < result.evaluations / 4


def test_pixel_loss_is_the_tasks_own_of_the_decoded_answer(objective, vectors):
    objective = objective(loss="pixels", batch_size=4)
    choices, rows = some_pairs(objective)
    losses, expected = objective(choices, rows), []
    for own, row in zip(choices, rows):
        prompt = objective.prompts[int(row)]
        with torch.no_grad(), objective.model.generate(prompt) as tracer:
            patch(objective.model, vectors["identity"], PatchSet(objective.space, own))
            canvas = tracer.result.save()
        answer, truth = (crop(pixels, "output", prompt.layout) for pixels in (canvas, prompt.canvas))
        expected.append(tasks.identity.loss(answer, truth))
    torch.testing.assert_close(losses, torch.cat(expected), rtol=1e-4, atol=0)  # a pixel may round to its neighbour


def test_batches_and_their_size_do_not_show(objective):
    choices, rows = some_pairs(objective(), count=7)
    expected = objective(batch_size=7)(choices, rows)
    for size in (1, 3):
        torch.testing.assert_close(objective(batch_size=size)(choices, rows), expected, rtol=0, atol=1e-5)


def test_evaluations_are_counted(objective):
    objective = objective()
    objective(*some_pairs(objective, count=5))
    assert objective.evaluations == 5


def test_batches_are_halved_when_memory_runs_out(objective, monkeypatch):
    objective = objective(batch_size=8)
    choices, rows = some_pairs(objective, count=7)
    expected = objective(choices, rows)
    attention, sizes = F.scaled_dot_product_attention, []

    def greedy(query, *args):
        sizes.append(len(query))
        if len(query) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return attention(query, *args)

    monkeypatch.setattr(F, "scaled_dot_product_attention", greedy)
    torch.testing.assert_close(objective(choices, rows), expected, rtol=0, atol=1e-5)
    assert sizes[:2] == [7, 3] and max(sizes[2:]) == 1

    def broken(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        objective(choices, rows)


def test_bf16_is_near(model, prompts, vectors, space, objective):
    half = MAEVQGAN(model._module, dtype=torch.bfloat16)
    args = vectors["identity"], tasks.identity, prompts.query_only(), space
    low, full = search.Objective(half, *args), objective()
    choices, rows = some_pairs(full)
    torch.testing.assert_close(low(choices, rows), full(choices, rows), rtol=0.05, atol=0.05)


def test_gradient_is_that_of_the_loss(objective):
    objective = objective(batch_size=3)
    rows = torch.tensor([0, 3, 5, 1])
    gates = torch.rand(4, len(objective.space), generator=torch.Generator().manual_seed(0))
    losses, gradients = objective.gradient(gates, rows)
    assert gradients.shape == gates.shape
    step = 1e-2
    for unit in (0, 7, len(objective.space) - 1):
        shift = step * F.one_hot(torch.tensor(unit), len(objective.space))
        ends = [objective.gradient(gates + sign * shift, rows)[0] for sign in (1, -1)]
        torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), gradients[:, unit], rtol=0.05, atol=2e-4)
    whole = torch.ones(4, len(objective.space))
    torch.testing.assert_close(objective.gradient(whole, rows)[0], objective(whole.bool(), rows), rtol=0, atol=1e-5)


def test_several_tasks_each_have_their_vector_and_metric(model, prompts, vectors, space):
    both = [vectors["identity"], vectors["segmentation"]], [tasks.identity, tasks.segmentation]
    objective = search.Objective(
        model, *both, [prompts.query_only()[:6], prompts.query_only()[2:]], space, loss="pixels"
    )
    assert objective.group[objective.train].tolist()[:4] == [0, 1, 0, 1]
    assert set(objective.group[objective.held_out].tolist()) == {0, 1}
    choices = torch.rand(12, len(space), generator=torch.Generator().manual_seed(0)) < 0.4
    losses = objective(choices, torch.arange(12))
    for group, (vector, task) in enumerate(zip(*both)):
        alone = search.Objective(model, vector, task, objective.prompts, space, loss="pixels", held_out=1 / 12)
        where = (alone.prompts.canvas[:, None] == objective.prompts.canvas).flatten(2).all(2).int()
        own = objective.group == group
        torch.testing.assert_close(losses[own], alone(choices[own], where.argmax(0)[own]))


def test_the_split_is_fixed_by_its_seed(objective, prompts):
    def held_out(seed):
        made = objective(seed=seed)
        assert not set(made.train.tolist()) & set(made.held_out.tolist())
        return made.prompts.canvas[made.held_out]

    assert len(held_out(0)) == 2 and torch.equal(held_out(0), held_out(0)) and not torch.equal(held_out(0), held_out(1))
    apart = objective(held_out=prompts.query_only()[:3])
    assert len(apart.train) == 8 and torch.equal(apart.prompts.canvas[apart.held_out], prompts.canvas[:3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss="iou"), "loss='iou' is unknown; choose from tokens, pixels"),
        (dict(held_out=1.0), "leave 0 to train on and 8 held out"),
        (dict(batch_size=-1), "batch_size=-1 holds nothing"),
        (dict(held_out=-1.0), "held_out=-1.0 is no share"),
        (dict(held_out=float("nan")), "held_out=nan is no share"),
    ],
)
def test_objective_refuses(objective, options, message):
    with pytest.raises(ValueError, match=message):
        objective(**options)


def test_objective_refuses_uneven_lists(model, vectors, prompts, space):
    with pytest.raises(ValueError, match="2 vectors, 1 tasks, 1 prompts, 1 held_out were given"):
        search.Objective(model, list(vectors.values()), tasks.identity, prompts, space)


def test_pixels_have_no_gradient(objective):
    with pytest.raises(ValueError, match="loss='pixels' has no gradient"):
        search.gates.on(objective(loss="pixels"), budget=2000, progress=False)


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("reinforce", dict(sparsity=float("nan")), ValueError, "sparsity of reinforce is nan; give a finite number"),
        ("reinforce", dict(last_stage=float("inf")), ValueError, "last_stage of reinforce is inf"),
        ("gates", dict(penalty=float("nan")), ValueError, "penalty of gates is nan"),
        ("random", dict(budget="4"), TypeError, "budget='4' is no whole number"),
        ("random", dict(budget=float("inf")), TypeError, "budget=inf is no whole number"),
        ("random", dict(images=2.5), TypeError, "images=2.5 is no whole number"),
        ("random", dict(seed=0.5), TypeError, "seed=0.5 is no whole number"),
    ],
)
def test_numbers_of_a_search_are_numbers(objective, name, options, error, words):
    with pytest.raises(error, match=words):
        getattr(search, name).on(objective(), **{"budget": 60, "progress": False} | options)


def test_a_search_takes_vectors(model, prompts, space):
    with pytest.raises(TypeError, match="a PatchSpace as its vector"):
        search.Objective(model, space, tasks.identity, prompts, space)
    with pytest.raises(TypeError, match="batch_size=2.5 is no whole number"):
        list(prompts.split(2.5))


# Algorithms


def find(name, objective, **options):
    if name == "ranking":
        options["scores"] = torch.where(objective.best, 2.0, 1.0) + 0.1 * objective.weights
    return search.ALGORITHMS[name].on(objective, progress=False, **options)


@pytest.mark.parametrize("name", ["reinforce", "gates", "attribution", "mediation", "ranking", "greedy"])
def test_a_planted_optimum_is_found(space, name):
    objective = Planted(space)
    result = find(name, objective, budget=8000, seed=1)
    assert torch.equal(result.patches.choices, objective.best)
    assert result.algorithm == name and result.seed == 1
    expected = objective.levels[objective.held_out].mean().item()
    assert result.held_out_loss == pytest.approx(expected, abs=1e-4)


def test_pruning_tries_what_the_budget_pays_for(space):
    """Wrong units are dropped, also where only the least likely ones can be tried."""
    objective = Planted(space)
    order = torch.randperm(len(space), generator=torch.Generator().manual_seed(0))
    probabilities = torch.zeros(len(space), dtype=torch.float64)
    probabilities[order] = torch.linspace(0.9, 0.6, len(space), dtype=torch.float64)
    wrong = ~objective.best
    for tried in (4, 12, len(space)):
        pruning = Search("pruning", objective, 10_000, progress=False)
        pruning.top_units = lambda *_, **__: torch.ones(len(space), dtype=torch.bool)
        pruning.evaluations = pruning.budget - 4 * (2 * tried + 1) - len(objective.held_out)
        chosen = _prune(pruning, probabilities, tolerance=0.0)
        least_likely = torch.zeros_like(wrong).index_fill(0, order[-tried:], True)
        assert torch.equal(~chosen, wrong & least_likely)
        assert pruning.left == 0
    few = Search("pruning", Planted(space, prompts=3), 10_000, progress=False)
    few.top_units = pruning.top_units
    assert _prune(few, probabilities, tolerance=0.0).all()


def test_published_recipe_approaches_a_planted_optimum(space):
    objective = Planted(space, interaction=1.0)
    result = find("reinforce", objective, recipe="published", budget=200 * 320, seed=0)
    wrong = (result.probabilities - objective.best.double()).abs()
    assert wrong.mean() < 0.15
    assert result.patches.choices.sum() > 0


def test_random_gives_the_best_of_its_sets(space):
    objective = Planted(space)
    result = find("random", objective, budget=3000, seed=0, size=12)
    assert len(result.patches) == 12
    ours = objective(result.patches.choices[None], torch.tensor([0]))
    others = torch.stack([PatchSet.random(space, 12, seed=s).choices for s in range(40)])
    assert (ours < objective(others, torch.zeros(40, dtype=torch.long))).double().mean() > 0.95


@pytest.mark.parametrize("name", ["reinforce", "greedy"])
def test_an_optimum_with_interactions_is_found(space, name):
    objective = Planted(space, interaction=3.0)
    assert torch.equal(find(name, objective, budget=16000).patches.choices, objective.best)


@pytest.mark.parametrize("name", ["reinforce", "gates"])
def test_tasks_of_different_scales_share_a_set(space, name):
    objective = Planted(space, groups=2)
    assert torch.equal(find(name, objective, budget=12000).patches.choices, objective.best)


def test_a_set_is_no_larger_than_it_needs_to_be(space):
    objective = Planted(space)
    objective.weights = torch.where(objective.best, objective.weights, 0.0)
    result = find("reinforce", objective, budget=8000)
    assert torch.equal(result.patches.choices, objective.best)


@pytest.mark.parametrize("name", search.ALGORITHMS)
def test_a_seed_gives_one_result_and_the_budget_is_kept(space, name):
    first, second = Planted(space), Planted(space)
    a, b = (find(name, o, budget=1000, seed=3) for o in (first, second))
    assert torch.equal(a.patches.choices, b.patches.choices) and torch.equal(a.scores, b.scores)
    assert [s._replace(seconds=0) for s in a.history] == [s._replace(seconds=0) for s in b.history]
    assert a.evaluations == first.evaluations <= 1000
    assert all(x.evaluations < y.evaluations for x, y in zip(a.history, a.history[1:]))


@pytest.mark.parametrize("name", search.ALGORITHMS)
def test_a_budget_that_pays_for_nothing_is_refused(space, name):
    with pytest.raises(ValueError, match=f"budget=9 is too small for {name}: .* evaluations"):
        find(name, Planted(space), budget=9)
    with pytest.raises(ValueError, match="budget=0 pays for nothing"):
        find(name, Planted(space), budget=0)


def test_a_loss_that_is_not_a_number_stops_the_search(space):
    objective = Planted(space)
    objective.levels[objective.train[5]] = torch.nan
    with pytest.raises(ValueError, match=r"step 1 of reinforce, after 32 evaluations: a loss is nan"):
        find("reinforce", objective, budget=1000, images=4, masks=4)


def test_unknown_options_are_named(space):
    with pytest.raises(TypeError, match="unexpected keyword argument 'masks'"):
        find("greedy", Planted(space), masks=3)
    for options in (dict(recipe="best"), dict(masks=1)):
        (name,) = options
        with pytest.raises(ValueError, match=name):
            find("reinforce", Planted(space), **options)
    with pytest.raises(ValueError, match="size=99 is not a number of units"):
        find("mediation", Planted(space), size=99)
    for name in ("random", "greedy", "gates", "reinforce"):
        with pytest.raises(ValueError, match="images=0 asks no prompt"):
            find(name, Planted(space), images=0)
    with pytest.raises(ValueError, match="flips=0 is not a number of units"):
        find("greedy", Planted(space), flips=0)
    assert find("greedy", Planted(space), start=1.0, budget=1000).evaluations <= 1000


def test_algorithms_share_a_signature():
    shared = ["model", "vector", "task", "prompts", "space", "budget", "loss", "seed", "batch_size", "held_out"]
    for function in search.ALGORITHMS.values():
        assert list(inspect.signature(function).parameters)[:10] == shared and function.__doc__
    assert "recipe" in inspect.signature(search.reinforce).parameters


@pytest.mark.parametrize("name", search.ALGORITHMS)
def test_every_algorithm_runs_on_a_model(model, vectors, prompts, space, name):
    options = {"images": 4} if "images" in search.ALGORITHMS[name].options else {}
    args = model, vectors["identity"], tasks.identity, prompts.query_only(), space
    result = search.ALGORITHMS[name](*args, budget=400, batch_size=8, vectors=vectors, progress=False, **options)
    assert isinstance(result, search.SearchResult) and result.scores.shape == (len(space),)
    again = search.Objective(*args)
    losses = again(result.patches.choices.expand(len(again.held_out), -1), again.held_out)
    assert losses.mean().item() == pytest.approx(result.held_out_loss, abs=1e-5)


@pytest.mark.parametrize("recipe", [dict(), dict(recipe="published", budget=100 * 320)])
def test_sparsity_prefers_fewer_units(space, recipe):
    options = dict(budget=4000, seed=0) | recipe
    dense, sparse = (find("reinforce", Planted(space), sparsity=price, **options) for price in (0.0, 2.0))
    assert sparse.probabilities.sum() < 0.5 * dense.probabilities.sum()


def test_steps_end_a_search(space):
    result = find("reinforce", Planted(space), budget=4000, steps=3, prune=False)
    assert result.evaluations == 3 * 2 * 8 + len(Planted(space).held_out)
    assert result.settings["lr"] == 0.3 and result.settings["images"] == 2
    assert (result.probabilities != torch.tensor(-1.0, dtype=torch.float64).sigmoid()).any()  # what they learned stays


def test_no_module_has_the_name_of_an_algorithm():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("vtv_nnsight.search.reinforce")
    folder = {path.stem for path in Path(search.__file__).parent.glob("*.py")}
    assert not folder & (search.ALGORITHMS.keys() | set(search.__all__))


# The estimators


def test_the_gradient_is_unbiased():
    probabilities = torch.tensor([0.2, 0.7, 0.5, 0.9], dtype=torch.float64)
    table = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bits = 2 ** torch.arange(4)
    every = (torch.arange(16)[:, None] & bits) > 0
    weight = torch.where(every, probabilities, 1 - probabilities).prod(1)
    expected = (weight * table) @ (every.double() - probabilities)
    for masks in (2, 4):
        choices = sample(probabilities, (100_000, masks), torch.Generator().manual_seed(0))
        losses = table[(choices * bits).sum(-1)]
        advantage = (losses - losses.mean(1, keepdim=True)) * masks / (masks - 1)
        estimate = gradient(choices, advantage, probabilities)
        torch.testing.assert_close(estimate, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize(("groups", "options"), [(1, {}), (2, {}), (1, dict(lr=0.2, init=0.5, images=4, sparsity=0.3))])
def test_published_recipe_is_the_papers_update(space, groups, options):
    lr, images, sparsity = (options.get(name, getattr(PUBLISHED, name)) for name in ("lr", "images", "sparsity"))
    steps = 3
    objective = Planted(space, prompts=12, held_out=3, groups=groups)
    budget = steps * 320 + 3
    result = search.reinforce.on(objective, recipe="published", budget=budget, seed=5, progress=False, **options)

    generator, n = torch.Generator().manual_seed(5), len(space)
    theta = [options.get("init", -1.0)] * n
    first, second = [0.0] * n, [0.0] * n
    for step in range(1, steps + 1):
        p = [1 / (1 + math.exp(-t)) for t in theta]
        masks = torch.rand(320, n, dtype=torch.float64, generator=generator) < torch.tensor(p, dtype=torch.float64)
        rows = [i % images for i in range(320)]
        losses = [objective._loss(mask[None].double(), torch.tensor([r])).item() for mask, r in zip(masks, rows)]

        def standardise(values):
            mean = sum(values) / len(values)
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
            return [(v - mean) / (std + 1e-6) for v in values]

        if groups == 2:
            losses[0::2], losses[1::2] = standardise(losses[0::2]), standardise(losses[1::2])
        advantage = standardise(losses)
        for u in range(n):
            slope = sum(a * (float(m) - p[u]) / n for a, m in zip(advantage, masks[:, u].tolist())) / 320
            slope += sparsity * p[u] * (1 - p[u]) / n  # of the mean probability, as released
            first[u] = 0.9 * first[u] + 0.1 * slope
            second[u] = 0.999 * second[u] + 0.001 * slope**2
            theta[u] -= lr * first[u] / (1 - 0.9**step) / (math.sqrt(second[u] / (1 - 0.999**step)) + 1e-8)
        if step == 1:
            after_one = torch.tensor(theta, dtype=torch.float64).sigmoid()
            chosen = torch.rand(n, dtype=torch.float64, generator=generator) < after_one
    torch.testing.assert_close(result.probabilities, after_one, rtol=0, atol=1e-12)
    assert torch.equal(result.patches.choices, chosen)
    assert [step.evaluations for step in result.history] == [323]
    assert result.evaluations == objective.evaluations == budget


def test_published_recipe_keeps_the_best_of_its_samples(space):
    objective = Planted(space, held_out=4)
    result = search.reinforce.on(objective, recipe="published", budget=101 * 320 + 12, seed=0, progress=False)
    assert [step.evaluations for step in result.history] == [324, 51 * 320 + 8, 101 * 320 + 12]
    assert result.held_out_loss == min(step.held_out_loss for step in result.history)
    assert PUBLISHED == (-1.0, 0.1, 500, 320, 10, 50, 1e-6, 0.0, None)


@pytest.mark.parametrize("recipe", ["published", "leave-one-out"])
def test_one_of_several_tasks_may_judge(space, recipe):
    """The released code judges a search of several tasks by segmentation alone."""
    objective = Planted(space, prompts=12, held_out=6, groups=2)
    objective.tasks = [tasks.lowlight, tasks.segmentation]
    options = dict(recipe=recipe, budget=700, seed=1, progress=False)
    result = search.reinforce.on(objective, judge="segmentation", **options)
    rows = objective.held_out[objective.group[objective.held_out] == 1]
    assert 0 < len(rows) < len(objective.held_out) == 6
    expected = objective(result.patches.choices.expand(len(rows), -1), rows).mean().item()
    assert result.held_out_loss == pytest.approx(expected) and result.settings["judge"] == "segmentation"
    assert result.held_out_loss != pytest.approx(search.reinforce.on(objective, **options).held_out_loss)
    with pytest.raises(ValueError, match="judge='identity' is not searched for; choose from lowlight, segmentation"):
        search.reinforce.on(objective, judge="identity", **options)


def test_published_recipe_has_settings_of_its_own(space):
    result = search.reinforce.on(Planted(space), recipe="published", budget=700, progress=False)
    assert result.settings == {"recipe": "published", **PUBLISHED._asdict()}
    options = dict(lr=0.5, images=3, init=0.0, steps=2, sparsity=0.1)
    result = search.reinforce.on(Planted(space), recipe="published", progress=False, **options)
    assert result.settings == {"recipe": "published", **PUBLISHED._asdict()} | options
    assert result.evaluations == 2 * 320 + len(Planted(space).held_out)
    with pytest.raises(ValueError, match="recipe='published' takes no masks, prune; leave that out"):
        search.reinforce.on(Planted(space), recipe="published", masks=4, prune=False, progress=False)


def test_published_recipe_runs_its_steps_without_a_budget(space, monkeypatch):
    module = sys.modules["vtv_nnsight.search.score_function"]
    monkeypatch.setattr(module, "PUBLISHED", PUBLISHED._replace(steps=60, masks=20))
    result = search.reinforce.on(Planted(space, held_out=4), recipe="published", progress=False)
    assert result.evaluations == 60 * 20 + 2 * 4


# Resuming


@pytest.mark.parametrize("name", ["reinforce", "gates", "greedy", "mediation"])
def test_an_interrupted_search_ends_as_an_unbroken_one(space, tmp_path, name):
    unbroken = find(name, Planted(space), budget=2000, seed=2)
    path = tmp_path / "search.jsonl"
    broken = Planted(space, fail_after=700)
    with pytest.raises(KeyboardInterrupt):
        find(name, broken, budget=2000, seed=2, resume=path)
    with path.open("ab") as file:
        file.write(b'{"query": "cut sh')
    rest = Planted(space)
    resumed = find(name, rest, budget=2000, seed=2, resume=path)
    assert torch.equal(resumed.patches.choices, unbroken.patches.choices)
    assert torch.equal(resumed.scores, unbroken.scores)
    assert [s._replace(seconds=0) for s in resumed.history] == [s._replace(seconds=0) for s in unbroken.history]
    assert 0 < rest.evaluations <= unbroken.evaluations - 650
    third = Planted(space)
    assert find(name, third, budget=2000, seed=2, resume=path).history[-1].seconds > 0 and third.evaluations == 0


@pytest.mark.slow
def test_a_killed_search_resumes(space, tmp_path):
    path = tmp_path / "search.jsonl"
    script = textwrap.dedent(f"""
        import sys, time
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import test_search
        from vtv_nnsight.patching import PatchSpace
        from vtv_nnsight import search
        space = PatchSpace.from_metadata({space.metadata!r})
        class Slow(test_search.Planted):
            def __call__(self, *args):
                time.sleep(0.05)
                return super().__call__(*args)
        search.greedy.on(Slow(space), budget=20000, seed=0, resume={str(path)!r}, progress=False)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and len(path.read_bytes().splitlines()) >= 12:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 12 <= len(path.read_bytes().splitlines()) < 200
    rest = Planted(space)
    resumed = find("greedy", rest, budget=20000, resume=path)
    unbroken = find("greedy", Planted(space), budget=20000)
    assert torch.equal(resumed.scores, unbroken.scores) and resumed.evaluations == unbroken.evaluations
    assert rest.evaluations < unbroken.evaluations


def test_a_journal_of_another_search_is_refused(space, tmp_path):
    path = tmp_path / "search.jsonl"
    find("greedy", Planted(space), budget=1000, resume=path)
    with pytest.raises(ValueError, match="is of another search: its seed is 0, this one's 1"):
        find("greedy", Planted(space), budget=1000, seed=1, resume=path)
    with pytest.raises(ValueError, match="its flips is 1, this one's 2"):
        find("greedy", Planted(space), budget=1000, flips=2, resume=path)
    path.write_text("my notes\n")
    with pytest.raises(ValueError, match="is not the journal of a search"):
        find("greedy", Planted(space), budget=1000, resume=path)
    assert path.read_text() == "my notes\n"


def journal_of(path):
    """The losses that a journal holds, however many a line has."""
    lines = [json.loads(line) for line in Path(f"{path}.jsonl").read_text().splitlines()[1:]]
    values = b"".join(base64.b64decode(line["values"]) for line in lines)
    return list(struct.unpack(f"<{len(values) // 8}d", values))


@pytest.fixture
def one_thread():
    """How many threads share a sum decides its last digit: what is compared to the bit has as many on both sides."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_processes_share_the_work_and_agree(one_thread, tmp_path):
    path = tmp_path / "two.safetensors"
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        f"import test_search; test_search.search_in_processes({str(path)!r})\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        launch, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("one of 2") == 2
    two, one = search.SearchResult.load(path), search_in_processes(tmp_path / "one.safetensors")
    assert two.patches == one.patches and two.evaluations == one.evaluations
    assert torch.equal(two.scores, one.scores)
    assert path.read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    answers = [journal_of(file) for file in (path, tmp_path / "one.safetensors")]
    assert answers[0] == answers[1] and len(answers[0]) == one.evaluations


# Results


@pytest.fixture
def result(space):
    return find("reinforce", Planted(space), budget=2000, seed=4)


def test_a_result_is_saved_whole(result, tmp_path):
    result.save(tmp_path / "result.safetensors")
    loaded = search.SearchResult.load(tmp_path / "result.safetensors")
    assert loaded.patches == result.patches and torch.equal(loaded.probabilities, result.probabilities)
    assert loaded.history == result.history and loaded.seed == 4 and loaded.algorithm == "reinforce"
    assert loaded.settings == result.settings and loaded.settings["recipe"] == "leave-one-out"
    assert loaded.held_out_loss == result.held_out_loss
    assert f"{len(result.patches)} of {len(result.scores)} units" in repr(loaded) and "seed 4" in repr(loaded)


def test_scores_are_not_probabilities(space):
    with pytest.raises(ValueError, match="mediation gives no probabilities; read result.scores"):
        find("mediation", Planted(space), budget=2000).probabilities  # noqa: B018


def test_plots(space, result, tmp_path):
    other = find("greedy", Planted(space), budget=2000, seed=1)
    figure = plots.curves({"reinforce": result, "greedy": [other, result]})
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["reinforce", "greedy"]
    line = axes.lines[0].get_ydata()
    assert (line[1:] <= line[:-1]).all() and line[-1] == min(step.held_out_loss for step in result.history)
    maps = plots.score_maps(result)
    panels = [axes for axes in maps.axes if axes.images]
    assert [axes.get_title() for axes in panels] == [
        "encoder, cls",
        "encoder, query",
        "decoder, cls",
        "decoder, query",
        "decoder, output",
    ]
    assert (
        panels[0].images[0].get_array()[2, 3]
        == result.scores[space.names.index("encoder.blocks.2.attn.heads[3] @ cls")]
    )
    overlap = plots.overlap({"a": result, "b": other, "c": other.patches})
    assert overlap.axes[0].images[0].get_array()[0, 1] == pytest.approx(result.patches.jaccard(other.patches))
    for name, drawn in {"curves": figure, "maps": maps, "overlap": overlap}.items():
        drawn.savefig(tmp_path / f"{name}.png")


# The command line


def test_search_from_the_command_line(model, vectors, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    model._module.save_pretrained(tmp_path / "model")
    vectors.save(tmp_path / "vectors.safetensors")

    def vtv(*args):
        file, few = tmp_path / "vectors.safetensors", ["--prompts", 8, "--max-images", 20]
        given = ["search", tmp_path / "model", "--vectors", file, *few]
        monkeypatch.setattr(sys, "argv", ["vtv", *map(str, given + list(args))])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    found = tmp_path / "found.safetensors"
    code, out, error = vtv("--task", "identity", "--algorithm", "random", "--budget", 60, "-o", found)
    assert code == 0, error
    units = len(search.SearchResult.load(found).patches)
    assert f"{units} of 36 units" in out and f"wrote {found}" in out

    both = ["--task", "identity,segmentation", "--algorithm", "random", "--budget", 60]
    code, _, error = vtv(*both, "-o", tmp_path / "both.json")
    assert code == 0, error
    assert len(PatchSet.load(tmp_path / "both.json").space) == 36

    code, _, error = vtv("--algorithm", "annealing", "-o", found)
    assert code == 1 and "'annealing' is not an algorithm; choose from attribution, consistent" in error
    code, _, error = vtv("--task", "lowlight", "-o", found)
    assert code == 1 and "no vector of 'lowlight'" in error


def test_a_missing_option_is_named(model, vectors, prompts, space):
    args = model, vectors["identity"], tasks.identity, prompts.query_only(), space
    with pytest.raises(TypeError, match="ranking needs scores"):
        search.ranking(*args, progress=False)
    with pytest.raises(ValueError, match="two or more"):
        search.ranking(*args, vectors=TaskVectors({"identity": vectors["identity"]}), progress=False)
