"""Damage to every file of a run: no reader of the run may use what is damaged.

    python tests/damaged_runs.py [--count 700] [--seed 0]

Every file is cut, emptied, changed by one bit at twenty places, removed, and replaced by another file of its kind, such
as that of another task; run.json is changed in its settings as well. Every reader then reads the run. It may refuse in
a sentence, or give what it gives of the whole run, where it does not read that file; anything else is a use. Prints
each use and how many readings ended how.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from vtv_nnsight import bundles, report
from vtv_nnsight.report.explorer import demonstrate
from vtv_nnsight.runs import run
from vtv_nnsight.runs.settings import Settings

SETTINGS = Settings(
    tasks=("segmentation", "lowlight"), data="scenes", max_images=24, prompts=4, candidates=8, budget=80, test_prompts=4
)  # fmt: skip
REFUSALS = (ValueError, OSError, KeyError, TypeError)
PLACES = 20


def content(value: Any) -> Any:
    """A value as plain text, whatever tensors and tables it holds; without the folder's name."""
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


READERS: dict[str, Callable[[Path], Any]] = {"report": report.load_run, "bundle": bundles.load}


def damages(file: Path, others: list[Path], generator: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """(What was done, the bytes that are there instead; None for none)."""
    whole = file.read_bytes()
    yield "cut", whole[: len(whole) // 2]
    yield "emptied", b""
    yield "removed", None
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ends: Counter[str] = Counter()
    uses = 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run(out, SETTINGS, explore=demonstrate)
        whole = {name: content(read(out)) for name, read in READERS.items()}
        files = sorted(path for path in out.rglob("*") if path.is_file())
        generator = random.Random(args.seed)
        cases = [
            (file, what, there)
            for file in files
            for what, there in damages(file, [f for f in files if f.parent == file.parent], generator)
        ]
        generator.shuffle(cases)
        for file, what, there in cases[: args.count]:
            kept = file.read_bytes()
            file.unlink() if there is None else file.write_bytes(there)
            for name, read in READERS.items():
                try:
                    same = content(read(out)) == whole[name]
                except REFUSALS:
                    ends[f"{name}: refused"] += 1
                    continue
                ends[f"{name}: {'does not read it' if same else 'USED'}"] += 1
                if not same:
                    uses += 1
                    print(f"{name} uses {file.relative_to(out)}, {what}", flush=True)
            file.write_bytes(kept)
        print(f"{min(args.count, len(cases))} of {len(cases)} damages to {len(files)} files; {dict(ends)}; {uses} uses")
        shutil.rmtree(out)
    return bool(uses)


if __name__ == "__main__":
    sys.exit(main())
