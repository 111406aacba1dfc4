"""Progress, on stderr: tqdm's bars, and a line for each of several steps.

>>> for batch in progress_bar(batches, desc="collecting"):
...     ...
>>> step = numbered_steps(2)
>>> with step("collect") as working_on:
...     working_on("segmentation")
...     for prompt in progress_bar(prompts):      # a bar below the step's line, gone when it is done
...         ...
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from vtv_nnsight.text import duration

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_fmt}{postfix}]"
progress_bar = partial(tqdm, leave=None, bar_format=BAR)
"""`tqdm`, which says how long is left; a bar that is done stays on the screen unless it is below another. Give it a
`with` block where the loop may raise: what is left open takes in the bars that come after it."""


def numbered_steps(total: int, disable: bool = False) -> Callable[[str], AbstractContextManager[Callable[[str], None]]]:
    """`step(name)` is the context of the next of `total` steps, and yields what is called with what is being done.

    A line says how long each took; one that does nothing is shown as done before.
    """
    numbers = itertools.count(1)

    @contextmanager
    def step(name: str) -> Iterator[Callable[[str], None]]:
        title, began, worked = f"{next(numbers)}/{total} {name}", time.perf_counter(), []
        with tqdm(desc=title, bar_format="{desc}", leave=False, disable=disable) as line:

            def working_on(what: str) -> None:
                worked.append(what)
                line.set_description_str(f"{title} {what}")

            yield working_on
        if not disable:
            spent = duration(time.perf_counter() - began) if worked else "done before"
            tqdm.write(f"✓ {title}  {spent}", file=sys.stderr)

    return step


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers, and of datasets where that is loaded, about what takes a moment."""
    logging: Any = transformers_logging
    datasets: Any = sys.modules.get("datasets")  # which takes a second to import: models do without
    bars, rows = logging.is_progress_bar_enabled(), datasets is not None and datasets.is_progress_bar_enabled()
    logging.disable_progress_bar()
    if rows:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
        if rows:
            datasets.enable_progress_bars()
