"""What sets of units are worth: those in files, or those that searches find now, side by side on the same prompts.

    python benchmarks/patch_sets.py --quick
    python benchmarks/patch_sets.py --algorithms reinforce,gates --tasks segmentation,lowlight
    python benchmarks/patch_sets.py runs/scenes/search/*.safetensors --vectors runs/scenes/vectors.safetensors

SETS are patch sets (.json) or search results (.safetensors). A file named after a task, as `vtv run` names them, or
given as TASK=FILE is measured on that task, any other on all of --tasks. Files in a run's folder are measured as their
run was: model, data, queries, seed and vectors are those of its run.json, unless an option says otherwise, and the line
above the table warns where they are not. With neither SETS nor --algorithms every algorithm is run. An
algorithm's numbers are means over its seeds, each with its own training prompts; intervals are 95 %, bootstrapped
over prompts and what they share. Costs are differences in the model's own loss on the same prompts, the token loss
(nats per patch) of MAE-VQGAN. The columns:

- gap closed: the way from zero-shot with nothing patched (0) to one-shot (1), in loss; and by random units (16
  draws or more, on the first 24 prompts).
- other vector: the gap closed by the vector of another task at the same units (transfer at fixed units): that of the
  task that closes most, of all that there are vectors of.
- less a tenth: the set is cut at random into tenths and each is left out: the mean cost, and the greatest. A minimal
  set loses from every one.
- Jaccard: of two seeds' sets, and what random sets of their sizes would have.
- other data: the gap closed there with the same sets and vectors.
- other tasks: with another task's vector on its prompts, the mean cost over the sets found for that task.
- ablated: what one-shot loses when the units take the mean over tasks, and when as many random units do. A set that the
  task needs costs more. Units lie at CLS, query and output: what reads the example is never touched.

Under the table stand each task's floor (copying the query) and ceiling (the tokenizer's own drawing), how many of 16 or
more random draws each set beats by metric, uniform and matched by stage and region, and what the best vector of another
task has at the same units. There is no verdict on fewer than 8 different pictures.

In JSON and picture only: sufficiency, the k best-scored units of an algorithm's first seed for several k. The work is
done by `leaderboard/`.
"""

from __future__ import annotations

from pathlib import Path

import common
from leaderboard import OF_RUN, UNSEEN, Leaderboard, draw, heading, markdown, measure_sets, settings_of_runs

from vtv_nnsight import search, tasks

QUICK = dict(tasks="segmentation,lowlight", budget=80, seeds=2, prompts=16, test_prompts=4)


def main() -> None:
    parser = common.options(__file__, __doc__, "2 tasks, 2 algorithms, 2 seeds and few prompts")
    defaults = Leaderboard()
    parser.add_argument("sets", nargs="*", metavar="SETS", help="[TASK=]FILE")
    parser.add_argument("--algorithms", help=f"to run now, commas between them: {', '.join(search.ALGORITHMS)}")
    parser.add_argument("--model", default=defaults.model, help="as SOURCE of `vtv info`")
    parser.add_argument("--vqgan", help="the tokenizer's own checkpoint, for a .pth that has none")
    parser.add_argument("--embedding-type", help='of SegGPT: "semantic" or "instance"')
    parser.add_argument("--dtype", help="precision of the weights; by default that of the source")
    parser.add_argument("--data", default=defaults.data, help="as for `vtv run`; searched on and measured on apart")
    parser.add_argument("--transfer-data", help=f"other data to measure on; beside scenes {UNSEEN!r} (other classes)")
    parser.add_argument("--tasks", default=",".join(defaults.tasks), help="commas between them")
    parser.add_argument("--vectors", type=Path, metavar="FILE", help="of `vtv collect`; collected now by default")
    parser.add_argument("--budget", type=int, default=defaults.budget, help="evaluations that a search may spend")
    parser.add_argument("--seeds", type=int, default=defaults.seeds, help="searches of each algorithm per task")
    parser.add_argument("--prompts", type=int, default=defaults.prompts, help="per task, to collect and to search on")
    parser.add_argument(
        "-n", "--test-prompts", type=int, default=defaults.test_prompts, help="prompts per task to measure on"
    )
    parser.add_argument(
        "--batch-size", type=int, help="prompts per forward; by default as evaluate and the searches have it"
    )
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="keep every search's journal there")
    parser.set_defaults(**dict.fromkeys((*OF_RUN, "tasks")))
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    if args.algorithms is None and not args.sets:
        args.algorithms = "attribution,ranking" if args.quick else ",".join(search.ALGORITHMS)
    try:
        runs = settings_of_runs(args.sets)
        vars(args).update({name: value for name, value in (runs or [{}])[0].items() if vars(args)[name] is None})
        known = {name: getattr(defaults, name) for name in OF_RUN} | {"tasks": ",".join(defaults.tasks)}
        vars(args).update({name: value for name, value in known.items() if vars(args)[name] is None})
        given = {name: value for name, value in vars(args).items() if name in Leaderboard.__dataclass_fields__}
        given["tasks"] = tuple(task.name for task in tasks.get_all(args.tasks))
        given["algorithms"] = tuple(args.algorithms.split(",")) if args.algorithms else ()
        options = Leaderboard(**given)
        rows = measure_sets(options, args.sets)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    print(heading(options, runs), markdown(rows), sep="\n\n")
    common.save(args, {"leaderboard": rows}, draw(rows))


if __name__ == "__main__":
    main()
