import hashlib
import json
import runpy
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, VOC_MAPS, VOC_SIZE, annotation, label_map, run
from PIL import Image
from published import colorization_pairs
from typer.testing import CliRunner

from vtv_nnsight import MAEVQGAN, Layout, cli, data, tasks
from vtv_nnsight.cli import evaluating
from vtv_nnsight.data.pascal_voc import CLASSES, Entry, detection, pascal, published_list, released_detection_order
from vtv_nnsight.evaluation import Table
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.report import page as report
from vtv_nnsight.report import reading
from vtv_nnsight.runs import Settings, protocol, steps
from vtv_nnsight.search.result import SearchResult
from vtv_nnsight.vectors import TaskVectors

DIGEST = "ab33f1b4f213fe8a26c921f9bbd2e27ed002cc1148c1b364a7e988e93df3347c"
"""Of the eight published lists, one after the other."""


@pytest.fixture
def voc(voc_root):
    return voc_root / "VOCdevkit" / "VOC2012"


@pytest.fixture
def load(voc_root):
    """Of lists made of the masks, unless told otherwise."""
    return lambda *args, **kwargs: pascal(voc_root, *args, **{"published": False} | kwargs)


def names(images):
    """(picture, class from 1) of every row."""
    images = images.with_format(None)
    paths = images.cast_column("image", type(images.features["image"])(decode=False))["image"]
    return [(cell["path"].rsplit("/", 1)[1][:2], label + 1) for cell, label in zip(paths, images["label"])]


def test_lists_are_made_of_the_masks_fold_by_fold(load):
    assert names(load(0, "trn")) == [("a1", 1), ("a2", 1), ("a2", 2), ("a3", 2)]
    assert names(load(0, "val")) == [("b1", 1), ("b2", 1)]
    with pytest.warns(UserWarning, match="val of fold 1 has one picture of bus: it has no example"):
        assert names(load(1, "val")) == [("b3", 6)]
    with pytest.warns(UserWarning, match="trn has one picture of person"):
        assert len(load(None, "trn")) == 5


def test_a_mask_shows_its_rows_class_and_no_boundary(load):
    images = load(0, "trn")
    for row, (name, value) in zip(images, names(images)):
        assert row["mask"].mode == "L" and row["image"].size == row["mask"].size == VOC_SIZE
        expected = np.where(np.asarray(VOC_MAPS[name]) == value, 255, 0)
        assert np.array_equal(row["mask"], expected) and 0 < (expected > 0).mean() < 1
    assert images.features["label"].names == list(CLASSES)
    assert not np.asarray(images[0]["mask"])[:4].any()


def test_pictures_are_decoded_when_a_row_is_read(load, voc):
    images = load(0, "val")
    (voc / "JPEGImages" / "b2.jpg").write_bytes(b"no picture")
    (voc / "SegmentationClassAug" / "b2.png").write_bytes(b"no picture")
    assert list(images.with_format(None)["label"]) == [0, 0]
    assert tasks.draw_rows(images, 4, 1, np.random.default_rng(0)).shape == (4, 2)
    assert images.select([0])[0]["mask"].size == VOC_SIZE
    with pytest.raises(ValueError, match="b2.png cannot be decoded"):
        images.select_columns("mask")[1]


def test_episodes_pair_other_pictures_of_the_class(load):
    images = load(0, "trn")
    prompts = tasks.segmentation.prompts(images, n=30, seed=1)
    drawn = tasks.draw_rows(images, 30, 1, np.random.default_rng(1))
    who = names(images)
    for example, query in drawn:
        assert who[example][1] == who[query][1] and who[example][0] != who[query][0]
    example, query = (images[int(i)] for i in drawn[0])
    assert torch.equal(prompts[0].canvas, tasks.segmentation.prompt(example, query).canvas)
    assert torch.equal(prompts.canvas, tasks.segmentation.prompts(images, n=30, seed=1).canvas)


def test_published_lists_are_the_default(load, voc_root, monkeypatch):
    """Those of OSLSM, by way of HSNet, as both papers' code has them."""
    lists = {(split, fold): published_list(split, fold) for split in ("trn", "val") for fold in range(4)}
    counts = [len(lists[split, fold]) for split in ("trn", "val") for fold in range(4)]
    assert counts == [2286, 3425, 5883, 2086, 346, 451, 725, 346]
    assert all({entry.label for entry in rows} == {5 * fold + i for i in range(5)} for (_, fold), rows in lists.items())
    pictures = {half: {e.name for f in range(4) for e in lists[half, f]} for half in ("trn", "val")}
    assert not pictures["trn"] & pictures["val"]
    assert [lists["trn", 0][i] for i in (0, -1)] == [("2007_000032", 0), ("2011_003262", 4)]
    lines = "".join(f"{name}__{label + 1:02d}\n" for rows in lists.values() for name, label in rows)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert digest == DIGEST
    with pytest.raises(ValueError, match="the published list .*:masks lists what is there.* names 2279 pictures"):
        pascal(voc_root, 0, "trn")
    module = sys.modules[pascal.__module__]
    own = {"trn/fold1.txt": [("a3", 6), ("a1", 7)], "trn/fold2.txt": [("a2", 11)]}
    monkeypatch.setattr(module, "_published_lists", lambda: {f: [module.Entry(*e) for e in v] for f, v in own.items()})
    with pytest.warns(UserWarning, match="one picture"):
        assert names(pascal(voc_root / "VOCdevkit", (1, 2), "trn")) == [("a3", 7), ("a1", 8), ("a2", 12)]


@pytest.mark.parametrize(
    ("folder", "download"),
    [
        ("JPEGImages", "VOCtrainval_11-May-2012"),
        ("SegmentationClassAug", "SBD"),
        ("ImageSets/Segmentation", "VOCtrainval_11-May-2012"),
    ],
)
def test_a_missing_folder_is_named_with_its_download(load, voc, folder, download):
    (voc / folder).rename(voc / "away")
    with pytest.raises(FileNotFoundError, match=f"{folder}; download .*{download}"):
        load(0, "val")


def test_what_is_no_fold_or_split_or_mask_is_refused(load, voc):
    with pytest.raises(ValueError, match="fold=4"):
        load(4)
    with pytest.raises(ValueError, match="split='test'"):
        load(0, "test")
    with pytest.raises(ValueError, match="val of fold 3 is empty"):
        load(3, "val")
    Image.new("L", VOC_SIZE, 60).save(voc / "SegmentationClassAug" / "a1.png")
    with pytest.raises(ValueError, match="mask a1.png holds the value 60"):
        load(0, "trn")
    (voc / "JPEGImages" / "a2.jpg").unlink()
    label_map((1, 0, 0, 9, 9)).save(voc / "SegmentationClassAug" / "a1.png")
    with pytest.raises(ValueError, match="names 1 pictures that have no .jpg in .*: a2"):
        load(0, "trn")


def test_a_mask_of_another_size_than_its_image_is_refused(load, voc):
    images = load(0, "val")
    images[0]["mask"].resize((20, 20)).point(lambda v: v // 255).save(voc / "SegmentationClassAug" / "b1.png")
    with pytest.raises(ValueError, match=r"mask of \(20, 20\).*image of \(48, 36\)"):
        tasks.segmentation.prompt(images[1], images[0])


def test_detection_keeps_small_single_objects(voc_root):
    assert names(detection(voc_root, "trn")) == [("a1", 8), ("a3", 8)]
    images = detection(voc_root, "val")
    assert names(images) == [("b3", 12)]
    expected = np.zeros(VOC_SIZE[::-1], int)
    expected[2:33, 1:21] = 255
    assert np.array_equal(images[0]["mask"], expected)
    assert names(detection(voc_root, "val", largest=1.0)) == [("b1", 12), ("b3", 12)]


def test_detection_in_the_released_order(voc_root, voc):
    """The numbers are of the whole list, once for each class of its pictures, and index what is left of it."""
    many = [("cat", 1, 1, 5, 5), ("dog", 1, 1, 5, 5), ("dog", 6, 6, 9, 9)]
    for name, objects in {"b1": many, "b2": [("cow", 3, 3, 9, 9)], "b3": many[:1]}.items():
        (voc / "Annotations" / f"{name}.xml").write_text(annotation(objects))
    assert names(detection(voc_root, "val")) == [("b2", 10), ("b3", 8)]
    assert released_detection_order(voc_root, 2) == [0, 0]
    assert released_detection_order(voc_root, 4) == [0, 0, 1, 2]
    (voc / "Annotations" / "b3.xml").write_text(annotation([("cow", 1, 1, 9, 9)]))
    settings = Settings(data=f"detection:{voc_root}:0.5", protocol="published", test_prompts=9, prompts=1)
    ((_, rows),) = evaluating._folds(settings, "test", None)
    layout = Layout(canvas_size=64, patch_size=8)
    setup = SimpleNamespace(settings=settings, layout=layout)
    asked = steps.prompts_to_test(setup, tasks.detection, rows)
    first, second = (tasks.detection.prompt(rows[1 - i], rows[i], layout) for i in (0, 1))
    assert len(rows) == len(asked) == 2 and len(asked.queries.unique()) == 1
    assert torch.equal(asked.canvas, torch.cat([first.canvas] * 2)) and not torch.equal(first.canvas, second.canvas)


def test_detection_prompts_are_boxes(voc_root):
    images = detection(voc_root, "trn")
    prompt = tasks.detection.prompts(images, n=1, seed=0)
    _, target = tasks.detection.cells(images[0], 111)
    assert any(torch.equal(prompt.region(name)[0], target) for name in ("example_output", "output"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotation>", "a1.xml is not an annotation"),
        (annotation([("unicorn", 1, 1, 5, 5)]), "a1.xml is not an annotation.*unicorn"),
        (annotation([("cat", 1, 1, 5, 5)]).replace("bndbox", "box"), "a1.xml is not an annotation"),
    ],
)
def test_bad_annotations_are_named(voc_root, voc, text, words):
    (voc / "Annotations" / "a1.xml").write_text(text)
    with pytest.raises(ValueError, match=words):
        detection(voc_root, "trn")


def test_detection_without_pictures_is_refused(voc_root, voc):
    (voc / "Annotations" / "b3.xml").write_text(annotation([]))
    with pytest.raises(ValueError, match="none of the 3 pictures of .*val.txt has a single object"):
        detection(voc_root, "val")
    (voc / "Annotations" / "b3.xml").unlink()
    with pytest.raises(ValueError, match="1 pictures that have no .xml"):
        detection(voc_root, "val")
    (voc / "Annotations").rename(voc / "away")
    with pytest.raises(FileNotFoundError, match="Annotations; download VOCtrainval"):
        detection(voc_root, "val")
    with pytest.raises(ValueError, match="split='test'"):
        detection(voc_root, "test")


def test_data_by_name(voc_root):
    assert names(data.load(f"pascal:{voc_root}:0:masks", "train")) == [("a1", 1), ("a2", 1), ("a2", 2), ("a3", 2)]
    assert names(data.load(f"pascal:{voc_root}:0:masks", "test")) == names(
        data.load(f"pascal:{voc_root}:0:masks", "val")
    )
    with pytest.warns(UserWarning, match="one picture"):
        everything = data.load(f"pascal:{voc_root}:masks", "validation")
    assert names(everything) == [("b1", 1), ("b2", 1), ("b3", 6)]
    assert names(data.load(f"detection:{voc_root}", "train")) == [("a1", 8), ("a3", 8)]
    few = [names(data.load(f"pascal:{voc_root}:0:masks", "train", n=2, seed=seed)) for seed in range(9)]
    assert {len(rows) for rows in few} == {2} and len({str(rows) for rows in few}) > 1
    for spec in ("pascal:", "nowhere", "scenes:3"):
        with pytest.raises(ValueError, match=f"'{spec}' is not a source of data; give scenes, .*pascal:ROOT"):
            data.load(spec)
    with pytest.raises(ValueError, match="split='trian'"):
        data.load(f"pascal:{voc_root}:0:masks", "trian")


@pytest.fixture
def published(voc_root, voc, monkeypatch):
    """Lists of 16 training and 6 validation pictures in each fold, two classes each, in place of the published ones."""
    lists = {}
    for half, count in (("trn", 16), ("val", 6)):
        for fold in range(4):
            entries = [Entry(f"{half}{fold}{i:02d}", 5 * fold + (i % 3 == 2)) for i in range(count)]
            lists[f"{half}/fold{fold}.txt"] = entries
            for i, (name, label) in enumerate(entries):
                colour = (60 * fold, 15 * i, 255 if half == "trn" else 0)
                Image.new("RGB", VOC_SIZE, colour).save(voc / "JPEGImages" / f"{name}.jpg", quality=95)
                label_map((label + 1, 2, 2, 12 + i, 20)).save(voc / "SegmentationClassAug" / f"{name}.png")
    monkeypatch.setattr(sys.modules[pascal.__module__], "_published_lists", lambda: lists)
    return lists


def test_candidates_are_the_lists_in_order(published, voc_root):
    """Of folds 1 to 3; a list that is too short is begun again, and examples are of the query's class."""
    rows = pascal(voc_root, protocol.VECTOR_FOLDS, "trn")
    drawn = protocol.candidates(rows, n=20)
    expected = [16 * fold + i % 16 for fold in range(3) for i in range(20)]
    assert drawn.rows[:, -1].tolist() == expected
    labels = np.array(rows.with_format(None)["label"])
    assert (labels[drawn.rows[:, 0]] == labels[drawn.rows[:, 1]]).all() and (drawn.rows[:, 0] != drawn.rows[:, 1]).all()
    assert (drawn.rows == protocol.candidates(rows, n=20).rows).all()
    assert (drawn.rows != protocol.candidates(rows, n=20, seed=1).rows).any()


def test_pairs_of_colorization_are_those_of_the_released_seed():
    np.random.seed(5)  # as the released code draws them: all queries at once, then an example at each prompt
    queries = np.random.choice(np.arange(0, 5000 - 1), size=1000, replace=False)
    examples = [np.random.choice(np.arange(0, 1000 - 1)) for _ in range(1000)]
    drawn = colorization_pairs(5000)
    assert (drawn.rows == np.stack([examples, queries], 1)).all() and len(drawn) == 1000
    with pytest.raises(ValueError, match="1000 images are too few for 1000 released pairs; give 1001"):
        colorization_pairs(1000)


def test_the_published_protocol(published, voc_root, small_config, tmp_path, monkeypatch):
    """Vectors of folds 1 to 3, a search on the first images of a fold, and one set for all folds."""
    model = tmp_path / "model"
    MAEVQGANModel(small_config()).save_pretrained(model)
    searched, evaluated = [], []

    def search(setup, vectors, tasks, prompts, space, **options):
        (held_out,) = options["held_out"]
        searched.append((tasks[0].name, prompts[0].query_only().canvas, held_out))
        return own_search(setup, vectors, tasks, prompts, space, **options)

    def evaluate(model, task, prompts, conditions, **options):
        evaluated.append((options["fold"], prompts))
        return own_evaluate(model, task, prompts, conditions, **options)

    own_search, own_evaluate = steps.search, steps.evaluate_conditions
    monkeypatch.setattr(steps, "search", search)
    monkeypatch.setattr(steps, "evaluate_conditions", evaluate)
    monkeypatch.setattr(report, "write", lambda out: out / "report.html")
    settings = Settings(
        model=str(model), data=f"pascal:{voc_root / 'VOCdevkit'}", folds=(2, 0), search_fold=3, tasks=("segmentation",),
        prompts=6, candidates=16, test_prompts=7, draws=1, budget=60, search="random", loss="pixels",
        protocol="published",
    )  # fmt: skip
    out = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(out, settings, progress=False)
    layout = MAEVQGAN(str(model)).layout
    task = tasks.segmentation
    ((name, trained, held_out),) = searched
    assert name == "segmentation" and len(trained) == 10 and len(held_out) == 6
    train, apart = protocol.search_prompts(task, pascal(voc_root, 3, "trn"), layout)
    assert torch.equal(trained, train.canvas) and torch.equal(held_out.canvas, apart.canvas)
    assert [fold for fold, _ in evaluated] == [0, 2]
    for fold, prompts in evaluated:
        assert len(prompts) == 7
        rows = pascal(voc_root, fold, "val")
        queries = [task.prompt(rows[0], rows[i % 6], layout).region("query") for i in range(7)]
        assert torch.equal(prompts.region("query"), torch.cat(queries))
    files = ("prompts/segmentation.safetensors", "vectors.safetensors", "search/segmentation.safetensors")
    assert all((out / "fold0" / file).samefile(out / "fold2" / file) for file in files)
    found, first = reading.load_run(out), Table.load(out / "fold0" / "evaluation" / "segmentation.parquet")
    assert list(found.results["segmentation"]) == ["fold0", "fold2"]
    assert (found.table.values("segmentation", "one-shot")[:7] == first.values("segmentation", "one-shot")).all()
    queries = evaluated[0][1].region("query").mul(255).round().byte()  # of fold 0, as the scores beside them
    assert torch.equal(found.cells(task)["query"], queries[: len(found.cells(task)["query"])])
    assert TaskVectors.load(out / "fold0" / "vectors.safetensors")["segmentation"].count == 6
    run(out, settings, progress=False)
    assert len(searched) == 1 and len(evaluated) == 2
    with pytest.raises(ValueError, match="search_fold was 3 and is 1"):
        run(out, replace(settings, search_fold=1), progress=False)


def test_units_may_be_drawn_for_each_fold(published, voc_root, small_config, tmp_path, monkeypatch):
    """As the released code does, of the probabilities that the search ended with."""
    model, asked = tmp_path / "model", {}
    MAEVQGANModel(small_config()).save_pretrained(model)

    def evaluate(model, task, prompts, conditions, **options):
        asked[options["fold"]] = conditions["task vector"].patches
        return own_evaluate(model, task, prompts, conditions, **options)

    own_evaluate = steps.evaluate_conditions
    monkeypatch.setattr(steps, "evaluate_conditions", evaluate)
    settings = Settings(
        model=str(model), data=f"pascal:{voc_root / 'VOCdevkit'}", folds=(2, 0), search_fold=3, tasks=("segmentation",),
        prompts=6, candidates=16, test_prompts=2, draws=1, budget=100, search="reinforce", protocol="published",
        fold_draws=True,
    )  # fmt: skip
    run(tmp_path / "run", settings, progress=False)
    found = SearchResult.load(tmp_path / "run" / "fold0" / "search" / "segmentation.safetensors")
    assert asked == {fold: protocol.fold_draw(found, fold).patches for fold in (0, 2)}
    assert len({tuple(patches.choices.tolist()) for patches in (*asked.values(), found.patches)}) == 3
    assert "drawn for it" in json.loads((tmp_path / "run" / "run.json").read_text())["notes"][0]
    for wrong, words in (
        (dict(search="random"), "search='random' has no probabilities"),
        (dict(protocol="own"), "fold_draws goes with the published protocol on pascal:ROOT"),
        (dict(sparsity=float("nan")), "sparsity=nan is no price"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(settings, **wrong)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_both_papers_tables_from_files_of_their_form(published, voc_root, voc, small_config, tmp_path, monkeypatch):
    """A model, a VOC tree and an ImageNet folder in, tables with the papers' numbers out; then nothing again."""
    for name in ("b1", "b3"):
        (voc / "Annotations" / f"{name}.xml").write_text(annotation([("dog", 1, 1, 15, 12)]))
    (voc / "Annotations" / "b2.xml").write_text(annotation([("dog", 1, 1, 15, 12), ("cat", 1, 1, 9, 9)]))
    for i in range(1001):
        path = tmp_path / "imagenet" / "val" / f"n{i // 500}" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (120, 115), (i % 256, 100, 40 * (i // 256))).save(path)
    MAEVQGANModel(small_config()).save_pretrained(tmp_path / "model")
    folder = ROOT / "benchmarks"
    arguments = [folder / "published.py", "--quick", "--device", "cpu", "--model", tmp_path / "model"]
    arguments += ["--data", f"pascal:{voc_root}", "--imagenet", tmp_path / "imagenet", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    monkeypatch.syspath_prepend(folder)
    runpy.run_path(sys.argv[0], run_name="__main__")
    found = json.loads((tmp_path / "out" / "published.json").read_text())
    rows = {(row["paper"], row["task"], row["fold"], row["row"]): row for row in found["rows"]}
    folds = [fold for paper, task, fold, row in rows if (paper, task, row) == ("VTV", "lowlight", "task vector")]
    assert folds == ["0", "1", "2", "3"]
    assert {task for paper, task, *_ in rows if paper == "VP"} >= {"segmentation", "detection(fit=bilinear)"}
    known = rows["VP", "segmentation", "1", "one-shot"]
    assert known["theirs"] == 0.3044 and known["difference"] == pytest.approx(known["here"] - 0.3044)
    assert rows["VP", "segmentation", "0", "copy"]["theirs"] is None
    assert any(task.startswith("colorization(fit=crop)") for paper, task, *_ in rows if paper == "VP")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}


def test_task_vectors_of_a_voc_tree(voc_root, small_config, tmp_path, monkeypatch):
    MAEVQGANModel(small_config()).save_pretrained(tmp_path / "model")
    out = tmp_path / "vectors.safetensors"
    options = (
        "--tasks",
        "segmentation,lowlight",
        "--data",
        f"pascal:{voc_root}:0:masks",
        "--split",
        "train",
        "--n",
        "3",
    )
    monkeypatch.setattr("sys.argv", ["vtv", "collect", str(tmp_path / "model"), *options, "-o", str(out)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    vectors = TaskVectors.load(out)
    assert {name: vector.count for name, vector in vectors.items()} == {"segmentation": 3, "lowlight": 3}


def test_evaluation_as_published_is_over_folds(published, voc_root, small_config, tmp_path):
    MAEVQGANModel(small_config()).save_pretrained(tmp_path / "model")
    args = [
        "evaluate",
        tmp_path / "model",
        "--data",
        f"pascal:{voc_root}",
        "--published",
        "--n",
        7,
        "-o",
        tmp_path / "out",
    ]
    result = CliRunner().invoke(cli.app, list(map(str, args)))
    assert result.exit_code == 0, result.output
    frame = Table.load(tmp_path / "out" / "values.parquet").frame
    assert frame.groupby("fold").image.nunique().to_dict() == dict.fromkeys(range(4), 7)
    assert "pictures, 28 prompts" in result.output  # each fold's six pictures begin again
