"""What the page of `vtv demo` computes: prompts, answers, uploads, words, the map of units. The page itself is in
test_browser.py."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import DATA
from PIL import Image

from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, TaskVectors, patch, tasks
from vtv_nnsight.demo import playing
from vtv_nnsight.demo.playing import ONE_SHOT, VECTOR, ZERO_SHOT, Player
from vtv_nnsight.demo.words import load_players
from vtv_nnsight.evaluation.conditions import FEW_SHOT
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.prompts import crop


def test_answers_are_those_of_the_library(player):
    prompt = player.prompt("segmentation", player.rows[0], player.rows[1])
    assert torch.equal(prompt.canvas, tasks.segmentation.prompt(*player.rows[:2], player.space.layout).canvas)
    one_shot = player.answer(prompt, ONE_SHOT)
    assert torch.equal(one_shot, crop(player.model.generate(prompt), "output", prompt.layout)[0])
    zero_shot = player.answer(prompt, ZERO_SHOT)
    assert torch.equal(zero_shot, crop(player.model.generate(prompt.query_only()), "output", prompt.layout)[0])
    vector, units = player.vector("segmentation", "lowlight", 0.25), player.found("segmentation", "lowlight")
    assert len(units) == len(player.found("segmentation") | player.found("lowlight"))
    mixed = 0.75 * player.bundle.vectors["segmentation"] + 0.25 * player.bundle.vectors["lowlight"]
    with torch.no_grad(), player.model.generate(prompt.query_only()) as tracer:
        patch(player.model, mixed, units, scale=3.0)
        canvas = tracer.result.save()
    cell = player.answer(prompt, VECTOR, vector, units, 3.0)
    torch.testing.assert_close(cell, crop(canvas, "output", prompt.layout)[0])
    assert torch.equal(player.answer(prompt, VECTOR, vector, units, 0.0), zero_shot)
    with pytest.raises(ValueError, match="mode='two-shot' is unknown"):
        player.answer(prompt, "two-shot")


def test_an_uploaded_pair_is_shown_as_it_is(player):
    left, right = player.rows[0]["image"], player.rows[2]["image"]
    prompt = player.prompt("lowlight", {"image": left, "answer": right}, player.rows[1])
    plain = tasks.identity.prompt(left, player.rows[1]["image"], player.space.layout)
    assert torch.equal(prompt.region("query"), plain.region("query"))
    assert not torch.equal(prompt.region("query"), player.prompt("lowlight", None, player.rows[1]).region("query"))
    with pytest.raises(ValueError, match="an example of segmentation has no 'mask'"):
        player.prompt("segmentation", {"image": left}, player.rows[1])


def test_an_upload_is_checked_and_left_to_other_visitors(tmp_path, monkeypatch):
    """Gradio gives a file of the same content the same path, whoever uploads it, and a search may be tried again."""
    path = tmp_path / "query.png"
    path.write_bytes((DATA / "query_image.png").read_bytes())
    assert playing.upload(path).mode == playing.upload(path).mode == "RGB"
    path.write_bytes(b"GIF89a no picture")
    with pytest.raises(ValueError, match="^holiday cannot be read as a picture"):
        playing.upload(path, "holiday")
    small = io.BytesIO()
    Image.new("RGB", (4, 4)).save(small, "PNG")
    path.write_bytes(small.getvalue())
    with pytest.raises(ValueError, match="4x4 pixels; expected at least 8"):
        playing.upload(path)
    path.write_bytes(small.getvalue())
    monkeypatch.setattr(playing, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="has [0-9]+ bytes; give a picture of at most 10"):
        playing.upload(path)
    path.unlink()
    with pytest.raises(ValueError, match="holiday was removed, as uploads are after 10 minutes; upload it again"):
        playing.upload(path, "holiday")


def test_the_map_has_every_unit_once(player):
    maps = playing.panels(player.space)
    assert [name for own in maps.values() for name in own] != [] and "decoder, output" in maps
    assert sorted(name for own in maps.values() for name in own) == sorted(player.space.names)
    assert maps["encoder, query"]["encoder.blocks.1.attn.heads[3] @ query"] == "1.3"
    assert playing.panels(PatchSpace(player.model, granularity="token")) == {}


def test_a_search_on_ones_own_pictures(player):
    rows = [{"image": row["image"]} for row in player.rows[:8]]
    own = player.search("lowlight", rows, budget=120)
    assert list(own.bundle) == list(player.bundle) and own.vector("lowlight").count == 8
    assert own.vector("segmentation") is player.vector("segmentation") and player.vector("lowlight").count == 3
    with pytest.raises(ValueError, match="3 pictures are too few"):
        player.search("lowlight", rows[:3])
    with pytest.raises(ValueError, match="segmentation needs a mask of every picture"):
        player.search("segmentation", rows)


def page_of(*players):
    """The page, and the functions that it calls by name."""
    pytest.importorskip("gradio")
    from vtv_nnsight.demo.page import make_page

    blocks = make_page(*players)
    return blocks, {function.fn.__name__: function for function in blocks.fns.values() if function.fn}


def test_a_search_that_was_refused_can_be_tried_again(player, tmp_path):
    _, called = page_of(player)
    for i, row in enumerate(player.rows[:3]):
        row["image"].save(tmp_path / f"{i}.png")
    for _ in range(2):
        with pytest.raises(Exception, match="3 pictures are too few to search on"):
            called["search"].fn("lowlight", sorted(map(str, tmp_path.iterdir())), None, progress=lambda *_: None)


def test_pages_of_other_origins_are_not_answered(player, monkeypatch):
    blocks, _ = page_of(player)
    from starlette.responses import PlainTextResponse
    from starlette.testclient import TestClient

    from vtv_nnsight.demo import page

    monkeypatch.setattr(blocks, "launch", lambda **options: options)
    (middleware,) = page.launch(blocks)["app_kwargs"]["middleware"]
    client = TestClient(middleware.cls(PlainTextResponse("answer")), "http://127.0.0.1:7860")
    for origin, status in (
        (None, 200),
        ("http://127.0.0.1:7860", 200),
        ("http://127.0.0.1:9999", 403),
        ("https://elsewhere.org", 403),
        ("null", 403),
        ("http://127.0.0.1:7860.elsewhere.org", 403),
    ):
        assert client.post("/", headers={"origin": origin} if origin else {}).status_code == status
    proxied = {"origin": "https://a.gradio.live", "x-forwarded-host": "a.gradio.live"}
    assert client.get("/", headers=proxied).status_code == 200


def test_a_score_is_shown_where_the_truth_is_known(player):
    _, called = page_of(player)
    image, query = player.rows[0]["image"], player.rows[1]
    uploaded, bare = {"image": image, "answer": image}, {"image": query["image"]}
    for task, example, asked, known in (
        ("lowlight", player.rows[0], query, True),
        ("lowlight", player.rows[0], bare, True),
        ("lowlight", uploaded, query, False),  # the pair tells the task, and nobody knows what it makes of the query
        ("segmentation", player.rows[0], query, True),
        ("segmentation", player.rows[0], bare, False),
        ("segmentation", uploaded, query, False),
    ):
        *_, words, _ = called["respond"].fn(task, "none", 0.5, 1.0, example, asked, None)
        assert (tasks.get(task).metric.label in words) == known, words


def differ(one, other):
    """The largest difference of two pictures' pixels, of 255."""
    return abs(np.asarray(one).astype(int) - np.asarray(other)).max()


def test_the_scale_is_played_from_nothing_to_the_vector(player):
    _, called = page_of(player)
    ticked = called["found_units"].fn("lowlight", "none", None)
    frames = list(called["play"].fn("lowlight", "none", 0.5, player.rows[1], None, *ticked))
    assert [scale for scale, _ in frames] == [round(step / 10, 2) for step in range(11)]
    prompt, units = player.prompt("lowlight", None, player.rows[1]), player.found("lowlight")
    for scale in (0, 10):
        answer = player.answer(prompt, VECTOR, player.vector("lowlight"), units, scale / 10)
        assert differ(frames[scale][1], playing.enlarged(answer)) <= 2


def test_the_code_of_the_page_runs_as_it_is_pasted(tmp_path, monkeypatch):
    player = playing.Player.load("tiny")
    _, called = page_of(player)
    from vtv_nnsight.demo.callbacks import SHOWN, PictureCallbacks  # which needs gradio

    page = PictureCallbacks(player, tmp_path)
    units = PatchSet.random(player.space, 12, 0)
    some = [[name for name in names if name in units] for names in page.panels.values()]
    monkeypatch.chdir(tmp_path)
    found = page.found_units("lowlight", "none", None)
    for task, other, ticked in (("lowlight", "none", found), ("identity", "lowlight", some)):
        shown = page.respond(task, other, 0.25, 0.9, None, page.row(3), None, *ticked)
        path = tmp_path / f"{task}.py"  # nnsight reads the source of a trace from its file
        path.write_text(shown[-1])
        names: dict = {"__name__": "pasted"}
        exec(compile(shown[-1], path, "exec"), names)
        answer = names["answers"].answer[0].cpu()
        assert differ(playing.enlarged(answer), shown[SHOWN.index(VECTOR)]["value"]) <= 2
        assert (tmp_path / "answer.png").is_file()
    for row in (page.row(0), {"image": player.rows[0]["image"]}):
        assert ("picture.jpg" in player.code("lowlight", None, 0.0, units, row, 1.0)) == ("number" not in row)


def test_what_a_visitor_found_is_what_the_page_uses(player):
    _, called = page_of(player)
    own = player.search("lowlight", [{"image": row["image"]} for row in player.rows[:8]], budget=120)
    ticked = called["found_units"].fn("lowlight", "none", own)
    assert [name for names in ticked for name in names] == [
        name for names in playing.panels(player.space).values() for name in names if name in own.found("lowlight")
    ]
    asked = ("lowlight", "none", 0.5, 100.0, *player.rows[:2])
    units = PatchSet.random(player.space, 22, 0)
    ticked = [[name for name in names if name in units] for names in playing.panels(player.space).values()]
    from vtv_nnsight.demo.callbacks import SHOWN

    place = SHOWN.index(VECTOR)
    answers = [called["respond"].fn(*asked, visitor, *ticked)[place]["value"] for visitor in (None, own)]
    prompt = player.prompt("lowlight", *player.rows[:2])
    for answer, used in zip(answers, (player, own)):
        expected = playing.enlarged(player.answer(prompt, VECTOR, used.vector("lowlight"), units, 100.0))
        assert differ(answer, expected) <= 2  # the batch is another, and so may be the last bit
    assert differ(*answers) > 20
    (written,) = TaskVectors.load(called["write_vector"].fn("lowlight", "none", 0.5, own)).values()
    assert written.count == 8
    (kept,) = (block for block in called["search"].outputs if type(block).__name__ == "State")
    for name in ("search", "respond", "found_units", "write_vector", "write_set"):
        assert kept in called[name].inputs


def test_the_page_of_a_bundle_with_a_unit_a_token(player):
    space = PatchSpace(player.model, granularity="token")
    units = PatchSet.random(space, 8, 0)
    found = {name: replace(one, patches=units, scores=None) for name, one in player.bundle.results.items()}
    blocks, called = page_of(Player(player.model, replace(player.bundle, results=found), player.rows))
    assert PatchSet.load(called["write_set"].fn("lowlight", None)) == units
    assert "search" not in called and not [
        block for block in blocks.blocks.values() if getattr(block, "value", None) == "Search"
    ]


def test_a_player_of_other_vectors_is_refused(player, small_config):
    torch.manual_seed(1)
    other = MAEVQGAN(MAEVQGANModel(small_config()))
    with pytest.raises(ValueError, match="does not fit this model"):
        Player(other, player.bundle, player.rows)


def test_words_are_answered_as_the_library_answers(word_player):
    """Zero-shot, after examples without the query's word, and with a mixture of vectors."""
    model, task = word_player.model, tasks.words("antonym")
    vector, units = word_player.vector("antonym", "plural", 0.25), word_player.found("antonym", "plural")
    assert len(units) == len(word_player.found("antonym") | word_player.found("plural"))
    answers = word_player.answers("antonym", "hot", vector, units, 60.0, shots=3)
    assert list(answers) == [ZERO_SHOT, FEW_SHOT, VECTOR, "truth"] and answers["truth"] == "cold"
    zero_shot, few_shot = task.prompt([], "hot"), word_player.few_shot("antonym", "hot", 3)
    assert few_shot.texts[0].endswith(zero_shot.texts[0]) and few_shot.layout.shots == 3
    assert "hot" not in few_shot.texts[0].removesuffix(zero_shot.texts[0])
    assert answers[ZERO_SHOT] == model.say(zero_shot)[0].strip()
    assert answers[FEW_SHOT] == model.say(few_shot)[0].strip()
    (patched,) = model.say(zero_shot, edit=lambda traced: patch(traced, vector, units, scale=60.0))
    assert answers[VECTOR] == patched.strip() != answers[ZERO_SHOT]
    assert word_player.answers("antonym", "hot", vector, units, 0.0)[VECTOR] == answers[ZERO_SHOT]
    assert word_player.answers("antonym", "zebra", vector, units)["truth"] == ""
    with pytest.raises(ValueError, match="has no 'input'"):
        word_player.answers("antonym", " ", vector, units)


def test_the_tab_for_words_answers_and_its_code_runs(player, word_player, tmp_path, capsys):
    blocks, called = page_of(player, word_player)
    assert {"Words", "Pictures"} <= {getattr(block, "label", None) for block in blocks.blocks.values()}
    from vtv_nnsight.demo.callbacks import SAID, WordCallbacks

    page = WordCallbacks(word_player, tmp_path, "words-")
    assert called["first_query"].fn("plural") == tasks.words("plural").rows[0]["input"]
    found, some = page.found_units("antonym", "none", None), ["layers.1.self_attn.heads[2]"]
    assert len(found) == 6 and page.no_units() == []
    assert "#words-units-0 .wrap { grid-template-columns: repeat(4," in page.heat("plural", None)
    for task, other, ticked in (("antonym", "none", found), ("plural", "antonym", some)):
        shown = page.respond(task, other, 0.25, 60.0, "hot", 2, None, ticked)
        assert f"scale 60, {len(ticked)} of 12 units" in shown[len(SAID)] and shown[0] != shown[SAID.index(VECTOR)]
        path = tmp_path / f"{task}.py"
        path.write_text(shown[-1])
        exec(compile(shown[-1], path, "exec"), {"__name__": "pasted"})
        assert capsys.readouterr().out.strip() == shown[SAID.index(VECTOR)]
    with pytest.raises(Exception, match="has no 'input'"):
        page.respond("antonym", "none", 0.5, 1.0, "", 2, None, found)


def test_vectors_and_a_model_say_which_pages_there_are(word_player):
    pictures, words = load_players(device="cpu")
    assert words is None and pictures.source is None and len(pictures.rows) == 16
    with pytest.raises(ValueError, match="the bundle of smollm2 does not fit this model"):
        load_players(model=word_player.source)
