"""The moving picture of `vtv demo`, demo.gif: the scale of a vector is played, then the tab for words is shown.

    python docs/demo_gif.py MODEL

MODEL is SmolLM2 (docs/howto/language_models.md: a folder, or its .gguf file). Needs a Chromium and
`pip install -e ".[demo,browser]"`.
"""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from vtv_nnsight.demo import callbacks
from vtv_nnsight.demo.page import launch, make_page
from vtv_nnsight.demo.words import load_players
from vtv_nnsight.report.hero import save_animation

TASK, QUERY = "lowlight", 3
"""What is shown, and the number of the thumbnail that is clicked at."""


def main(model: str) -> None:
    callbacks.PAUSE = 4.0  # seconds: a screenshot is taken of each step
    blocks = make_page(*load_players(model=model))
    _, address, _ = launch(blocks, prevent_thread_lock=True, quiet=True)
    with sync_playwright() as started:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        page = started.chromium.launch(executable_path=path, args=flags).new_page()
        page.set_viewport_size({"width": 1280, "height": 760})
        page.set_default_timeout(120_000)
        page.goto(address)
        frames = [*played(page), words(page)]
    blocks.close()
    save_animation(frames, Path(__file__).parent / "demo.gif")


def played(page: Page) -> list[Image.Image]:
    """The tab of pictures, at every step of ▶ and at its end."""
    page.get_by_role("tab", name="Pictures").click()
    page.locator("#task input").click()
    page.get_by_role("option", name=TASK).first.click()
    page.locator("#queries .grid-container button").nth(QUERY).click()
    expect(page.locator("#caption")).to_contain_text(re.compile("scale 1, .*MSE"), timeout=120_000)
    page.wait_for_timeout(2000)
    page.mouse.wheel(0, -2000)
    page.locator("#play").click()
    frames = []
    for step in range(callbacks.STEPS):
        scale = round(step / (callbacks.STEPS - 1), 2)
        expect(page.locator("#scale input[type=number]")).to_have_value(f"{scale:g}", timeout=120_000)
        page.wait_for_timeout(400)
        frames.append(screenshot(page))
    return frames


def words(page: Page) -> Image.Image:
    """The tab for words, with its answers."""
    page.get_by_role("tab", name="Words").click()
    expect(page.locator("#words-caption")).to_contain_text("scale 1", timeout=120_000)
    page.wait_for_timeout(1000)
    return screenshot(page)


def screenshot(page: Page) -> Image.Image:
    """What the window shows."""
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        return picture.convert("RGB").resize((960, 570), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main(*sys.argv[1:])
