"""Several vectors for a task, of which a search picks one for each unit."""

from dataclasses import replace

import pytest
import torch
from helpers import random_module, random_prompts
from search_efficiency import BankObjective, cluster_vectors

from vtv_nnsight import MAEVQGAN, Condition, PatchSet, PatchSpace, patch, search, tasks
from vtv_nnsight.vectors import Activations


@pytest.fixture(scope="module")
def model():
    return MAEVQGAN(random_module())


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(6)


@pytest.fixture(scope="module")
def run(model, prompts):
    return Activations.collect(model, prompts, progress=False)


@pytest.fixture(scope="module")
def space(model):
    return PatchSpace(model)


@pytest.fixture(scope="module")
def bank(run, space):
    return cluster_vectors(run, space, 2)


def test_planted_clusters_are_found(run, space):
    """Four prompts say one thing at every unit, and two say another."""
    values = run.values.map(lambda v: v.float() + torch.tensor([0, 0, 9, 0, 9, 0.0]).view(-1, 1, 1, 1, 1))
    large, small = cluster_vectors(replace(run, values=values), space, 2, seed=1)
    for stage, mask in PatchSet(space, torch.ones(len(space))).mask.items():
        for vector, rows in ((large, [0, 1, 3, 5]), (small, [2, 4])):
            torch.testing.assert_close(vector.mean[stage][mask], values[stage][rows].mean(0)[mask], rtol=0, atol=1e-5)
        elsewhere = values[stage].mean(0)[~mask]
        torch.testing.assert_close(large.mean[stage][~mask], elsewhere, rtol=0, atol=1e-5, equal_nan=True)
    (mean,) = cluster_vectors(run, space, 1)
    torch.testing.assert_close(mean.mean["decoder"], run.values["decoder"].mean(0), rtol=0, atol=1e-5, equal_nan=True)
    with pytest.raises(ValueError, match="count=7 clusters cannot be made of 6 prompts"):
        cluster_vectors(run, space, 7)


def test_losses_are_those_of_the_vectors_that_stand(model, prompts, space, bank):
    objective = BankObjective(model, bank, tasks.identity, prompts.query_only(), space, held_out=0.5)
    assert len(objective.space) == 2 * len(space)
    assert objective.space.names[len(space)] == f"{space.names[0]} = cluster 2"
    choices = torch.rand(3, 2 * len(space), generator=torch.Generator().manual_seed(0)) < 0.4
    found = objective(choices, torch.arange(3))
    for row, loss in enumerate(found):
        sets = objective.sets(PatchSet(objective.space, choices[row]))
        assert not len(sets[0] & sets[1]) and (sets[0] | sets[1]).choices.equal(choices[row].view(2, -1).any(0))
        assert sets[1].choices.equal(choices[row, len(space) :])
        prompt = objective.prompts[row]
        with torch.no_grad(), model.trace(prompt):
            patch(model, bank, sets)
            output = model.output.save()
        expected = model.losses[0].value(output, prompt, model.truth(prompt))
        torch.testing.assert_close(loss.float(), expected[0], rtol=1e-4, atol=1e-4)
    _, gradients = objective.gradient(0.5 * choices.float(), torch.arange(3))
    assert gradients.shape == choices.shape and gradients.isfinite().all() and gradients.any()
    with pytest.raises(ValueError, match="there are no vectors in this bank"):
        BankObjective(model, [], tasks.identity, prompts, space)


def test_every_kind_of_search_chooses_from_it(model, prompts, space, bank):
    objective = BankObjective(model, bank, tasks.identity, prompts.query_only(), space, held_out=0.5)
    for algorithm in (search.random, search.attribution):
        result = algorithm.on(objective, 60, size=10, progress=False)
        sets = objective.sets(result.patches)
        assert 0 < sum(map(len, sets)) <= 10
        assert Condition(vectors=bank, patches=sets).shot == "zero"
