"""Training: what is drawn, that it learns, and that it can be interrupted."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("skimage")

from vtv_nnsight import MAEVQGAN, Layout, tasks
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.training import loop, mae, pretrain, recipes
from vtv_nnsight.training.composition import LEAST_SHOWN, compose, crop
from vtv_nnsight.training.corpus import CUTOUT, PHOTO, TEXTURE, Corpus, Picture
from vtv_nnsight.training.curriculum import (
    CORRUPTIONS,
    HELD_OUT,
    INVERSE_MASK,
    TARGETS,
    Copy,
    Hole,
    Target,
    draw_task,
    is_held_out,
)
from vtv_nnsight.training.mae import draw_mask, recode
from vtv_nnsight.training.recipes import Recipe
from vtv_nnsight.training.stream import training_prompts, validation_prompts

LAYOUT = Layout(56, 4)


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory):
    """A corpus of noise and of discs, in two splits."""
    folder, lines = tmp_path_factory.mktemp("corpus"), ["file,kind,package,source,split"]
    generator = np.random.default_rng(0)
    for i in range(12):
        for kind, mode in ((PHOTO, "RGB"), (TEXTURE, "RGB"), (CUTOUT, "RGBA")):
            image = Image.fromarray(generator.integers(0, 256, (90, 120, 3), dtype=np.uint8))
            if mode == "RGBA":
                alpha = Image.new("L", image.size)
                ImageDraw.Draw(alpha).ellipse((20, 10, 100, 80), fill=255)
                image.putalpha(alpha)
            image.save(folder / f"{kind}{i}.png")
            lines.append(f"{kind}{i}.png,{kind},some,discs{i % 3}/{i}.png,{'validation' if i % 4 == 3 else 'train'}")
    lines.append("lost.png,photo,some,lost.png,train")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def corpus(corpus_folder):
    return Corpus.read(corpus_folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Both stages of the smallest size, trained for seconds."""
    out = tmp_path_factory.mktemp("run")
    pretrain("tokenizer", "smoke", out, steps=40)
    pretrain("mae", "smoke", out, steps=40)
    return out


@pytest.mark.slow
def test_both_stages_improve_and_export_a_model(run):
    logs = {}
    for stage in ("tokenizer", "mae"):
        pretrain(stage, "smoke", run, steps=60, decay=20, resume=True)
        logs[stage] = [json.loads(line) for line in (run / stage / "log.jsonl").read_text().splitlines()]
    assert logs["tokenizer"][-1]["psnr, scenes"] > logs["tokenizer"][0]["psnr, scenes"] > 12
    assert logs["mae"][-1]["loss"] < np.log(64) - 0.3  # better than guessing among the 64 codes
    model = MAEVQGAN(run / "mae" / "model")
    prompts = training_prompts(5, 2, model.layout)
    assert model.generate(prompts).shape == prompts.canvas.shape


@pytest.mark.slow
def test_a_model_stays_until_the_next_one_is_written(run, tmp_path, monkeypatch):
    out = shutil.copytree(run, tmp_path / "run") / "mae"

    def state():
        return {file.name: file.read_bytes() for file in (out / "model").iterdir()}

    def write_half(self, folder):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "config.json").write_text("half")
        raise OSError("no space left")

    before, step = state(), json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(MAEVQGANModel, "save_pretrained", write_half)
        pretrain("mae", "smoke", out.parent, steps=step, resume=True)
    assert state() == before
    pretrain("mae", "smoke", out.parent, steps=step, resume=True)
    assert state() == before and not list(out.glob(".model*"))


@pytest.mark.slow
def test_a_run_is_not_overwritten(run):
    with pytest.raises(FileExistsError, match="checkpoint.pt.*resume"):
        pretrain("tokenizer", "smoke", run)


def test_mae_needs_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="train the tokenizer"):
        pretrain("mae", "smoke", tmp_path)


@pytest.mark.slow
def test_the_decoder_learns_on_and_joins_the_model(run, tmp_path):
    """Codes stay what they are; a transformer that was trained meanwhile is saved with what the decoder has learned."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    weights = load_file(pretrain("decoder", "smoke", out, steps=30))
    before, model = load_file(out / "tokenizer" / "vqgan.safetensors"), MAEVQGAN(out / "mae" / "model", dispatch=True)
    same = {name for name in weights if torch.equal(weights[name], before[name])}
    assert same == {name for name in weights if name.startswith(("encoder.", "quant_conv.", "codebook."))}
    logs = [(out / stage / "log.jsonl").read_text().splitlines() for stage in ("tokenizer", "decoder")]
    before, after = (json.loads(lines[-1]) for lines in logs)
    assert after["psnr, scenes"] > before["psnr, scenes"] and after["codes, scenes"] == before["codes, scenes"]
    steps = json.loads((run / "mae" / "log.jsonl").read_text().splitlines()[-1])["step"]
    again = MAEVQGAN(pretrain("mae", "smoke", out, steps=steps, resume=True), dispatch=True)
    prompts = training_prompts(5, 2, LAYOUT)
    assert torch.equal(again.truth(prompts)[0], model.truth(prompts)[0])
    assert not torch.equal(again.ceiling(prompts), model.ceiling(prompts))


def test_a_model_of_another_size_is_no_start():
    small, wide = (MAEVQGANModel(recipes.get("smoke").config) for _ in range(2))
    mae._take_over(wide, small)
    assert torch.equal(wide.encoder.blocks[0].mlp.fc1.weight, small.encoder.blocks[0].mlp.fc1.weight)
    config = recipes.get("smoke").config
    config.update({"hidden_size": 96, "num_attention_heads": 3})
    with pytest.raises(ValueError, match="of another size than this one: encoder.* differs"):
        mae._take_over(MAEVQGANModel(config), small)


def test_a_head_gets_the_rows_of_other_codes():
    """Codes that are the old ones in another order get their rows; a code that was never seen is unlikely."""
    torch.manual_seed(0)
    old_head, head = nn.Linear(8, 5), nn.Linear(8, 6)
    old = torch.randint(5, (4, 500))
    order = torch.tensor([3, 0, 4, 1, 2])
    recode(old_head, head, old, order[old])
    x = torch.randn(32, 8)
    assert torch.allclose(head(x)[:, order], old_head(x), atol=0.05)
    assert (head(x)[:, 5] < old_head(x).mean(1) - 3).all()


@pytest.mark.slow
def test_a_run_starts_from_a_model(run, tmp_path, capsys):
    """With what a trained model knows, the first steps are better than without."""
    first = {}
    for start in (None, run / "mae" / "model"):
        out = tmp_path / str(start is None)
        shutil.copytree(run / "tokenizer", out / "tokenizer")
        pretrain("mae", "smoke", out, steps=2, start=start)
        first[start is None] = json.loads((out / "mae" / "log.jsonl").read_text())["loss"]
    assert first[False] < first[True] - 0.1
    with pytest.raises(ValueError, match="is for the stage mae"):
        pretrain("tokenizer", "smoke", tmp_path / "other", start="tiny")


@pytest.mark.parametrize(("stage", "size", "word"), [("vae", "tiny", "stage"), ("mae", "huge", "size")])
def test_unknown_names(stage, size, word, tmp_path):
    with pytest.raises(ValueError, match=f"is not a {word}"):
        pretrain(stage, size, tmp_path)


@pytest.mark.slow
def test_an_interrupted_run_ends_like_an_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    recipe = Recipe(steps=8, batch_size=1, learning_rate=0.1, warmup=2, ema=0.5, validate=100)

    def module():
        torch.manual_seed(0)
        return nn.Linear(3, 3)

    def batches(step):
        return (torch.full((4, 3), float(step)),)

    def loss(module, batch, generator, stop_at=None):
        (batch,) = batch
        if batch[0, 0] == stop_at:
            raise KeyboardInterrupt
        return module(batch + torch.randn(4, 3, generator=generator)).float().square().mean(), {}

    whole = loop.train(module(), batches, loss, lambda m: {}, recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        loop.train(module(), batches, lambda *a: loss(*a, stop_at=5), lambda m: {}, recipe, tmp_path / "broken")
    broken = loop.train(module(), batches, loss, lambda m: {}, recipe, tmp_path / "broken", resume=True)
    assert not torch.equal(whole.weight, module().weight)
    assert torch.equal(whole.weight, broken.weight)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_of_both_batches(tmp_path):
    """Each takes every second batch; the mean of their gradients is that of the batches together."""
    script = tmp_path / "learn.py"
    script.write_text(
        """
import sys, torch
from pathlib import Path
from vtv_nnsight.training import loop
from vtv_nnsight.training.recipes import Recipe

together, out = int(sys.argv[1]), Path(sys.argv[2])
loop.has_fast_bf16 = lambda device: False  # its digits are too few to compare

def batch(i):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(i))

def batches(i):
    return (torch.cat([batch(together * i + j) for j in range(together)]),)

def loss(module, batch, generator):
    return (module(batch[0]) - batch[0].flip(1)).square().mean(), {}

torch.manual_seed(0)
recipe = Recipe(steps=6, batch_size=4, learning_rate=0.1, warmup=2, ema=0.5, clip=0.1, validate=100)
average = loop.train(torch.nn.Linear(3, 3), batches, loss, lambda m: {}, recipe, out)
torch.save(average.state_dict(), out / f"average{loop.processes().process_index}.pt")
"""
    )
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start, together, name in (([], 2, "one"), (["-m", *torchrun], 1, "two")):
        command = [sys.executable, *start, script, str(together), tmp_path / name]
        subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=300)
    one, *two = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("one/average0.pt", "two/average0.pt", "two/average1.pt")
    )
    for name, expected in one.items():
        torch.testing.assert_close(two[0][name], expected)
        assert torch.equal(two[0][name], two[1][name])


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    recipe = Recipe(steps=3, batch_size=1, learning_rate=0.1)
    with pytest.raises(FloatingPointError, match="step 0"):
        loop.train(
            nn.Linear(1, 1),
            lambda step: (torch.zeros(step),),
            lambda m, *_: (m.weight.sum() * torch.nan, {}),
            dict,
            recipe,
            tmp_path,
        )


def test_the_rate_depends_on_the_end_in_the_last_steps_only():
    long, short = (Recipe(steps=n, batch_size=1, learning_rate=1, warmup=4, decay=5) for n in (100, 20))
    rates = {recipe: [loop._schedule(step, recipe) for step in range(20)] for recipe in (long, short)}
    assert rates[long][:4] == [0.25, 0.5, 0.75, 1.0] and set(rates[long][4:]) == {1.0}
    assert rates[short][:16] == rates[long][:16]
    assert rates[short][15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_prompts_depend_on_seed_and_step_alone(corpus_folder):
    def prompts(step, seed):
        return training_prompts(step, 12, LAYOUT, seed, Corpus.read(corpus_folder)).canvas

    assert torch.equal(prompts(3, 0), prompts(3, 0))
    assert not torch.equal(prompts(3, 0), prompts(4, 0))
    assert not torch.equal(prompts(3, 0), prompts(3, 1))


def test_a_corpus_is_read_by_split(corpus_folder, corpus):
    validation = Corpus.read(corpus_folder, "validation")
    assert [len(corpus.kinds[kind]) for kind in (PHOTO, TEXTURE, CUTOUT)] == [9, 9, 9]
    assert [len(validation.kinds[kind]) for kind in (PHOTO, TEXTURE, CUTOUT)] == [3, 3, 3]
    cutout = corpus.draw(CUTOUT, np.random.default_rng(0))
    assert cutout.image.size == (81, 71) and cutout.image.mode == "RGBA"  # cut to what is not transparent
    assert corpus.another(cutout, np.random.default_rng(1)).label == cutout.label
    with pytest.raises(ValueError, match="'test'"):
        Corpus.read(corpus_folder, "test")
    with pytest.raises(ValueError, match="no manifest.csv"):
        Corpus.read(None, "validation")


def test_a_folder_is_a_corpus_of_photographs(tmp_path):
    for i in range(2):
        Image.new("L", (600, 300), 90 * i).save(tmp_path / f"{i}.png")
    corpus = Corpus.read(tmp_path)
    assert [p.image.size for p in corpus.kinds[PHOTO]] == [(400, 200)] * 2 and not corpus.has(CUTOUT)
    assert training_prompts(0, 4, LAYOUT, 0, corpus).canvas.shape == (4, 3, 56, 56)


def test_rare_packages_are_drawn_more_often_than_their_number():
    grey = Image.new("RGB", (9, 9))
    corpus = Corpus([Picture(grey, PHOTO, "many", 100**-0.5)] * 100 + [Picture(grey, PHOTO, "one")])
    generator = np.random.default_rng(0)
    drawn = Counter(corpus.draw(PHOTO, generator).label for _ in range(2000))
    assert 0.06 < drawn["one"] / 2000 < 0.12  # 1 of 11, not 1 of 101


def test_composed_pictures_show_what_their_mask_says(corpus):
    generator = np.random.default_rng(0)
    for _ in range(20):
        example, query = compose(corpus, 2, generator)
        for row in (example, query):
            mask = np.asarray(row["mask"])
            assert row["image"].mode == "RGB" and row["image"].size == row["mask"].size
            assert set(np.unique(mask)) <= {0, 255} and (mask > 0).mean() >= LEAST_SHOWN


def test_an_objects_mask_leaves_out_what_hides_it():
    """A white object under red ones: its mask covers white pixels only."""
    white, red = (Image.new("RGBA", (50, 50), colour) for colour in ("white", "red"))
    corpus = Corpus([Picture(white, CUTOUT, "white"), Picture(red, CUTOUT, "red")])
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(40):
        (row,) = compose(corpus, 1, generator)
        pixels = np.asarray(row["image"]).astype(int)[np.asarray(row["mask"]) > 0]
        reddish = pixels[:, 0] - pixels[:, 1:].max(1) > 60
        seen.add(round(reddish.mean()))
        assert reddish.mean() < 0.15 or reddish.mean() > 0.85
    assert seen == {0, 1}


def test_crops_fill_their_size(corpus):
    generator = np.random.default_rng(0)
    assert all(crop(corpus.draw(PHOTO, generator), generator, 33).size == (33, 33) for _ in range(5))


def test_validation_shows_scenes_and_pictures(corpus):
    found = validation_prompts(tasks.segmentation, 3, LAYOUT, corpus)
    assert list(found) == ["scenes", "pictures"] and [len(p) for p in found.values()] == [3, 3]
    assert list(validation_prompts(tasks.identity, 3, LAYOUT)) == ["scenes"]


def test_every_corruption_and_target_keeps_to_the_unit_range():
    generator = np.random.default_rng(0)
    cell = torch.from_numpy(generator.random((3, 27, 27), np.float32))
    mask = Image.fromarray((generator.random((27, 27)) > 0.5).astype(np.uint8) * 255)
    for corruption in CORRUPTIONS:
        shown = corruption.corrupt(cell, (0.3, 0.8))
        assert torch.equal(shown, corruption.corrupt(cell, (0.3, 0.8))), corruption
        for target in TARGETS:
            wanted = target.target({"image": mask, "mask": mask}, cell, shown)
            for pixels in (shown, wanted):
                assert pixels.shape == cell.shape and pixels.min() >= 0 and pixels.max() <= 1 + 1e-6, (
                    corruption,
                    target,
                )


def test_a_hue_turned_by_a_third_swaps_the_channels():
    cell = torch.rand(3, 4, 4)
    turned, swapped = Target("hue", 120).target({}, cell, cell), Target("swapped").target({}, cell, cell)
    assert torch.allclose(turned, swapped, atol=1e-5)
    assert torch.allclose(Target("hue", 360).target({}, cell, cell), cell, atol=1e-5)


def test_squares_and_darkness_of_any_kind_are_held_out_with_the_papers():
    assert is_held_out(Hole(0.4, level=1.0) + tasks.segmentation)
    assert is_held_out(tasks.Lowlight(0.3) + tasks.inpainting)
    assert not is_held_out(Hole(0.4) + tasks.identity) and not is_held_out(tasks.Lowlight(0.3) + INVERSE_MASK)


def test_every_corruption_meets_every_target_but_those_held_out():
    generator = np.random.default_rng(0)
    drawn = [draw_task(generator, masks=True) for _ in range(5000)]
    names = {task.name for task in drawn}
    assert {"lowlight+copy", "lowlight+identity", "lowlight+segmentation", "identity+segmentation"} <= names
    for held_out in HELD_OUT:
        assert not any(set(getattr(held_out, "parts", (held_out,))) <= set(task.parts) for task in drawn)
    assert tasks.identity + Copy() not in drawn


@pytest.mark.slow
def test_no_answer_of_the_papers_is_the_commonest():
    """What a query alone suggests is the inverse mask: wrong for every task of the papers."""
    assert max(TARGETS, key=TARGETS.get) == INVERSE_MASK
    generator = np.random.default_rng(0)
    drawn = [draw_task(generator, masks=True) for _ in range(40_000)]
    answers = Counter(task.parts[-1] for task in drawn if task.parts[0] == tasks.lowlight)
    assert answers.most_common(1)[0][0] == INVERSE_MASK and set(answers) == set(TARGETS)


def test_masks_partition_what_they_show_and_hide():
    shapes = set()
    for step in range(60):
        visible, hidden = draw_mask(LAYOUT, 3, torch.Generator().manual_seed(step))
        shapes.add((visible.ndim, visible.shape[-1], hidden.shape[-1]))
        for row in range(3):
            shown, asked = ((ids if ids.ndim == 1 else ids[row]).tolist() for ids in (visible, hidden))
            assert shown and asked and not set(shown) & set(asked)
            assert len(set(shown + asked)) == len(shown + asked)
    assert (1, len(LAYOUT.visible), len(LAYOUT.regions["output"])) in shapes
    assert (1, len(LAYOUT.regions["query"]), len(LAYOUT.regions["output"])) in shapes
    assert len(shapes) > 5


def test_sizes_fit_their_promises():
    assert recipes.get("tiny").config.layout == Layout(112, 8)
    assert recipes.get("published").config.layout == Layout()
