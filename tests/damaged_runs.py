"""Damage to every file of a run: no reader of the run may use what is damaged.

    python tests/damaged_runs.py [--count 900] [--seed 0]

Every file of a run, of a bundle that was saved of it, and of an interrupted collection and search is cut, emptied, made
longer or all zeros, changed by one bit at twenty places, removed, and replaced by every other file of its kind, such as
that of another task; run.json is changed in its settings as well. Every reader then reads it. It may refuse in a
sentence, or give what it gives of the whole, where it does not read that file or makes it again; anything else is a
use. Prints each use and how many readings ended how.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from vtv_nnsight import PatchSpace, TaskVectors, bundles, data, models, report, tasks
from vtv_nnsight import search as searches
from vtv_nnsight.cli import options
from vtv_nnsight.cli.evaluating import _patches
from vtv_nnsight.report.explorer import demonstrate
from vtv_nnsight.runs import run, steps
from vtv_nnsight.runs.settings import Settings

TASKS = ("segmentation", "lowlight", "colorization")
SETTINGS = Settings(
    tasks=TASKS, data="scenes", max_images=24, prompts=4, candidates=8, budget=60, test_prompts=4, search="random",
    draws=1, control_prompts=4,
)  # fmt: skip
REFUSALS = (ValueError, OSError)
PLACES = 20

Readers = Mapping[str, Callable[[Path], Any]]


def content(value: Any) -> Any:
    """A value as plain text, whatever tensors and tables it holds; without folders' names and times."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes())
    if isinstance(value, pd.DataFrame):
        return value.to_csv()
    if isinstance(value, np.ndarray):
        return (value.shape, value.tobytes())
    if isinstance(value, dict) or hasattr(value, "items"):
        return [(content(key), content(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [content(item) for item in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return repr(value)
    if isinstance(value, Path):
        return value.name
    if hasattr(value, "__dict__"):
        return [(name, content(item)) for name, item in sorted(vars(value).items()) if name not in ("folder", "run")]
    return repr(value)


def resume(out: Path) -> dict[str, bytes]:
    """What the files of a run are when it goes on, but for the times in its record."""
    run(out, SETTINGS, explore=demonstrate, progress=False)
    return {str(path.relative_to(out)): path.read_bytes() for path in files(out) if path.name != "run.json"}


def evaluated(out: Path) -> Any:
    """What `vtv evaluate --vectors RUN/vectors.safetensors --patches RUN/search/TASK.safetensors` reads."""
    sets = [_patches(out / "search" / f"{task}.safetensors") for task in TASKS]
    return options.read_vectors(out / "vectors.safetensors", TASKS), sets


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damages(file: Path, others: list[Path], generator: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """(What was done, the bytes that are there instead; None for none)."""
    whole = file.read_bytes()
    yield "cut", whole[: len(whole) // 2]
    yield "emptied", b""
    yield "removed", None
    yield "longer", whole + b"\0"
    yield "zeros", bytes(len(whole))
    for _ in range(PLACES):
        place, bit = generator.randrange(len(whole)), 1 << generator.randrange(8)
        yield f"bit {bit} of byte {place}", whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :]
    for other in others:
        if other.suffix == file.suffix and other.read_bytes() != whole:
            yield f"replaced by {other.name}", other.read_bytes()
    if file.name == "run.json":
        record = json.loads(whole)
        for name, value in record["settings"].items():
            changed = {"settings": record["settings"] | {name: [*value, "x"] if isinstance(value, list) else "other"}}
            yield f"setting {name}", json.dumps(record | changed).encode()


def interrupted(folder: Path) -> dict[Path, Readers]:
    """A file that keeps the state of a search → what goes on with it."""
    model: Any = models.load_model("tiny", dispatch=True)
    rows = data.scenes("train", 12)
    prompts = {name: tasks.get(name).prompts(rows, 4, 0, model.layout) for name in TASKS[:2]}
    vectors = TaskVectors.collect(model, prompts, progress=False)

    def search(path: Path) -> Any:
        name, space = TASKS[1], PatchSpace(model)
        result = searches.random(
            model, vectors[name], tasks.get(name), prompts[name].query_only(), space, budget=30,
            resume=path / "journal", progress=False,
        )  # fmt: skip
        return result.patches, result.scores, [moment._replace(seconds=0.0) for moment in result.history]

    (folder / "search").mkdir()
    search(folder / "search")
    return {folder / "search": {"search": search}}


def examine(folder: Path, readers: Readers, cases: list[tuple[Path, str, bytes | None]], ends: Counter[str]) -> int:
    """Do each damage, read, and put the file back: the number of uses, which are printed."""
    uses, kept = 0, folder.with_name(f"{folder.name} as it was")
    shutil.copytree(folder, kept)
    whole = {name: content(read(folder)) for name, read in readers.items()}
    for file, what, there in cases:
        for name, read in readers.items():
            file.unlink() if there is None else file.write_bytes(there)
            try:
                same = content(read(folder)) == whole[name]
            except REFUSALS:
                ends[f"{name}: refused"] += 1
            else:
                ends[f"{name}: {'as of the whole' if same else 'USED'}"] += 1
                uses += not same
                if not same:
                    print(f"{name} uses {file.relative_to(folder.parent)}, {what}", flush=True)
            if (
                files(folder) != [folder / path.relative_to(kept) for path in files(kept)]
                or file.read_bytes() != (kept / file.relative_to(folder)).read_bytes()
            ):
                shutil.rmtree(folder)
                shutil.copytree(kept, folder)
    return uses


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    steps.models.load_model = cache(partial(models.load_model))  # the same model for each run that goes on
    generator, ends, uses = random.Random(args.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as work:
        out, saved = Path(work) / "run", Path(work) / "bundle"
        run(out, SETTINGS, explore=demonstrate, progress=False)
        bundles.load(out).save(saved)
        bundle = {"bundle": bundles.load}
        places: dict[Path, Readers] = {
            out: {"report": report.load_run, "evaluate": evaluated, "resume": resume} | bundle,
            saved: bundle | {"evaluate": evaluated},
        } | interrupted(Path(work))  # fmt: skip
        cases = [
            (place, file, what, there)
            for place in places
            for file in files(place)
            for what, there in damages(file, [f for f in files(place) if f.parent == file.parent], generator)
        ]
        generator.shuffle(cases)
        cases = cases[: args.count]
        for place, readers in places.items():
            uses += examine(place, readers, [case[1:] for case in cases if case[0] == place], ends)
    print(f"{len(cases)} damages; {dict(sorted(ends.items()))}; {uses} uses")
    return bool(uses)


if __name__ == "__main__":
    sys.exit(main())
