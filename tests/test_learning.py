"""A vector learned by gradient at chosen units."""

import pytest
import torch

from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, TaskVectors, data, patch, tasks
from vtv_nnsight.studies.learning import learn_vector


@pytest.fixture(scope="module")
def model():
    return MAEVQGAN("tiny", dispatch=True)


@pytest.fixture(scope="module")
def prompts(model):
    return tasks.segmentation.prompts(data.scenes("train", n=30, seed=0), n=12, seed=0, layout=model.layout)


@pytest.fixture(scope="module")
def vector(model, prompts):
    return TaskVectors.collect(model, {"segmentation": prompts}, progress=False)["segmentation"]


def loss(model, prompts, vector, patches):
    with torch.no_grad(), model.trace(prompts):
        patch(model, vector, patches)
        output = model.output.save()
    return model.losses[0].value(output, prompts, model.truth(prompts)).mean()


@pytest.mark.slow
def test_it_is_better_on_the_prompts_that_were_held_out(model, prompts, vector):
    train, held = prompts[:8].query_only(), prompts[8:].query_only()
    patches = PatchSet.random(PatchSpace(model), 12)
    options = dict(held_out=held, steps=8, lr=0.1, batch_size=4, progress=False)
    learned = learn_vector(model, vector, patches, train, **options)
    assert learned.task == "segmentation, learned" and not learned.mean["decoder"].requires_grad
    before, after = loss(model, held, vector, patches), loss(model, held, learned, patches)
    assert after < before - 0.01
    again = learn_vector(model, vector, patches, train, **options)
    for stage, mean in learned.mean.items():
        torch.testing.assert_close(again.mean[stage], mean, rtol=0, atol=0, equal_nan=True)
        elsewhere = ~patches.mask[stage]
        changed = (mean - vector.mean[stage]).abs().amax(-1)
        assert not changed[elsewhere].nan_to_num().any() and changed[patches.mask[stage]].nan_to_num().any()


def test_a_vector_that_cannot_be_bettered_is_given_back(model, prompts, vector):
    patches = PatchSet.random(PatchSpace(model), 12)
    worse = learn_vector(model, vector, patches, prompts.query_only(), steps=1, lr=100.0, batch_size=4, progress=False)
    for stage, mean in worse.mean.items():
        torch.testing.assert_close(mean, vector.mean[stage], rtol=0, atol=0, equal_nan=True)


def test_nothing_to_learn_is_told(model, prompts, vector):
    space = PatchSpace(model)
    with pytest.raises(ValueError, match="0 units and 200 steps leave nothing to learn"):
        learn_vector(model, vector, PatchSet.random(space, 0), prompts.query_only())
    with pytest.raises(ValueError, match="loss='pixels' has no gradient; use loss=\"tokens\""):
        learn_vector(model, vector, PatchSet.random(space, 3), prompts.query_only(), loss="pixels")
