"""Find, inspect and use visual task vectors in MAE-VQGAN and its like: an nnsight plugin.

The public names are imported when they are first used, so that `vtv --help` does not wait for torch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "bundles": "runs.bundles",
    "circuits": "studies.circuits",
    "clusters": "studies.clusters",
    "data": "data",
    "learning": "studies.learning",
    "metrics": "metrics",
    "plots": "report.plots",
    "released": "studies.released",
    "search": "search",
    "tasks": "tasks",
}
_NAMES = {
    "BEiT": "models.baselines.beit",
    "MAEVQGAN": "models.mae_vqgan.traced",
    "Activations": "vectors",
    "CausalLM": "models.causal_lm",
    "Condition": "evaluation",
    "Layout": "layouts",
    "Net2Net": "models.baselines.net2net",
    "Painter": "models.painter",
    "PatchSet": "patching",
    "PatchSpace": "patching",
    "SegGPT": "models.painter",
    "TaskVector": "vectors",
    "TaskVectors": "vectors",
    "TextPrompts": "text_prompts",
    "ViTMAE": "models.vit_mae",
    "VisualPrompt": "prompts",
    "ablate": "patching",
    "capture": "vectors",
    "evaluate": "evaluation",
    "patch": "patching",
}
"""Public name → the module, or the module of the name, under this package."""

__all__ = sorted([*_MODULES, *_NAMES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{_MODULES[name]}")
    if name in _NAMES:
        return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
