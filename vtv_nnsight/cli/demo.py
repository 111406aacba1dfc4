"""`vtv demo`: a page to play with."""

from __future__ import annotations

from typing import Annotated

import typer

from vtv_nnsight.cli import options
from vtv_nnsight.cli.group import app
from vtv_nnsight.demo.words import load_players


@app.command(epilog="Examples: vtv demo\n\nvtv demo --vectors runs/holiday --port 8000\n\nvtv demo --model smollm2")
def demo(
    vectors: Annotated[
        str | None,
        typer.Option(
            help='Task vectors and units: "tiny" or "smollm2" for those in the package, or a run\'s folder.',
            metavar="RUN",
            show_default="tiny; smollm2 for a language model",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model, as SOURCE of `vtv info`.", metavar="SOURCE", show_default="the run's own"),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The port.", show_default="7860, or the next that is free")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Ask gradio for a public address, for anybody.")] = False,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
    device: options.Device = None,
) -> None:
    """Play with task vectors on a page: pictures of your own, scales, mixtures, units on and off. A language model, or
    vectors of one, adds a tab for words.

    It listens on this machine alone, unless --host or --share say otherwise. Files of uploads are removed after ten
    minutes. Needs gradio: pip install "vtv-nnsight[demo]".
    """
    from vtv_nnsight.demo.page import launch, make_page  # which needs gradio, and this help does not

    launch(make_page(*load_players(vectors, model, device)), host, port, share, inbrowser=show)
