"""What the page of `vtv demo` computes: prompts of anybody's pictures, and answers to them. Of words: `demo.words`."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image

from vtv_nnsight import data, tasks
from vtv_nnsight.images import as_rgb, read_picture, to_pil
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.sources import EMBEDDED
from vtv_nnsight.patching import PatchSet, PatchSpace
from vtv_nnsight.patching.forward import forward
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.report import photographs
from vtv_nnsight.report.gates import generate_with_gates
from vtv_nnsight.report.play import unit_maps
from vtv_nnsight.runs import bundles
from vtv_nnsight.runs.bundles import Bundle
from vtv_nnsight.search import gates
from vtv_nnsight.tasks import Draw, Task
from vtv_nnsight.text import check_choice
from vtv_nnsight.vectors import TaskVector, TaskVectors

ONE_SHOT, ZERO_SHOT, VECTOR = MODES = ("one-shot", "zero-shot", "task vector")
"""How an answer is asked for: with the example, with the query alone, with the vector patched in as well."""
MAX_BYTES = 10 * 2**20
"""Of an upload."""
KEPT_SECONDS = 600
"""After which files of uploads are removed, while the page runs; all are when it ends. Visitors with the same file
share one, which is therefore left when it is read."""
MAX_SIDE = 1024
"""Uploads are kept in memory at this size, in pixels, at most."""
MIN_PICTURES = 8
"""Pictures that a search needs."""
BUDGET = 400
"""Evaluations that a search on a visitor's pictures may spend."""

Row = dict[str, Any]
"""A picture as tasks take it: "image", and "mask" or "answer" where it has one."""


@dataclass(frozen=True, eq=False)
class AnyPlayer:
    """A model and its vectors, as visitors of a page play with them. All share it, and none changes it.

    Args:
        model: The model.
        bundle: Its task vectors and units.
        source: Where the model was read, where that is not where the run read it.
    """

    model: Any
    bundle: Bundle
    source: str | None = field(default=None, kw_only=True)
    _lock: Any = field(default_factory=Lock, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        self.bundle.check(self.model)

    @property
    def space(self) -> PatchSpace:
        """The units of the bundle's first task, which are those of all."""
        return self.bundle[next(iter(self.bundle))][1].space

    def vector(self, task: str, other: str | None = None, share: float = 0.0) -> TaskVector:
        """A task's vector, or that of two mixed: `share` of the other."""
        first = self.bundle.vectors[task]
        return (1 - share) * first + share * self.bundle.vectors[other] if other else first

    def found(self, task: str, other: str | None = None) -> PatchSet:
        """The units that were found for a task, or for either of two."""
        units = self.bundle[task][1]
        return units | self.bundle[other][1] if other else units

    def patched_code(self, task: str, other: str | None, share: float, units: PatchSet) -> list[str]:
        """Lines of Python that make `bundle`, `task`, `model`, `vector` and `units`."""
        vector = f"{1 - share:g} * bundle.vectors[{task!r}] + {share:g} * bundle.vectors[{other!r}]"
        found = torch.equal(units.choices, self.found(task).choices)
        named = f"PatchSet.named(bundle[task.name][1].space, {list(units)!r})"
        return [
            f"bundle, task = bundles.load({self.bundle.name!r}), tasks.get({task!r})",
            f"model = bundle.load_model({repr(self.source) if self.source else ''})",
            f"vector = {vector if other else f'bundle.vectors[{task!r}]'}",
            f"units = {'bundle[task.name][1]' if found else named}",
        ]


@dataclass(frozen=True, eq=False)
class Player(AnyPlayer):
    """A model of pictures, its vectors, and pictures to begin with.

    Args:
        model, bundle, source: As of `AnyPlayer`.
        rows: Pictures with masks, of which visitors pick.
    """

    rows: Sequence[Row]

    @classmethod
    def load(cls, vectors: str = EMBEDDED, model: str | None = None, device: str | None = None) -> Player:
        """The player of a bundle's source (see `bundles.load`), with the model of its run where `model` names no other.

        Raises:
            FileNotFoundError, ValueError: when there is no such bundle, or it is not of this model.
        """
        bundle = bundles.load(vectors)
        return cls(load_model_of(bundle, model, device), bundle, packaged_rows(), source=model)

    def prompt(self, task: Task | str, example: Row | None, query: Row) -> VisualPrompt:
        """A prompt. The task makes input and output of each picture; an example that comes with its answer is shown as
        it is, as is then the query.

        Raises:
            ValueError: when the example lacks what its answer is made of.
        """
        task, layout = tasks.get(task) if isinstance(task, str) else task, self.space.layout
        if example is None:
            cell, truth = task.cells(query, layout.cell_size)
            return VisualPrompt.from_cells({"query": cell} | ({"output": truth} if truth is not None else {}), layout)
        if example.get("answer") is not None:
            cells = {"example_input": example["image"], "example_output": example["answer"], "query": query["image"]}
            return VisualPrompt.from_cells(cells, layout)
        return task.prompt(example, query, layout)

    def answer(
        self,
        prompt: VisualPrompt,
        mode: str,
        vector: TaskVector | None = None,
        units: PatchSet | None = None,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """The answer to one prompt: [3, cell, cell] in [0, 1].

        Raises:
            ValueError: when the mode is unknown.
        """
        check_choice(MODES, mode=mode)
        with self._lock, torch.no_grad():  # a model is traced by one visitor at a time
            if mode == ONE_SHOT:
                prompt = prompt.to(device_of(self.model))
                return self.model.answers(*forward(self.model, prompt))[0][0].float().cpu()
            vector = vector if vector is not None else self.vector(next(iter(self.bundle)))
            on = units.choices if mode == VECTOR and units is not None else torch.zeros(len(self.space))
            return generate_with_gates(self.model, prompt, vector, self.space, scale * on[None])[0]

    def answers(
        self, task: str, example: Row | None, query: Row, vector: TaskVector, units: PatchSet, scale: float
    ) -> dict[str, torch.Tensor]:
        """All answers to a query, as `report.photographs.answers` gives them, and "truth" where it is known."""
        asked, paired = tasks.get(task), (example or {}).get("answer") is not None
        prompt = self.prompt(task, example, query)
        with self._lock:
            pictures = photographs.answers(
                self.model, asked, vector, units, query["image"], prompt if example else None, scale=scale,
                as_it_is=paired,
            )  # fmt: skip
        known = query.get(asked.needs) is not None and not paired
        return pictures | ({"truth": prompt.region("output")[0]} if known else {})

    def at_scales(
        self, task: str, query: Row, vector: TaskVector, units: PatchSet, scales: torch.Tensor
    ) -> torch.Tensor:
        """The answers with the vector at several scales: [scale, 3, cell, cell]."""
        with self._lock:
            gates = scales[:, None] * units.choices
            return generate_with_gates(self.model, self.prompt(task, None, query), vector, units.space, gates)

    def code(self, task: str, other: str | None, share: float, units: PatchSet, query: Row, scale: float) -> str:
        """Python that makes the answer with the vector, as it is pasted."""
        picture = f"packaged_rows()[{query['number']}]" if "number" in query else '{"image": "picture.jpg"}  # yours'
        lines = [
            "from vtv_nnsight import PatchSet, VisualPrompt, bundles, patch, tasks",
            "from vtv_nnsight.demo.playing import packaged_rows",
            "",
            *self.patched_code(task, other, share, units),
            f"row = {picture}",
            "layout = units.space.layout",
            'prompt = VisualPrompt.from_cells({"query": task.cells(row, layout.cell_size)[0]}, layout)',
            "with model.generate(prompt.query_only()) as tracer:",
            f"    patch(model, vector, units, scale={scale:g})",
            "    answers = tracer.result.save()",
            'answers.picture().save("answer.png")',
        ]
        return "\n".join(lines) + "\n"

    def search(self, task: str, rows: Sequence[Row], budget: int = BUDGET, seed: int = 0) -> Player:
        """The same player, with a task's vector and units collected and found on a visitor's pictures.

        Raises:
            ValueError: when there are too few, or they lack what the task's answer is made of.
        """
        searched, layout = tasks.get(task), self.space.layout
        if len(rows) < MIN_PICTURES:
            raise ValueError(f"{len(rows)} pictures are too few to search on; give {MIN_PICTURES} or more.")
        if searched.needs != "image":
            raise ValueError(f"{task} needs a {searched.needs} of every picture; choose a task that needs none.")
        prompts = searched.compose(list(rows), _pairs(len(rows), seed), layout)
        with self._lock:
            sites = self.bundle.vectors.sites
            vectors = TaskVectors.collect(self.model, {task: prompts}, sites=sites, progress=False)
            result = gates(
                self.model, vectors[task], searched, prompts.query_only(), self.space, budget=budget, seed=seed,
                progress=False,
            )  # fmt: skip
        vectors = TaskVectors({**self.bundle.vectors, **vectors})
        return replace(
            self, bundle=replace(self.bundle, vectors=vectors, results={**self.bundle.results, task: result})
        )


def load_model_of(bundle: Bundle, source: str | None, device: str | None) -> Any:
    """The model of a bundle, on a device."""
    model: Any = bundle.load_model(source, dispatch=True)
    if device:
        model.to(device)
    return model


def packaged_rows() -> list[Row]:
    """The pictures that visitors pick of: real ones, then drawn scenes."""
    return [*data.pictures("test", n=8, seed=1), *data.scenes("test", n=8, seed=1)]


def _pairs(pictures: int, seed: int) -> Draw:
    """Two prompts of every two pictures, each of which is once the example and once the query: so that prompts share no
    picture with those that a search holds out."""
    generator = np.random.default_rng(seed)
    pairs = generator.permutation(pictures)[: pictures // 2 * 2].reshape(-1, 2)
    rows = np.concatenate([pairs, pairs[:, ::-1]])
    return Draw(rows, generator.random((len(rows), 2)))


def upload(path: str | os.PathLike, name: str = "the upload") -> Image.Image:
    """A visitor's picture, checked like any file, as RGB and no larger than need be.

    Raises:
        ValueError: when it is too large, no picture, damaged, too small, or was removed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{name} was removed, as uploads are after {KEPT_SECONDS // 60} minutes; upload it again.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{name} has {size:,} bytes; give a picture of at most {MAX_BYTES:,}.")
    image = as_rgb(read_picture(io.BytesIO(path.read_bytes()), name))
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def enlarged(pixels: torch.Tensor, side: int = 336) -> Image.Image:
    """Pixels [3, cell, cell] as a picture that can be seen."""
    return to_pil(pixels).resize((side, side), Image.Resampling.BICUBIC)


def panels(space: PatchSpace) -> dict[str, dict[str, str]]:
    """The map of units: "encoder, query" → name of each unit → its layer and head, in short. Of spaces with a unit a
    token there is none: they have too many."""
    return {
        title: {name: f"{layer}.{head}" for layer, names in enumerate(rows) for head, name in enumerate(names)}
        for title, rows in unit_maps(space).items()
    }
