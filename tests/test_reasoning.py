import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vtv_nnsight import cli, data, metrics, tasks
from vtv_nnsight.data.reasoning_shapes import draw
from vtv_nnsight.layouts import REASONING, Layout
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.prompts import crop
from vtv_nnsight.runs import steps
from vtv_nnsight.vectors.compatibility import differences

NAMES = ["color", "shape", "size", "color+shape", "color+size", "shape+size"]
WHITE, BLACK, GREEN, BLUE = (255, 255, 255), (0, 0, 0), (0, 255, 0), (0, 0, 255)


def inside(picture, colour):
    return (np.asarray(picture) == colour).all(-1)


def extent(region):
    rows, columns = region.nonzero()
    return rows.max() - rows.min() + 1, columns.max() - columns.min() + 1


def test_the_six_tasks():
    assert [task.name for task in tasks.REASONING] == NAMES
    assert all(tasks.get(task.name) == task and task.higher_is_better for task in tasks.REASONING)
    assert tasks.get("size+color") == tasks.color + tasks.size
    assert tasks.get("color+lowlight") == tasks.Sum((tasks.color, tasks.lowlight))
    with pytest.raises(ValueError, match="'color\\+shape\\+size' is not among the reasoning tasks: color, shape"):
        tasks.get("color+shape+size")


@pytest.mark.parametrize("name", NAMES)
def test_pictures_and_answers(name):
    images = data.reasoning(name, n=25, seed=3)
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
    few, many = data.reasoning("color", n=2, seed=1), data.reasoning("color", n=5, seed=1)
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(few, many))
    assert not np.array_equal(few[0]["image"], data.reasoning("color", n=1, seed=2)[0]["image"])
    with pytest.raises(ValueError, match="n=0"):
        data.reasoning("color", n=0)
    with pytest.raises(ValueError, match="'lowlight' is not a reasoning task"):
        data.reasoning("lowlight")


def test_the_canvas_is_the_published_one():
    """Three rows of two cells of 74, a pixel between rows and two between columns, the outputs from column 113 on, all
    else black; pictures are bilinear."""
    images = data.reasoning("color+shape", n=3, seed=0)
    prompt = tasks.get("color+shape").prompt([images[0], images[1]], images[2], REASONING)
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
    images = data.reasoning("color", n=1)
    with pytest.raises(ValueError, match="example of color has no 'answer'"):
        tasks.color.prompt([{"image": images[0]["image"]}] * 2, images[0], REASONING)
    unknown = tasks.color.prompt([images[0]] * 2, {"image": images[0]["image"]}, REASONING)
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
    task = tasks.get(name)
    prompts = task.prompts(data.reasoning(name, n=6, seed=2), n=1, seed=0, layout=REASONING)
    target = prompts.region("output")
    noise = torch.randint(-150, 150, target.shape, generator=torch.Generator().manual_seed(0)) / 255
    tied = torch.rand(1, 74, 74, generator=torch.Generator().manual_seed(1)) < 0.1
    answer = (target + noise).clamp(0, 1)
    answer[:, 2] = torch.where(tied, answer[:, 1], answer[:, 2])
    expected = [direct(a, b, options, colour) for a, b in zip(answer, target)]
    assert task.score(answer, target).tolist() == pytest.approx(expected, abs=1e-7) and 0 < min(expected) < 1
    assert task.score(target, target).tolist() == [1]


def test_the_right_shape_in_the_wrong_colour_scores_nothing():
    prompts = tasks.color.prompts(data.reasoning("color", n=3), n=1, seed=0, layout=REASONING)
    answer = crop(prompts.canvas, "output", REASONING)
    assert tasks.color.score(answer[:, [0, 2, 1]], answer).tolist() == [0]


@pytest.mark.parametrize("name", ["color", "shape", "color+shape", "size"])
def test_the_studys_other_metrics(name):
    images = data.reasoning(name, n=6, seed=4)
    task = tasks.get(name)
    blind, shape = (tasks.scored_by(task, metric) for metric in ("color_blind_iou", metrics.SHAPE_ACCURACY))
    assert blind.name == shape.name == name and blind.metric == metrics.COLOR_BLIND_IOU
    prompts = task.prompts(images, n=4, seed=0, layout=REASONING)
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
    scores = [metrics.shape_accuracy(a, b).item() for a, b in ((square, square), (circle, square), (speck, circle))]
    assert scores == [1, 0, 1]


def test_the_layout_is_kept_in_files():
    again = Layout(**json.loads(json.dumps(asdict(REASONING))))
    assert again == REASONING and hash(again) == hash(REASONING)
    assert differences({"gap": [1, 2]}, {"gap": (1, 2)}) == []
    with pytest.raises(ValueError, match="gap=\\(1, -2\\) is negative"):
        Layout(examples=2, gap=(1, -2))
    with pytest.raises(ValueError, match="gap=\\(2, 4\\) puts inputs 2 pixels beyond"):
        Layout(gap=(2, 4))


def test_a_background_is_a_colour():
    assert Layout(background="#440154").canvas_colour == (68 / 255, 1 / 255, 84 / 255)
    with pytest.raises(ValueError, match="hue of dawn"):
        Layout(background="hue of dawn")


def test_the_command_line_takes_the_studys_layout(small_config, tmp_path, monkeypatch):
    """And other metrics; of a model on a smaller canvas, in proportion."""
    config = small_config(image_size=112, patch_size=8, vqgan_channel_multipliers=(1, 1), vqgan_attention_levels=(1,))
    MAEVQGANModel(config).save_pretrained(tmp_path / "model")
    made = []
    evaluate = steps.evaluate_conditions
    monkeypatch.setattr(
        steps, "evaluate_conditions", lambda model, task, prompts, *a, **k: made.append((task, prompts.layout))
        or evaluate(model, task, prompts, *a, **k),
    )  # fmt: skip
    args = ["evaluate", tmp_path / "model", "--data", "reasoning:color", "--tasks", "color", "--n", 3]
    result = CliRunner().invoke(cli.app, list(map(str, [*args, "--metric", "shape_accuracy", "-o", tmp_path / "out"])))
    assert result.exit_code == 0, result.output
    assert "shape accuracy ↑" in result.output
    ((task, layout),) = made
    assert task.metric == metrics.SHAPE_ACCURACY
    assert layout == Layout(112, 8, examples=2, background="black", gap=(1, 2))
    result = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path / "model"), "--metric", "mse", "-o", "out"])
    assert result.exit_code == 1 and "'segmentation' is scored by mIoU ↑ in a way of its own" in result.output
