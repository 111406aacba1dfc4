import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vtv_nnsight import metrics
from vtv_nnsight.layouts import Layout
from vtv_nnsight.prompts import crop


@pytest.mark.parametrize("name", ["iou", "mse"])
def test_published_numbers(golden, name):
    pair = (golden[f"metric_{side}"].permute(0, 3, 1, 2).double() / 255 for side in ("generated", "target"))
    score = getattr(metrics, name)(*(crop(canvas, "output", Layout()) for canvas in pair))
    torch.testing.assert_close(score.double(), golden[f"metric_{name}"], atol=1e-6, rtol=0)


def paint(*rows):
    """Pictures [1, 3, height, width] of grey values."""
    return torch.tensor(rows)[None, None].expand(1, 3, -1, -1)


def test_iou_of_halves():
    top, left = paint([1.0, 1.0], [0.0, 0.0]), paint([1.0, 0.0], [1.0, 0.0])
    assert metrics.iou(top, left).item() == pytest.approx(1 / 3)
    assert metrics.iou(torch.cat([top, top]), torch.cat([top, 1 - top])).tolist() == [1, 0]


def test_pixels_and_scores_that_are_not_finite_are_refused():
    white, bad = torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    bad[0, 1, 2, 3] = torch.nan
    for metric in (metrics.IOU, metrics.MSE):
        for pair in ((bad, white), (white, bad)):
            with pytest.raises(ValueError, match="(prediction|target) holds nan"):
                metric(*pair)
    for look in (metrics.squared_off, lambda pixels: metrics.nearest(pixels, [(0, 0, 0)])):
        with pytest.raises(ValueError, match="a picture holds nan"):
            look(bad)
    sides = torch.tensor([[torch.nan, 1.0]])
    for metric in (metrics.first_token, metrics.preference, metrics.FIRST_TOKEN):
        with pytest.raises(ValueError, match="(logits|prediction) holds? nan"):
            metric(sides, torch.tensor([[0, 1]]))
    bright = metrics.Metric("bright", lambda a, b: (a > 0.5).double().mean((1, 2, 3)), True, "bright")
    with pytest.raises(ValueError, match="the prediction holds nan"):
        bright(bad, white)
    for metric in (metrics.iou, metrics.mse):
        with pytest.raises(ValueError, match="the prediction holds 255; score pictures"):
            metric(255 * white, white)
        for wrong, kind in (((255 * white).byte(), "torch.uint8"), (white.numpy(), "a ndarray")):
            with pytest.raises(TypeError, match=f"the target is {kind}; score float tensors"):
                metric(white, wrong)
    ratio = metrics.Metric("ratio", lambda a, b: -((a - b).square().mean((1, 2, 3)).log()), True, "ratio")
    with pytest.raises(ValueError, match="the score 'ratio' holds inf"):
        ratio(white, white)


def test_two_empty_masks_agree():
    black = paint([0.0, 0.0])
    assert metrics.iou(black, black).item() == 1 and metrics.iou(black, 1 - black).item() == 0


def test_ties_are_foreground():
    grey, white = paint([0.5]), paint([1.0])
    assert metrics.iou(grey, white).item() == 1


def test_other_colours():
    yellow, purple = (253, 231, 37), (68, 1, 84)
    target = torch.tensor([yellow, purple]).T[None, :, None] / 255
    assert metrics.iou(target, target, yellow, purple).item() == 1


def test_an_answer_is_squared_off_to_the_box_of_its_largest_piece():
    answer = torch.zeros(2, 3, 9, 9)
    for row, column in [(2, 2), (3, 3), (4, 2), (5, 1)]:  # a piece held together by its corners
        answer[0, :, row, column] = 0.8
    answer[0, :, 7:, 7:] = torch.tensor([[1.0, 1.0], [1.0, 0.3]])
    expected = torch.zeros(2, 3, 9, 9)
    expected[0, :, 2:6, 1:4] = 1
    for dims in ([2], [3], [2, 3]):
        assert torch.equal(metrics.squared_off(answer.flip(dims)), expected.flip(dims))
    assert torch.equal(metrics.squared_off(answer), expected)
    yellow, purple = (253, 231, 37), (68, 1, 84)
    painted = metrics.squared_off(answer, yellow, purple)
    assert metrics.iou(painted, painted, yellow, purple).tolist() == [1, 1]
    assert (painted[1] * 255).round()[:, 0, 0].tolist() == list(purple)


RECTANGLES = {  # seed of a mask → its rectangle by VP's to_rectangle with OpenCV 5.0, its sort being a stable one
    0: (4, 7, 3, 5), 2: (8, 9, 0, 2), 6: (4, 6, 2, 3), 10: (8, 9, 10, 11), 11: (5, 7, 5, 8),
    12: (5, 8, 3, 5), 200: (6, 8, 5, 7), 215: (6, 8, 6, 8), 364: (4, 6, 5, 8), 374: (6, 7, 10, 11),
}  # fmt: skip


@pytest.mark.parametrize("seed", RECTANGLES)
def test_of_equal_pieces_the_released_one_is_squared_off(seed):
    mask = torch.from_numpy(np.random.default_rng(seed).random((9, 11)) < 0.12)
    top, bottom, left, right = RECTANGLES[seed]
    expected = torch.zeros(1, 3, 9, 11)
    expected[..., top:bottom, left:right] = 1
    assert torch.equal(metrics.squared_off(mask.float().expand(1, 3, -1, -1)), expected)


def test_lpips_says_what_to_install(monkeypatch):
    metrics._lpips_network.cache_clear()
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"pip install 'vtv-nnsight\[lpips\]'"):
        metrics.lpips(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))


def test_lpips_gives_the_network_pixels_around_zero(monkeypatch):
    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    metrics._lpips_network.cache_clear()
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    assert metrics.lpips(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)).tolist() == [2, 2]
    metrics._lpips_network.cache_clear()


def test_mse_is_of_normalised_values():
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    b[1, 0] = 0.229
    assert metrics.mse(a, b).tolist() == pytest.approx([0, 1 / 3])


def test_token_loss_is_cross_entropy_of_each_row(golden):
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    codes = torch.tensor([[0, 1, 2, 3, 4], [6, 6, 6, 6, 6]])
    expected = [F.cross_entropy(row, code) for row, code in zip(logits, codes)]
    torch.testing.assert_close(metrics.token_loss(logits, codes), torch.stack(expected))


@pytest.mark.parametrize(
    ("prediction", "target"), [((1, 3, 4, 5), (1, 3, 4, 4)), ((3, 4, 4), (3, 4, 4)), ((1, 1, 4, 4), (1, 1, 4, 4))]
)
def test_shapes_that_do_not_fit_are_refused(prediction, target):
    with pytest.raises(ValueError, match="must both be"):
        metrics.mse(torch.zeros(prediction), torch.zeros(target))
