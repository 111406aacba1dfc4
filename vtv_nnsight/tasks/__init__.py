"""What a model is to do: how a picture becomes an input and a target, and how an answer is scored.

A task is a value. Those of the papers are instances in this package, and `+` asks for two at once. A task's name says
all that it is, so that `get` makes an equal one of it:

    >>> tasks.get("inpainting+lowlight") == tasks.inpainting + tasks.lowlight
    True
    >>> tasks.Lowlight(0.1).name, tasks.get("lowlight(0.1)") == tasks.Lowlight(0.1)
    ('lowlight(0.1)', True)
    >>> prompt = tasks.segmentation.prompt(example=images[0], query=images[1], layout=model.layout)

A row of data is a mapping with "image" (PIL, or the path of a picture) and, where the task needs them, "mask" (PIL "L",
0 or 255), "label" and "answer" (the output itself). A picture alone, or its path, is a row with nothing else.

A task of a language model is rows of words or texts and a template over them (see `tasks.text`):

    >>> tasks.get("antonym") == tasks.words("antonym")
    True

A new task of pictures is a frozen dataclass, a subclass of `Task` that says what is done to the input (`corrupt`), or
what is wanted (`target`), or how it is scored (`metric`). `register` lets `get` and the command line find it:

    @tasks.register
    @dataclass(frozen=True)
    class Negative(tasks.Task):
        def target(self, row, cell, corrupted):
            return 1 - cell

Sources: VP is *Visual Prompting via Image Inpainting* (NeurIPS 2022), VTV *Finding Visual Task Vectors* (ECCV 2024).
"""

from vtv_nnsight.tasks.base import CENTER, AnyTask, Picture, Place, Row, Sum, Task, scored_by
from vtv_nnsight.tasks.builtin import (
    PURPLE,
    VTV,
    YELLOW,
    Colorization,
    Detection,
    Edges,
    Identity,
    Inpainting,
    Lowlight,
    Pairs,
    Segmentation,
    colorization,
    detection,
    edges,
    identity,
    inpainting,
    lowlight,
    pairs,
    segmentation,
)
from vtv_nnsight.tasks.registry import get, get_all, names, register
from vtv_nnsight.tasks.sampling import Draw, draw, draw_queries, draw_rows, labels_of
from vtv_nnsight.tasks.text import TEMPLATE, WORDS, Text, Words, words

__all__ = [
    "CENTER", "PURPLE", "TEMPLATE", "VTV", "WORDS", "YELLOW", "AnyTask", "Colorization", "Detection", "Draw", "Edges",
    "Identity", "Inpainting", "Lowlight", "Pairs", "Picture", "Place", "Row", "Segmentation", "Sum", "Task", "Text",
    "Words", "colorization", "detection", "draw", "draw_queries", "draw_rows", "edges", "get", "get_all", "identity",
    "inpainting", "labels_of", "lowlight", "names", "pairs", "register", "scored_by", "segmentation", "words",
]  # fmt: skip
