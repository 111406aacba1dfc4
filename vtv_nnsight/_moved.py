"""Modules of version 0.1 that have moved: they can be imported from where they were until 0.3, with a
DeprecationWarning. `vtv_nnsight/__init__.py` installs the finder."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "ensembles": "visual_prompting.ensembles",
    "model": "models.mae_vqgan",
    "model.checkpoints": "models.mae_vqgan.checkpoints",
    "model.config": "models.mae_vqgan.config",
    "model.mae_vqgan": "models.mae_vqgan.network",
    "model.vit": "models.mae_vqgan.vit",
    "model.vqgan": "models.mae_vqgan.vqgan",
    "prompt_engineering": "visual_prompting.prompt_engineering",
    "run": "experiment.steps",
    "search.run": "search.algorithm",
    "settings": "experiment.settings",
    "tracing": "models.mae_vqgan.tracing",
}
"""Where a module of this package was → where it is."""

PACKAGE = __package__ + "."


class MovedModules(MetaPathFinder, Loader):
    """Finds the modules of `MODULES`. What is imported is the module itself, not a second copy under an older name."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        known = fullname.startswith(PACKAGE) and fullname.removeprefix(PACKAGE) in MODULES
        return ModuleSpec(fullname, self) if known else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = PACKAGE + MODULES[old.removeprefix(PACKAGE)]
        warnings.warn(f"{old} is now {new}; the old name goes in 0.3.", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(new)  # which the import system then hands out


def install() -> None:
    """Let the old names be imported; before other finders, which would read a submodule's file a second time."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())
