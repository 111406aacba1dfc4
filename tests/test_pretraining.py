"""Training: what is drawn, that it learns, and that it can be interrupted."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("skimage")

from vtv_nnsight import MAEVQGAN, Layout, tasks
from vtv_nnsight.pretraining import pretrain, recipes, training
from vtv_nnsight.pretraining.curriculum import HELD_OUT, INVERSE_MASK, TARGETS, Copy, draw_task
from vtv_nnsight.pretraining.mae import draw_mask
from vtv_nnsight.pretraining.recipes import Recipe
from vtv_nnsight.pretraining.stream import training_prompts

LAYOUT = Layout(56, 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Both stages of the smallest size, trained for seconds."""
    out = tmp_path_factory.mktemp("run")
    pretrain("tokenizer", "smoke", out, steps=40)
    pretrain("mae", "smoke", out, steps=40)
    return out


def test_both_stages_improve_and_export_a_model(run):
    losses = {}
    for stage in ("tokenizer", "mae"):
        pretrain(stage, "smoke", run, steps=60, resume=True)
        losses[stage] = [json.loads(line)["loss"] for line in (run / stage / "log.jsonl").read_text().splitlines()]
    assert losses["tokenizer"][-1] < 0.75  # starts above 1
    assert losses["mae"][-1] < np.log(64) - 0.3  # better than guessing among the 64 codes
    model = MAEVQGAN(run / "mae" / "model")
    prompts = training_prompts(5, 2, model.layout)
    assert model.generate(prompts).shape == prompts.canvas.shape


def test_a_run_is_not_overwritten(run):
    with pytest.raises(FileExistsError, match="checkpoint.pt.*resume"):
        pretrain("tokenizer", "smoke", run)


def test_mae_needs_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="train the tokenizer"):
        pretrain("mae", "smoke", tmp_path)


@pytest.mark.parametrize(("stage", "size", "word"), [("vae", "tiny", "stage"), ("mae", "huge", "size")])
def test_unknown_names(stage, size, word, tmp_path):
    with pytest.raises(ValueError, match=f"is not a {word}"):
        pretrain(stage, size, tmp_path)


def test_an_interrupted_run_ends_like_an_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", -1.0)
    recipe = Recipe(steps=8, batch_size=1, learning_rate=0.1, warmup=2, ema=0.5, validate=100)

    def module():
        torch.manual_seed(0)
        return nn.Linear(3, 3)

    def batches(step):
        return torch.full((4, 3), float(step))

    def loss(module, batch, generator, stop_at=None):
        if batch[0, 0] == stop_at:
            raise KeyboardInterrupt
        return module(batch + torch.randn(4, 3, generator=generator)).float().square().mean(), {}

    whole = training.train(module(), batches, loss, lambda m: {}, recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        training.train(module(), batches, lambda *a: loss(*a, stop_at=5), lambda m: {}, recipe, tmp_path / "broken")
    broken = training.train(module(), batches, loss, lambda m: {}, recipe, tmp_path / "broken", resume=True)
    assert not torch.equal(whole.weight, module().weight)
    assert torch.equal(whole.weight, broken.weight)


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    recipe = Recipe(steps=3, batch_size=1, learning_rate=0.1)
    with pytest.raises(FloatingPointError, match="step 0"):
        training.train(
            nn.Linear(1, 1), torch.zeros, lambda m, *_: (m.weight.sum() * torch.nan, {}), dict, recipe, tmp_path
        )


def test_prompts_depend_on_seed_and_step_alone():
    first, again, other = (training_prompts(step, 4, LAYOUT, seed) for step, seed in ((3, 0), (3, 0), (4, 0)))
    assert torch.equal(first.canvas, again.canvas)
    assert not torch.equal(first.canvas, other.canvas)
    assert not torch.equal(first.canvas, training_prompts(3, 4, LAYOUT, seed=1).canvas)


def test_every_corruption_meets_every_target_but_those_held_out():
    generator = np.random.default_rng(0)
    drawn = [draw_task(generator, masks=True) for _ in range(3000)]
    names = {task.name for task in drawn}
    assert {"lowlight+copy", "lowlight+identity", "lowlight+segmentation", "identity+segmentation"} <= names
    for held_out in HELD_OUT:
        assert not any(set(getattr(held_out, "parts", (held_out,))) <= set(task.parts) for task in drawn)
    assert tasks.identity + Copy() not in drawn


def test_no_answer_of_the_papers_is_the_commonest():
    """What a query alone suggests is the inverse mask: wrong for every task of the papers."""
    assert max(TARGETS, key=TARGETS.get) == INVERSE_MASK
    generator = np.random.default_rng(0)
    drawn = [draw_task(generator, masks=True) for _ in range(40_000)]
    answers = Counter(task.parts[-1] for task in drawn if task.parts[0] == tasks.lowlight)
    assert answers.most_common(1)[0][0] == INVERSE_MASK and set(answers) == set(TARGETS)


def test_masks_partition_what_they_show_and_hide():
    shapes = set()
    for step in range(60):
        visible, hidden = draw_mask(LAYOUT, 3, torch.Generator().manual_seed(step))
        shapes.add((visible.ndim, visible.shape[-1], hidden.shape[-1]))
        for row in range(3):
            shown, asked = ((ids if ids.ndim == 1 else ids[row]).tolist() for ids in (visible, hidden))
            assert shown and asked and not set(shown) & set(asked)
            assert len(set(shown + asked)) == len(shown + asked)
    assert (1, len(LAYOUT.visible), len(LAYOUT.regions["output"])) in shapes
    assert (1, len(LAYOUT.regions["query"]), len(LAYOUT.regions["output"])) in shapes
    assert len(shapes) > 5


def test_sizes_fit_their_promises():
    assert recipes.get("tiny").config.layout == Layout(112, 8)
    assert recipes.get("published").config.layout == Layout()
