"""The report and the page of `vtv demo`, in a real browser: every control, uploads that are whole and broken, two
visitors at once, a narrow screen, and what axe finds of access. Skipped where there is no Chromium or no Playwright;
what the page computes is in test_demo.py, and what the report holds in test_run.py."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import DATA, run
from PIL import Image

from vtv_nnsight import PatchSet, TaskVectors, data, tasks
from vtv_nnsight.demo.playing import ONE_SHOT, VECTOR, enlarged
from vtv_nnsight.images import as_rgb
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.report import compare
from vtv_nnsight.report.slides import Slides
from vtv_nnsight.runs.settings import Settings

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
WAIT = 60_000


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(address, width, dark) → a page of a visitor of its own; errors in it fail the test."""
    errors, contexts = [], []

    def visit(address, width=1280, dark=False):
        scheme = "dark" if dark else "light"
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not errors


def complaints(page):
    """What axe finds in a page."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    return [(found["id"], found["nodes"][0]["html"][:200]) for found in axe.run(page).response["violations"]]


@pytest.fixture(scope="module")
def report(tmp_path_factory, small_config):
    """The address of a report of a small run."""
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    MAEVQGANModel(small_config()).save_pretrained(folder / "model")
    small = dict(max_images=40, prompts=8, candidates=30, budget=200, test_prompts=6, search="random")
    settings = Settings(model=str(folder / "model"), tasks=("segmentation", "lowlight"), **small)
    return run(folder / "run", settings, progress=False).as_uri()


def test_the_reports_slider_and_units_show_other_answers(report, visit):
    page = visit(report)
    play = page.locator(".play").first
    answer, said, slider = play.locator(".answer"), play.locator("output"), play.locator("input")
    told = json.loads(play.get_attribute("data-play"))
    assert said.inner_text() == f"scale 1.00: mIoU ↑ {told['scores'][-1]:.3f}"
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    assert said.inner_text() == f"scale 0.50: mIoU ↑ {told['scores'][10]:.3f}"
    assert answer.evaluate("e => getComputedStyle(e).backgroundPositionY") == "50%"
    assert "scale 0.50" in answer.get_attribute("aria-label")
    unit = play.locator("button").first
    unit.hover()
    name, at = unit.get_attribute("data-name"), int(unit.get_attribute("data-at"))
    assert said.inner_text() == f"without {name}: mIoU ↑ {told['without'][at]:.3f}"
    assert "without" in answer.get_attribute("class")
    page.mouse.move(0, 0)
    assert said.inner_text().startswith("scale 0.50")
    unit.focus()
    assert said.inner_text().startswith("without")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_report_can_be_read_by_everyone(report, visit, width, dark):
    page = visit(report, width, dark)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert not page.locator("img:not([alt])").count()
    assert complaints(page) == []


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)])
def test_a_comparison_can_be_read_by_everyone(report, visit, tmp_path, width, dark):
    run = Path(report.removeprefix("file://")).parent
    other = shutil.copytree(run, tmp_path / "other")
    page = visit(compare([run, other], tmp_path / "comparison.html").as_uri(), width, dark)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".answers img").first.is_visible()
    assert complaints(page) == []


def test_a_report_without_a_script_shows_its_strips(report, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report)
    boxes = [picture.bounding_box() for picture in page.locator("details[open] .looks img").all()]
    assert len({round(box[side]) for box in boxes for side in ("width", "height")}) == 1 and boxes[0]["width"] > 50
    assert page.locator(".strip img").first.is_visible() and not page.locator(".slide").first.is_visible()
    page.emulate_media(media="print")
    assert page.locator(".looks img").first.is_visible() and not page.locator("nav").is_visible()
    context.close()


def test_slides_move_and_leave_nothing_without_a_script(visit, browser, tmp_path):
    slides = Slides({f"{i / 4}": torch.full((3, 16, 16), i / 4) for i in range(5)}, "scale of the vector")
    (tmp_path / "page.html").write_text(f"<main>{slides.html()}{slides.html()}</main>", encoding="utf-8")
    page = visit((tmp_path / "page.html").as_uri())
    both, slider = page.locator(".vtv-slides"), page.get_by_label("scale of the vector", exact=True)
    assert slider.count() == 2
    said, view = both.first.locator("output"), both.first.locator("[role=img]")
    assert said.inner_text() == "scale of the vector: 1.0"
    slider.first.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert said.inner_text() == "scale of the vector: 0.5" and both.last.locator("output").inner_text().endswith("1.0")
    assert view.get_attribute("aria-label") == "scale of the vector: 0.5"
    with Image.open(io.BytesIO(view.screenshot())) as shown:
        assert shown.convert("L").getpixel((shown.width // 2, shown.height // 2)) == pytest.approx(128, abs=8)
    context = browser.new_context(java_script_enabled=False)
    still = context.new_page()
    still.goto((tmp_path / "page.html").as_uri())
    assert not still.locator("input").count() and still.locator("main").inner_text().strip() == ""
    context.close()


@pytest.fixture(scope="module")
def demo(player):
    """The address of the page, over a small model."""
    pytest.importorskip("gradio")
    from vtv_nnsight.demo.page import launch, make_page

    blocks = make_page(player)
    _, address, _ = launch(blocks, prevent_thread_lock=True, quiet=True)
    yield address
    blocks.close()


@pytest.fixture(scope="module")
def words_demo(player, word_player):
    """The address of the page with a tab for words."""
    pytest.importorskip("gradio")
    from vtv_nnsight.demo.page import launch, make_page

    blocks = make_page(player, word_player)
    _, address, _ = launch(blocks, prevent_thread_lock=True, quiet=True)
    yield address
    blocks.close()


def says(page, words, caption="#caption"):
    """Wait until the page says something."""
    playwright.expect(page.locator(caption)).to_contain_text(re.compile(words), timeout=WAIT)


def test_every_control_changes_the_answer(demo, visit):
    page = visit(demo)
    says(page, r"task vector, scale 1, 8 of 22 units: mIoU .*, one-shot .*, zero-shot")
    for panel in ("#query-cell", "#zero-shot", "#one-shot", "#answer", "#truth", "#carried"):
        assert page.locator(f"{panel} img").is_visible(), panel
    page.locator("#scale input[type=number]").fill("0.5")
    page.locator("#scale input[type=number]").press("Enter")
    says(page, "scale 0.5, 8 of 22")
    page.locator("#other input").click()
    page.get_by_role("option", name="lowlight").click()
    says(page, "scale 0.5, (9|1[0-6]) of 22")
    page.get_by_role("button", name="None", exact=True).click()
    says(page, "scale 0.5, 0 of 22")
    page.locator(".units input").first.check()
    says(page, "scale 0.5, 1 of 22")
    page.get_by_role("button", name="Those that were found").click()
    says(page, "scale 0.5, (9|1[0-6]) of 22")
    page.locator("#task input").click()
    page.get_by_role("option", name="lowlight").first.click()
    says(page, "MSE ↓")
    before = page.locator("#query-cell img").get_attribute("src")
    page.locator("#queries button.thumbnail-item, #queries .grid-container button").nth(3).click()
    playwright.expect(page.locator("#query-cell img")).not_to_have_attribute("src", before, timeout=WAIT)


def shows(page, expected, panel="#answer"):
    """Wait until a panel of the page shows this answer, [3, cell, cell], to the pixel."""
    pixels = enlarged(expected).tobytes()
    for _ in range(WAIT // 250):
        src = page.locator(f"{panel} img").get_attribute("src")
        with Image.open(io.BytesIO(page.request.get(src).body())) as shown:
            if shown.convert("RGB").tobytes() == pixels:
                return
        page.wait_for_timeout(250)
    raise AssertionError("the page never showed the expected answer")


def choose(page, button, file):
    """Upload a file by a button."""
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name=button, exact=True).click()
    chooser.value.set_files(file)


def test_the_scale_is_played_and_the_code_copied(demo, player, visit):
    page = visit(demo)
    says(page, "8 of 22 units")
    number = page.locator("#scale input[type=number]")
    page.evaluate("""() => {
        window.seen = new Set();
        setInterval(() => window.seen.add(document.querySelector("#scale input[type=number]").value), 20);
    }""")
    page.locator("#play").click()
    page.wait_for_function("window.seen.size > 4")
    playwright.expect(number).to_have_value("1", timeout=WAIT)
    units, query = player.found("segmentation"), {**player.rows[1], "number": 1}
    prompt = player.prompt("segmentation", None, query)
    shows(page, player.answer(prompt, VECTOR, player.vector("segmentation"), units))
    page.get_by_role("button", name="Copy as Python").click()
    playwright.expect(page.locator("#code")).to_contain_text("patch(model, vector, units, scale=1)", timeout=WAIT)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#code").get_by_role("button", name=re.compile("copy", re.IGNORECASE)).click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == player.code("segmentation", None, 0.5, units, query, 1.0).strip()


def test_the_share_of_a_mixture_is_what_is_patched(demo, player, visit, tmp_path):
    page = visit(demo)
    says(page, "8 of 22 units")
    page.locator("#other input").click()
    page.get_by_role("option", name="lowlight").click()
    says(page, "task vector, 0.5 of it lowlight's, scale 1")
    page.locator("#share input[type=range]").focus()
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    says(page, "task vector, 0.25 of it lowlight's, scale 1")
    mixed = player.vector("segmentation", "lowlight", 0.25)
    prompt = player.prompt("segmentation", player.rows[0], player.rows[1])
    shows(page, player.answer(prompt, VECTOR, mixed, player.found("segmentation", "lowlight")))
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the vector").click()
    download.value.save_as(tmp_path / "vector.safetensors")
    (written,) = TaskVectors.load(tmp_path / "vector.safetensors").values()
    for stage, mean in mixed.mean.items():
        torch.testing.assert_close(written.mean[stage], mean, equal_nan=True)


def test_an_example_is_picked(demo, player, visit):
    page = visit(demo)
    says(page, "8 of 22 units")
    first, fourth = (player.prompt("segmentation", player.rows[i], player.rows[1]) for i in (0, 3))
    shows(page, player.answer(first, ONE_SHOT), "#one-shot")
    page.locator("#examples .grid-container button").nth(3).click()
    shows(page, player.answer(fourth, ONE_SHOT), "#one-shot")
    assert not torch.equal(player.answer(first, ONE_SHOT), player.answer(fourth, ONE_SHOT))


def test_an_example_pair_is_uploaded(demo, player, visit, tmp_path):
    page = visit(demo)
    says(page, "8 of 22 units")
    shown = page.locator("#example-answer img")
    before = shown.get_attribute("src")
    choose(page, "Upload an example", DATA / "support_image.png")
    playwright.expect(page.get_by_text("an example of segmentation has no 'mask'")).to_be_visible(timeout=WAIT)
    choose(page, "Upload its answer", DATA / "support_mask.png")
    left, right = (as_rgb(DATA / f"support_{name}.png") for name in ("image", "mask"))
    prompt = player.prompt("segmentation", {"image": left, "answer": right}, player.rows[1])
    shows(page, player.answer(prompt, ONE_SHOT), "#one-shot")
    playwright.expect(shown).not_to_have_attribute("src", before, timeout=WAIT)
    broken = tmp_path / "broken.png"
    broken.write_bytes((DATA / "support_mask.png").read_bytes()[:100])
    choose(page, "Upload its answer", broken)
    playwright.expect(page.get_by_text("cannot be read as a picture")).to_be_visible(timeout=WAIT)


def test_what_is_downloaded_is_what_is_shown(demo, visit, tmp_path):
    page = visit(demo)
    says(page, "8 of 22 units")
    for name, button in (("vector.safetensors", "Download the vector"), ("units.json", "Download the set of units")):
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        download.value.save_as(tmp_path / name)
    assert list(TaskVectors.load(tmp_path / "vector.safetensors")) == ["segmentation"]
    assert len(PatchSet.load(tmp_path / "units.json")) == 8


def test_uploads_whole_and_broken(demo, visit, tmp_path):
    page = visit(demo)
    says(page, "8 of 22 units: mIoU")
    before = page.locator("#query-cell img").get_attribute("src")
    upload = page.locator("input[type=file]").first
    upload.set_input_files(DATA / "query_image.png")
    playwright.expect(page.locator("#query-cell img")).not_to_have_attribute("src", before, timeout=WAIT)
    says(page, r"8 of 22 units \(")  # no truth is known, and so no score
    broken = tmp_path / "broken.png"
    broken.write_bytes((DATA / "query_image.png").read_bytes()[:200])
    upload.set_input_files(broken)
    playwright.expect(page.get_by_text("cannot be read as a picture")).to_be_visible(timeout=WAIT)


def test_a_search_on_ones_own_pictures(demo, visit, tmp_path):
    page = visit(demo)
    says(page, "8 of 22 units")
    page.locator("#task input").click()
    page.get_by_role("option", name="lowlight").first.click()
    says(page, "MSE ↓")
    page.get_by_role("button", name="Search on my pictures").click()
    files = [tmp_path / f"{number}.png" for number in range(8)]
    for file, row in zip(files, data.scenes("train", n=8, seed=5)):
        row["image"].save(file)
    page.locator("#pictures input[type=file]").set_input_files(files[:2])
    page.get_by_role("button", name="Search", exact=True).click()
    playwright.expect(page.get_by_text("2 pictures are too few")).to_be_visible(timeout=WAIT)
    page.reload()
    says(page, "8 of 22 units")
    page.locator("#task input").click()
    page.get_by_role("option", name="lowlight").first.click()
    page.get_by_role("button", name="Search on my pictures").click()
    page.locator("#pictures input[type=file]").set_input_files(files)
    page.wait_for_timeout(1000)  # the files are sent
    page.get_by_role("button", name="Search", exact=True).click()
    playwright.expect(page.get_by_text("units found on your pictures")).to_be_visible(timeout=2 * WAIT)


def test_two_visitors_do_not_disturb_each_other(demo, visit):
    one, other = visit(demo), visit(demo)
    says(one, "8 of 22 units")
    says(other, "8 of 22 units")
    one.get_by_role("button", name="None", exact=True).click()
    other.locator("#scale input[type=number]").fill("0.5")
    other.locator("#scale input[type=number]").press("Enter")
    says(one, "scale 1, 0 of 22 units")
    says(other, "scale 0.5, 8 of 22 units")


def test_the_page_fits_a_narrow_screen(demo, visit):
    page = visit(demo, 390, True)
    says(page, "8 of 22 units")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True), (1280, True), (390, False)])
def test_the_page_can_be_used_by_everyone(words_demo, visit, width, dark):
    page = visit(words_demo, width, dark)
    for tab, caption in (("Words", "#words-caption"), ("Pictures", "#caption")):
        page.get_by_role("tab", name=tab).click()
        says(page, "scale 1, [68] of", caption)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.wait_for_timeout(500)  # until nothing fades
        assert complaints(page) == []


def test_words_are_answered(words_demo, word_player, visit):
    page = visit(words_demo)
    says(page, "scale 1, 6 of 12 units", "#words-caption")
    page.get_by_label("Query", exact=True).fill("big")
    page.get_by_label("Query", exact=True).press("Enter")
    vector, found = word_player.vector("antonym"), word_player.found("antonym")
    answers = word_player.answers("antonym", "big", vector, found)
    assert answers["truth"] == "small"
    for name, answer in answers.items():
        playwright.expect(page.get_by_label(name, exact=True)).to_have_value(answer, timeout=WAIT)
    page.locator("#words-scale input[type=number]").fill("0.5")
    page.locator("#words-scale input[type=number]").press("Enter")
    says(page, "scale 0.5, 6 of 12", "#words-caption")
    page.get_by_role("button", name="None", exact=True).click()
    says(page, "scale 0.5, 0 of 12", "#words-caption")
    page.get_by_role("button", name="Copy as Python").click()
    playwright.expect(page.locator("#words-code")).to_contain_text("task.prompt([], 'big')", timeout=WAIT)
    page.locator("#words-task input").click()
    page.get_by_role("option", name="plural").first.click()
    says(page, "scale 0.5, 6 of 12", "#words-caption")
    playwright.expect(page.get_by_label("Query", exact=True)).to_have_value(tasks.words("plural").rows[0]["input"])
