"""Where pictures come from; each function returns a `datasets.Dataset`."""

from vtv_nnsight.data.folder import folder
from vtv_nnsight.data.hub import hub
from vtv_nnsight.data.pairs import pairs
from vtv_nnsight.data.pascal import detection, pascal
from vtv_nnsight.data.photographs import photographs
from vtv_nnsight.data.pictures import pictures
from vtv_nnsight.data.reasoning import reasoning
from vtv_nnsight.data.scenes import scenes
from vtv_nnsight.data.source import SOURCES, identities, load, pascal_argument, split_data

__all__ = [
    "SOURCES",
    "detection",
    "folder",
    "hub",
    "identities",
    "load",
    "pairs",
    "pascal",
    "pascal_argument",
    "photographs",
    "pictures",
    "reasoning",
    "scenes",
    "split_data",
]
