"""What the embedded model can do: the numbers of its model card.

    python benchmarks/embedded_model.py [--quick] [--markdown card.md] [--pictures pictures/]

On scenes never seen, of classes seen and unseen in training, and on photographs not trained on: the tokenizer's PSNR;
every task one-shot, between the floor (the query copied) and the ceiling (the tokenizer's own drawing of the truth);
zero-shot with nothing patched; whether the example decides which task is done; and the tasks held out of training.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from common import options, save
from datasets import Dataset
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image

from vtv_nnsight import MAEVQGAN, VisualPrompt, data, evaluate, tasks
from vtv_nnsight.data.photographs import crops
from vtv_nnsight.images import to_pil
from vtv_nnsight.metrics import mse
from vtv_nnsight.pretraining.curriculum import HELD_OUT, INVERSE_MASK, Copy, Mirrored, Negative, Swapped
from vtv_nnsight.pretraining.tokenizer import reconstruction
from vtv_nnsight.prompts import crop

CONDITIONS = {"ceiling": "tokenizer", "one-shot": "one-shot", "zero-shot": "zero-shot", "floor": "copy"}
CORRUPTIONS = (tasks.identity, tasks.lowlight, tasks.inpainting, tasks.colorization)
TARGETS = (tasks.identity, Copy(), tasks.segmentation, INVERSE_MASK, Negative(), Swapped(), Mirrored())
"""What the same query is asked for when it is tested whether the example decides."""


def main() -> None:
    parser = options(__file__, __doc__, "4 prompts a task, of scenes only")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("-n", type=int, default=256, help="prompts a task")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--pictures", type=Path, help="write example answers to this folder")
    args = parser.parse_args()
    n = 4 if args.quick else args.n
    model = MAEVQGAN(args.model, dispatch=True).to(args.device)
    began = time.time()
    sources = {
        "scenes": data.scenes("test", n=2 * n, seed=args.seed),
    }
    if not args.quick:
        sources["scenes of unseen classes"] = data.scenes("test", n=2 * n, seed=args.seed, folds=(3,))
        sources["photographs"] = photograph_crops(2 * n, args.seed)
    lines, numbers = [f"{n} prompts a task, seed {args.seed}, `{args.model}`.", ""], {}

    lines += ["| data | tokenizer PSNR (dB) | codes in use |", "|---|---|---|"]
    for name, images in sources.items():
        prompts = tasks.identity.prompts(images, n=n, seed=args.seed, layout=model.layout)
        found = reconstruction(model._module.vqgan, prompts.canvas.to(args.device))
        numbers[f"tokenizer, {name}"] = found
        lines.append(f"| {name} | {found['psnr']:.1f} | {100 * found['codes']:.0f} % |")

    lines += ["", "| data | task | metric | " + " | ".join(CONDITIONS) + " |"]
    lines += ["|---|---|---|" + "---|" * len(CONDITIONS)]
    for name, images in sources.items():
        for task in (*tasks.VTV, *HELD_OUT):
            if task.needs == "mask" and "mask" not in images.column_names:
                continue
            prompts = task.prompts(images, n=n, seed=args.seed, layout=model.layout)
            table = evaluate(model, task, prompts, CONDITIONS, progress=False)
            cells = []
            for line in table.lines()[: len(CONDITIONS)]:
                numbers[f"{name}, {_title(task)}, {line.condition}"] = [line.mean, line.low, line.high]
                cells.append(f"{line.mean:.3f} ({line.low:.3f} to {line.high:.3f})")
            held_out = " (held out)" if task in HELD_OUT else ""
            label = task.metric.label.split()[0]
            lines.append(f"| {name} | {_title(task)}{held_out} | {label} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
            if args.pictures:
                save_picture(model, prompts[:8], args.pictures / f"{name}-{_title(task)}.png".replace(" ", "-"))

    lines += ["", "| query | the answer is nearest to the truth of the task shown |", "|---|---|"]
    for corruption in CORRUPTIONS:
        share = example_decides(model, corruption, sources["scenes"], n, args.seed)
        numbers[f"the example decides, {corruption.name}"] = share
        lines.append(f"| {corruption.name} | {100 * share:.1f} % |")
    seconds, threads = time.time() - began, torch.get_num_threads()
    lines += ["", f"Measured in {seconds:.0f} s on {threads} CPU threads, torch {torch.__version__}."]
    print("\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n")
    save(args, {"numbers": numbers}, draw(numbers, list(sources)))


def draw(numbers: dict, sources: list[str]) -> Figure:
    """Every task one-shot, between floor and ceiling: a column a kind of data, mIoU above and MSE below."""
    figure = Figure(figsize=(4.5 * len(sources), 6), layout="constrained")
    axes = figure.subplots(2, len(sources), squeeze=False, sharey="row")
    colours = dict(zip(CONDITIONS, ("tab:green", "tab:blue", "tab:red", "0.5")))
    for column, source in enumerate(sources):
        own = {name: value for name, value in numbers.items() if name.startswith(f"{source}, ")}
        found = {tuple(name.split(", ")[1:]): value for name, value in own.items()}
        titles = list(dict.fromkeys(title for title, _ in found))
        for row, masks in enumerate((True, False)):
            panel, shown = axes[row, column], [t for t in titles if t.startswith("segmentation") == masks]
            for condition, colour in colours.items():
                means, lows, highs = torch.tensor([found[title, condition] for title in shown]).view(-1, 3).T
                error = torch.stack([means - lows, highs - means])
                panel.errorbar(range(len(shown)), means, error, fmt="o", color=colour, label=condition, capsize=3)
            panel.set_xticks(range(len(shown)), shown, rotation=30, ha="right")
            panel.set_yscale("linear" if masks else "log")
            panel.set_visible(bool(shown))
        axes[0, column].set_title(source)
    axes[0, 0].set_ylabel("mIoU")
    axes[1, 0].set_ylabel("MSE")
    axes[0, 0].legend(fontsize=8)
    return figure


def photograph_crops(n: int, seed: int) -> Dataset:
    """Random crops of the photographs that were held out of training."""
    pictures = [row["image"] for row in data.photographs("test")]
    return Dataset.from_dict({"image": [Image.fromarray(c) for c in crops(pictures, range(n), seed=seed)]})


@torch.no_grad()
def example_decides(model: MAEVQGAN, corruption: tasks.Task, images: Dataset, n: int, seed: int) -> float:
    """The same corrupted queries under examples of every target: the share of answers that are nearer (MSE) to the
    truth of the task shown than to that of any other."""
    targets = [t for t in TARGETS if not (corruption == tasks.identity and isinstance(t, Copy))]
    asked = [(corruption + t).prompts(images, n=n, seed=seed, layout=model.layout) for t in targets]
    queries = [prompts.region("query") for prompts in asked]
    assert all(torch.equal(query, queries[0]) for query in queries), "the queries differ between tasks"
    answers = [crop(model.generate(prompts), "output", model.layout) for prompts in asked]
    distance = torch.stack([torch.stack([mse(a, p.region("output")) for p in asked]) for a in answers])
    shown = torch.arange(len(targets))[:, None]
    return (distance.argmin(1) == shown).double().mean().item()


def save_picture(model: MAEVQGAN, prompts: VisualPrompt, path: Path) -> None:
    """Rows: the prompts with their truth, the answers one-shot, and zero-shot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [prompts.canvas, model.generate(prompts), model.generate(prompts.query_only())]
    to_pil(rearrange(torch.stack(rows), "r b c h w -> c (r h) (b w)")).save(path)


def _title(task: tasks.Task) -> str:
    colours = getattr(task, "foreground", "white")
    return task.name if colours == "white" else f"{task.name} in {colours}"


if __name__ == "__main__":
    main()
