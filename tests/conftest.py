"""Golden numbers, and checkpoints with weights that are a function of their names (see data/make_checkpoint.py)."""

import importlib.util
import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes that each take all cores are slower than one
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from helpers import (
    DALLE_CODES,
    DATA,
    GROUPED,
    VOC_MAPS,
    VOC_OBJECTS,
    VOC_SIZE,
    Conv,
    Part,
    annotation,
    letters,
    make_config,
)
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from vtv_nnsight import MAEVQGAN, CausalLM, PatchSet, PatchSpace, TaskVectors, cli, data, tasks
from vtv_nnsight.demo.playing import Player
from vtv_nnsight.demo.words import load_players
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.models.mae_vqgan.published import load_checkpoint
from vtv_nnsight.runs import bundles
from vtv_nnsight.search.result import SearchResult


@pytest.fixture(autouse=True)
def no_bar_left_open():
    """A progress bar that a failing loop leaves open would take in those of the tests after it."""
    yield
    assert not tqdm._instances, "a progress bar was left open"


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
    """The same, with the tokenizer in a second file: (path, vqgan)."""
    vqgan = tmp_path_factory.mktemp("vqgan") / "last.ckpt"
    return make_checkpoint("--split-vqgan", vqgan), vqgan


@pytest.fixture(scope="session")
def shapes():
    """Name → shape of every tensor of `checkpoint`."""
    return json.loads((DATA / "state_dict_shapes.json").read_text())


@pytest.fixture(scope="session")
def golden_model(checkpoint):
    """The model of the golden numbers. Do not change its weights."""
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="session")
def rows():
    """The golden pictures as rows of data: the example and the query, masks of class 14 (0-based)."""

    def row(name):
        mask = np.asarray(Image.open(DATA / f"{name}_mask.png")) == 15
        return {"image": Image.open(DATA / f"{name}_image.png"), "mask": Image.fromarray(mask.astype(np.uint8) * 255)}

    return row("support"), row("query")


@pytest.fixture(scope="session")
def small_config():
    """small_config(**sizes) → a config (`make_config`)."""
    return make_config


@pytest.fixture
def vtv(monkeypatch, capsys):
    """vtv(*args) → (exit code, what was printed, what was complained about)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["vtv", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


def random_results(vectors, space, size):
    """Task → a result with random units, as a search would give it."""
    return {
        name: SearchResult("random", PatchSet.random(space, size, seed), torch.zeros(len(space)).double(), False, 1.0,
                           1, (), {}, seed)
        for seed, name in enumerate(vectors)
    }  # fmt: skip


@pytest.fixture(scope="module")
def player(small_config):
    """What the page of `vtv demo` computes with: a small model with vectors and units of two tasks."""
    torch.manual_seed(0)
    model = MAEVQGAN(MAEVQGANModel(small_config()).eval())
    rows = list(data.scenes("train", n=12, seed=0))
    prompts = {t.name: t.prompts(rows, 3, layout=model.layout) for t in (tasks.segmentation, tasks.lowlight)}
    vectors, space = TaskVectors.collect(model, prompts, progress=False), PatchSpace(model)
    return Player(model, bundles.Bundle(vectors, random_results(vectors, space, 8)), rows)


@pytest.fixture(scope="module")
def word_player(tmp_path_factory):
    """What the tab for words computes with: a small language model in a folder, with vectors and units of two tasks in
    another."""
    folder = tmp_path_factory.mktemp("words")
    torch.manual_seed(0)
    CausalLM(LlamaForCausalLM(LlamaConfig(**GROUPED)), tokenizer=letters()).save_pretrained(folder / "model")
    model = CausalLM(folder / "model", dispatch=True)
    asked = [tasks.words(name) for name in ("antonym", "plural")]
    prompts = {task.name: task.prompts(task.rows, 4, shots=2) for task in asked}
    vectors, space = TaskVectors.collect(model, prompts, progress=False), PatchSpace(model)
    bundles.Bundle(vectors, random_results(vectors, space, 6)).save(folder / "vectors")
    return load_players(str(folder / "vectors"), str(folder / "model"))[1]


@pytest.fixture(scope="module")
def dalle_parts():
    """The modules of a small DALL-E tokenizer, as they were published: "encoder" and "decoder"."""
    torch.manual_seed(0)
    up, pool = ("upsample", nn.Upsample(scale_factor=2, mode="nearest")), ("pool", nn.MaxPool2d(kernel_size=2))
    decoder = Part(Conv(DALLE_CODES, 12, 1), (12, 64, 32, 16, 8), (1, 3, 3, 3), up, Conv(8, 6, 1))
    encoder = Part(Conv(3, 8, 7), (8, 8, 16, 32, 64), (3, 3, 3, 1), pool, Conv(64, DALLE_CODES, 1))
    return {"decoder": decoder, "encoder": encoder}


@pytest.fixture(scope="module")
def dalle_folder(dalle_parts, tmp_path_factory):
    """A folder with both as pickled whole modules."""
    folder = tmp_path_factory.mktemp("dall-e")
    for name, part in dalle_parts.items():
        torch.save(part, folder / f"{name}.pkl")
    return folder


@pytest.fixture
def voc_root(tmp_path):
    """The folder of a small VOC 2012."""
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    folders = ("JPEGImages", "SegmentationClassAug", "Annotations", "ImageSets/Segmentation", "ImageSets/Main")
    for folder in folders:
        (voc / folder).mkdir(parents=True)
    for i, (name, mask) in enumerate(VOC_MAPS.items()):
        Image.new("RGB", VOC_SIZE, (40 * i, 100, 200)).save(voc / "JPEGImages" / f"{name}.jpg")
        mask.save(voc / "SegmentationClassAug" / f"{name}.png")
        (voc / "Annotations" / f"{name}.xml").write_text(annotation(VOC_OBJECTS[name]))
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("b1\nb2\nb3\n")
    for split, letter in (("train", "a"), ("val", "b")):
        names = [name for name in VOC_MAPS if name.startswith(letter)]
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return tmp_path
