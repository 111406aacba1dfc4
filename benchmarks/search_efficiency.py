"""Loss against budget: what each search finds, and how many evaluations it takes to match the published REINFORCE.

    python benchmarks/search_efficiency.py [--quick] [--model tiny] [--task segmentation] [--seed 0] [--json OUT]

Every algorithm is run from the start at every budget and seed, on the same prompts; a seed draws the prompts to train
on. All sets are then scored by token loss on test prompts that no search has seen, and so are nothing patched,
everything patched, and the one-shot prompts. Budgets count held-out evaluations too. The published REINFORCE runs its
500 steps of 320 masks once a seed; the smallest budget at which an algorithm's mean test loss is no higher is what it
needs. Intervals are 95 % over seeds (Student's t).

`--ablations` adds the default REINFORCE with one of its parts taken away at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import torch

from vtv_nnsight import MAEVQGAN, VisualPrompt, data, search, tasks
from vtv_nnsight.patches import PatchSpace
from vtv_nnsight.search import plots
from vtv_nnsight.search.reinforce import PUBLISHED
from vtv_nnsight.vectors import TaskVectors

ALGORITHMS = ("reinforce", "gates", "attribution", "mediation", "ranking", "greedy", "random")
ABLATIONS = {
    "reinforce, batch baseline": dict(baseline="batch"),
    "reinforce, independent": dict(antithetic=False),
    "reinforce, not pruned": dict(prune=False),
    "reinforce, no early stop": dict(patience=None),
    "reinforce, same 10 prompts": dict(images=10),
}
T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t at 97.5 %, by the number of seeds."""


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), T.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small budgets, one seed and 10 published steps")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--task", default="segmentation")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--budgets", nargs="+", type=int, default=[1000, 2000, 4000, 8000, 16000])
    parser.add_argument("--published-steps", type=int, default=PUBLISHED.steps)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=96, help="to train on, each seed its own")
    parser.add_argument("--held-out", type=int, default=32, help="prompts, the same for all")
    parser.add_argument("--test", type=int, default=128, help="prompts, the same for all")
    parser.add_argument("--granularity", default="quadrant")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="keep every search's journal there")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw loss against evaluations")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number there")
    args = parser.parse_args()
    if args.quick:
        args.budgets, args.seeds, args.published_steps, args.test = [600, 1200], 1, 10, 32

    model = MAEVQGAN(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    task, layout = tasks.get(args.task), model.layout
    images = {split: data.scenes(split, n=500, seed=0) for split in ("train", "validation")}
    collected = {t.name: t.prompts(images["train"], 100, 0, layout) for t in tasks.VTV}
    vectors = TaskVectors.collect(model, collected, progress=False)
    space = PatchSpace(model, layout, args.granularity)
    fresh = task.prompts(images["validation"], args.held_out + args.test, 1, layout)
    held_out, test = fresh[: args.held_out].query_only(), fresh[args.held_out :]

    def test_loss(choices: torch.Tensor, prompts: VisualPrompt) -> float:
        judge = search.Objective(model, vectors[task.name], task, prompts[:1], space, held_out=prompts)
        return judge(choices.expand(len(prompts), -1), judge.held_out).mean().item()

    def run(label: str, seed: int, budget: int | None, **options) -> search.SearchResult:
        name = label.split(",")[0]
        if name == "ranking":
            options["scores"] = vectors.score()
        prompts = task.prompts(images["train"], args.prompts, 100 + seed, layout).query_only()
        if args.resume:
            args.resume.mkdir(parents=True, exist_ok=True)
            options["resume"] = args.resume / f"{label.replace(', ', '-').replace(' ', '-')}-{budget}-{seed}.jsonl"
        return search.ALGORITHMS[name](
            model, vectors[task.name], task, prompts, space, budget=budget, held_out=held_out, seed=seed, **options
        )

    nothing, everything = torch.zeros(len(space), dtype=torch.bool), torch.ones(len(space), dtype=torch.bool)
    references = {
        "one-shot": test_loss(nothing, test),
        "zero-shot, nothing patched": test_loss(nothing, test.query_only()),
        "zero-shot, everything patched": test_loss(everything, test.query_only()),
    }
    test = test.query_only()
    print(f"{args.model}, {task.name}, {space}: token loss on {len(test)} test prompts")
    for name, loss in references.items():
        print(f"  {name:<32}{loss:10.4f}", flush=True)

    seeds = range(args.seed, args.seed + args.seeds)
    labels = [(name, {}) for name in args.algorithms] + (list(ABLATIONS.items()) if args.ablations else [])
    rounds = -(-args.published_steps // PUBLISHED.validate_every)
    published = args.published_steps * PUBLISHED.masks + rounds * args.held_out
    plan = [("reinforce, published", published, dict(recipe="published"))]
    plan += [(label, budget, options) for label, options in labels for budget in args.budgets]
    rows, found, random_sets = [], {}, []
    for label, budget, options in plan:
        results = [run(label, seed, budget, **options) for seed in seeds]
        losses = [test_loss(result.patches.choices, test) for result in results]
        found.setdefault(label, []).extend(results if label not in found else [])
        mean, half = interval(losses)
        sizes, spent = ([f(r) for r in results] for f in (lambda r: len(r.patches), lambda r: r.evaluations))
        print(
            f"  {label:<28}{budget:>8}{statistics.mean(spent):>10.0f} spent"
            f"{statistics.mean(sizes):>8.1f} units{mean:10.4f} ± {half:.4f}",
            flush=True,
        )
        rows.append({"label": label, "budget": budget, "losses": losses, "spent": spent, "sizes": sizes})
        if label == "reinforce, published":
            random_sets = [
                torch.rand(len(space), generator=torch.Generator().manual_seed(seed)).argsort() < size
                for seed, size in zip(seeds, sizes)
            ]
            random_losses = [test_loss(choices, test) for choices in random_sets]
            print(f"  {'random sets of its sizes':<32}{interval(random_losses)[0]:10.4f}")

    target = interval(rows[0]["losses"])[0]
    print(f"evaluations to reach the published REINFORCE's {target:.4f} (it spends {published}):")
    needed = {}
    for label, _ in labels:
        reached = [row for row in rows if row["label"] == label and interval(row["losses"])[0] <= target]
        needed[label] = min((row["budget"] for row in reached), default=None)
        text = f"{needed[label]:>8}, {published / needed[label]:.1f} times fewer" if needed[label] else "not reached"
        print(f"  {label:<28}{text}")
    if args.plot:
        plots.curves(found).savefig(args.plot, dpi=150)
    if args.json:
        facts = {"model": args.model, "task": task.name, "target": target, "published": published, "needed": needed}
        args.json.write_text(json.dumps(facts | {"references": references, "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
