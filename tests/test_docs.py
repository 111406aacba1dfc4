"""The Python blocks of the docs run, page by page, in the order in which a reader would type them."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["cookbook.md"]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks(page)
    assert code
    names: dict = {"__name__": "docs"}
    with torch.random.fork_rng():
        for number, block in enumerate(code):
            path = tmp_path / f"{Path(page).stem}_{number}.py"  # nnsight reads the source of a trace from its file
            path.write_text(block)
            exec(compile(block, path, "exec"), names)


def test_no_line_of_code_is_cut_off():
    long = {(page, line) for page in PAGES for block in blocks(page) for line in block.splitlines() if len(line) > 120}
    assert not long
