"""Find, inspect and use visual task vectors in MAE-VQGAN and its like: an nnsight plugin.

The public names are imported when they are first used, so that `vtv --help` does not wait for torch.
"""

from importlib import import_module

from vtv_nnsight import _moved

_moved.install()

_MODULES = ("bundles", "circuits", "data", "metrics", "search", "tasks")
_HOMES = {
    "BEiT": "models.beit",
    "MAEVQGAN": "models.mae_vqgan.tracing",
    "Activations": "vectors",
    "Condition": "evaluation",
    "Layout": "layouts",
    "Net2Net": "models.net2net",
    "Painter": "models.painter",
    "PatchSet": "patches",
    "PatchSpace": "patches",
    "SegGPT": "models.painter",
    "TaskVector": "vectors",
    "TaskVectors": "vectors",
    "ViTMAE": "models.vit_mae",
    "VisualPrompt": "prompts",
    "ablate": "patches",
    "evaluate": "evaluation",
    "patch": "patches",
}

__all__ = sorted([*_MODULES, *_HOMES])


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
