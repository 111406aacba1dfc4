"""Scenes, photographs and folders: what they promise to the tasks and to training."""

import colorsys
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from vtv_nnsight import data
from vtv_nnsight.data.drawn_scenes import GROUNDS, HUES, NAMES, SHAPES, SPLITS, TEXTURES, render
from vtv_nnsight.images import open_picture, read_picture

ALL_FOLDS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def drawn():
    return render("train", range(400), folds=ALL_FOLDS)


def test_scenes_are_a_dataset_of_images_masks_and_named_labels():
    images = data.scenes("train", n=5)
    assert images.column_names == ["image", "mask", "label"] and len(images) == 5
    row, arrays = images[3], render("train", [3])
    assert (row["image"].mode, row["mask"].mode, row["image"].size) == ("RGB", "L", (64, 64))
    assert np.array_equal(row["image"], arrays.images[0]) and np.array_equal(row["mask"], arrays.masks[0])
    assert row["label"] == arrays.labels[0] and images.features["label"].names == list(NAMES)


def test_a_scene_depends_on_its_split_index_and_seed_only(drawn):
    alone = render("train", [399, 7], folds=ALL_FOLDS)
    for batched, single in zip(drawn, alone):
        assert np.array_equal(batched[[399, 7]], single)
    assert not np.array_equal(render("train", [7], seed=1, folds=ALL_FOLDS).images, alone.images[1:])


def test_splits_share_no_scene():
    pictures = [
        image.tobytes() for split in SPLITS for seed in (0, 1) for image in render(split, range(200), seed).images
    ]
    assert len(set(pictures)) == len(pictures)


def test_the_default_never_shows_the_fourth_fold(drawn):
    assert set(render("train", range(300)).labels) == set(range(15))
    assert set(render("test", range(100), folds=[3]).labels) == set(range(15, 20))
    assert np.bincount(drawn.labels, minlength=20).min() >= 5


def test_classes_are_unique_and_only_the_heart_is_a_shape_of_the_fourth_fold_alone():
    pairs = [name.split() for name in NAMES]
    assert len(set(HUES.values())) == len(NAMES) == 20 and len(GROUNDS) == 8
    assert {texture for texture, _ in pairs} == set(TEXTURES) and {shape for _, shape in pairs} == set(SHAPES)
    seen = {shape for _, shape in pairs[:15]}
    assert set(SHAPES) - seen == {"heart"}


@pytest.mark.parametrize("size", [32, 64, 97])
def test_masks_are_binary_and_cover_a_reasonable_part(size):
    masks = render("validation", range(100), folds=ALL_FOLDS, size=size).masks
    assert masks.shape == (100, size, size) and set(np.unique(masks)) == {0, 255}
    area = (masks > 0).mean((1, 2))
    assert area.min() > 0.08 and area.max() < 0.47


def test_the_mask_is_where_the_class_is_seen(drawn):
    """Inside the mask the mean hue is the class's, and the lightness differs from the ground's."""
    images, masks = drawn.images / 255, drawn.masks > 0
    luma = images @ [0.299, 0.587, 0.114]
    contrasts = []
    for picture, grey, mask, label in zip(images, luma, masks, drawn.labels):
        hue, _, _ = colorsys.rgb_to_hsv(*picture[mask].mean(0))
        assert abs((hue * 360 - list(HUES.values())[label] + 180) % 360 - 180) < 12
        contrasts.append(abs(grey[mask].mean() - grey[~mask].mean()))
    assert np.quantile(contrasts, 0.02) > 0.2


def test_a_mask_has_no_pixel_of_the_ground(drawn):
    """Away from the edge, every pixel inside has the hue of its class."""
    masks = drawn.masks > 0
    inner = masks[:, 1:-1, 1:-1] & masks[:, :-2, 1:-1] & masks[:, 2:, 1:-1] & masks[:, 1:-1, :-2] & masks[:, 1:-1, 2:]
    for picture, mask, label in zip(drawn.images[:60, 1:-1, 1:-1], inner, drawn.labels):
        hues = [360 * colorsys.rgb_to_hsv(*pixel)[0] for pixel in picture[mask][::5] / 255]
        away = np.abs((np.array(hues) - list(HUES.values())[label] + 180) % 360 - 180)
        assert away.max() < 12


def test_no_ground_is_flat(drawn):
    greys = drawn.images.mean(-1)
    spread = [grey[mask == 0].std() for grey, mask in zip(greys, drawn.masks)]
    assert min(spread) > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(split="training"), "split='training'.*train.*validation.*test"),
        (dict(n=0), "a list of rows from 0 was expected"),
        (dict(n=-2), "a list of rows from 0 was expected"),
        (dict(folds=(0, 4)), r"folds=\(0, 4\).*\(0, 1, 2, 3\)"),
        (dict(folds=()), r"folds=\(\)"),
        (dict(size=8), "size=8.*at least 32"),
    ],
)
def test_what_scenes_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.scenes(**arguments)


def test_what_render_refuses():
    for indices in ([], [-1], [[0]]):
        with pytest.raises(ValueError, match="rows from 0"):
            render("train", indices)


def test_a_folder_of_mixed_pictures_with_broken_ones(tmp_path):
    picture = Image.fromarray(render("train", [0], size=96).images[0])
    (tmp_path / "deeper").mkdir()
    picture.save(tmp_path / "a.png")
    picture.resize((200, 77)).save(tmp_path / "deeper" / "b.JPG", "JPEG")
    picture.convert("L").save(tmp_path / "c.bmp")
    picture.putalpha(128)
    picture.save(tmp_path / "train [1].webp")
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / ".d.png").write_text("hidden")
    (tmp_path / "broken.png").write_text("not a picture either")
    (tmp_path / "short.jpg").write_bytes((tmp_path / "deeper" / "b.JPG").read_bytes()[:1500])
    with pytest.warns(UserWarning, match=r"2 of 6 files .* left out: broken\.png, short\.jpg") as caught:
        images = data.folder(tmp_path)
    assert caught[0].filename == __file__
    assert images.column_names == ["image"]
    assert [row["image"].size for row in images] == [(96, 96), (96, 96), (200, 77), (96, 96)]
    assert [row["image"].mode for row in images] == ["RGB", "L", "RGB", "RGBA"]


def test_a_folder_leaves_out_and_names_what_no_task_can_take(tmp_path):
    """Names that are not UTF-8, pictures of more pixels than Pillow opens without a warning, pipes, broken links."""
    picture = Image.effect_noise((40, 40), 60)
    picture.save(tmp_path / "a.png")
    picture.save(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png"))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("nowhere.png")
    Image.new("1", (12_000, 12_000)).save(tmp_path / "vast.png")
    for _ in range(2):  # as when a run goes on
        with pytest.warns(UserWarning, match="4 of 5 files .* left out: ") as caught:
            (row,) = data.folder(tmp_path)
        assert row["image"].size == (40, 40)
        assert {"caf\\xe9.png", "link.png", "pipe.png", "vast.png"} == set(
            str(caught[0].message).partition("left out: ")[2].rstrip(".").split(", ")
        )
    with pytest.raises(ValueError, match="vast.png has more than .* pixels"):
        read_picture(tmp_path / "vast.png")
    for read in (read_picture, open_picture):
        with pytest.raises(ValueError, match="pipe.png is a device or a pipe; expected a file|pipe.png cannot be read"):
            read(tmp_path / "pipe.png")


def test_a_folder_of_whole_pictures_warns_of_nothing(tmp_path, recwarn):
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    assert len(data.folder(str(tmp_path))) == 1 and not recwarn.list


def test_what_folder_refuses(tmp_path):
    with pytest.raises(ValueError, match="no picture that can be read"):
        data.folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        data.folder(tmp_path / "missing")
    (tmp_path / "broken.png").write_text("not a picture")
    with pytest.warns(UserWarning, match="broken.png"), pytest.raises(ValueError, match="no picture that can be read"):
        data.folder(tmp_path)


def digests(rows):
    """What the pictures of rows look like, decoded: two files of one picture are one. Of words, what a task asks."""
    if "image" not in rows.column_names:
        return {(row["task"], row["input"]) for row in rows}
    return {np.asarray(row["image"].convert("RGB")).tobytes() for row in rows}


def pictures(n):
    return [Image.fromarray(image) for image in render("train", range(n), size=32).images]


@pytest.fixture
def specs(voc_root, tmp_path, monkeypatch):
    """A spec for every source, and for every way to write it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    photos, hub, divided = tmp_path / "photos", tmp_path / "hub", tmp_path / "divided"
    for folder in (photos, hub, divided):
        folder.mkdir()
    for i, picture in enumerate(pictures(21)):
        picture.save(photos / f"{i:02}.png")
    (photos / "a copy of 03.png").write_bytes((photos / "03.png").read_bytes())
    rows = Dataset.from_dict({"image": pictures(24)}).cast_column("image", data.folder(photos).features["image"])
    rows.select(range(16)).to_parquet(hub / "train.parquet")
    rows.select(range(16)).to_parquet(divided / "train.parquet")
    rows.select(range(16, 24)).to_parquet(divided / "validation.parquet")
    paired = tmp_path / "paired"
    for name in ("inputs", "answers"):
        (paired / name).mkdir(parents=True)
        for i, picture in enumerate(pictures(9)):
            picture.save(paired / name / f"{i}.png")
    return {
        "pictures": ["pictures"],
        "scenes": ["scenes"],
        "pascal": [f"pascal:{voc_root}:masks", f"pascal:{voc_root}:0:masks"],
        "detection": [f"detection:{voc_root}"],
        "hub": [
            f"hub:{hub}",
            f"hub:{hub}:train",
            f"hub:{divided}",
            f"hub:{divided}:validation",
            f"hub:{hub}:train[:12]",
        ],
        "pairs": [f"pairs:{paired}"],
        "folder": [str(photos), f"folder:{photos}"],
        "words": ["words"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", data.SOURCES)
def test_what_is_tested_on_was_never_learned_from(specs, name):
    """Of every source, and whatever the seeds, no picture of "train" is in another split."""
    assert set(specs) == set(data.SOURCES)
    for spec in specs[name]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # classes of a single picture
            train = digests(data.load(spec, "train", 600, seed=0)) | digests(data.load(spec, "train", 100, seed=5))
            for split in ("validation", "test"):
                for seed in (0, 1):
                    held = digests(data.load(spec, split, 300, seed=seed))
                    assert held and not held & train, (spec, split)


@pytest.mark.parametrize("name", [name for name in data.SOURCES if name != "detection"])
def test_split_data(specs, name):
    for spec in specs[name]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            train, test = data.split_data(spec, 40, 20, seed=3)
        assert len(train) <= 40 and 2 <= len(test) <= 20 and not digests(train) & digests(test)
        assert not set(data.identities(train)) & set(data.identities(test))


def test_a_source_that_is_not_divided_keeps_a_quarter_of_its_pictures(specs):
    everything, train, test = (data.load(specs["folder"][0], split) for split in (None, "train", "test"))
    assert (len(everything), len(train) + len(test)) == (22, 22) and len(set(data.identities(test))) == 21 // 4
    copies = [i for i in data.identities(everything) if data.identities(everything).count(i) == 2]
    assert len(set(copies)) == 1 and data.identities(train).count(copies[0]) in (0, 2)
    held = set(data.identities(test))
    for path in sorted(Path(specs["folder"][0]).iterdir()):
        path.rename(path.with_name(path.name.replace("0", "x")))
    assert set(data.identities(data.load(specs["folder"][0], "test"))) == held


def test_pictures_in_both_splits_of_a_data_set_are_not_tested_on(specs, tmp_path):
    leaky = tmp_path / "leaky"
    leaky.mkdir()
    rows = Dataset.from_dict({"image": pictures(12)}).cast_column(
        "image", data.folder(tmp_path / "photos").features["image"]
    )
    rows.select(range(8)).to_parquet(leaky / "train.parquet")
    rows.select(range(5, 12)).to_parquet(leaky / "test.parquet")
    with pytest.warns(UserWarning, match="3 test pictures of hub:.*leaky are among its training pictures"):
        train, test = data.split_data(f"hub:{leaky}")
    assert (len(train), len(test)) == (8, 4) and not digests(train) & digests(test)
    rows.select(range(7)).to_parquet(leaky / "test.parquet")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="8 pictures to learn from and 0 to test on"):
        data.split_data(f"hub:{leaky}")


def test_a_sources_name_is_not_a_folders(specs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("scenes", "pascal", "holiday"):
        (tmp_path / "photos").rename(tmp_path / name)
        if name == "scenes":
            assert len(data.load("scenes", n=7)) == 7 and len(data.load("./scenes")) == 22
        elif name == "pascal":
            with pytest.raises(
                ValueError, match=r"'pascal' is not a source of data; .*a folder by its path \(\./scenes\)"
            ):
                data.load("pascal")
        else:
            assert len(data.load("holiday")) == 22
        (tmp_path / name).rename(tmp_path / "photos")


def test_what_load_refuses(specs, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(6):
        pictures(2)[i % 2].save(few / f"{i}.png")
    with pytest.raises(ValueError, match="few holds 2 different pictures .* give 4 or more"):
        data.load(str(few), "test")
    assert len(data.load(str(few))) == 6
    for spec in ("scenes", "pictures", specs["folder"][0], f"{specs['hub'][0]}:train"):
        with pytest.raises(ValueError, match="split='trian'"):
            data.load(spec, "trian")
    assert all(source.usage.startswith(name) and source.help for name, source in data.SOURCES.items())
