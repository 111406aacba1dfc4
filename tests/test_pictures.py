"""The pictures that the package carries: what they promise to the tasks, and that each may be carried."""

import io
from collections import Counter, defaultdict

import numpy as np
import pytest
from compose_pictures import compose
from PIL import Image

from vtv_nnsight import data, tasks
from vtv_nnsight.data.embedded_pictures import EMBEDDED, SIZE, credits
from vtv_nnsight.layouts import Layout

FREE = {"public domain", "CC0", "MIT", "Apache-2.0", "BSD", "OFL-1.1", *(f"CC BY {n}.0" for n in range(1, 5))}


@pytest.fixture(scope="module", params=["train", "test"])
def rows(request):
    return data.pictures(request.param)


def test_the_columns(rows):
    row = rows[0]
    assert rows.column_names == ["image", "mask", "label", "name", "source", "licence", "object", "background"]
    assert row["image"].mode == "RGB" and row["image"].size == (SIZE, SIZE)
    assert row["mask"].mode == "L" and row["mask"].size == (SIZE, SIZE)
    assert rows.features["label"].names == sorted({row["label"] for row in credits()} - {""})


def test_masks_are_binary_and_show_a_reasonable_part(rows):
    masks = np.stack([np.asarray(mask) for mask in rows["mask"]])
    assert set(np.unique(masks)) == {0, 255}
    covered = (masks > 0).mean((1, 2))
    assert covered.min() > 0.02 and covered.max() < 0.9 and 0.1 < np.median(covered) < 0.4


def test_pictures_differ_and_none_is_blank(rows):
    pictures = np.stack([np.asarray(image) for image in rows["image"]])
    assert len(np.unique(pictures[:, ::8, ::8].reshape(len(rows), -1), axis=0)) == len(rows)
    assert pictures.reshape(len(rows), -1).std(1).min() > 8


def test_every_label_has_two_objects_in_a_split_that_has_it(rows):
    objects = defaultdict(set)
    for label, source in zip(rows["label"], rows["source"]):
        objects[label].add(source.split("; ")[0])
    assert min(map(len, objects.values())) >= 2


def test_there_are_as_many_as_the_docstring_says_and_photographs_dominate():
    look = {f"{row['package']}: {row['file']}": row["look"] for row in credits()}
    for split, least in (("train", 550), ("test", 280)):
        rows = data.pictures(split)
        assert least <= len(rows) <= 1.25 * least and len(set(rows["label"])) >= 20
        looks = Counter(look[source.split("; ")[0]] for source in rows["source"])
        assert looks["photograph"] > 0.55 * len(rows)


def test_no_source_is_in_two_splits_and_all_are_credited():
    sources = {
        split: {part for source in data.pictures(split)["source"] for part in source.split("; ")}
        for split in ("train", "test")
    }
    assert not sources["train"] & sources["test"]
    credited = {(f"{row['package']}: {row['file']}", row["split"]) for row in credits()}
    for split, parts in sources.items():
        assert {(part, split) for part in parts} <= credited
    assert len(credited) == len({source for source, _ in credited})


def test_every_source_may_be_carried():
    for row in credits():
        assert row["licence"] in FREE and row["package"] and row["version"] and row["file"] and row["author"]
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) < 4e6


def test_all_five_tasks_run_on_them(rows):
    for task in tasks.VTV:
        prompts = task.prompts(rows, n=3, seed=0, layout=Layout(canvas_size=112, patch_size=8))
        assert len(prompts) == 3


def test_some_rows_and_through_load():
    some = data.pictures("test", n=7, seed=1)
    assert len(some) == 7 and some["source"] == data.pictures("test", n=7, seed=1)["source"]
    assert some["source"] != data.pictures("test", n=7, seed=2)["source"]
    assert len(data.load("pictures", "test", n=5)) == 5
    assert data.load("pictures", "validation")["source"] == data.pictures("test")["source"]  # two parts only
    with pytest.raises(ValueError, match="split='validation'"):
        data.pictures("validation")


@pytest.mark.parametrize(("arguments", "message"), [(dict(split="trn"), "split='trn'.*choose from train, test")])
def test_what_pictures_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.pictures(**arguments)


def test_objects_are_composed_with_their_exact_masks():
    """A red disc over blue: what the mask shows is what is red."""
    y, x = np.mgrid[-1:1:80j, -1:1:80j]
    disc = Image.new("RGB", (80, 80), (220, 30, 30))
    disc.putalpha(Image.fromarray((255 * (x**2 + y**2 < 0.9)).astype(np.uint8)))
    about = dict(split="train", look="render", cut="alpha", scene="", licence="CC0", package="tests", title="disc")
    sources = [
        (dict(about, label="ball", file="disc.png"), disc),
        (dict(about, label="", file="blue.png"), Image.new("RGB", (300, 200), (40, 60, 200))),
    ]
    (row,) = compose(sources, np.random.default_rng(0))
    image, mask = (Image.open(io.BytesIO(row[key]["bytes"])).convert("RGB") for key in ("image", "mask"))
    image, mask = np.asarray(image, int), np.asarray(mask)
    red = image[..., 0] > image[..., 2]
    shown = mask[..., 0] > 0
    assert (red & shown).sum() / (red | shown).sum() > 0.95
    assert row["source"] == "tests: disc.png; tests: blue.png" and row["licence"] == "CC0"
