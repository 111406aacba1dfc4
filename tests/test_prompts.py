import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

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
    assert torch.equal(prompt[[2, 0]].canvas, prompt.canvas[[2, 0]])
    assert [len(part) for part in prompt.split(2)] == [2, 1]
    assert torch.equal(VisualPrompt.cat(list(prompt)).canvas, prompt.canvas)
    with pytest.raises(IndexError):
        prompt[3]


def test_prompts_that_differ_do_not_share_a_batch():
    prompt = VisualPrompt.from_canvas(canvases(1))
    with pytest.raises(ValueError, match="horizontal"):
        VisualPrompt.cat([prompt, VisualPrompt.from_canvas(canvases(1), Layout(order="horizontal"))])
    with pytest.raises(ValueError, match="147 and 49"):
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
