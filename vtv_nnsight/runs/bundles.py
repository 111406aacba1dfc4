"""What a run found, in one folder that others can use: task vectors, and the units that take them.

    >>> bundle = bundles.load("runs/scenes")               # or "tiny": the one that the package carries
    >>> with model.generate(prompts.query_only()) as tracer:
    ...     patch(model, *bundle["segmentation"])
    ...     answers = tracer.result.save()

A folder has `vectors.safetensors` (`TaskVectors`) and `search/TASK.safetensors` (`SearchResult`), as `vtv run` writes
them. It can be shared on the Hugging Face Hub, with a card:

    >>> bundle.push_to_hub("me/scenes-vectors", licence="mit")
    >>> bundles.load("hub:me/scenes-vectors")
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download

from vtv_nnsight.digests import file_digest
from vtv_nnsight.files import make_folder, write_json, write_text
from vtv_nnsight.layouts import positions
from vtv_nnsight.models import load_model
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import InContextModel
from vtv_nnsight.models.sources import EMBEDDED, HUB, locate
from vtv_nnsight.patching import PatchSet
from vtv_nnsight.runs.resuming import BUNDLE_RECORD, check_files
from vtv_nnsight.search.result import SearchResult
from vtv_nnsight.text import quoted
from vtv_nnsight.text_prompts import TextLayout
from vtv_nnsight.vectors import TaskVector, TaskVectors
from vtv_nnsight.vectors.compatibility import check_compatible, fingerprint

VECTORS, CARD_NAME = "vectors.safetensors", "README.md"
CARD, TAGS = files("vtv_nnsight.runs") / "card.md", ["task-vectors", "interpretability", "nnsight"]
SHOWN = ("table.md", "table.csv", "answers.png")
"""What a run has to show, which is shared with it."""
WEIGHTS = Path(str(files("vtv_nnsight"))) / "weights"
"""Where the package keeps its bundles, each in a folder of its name."""


@dataclass(frozen=True, eq=False)
class Bundle(Mapping[str, tuple[TaskVector, PatchSet]]):
    """Task → its vector and the units that take it, as `patch` wants them.

    Args:
        vectors: The vectors; some may be of tasks without units.
        results: Task → what a search found for it.
        name: Where it is from, for messages.
        model: The source of its model, as `models.load_model` takes it, where that is known.
        folder: Where it was read, with the tables and pictures of a run beside it.
        vqgan: The tokenizer's own checkpoint that `model` was read with, where there was one.

    Raises:
        ValueError: when the units are of another model or layout than the vectors.
    """

    vectors: TaskVectors
    results: Mapping[str, SearchResult]
    name: str = "these vectors"
    model: str | None = None
    folder: Path | None = None
    vqgan: str | None = None

    def __post_init__(self) -> None:
        for task, result in self.results.items():
            check_compatible(
                f"the units of {task!r}", result.patches.fingerprint, "the vectors", self.vectors.fingerprint
            )

    def __getitem__(self, task: str) -> tuple[TaskVector, PatchSet]:
        if task not in self.results:
            raise KeyError(f"the bundle of {self.name} has nothing of {quoted(task)}; choose from {', '.join(self)}.")
        return self.vectors[task], self.results[task].patches

    def __iter__(self) -> Iterator[str]:
        return (task for task in self.vectors if task in self.results)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Bundle({self.name}: {', '.join(f'{task} at {len(self[task][1])} units' for task in self)})"

    def load_model(self, source: str | None = None, **options: Any) -> InContextModel:
        """The model that the vectors are of: SegGPT's with their `embedding_type`, the run's own with its tokenizer.

        Args:
            source: Where it is to be read; by default where the run read it.
            **options: As for `models.load_model`.

        Raises:
            ValueError, OSError: as `models.load_model`; `check` says whether a model is theirs.
        """
        kind = self.vectors.fingerprint.get("embedding_type")
        known = {"embedding_type": kind, "vqgan": None if source else self.vqgan}
        return load_model(source or self.model or EMBEDDED, **known | options)

    def check(self, model: InContextModel) -> None:
        """Refuse a model that the vectors are not of, naming what differs.

        Raises:
            ValueError: when its fingerprint is not that of the vectors.
        """
        device_of(model)
        theirs = fingerprint(model, cached=True)
        check_compatible(f"the bundle of {self.name}", self.vectors.fingerprint, "this model", theirs)

    def compact(self) -> Bundle:
        """The same, of the positions that a query-only prompt shows: all that patching without an example needs."""
        layout = next(iter(self.results.values())).patches.space.layout
        if isinstance(layout, TextLayout):
            return self
        kept = torch.zeros(layout.num_positions, dtype=torch.bool).index_fill(0, positions(layout.query_band), True)
        return replace(self, vectors=TaskVectors({name: _keep(v, kept) for name, v in self.vectors.items()}))

    def save(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write a folder, which is made; vectors in float16 take half the room, and lose a part in two thousand."""
        folder = make_folder(folder)
        make_folder(folder / "search")
        self.vectors.save(folder / VECTORS, dtype)
        names = {task: f"search/{task}.safetensors" for task in self}
        for task, name in names.items():
            self.results[task].save(folder / name)
        files = {name: file_digest(folder / name) for name in (VECTORS, *names.values())}
        write_json(folder / BUNDLE_RECORD, {"model": self.model, "vqgan": self.vqgan, "files": files})

    def card(self, licence: str | None = None) -> str:
        """What a folder's README.md says: what it is of, how to use it, what was measured, and its model."""
        table, facts = self._beside("table.md"), ModelCardData(license=licence, library_name="vtv-nnsight", tags=TAGS)
        card = ModelCard.from_template(
            facts,
            str(CARD),
            bundle=self,
            owner=self.vectors.fingerprint,
            measured=table.read_text(encoding="utf-8") if table else "",
            picture=self._beside("answers.png"),
        )
        return str(card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        licence: str | None = None,
        private: bool = False,
        token: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> str:
        """Share it on the Hugging Face Hub: vectors, units, the tables and the picture of its run, and a card.

        Args:
            repo_id: "owner/name"; it is made where it is not there.
            licence: As the Hub writes it, such as "mit".
            private: Whether a new repository is private.
            token: Of the Hub; the one that `hf auth login` kept by default.
            dtype: Of the vectors in the file.

        Returns:
            The address of the commit.
        """
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save(folder, dtype)
            write_text(folder / CARD_NAME, self.card(licence))
            for name in SHOWN:
                if path := self._beside(name):
                    shutil.copyfile(path, folder / name)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Task vectors").commit_url)

    def _beside(self, name: str) -> Path | None:
        """A file of the run that the bundle is of, where there is one."""
        path = self.folder / name if self.folder else None
        return path if path and path.is_file() else None


def from_hub(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Bundle:
    """The bundle of a repository on the Hugging Face Hub. Tensors and JSON are read, and nothing is run.

    Raises:
        ValueError, OSError: when there is no such repository, or it holds no bundle.
    """
    wanted = [VECTORS, "search/*.safetensors", BUNDLE_RECORD, *SHOWN]
    folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=wanted))
    if not (folder / VECTORS).is_file():
        raise FileNotFoundError(f"{repo_id} on the Hub has no {VECTORS}; expected what Bundle.push_to_hub writes.")
    return replace(load(folder), name=repo_id)


def load(source: str | os.PathLike[str] = EMBEDDED) -> Bundle:
    """A bundle: of a folder that `vtv run` or `Bundle.save` wrote, of the Hub ("hub:OWNER/NAME"), or of the
    package by its name: "tiny" is that of the embedded model.

    Raises:
        FileNotFoundError: when there is no such folder, or it has no vectors or no units.
        ValueError: when a file in it was changed, is damaged or is something else.
    """
    kind, path = locate(source)
    if kind == "hub" and str(source).startswith(HUB):
        return from_hub(path)
    folder = next((packaged for packaged in WEIGHTS.iterdir() if packaged.name == str(source)), Path(path))
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give one that `vtv run` wrote, or {EMBEDDED!r}.")
    if not (folder / VECTORS).is_file():
        folds = sorted(path.name for path in folder.glob("fold*") if (path / VECTORS).is_file())
        instead = f"give one of its folds ({', '.join(folds)})" if folds else "give a folder that `vtv run` wrote"
        raise FileNotFoundError(f"{folder} has no {VECTORS}; {instead}.")
    record, names = check_files(folder, VECTORS, "search/")
    vectors = TaskVectors.load(folder / VECTORS)
    paths = {task: f"search/{task}.safetensors" for task in vectors}
    results = {task: SearchResult.load(folder / path) for task, path in paths.items() if path in names}
    if not results:
        raise FileNotFoundError(f"{folder} has no units in search/; let the same `vtv run` finish.")
    about = record.get("settings", record)
    model = EMBEDDED if str(source) == EMBEDDED else about["model"]
    return Bundle(vectors, results, str(source), model, folder, about["vqgan"])


def _keep(vector: TaskVector, kept: torch.Tensor) -> TaskVector:
    mean = vector.mean.map(lambda values: values.masked_fill(~kept[:, None, None], torch.nan))
    variance = vector.variance and vector.variance.map(lambda values: values.masked_fill(~kept[:, None], torch.nan))
    return replace(vector, mean=mean, variance=variance)
