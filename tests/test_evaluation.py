import csv

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_cli import vtv  # noqa: F401
from test_vectors import FAST, random_module

from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, TaskVectors, data, evaluate, metrics, patch, tasks
from vtv_nnsight.evaluation import Table, bootstrap, comparison, select_prompts


@pytest.fixture(scope="module")
def model():
    return MAEVQGAN(random_module(**FAST))


@pytest.fixture(scope="module")
def images():
    return data.scenes("train", n=30, seed=0)


@pytest.fixture(scope="module")
def prompts(model, images):
    return tasks.segmentation.prompts(images, 7, seed=0, layout=model.layout)


@pytest.fixture(scope="module")
def vectors(model, images):
    chosen = {name: tasks.get(name).prompts(images, 4, layout=model.layout) for name in ("segmentation", "lowlight")}
    return TaskVectors.collect(model, chosen, progress=False)


@pytest.fixture(scope="module")
def patches(model):
    return PatchSet.random(PatchSpace(model), 12)


@pytest.fixture(scope="module")
def table(model, prompts, vectors, patches):
    conditions = comparison(vectors["segmentation"], patches, vectors)
    return evaluate(model, tasks.segmentation, prompts, conditions, batch_size=3, keep=2, progress=False)


def answer(model, prompts, *patched):
    """What the table must hold of one condition, by `generate` and the metrics alone: scores and token losses."""
    with model.generate(prompts) as tracer:
        if patched:
            patch(model, *patched)
        canvas = tracer.result.save()
    with torch.no_grad(), model.trace(prompts):
        if patched:
            patch(model, *patched)
        logits = model.output.logits.save()
    layout = prompts.layout
    with torch.no_grad():
        codes = model._module.vqgan.encode(prompts.canvas)[:, layout.regions["output"]]
    index = layout.index(prompts.decoded, layout.regions["output"]) - 1
    rows, columns = layout.cells["output"]
    scores = metrics.iou(canvas[:, :, rows, columns], prompts.canvas[:, :, rows, columns])
    return scores, metrics.token_loss(logits[:, index], codes)


def test_every_condition_is_what_it_says(table, model, prompts, vectors, patches):
    own, other = vectors["segmentation"], vectors["lowlight"]
    random = PatchSet.random(patches.space, 12, 104_729)
    assert random != patches
    zero_shot = prompts.query_only()
    expected = {
        "one-shot": answer(model, prompts),
        "zero-shot": answer(model, zero_shot),
        "task vector": answer(model, zero_shot, own, patches),
        "one-shot + task vector": answer(model, prompts, own, patches),
        "random units": answer(model, zero_shot, own, random),
        "vector of lowlight": answer(model, zero_shot, other, patches),
    }
    for name, (scores, losses) in expected.items():
        np.testing.assert_allclose(table.values("segmentation", name), scores, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(table.values("segmentation", name, "token_loss"), losses, atol=1e-5, err_msg=name)
    losses = [tuple(losses.tolist()) for _, losses in expected.values()]
    assert len(set(losses)) == len(losses)
    with torch.no_grad():
        drawn = model._module.vqgan.decode(model._module.vqgan.encode(prompts.canvas))
    rows, columns = prompts.layout.cells["output"]
    ceiling = metrics.iou((drawn * 255).floor()[:, :, rows, columns] / 255, prompts.region("output"))
    np.testing.assert_allclose(table.values("segmentation", "tokenizer"), ceiling, atol=1e-6)
    floor = metrics.iou(prompts.region("query"), prompts.region("output"))
    np.testing.assert_allclose(table.values("segmentation", "copy"), floor, atol=1e-6)
    assert np.isnan(table.values("segmentation", "copy", "token_loss")).all()
    assert list(dict.fromkeys(table.frame["condition"])) == [*expected, "tokenizer", "copy"]


def test_answers_are_the_same_whatever_the_batch_and_however_prompts_come(table, model, prompts):
    again = evaluate(model, tasks.segmentation, prompts.query_only(), {"x": None}, batch_size=100, progress=False)
    losses = again.values("segmentation", "x", "token_loss")
    np.testing.assert_allclose(losses, table.values("segmentation", "one-shot", "token_loss"), atol=1e-5)
    assert np.isnan([line.difference for line in again.lines()]).all()


def test_pictures(table, prompts):
    shown = table.pictures["segmentation"]
    assert list(shown)[:3] == ["prompt", "truth", "one-shot"] and len(shown) == 10
    assert all(len(cells) == 2 for cells in shown.values())
    assert torch.equal(shown["truth"], (prompts[:2].region("output") * 255).round().byte())
    rows, columns = prompts.layout.cells["output"]
    assert len(shown["prompt"][:, :, rows, columns].unique()) == 1


def test_lines_pair_images(table):
    lines = {(line.condition, line.measure): line for line in table.lines()}
    assert len(lines) == 16
    one_shot, zero_shot = (table.values("segmentation", name, "token_loss") for name in ("one-shot", "zero-shot"))
    line = lines["zero-shot", "token loss"]
    assert line.images == 7 and line.mean == pytest.approx(zero_shot.mean())
    assert line.difference == pytest.approx((zero_shot - one_shot).mean())
    assert line.low < line.mean < line.high and line.difference_low < line.difference < line.difference_high
    assert np.isnan(lines["one-shot", "token loss"].difference)


def test_bootstrap_covers_the_mean_and_shrinks():
    generator = np.random.default_rng(1)
    hits = 0
    for i in range(100):
        values = generator.normal(2, 1, size=60)
        mean, low, high = bootstrap(values, seed=i)
        assert mean == pytest.approx(values.mean())
        hits += low < 2 < high
    assert 88 <= hits <= 99
    few, many = (np.subtract(*bootstrap(generator.normal(size=n))[:0:-1]) for n in (50, 5000))
    assert 6 < few / many < 16


def test_folds_average_as_published(table):
    """The mean of the folds' means, not of all images."""

    def fold(number, scores):
        rows = [
            {"task": "t", "metric": "iou", "condition": name, "fold": number, "image": i, "score": s + shift}
            | {"token_loss": float("nan")}
            for name, shift in (("one-shot", 0.0), ("other", 0.25))
            for i, s in enumerate(scores)
        ]
        return Table(Dataset.from_list(rows))

    joined = Table.cat([fold(0, [0.0] * 3), fold(1, [0.5] * 9)])
    one_shot, other = joined.lines()[:2]
    assert (one_shot.mean, one_shot.low, one_shot.high) == (0.25, 0.25, 0.25)
    assert other.difference == other.difference_low == 0.25 and other.images == 12


def test_tables_in_every_form(table, tmp_path):
    text, markdown, html = repr(table), table.markdown(), table._repr_html_()
    for form in (text, markdown, html):
        assert "segmentation, 7 images" in form and "mIoU ↑" in form and "one-shot + task vector" in form
        mean = table.values("segmentation", "zero-shot").mean()
        assert f"{mean:.4f} [" in form
    assert "nan" not in text and len({line.count("|") for line in markdown.splitlines()}) == 1
    table.csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and float(rows[1]["mean"]) == pytest.approx(mean)
    table.parquet(tmp_path / "values.parquet")
    loaded = Table.load(tmp_path / "values.parquet")
    assert repr(loaded) == text and sorted(p.name for p in tmp_path.iterdir()) == ["table.csv", "values.parquet"]
    with pytest.raises(FileNotFoundError, match="no file"):
        Table.load(tmp_path / "nothing")


def test_selected_prompts_are_the_best_that_share_no_image(model, images):
    selected = select_prompts(
        model, tasks.segmentation, images, 4, candidates=25, seed=3, batch_size=10, layout=model.layout, progress=False
    )
    candidates = tasks.segmentation.prompts(images, 25, seed=3, layout=model.layout)
    drawn = model.generate(candidates)
    rows, columns = model.layout.cells["output"]
    scores = metrics.iou(drawn[:, :, rows, columns], candidates.region("output"))
    generator = np.random.default_rng(3)
    pairs = tasks.draw_rows(images, 25, 1, generator).tolist()
    best, used = [], set()
    for i in (-scores).argsort(stable=True).tolist():
        if len(best) < 4 and not used & set(pairs[i]):
            best.append(i)
            used |= set(pairs[i])
    assert torch.equal(selected.canvas, candidates.canvas[best])
    with pytest.raises(ValueError, match="share no image and 20 were asked"):
        select_prompts(model, tasks.segmentation, images, 20, candidates=25, progress=False)


def test_bad_input(model, prompts, vectors, patches, table):
    with pytest.raises(ValueError, match="no prompts of 'segmentation'"):
        evaluate(model, tasks.segmentation, prompts[:0])
    with pytest.raises(ValueError, match="no conditions"):
        evaluate(model, tasks.segmentation, prompts, {})
    with pytest.raises(ValueError, match="condition 'x' is 'two-shot'; choose one of one-shot, zero-shot"):
        evaluate(model, tasks.segmentation, prompts, {"x": "two-shot"}, progress=False)
    with pytest.raises(ValueError, match="condition 'x' is 'copy'"):
        evaluate(model, tasks.segmentation, prompts, {"x": (vectors["segmentation"], patches, "copy")}, progress=False)
    with pytest.raises(ValueError, match="no 'x' of 'segmentation'"):
        table.values("segmentation", "x")


def test_load_names_data(tmp_path):
    assert len(data.load("scenes", n=3)) == 3
    for i in range(5):
        data.scenes("train", n=5)[i]["image"].save(tmp_path / f"{i}.png")
    few = [data.load(str(tmp_path), n=3, seed=seed) for seed in (0, 0, 1)]
    assert [len(rows) for rows in few] == [3, 3, 3] and len(data.load(str(tmp_path))) == 5
    pixels = [[np.asarray(row["image"]).sum() for row in rows] for rows in few]
    assert pixels[0] == pixels[1] != pixels[2]
    with pytest.raises(ValueError, match="not a source of data"):
        data.load("nowhere")


def test_command_line(vtv, model, patches, tmp_path):  # noqa: F811
    model._module.save_pretrained(tmp_path / "model")
    patches.save(tmp_path / "patches.json")
    file, made = tmp_path / "vectors.safetensors", tmp_path / "results"
    common = ("--data", "scenes", "--max-images", 12, "--n", 3, "--tasks", "segmentation,lowlight")
    code, out, _ = vtv("collect", tmp_path / "model", *common, "--select", 12, "-o", file)
    assert code == 0 and f"wrote {file}" in out and list(TaskVectors.load(file)) == ["segmentation", "lowlight"]
    code, out, _ = vtv("score", file, "--top", 3, "--plot", tmp_path / "scores.png")
    assert code == 0 and out.count("attn.heads[") == 3 and (tmp_path / "scores.png").stat().st_size > 5000
    patched = ("--vectors", file, "--patches", tmp_path / "patches.json")
    code, out, _ = vtv("evaluate", tmp_path / "model", *common, *patched, "-o", made)
    assert code == 0 and "vector of lowlight" in out and "vector of segmentation" in out
    names = {"table.md", "table.csv", "values.parquet", "segmentation.png", "lowlight.png"}
    assert {path.name for path in made.iterdir()} == names and all(f"wrote {made / name}" in out for name in names)
    assert Table.load(made / "values.parquet").values("lowlight", "task vector").shape == (3,)
    for wrong, message in (
        (("collect", tmp_path / "model", "--tasks", "swimming", "-o", file), "'swimming' is not a task"),
        (("evaluate", tmp_path / "model", "--vectors", file, "-o", made), "--vectors and --patches go together"),
        (("evaluate", tmp_path / "model", "--tasks", "identity", *patched, "-o", made), "no vector of 'identity'"),
        (("score", tmp_path / "patches.json"), "not a complete safetensors file"),
    ):
        code, _, complaint = vtv(*wrong)
        assert code == 1 and message in complaint
    for command in ("collect", "score", "evaluate"):
        assert f"vtv {command} " in vtv(command, "-h")[1].split("Example", 1)[1]
