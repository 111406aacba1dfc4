"""What mkdocs does to pages: the reference, algorithms, commands and benchmarks are listed from where they are
declared, so that the pages cannot fall behind; the notebooks are pages; llms.txt lists all of them."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation

ROOT = Path(__file__).parents[1]
BENCHMARKS, TUTORIALS = ROOT / "benchmarks", sorted((ROOT / "tutorials").glob("*.ipynb"))

REFERENCE = {
    "Models": {
        "MAEVQGAN": "models.mae_vqgan.traced.MAEVQGAN",
        "ViTMAE": "models.vit_mae.ViTMAE",
        "Painter": "models.painter.Painter",
        "SegGPT": "models.painter.SegGPT",
        "CausalLM": "models.causal_lm.CausalLM",
        "InContextModel": "models.interface.InContextModel",
        "load_model": "models.sources.load_model",
        "Sites": "models.sites",
    },
    "Prompts": {
        "VisualPrompt": "prompts.VisualPrompt",
        "Canvases": "prompts.Canvases",
        "TextPrompts": "text_prompts.TextPrompts",
        "Layout": "layouts.Layout",
        "Task": "tasks.base.Task",
        "Tasks of the papers": "tasks.builtin",
        "Tasks of words and texts": "tasks.text",
        "Tasks by name": "tasks.registry",
        "Metrics": "metrics",
        "Images": "images",
    },
    "Data": {
        "load": "data.sources.load",
        "split_data": "data.sources.split_data",
        "scenes": "data.drawn_scenes.scenes",
        "pictures": "data.embedded_pictures.pictures",
        "folder": "data.folders.folder",
        "pairs": "data.folders.pairs",
        "pascal": "data.pascal_voc.pascal",
        "detection": "data.pascal_voc.detection",
        "words": "data.word_lists.words",
        "hub": "data.hub_datasets.hub",
    },
    "Vectors and patching": {
        "capture": "vectors.capturing.capture",
        "patch": "patching.patching.patch",
        "ablate": "patching.patching.ablate",
        "Activations": "vectors.values.Activations",
        "TaskVector": "vectors.values.TaskVector",
        "TaskVectors": "vectors.values.TaskVectors",
        "PatchSpace": "patching.spaces.PatchSpace",
        "PatchSet": "patching.sets.PatchSet",
        "Bundle": "runs.bundles",
        "Forward passes": "patching.forward",
    },
    "Search and evaluation": {
        "SearchResult": "search.result.SearchResult",
        "Search": "search.budget.Search",
        "Objective": "search.objective.Objective",
        "Algorithm": "search.registry.Algorithm",
        "evaluate": "evaluation.evaluation.evaluate",
        "Condition": "evaluation.conditions.Condition",
        "Table": "evaluation.table.Table",
        "Controls": "evaluation.random_controls",
        "Selecting prompts": "evaluation.selection",
    },
    "Runs and reports": {
        "run": "runs.pipeline",
        "Settings": "runs.settings.Settings",
        "Steps": "runs.steps",
        "The released protocol": "runs.protocol",
        "QueryExplorer": "report.explorer.QueryExplorer",
        "Photographs": "report.photographs",
        "Attention": "report.attention",
        "Slides": "report.slides.Slides",
        "Player": "demo.playing.Player",
        "WordPlayer": "demo.words",
        "Plots": "report.plots",
        "Verdicts": "report.verdicts",
        "Heat maps": "maps",
    },
    "Studies": {
        "Circuits": "studies.circuits",
        "Learned vectors": "studies.learning",
        "Function vectors": "studies.function_vectors",
        "Clusters": "studies.clusters",
        "Retrieved examples": "studies.prompting.retrieval",
        "Learned borders": "studies.prompting.border",
        "Files of the released code": "studies.released",
    },
}
"""Part of the reference → the title of each page → what it is about, under `vtv_nnsight`."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The addresses of pyproject.toml, and the parts of the navigation that are made."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    config.site_url, config.repo_url = (
        re.search(rf'^{name} = "(.*)"', project, re.MULTILINE)[1] for name in ("Documentation", "Repository")
    )
    config.repo_name = config.site_name
    tabs = {name: pages for tab in config.nav for name, pages in tab.items()}
    tabs["Learn"] += [{_title(notebook): f"tutorials/{notebook.name}"} for notebook in TUTORIALS]
    tabs["Reference"] += [
        {part: [{title: f"reference/{_slug(title)}.md"} for title in pages]} for part, pages in REFERENCE.items()
    ]
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The notebooks, the pictures of the results, and the pages of the reference."""
    for path in [*TUTORIALS, *sorted((BENCHMARKS / "results").glob("*.png"))]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for pages in REFERENCE.values():
        for title, name in pages.items():
            content = f"# {title}\n\n::: vtv_nnsight.{name}\n"
            files.append(File.generated(config, f"reference/{_slug(title)}.md", content=content))
    return files


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """llms.txt: every page with its address, for readers that are programs."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for tab in nav.items:
        lines.append(f"## {tab.title}\n")
        pages = [page for page in nav.pages if tab in page.ancestors]
        lines += [f"- [{page.title or page.file.name}]({config.site_url}{page.url})" for page in pages] + [""]
    files.append(File.generated(config, "llms.txt", content="\n".join(lines)))
    return nav


def tutorials() -> str:
    """A row for every notebook: its first picture, its title, and question and seconds of the README's table."""
    table = dict(re.findall(r"\(tutorials/(\S+)\) \| (.+) \|$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE))
    rows = []
    for notebook in TUTORIALS:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        outputs = (output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
        picture = next((data["image/png"] for data in outputs if "image/png" in data), "").replace("\n", "")
        question, seconds = table[notebook.name].split(" | ")
        image = f'<img src="data:image/png;base64,{picture}" alt="" width="320">' if picture else ""
        heading = f"## [{_title(notebook)}](tutorials/{notebook.name})"
        rows.append(f"{heading}\n\n{image}\n\n{question} (About {seconds} seconds on two cores.)")
    return "\n\n".join(rows)


def _title(notebook: Path) -> str:
    """The first heading of a notebook."""
    first = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
    return first.removeprefix("# ").partition("\n")[0]


def _slug(title: str) -> str:
    return title.lower().replace(" ", "_")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put lists in the place of their marks; the results' pictures are beside the pages, not above them."""
    markdown = markdown.replace("](../benchmarks/results/", "](benchmarks/results/")
    for mark, listed in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, listed())
    return markdown


def algorithms() -> str:
    """The table of search algorithms, and the reference of each."""
    from vtv_nnsight.search import ALGORITHMS

    lines = ["| algorithm | how it searches | what it reads |", "| --- | --- | --- |"]
    for algorithm in ALGORITHMS.values():
        reads = ["losses"] + ["gradients"] * algorithm.needs_gradient + ["task scores"] * algorithm.needs_scores
        lines.append(f"| `{algorithm.name}` | {algorithm.description} | {', '.join(reads)} |")
    pages = [f"::: {algorithm.__module__}.{algorithm.name}" for algorithm in ALGORITHMS.values()]
    return "\n".join(lines) + "\n\n" + "\n\n".join(pages)


def commands() -> str:
    """Every command of `vtv`: what it does, its arguments and options with their defaults, its examples."""
    from vtv_nnsight.cli.group import load_commands

    return "\n\n".join(_command(name, command) for name, command in load_commands().items())


def _command(name: str, command: Any) -> str:
    lines = [f"## vtv {name}", inspect.cleandoc(command.help or "")]
    lines.append("| option | what it does | default |\n|---|---|---|")
    for parameter in command.params:
        option = parameter.param_type_name == "option"
        usage = ", ".join(parameter.opts) if option else (parameter.metavar or parameter.name.upper())
        lines[-1] += f"\n| `{usage}` | {_cell(parameter.help or '')} | {_cell(_default(parameter))} |"
    if not command.params:
        lines.pop()
    if command.epilog:
        lines.append("```text\n" + command.epilog.replace("\n\n", "\n") + "\n```")
    return "\n\n".join(lines)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if isinstance(shown := getattr(parameter, "show_default", None), str):
        return shown
    value = parameter.default
    return "" if value is None or value is False or callable(value) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").replace("][", "]\\[").split())


def benchmarks() -> str:
    """Every benchmark with the first line of its script."""
    lines = ["| benchmark | what it tells |", "|---|---|"]
    for path in sorted(BENCHMARKS.glob("*.py")):
        if path.stem != "common":
            title = path.read_text(encoding="utf-8").removeprefix('"""').partition("\n")[0]
            lines.append(f"| `{path.stem}` | {_cell(title)} |")
    return "\n".join(lines)


def rankings() -> str:
    """The table of rankings of units."""
    from vtv_nnsight.studies.circuits import RANKINGS

    lines = ["| ranking | search | a unit's score |", "|---|---|---|"]
    for name, ranking in RANKINGS.items():
        options = ", ".join(f"{option}={value!r}" for option, value in ranking.options.items())
        lines.append(f"| {name} | `{ranking.algorithm}({options})` | {_cell(ranking.description)} |")
    return "\n".join(lines)


MARKS: dict[str, Callable[[], str]] = {
    "<!-- search.ALGORITHMS -->": algorithms,
    "<!-- tutorials -->": tutorials,
    "<!-- vtv -->": commands,
    "<!-- benchmarks -->": benchmarks,
    "<!-- circuits.RANKINGS -->": rankings,
}
