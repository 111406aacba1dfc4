import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vtv_nnsight.images import as_cell
from vtv_nnsight.layouts import Layout
from vtv_nnsight.prompts import VisualPrompt, crop


def canvases(n=3, size=224):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_from_canvas_shows_all_but_the_output():
    prompt = VisualPrompt.from_canvas(canvases())
    assert len(prompt) == 3
    assert torch.equal(prompt.visible, Layout().visible) and torch.equal(prompt.decoded, torch.arange(196))


def test_bytes_and_single_canvases_are_taken():
    image = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    prompt = VisualPrompt.from_canvas(image)
    assert prompt.canvas.shape == (1, 3, 224, 224)
    assert torch.equal(prompt.canvas[0], image / 255)


@pytest.mark.parametrize(
    ("canvas", "error", "words"),
    [
        (torch.rand(224, 224), ValueError, r"\(224, 224\).*\[batch, 3, 224, 224\]"),
        (torch.rand(1, 4, 224, 224), ValueError, r"\(1, 4, 224, 224\)"),
        (torch.rand(1, 3, 112, 112), ValueError, r"\(1, 3, 112, 112\)"),
        (torch.ones(1, 3, 224, 224, dtype=torch.long), TypeError, "int64"),
        (255 * torch.ones(1, 3, 224, 224), ValueError, "values from 255 to 255.*not normalised"),
        (-torch.ones(1, 3, 224, 224), ValueError, "values from -1"),
        (torch.full((1, 3, 224, 224), torch.nan), ValueError, "NaN"),
        (torch.full((1, 3, 224, 224), torch.inf), ValueError, "inf"),
        ([[0.5]], TypeError, "list"),
    ],
)
def test_bad_canvases_are_refused(canvas, error, words):
    with pytest.raises(error, match=words):
        VisualPrompt.from_canvas(canvas)


@pytest.mark.parametrize("name", ["visible", "decoded"])
@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (torch.tensor([], dtype=torch.long), ValueError, "is empty"),
        (torch.tensor([0, 196]), ValueError, "0 to 195"),
        (torch.tensor([-1]), ValueError, "from -1 to -1"),
        (torch.tensor([3, 3]), ValueError, "twice"),
        (torch.tensor([0.5]), TypeError, "LongTensor"),
        (torch.tensor([[0, 1]]), TypeError, "LongTensor"),
        ([0, 1], TypeError, "LongTensor"),
    ],
)
def test_bad_patch_ids_are_refused(name, ids, error, words):
    with pytest.raises(error, match=f"{name} .*{words}"):
        replace(VisualPrompt.from_canvas(canvases(1)), **{name: ids})


@pytest.mark.parametrize("order", ["vertical", "horizontal"])
def test_query_only_sees_the_query_and_decodes_its_band(order):
    layout = Layout(order=order)
    prompt = VisualPrompt.from_canvas(canvases(1), layout)
    zero = prompt.query_only()
    assert torch.equal(zero.visible, layout.regions["query"])
    assert torch.equal(zero.decoded, layout.query_band) and len(zero.decoded) == 98
    assert torch.equal(zero.canvas, prompt.canvas) and len(prompt.visible) == 147


def test_rows_are_taken_as_batches():
    prompt = VisualPrompt.from_canvas(canvases())
    assert torch.equal(prompt[-1].canvas, prompt.canvas[2:])
    assert torch.equal(prompt[1:].canvas, prompt.canvas[1:])
    for one in (np.int64(1), np.array(1), torch.tensor(1)):
        assert torch.equal(prompt[one].canvas, prompt.canvas[1:2])
    assert torch.equal(prompt[[2, 0]].canvas, prompt.canvas[[2, 0]])
    assert [len(part) for part in prompt.split(2)] == [2, 1]
    assert torch.equal(VisualPrompt.cat(list(prompt)).canvas, prompt.canvas)
    with pytest.raises(IndexError):
        prompt[3]


@pytest.mark.parametrize("size", [0, -1])
def test_batches_hold_something(size):
    with pytest.raises(ValueError, match=f"batch_size={size} holds nothing; give 1 or more"):
        list(VisualPrompt.from_canvas(canvases()).split(size))


def test_prompts_that_differ_do_not_share_a_batch():
    prompt = VisualPrompt.from_canvas(canvases(1))
    with pytest.raises(ValueError, match="horizontal"):
        VisualPrompt.cat([prompt, VisualPrompt.from_canvas(canvases(1), Layout(order="horizontal"))])
    with pytest.raises(ValueError, match="show other patches share no batch"):
        VisualPrompt.cat([prompt, prompt.query_only()])
    with pytest.raises(ValueError, match="no prompts"):
        VisualPrompt.cat([])


def test_regions_are_the_cells_pixels():
    prompt = VisualPrompt.from_canvas(canvases())
    assert torch.equal(prompt.region("output"), prompt.canvas[:, :, 113:, 113:])
    assert torch.equal(crop(prompt.canvas, "example_output", prompt.layout), prompt.canvas[:, :, :111, 113:])
    with pytest.raises(ValueError, match="'answer'.*query"):
        prompt.region("answer")


def test_from_cells_leaves_the_rest_white():
    layout = Layout()
    prompt = VisualPrompt.from_cells({"query": torch.zeros(3, 111, 111)}, layout)
    assert prompt.region("query").max() == 0 and prompt.canvas.sum() == 3 * (224**2 - 111**2)


def test_from_cells_takes_pictures(tmp_path):
    layout, picture = Layout(), Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 50).convert("RGB")
    picture.save(tmp_path / "picture.png")
    expected = as_cell(picture, 111)
    for cell in (picture, tmp_path / "picture.png", str(tmp_path / "picture.png"), expected):
        assert torch.equal(
            VisualPrompt.from_cells({"example_input": cell}, layout).region("example_input")[0], expected
        )
    with pytest.raises(ValueError, match=r"'query' have shape \[3, 60, 60\].*\[3, 111, 111\]"):
        VisualPrompt.from_cells({"query": torch.zeros(3, 60, 60)}, layout)
    with pytest.raises(ValueError, match="'sky' is not a cell"):
        VisualPrompt.from_cells({"sky": picture}, layout)
    with pytest.raises(TypeError, match="image of type int"):
        VisualPrompt.from_cells({"query": 3}, layout)


def test_pixels_are_looked_at_once(monkeypatch):
    prompt = VisualPrompt.from_canvas(canvases())
    monkeypatch.setattr("vtv_nnsight.prompts.check_canvas", lambda *_: pytest.fail("looked at again"))
    monkeypatch.setattr("vtv_nnsight.prompts.check_patches", lambda *_: pytest.fail("looked at again"))
    again = VisualPrompt.cat([prompt[0], *prompt[1:].split(1)]).to(torch.float64).query_only().one_shot()
    assert torch.equal(again.canvas, prompt.canvas.double()) and torch.equal(again.visible, prompt.visible)
    assert torch.equal(again.decoded, prompt.decoded) and again.layout == prompt.layout
    with pytest.raises(TypeError, match="torch.uint8 cannot hold a canvas"):
        prompt.to(torch.uint8)


def test_queries_are_told_apart_by_their_pixels():
    canvas = canvases(4)
    canvas[2, :, 113:, :111] = canvas[0, :, 113:, :111]
    queries = VisualPrompt.from_canvas(canvas).queries
    assert queries.dtype == torch.long and queries[2] == queries[0] and len(queries.unique()) == 3
    known = replace(VisualPrompt.from_canvas(canvas), pictures=torch.tensor([[1, 7], [2, 7], [3, 8], [4, 9]]))
    assert known[1:].queries.tolist() == [7, 8, 9] and known.query_only().queries.tolist() == [7, 7, 8, 9]
    assert VisualPrompt.cat([known, known[0]]).pictures.tolist()[-1] == [1, 7]
    assert VisualPrompt.cat([known, VisualPrompt.from_canvas(canvas)]).pictures is None


def test_to_casts_pixels_and_keeps_ids():
    prompt = VisualPrompt.from_canvas(canvases()).to(torch.float64)
    assert prompt.canvas.dtype == torch.float64 and prompt.visible.dtype == torch.long


def test_it_shows_itself():
    prompt = VisualPrompt.from_canvas(canvases())
    assert repr(prompt) == (
        "VisualPrompt(3 canvases of 224x224, 147 patches visible, 196 decoded, vertical, 1 example(s))"
    )
    picture = Image.open(io.BytesIO(prompt._repr_png_()))
    assert picture.size == (3 * 232, 232)
    white = VisualPrompt.from_canvas(torch.ones(1, 3, 224, 224)).picture()
    assert white.getpixel((10, 10)) == (255, 255, 255) and max(white.getpixel((200, 200))) < 255
