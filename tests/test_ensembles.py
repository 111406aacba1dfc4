import math
from dataclasses import replace

import pytest
import torch
from helpers import GPT_HEADS, net2net_weights, small_painter, vit_mae_config
from transformers import ViTMAEForPreTraining

from vtv_nnsight import MAEVQGAN, Layout, Net2Net, VisualPrompt, data, tasks
from vtv_nnsight.layouts import REASONING
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.models.painter import SegGPT
from vtv_nnsight.models.vit_mae import ViTMAE
from vtv_nnsight.studies.prompting import ensembles, prompt_engineering


@pytest.fixture
def model(small_config):
    torch.manual_seed(0)
    module = MAEVQGANModel(small_config()).eval()
    for parameter in module.decoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return MAEVQGAN(module)


@pytest.fixture
def prompts():
    images = data.scenes("train", n=12, seed=0)
    layouts = [Layout(64, 16, order=order) for order in ("vertical", "horizontal")]
    return [tasks.segmentation.prompts(images, n=3, seed=0, layout=layout) for layout in layouts]


def test_rules_are_what_they_say():
    logits = [torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[-3.0, 0.5, 2.0]]), torch.tensor([[0.0, 0.0, 9.0]])]
    probabilities = torch.stack(logits).softmax(-1)
    expected = {
        "softmax": probabilities.mean(0),
        "product": probabilities.prod(0),
        "maximum": probabilities.max(0).values,
    }
    for rule, values in expected.items():
        torch.testing.assert_close(ensembles.combine(logits, rule).exp(), values)
    torch.testing.assert_close(ensembles.combine(logits, "logits"), torch.stack(logits).mean(0))
    assert ensembles.combine(logits, "softmax").exp().sum().item() == pytest.approx(1)


def test_rules_disagree_where_they_should():
    sure, unsure = torch.tensor([9.0, 0.0, 0.0]), torch.tensor([-20.0, 1.0, 0.9])
    winners = {rule: ensembles.combine([sure, unsure], rule).argmax().item() for rule in ensembles.RULES}
    assert winners == {"softmax": 0, "logits": 1, "product": 1, "maximum": 0}


def test_products_of_many_do_not_vanish():
    logits = [torch.tensor([0.0, 60.0, 59.0])] * 40 + [torch.tensor([300.0, 0.0, 0.0])]
    scores = ensembles.combine(logits, "product")
    assert scores.isfinite().all() and scores[0] - scores[1] == pytest.approx(300 - 40 * 60, rel=1e-4)
    assert ensembles.combine([torch.zeros(2)], "softmax").tolist() == pytest.approx([math.log(0.5)] * 2)


@pytest.mark.parametrize("rule", ensembles.RULES)
def test_an_ensemble_paints_what_both_agree_on(model, prompts, rule):
    logits = [model._module(p.canvas, p.visible, p.decoded).logits for p in prompts]
    first = prompts[0]
    codes = ensembles.combine(logits, rule).argmax(-1)
    expected = model._module.paint(codes, first.canvas, first.visible, first.decoded)
    assert torch.equal(ensembles.generate(model, prompts, rule), expected)
    alone = [logit.argmax(-1) for logit in logits]
    assert not torch.equal(alone[0], alone[1])


def test_an_ensemble_of_one_is_its_own_answer(model, prompts):
    for rule in ensembles.RULES:
        assert torch.equal(ensembles.generate(model, prompts[:1], rule), model.generate(prompts[0]))


def test_what_cannot_be_ensembled_is_refused(model, prompts):
    one, other = prompts
    with pytest.raises(ValueError, match="3 and 2 prompts"):
        ensembles.generate(model, [one, other[:2]])
    with pytest.raises(ValueError, match="query_only"):
        ensembles.generate(model, [one.query_only(), other.query_only()])
    with pytest.raises(ValueError, match="output lies elsewhere"):
        ensembles.generate(model, [one, VisualPrompt.from_canvas(torch.rand(3, 3, 64, 64), Layout(64, 16, examples=2))])
    with pytest.raises(ValueError, match="rule='vote'.*softmax, logits, product, maximum"):
        ensembles.generate(model, prompts, "vote")
    with pytest.raises(ValueError, match="nothing to ensemble"):
        ensembles.combine([])
    with pytest.raises(ValueError, match="nothing to ensemble; give at least one VisualPrompt"):
        ensembles.generate(model, [])


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
        ensembles.generate(model, [tasks.segmentation.prompts(images, n=1, seed=0, layout=model.layout)])
    with pytest.raises(ValueError, match=f"{kind} has no loss 'tokens'"):
        prompt_engineering.compare(model, images, n=1)


def test_an_average_of_views(model):
    """Each view is the prompt transposed, or with answers in the place of inputs, and its answer is turned back."""
    layout = Layout(64, 16, gap=(2, 1))
    rows, columns = layout.cells["output"]
    prompts = tasks.lowlight.prompts(data.scenes("train", n=12, seed=0), 2, 0, layout)
    plain = model.generate(prompts)[:, :, rows, columns]
    assert torch.equal(ensembles.average(model, prompts, ["plain"]), plain)

    turned = replace(layout, order="horizontal")
    transposed = model.generate(VisualPrompt.from_canvas(prompts.canvas.transpose(2, 3), turned))
    transposed = transposed.transpose(2, 3)[:, :, rows, columns]
    assert torch.equal(ensembles.average(model, prompts, ["transposed"]), transposed)

    mirrored, names = prompts.canvas.clone(), list(layout.cells)
    for a, b in (names[:2], names[2:]):
        mirrored[(..., *layout.cells[a])], mirrored[(..., *layout.cells[b])] = (prompts.region(x) for x in (b, a))
    visible = torch.tensor([i for i in range(16) if i not in layout.regions["query"].tolist()])
    swapped = model.generate(VisualPrompt(mirrored, visible, layout.all_patches, layout))
    swapped = swapped[(..., *layout.cells["query"])]
    assert torch.equal(ensembles.average(model, prompts, ["swapped"]), swapped)
    both = ensembles.average(model, prompts, ["plain", "swapped"])
    torch.testing.assert_close(both, (plain + swapped) / 2)
    black = prompts.canvas.clone()
    black[:, :, rows, columns] = 0  # no view sees the truth
    unknown = VisualPrompt.from_canvas(black, layout)
    for name in ensembles.VIEWS:
        assert torch.equal(ensembles.average(model, prompts, [name]), ensembles.average(model, unknown, [name]))
    with pytest.raises(ValueError, match="view 'upside down' is unknown; choose from plain, transposed"):
        ensembles.average(model, prompts, ["upside down"])
    with pytest.raises(ValueError, match="at least one view"):
        ensembles.average(model, prompts, [])


def test_the_released_views_hide_what_the_released_code_hides():
    """Of VP's reasoning study: rows 9 to 13, and columns 7 to 11, or 2 to 6 where columns are swapped."""
    prompts = VisualPrompt.from_canvas(torch.rand(1, 3, 224, 224), REASONING)
    for name, left in (("plain", 7), ("transposed", 7), ("swapped", 2), ("swapped transposed", 2)):
        hidden = torch.ones(14, 14, dtype=torch.bool)
        shown, _ = ensembles.view(prompts, name)
        hidden.view(-1)[shown.visible] = False
        hidden = hidden.T if name.endswith("transposed") else hidden
        expected = torch.zeros(14, 14, dtype=torch.bool)
        expected[9:, left : left + 5] = True
        assert torch.equal(hidden, expected)
