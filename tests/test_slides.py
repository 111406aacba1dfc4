"""Slides in a notebook: a strip that is always there, and a slider that its own script makes. How the slider moves is
in test_browser.py."""

import base64
import html
import io
import json
import re

import pytest
import torch
from IPython.display import HTML
from PIL import Image

from vtv_nnsight.report.slides import Slides


@pytest.fixture
def slides():
    return Slides({f"{scale:.1f}": torch.full((3, 20, 10), scale) for scale in (0.0, 0.5, 1.0)}, "scale <b>")


def test_a_strip_keeps_the_pictures_shape(slides):
    strip = slides.strip(side=40)
    assert strip.size == (2 + 3 * 42, 20 + 80 + 2)
    assert [strip.getpixel((22 + 42 * i, 60)) for i in range(3)] == [(v, v, v) for v in (0, 128, 255)]


def test_the_slider_holds_every_picture_and_escapes_its_words(slides):
    page = slides.html()
    assert "<b>" not in page and page.count("<script>") == 1
    told = json.loads(html.unescape(re.search('data-slides="([^"]*)"', page)[1]))
    assert told["title"] == "scale <b>" and told["labels"] == ["0.0", "0.5", "1.0"]
    with Image.open(io.BytesIO(base64.b64decode(told["picture"].split(",")[1]))) as picture:
        assert picture.size == (30, 20)
        pixels = [picture.convert("RGB").getpixel((5 + 10 * i, 10))[0] for i in range(3)]
    assert pixels == pytest.approx([0, 128, 255], abs=8)


def test_a_notebook_gets_the_strip_and_then_the_slider(slides, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    slides._ipython_display_()
    strip, slider = shown
    with Image.open(io.BytesIO(strip.data)) as picture:
        assert picture.size == slides.strip().size
    assert strip.alt == "scale <b>: 0.0, 0.5, 1.0"
    assert isinstance(slider, HTML) and slider.data == slides.html()


@pytest.mark.parametrize("sizes", [[(3, 4, 4)], [(3, 4, 4), (3, 4, 5)]])
def test_what_cannot_be_slid_through_is_refused(sizes):
    with pytest.raises(ValueError, match=f"{len(sizes)} pictures of the sizes .* give two or more"):
        Slides({str(i): torch.zeros(size) for i, size in enumerate(sizes)}, "scale")
