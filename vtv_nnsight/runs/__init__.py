"""The paper from end to end, in a folder.

What needs torch is imported when it is first used, so that `vtv --help` does not wait for it.
"""

from importlib import import_module
from typing import Any

from vtv_nnsight.runs.settings import PUBLISHED, QUICK, Settings

_HOMES = {"STEPS": "record", "run": "steps"}

__all__ = ["PUBLISHED", "QUICK", "STEPS", "Settings", "run"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
