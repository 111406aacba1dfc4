import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import reasoning
import torch
from helpers import model_of_chance
from PIL import Image
from reasoning import LAYOUT, Reasoning, draw

from vtv_nnsight import VisualPrompt, data, tasks
from vtv_nnsight.layouts import Layout
from vtv_nnsight.prompts import crop
from vtv_nnsight.vectors.compatibility import differences

NAMES = ["color", "shape", "size", "color+shape", "color+size", "shape+size"]
WHITE, BLACK, GREEN, BLUE = (255, 255, 255), (0, 0, 0), (0, 255, 0), (0, 0, 255)


def inside(picture, colour):
    return (np.asarray(picture) == colour).all(-1)


def extent(region):
    rows, columns = region.nonzero()
    return rows.max() - rows.min() + 1, columns.max() - columns.min() + 1


def named(name):
    return Reasoning(tuple(name.split("+")))


def figures(name, n=100, seed=0, split="train"):
    return reasoning.reasoning(named(name), n, seed, split)


@pytest.fixture
def model(small_config):
    return model_of_chance(small_config())


def test_the_six_tasks():
    assert [task.name for task in reasoning.REASONING] == NAMES
    assert all(task.higher_is_better for task in reasoning.REASONING) and named("size+color") == named("color+size")
    with pytest.raises(ValueError, match="'color\\+shape\\+size' is not among the reasoning tasks: color, shape"):
        named("color+shape+size")


@pytest.mark.parametrize("name", NAMES)
def test_pictures_and_answers(name):
    images = figures(name, n=25, seed=3)
    assert images.column_names == ["image", "answer"] and len(images) == 25
    radii = set()
    for row in images:
        colour = BLUE if "color" in name else GREEN
        shown, answer = inside(row["image"], GREEN), inside(row["answer"], colour)
        assert row["image"].size == (224, 224) and (shown | inside(row["image"], WHITE)).all()
        assert (answer | inside(row["answer"], WHITE)).all()
        if "size" in name:
            assert answer.sum() < shown.sum() and not (answer & ~shown).any()
        elif "shape" in name:
            assert (answer | ~shown).all() and extent(answer) == extent(shown)
        else:
            assert np.array_equal(answer, shown)
        whole = shown[1:-1, 1:-1].sum() == shown.sum()
        if whole:
            radii.add((extent(shown)[0] - 1) // 2)
            if "size" in name:
                assert extent(answer) == (41, 41)
            if "shape" in name:
                assert answer.sum() == np.prod(extent(answer))
    assert radii == {30} if "size" in name else min(radii) >= 10 and max(radii) < 50 and len(radii) > 5


def test_rows_depend_on_the_seed_and_not_on_their_number():
    few, many = figures("color", n=2, seed=1), figures("color", n=5, seed=1)
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(few, many))
    assert not np.array_equal(few[0]["image"], figures("color", n=1, seed=2)[0]["image"])


def test_the_canvas_is_the_published_one():
    """Three rows of two cells of 74, a pixel between rows and two between columns, the outputs from column 113 on, all
    else black; pictures are bilinear."""
    images = figures("color+shape", n=3, seed=0)
    prompt = named("color+shape").prompt([images[0], images[1]], images[2], LAYOUT)
    expected = np.zeros((224, 224, 3), np.uint8)
    for i, row in enumerate(images):
        for name, left in (("image", 37), ("answer", 113)):
            cell = row[name].resize((74, 74), Image.Resampling.BILINEAR)
            expected[75 * i : 75 * i + 74, left : left + 74] = np.asarray(cell)
    assert np.array_equal(prompt.canvas[0].mul(255).round().byte().permute(1, 2, 0), expected)
    hidden = np.ones((14, 14), bool)
    hidden.reshape(-1)[prompt.visible] = False
    rows, columns = hidden.nonzero()
    assert set(rows) == set(range(9, 14)) and set(columns) == set(range(7, 12)) and hidden.sum() == 25


def test_an_answer_is_needed():
    images = figures("color", n=1)
    with pytest.raises(ValueError, match="example of color has no 'answer'"):
        named("color").prompt([{"image": images[0]["image"]}] * 2, images[0], LAYOUT)
    unknown = named("color").prompt([images[0]] * 2, {"image": images[0]["image"]}, LAYOUT)
    assert (unknown.region("output") == 1).all()
    assert unknown.canvas[0, :, 0, 0].tolist() == [0, 0, 0]


def direct(prediction, target, options, colour):
    """The released metric, pixel by pixel."""
    nearest = []
    for picture in (prediction, target):
        pixels = (picture * 255).round().long().permute(1, 2, 0).reshape(-1, 3).tolist()
        costs = [[sum((a - b) ** 2 for a, b in zip(pixel, option)) for option in options] for pixel in pixels]
        nearest.append([options[cost.index(min(cost))] == colour for cost in costs])
    both = sum(a and b for a, b in zip(*nearest))
    return both / sum(a or b for a, b in zip(*nearest))


@pytest.mark.parametrize(
    ("name", "options", "colour"),
    [
        ("color", [BLUE, GREEN, WHITE, BLACK], BLUE),
        ("shape", [GREEN, WHITE, BLACK], GREEN),
        ("size", [BLUE, GREEN, WHITE, BLACK], GREEN),
        ("color+shape", [GREEN, BLUE, WHITE, BLACK], BLUE),
        ("color+size", [GREEN, BLUE, WHITE, BLACK], BLUE),
        ("shape+size", [GREEN, WHITE, BLACK], GREEN),
    ],
)
def test_the_metric_is_aware_of_colour(name, options, colour):
    task = named(name)
    prompts = task.prompts(figures(name, n=6, seed=2), n=1, seed=0, layout=LAYOUT)
    target = prompts.region("output")
    noise = torch.randint(-150, 150, target.shape, generator=torch.Generator().manual_seed(0)) / 255
    tied = torch.rand(1, 74, 74, generator=torch.Generator().manual_seed(1)) < 0.1
    answer = (target + noise).clamp(0, 1)
    answer[:, 2] = torch.where(tied, answer[:, 1], answer[:, 2])
    expected = [direct(a, b, options, colour) for a, b in zip(answer, target)]
    assert task.score(answer, target).tolist() == pytest.approx(expected, abs=1e-7) and 0 < min(expected) < 1
    assert task.score(target, target).tolist() == [1]


def test_the_right_shape_in_the_wrong_colour_scores_nothing():
    prompts = named("color").prompts(figures("color", n=3), n=1, seed=0, layout=LAYOUT)
    answer = crop(prompts.canvas, "output", LAYOUT)
    assert named("color").score(answer[:, [0, 2, 1]], answer).tolist() == [0]


@pytest.mark.parametrize("name", ["color", "shape", "color+shape", "size"])
def test_the_studys_other_metrics(name):
    images = figures(name, n=6, seed=4)
    task = named(name)
    blind, shape = (tasks.scored_by(task, metric) for metric in ("color_blind_iou", reasoning.SHAPE_ACCURACY))
    assert blind.name == shape.name == name and blind.metric == reasoning.COLOR_BLIND_IOU
    prompts = task.prompts(images, n=4, seed=0, layout=LAYOUT)
    target = prompts.region("output")
    green = target[:, [0, 2, 1]]  # the right shape in the other colour
    assert blind.score(target, target).tolist() == shape.score(target, target).tolist() == [1] * 4
    if "color" in name:
        assert blind.score(green, target).tolist() == [1] * 4 and task.score(green, target).tolist() == [0] * 4
    empty = torch.ones_like(target)
    assert blind.score(empty, target).tolist() == shape.score(empty, target).tolist() == [0] * 4


def test_a_shape_is_a_square_or_a_circle():
    square, circle = (
        torch.from_numpy(np.array(draw(100, 90, 30, shape))).permute(2, 0, 1)[None] / 255
        for shape in ("rectangle", "circle")
    )
    speck = circle.clone()
    speck[:, :, 200:204, 200:204] = 0  # a smaller piece does not count
    scores = [reasoning.shape_accuracy(a, b).item() for a, b in ((square, square), (circle, square), (speck, circle))]
    assert scores == [1, 0, 1]


def test_the_layout_is_kept_in_files():
    again = Layout(**json.loads(json.dumps(asdict(LAYOUT))))
    assert again == LAYOUT and hash(again) == hash(LAYOUT)
    assert differences({"gap": [1, 2]}, {"gap": (1, 2)}) == []
    with pytest.raises(ValueError, match="gap=\\(1, -2\\) is negative"):
        Layout(examples=2, gap=(1, -2))
    with pytest.raises(ValueError, match="gap=\\(2, 4\\) puts inputs 2 pixels beyond"):
        Layout(gap=(2, 4))


def test_a_background_is_a_colour():
    assert Layout(background="#440154").canvas_colour == (68 / 255, 1 / 255, 84 / 255)
    with pytest.raises(ValueError, match="hue of dawn"):
        Layout(background="hue of dawn")


def test_an_average_of_views(model):
    """Each view is the prompt transposed, or with answers in the place of inputs, and its answer is turned back."""
    layout = Layout(64, 16, gap=(2, 1))
    rows, columns = layout.cells["output"]
    prompts = tasks.lowlight.prompts(data.scenes("train", n=12, seed=0), 2, 0, layout)
    plain = model.generate(prompts)[:, :, rows, columns]
    assert torch.equal(reasoning.average(model, prompts, ["plain"]), plain)

    turned = replace(layout, order="horizontal")
    transposed = model.generate(VisualPrompt.from_canvas(prompts.canvas.transpose(2, 3), turned))
    transposed = transposed.transpose(2, 3)[:, :, rows, columns]
    assert torch.equal(reasoning.average(model, prompts, ["transposed"]), transposed)

    mirrored, names = prompts.canvas.clone(), list(layout.cells)
    for a, b in (names[:2], names[2:]):
        mirrored[(..., *layout.cells[a])], mirrored[(..., *layout.cells[b])] = (prompts.region(x) for x in (b, a))
    visible = torch.tensor([i for i in range(16) if i not in layout.regions["query"].tolist()])
    swapped = model.generate(VisualPrompt(mirrored, visible, layout.all_patches, layout))
    swapped = swapped[(..., *layout.cells["query"])]
    assert torch.equal(reasoning.average(model, prompts, ["swapped"]), swapped)
    both = reasoning.average(model, prompts, ["plain", "swapped"])
    torch.testing.assert_close(both, (plain + swapped) / 2)
    black = prompts.canvas.clone()
    black[:, :, rows, columns] = 0  # no view sees the truth
    unknown = VisualPrompt.from_canvas(black, layout)
    for name in reasoning.VIEWS:
        assert torch.equal(reasoning.average(model, prompts, [name]), reasoning.average(model, unknown, [name]))


def test_the_released_views_hide_what_the_released_code_hides():
    """Of VP's reasoning study: rows 9 to 13, and columns 7 to 11, or 2 to 6 where columns are swapped."""
    prompts = VisualPrompt.from_canvas(torch.rand(1, 3, 224, 224), LAYOUT)
    for name, left in (("plain", 7), ("transposed", 7), ("swapped", 2), ("swapped transposed", 2)):
        hidden = torch.ones(14, 14, dtype=torch.bool)
        shown, _ = reasoning.view(prompts, name)
        hidden.view(-1)[shown.visible] = False
        hidden = hidden.T if name.endswith("transposed") else hidden
        expected = torch.zeros(14, 14, dtype=torch.bool)
        expected[9:, left : left + 5] = True
        assert torch.equal(hidden, expected)


def test_the_benchmark_asks_the_studys_layout(model):
    args = SimpleNamespace(test=3, seed=0, device="cpu")
    means = reasoning.measured(args, model, named("color"))["means"]
    assert list(means) == ["iou", "color_blind_iou", "shape_accuracy"]
    assert all({"one-shot", "zero-shot", "views"} <= set(of_metric) for of_metric in means.values())
    assert all(0 <= mean <= 1 for of_metric in means.values() for mean in of_metric.values())


def test_a_task_with_a_way_of_its_own_takes_no_other_metric():
    with pytest.raises(ValueError, match="'segmentation' is scored by mIoU ↑ in its own way"):
        tasks.scored_by(tasks.segmentation, "mse")
