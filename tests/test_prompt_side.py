"""Better prompts as conditions of `evaluate`: retrieved examples, a learned border, several examples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import FAST, random_module, vit_mae_config
from torch.nn import functional as F
from transformers import ViTMAEForPreTraining

from vtv_nnsight import MAEVQGAN, Condition, PatchSet, PatchSpace, TaskVectors, data, evaluate, metrics, tasks
from vtv_nnsight.models.vit_mae import ViTMAE
from vtv_nnsight.studies.prompting.border import Border, learn_border
from vtv_nnsight.studies.prompting.retrieval import encoder_features, retrieve
from vtv_nnsight.tasks import Draw


@pytest.fixture(scope="module")
def model():
    return MAEVQGAN(random_module(**FAST))


@pytest.fixture(scope="module")
def images():
    return data.scenes("train", n=40, seed=0)


@pytest.fixture(scope="module")
def drawn(images):
    return tasks.draw(images, 6, 2, seed=0)


@pytest.fixture(scope="module")
def prompts(model, images, drawn):
    return tasks.segmentation.compose(images, Draw(drawn.rows[:, 1:], drawn.places), model.layout)


def colours(pictures):
    return F.adaptive_avg_pool2d(pictures, 2).flatten(1)


@pytest.mark.parametrize("task", [tasks.segmentation, tasks.inpainting + tasks.lowlight], ids=lambda task: task.name)
def test_the_most_similar_example_is_found(model, images, drawn, task):
    """By looking at every pair, one at a time."""
    found = retrieve(model, task, images, drawn, features=colours, examples=2, batch_size=7, progress=False)
    assert found.places is drawn.places and np.array_equal(found.rows[:, -1], drawn.rows[:, -1])
    size = model.layout.cell_size
    for (*chosen, query), place in zip(found.rows.tolist(), drawn.places.tolist()):
        own = colours(task.cells(images[query], size, tuple(place))[0][None])
        cosines = {
            row: F.cosine_similarity(own, colours(task.cells(images[row], size)[0][None])).item()
            for row in range(len(images))
            if row != query and images[row]["label"] == images[query]["label"]
        }
        assert chosen == sorted(cosines, key=cosines.get, reverse=True)[:2]


def test_a_query_is_not_its_own_example_in_another_row(model, images):
    twice = [images[i] for i in range(12)] * 2
    unlabelled = [{"image": row["image"]} for row in twice]
    drawn = Draw(np.array([[1, 0], [2, 15]]), np.full((2, 2), 0.5))
    found = retrieve(model, tasks.identity, unlabelled, drawn, features=colours, progress=False)
    assert not {0, 12} & {found.rows[0, 0]} and not {3, 15} & {found.rows[1, 0]}
    found = retrieve(model, tasks.identity, unlabelled, drawn, features=colours, pool=[5, 12, 3], progress=False)
    assert set(found.rows[:, 0]) <= {5, 3, 12} and found.rows[0, 0] != 12 and found.rows[1, 0] != 3


def test_features_are_the_mean_of_the_encoder_s_tokens(model):
    pictures = torch.rand(3, 3, model.layout.cell_size, model.layout.cell_size)
    canvas = torch.ones(3, 3, model.layout.canvas_size, model.layout.canvas_size)
    canvas[(..., *model.layout.cells["query"])] = pictures
    module, kept = model._module, []
    handle = module.encoder.blocks[-1].register_forward_hook(lambda *parts: kept.append(parts[2]))
    with torch.no_grad():
        module(canvas, model.layout.regions["query"], model.layout.query_band)
    handle.remove()
    torch.testing.assert_close(encoder_features(model)(pictures), kept[0].mean(1))


def test_what_cannot_be_retrieved_is_told(model, images, drawn):
    look = dict(features=colours, progress=False)
    with pytest.raises(ValueError, match="has 0 other pictures of its class to choose from and a prompt needs 1"):
        retrieve(model, tasks.segmentation, images, drawn[:1], pool=[int(drawn.rows[0, -1])], **look)
    with pytest.raises(ValueError, match="row 40 is not among the 40 rows"):
        retrieve(model, tasks.segmentation, images, drawn, pool=[40], **look)
    with pytest.raises(ValueError, match=r"features of 6 pictures are \[6\]; expected finite numbers \[6, width\]"):
        retrieve(model, tasks.segmentation, images, drawn, features=lambda x: x.mean((1, 2, 3)), progress=False)


def test_a_border_is_added_to_the_example_s_cells(prompts):
    layout = prompts.layout
    pixels = torch.randn(3, layout.cell_size, layout.cell_size)
    shown = Border(pixels, layout)(prompts)
    expected = prompts.canvas.clone()
    for name in ("example_input", "example_output"):
        cell = (..., *layout.cells[name])
        expected[cell] = (prompts.canvas[cell] + pixels).clamp(0, 1)
    assert torch.equal(shown.canvas, expected) and not torch.equal(shown.canvas, prompts.canvas)
    assert torch.equal(shown.pictures, prompts.pictures)
    with pytest.raises(ValueError, match="does not fit prompts of"):
        Border(pixels, replace(layout, order="horizontal"))(prompts)


def token_loss(module, canvas, prompts):
    """By the network alone: [batch]."""
    output = prompts.layout.regions["output"]
    codes = module.vqgan.encode(prompts.canvas)[:, output]
    return metrics.token_loss(module(canvas, prompts.visible, prompts.decoded).logits[:, output], codes)


def test_a_border_is_learned_as_in_plain_torch(model, prompts):
    """Two steps of Adam, through the network and without nnsight."""
    layout, size = prompts.layout, prompts.layout.cell_size
    options = dict(steps=2, lr=0.05, batch_size=8, held_out=prompts, width=5, progress=False)
    border = learn_border(model, prompts, **options)
    pixels = torch.zeros(3, size, size, requires_grad=True)
    adam = torch.optim.Adam([pixels], 0.05)
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[5:-5, 5:-5] = True
    for _ in range(2):
        canvas = prompts.canvas.clone()
        for name in ("example_input", "example_output"):
            cell = (..., *layout.cells[name])
            canvas[cell] = (canvas[cell] + pixels.masked_fill(inside, 0)).clamp(0, 1)
        adam.zero_grad()
        token_loss(model._module, canvas, prompts).mean().backward()
        adam.step()
    torch.testing.assert_close(border.pixels, pixels.detach(), atol=1e-5, rtol=1e-4)
    assert border.pixels[:, ~inside].abs().max() > 0.05 and not border.pixels[:, inside].any()
    with torch.no_grad():
        before, after = (token_loss(model._module, p.canvas, prompts).mean() for p in (prompts, border(prompts)))
    assert after < before
    assert not border.pixels.requires_grad


def test_a_border_that_helps_nobody_is_none(prompts):
    model = MAEVQGAN("tiny")  # trained: noise around the example does it harm
    border = learn_border(model, prompts, steps=1, lr=100.0, batch_size=8, held_out=prompts, progress=False)
    assert not border.pixels.any()


def test_a_border_that_cannot_be_learned_is_told(model, prompts):
    with pytest.raises(ValueError, match="show no example to put a border around; give one-shot prompts"):
        learn_border(model, prompts.query_only())
    with pytest.raises(ValueError, match="a border of 0 pixels and 200 steps leave nothing to learn"):
        learn_border(model, prompts, width=0)
    with pytest.raises(ValueError, match="loss='pixels' has no gradient; use loss=\"tokens\""):
        learn_border(model, prompts, loss="pixels")


def test_shown_prompts_are_asked_in_the_place_of_the_evaluated(model, images, drawn, prompts):
    task, layout = tasks.segmentation, model.layout
    singly = [task.compose(images, Draw(drawn.rows[:, [i, -1]], drawn.places), layout) for i in range(2)]
    together = task.compose(images, drawn, replace(layout, examples=2))
    border = Border(0.3 * torch.randn(3, layout.cell_size, layout.cell_size), layout)
    vector = TaskVectors.collect(model, {"segmentation": prompts}, progress=False)["segmentation"]
    units = PatchSet.random(PatchSpace(model), 12)
    conditions = {
        "one-shot": None,
        "other": Condition(prompts_override=singly[0]),
        "border": Condition(prompts_override=border(prompts)),
        "mean": Condition(prompts_override=singly),
        "together": Condition(prompts_override=together),
        "both": Condition(prompts_override=singly[0], vectors=vector, patches=units),
        "few": Condition(prompts_override=singly[0].query_only(), prompts=4),
    }
    table = evaluate(model, task, prompts, conditions, batch_size=3, progress=False)
    truth = prompts.region("output")

    def alone(shown, truth=truth):
        answers = model.generate(shown)[(..., *shown.layout.cells["output"])]
        with torch.no_grad():
            output = model._module(shown.canvas, shown.visible, shown.decoded)
        return answers, metrics.iou(answers, truth), model.losses[0].value(output, shown, model.truth(shown))

    for name, shown in (("one-shot", prompts), ("other", singly[0]), ("border", border(prompts))):
        _, scores, losses = alone(shown)
        np.testing.assert_allclose(table.values("segmentation", name), scores, atol=1e-6)
        np.testing.assert_allclose(table.values("segmentation", name, "loss"), losses, atol=1e-5)
    (first, _, a), (second, _, b) = (alone(shown) for shown in singly)
    scores = metrics.iou((first + second) / 2, truth)
    np.testing.assert_allclose(table.values("segmentation", "mean"), scores, atol=1e-6)
    np.testing.assert_allclose(table.values("segmentation", "mean", "loss"), (a + b) / 2, atol=1e-5)
    _, scores, losses = alone(together, together.region("output"))
    np.testing.assert_allclose(table.values("segmentation", "together"), scores, atol=1e-6)
    np.testing.assert_allclose(table.values("segmentation", "together", "loss"), losses, atol=1e-5)
    patched = evaluate(model, task, singly[0], {"both": (vector, units, "one-shot")}, progress=False)
    for measure in ("score", "loss"):
        values = [one.values("segmentation", "both", measure) for one in (table, patched)]
        np.testing.assert_allclose(*values, atol=1e-5)
    few = table.values("segmentation", "few")
    assert len(few) == 4 and np.array_equal(few, table.values("segmentation", "other")[:4])
    assert len({tuple(table.values("segmentation", name, "loss")) for name in conditions}) == len(conditions)


def test_other_queries_are_refused(model, prompts):
    def ask(shown):
        evaluate(model, tasks.segmentation, prompts, {"mine": Condition(prompts_override=shown)}, progress=False)

    with pytest.raises(ValueError, match="condition 'mine' shows 5 prompts for 6 queries"):
        ask(prompts[:5])
    with pytest.raises(ValueError, match="condition 'mine' shows prompts of other queries or truths"):
        ask(prompts[[1, 0, 2, 3, 4, 5]])
    flipped = replace(prompts.layout, order="horizontal")
    with pytest.raises(ValueError, match="condition 'mine' shows prompts of several layouts"):
        ask([prompts, prompts._with(layout=flipped)])
    with pytest.raises(ValueError, match="shot='zero' shows no example; prompts_override= goes with shot='one'"):
        Condition("zero", prompts_override=prompts)
    with pytest.raises(ValueError, match="prompts_override=.. shows nothing"):
        Condition(prompts_override=[])
    assert Condition(prompts_override=prompts, run=print).shot == "one"


def test_a_model_of_another_family(images, drawn):
    torch.manual_seed(0)
    model = ViTMAE(ViTMAEForPreTraining(vit_mae_config()).eval())
    task, one = tasks.lowlight, Draw(drawn.rows[:, 1:], drawn.places)
    prompts = task.compose(images, one, model.layout)
    nearest = task.compose(images, retrieve(model, task, images, one, progress=False), model.layout)
    border = learn_border(model, prompts, steps=5, held_out=prompts, progress=False)
    conditions = {
        "one-shot": None,
        "border": Condition(prompts_override=border(prompts)),
        "both": Condition(prompts_override=[prompts, nearest]),
    }
    table = evaluate(model, task, prompts, conditions, progress=False)
    losses = {name: table.values("lowlight", name, "loss").mean() for name in conditions}
    assert losses["border"] < losses["one-shot"] and losses["both"] != losses["one-shot"]
