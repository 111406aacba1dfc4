"""What the embedded model can do: the numbers of its model card.

    python benchmarks/embedded_model.py [--quick] [--corpus FOLDER] [--photographs FOLDER] [--markdown card.md]

On scenes never seen, of classes seen and unseen in training, on the test pictures of a corpus
(`docs/gather_corpus.py`), and on crops of a folder of photographs, which should be of sources not trained on: the
tokenizer's PSNR; every task one-shot, between the floor (the query copied) and the ceiling (the tokenizer's own
drawing of the truth); zero-shot with nothing patched; whether the example decides which task is done; the tasks held
out of training; and two faults that are seen at once: lines across answers, and holes that stay dark. `--model` also
takes a training run's folder with its checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import options, save
from datasets import Dataset
from einops import rearrange
from matplotlib.figure import Figure
from torch.nn import functional as F

from vtv_nnsight import MAEVQGAN, Layout, VisualPrompt, data, evaluate, tasks
from vtv_nnsight.files import write_picture
from vtv_nnsight.images import to_pil
from vtv_nnsight.metrics import mse
from vtv_nnsight.training import recipes
from vtv_nnsight.training.corpus import CUTOUT, PHOTO, Corpus
from vtv_nnsight.training.curriculum import HELD_OUT, INVERSE_MASK, PURPLE_MASK, Copy, Target
from vtv_nnsight.training.loop import CHECKPOINT
from vtv_nnsight.training.mae import averaged_model
from vtv_nnsight.training.stream import corpus_prompts
from vtv_nnsight.training.tokenizer import reconstruction

CONDITIONS = {"ceiling": "tokenizer", "one-shot": "one-shot", "zero-shot": "zero-shot", "floor": "copy"}
CORRUPTIONS = (tasks.identity, tasks.lowlight, tasks.inpainting, tasks.colorization)
TARGETS = (tasks.identity, Copy(), tasks.segmentation, INVERSE_MASK, *map(Target, ("negative", "swapped", "mirrored")))
"""What the same query is asked for when it is tested whether the example decides."""
UNSEEN = (PURPLE_MASK, Target("upsidedown"))
"""Targets held out of training that the same query is asked for as well."""
LINE, ACROSS = 0.1, 0.9
"""A line differs by so much from what is two pixels to either side, in this share of its length."""

Source = Callable[[tasks.Task, int], VisualPrompt | None]
"""`n` prompts of a task, or None where there are no masks for it."""


def main() -> None:
    parser = options(__file__, __doc__, "4 prompts a task, of scenes only")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--corpus", type=Path, help="a corpus: its test pictures are asked about as well")
    parser.add_argument("--photographs", type=Path, help="a folder of photographs that are asked about as well")
    parser.add_argument("-n", type=int, default=256, help="prompts a task")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--pictures", type=Path, help="write example answers to this folder")
    args = parser.parse_args()
    n = 4 if args.quick else args.n
    model = load(args.model).to(args.device)
    began = time.time()
    layout, seed = model.layout, args.seed
    sources = {"scenes": rows(data.scenes("test", n=2 * n, seed=seed), layout, seed)}
    if args.corpus:
        corpus = Corpus.read(args.corpus, "test")
        sources["objects"] = composed(corpus, CUTOUT, layout, seed)
        sources["pictures"] = composed(corpus, PHOTO, layout, seed)
    if not args.quick:
        unseen = data.scenes("test", n=2 * n, seed=seed, folds=(3,))
        sources["scenes of unseen classes"] = rows(unseen, layout, seed)
    if args.photographs:
        sources["photographs"] = composed(Corpus.read(args.photographs), PHOTO, layout, seed)
    lines, numbers = [f"{n} prompts a task, seed {seed}, `{args.model}`.", ""], {}

    lines += ["| data | tokenizer PSNR (dB) | codes in use |", "|---|---|---|"]
    for name, source in sources.items():
        fidelity = reconstruction(model._module.vqgan, source(tasks.identity, n).canvas.to(args.device))
        numbers[f"tokenizer, {name}"] = fidelity
        lines.append(f"| {name} | {fidelity['psnr']:.1f} | {100 * fidelity['codes']:.0f} % |")

    lines += ["", "| data | task | metric | " + " | ".join(CONDITIONS) + " |"]
    lines += ["|---|---|---|" + "---|" * len(CONDITIONS)]
    for name, source in sources.items():
        for task in (*tasks.VTV, *HELD_OUT):
            if (prompts := source(task, n)) is None:
                continue
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

    lines += ["", "| data | query | the answer is nearest to the truth of the task shown | of a held-out target |"]
    lines += ["|---|---|---|---|"]
    for name, source in sources.items():
        if source(tasks.segmentation, 1) is None:
            continue
        for corruption in CORRUPTIONS:
            seen, held_out = example_decides(model, corruption, source, n)
            numbers[f"the example decides, {name}, {corruption.name}"] = seen
            numbers[f"the example decides, {name}, {corruption.name}, held out"] = held_out
            lines.append(f"| {name} | {corruption.name} | {100 * seen:.1f} % | {100 * held_out:.1f} % |")

    lines += ["", "| data | answers with a line across | mean of a filled hole, over the truth's | within 10 % |"]
    lines += ["|---|---|---|---|"]
    for name, source in sources.items():
        share, (ratio, near) = lined(model, source, n), filled(model, source(tasks.inpainting, n))
        numbers |= {f"lines, {name}": share, f"holes, {name}": ratio, f"holes within 10 %, {name}": near}
        lines.append(f"| {name} | {100 * share:.1f} % | {ratio:.3f} | {100 * near:.0f} % |")
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
        of_source = {name: value for name, value in numbers.items() if name.startswith(f"{source}, ")}
        scores = {tuple(name.removeprefix(f"{source}, ").rsplit(", ", 1)): value for name, value in of_source.items()}
        titles = list(dict.fromkeys(title for title, _ in scores))
        for row, masks in enumerate((True, False)):
            panel, labels = axes[row, column], [t for t in titles if t.startswith("segmentation") == masks]
            for condition, colour in colours.items():
                means, lows, highs = torch.tensor([scores[title, condition] for title in labels]).view(-1, 3).T
                error = torch.stack([means - lows, highs - means])
                panel.errorbar(range(len(labels)), means, error, fmt="o", color=colour, label=condition, capsize=3)
            panel.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
            panel.set_yscale("linear" if masks else "log")
            panel.set_visible(bool(labels))
        next(panel for panel in axes[:, column] if panel.get_visible()).set_title(source)
    axes[0, 0].set_ylabel("mIoU")
    axes[1, 0].set_ylabel("MSE")
    axes[0, 0].legend(fontsize=8)
    return figure


def load(source: str) -> MAEVQGAN:
    """A model by its name, or the moving average that a training run's folder holds so far."""
    if (Path(source) / CHECKPOINT).is_file():
        return MAEVQGAN(averaged_model(recipes.get("tiny").config, Path(source)))
    return MAEVQGAN(source, dispatch=True)


def rows(images: Dataset, layout: Layout, seed: int) -> Source:
    """Prompts of random rows of a data set."""
    masked = "mask" in images.column_names
    return lambda task, n: (
        task.prompts(images, n=n, seed=seed, layout=layout) if masked or task.needs != "mask" else None
    )


def composed(corpus: Corpus, kind: str, layout: Layout, seed: int) -> Source:
    """Prompts of cut-out objects over pictures of a corpus, or of crops of its photographs."""
    masked = kind == CUTOUT
    return lambda task, n: (
        corpus_prompts(task, n, layout, corpus, kind, seed) if masked or task.needs != "mask" else None
    )


def painted_cells(model: MAEVQGAN, prompts: VisualPrompt) -> torch.Tensor:
    """The output cells that the model paints, [prompt, 3, cell, cell]."""
    return torch.cat([model.generate(some).answer.cpu() for some in prompts.split(32)])


@torch.no_grad()
def example_decides(model: MAEVQGAN, corruption: tasks.Task, source: Source, n: int) -> tuple[float, float]:
    """The same corrupted queries under examples of every target: the share of answers that are nearer (MSE) to the
    truth of the task shown than to that of any other, for targets that training showed and for those held out."""
    targets = [t for t in TARGETS if not (corruption == tasks.identity and isinstance(t, Copy))]
    variants = [source(corruption + t, n) for t in (*targets, *UNSEEN)]
    queries = [prompts.region("query") for prompts in variants]
    assert all(torch.equal(query, queries[0]) for query in queries), "the queries differ between tasks"
    painted = [painted_cells(model, prompts) for prompts in variants]
    distance = torch.stack([torch.stack([mse(a, p.region("output")) for p in variants]) for a in painted])
    right = distance.argmin(1) == torch.arange(len(variants))[:, None]
    return right[: len(targets)].double().mean().item(), right[len(targets) :].double().mean().item()


def lined(model: MAEVQGAN, source: Source, n: int) -> float:
    """The share of answers to VTV's tasks that have a line from side to side which the truth has not."""
    lines = [
        line_across(painted_cells(model, prompts) - prompts.region("output"))
        for task in tasks.VTV
        if (prompts := source(task, n)) is not None
    ]
    return torch.cat(lines).double().mean().item()


def line_across(error: torch.Tensor) -> torch.Tensor:
    """Whether an error [batch, 3, size, size] has a row or a column that is brighter, or darker, than those two pixels
    to either side of it, nearly everywhere along it: [batch]."""
    across = torch.zeros(len(error), dtype=torch.bool)
    for pixels in (error.mean(1), -error.mean(1)):
        for along in (pixels, pixels.mT):
            beside = F.pad(along, (0, 0, 2, 2), value=-1.0)
            higher = along - torch.maximum(beside[:, :-4], beside[:, 4:]) > LINE
            across |= (higher.double().mean(2) >= ACROSS).any(1)
    return across


def filled(model: MAEVQGAN, prompts: VisualPrompt) -> tuple[float, float]:
    """The mean of what the model fills holes with over the mean of what was there: of all, and the share of prompts
    where the two are within a tenth."""
    truth = prompts.region("output")
    hole = (prompts.region("query") != truth).any(1, keepdim=True)
    painted = painted_cells(model, prompts)
    visible = hole.flatten(1).any(1)  # a black square on black is no hole
    hole, painted, truth = hole[visible], painted[visible], truth[visible]
    mean, wanted = ((hole * pixels).flatten(1).sum(1) / (3 * hole.flatten(1).sum(1)) for pixels in (painted, truth))
    return (mean.mean() / wanted.mean()).item(), ((mean / wanted - 1).abs() <= 0.1).double().mean().item()


def save_picture(model: MAEVQGAN, prompts: VisualPrompt, path: Path) -> None:
    """Rows: the prompts with their truth, the answers one-shot, and zero-shot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [prompts.canvas, model.generate(prompts), model.generate(prompts.query_only())]
    write_picture(path, to_pil(rearrange(torch.stack(rows), "r b c h w -> c (r h) (b w)")).save)


def _title(task: tasks.Task) -> str:
    return "segmentation in yellow" if task == PURPLE_MASK else task.name


if __name__ == "__main__":
    main()
