"""run.json: what a run was begun with, the digest of every file that it wrote, and how long its steps took.

A run goes on only with files that are as it wrote them. One that was changed, or put there by somebody else, is named,
and what it spoils is done again if the user says so (`--redo`).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from vtv_nnsight.digests import file_digest
from vtv_nnsight.files import make_folder, read_json, replacing, write_json
from vtv_nnsight.parallel import processes
from vtv_nnsight.text import in_words

RECORD, BUNDLE_RECORD = "run.json", "bundle.json"

STEPS = {
    "select": ("model", "vqgan", "embedding_type", "dtype", "weights", "data", "folds", "pictures", "tasks", "order")
    + ("max_images", "prompts", "candidates", "seed", "version", "protocol"),
    "collect": ("sites",),
    "score": ("granularity",),
    "search": ("search", "loss", "budget", "sparsity", "search_fold", "search pictures"),
    "evaluate": ("test_prompts", "test pictures", "draws", "control_prompts", "fold_draws"),
    "demonstrate": (),
    "matrix": ("matrix",),
}
"""Step → the settings that matter from there on."""

FILES = {
    "select": ("prompts.safetensors",),
    "collect": ("vectors.safetensors", "vectors.state"),
    "score": ("scores.csv",),
    "search": ("search/*.safetensors", "search/*.journal"),
    "evaluate": ("evaluation/*.parquet", "evaluation/*.safetensors"),
    "demonstrate": ("shown/*.safetensors",),
    "matrix": ("matrix/*.parquet", "matrix/*.journal"),
}
"""Step → what it writes."""

READERS = {
    "select": ("collect", "score", "search", "evaluate", "demonstrate", "matrix"),
    "collect": ("score", "search", "evaluate", "demonstrate", "matrix"),
    "score": (),
    "search": ("evaluate", "demonstrate"),
    "evaluate": ("demonstrate",),
    "demonstrate": (),
    "matrix": (),
}
"""Step → the steps that depend on what it wrote."""


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
    for step, patterns in FILES.items():
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
    paths = {folder / name: digest for name, digest in files.items()}
    if changed := [path for path, digest in paths.items() if not path.is_file() or file_digest(path) != digest]:
        raise ValueError(
            f"{', '.join(map(str, changed))}: not as it was written, by {path}; put it back, or do it again with the "
            "same `vtv run` and --redo."
        )
    return record, list(files)


def changed_files(run: str | os.PathLike[str], record: dict[str, Any]) -> list[str]:
    """Files, relative to the run's folder, that are there and not as the run wrote them.

    Raises:
        ValueError: when one of them is a folder.
    """
    changed = []
    for name, digest in record["files"].items():
        path = Path(run) / name
        if path.is_dir():
            raise ValueError(f"{path} is a folder where a run keeps a file; remove the folder.")
        if path.exists() and file_digest(path) != digest:
            changed.append(name)
    return changed


@dataclass
class RunRecord:
    """run.json of a run under way.

    Args:
        out: The run's folder.
        content: What is written; `content["files"]` has the digests.
    """

    out: Path
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls, out: Path, settings: dict[str, Any], folders: Iterable[Path], notes: list[str], device: torch.device,
        redo: bool = False,
    ) -> RunRecord:  # fmt: skip
        """Begin a run, or go on with one.

        Args:
            settings: What its numbers depend on, as `STEPS` names them.
            folders: Where its steps write: `out` itself, or a folder for each fold.
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
        self = cls(out)
        self.content = {
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
        if earlier:
            spoilt = self._spoilt_by_settings(earlier["settings"], redo)
            changed = [name for name in changed_files(out, earlier) if step_of(name) not in spoilt]
            if changed and not redo:
                writers = {step_of(name) or "" for name in changed}
                steps = writers.union(*(READERS[step] for step in writers))
                raise ValueError(
                    f"{', '.join(str(out / name) for name in changed)}: not as this run wrote it; put it back, or do "
                    f"{', '.join(step for step in STEPS if step in steps)} again with redo (--redo)."
                )
            if spoilt:
                self.content["notes"] = notes
            for step in spoilt:
                self.content["seconds"].pop(step, None)
                for folder in folders:
                    self._remove(folder, step)
            for name in changed:
                (out / name).unlink()
                del self.content["files"][name]
                self._forget_readers(name)
        make_folder(out)
        for folder in folders:
            for pattern in (pattern for patterns in FILES.values() for pattern in patterns):
                make_folder((folder / pattern).parent)
        self.write()
        return self

    def has(self, path: Path) -> bool:
        """Whether a file is there, as this run wrote it."""
        if path.is_dir():
            raise ValueError(f"{path} is a folder where a run keeps a file; remove the folder.")
        return path.is_file() and str(path.relative_to(self.out)) in self.content["files"]

    def wrote(self, path: Path) -> None:
        """Note a file that was written. What was made of an earlier one that differs is removed."""
        name, digest = str(path.relative_to(self.out)), file_digest(path)
        before = self.content["files"].get(name)
        self.content["files"][name] = digest
        if before not in (None, digest):
            self._forget_readers(name)
        self.write()

    def note(self, texts: Iterable[str]) -> None:
        """Keep what the report is to say, once."""
        self.content["notes"] = list(dict.fromkeys([*self.content["notes"], *texts]))

    def spent(self, step: str, seconds: float) -> None:
        """Add to the seconds that a step took in earlier attempts."""
        self.content["seconds"][step] = round(self.content["seconds"].get(step, 0) + seconds, 2)
        self.write()

    def write(self) -> None:
        """Write run.json as it stands."""
        self.content["peak memory (MiB)"] = peak_memory()
        write_json(self.out / RECORD, self.content)

    def _spoilt_by_settings(self, earlier: dict[str, Any], redo: bool) -> list[str]:
        """The steps that depend on settings that differ from the earlier ones."""
        settings = self.content["settings"]
        differ = [name for name in settings if earlier.get(name) != settings[name]]
        first = next((i for i, names in enumerate(STEPS.values()) if set(names) & set(differ)), None)
        if first is None:
            return []
        steps = list(STEPS)[first:]
        if not redo:
            changes = ", ".join(f"{n} was {in_words(earlier.get(n))} and is {in_words(settings[n])}" for n in differ)
            raise ValueError(
                f"{self.out} was begun with other settings: {changes}. Name another folder, or do {', '.join(steps)} "
                "again there with redo (--redo)."
            )
        return steps

    def _forget_readers(self, name: str) -> None:
        """Remove what was made of a file."""
        for reader in READERS[step_of(name) or ""]:
            self._remove(self.out / fold_of(name), reader)

    def _remove(self, folder: Path, step: str) -> None:
        for file in (file for pattern in FILES[step] for file in folder.glob(pattern)):
            self.content["files"].pop(str(file.relative_to(self.out)), None)
            file.unlink()


@dataclass
class StepFiles:
    """What a step reads and writes, in one process or one of several, of which the first alone writes.

    Args:
        record: In the first process.
        folder: Where the step writes.
        show: Called with what is being done.
        shares: Another folder of the run, whose files of this step are this one's, too.
    """

    record: RunRecord | None
    folder: Path
    show: Callable[[str], None]
    shares: Path | None = None
    worked: bool = False

    def lacks(self, name: str) -> bool:
        """Whether the first process, which this is, has to make a file; one that `shares` has is taken from there."""
        if self.record is None or self.record.has(self.folder / name):
            return False
        if self.shares:
            self.save(name, partial(replace_by_link, self.shares / name))
        return self.shares is None

    def everyone_lacks(self, name: str) -> bool:
        """The same in all processes, which make it together."""
        answer = [self.lacks(name)]
        if processes().num_processes > 1:
            broadcast_object_list(answer)
        return answer[0]

    def working_on(self, what: str) -> None:
        """Say what is being done; a step that never does was done before."""
        self.worked = True
        self.show(what)

    def save(self, name: str, write: Callable[[Path], Any]) -> None:
        """Write a file, in the first process, and note its digest; `write` is called with its path."""
        if self.record is not None:
            write(self.folder / name)
            self.made(name)

    def made(self, name: str) -> None:
        """Note the digest of a file that was written, in the first process."""
        if self.record is not None:
            self.record.wrote(self.folder / name)

    def remove(self, name: str) -> None:
        """Remove what kept the state of a long job."""
        if self.record is not None:
            (self.folder / name).unlink(missing_ok=True)

    def wait(self) -> None:
        """Wait for the other processes."""
        processes().wait_for_everyone()

    def path(self, name: str) -> Path:
        """The path of a file, when the first process has written it."""
        self.wait()
        return self.folder / name


def replace_by_link(source: Path, path: Path) -> None:
    """One file under a second path, in the place of what is there; a copy where the system cannot."""
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        with replacing(path) as temporary:
            shutil.copyfile(source, temporary)


@contextmanager
def begin_step(
    record: RunRecord | None,
    folder: Path,
    name: str,
    progress: AbstractContextManager[Callable[[str], None]],
    shares: Path | None = None,
) -> Iterator[StepFiles]:
    """A step, shown by its line of `numbered_steps`; its time and its warnings go into the record."""
    began = time.perf_counter()
    with progress as show:
        step = StepFiles(record, folder, show, shares)
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always", UserWarning)
                yield step
        finally:
            if step.worked and record is not None:
                record.note(str(warning.message) for warning in heard if warning.category is UserWarning)
                record.spent(name, time.perf_counter() - began)


def peak_memory() -> int | None:
    """Of this process, in MiB, where the system tells."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)
