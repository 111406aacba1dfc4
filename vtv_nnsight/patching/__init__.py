"""Where a task vector goes: the units that can be chosen, sets of them, and the intervention itself."""

from vtv_nnsight.patching.patching import MODES, ablate, patch
from vtv_nnsight.patching.sets import PatchSet
from vtv_nnsight.patching.spaces import PatchSpace, Units

__all__ = ["MODES", "PatchSet", "PatchSpace", "Units", "ablate", "patch"]
