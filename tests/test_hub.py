import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow

from vtv_nnsight import data, tasks


def rows(n=3):
    return [Pillow.new("RGB", (20, 16), (80 * i, 10, 20)) for i in range(n)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def written(tmp_path, **columns):
    folder = tmp_path / "data"
    folder.mkdir()
    kinds = {
        name: Image() if isinstance(values[0], Pillow.Image) else Value("int64") for name, values in columns.items()
    }
    Dataset.from_dict(columns, Features(kinds)).to_parquet(folder / "train.parquet")
    return str(folder)


def test_the_columns_that_tasks_use_are_kept(tmp_path):
    masks = [Pillow.new("L", (20, 16), 255)] * 3
    images = data.hub(written(tmp_path, image=rows(), mask=masks, label=[1, 1, 0], width=[20] * 3), "train")
    assert images.column_names == ["image", "mask", "label"] and images[1]["image"].getpixel((0, 0)) == (80, 10, 20)
    assert len(tasks.segmentation.prompts(images, n=2)) == 2


def test_the_only_pictures_are_the_images(tmp_path):
    images = data.hub(written(tmp_path, photo=rows(), width=[20] * 3), "train[:2]")
    assert images.column_names == ["image"] and len(images) == 2


def test_a_folder_of_pictures(tmp_path):
    for i, image in enumerate(rows()):
        (tmp_path / "pictures" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png")
    images = data.hub("imagefolder", "train", data_dir=str(tmp_path / "pictures"))
    assert images.column_names == ["image", "label"] and len(tasks.colorization.prompts(images, n=2)) == 2


def test_what_cannot_be_used_is_refused(tmp_path):
    folder = written(tmp_path, a=rows(), b=rows(), n=[1, 2, 3])
    with pytest.raises(ValueError, match="has 2 columns of pictures"):
        data.hub(folder, "train")
    with pytest.raises(ValueError, match="test"):
        data.hub(folder, "test")
    with pytest.raises(FileNotFoundError):
        data.hub(str(tmp_path / "nowhere"), "train")
