"""Golden numbers, and checkpoints whose weights are a function of their names (see data/make_checkpoint.py)."""

import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes that each take all cores are slower than one
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig
from vtv_nnsight.models.mae_vqgan.published import load_checkpoint
from vtv_nnsight.progress import progress_bar

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def no_bar_left_open():
    """A progress bar that a failing loop leaves open would take in those of the tests after it."""
    yield
    assert not progress_bar._shown, "a progress bar was left open"


@pytest.fixture(scope="session")
def golden():
    """The papers' own numbers, by name."""
    return load_file(DATA / "model.safetensors") | load_file(DATA / "canvases.safetensors")


@pytest.fixture(scope="session")
def script():
    """The module data/make_checkpoint.py."""
    spec = importlib.util.spec_from_file_location("make_checkpoint", DATA / "make_checkpoint.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="session")
def weight_of(script):
    """weight_of(name, shape, seed) → the golden weight of that name."""
    return script.tensor


@pytest.fixture(scope="session")
def make_checkpoint(script, tmp_path_factory):
    """make_checkpoint(*options) → the path of a checkpoint that data/make_checkpoint.py wrote."""

    def make(*options):
        path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["make_checkpoint.py", str(path), *map(str, options)])
            script.main()
        return path

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint):
    """A small checkpoint in the published layout, tokenizer included."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def split_checkpoint(make_checkpoint, tmp_path_factory):
    """The same, with the tokenizer in a file of its own: (path, vqgan)."""
    vqgan = tmp_path_factory.mktemp("vqgan") / "last.ckpt"
    return make_checkpoint("--split-vqgan", vqgan), vqgan


@pytest.fixture(scope="session")
def shapes():
    """Name → shape of every tensor of `checkpoint`."""
    return json.loads((DATA / "state_dict_shapes.json").read_text())


@pytest.fixture(scope="session")
def golden_model(checkpoint):
    """The model whose numbers are golden. Do not change its weights."""
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="session")
def rows():
    """The golden pictures as rows of data: the example and the query, masks of class 14 (0-based)."""

    def row(name):
        mask = np.asarray(Image.open(DATA / f"{name}_mask.png")) == 15
        return {"image": Image.open(DATA / f"{name}_image.png"), "mask": Image.fromarray(mask.astype(np.uint8) * 255)}

    return row("support"), row("query")


def make_config(**sizes):
    """A config that is quick to build: a canvas of 64, patches of 16."""
    small = dict(
        image_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        num_codes=24,
        code_dim=8,
        vqgan_z_channels=8,
        vqgan_channels=32,
        vqgan_channel_multipliers=(1, 1, 2),
        vqgan_num_res_blocks=1,
        vqgan_attention_levels=(2,),
        vqgan_fold=4,
    )
    return MAEVQGANConfig(**small | sizes)


FINE = dict(
    image_size=112,
    patch_size=8,
    num_hidden_layers=3,
    decoder_num_hidden_layers=2,
    num_codes=64,
    vqgan_channel_multipliers=(1, 1, 1),
    vqgan_fold=2,
)
"""Of `make_config`: the published grid of 14x14 patches, on a canvas of 112."""


@pytest.fixture(scope="session")
def small_config():
    """small_config(**sizes) → a config (`make_config`)."""
    return make_config
