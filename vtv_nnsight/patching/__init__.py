"""Where a task vector goes: the units that can be chosen, sets of them, and the intervention itself."""

from vtv_nnsight.patching.patching import MODES, PatchSet, PatchSpace, Units, ablate, patch

__all__ = ["MODES", "PatchSet", "PatchSpace", "Units", "ablate", "patch"]
