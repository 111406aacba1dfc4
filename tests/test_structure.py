"""How the package is built, where import-linter does not look. (Layers and cycles are `lint-imports`.)"""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "vtv_nnsight"
WINGS = ("studies/", "training/", "models/baselines/", "report/", "demo/", "cli/")
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
CORE = [name for name in MODULES if not name.startswith(WINGS)]
LAZY = {"__init__.py", "cli/group.py", "models/sources.py", "search/__init__.py"}
"""Where modules are imported by name: public names, commands, families of models, the folder of search algorithms."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def nodes(path):
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imported(node):
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_modules_are_imported_by_name_in_four_places():
    """`import_module` and its like hide an import from the linter."""

    def is_hidden(node):
        name = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", ""))
        return name in ("import_module", "__import__", "run_module")

    assert {name for name in MODULES if any(map(is_hidden, nodes(PACKAGE / name)))} <= LAZY


def test_the_core_imports_at_the_top():
    assert not [
        f"{name}:{node.lineno}"
        for name in CORE
        for function in nodes(PACKAGE / name)
        if isinstance(function, FUNCTIONS)
        for node in ast.walk(function)
        if any(module.startswith("vtv_nnsight") for module in imported(node))
    ]


def test_no_module_has_the_name_of_what_its_package_exports():
    """`from vtv_nnsight.search import reinforce` would be a module or an algorithm, whichever came last."""
    clashes = []
    for name in (name for name in MODULES if name.endswith("__init__.py")):
        folder = (PACKAGE / name).parent
        exported = set()
        for node in ast.parse((PACKAGE / name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module != ".".join(folder.relative_to(ROOT).parts):
                exported |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                exported.add(node.name)
            elif isinstance(node, ast.Assign):
                exported |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        modules = {path.stem for path in folder.glob("*.py")} | {
            path.parent.name for path in folder.glob("*/__init__.py")
        }
        clashes += [f"{name}: {clash}" for clash in sorted(modules & exported)]
    assert not clashes


def test_files_and_functions_are_short():
    """At most 450 and 80 lines, docstrings included."""
    long = []
    for name in MODULES:
        lines = len((PACKAGE / name).read_text(encoding="utf-8").splitlines())
        long += [f"{name}: {lines}"] if lines > 450 else []
        functions = [node for node in nodes(PACKAGE / name) if isinstance(node, FUNCTIONS)]
        sizes = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
        long += [f"{name}:{function}: {size}" for function, size in sizes.items() if size > 80]
    assert not long


def test_test_modules_import_nothing_from_each_other():
    for path in Path(__file__).parent.glob("*.py"):
        modules = [module for node in nodes(path) for module in imported(node)]
        assert not [name for name in modules if name.startswith(("test_", "conftest"))], path.name


def test_what_docs_and_notebooks_import_is_there():
    """Notebooks are run by night only; what they import is looked at here."""
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "tutorials").glob("*.ipynb")]:
        text = path.read_text(encoding="utf-8")
        for module, names in re.findall(r"from (vtv_nnsight[\w.]*) import ([\w, ]+)", text):
            for name in names.split(","):
                assert hasattr(import_module(module), name.split(" as ")[0].strip()), f"{path.name}: {module}, {name}"


def test_what_is_no_module_is_in_the_wheel():
    """Weights, pictures, templates and tables: each file matches a pattern of its package's data."""
    setuptools = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    packages, data = setuptools["setuptools"]["packages"], setuptools["setuptools"]["package-data"]
    paths = {name: name.replace(".", "/").replace("vtv_nnsight/benchmarks", "benchmarks") for name in packages}
    folders = {name: ROOT / path for name, path in paths.items()}
    carried = {file for name, patterns in data.items() for pattern in patterns for file in folders[name].glob(pattern)}
    files = {file for file in PACKAGE.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert len(carried) > 25 and not files - carried
    modules = [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert {file.parent for file in modules} == set(folders.values())
