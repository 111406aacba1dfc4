import math

import prompt_looks
import pytest
import torch
from helpers import GPT_HEADS, model_of_chance, net2net_weights, small_painter, vit_mae_config
from transformers import ViTMAEForPreTraining

from vtv_nnsight import Layout, Net2Net, VisualPrompt, data, tasks
from vtv_nnsight.models.painter import SegGPT
from vtv_nnsight.models.painting import paint_canvas
from vtv_nnsight.models.vit_mae import ViTMAE
from vtv_nnsight.prompts import crop


@pytest.fixture
def model(small_config):
    return model_of_chance(small_config())


@pytest.fixture
def prompts():
    images = data.scenes("train", n=12, seed=0)
    layouts = [Layout(64, 16, order=order) for order in ("vertical", "horizontal")]
    return [tasks.segmentation.prompts(images, n=3, seed=0, layout=layout) for layout in layouts]


def combine(logits, rule):
    return prompt_looks.RULES[rule](torch.stack(logits))


def test_rules_are_what_they_say():
    logits = [torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[-3.0, 0.5, 2.0]]), torch.tensor([[0.0, 0.0, 9.0]])]
    probabilities = torch.stack(logits).softmax(-1)
    expected = {
        "softmax": probabilities.mean(0),
        "product": probabilities.prod(0),
        "maximum": probabilities.max(0).values,
    }
    for rule, values in expected.items():
        torch.testing.assert_close(combine(logits, rule).exp(), values)
    torch.testing.assert_close(combine(logits, "logits"), torch.stack(logits).mean(0))
    assert combine(logits, "softmax").exp().sum().item() == pytest.approx(1)


def test_rules_disagree_where_they_should():
    sure, unsure = torch.tensor([9.0, 0.0, 0.0]), torch.tensor([-20.0, 1.0, 0.9])
    winners = {rule: combine([sure, unsure], rule).argmax().item() for rule in prompt_looks.RULES}
    assert winners == {"softmax": 0, "logits": 1, "product": 1, "maximum": 0}


def test_products_of_many_do_not_vanish():
    logits = [torch.tensor([0.0, 60.0, 59.0])] * 40 + [torch.tensor([300.0, 0.0, 0.0])]
    scores = combine(logits, "product")
    assert scores.isfinite().all() and scores[0] - scores[1] == pytest.approx(300 - 40 * 60, rel=1e-4)
    assert combine([torch.zeros(2)], "softmax").tolist() == pytest.approx([math.log(0.5)] * 2)


@pytest.mark.parametrize("rule", prompt_looks.RULES)
def test_an_ensemble_paints_what_both_agree_on(model, prompts, rule):
    logits = [model._module(p.canvas, p.visible, p.decoded).logits for p in prompts]
    first = prompts[0]
    codes = combine(logits, rule).argmax(-1)
    expected = paint_canvas(model._module.vqgan.decode, codes, first, first.layout, True)
    assert torch.equal(prompt_looks.generate(model, prompts, rule), expected)
    alone = [logit.argmax(-1) for logit in logits]
    assert not torch.equal(alone[0], alone[1])


def test_an_ensemble_of_one_is_its_own_answer(model, prompts):
    for rule in prompt_looks.RULES:
        assert torch.equal(prompt_looks.generate(model, prompts[:1], rule), model.generate(prompts[0]))


def test_what_cannot_be_ensembled_is_refused(model, prompts):
    one, other = prompts
    elsewhere = VisualPrompt.from_canvas(torch.rand(3, 3, 64, 64), Layout(64, 16, examples=2))
    for several in ([one, other[:2]], [one.query_only(), other.query_only()], [one, elsewhere]):
        with pytest.raises(ValueError, match="differ in number, in their output's place or in what decoders see"):
            prompt_looks.generate(model, several)


@pytest.mark.parametrize("kind", ["ViTMAE", "SegGPT", "Net2Net"])
def test_models_that_score_no_codes_are_refused(kind, tmp_path):
    """ViT-MAE's logits are pixels, SegGPT has none, and Net2Net paints the codes that it sampled."""
    torch.save({"state_dict": net2net_weights()}, tmp_path / "last.ckpt")
    model = {
        "ViTMAE": lambda: ViTMAE(ViTMAEForPreTraining(vit_mae_config())),
        "SegGPT": lambda: SegGPT(small_painter(True)),
        "Net2Net": lambda: Net2Net(tmp_path / "last.ckpt", num_attention_heads=GPT_HEADS),
    }[kind]()
    images = data.scenes("train", n=12, seed=0)
    with pytest.raises(ValueError, match=f"{kind} has no loss 'tokens', .* give a MAEVQGAN, or a BEiT"):
        prompt_looks.generate(model, [tasks.segmentation.prompts(images, n=1, seed=0, layout=model.layout)])
    with pytest.raises(ValueError, match=f"{kind} has no loss 'tokens'"):
        prompt_looks.compare(model, images, n=1)


def test_the_table_scores_every_layout_in_every_colour(model):
    images, looks = data.scenes("train", n=12, seed=0), prompt_looks.LOOKS[:2]
    scores = prompt_looks.compare(model, images, n=5, seed=1, looks=looks, batch_size=2)
    layouts, colours = ["vertical", "horizontal", "vertical + horizontal"], [look.name for look in looks]
    assert list(scores) == [(layout, colour) for colour in colours for layout in layouts]
    task = looks[1]
    prompts = [task.prompts(images, 5, 1, Layout(64, 16, order=order)) for order in ("vertical", "horizontal")]
    truth = prompts[1].region("output")
    answer = crop(model.generate(prompts[1]), "output", prompts[1].layout)
    assert torch.equal(scores["horizontal", looks[1].name], task.score(answer, truth))
    answer = crop(prompt_looks.generate(model, prompts), "output", prompts[0].layout)
    assert torch.equal(scores["vertical + horizontal", looks[1].name], task.score(answer, truth))


def test_a_mask_can_be_filled_with_a_texture_that_counts_as_foreground():
    row = data.scenes("train", n=1)[0]
    for colours in (("white", "black"), (tasks.YELLOW, tasks.PURPLE)):
        textured, plain = prompt_looks.Textured(*colours), tasks.Segmentation(*colours)
        (_, target), (_, solid) = textured.cells(row, 111), plain.cells(row, 111)
        changed = (target != solid).any(0)
        assert 0.3 < changed.sum() / (solid != solid[:, :1, :1]).any(0).sum() < 0.7
        assert textured.score(target[None], solid[None]).item() == 1
