"""The page of `vtv demo`, in gradio: its panels, and what its events do.

Functions that end in `_panel` lay out a part of the page and put its components on `page`, a namespace; functions that
begin with `_wire` bind its events to `callbacks.Callbacks`, which is `page.calls`.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

try:
    import gradio as gr
    from starlette.datastructures import Headers
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    raise ImportError("vtv demo needs gradio; install it with pip install 'vtv-nnsight[demo]'.") from error

from vtv_nnsight.demo.callbacks import NONE, SAID, SHOWN, PictureCallbacks, WordCallbacks
from vtv_nnsight.demo.playing import KEPT_SECONDS, MAX_BYTES, VECTOR, Player
from vtv_nnsight.demo.words import WordPlayer
from vtv_nnsight.models.nnsight_compat import without_save

STATE_SECONDS = 3600
"""Seconds for which a visitor's uploads are kept in memory."""
QUIET: dict[str, Any] = {"show_progress": "hidden"}
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}

ABOUT = """# Task vectors, to play with
A **prompt** shows a model an example, its answer and a **query**; the model paints the query's answer. A **task
vector** is what some attention heads say on average over many prompts of a task. Put in their place, it makes the model
do the task with **no example**. A **unit** is one head at one place."""

ABOUT_WORDS = """# Task vectors of words, to play with
A **few-shot** prompt shows a language model solved examples before the **query**. A **task vector** is what its
attention heads say, on average, at the last token of many such prompts. Put in their place, it makes the model do the
task **zero-shot**: with no example. A **unit** is one head at the last token."""

ABOUT_SEARCH = """Eight pictures or more, for a task that makes its own answer (lowlight, inpainting, …): its vector is
collected and its units are searched for, in a minute or so. They are used until the page is loaded again."""


def make_page(player: Player, words: WordPlayer | None = None) -> gr.Blocks:
    """The page, with a tab for words where there is a language model; `launch` serves it. Files of its visitors are in
    a temporary folder, which is removed when the program ends."""
    folder = tempfile.mkdtemp(prefix="vtv-demo-")
    os.environ["GRADIO_TEMP_DIR"] = folder  # gradio reads it when a component is made
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with gr.Blocks(title="Task vectors", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as blocks:
        if words is None:
            _pictures(blocks, PictureCallbacks(player, Path(folder)))
        else:
            with gr.Tab("Words"):
                _words(blocks, WordCallbacks(words, Path(folder), "words-"))
            with gr.Tab("Pictures"):
                _pictures(blocks, PictureCallbacks(player, Path(folder)))
    return blocks


def _pictures(blocks: gr.Blocks, calls: PictureCallbacks) -> None:
    """All of the page that is about pictures."""
    page: Any = SimpleNamespace(calls=calls, units=[])
    gr.Markdown(ABOUT)
    page.example, page.query, page.visitor = (
        gr.State(value, time_to_live=STATE_SECONDS) for value in (calls.row(0), calls.row(1), None)
    )
    _answers_panel(page)
    with gr.Row():
        _vector_panel(page)
        page.play = gr.Button("▶ Play the scale", elem_id="play", min_width=140)
        _mixture_panel(page)
    with gr.Accordion("Pictures", open=True), gr.Row():
        _pictures_panel(page, [row["image"] for row in calls.player.rows])
    if calls.panels:
        _units_panel(page)
        with gr.Accordion("Search on my pictures", open=False):
            _search_panel(page)
    _downloads_panel(page)
    page.controls = [page.task, page.other, page.share, page.scale]
    page.controls += [page.example, page.query, page.visitor, *page.units]
    page.outputs = [*page.pictures, page.caption, page.code]
    _wire_question(page, blocks)
    _wire_pictures(page)
    if page.units:
        _wire_units(page, blocks)
        _wire_search(page)
    _wire_downloads(page)


def _words(blocks: gr.Blocks, calls: WordCallbacks) -> None:
    """The tab for words."""
    page: Any = SimpleNamespace(calls=calls, units=[])
    query = calls.first_query(next(iter(calls.player.bundle)))
    gr.Markdown(ABOUT_WORDS)
    page.visitor = gr.State(None)
    with gr.Row():
        page.query = gr.Textbox(query, label="Query", elem_id=calls.id("query"), min_width=200)
        page.shots = gr.Slider(1, 16, 8, step=1, label="Examples of the few-shot prompt", elem_id=calls.id("shots"))
    with gr.Row():
        page.said = [
            gr.Textbox(label=name, elem_id=calls.id(name.replace(" ", "-")), interactive=False, lines=2, min_width=140)
            for name in SAID
        ]
    page.caption = gr.Markdown(elem_id=calls.id("caption"), elem_classes="caption")
    with gr.Row():
        _vector_panel(page)
        _mixture_panel(page)
    with gr.Accordion("The few-shot prompt", open=False):
        page.prompt = gr.Textbox(label="Prompt", interactive=False)
    if calls.panels:
        _units_panel(page)
    _downloads_panel(page)
    page.controls = [page.task, page.other, page.share, page.scale, page.query, page.shots, page.visitor, *page.units]
    page.outputs = [*page.said, page.caption, page.prompt, page.code]
    _answer(page, _tick_found(page, blocks.load))
    _answer(page, _tick_found(page, page.other.input))
    _answer(page, _tick_found(page, page.task.input(calls.first_query, page.task, page.query, **QUIET).then))
    _answer(page, page.query.submit)
    for control in (page.shots, page.share, page.scale, *page.units):
        _answer(page, control.input, trigger_mode="always_last")
    if page.units:
        _wire_units(page, blocks)
    _wire_downloads(page)


def _vector_panel(page: Any) -> None:
    """The task, and how far its vector goes."""
    names, name = list(page.calls.player.bundle), page.calls.id
    page.task = gr.Dropdown(names, value=names[0], label="Task", elem_id=name("task"), min_width=140)
    page.scale = gr.Slider(0, 1.5, 1.0, step=0.05, label="Scale", elem_id=name("scale"), min_width=240)


def _mixture_panel(page: Any) -> None:
    """Another task's vector."""
    names, name = [NONE, *page.calls.player.bundle], page.calls.id
    page.other = gr.Dropdown(names, value=NONE, label="Mix with", elem_id=name("other"), min_width=120)
    page.share = gr.Slider(0, 1, value=0.5, step=0.05, label="Share of it", elem_id=name("share"), min_width=160)


def _answers_panel(page: Any) -> None:
    """The query, its answers and the truth side by side, the answer carried over, and a line about them."""
    large: dict[str, Any] = {"format": "png", "elem_classes": "big", "min_width": 140}
    titles = {"query": ("query-cell", "the query"), "task vector": ("answer", "the answer with the task vector")}
    with gr.Row():
        page.pictures = [
            _image(name, alt, ["download"] * (name == VECTOR), elem_id=elem_id, **large)
            for name in SHOWN
            for elem_id, alt in [titles.get(name, (name.split()[0], name))]
        ]
    page.caption = gr.Markdown(elem_id="caption", elem_classes="caption")


def _pictures_panel(page: Any, pictures: list[Any]) -> None:
    """Queries and examples to pick or upload, and the example as the task shows it."""
    with gr.Column(min_width=300):
        page.queries = _gallery(pictures, "Pick a query", "queries")
        page.new_query = gr.UploadButton("Upload a query", file_types=["image"], elem_id="own-query")
    with gr.Column(min_width=300):
        page.examples = _gallery(pictures, "Pick an example", "examples")
        with gr.Row():
            page.new_input = gr.UploadButton("Upload an example", file_types=["image"], min_width=120)
            page.new_answer = gr.UploadButton("Upload its answer", file_types=["image"], min_width=120)
    with gr.Column(min_width=300), gr.Row():
        page.example_cells = [
            _image("example", "the example", min_width=100),
            _image("its answer", "the example's answer", min_width=100, elem_id="example-answer"),
        ]


def _units_panel(page: Any) -> None:
    """A box to tick for every unit, and buttons for many."""
    with gr.Accordion("Units: rows are layers, columns are heads", open=True):
        with gr.Row():
            page.all_found = gr.Button("Those that were found", size="sm", min_width=120)
            page.all_off = gr.Button("None", size="sm", min_width=120)
        with gr.Row():
            for number, (title, labels) in enumerate(page.calls.panels.items()):
                boxes, place = [(label, name) for name, label in labels.items()], page.calls.id(f"units-{number}")
                group = gr.CheckboxGroup(boxes, label=title, elem_classes="units", elem_id=place, min_width=210)
                page.units.append(group)
        page.heat = gr.HTML()


def _search_panel(page: Any) -> None:
    """Pictures to search on."""
    gr.Markdown(ABOUT_SEARCH)
    page.files = gr.File(file_count="multiple", file_types=["image"], label="Pictures", elem_id="pictures")
    page.search = gr.Button("Search")
    page.search_caption = gr.Markdown()


def _downloads_panel(page: Any) -> None:
    """Buttons that write a file, hidden ones that the page clicks at when it is written, and the code."""
    with gr.Row():
        page.get_vector = gr.Button("Download the vector", min_width=160)
        page.get_set = gr.Button("Download the set of units", min_width=160)
        page.vector_file = gr.DownloadButton("vector", elem_id=page.calls.id("vector-file"), visible="hidden")
        page.set_file = gr.DownloadButton("units", elem_id=page.calls.id("set-file"), visible="hidden")
    with gr.Accordion("Copy as Python", open=False):
        page.code = gr.Code(language="python", interactive=False, elem_id=page.calls.id("code"), label="Python")


def _image(label: str, alt_text: str, buttons: Sequence[Any] = (), **options: Any) -> gr.Image:
    return gr.Image(label=label, alt_text=alt_text, interactive=False, buttons=list(buttons), **options)


def _gallery(pictures: list[Any], label: str, elem_id: str) -> gr.Gallery:
    return gr.Gallery(
        pictures, label=label, columns=6, height=170, elem_id=elem_id, allow_preview=False, interactive=False,
        buttons=[],
    )  # fmt: skip


def _wire_question(page: Any, blocks: gr.Blocks) -> None:
    for bind in (blocks.load, page.task.input, page.other.input):
        _show_example(page, _tick_found(page, bind))
    for control in (page.share, page.scale, *page.units):
        _answer(page, control.input, trigger_mode="always_last")
    inputs = [page.task, page.other, page.share, page.query, page.visitor, *page.units]
    answer = page.pictures[SHOWN.index(VECTOR)]
    _answer(page, page.play.click(page.calls.play, inputs, [page.scale, answer], **ONE_AT_A_TIME, **QUIET).then)


def _wire_pictures(page: Any) -> None:
    calls = page.calls
    picked = page.examples.select(calls.pick, None, page.example, **QUIET)
    uploaded = page.new_input.upload(calls.upload_picture, page.new_input, page.example, **QUIET)
    for event in (picked, uploaded):
        _show_example(page, event.then)
    paired = page.new_answer.upload(calls.upload_answer, [page.new_answer, page.example], page.example, **QUIET)
    _show_example(page, paired.then)
    picked = page.queries.select(calls.pick, None, page.query, **QUIET)
    uploaded = page.new_query.upload(calls.upload_picture, page.new_query, page.query, **QUIET)
    for event in (picked, uploaded):
        _answer(page, event.then)


def _wire_units(page: Any, blocks: gr.Blocks) -> None:
    calls = page.calls
    for bind in (blocks.load, page.task.input):
        bind(calls.heat, [page.task, page.visitor], page.heat, **QUIET)
    _answer(page, _tick_found(page, page.all_found.click))
    _answer(page, page.all_off.click(calls.no_units, None, page.units, **QUIET).then)


def _wire_search(page: Any) -> None:
    calls, units = page.calls, page.units
    inputs, outputs = [page.task, page.files, page.visitor], [page.visitor, *units, page.search_caption]
    _answer(page, page.search.click(calls.search, inputs, outputs, **ONE_AT_A_TIME).then)


def _wire_downloads(page: Any) -> None:
    vector, units = [page.task, page.other, page.share, page.visitor], [page.task, page.visitor, *page.units]
    for button, write, inputs, file in (
        (page.get_vector, page.calls.write_vector, vector, page.vector_file),
        (page.get_set, page.calls.write_set, units, page.set_file),
    ):
        written = button.click(write, inputs, file, **QUIET)
        written.then(None, js=f"() => document.querySelector('#{file.elem_id}').click()")


def _tick_found(page: Any, bind: Callable) -> Callable:
    """Tick the units that were found when an event happens; `bind` is its method, such as `slider.input` or
    `event.then`. Returns that of what comes next."""
    if not page.units:
        return bind
    return bind(page.calls.found_units, [page.task, page.other, page.visitor], page.units, **QUIET).then


def _show_example(page: Any, bind: Callable) -> Any:
    """Show the example's cells when an event happens, then answer."""
    return _answer(page, bind(page.calls.example_cells, [page.example, page.task], page.example_cells, **QUIET).then)


def _answer(page: Any, bind: Callable, **options: Any) -> Any:
    """Answer when an event happens: visitors one after the other."""
    return bind(page.calls.respond, page.controls, page.outputs, **ONE_AT_A_TIME, **QUIET, queue=True, **options)


class SameOrigin:
    """Answers no page of another site: the origin that a browser tells of is that of this page, or there is none."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        headers = Headers(raw=scope.get("headers", []))
        origin, ours = headers.get("origin"), (headers.get("host"), headers.get("x-forwarded-host"))
        strange = origin is not None and urlsplit(origin).netloc not in filter(None, ours)
        app = PlainTextResponse("This page answers its own visitors only.", 403) if strange else self.app
        await app(scope, receive, send)


def launch(blocks: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, share: bool = False, **options: Any):
    """Serve the page, to this machine alone unless `host` or `share` say otherwise."""
    with without_save():  # anyio, which gradio's server is made of, defines these when they are first used
        from anyio import abc, to_thread  # noqa: F401
        from anyio._backends import _asyncio  # noqa: F401
        from anyio.streams import file, stapled, tls  # noqa: F401
    style = (files("vtv_nnsight.demo") / "page.css").read_text("utf-8")
    return blocks.launch(
        server_name=host, server_port=port, share=share, max_file_size=MAX_BYTES, footer_links=[], ssr_mode=False,
        css=style, theme=gr.themes.Default(primary_hue="emerald", font="system-ui", font_mono="monospace"),
        app_kwargs={"middleware": [Middleware(SameOrigin)]}, **options,
    )  # fmt: skip
