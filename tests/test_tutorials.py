"""Every tutorial runs, and is kept with its outputs."""

import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PICTURED = ("1", "2", "3")
TEMPORARY = {"/tmp", "/var/folders", "/private/var", tempfile.gettempdir()}
ABSOLUTE = re.compile(r"(?<![\w.:/<~*…-])(?:/[\w.+-]+){2,}|\b[A-Za-z]:\\\w+")
"""A path that begins at a root, two names deep: HTML tags and fractions such as 1/2 are none."""


def cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def outputs(notebook):
    return [output for cell in cells(notebook) for output in cell.outputs]


def texts(output):
    """What an output says in words."""
    if output.output_type == "stream":
        return [output.text]
    return [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]


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
    if path.name.startswith(PICTURED):
        assert any("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_reads_as_a_page(path):
    notebook = read(path)
    assert notebook.cells[0].cell_type == "markdown" and "?" in notebook.cells[0].source
    assert max(len(cell.source.splitlines()) for cell in cells(notebook)) <= 25


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
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
