"""Figures to train on: composed ones and a person's own, and what they hide."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

pytest.importorskip("skimage")

import data_size

from vtv_nnsight import MAEVQGAN, Layout, tasks
from vtv_nnsight.cli import app
from vtv_nnsight.training import pretrain
from vtv_nnsight.training.corpus import CUTOUT, PHOTO, Corpus, Picture
from vtv_nnsight.training.curriculum import HELD_OUT
from vtv_nnsight.training.figures import cropped, fitted, listed
from vtv_nnsight.training.mae import HIDDEN, random_mask


@pytest.fixture(scope="module")
def corpus():
    """Photographs of noise and discs that are cut out."""
    generator = np.random.default_rng(0)
    pictures = []
    for i in range(6):
        image = Image.fromarray(generator.integers(0, 256, (90, 120, 3), dtype=np.uint8))
        pictures.append(Picture(image, PHOTO, ""))
        cutout = image.copy()
        alpha = Image.new("L", image.size)
        ImageDraw.Draw(alpha).ellipse((20, 10, 100, 80), fill=255)
        cutout.putalpha(alpha)
        pictures.append(Picture(cutout, CUTOUT, f"disc{i % 2}"))
    return Corpus(pictures)


@pytest.mark.parametrize("draw", [data_size.composed, cropped])
def test_canvases_depend_on_seed_and_step_alone(draw, corpus):
    first = draw(3, 5, 40, 0, corpus)
    assert first.shape == (5, 3, 40, 40) and first.dtype == torch.float32 and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, draw(3, 5, 40, 0, corpus))
    for other in (draw(4, 5, 40, 0, corpus), draw(3, 5, 40, 1, corpus), draw(3, 5, 40, 0, corpus).flip(0)):
        assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", data_size.FIGURES)
def test_figures_are_grids_on_white(kind, corpus):
    """All are near the size asked for, and most have white rows or columns from side to side."""
    generator, separated = np.random.default_rng(0), 0
    for _ in range(20):
        figure = data_size.compose_figure(corpus, 160, generator, kind)
        assert figure.mode == "RGB" and 0.65 * 160 <= max(figure.size) <= 1.4 * 160
        white = (np.asarray(figure) == 255).all(-1)
        separated += white.all(0).any() or white.all(1).any()
    assert separated >= 15


def test_a_row_of_changes_shows_one_picture(corpus, monkeypatch):
    """With tasks that leave the picture as it is, all of a row's pictures are the same, and rows differ."""
    monkeypatch.setattr(data_size, "draw_task", lambda generator, masks: tasks.identity + tasks.identity)
    grid = data_size._changed(corpus, 3, 4, 24, np.random.default_rng(1))
    assert [len(line) for line in grid] == [4, 4, 4]
    first = [np.asarray(line[0]) for line in grid]
    for line in grid:
        assert all(np.array_equal(np.asarray(line[0]), np.asarray(cell)) for cell in line)
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[1], first[2])


def test_no_figure_holds_the_parts_of_a_task_that_is_held_out(corpus, monkeypatch):
    drawn = []
    own = data_size.draw_task
    monkeypatch.setattr(data_size, "draw_task", lambda *a: drawn.append(own(*a)) or drawn[-1])
    refused = []
    whether = data_size.is_held_out
    monkeypatch.setattr(data_size, "is_held_out", lambda task: refused.append((task, whether(task))) or refused[-1][1])
    generator = np.random.default_rng(0)
    for _ in range(60):
        data_size._changed(corpus, 1, 4, 16, generator)
    assert any(held for _, held in refused)  # such figures were drawn, and drawn again
    kept = [set(task.parts) for task, held in refused if not held]
    assert not any(parts >= set(getattr(held, "parts", (held,))) for parts in kept for held in HELD_OUT)


def test_parts_of_a_figure_keep_to_their_area_and_aspect():
    """On a picture with colours that tell the place, the part's extent is read off."""
    across, down = np.meshgrid(np.arange(256), np.arange(256))
    figure = Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))
    generator, mirrored = np.random.default_rng(0), 0
    for _ in range(40):
        part = np.asarray(fitted(figure, 32, generator)).astype(float)
        width, height = (np.ptp(part[..., channel].mean(axis)) / 255 for channel, axis in ((0, 0), (1, 1)))
        mirrored += part[0, 0, 0] > part[0, -1, 0]
        assert 0.15 <= width * height <= 1.0 and 0.7 <= width / height <= 1.45
    assert 10 <= mirrored <= 30


def test_a_random_mask_hides_three_quarters_anywhere():
    layout, generator = Layout(56, 4), torch.Generator().manual_seed(0)
    visible, hidden = random_mask(layout, 64, generator)
    assert hidden.shape == (64, round(HIDDEN * 196)) and visible.shape == (64, 49)
    both = torch.cat([visible, hidden], 1).sort(1).values
    assert torch.equal(both, layout.all_patches.expand(64, -1))
    assert len(visible.unique()) == 196 and not torch.equal(visible[0], visible[1])


@pytest.fixture
def cvf(tmp_path):
    """A folder as VP's script leaves it: of a list's three figures one is missing, and one is on no list."""
    files = ["train/2106.1/a.pdf_2106.1_0.png", "train/2106.1/b.jpg", "train/1804.2/other.png", "train/1804.2/v.png"]
    for shade, name in enumerate(files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (50 * shade + 50, 0, 0)).save(tmp_path / name, "PNG")
    (tmp_path / "df_train.csv").write_text(",paper_id,img_name\n0,2106.1,a.pdf\n1,2106.1,b.jpg\n2,2106.10,c.png\n")
    (tmp_path / "df_val.csv").write_text(",paper_id,img_name\n0,1804.2,v.png\n")
    return tmp_path


def test_figures_of_vp_are_read_by_their_lists(cvf):
    with pytest.warns(UserWarning, match="1 of the 3 figures of .*df_train.csv are not there"):
        train = listed(cvf)
    assert [Path(*file.parts[-2:]).as_posix() for file in train.files] == ["2106.1/a.pdf_2106.1_0.png", "2106.1/b.jpg"]
    assert [file.name for file in listed(cvf, "val").files] == ["v.png"]
    reds = {round(float(canvas[0].mean()) * 255) for canvas in cropped(0, 12, 16, 0, train)}
    assert reds == {50, 100}  # both are drawn, and no other
    (cvf / "train/2106.1/b.jpg").write_bytes(b"cut short")
    assert {round(float(canvas[0].mean()) * 255) for canvas in cropped(0, 12, 16, 0, train)} == {50}


def test_lists_of_figures_that_cannot_serve_are_told(cvf):
    with pytest.raises(FileNotFoundError, match="put the released lists df_train.csv and df_val.csv there"):
        listed(cvf / "train")
    (cvf / "df_val.csv").write_text("paper_id,img_name\n1,gone.png\n")
    with pytest.raises(ValueError, match="none of the 1 figures"):
        listed(cvf, "val")
    (cvf / "df_val.csv").write_text("paper,figure\n1,gone.png\n")
    with pytest.raises(ValueError, match="no column img_name"):
        listed(cvf, "val")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:1 of the 3 figures")
def test_a_model_is_trained_on_figures_of_ones_own(tmp_path, cvf):
    mine = tmp_path / "mine"
    mine.mkdir()
    for i in range(3):
        Image.effect_noise((90, 60), 60 + i).save(mine / f"{i}.png")
    pretrain("tokenizer", "smoke", tmp_path / "run", steps=3)
    logs = []
    for name, data in {"own": str(mine), "vp": f"cvf:{cvf}"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer").symlink_to(tmp_path / "run" / "tokenizer")
        given = ["pretrain", "mae", "--config", "smoke", "--steps", "3", "--data", data, "--out", str(tmp_path / name)]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, done.output
        logs.append(json.loads((tmp_path / name / "mae" / "log.jsonl").read_text())["loss"])
        assert MAEVQGAN(tmp_path / name / "mae" / "model").config.image_size == 56
    assert len(set(logs)) == 2


def test_data_that_cannot_be_trained_on_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'mine' is for the stage 'mae'; the tokenizer"):
        pretrain("tokenizer", "smoke", tmp_path, data="mine")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        pretrain("mae", "smoke", tmp_path, data="nowhere")
    with pytest.raises(ValueError, match="no picture"):
        pretrain("mae", "smoke", tmp_path, data=tmp_path)


def test_a_corpus_of_cutouts_alone_has_no_figures(tmp_path):
    Image.new("RGBA", (40, 40), "red").save(tmp_path / "a.png")
    (tmp_path / "manifest.csv").write_text("file,kind,package,source,split\na.png,cutout,some,a.png,train\n")
    with pytest.raises(ValueError, match="lists no photographs; give a folder of figures"):
        pretrain("mae", "smoke", tmp_path, data=tmp_path)
