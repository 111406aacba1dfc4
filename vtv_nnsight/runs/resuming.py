"""run.json: what a run was begun with, the digest of every file that it wrote, and how long its steps took.

A run goes on only with files that are as it wrote them. One that was changed, or put there by somebody else, is named,
and done again if the user says so (`--redo`); what was made of it is done again if it comes out otherwise.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list

from vtv_nnsight.digests import file_digest
from vtv_nnsight.files import make_folder, read_json, write_json
from vtv_nnsight.parallel import processes
from vtv_nnsight.text import in_words

RECORD, BUNDLE_RECORD = "run.json", "bundle.json"


class Step(NamedTuple):
    """A step of a run, which reads what the steps before it wrote.

    Args:
        settings: Those that matter from here on.
        writes: Patterns of its files, in the folder of a fold.
        keeps: Of those that keep its state until it is done.
    """

    settings: tuple[str, ...]
    writes: tuple[str, ...]
    keeps: tuple[str, ...] = ()


STEPS = {
    "select": Step(
        ("model", "vqgan", "embedding_type", "dtype", "weights", "data", "folds", "pictures", "tasks", "order")
        + ("max_images", "prompts", "candidates", "seed", "version", "protocol"),
        ("prompts/*.safetensors",),
    ),
    "collect": Step(("sites",), ("vectors.safetensors",)),
    "score": Step(("granularity",), ("scores.csv",)),
    "search": Step(
        ("search", "loss", "budget", "sparsity", "search_fold", "search pictures"),
        ("search/*.safetensors",),
        ("search/*.journal",),
    ),
    "evaluate": Step(
        ("test_prompts", "test pictures", "draws", "control_prompts", "fold_draws"),
        ("evaluation/*.parquet", "evaluation/*.safetensors"),
    ),
    "demonstrate": Step((), ("shown/*.safetensors",)),
    "matrix": Step(("matrix",), ("matrix/*.parquet",), ("matrix/*.journal",)),
}


def read_record(run: str | os.PathLike[str]) -> dict[str, Any]:
    """run.json of a run's folder.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is not as a run wrote it.
    """
    path = Path(run) / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{run} holds no {RECORD}; make it with `vtv run --out {run}`.")
    record = read_json(path)
    if not all(map(step_of, record["files"])):
        raise ValueError(f"{path} names files that no run writes; name another folder, or remove this one.")
    return record


def step_of(name: str) -> str | None:
    """The step that writes a file of this name, relative to the run's folder; None where none does."""
    inside = Path(name).relative_to(fold_of(name))
    for step, (_, patterns, _) in STEPS.items():
        if any(len(inside.parts) == len(Path(p).parts) and fnmatch(str(inside), p) for p in patterns):
            return step
    return None


def fold_of(name: str) -> Path:
    """The folder of the fold that a file is of, relative to the run's folder; "." where there are no folds."""
    first = "".join(Path(name).parts[:1])
    return Path(first if re.fullmatch(r"fold\d+", first) else ".")


def check_files(folder: str | os.PathLike[str], *names: str, recorded: bool = True) -> tuple[dict[str, Any], list[str]]:
    """Refuse files that are not as they were written, by the record of a run, of the run that a folder is a part of, or
    of a shared bundle.

    Args:
        folder: A folder of files.
        *names: How the names of those that count begin, relative to the folder.
        recorded: Whether there has to be a record.

    Returns:
        The record, and the names that it has of these files.

    Raises:
        FileNotFoundError: when there is no record, or a file that it names is missing.
        ValueError: when the record or a file was changed.
    """
    folder = Path(folder).absolute()
    places = [place / name for place in (folder, *folder.parents[:2]) for name in (RECORD, BUNDLE_RECORD)]
    path = next(filter(Path.is_file, places), None)
    if path is None:
        if recorded:
            raise FileNotFoundError(f"{folder} has no {RECORD}, which says what is in it; let `vtv run` make it.")
        return {}, []
    record = read_json(path)
    files = {os.path.relpath(path.parent / name, folder): digest for name, digest in record["files"].items()}
    files = {name: digest for name, digest in files.items() if name.startswith(names)}
    if missing := [name for name in files if not (folder / name).exists()]:
        raise FileNotFoundError(f"{folder / missing[0]} is missing; do it again with the same `vtv run`.")
    if changed := changed_files(folder, files):
        raise ValueError(
            f"{', '.join(str(folder / name) for name in changed)}: not as it was written, by {path}; put it back, or "
            "do it again with the same `vtv run` and --redo."
        )
    return record, list(files)


def changed_files(folder: Path, files: dict[str, str]) -> list[str]:
    """Files in a folder that are there and have another digest than is noted.

    Raises:
        ValueError: when one of them is a folder.
    """
    there = [name for name in files if (folder / name).exists()]
    if places := [name for name in there if not (folder / name).is_file()]:
        raise ValueError(f"{folder / places[0]} is a folder where a run keeps a file; remove the folder.")
    return [name for name in there if file_digest(folder / name) != files[name]]


@dataclass
class RunRecord:
    """run.json of a run under way, in one process or one of several, of which the first alone writes.

    Args:
        out: The run's folder.
        folders: Where its steps write: `out` itself, or a folder for each fold.
        content: What is written; `content["files"]` has the digests. None but in the first process.
    """

    out: Path
    folders: list[Path]
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls, out: Path, settings: dict[str, Any], folders: Iterable[Path], notes: list[str], device: torch.device,
        redo: bool = False,
    ) -> RunRecord:  # fmt: skip
        """Begin a run, or go on with one.

        Args:
            settings: What its numbers depend on, as `STEPS` names them.
            notes: What the report is to say.
            redo: Remove what differing settings or changed files have spoilt, instead of refusing.

        Raises:
            ValueError: naming the settings or files that differ and the steps that depend on them, or saying that the
                folder holds something else.
        """
        settings, earlier = json.loads(json.dumps(settings)), {}
        if (out / RECORD).exists():
            earlier = read_record(out)
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is not empty and holds no run; name a new folder.")
        packages = ("torch", "nnsight", "transformers", "datasets", "numpy")
        content = {
            "kind": "vtv run",
            "settings": settings,
            "notes": list(dict.fromkeys([*notes, *earlier.get("notes", [])])),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
            "machine": {
                "processors": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            },
            "seconds": earlier.get("seconds", {}),
            "files": earlier.get("files", {}),
        }
        self = cls(out, list(folders), content)
        if earlier:
            differ = [name for name in settings if earlier["settings"].get(name) != settings[name]]
            spoilt = self._check_settings(differ, earlier["settings"], redo)
            self._check_changed(spoilt, redo)
            self._remove(spoilt, self.folders)
            if spoilt:
                content["notes"] = notes
                content["seconds"] = {name: s for name, s in content["seconds"].items() if name not in spoilt}
        for folder in (out, *self.folders):
            make_folder(folder)
        made = [step for name, step in STEPS.items() if name != "matrix" or settings["matrix"]]
        for folder in self.folders:
            for pattern in (pattern for step in made for pattern in step.writes):
                make_folder((folder / pattern).parent)
        self.write()
        return self

    def _check_settings(self, differ: list[str], earlier: dict[str, Any], redo: bool) -> list[str]:
        """The steps that depend on settings that differ from the earlier ones, which `redo` does again."""
        first = next((i for i, step in enumerate(STEPS.values()) if set(step.settings) & set(differ)), len(STEPS))
        steps, settings = list(STEPS)[first:], self.content["settings"]
        if steps and not redo:
            changes = ", ".join(f"{n} was {in_words(earlier.get(n))} and is {in_words(settings[n])}" for n in differ)
            raise ValueError(
                f"{self.out} was begun with other settings: {changes}. Name another folder, or do {', '.join(steps)} "
                "again there with redo (--redo)."
            )
        return steps

    def _check_changed(self, spoilt: list[str], redo: bool) -> None:
        """Remove files that are not as this run wrote them: they are made again. Without `redo`, refuse them."""
        changed = [name for name in changed_files(self.out, self.content["files"]) if step_of(name) not in spoilt]
        if changed and not redo:
            raise ValueError(
                f"{', '.join(str(self.out / name) for name in changed)}: not as this run wrote it; put it back, or do "
                f"{', '.join(dict.fromkeys(str(step_of(name)) for name in changed))} again with redo (--redo)."
            )
        for name in changed:
            (self.out / name).unlink()

    def lacking(self, paths: Iterable[Path], together: bool = False) -> list[Path]:
        """Those of a step's files that are to be made: by the first process alone, or by all of them together."""
        files = self.content.get("files", {})
        lacking = [[p for p in paths if self.content and not (p.is_file() and str(p.relative_to(self.out)) in files)]]
        if together and processes().num_processes > 1:
            broadcast_object_list(lacking)
        return lacking[0]

    def made(self, *paths: Path) -> None:
        """Note files that were written. What later steps made of an earlier one that differs is removed."""
        for path in paths if self.content else ():
            name, digest = str(path.relative_to(self.out)), file_digest(path)
            if self.content["files"].get(name, digest) != digest:
                later = list(STEPS).index(step_of(name) or "") + 1
                self._remove(list(STEPS)[later:], [self.out / fold_of(name)])
            self.content["files"][name] = digest
            self.write()

    @contextmanager
    def step(
        self, name: str, progress: AbstractContextManager[Callable[[str], None]], folder: Path | None = None
    ) -> Iterator[Callable[[str], None]]:
        """A step, shown by its line of `numbered_steps`, which yields what says what is being done; its time and its
        warnings go into the record, and what kept its state in the folder of a fold is removed when it is done."""
        began, worked = time.perf_counter(), []
        with progress as show:

            def working_on(what: str) -> None:
                worked.append(what)
                show(what)

            try:
                with warnings.catch_warnings(record=True) as heard:
                    warnings.simplefilter("always", UserWarning)
                    yield working_on
                if folder and self.content:
                    remove(STEPS[name].keeps, folder)
                processes().wait_for_everyone()
            finally:
                if worked and self.content:
                    notes = [str(warning.message) for warning in heard if warning.category is UserWarning]
                    self.content["notes"] = list(dict.fromkeys([*self.content["notes"], *notes]))
                    spent = self.content["seconds"].get(name, 0) + time.perf_counter() - began
                    self.content["seconds"][name] = round(spent, 2)
                    self.write()

    def write(self) -> None:
        """Write run.json as it stands."""
        self.content["peak memory (MiB)"] = peak_memory()
        write_json(self.out / RECORD, self.content)

    def _remove(self, steps: Iterable[str], folders: Iterable[Path]) -> None:
        """Remove the files of steps, and what kept their state."""
        for folder in folders:
            for step in steps:
                for file in remove(STEPS[step].writes + STEPS[step].keeps, folder):
                    self.content["files"].pop(str(file.relative_to(self.out)), None)


def remove(patterns: Iterable[str], folder: Path) -> list[Path]:
    """Remove the files of some patterns in a folder; those that there were."""
    files = [file for pattern in patterns for file in folder.glob(pattern)]
    for file in files:
        file.unlink()
    return files


def peak_memory() -> int | None:
    """Of this process, in MiB, where the system tells."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)
