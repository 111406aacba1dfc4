"""Odd command lines, made from the options that the commands have: none may end in a traceback, a hang, or silence.

    python tests/odd_commands.py [--count 600] [--seed 0] [--only COMMAND ...]

Every option of every command is given nothing, an empty value, values of another type, out of range and unknown, long
and not UTF-8, folders, pipes, broken links and files of another kind; it is given twice, and two odd options at once.
Each line runs in a fork of one process, in an empty folder, of which nothing may be left outside. Prints what went
wrong, a line each, and how many lines ended how.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from helpers import make_config
from PIL import Image

from vtv_nnsight import cli
from vtv_nnsight.cli import start
from vtv_nnsight.cli.group import load_commands
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel

SECONDS = 120
"""Of a processor: a line that is not done by then hangs, as does one that took next to none of it for so long."""
MOST_WORDS = 2500
"""Characters of a complaint: more is an echo of what was given."""
SMALL = ("--max-images", "24", "--data", "scenes")
TINY_RUN = ("run", "--model", "MODEL", "--tasks", "segmentation", *SMALL, "--prompts", "4", "--candidates", "6")
TINY_RUN += ("--budget", "60", "--test-prompts", "4", "--search", "random")


def tiny_run(work: Path) -> list[str]:
    """`vtv run` of an untrained model, which takes next to nothing."""
    return [str(work / "model") if word == "MODEL" else word for word in TINY_RUN]


def bases(work: Path) -> dict[str, list[str]]:
    """A cheap line of every command, whole as it stands."""
    model = work / "model"
    vectors, units, picture = work / "run/vectors.safetensors", work / "run/search/segmentation.safetensors", "q.png"
    few = ["--tasks", "segmentation", *SMALL, "--prompts", "2"]
    lines = {
        "run": [*tiny_run(work)[1:], "--out", work / "again"],  # which is finished
        "report": [work / "run", work / "again", "-o", "both.html"],
        "info": [model],
        "convert": [work / "junk.pth", "folder"],
        "prompt": ["--query", work / picture, "-o", "strip.png", "--vectors", work / "run", "--task", "segmentation"],
        "collect": [model, "-o", "v.safetensors", *few, "--candidates", "4"],
        "search": [
            model,
            "--vectors",
            vectors,
            "-o",
            "u.json",
            *few,
            *["--candidates", "4", "--budget", "40", "--search", "random"],
        ],
        "evaluate": [model, "-o", "e", *few, "--vectors", vectors, "--patches", units],
        "import-released": [model, work / "junk.pkl", "-o", "imported"],
        "pretrain": ["tokenizer", "--out", "run", "--config", "smoke", "--steps", "1", "--images", work / "junk.pth"],
        "bench": ["nothing"],
        "demo": ["--vectors", work / "junk.pth"],
    }
    return {name: list(map(str, words)) for name, words in lines.items()}


def prepare(work: Path) -> None:
    """A finished run, pictures, and files that are something else."""
    MAEVQGANModel(make_config()).save_pretrained(work / "model")
    Image.effect_noise((64, 48), 60).convert("RGB").save(work / "q.png")
    (work / "junk.pth").write_bytes(b"PK\x03\x04" + os.urandom(200))
    (work / "junk.pkl").write_bytes(os.urandom(200))
    (work / "empty").write_bytes(b"")
    os.mkfifo(work / "pipe")
    (work / "folder").mkdir()
    (work / "broken").symlink_to(work / "nowhere")
    both = ["collect", work / "model", "-o", work / "both.safetensors", "--tasks", "segmentation,lowlight", *SMALL]
    for words in ([*tiny_run(work), "--out", work / "run"], [*both, "--prompts", 4, "--candidates", 4]):
        code, printed, _ = run(list(map(str, words)), work / "log", work)
        if code:
            raise SystemExit(f"{words} ended with {code}: {printed}")
    shutil.copytree(work / "run", work / "again")


def odd_values(work: Path) -> dict[str, str | None]:
    """Kind of oddness → a value; None leaves the value out."""
    files = ("pipe", "folder", "broken", "empty", "junk.pth", "q.png", "no/such/file", "run/vectors.safetensors")
    return {
        "missing": None,
        "empty": "",
        "space": " ",
        "word": "nope",
        "negative": "-1",
        "zero": "0",
        "fraction": "0.5",
        "huge": "1" + "0" * 14,
        "infinite": "1e999",
        "nan": "nan",
        "twice": "segmentation,segmentation",
        "comma": ",",
        "long": "x" * 4000,
        "bytes": os.fsdecode(b"caf\xe9"),
        "brackets": "[red]%s{x}",
        **{f"file {name}": str(work / name) for name in files},
    }


def lines(work: Path, generator: random.Random, only: list[str]) -> list[tuple[str, list[str]]]:
    """(What is odd, the words) of every line, in a random order that takes all commands' options alike."""
    made, values, commands = [], odd_values(work), load_commands()
    for name, base in bases(work).items():
        if only and name not in only:
            continue
        options = [p.opts[0] for p in commands[name].params if p.param_type_name == "option"]
        flags = {p.opts[0] for p in commands[name].params if getattr(p, "is_flag", False)}
        made += [(f"{name} alone", [name])] * (name not in ("demo", "run"))  # which would go on
        made += [(f"{name} --nope", [name, *base, "--nope"]), (f"{name} ''", [name, ""])]
        made += [(f"{name} {kind} argument", [name, value or ""]) for kind, value in values.items()]
        for option in options:
            for kind, value in values.items():
                words = [option] if value is None or option in flags else [option, value]
                made.append((f"{name} {option} {kind}", [name, *base, *words]))
            made.append((f"{name} {option} twice", [name, *base, *[option, "1"] * 2]))
            other = generator.choice(options)
            pair = [w for o in (option, other) for w in (o, generator.choice([v or "" for v in values.values()]))]
            made.append((f"{name} {option} {other}", [name, *base, *pair]))
    generator.shuffle(made)
    return made


def run(words: list[str], log: Path, place: Path) -> tuple[int | str, str, float]:
    """What a line ended with in the folder `place`, "hang" included, what it printed, and the seconds that it took."""
    began, child = time.monotonic(), os.fork()
    if not child:
        os.setsid()
        os.chdir(place)
        sink = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.argv, code = ["vtv", *words], 99
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code: int | str = "hang"
    while code == "hang":
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        spent = processor_seconds(child)
        if spent > SECONDS or (time.monotonic() - began > SECONDS and spent < 2):
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.02)
    return code, log.read_text(errors="replace"), time.monotonic() - began


def processor_seconds(process: int) -> float:
    """What a process took of processors; Linux tells in /proc."""
    try:
        user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:
        return 0.0
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def fault(code: int | str, printed: str) -> str | None:
    """What is wrong with how a line ended, if anything."""
    if code == "hang":
        return f"hangs for {SECONDS} s"
    if "Traceback (most recent call last)" in printed:
        return "traceback: " + printed.strip().splitlines()[-1][:300]
    if not isinstance(code, int) or code not in (0, 1, 2):
        return f"ends with {code}"
    if code and not printed.strip():
        return "fails without a word"
    if code and len(printed) > MOST_WORDS:
        return f"complains in {len(printed)} characters"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args(arguments)
    ends: Counter[str] = Counter()
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        load_commands()  # once, so that forks need not
        start.page.write = lambda run, results=None: Path(run, "report.html")  # which other tests draw, and takes long
        prepare(work)
        for number, (what, words) in enumerate(lines(work, random.Random(args.seed), args.only)[: args.count]):
            place = Path(folder) / str(number)
            place.mkdir()
            code, printed, seconds = run(words, Path(folder) / "log", place)
            ends[str(code)] += 1
            if wrong := fault(code, printed):
                faults.append(what)
                print(f"{what} ({seconds:.1f} s): {wrong}", flush=True)
    print(f"{sum(ends.values())} lines; ended with {dict(ends.most_common())}; {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
