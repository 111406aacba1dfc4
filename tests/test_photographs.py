"""Answers carried over to photographs at full resolution, on changes that are known."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from vtv_nnsight import MAEVQGAN, bundles, data, tasks
from vtv_nnsight.data.embedded_pictures import SAMPLE
from vtv_nnsight.images import OUTLINE, carry_over, enlarge, psnr, to_tensor
from vtv_nnsight.report import photographs

SIZE = 56


@pytest.fixture(scope="module")
def photograph():
    with Image.open(SAMPLE) as image:
        return to_tensor(image.convert("RGB").resize((320, 240)))


def small(pixels):
    return F.interpolate(pixels[None], (SIZE, SIZE), mode="bilinear", antialias=True)[0]


def blurred(pixels):
    return F.avg_pool2d(small(pixels)[None], 5, 1, 2, count_include_pad=False)[0]


@pytest.mark.parametrize("task", [tasks.lowlight, tasks.colorization])
def test_light_and_colour_follow_the_photograph_where_the_answer_is_a_blur(photograph, task):
    query, answer = task.corrupt(photograph, (0.5, 0.5)), blurred(photograph)
    carried = psnr(carry_over(query, answer, task.change), photograph)
    assert carried > psnr(enlarge(answer, 240, 320), photograph) + 3
    assert carried > psnr(query, photograph) + 3


def test_nothing_changes_where_the_answer_asks_for_nothing(photograph):
    assert psnr(carry_over(photograph, small(photograph), "light"), photograph) > 45


def test_light_may_change_from_side_to_side(photograph):
    """A change of light that varies smoothly is found from its answer alone."""
    light = torch.linspace(0.3, 0.9, 320)
    assert psnr(carry_over(photograph * light, small(photograph), "light"), photograph) > 28


def test_a_hole_alone_is_filled(photograph):
    query = tasks.inpainting.corrupt(photograph.clamp(min=1 / 255), (0.5, 0.5))
    hole = (query == 0).all(0)
    assert hole.sum() == 60 * 80
    filled = carry_over(query, small(photograph), "hole")
    assert torch.equal(filled[:, ~hole], query[:, ~hole]) and psnr(filled[:, hole], photograph[:, hole]) > 18


def test_a_mask_is_outlined_and_no_more(photograph):
    mask = torch.zeros(3, SIZE, SIZE)
    mask[:, 14:42, 14:42] = 1
    outlined = carry_over(photograph, mask, "mask")
    changed = (outlined != photograph).any(0)
    assert torch.equal(outlined[:, changed], torch.tensor(OUTLINE)[:, None].expand(3, int(changed.sum())))
    down, across = changed.nonzero().unbind(1)
    assert 55 < down.min() < 65 and 175 < down.max() < 185 and 75 < across.min() < 85 and 235 < across.max() < 245
    assert not changed[100:140, 120:200].any()


def test_an_unknown_change_is_refused(photograph):
    with pytest.raises(ValueError, match="change='blur' is unknown; choose from light, colour, hole, mask"):
        carry_over(photograph, small(photograph), "blur")


def test_the_embedded_vectors_light_the_packages_photograph(photograph):
    """Measured: 11.0 dB of the query, 20.5 of the answer, 31.2 carried over."""
    model, bundle = MAEVQGAN("tiny"), bundles.load("tiny")
    pictures = photographs.answers(model, tasks.lowlight, *bundle["lowlight"], SAMPLE)
    measured = photographs.psnrs(tasks.lowlight, pictures)
    assert list(measured) == ["query", "answer", "answer carried over"]
    assert measured["answer carried over"] > 28 > 22 > measured["answer"] > measured["query"] + 5
    layout = bundle["lowlight"][1].space.layout
    assert photographs.warning(model, layout, SAMPLE) == ""
    board = torch.arange(112).div(4, rounding_mode="floor") % 2
    board = Image.fromarray((board[:, None] ^ board).byte().mul(255).numpy())
    assert "unlike what the model has learned" in photographs.warning(model, layout, board)


@pytest.mark.slow
def test_a_few_photographs_are_all_answered_by_the_packages_vectors(vtv, tmp_path):
    folder = tmp_path / "mine"
    (folder / "inside").mkdir(parents=True)
    for name in ("a.jpg", "inside/a.jpg"):
        (folder / name).write_bytes(SAMPLE.read_bytes())
    code, said, _ = vtv("run", "--images", folder, "--tasks", "lowlight,segmentation", "--out", tmp_path / "run")
    page = tmp_path / "run" / "photographs.html"
    assert (
        code == 0 and "2 photographs are too few" in said and "Next:" not in said and said.count(f"wrote {page}") == 1
    )
    text = page.read_text()
    assert text.count("<section>") == 2 and "inside/a.jpg" in text and "answer carried over" in text
    assert (
        text.count("<figcaption>carried over to the photograph") == 4 and not (tmp_path / "run" / "run.json").exists()
    )


def test_what_the_package_carries_is_read_without_a_bar(capfd):
    MAEVQGAN("tiny", dispatch=True)
    data.pictures("test", n=4)
    assert capfd.readouterr().err == ""
