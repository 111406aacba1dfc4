"""The page of `vtv demo`, in gradio."""

from __future__ import annotations

import atexit
import functools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("vtv demo needs gradio; install it with pip install 'vtv-nnsight[demo]'.") from error

from vtv_nnsight import tasks
from vtv_nnsight.demo.playing import LARGEST, MODES, VECTOR, Player, drawn_mask, enlarged, panels, unit_labels, upload
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.vectors import TaskVectors


def _define_sockets() -> None:
    """Have anyio, which gradio's server is made of, define its classes now. It defines them when they are first used,
    and refuses to while nnsight has put `save` on every object."""
    from nnsight import _c, save

    mounted = _c.unmount is not None and hasattr(object, "save")
    if mounted:
        _c.unmount("save")
    try:
        for name in ("abc", "_backends._asyncio", "streams.file", "streams.stapled", "streams.tls", "to_thread"):
            import_module(f"anyio.{name}")
    finally:
        if mounted:
            _c.mount(save, "save")


NONE = "none"
KEPT = 600
"""Seconds after which gradio's files are removed, while the page runs; all are when it ends."""

STYLE = """
.units .wrap { display: grid !important; grid-template-columns: repeat(HEADS, max-content); gap: 2px !important; }
.units .wrap { overflow-x: auto; }
.units label { padding: 2px 3px !important; gap: 2px !important; font-size: .75rem; }
.units label > span { margin-left: 1px !important; }
.big img { image-rendering: auto; width: 100%; }
footer { display: none !important; }
"""

ABOUT = """# Task vectors, to play with
A **prompt** shows a model an example, its answer and a **query**; the model paints the query's answer. A **task
vector** is what some attention heads say on average over many prompts of a task. Put in their place, it makes the model
do the task with **no example**. A **unit** is one head at one place."""


def make_page(player: Player) -> gr.Blocks:
    """The page; `launch` serves it. Files of its visitors are in a folder of its own, which is removed when the program
    ends."""
    folder = tempfile.mkdtemp(prefix="vtv-demo-")
    os.environ["GRADIO_TEMP_DIR"] = folder  # gradio reads it when a component is made
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    space, layouts, names = player.space, player.space.layout, list(player.bundle)
    maps, labels = panels(space), unit_labels(space)
    picked = [row["image"] for row in player.rows]

    def described(row: dict[str, Any] | None, task: str) -> tuple[Any, Any]:
        """The example's two cells, as the page shows them."""
        if row is None:
            return None, None
        if row.get("answer") is not None:
            return row["image"], row["answer"]
        shown, answer = tasks.get(task).cells(row, layouts.cell_size)
        return enlarged(shown, 168), None if answer is None else enlarged(answer, 168)

    def units_on(mine: Player, task: str, chosen: Iterable[list[str]]) -> PatchSet:
        """The units that are ticked; those found for the task where the page has no boxes to tick."""
        return PatchSet.named(space, [name for own in chosen for name in own]) if maps else mine.found(task)

    @show_errors
    def respond(
        task: str, other: str, share: float, mode: str, scale: float, example: Any, query: Any, visitor: Player | None,
        *chosen: Any,
    ):  # fmt: skip
        began = time.perf_counter()
        units = units_on(visitor or player, task, chosen)
        vector = (visitor or player).vector(task, None if other == NONE else other, share)
        prompt = player.prompt(task, example, query)
        cell = player.answer(prompt, mode, vector, units, scale)
        seconds = time.perf_counter() - began
        words = mode
        if mode == VECTOR:
            mixed = "" if other == NONE else f", {share:g} of it {other}'s"
            words += f"{mixed}, scale {scale:g}, {len(units)} of {len(space)} units"
        if query.get(tasks.get(task).needs) is not None and (example or {}).get("answer") is None:
            score = float(tasks.get(task).score(cell[None], prompt.region("output"))[0])
            words += f": {tasks.get(task).metric.label} {score:.3f}"
        return enlarged(cell), enlarged(prompt.region("query")[0]), f"{words} ({seconds:.1f} s)"

    def found_units(task: str, other: str, visitor: Player | None) -> list[Any]:
        on = (visitor or player).found(task, None if other == NONE else other)
        return [[name for name in own if name in on] for own in maps.values()]

    def pick(event: gr.SelectData):
        return dict(player.rows[event.index])

    @show_errors
    def paint_mask(drawn: dict[str, Any] | None):
        if not drawn or drawn.get("background") is None:
            raise ValueError("there is no picture to paint on; upload one, or pick an example.")
        image = drawn["background"].convert("RGB")
        return {"image": image, "mask": drawn_mask(image, drawn["layers"])}

    @show_errors
    def search(task: str, files: list[str] | None, visitor: Player | None, progress: Any = gr.Progress()):  # noqa: B008
        progress(0.05, "reading")
        rows = [{"image": upload(path, Path(path).name)} for path in files or []]
        progress(0.2, f"collecting and searching on {len(rows)} pictures")
        visitor = (visitor or player).search(task, rows)
        progress(1.0, "done")
        units = visitor.found(task)
        said = f"{len(units)} units found on your pictures: {', '.join(units)}"
        return [visitor, *[[name for name in names if name in units] for names in maps.values()], said]

    with gr.Blocks(title="Task vectors", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
        gr.Markdown(ABOUT)
        example = gr.State(dict(player.rows[0]), time_to_live=3600)
        query = gr.State(dict(player.rows[1]), time_to_live=3600)
        visitor = gr.State(None, time_to_live=3600)  # the player that a search on their own pictures made
        with gr.Row():
            with gr.Column(min_width=300):
                task = gr.Dropdown(names, value=names[0], label="Task", elem_id="task")
                mode = gr.Radio(list(MODES), value=VECTOR, label="How it is asked", elem_id="mode")
                scale = gr.Slider(0, 1.5, value=1.0, step=0.05, label="Scale of the vector", elem_id="scale")
                with gr.Row():
                    other = gr.Dropdown([NONE, *names], value=NONE, label="Mix with", elem_id="other", min_width=120)
                    share = gr.Slider(0, 1, value=0.5, step=0.05, label="Share of it", elem_id="share", min_width=120)
            with gr.Column(min_width=300):
                with gr.Row():
                    asked = gr.Image(
                        label="query, as the task shows it", format="png", interactive=False, elem_id="asked",
                        elem_classes="big", buttons=[], min_width=140, alt_text="the query",
                    )  # fmt: skip
                    answer = gr.Image(
                        label="answer", format="png", interactive=False, elem_id="answer", elem_classes="big",
                        buttons=["download"], min_width=140, alt_text="the model's answer",
                    )  # fmt: skip
                said = gr.Markdown(elem_id="said")
        with gr.Accordion("Pictures", open=True), gr.Row():
            with gr.Column(min_width=300):
                gallery = gr.Gallery(
                    picked, label="Pick a query", columns=6, height=170, elem_id="queries", allow_preview=False,
                    interactive=False, buttons=[],
                )  # fmt: skip
                own_query = gr.UploadButton("Upload a query", file_types=["image"], elem_id="own-query")
            with gr.Column(min_width=300):
                examples = gr.Gallery(
                    picked, label="Pick an example", columns=6, height=170, elem_id="examples",
                    allow_preview=False, interactive=False, buttons=[],
                )  # fmt: skip
                with gr.Row():
                    own_input = gr.UploadButton("Upload an example", file_types=["image"], min_width=120)
                    own_answer = gr.UploadButton("Upload its answer", file_types=["image"], min_width=120)
            with gr.Column(min_width=300), gr.Row():
                shown_input = gr.Image(label="example", interactive=False, buttons=[], min_width=100,
                                       alt_text="the example")  # fmt: skip
                shown_answer = gr.Image(label="its answer", interactive=False, buttons=[], min_width=100,
                                        elem_id="example-answer", alt_text="the example's answer")  # fmt: skip
        with gr.Accordion("Draw a mask for an example", open=False):
            editor = gr.ImageEditor(
                label="Paint over the thing", type="pil", sources=["upload"], layers=False, transforms=[],
                brush=gr.Brush(colors=["#ffffff"], default_size=30), elem_id="editor", buttons=[],
                value=on_easel(picked[0]), height=380,
            )  # fmt: skip
            use_mask = gr.Button("Use this mask")
        groups: list[Any] = []
        if maps:
            with gr.Accordion("Units: rows are layers, columns are heads", open=True):
                with gr.Row():
                    all_found = gr.Button("Those that were found", size="sm", min_width=120)
                    all_off = gr.Button("None", size="sm", min_width=120)
                    some = gr.Button("As many at random", size="sm", min_width=120, elem_id="random")
                with gr.Row():
                    for title, own in maps.items():
                        groups.append(
                            gr.CheckboxGroup(
                                [(labels[name], name) for name in own], label=title, elem_classes="units", min_width=210
                            )
                        )
            with gr.Accordion("Search on my pictures", open=False):
                gr.Markdown(
                    "Eight pictures or more, for a task that makes its own answer (lowlight, inpainting, …): its "
                    "vector is collected and its units are searched for, in a minute or so. They are used until the "
                    "page is loaded again."
                )
                files = gr.File(file_count="multiple", file_types=["image"], label="Pictures", elem_id="pictures")
                begin = gr.Button("Search")
                searched = gr.Markdown()
        with gr.Row():
            get_vector = gr.Button("Download the vector", min_width=160)
            get_set = gr.Button("Download the set of units", min_width=160)
            vector_file = gr.DownloadButton("vector", elem_id="vector-file", visible="hidden")
            set_file = gr.DownloadButton("units", elem_id="set-file", visible="hidden")

        controls = [task, other, share, mode, scale, example, query, visitor, *groups]
        shown = [answer, asked, said]
        one = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden", "queue": True}

        def answered(event: Any) -> Any:
            return event.then(respond, controls, shown, **one)

        def depicted(event: Any) -> Any:
            return answered(event.then(described, [example, task], [shown_input, shown_answer], show_progress="hidden"))

        def reset(event: Any) -> Any:
            return depicted(event.then(found_units, [task, other, visitor], groups, **quiet) if groups else event)

        quiet = {"show_progress": "hidden"}
        reset(blocks.load(lambda: None, **quiet))
        reset(task.input(lambda: None, **quiet))
        reset(other.input(lambda: None, **quiet))
        for control in (share, mode, scale, *groups):
            control.input(respond, controls, shown, trigger_mode="always_last", **one)
        answered(gallery.select(pick, None, query, **quiet))
        to_paint = depicted(examples.select(pick, None, example, **quiet))
        to_paint.then(lambda row: on_easel(row["image"]), example, editor, **quiet)
        answered(own_query.upload(show_errors(lambda path: {"image": upload(path)}), own_query, query, **quiet))
        to_paint = depicted(
            own_input.upload(show_errors(lambda path: {"image": upload(path)}), own_input, example, **quiet)
        )
        to_paint.then(lambda row: on_easel(row["image"]), example, editor, **quiet)
        depicted(
            own_answer.upload(
                show_errors(lambda path, row: {"image": row["image"], "answer": upload(path)}),
                [own_answer, example],
                example,
                **quiet,
            )  # fmt: skip
        )
        depicted(use_mask.click(paint_mask, editor, example, **quiet))
        if groups:
            answered(all_found.click(found_units, [task, other, visitor], groups, **quiet))
            answered(all_off.click(lambda: [[] for _ in groups], None, groups, **quiet))

            def at_random(*chosen: list[str]) -> list[list[str]]:
                on = PatchSet.random(space, sum(map(len, chosen)), random.randrange(2**31))
                return [[name for name in own if name in on] for own in maps.values()]

            answered(some.click(at_random, groups, groups, **quiet))
            begun = begin.click(
                search, [task, files, visitor], [visitor, *groups, searched],
                concurrency_id="model", concurrency_limit=1,
            )  # fmt: skip
            answered(begun)

        def write_vector(task: str, other: str, share: float, visitor: Player | None) -> str:
            mixed = (visitor or player).vector(task, None if other == NONE else other, share)
            path = Path(tempfile.mkdtemp(dir=folder)) / "vector.safetensors"
            TaskVectors({mixed.task: mixed}).save(path)
            return str(path)

        def write_set(task: str, visitor: Player | None, *chosen: list[str]) -> str:
            path = Path(tempfile.mkdtemp(dir=folder)) / "units.json"
            units_on(visitor or player, task, chosen).save(path)
            return str(path)

        written = get_vector.click(write_vector, [task, other, share, visitor], vector_file, **quiet)
        written.then(None, js="() => document.querySelector('#vector-file').click()")
        written = get_set.click(write_set, [task, visitor, *groups], set_file, **quiet)
        written.then(None, js="() => document.querySelector('#set-file').click()")
    heads = max(stage.heads for stage in space.stages)
    blocks.style = STYLE.replace("HEADS", str(heads))  # type: ignore[attr-defined]
    return blocks


def on_easel(image: Any) -> dict[str, Any]:
    """A picture to paint over."""
    return {"background": image, "layers": [], "composite": None}


def show_errors(function: Callable) -> Callable:
    """The same, whose refusals are shown on the page in their one sentence."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except (ValueError, TypeError, OSError) as error:
            raise gr.Error(str(error), duration=8, print_exception=False) from error

    return wrapped


def launch(blocks: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, share: bool = False, **options: Any):
    """Serve the page, to this machine alone unless `host` or `share` say otherwise."""
    _define_sockets()
    return blocks.launch(
        server_name=host, server_port=port, share=share, max_file_size=LARGEST, footer_links=[], ssr_mode=False,
        css=blocks.style, theme=gr.themes.Default(font="system-ui", font_mono="monospace"), **options,
    )  # fmt: skip
