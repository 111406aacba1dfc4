"""Where pictures and words come from; each function returns a `datasets.Dataset`."""

from vtv_nnsight.data.drawn_scenes import scenes
from vtv_nnsight.data.embedded_pictures import pictures
from vtv_nnsight.data.folders import folder, pairs
from vtv_nnsight.data.hub_datasets import hub
from vtv_nnsight.data.pascal_voc import detection, pascal, released_detection_order
from vtv_nnsight.data.sources import SOURCES, detection_argument, identities, load, pascal_argument, split_data
from vtv_nnsight.data.word_lists import words

__all__ = [
    "SOURCES", "detection", "detection_argument", "folder", "hub", "identities", "load", "pairs", "pascal",
    "pascal_argument", "pictures", "released_detection_order", "scenes", "split_data",
    "words",
]  # fmt: skip
