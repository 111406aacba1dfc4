"""Where pictures come from; each function returns a `datasets.Dataset`."""

from vtv_nnsight.data.folder import folder
from vtv_nnsight.data.photographs import photographs
from vtv_nnsight.data.scenes import scenes

__all__ = ["folder", "photographs", "scenes"]
