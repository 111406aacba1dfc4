import json

import pytest
import torch
from helpers import make_config, vit_mae_config
from safetensors.torch import load_file, save_file
from transformers import ViTMAEForPreTraining

from vtv_nnsight import MAEVQGAN, ViTMAE
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel


@pytest.fixture
def folder(tmp_path):
    MAEVQGANModel(make_config()).save_pretrained(tmp_path)
    return tmp_path


def configured(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def indexed(folder, **weight_map):
    """The folder with its weights in one shard, a.safetensors, and an index of it, some of whose entries are others."""
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors") | weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refused(folder, words, model=MAEVQGAN, error=ValueError):
    """That a folder is refused in one sentence, whether its weights are read at once or later."""
    for dispatch in (True, False):
        with pytest.raises(error, match=words) as caught:
            model(folder, dispatch=dispatch).dispatch()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads=0 in the model's config; expected whole numbers from 1"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"hidden_size": -32}, "hidden_size=-32"),
        ({"patch_size": True}, "patch_size=True"),
        ({"image_size": 10**9}, "image_size=1000000000 .* from 1 to 4096"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers=5000 .* from 1 to 256"),
        ({"vqgan_channel_multipliers": "112"}, "vqgan_channel_multipliers='112'"),
        ({"vqgan_channel_multipliers": [1] * 99}, "the VQGAN reduces"),
        ({"vqgan_attention_levels": [7]}, "unknown to MAEVQGAN"),
        ({"image_std": [0, 1, 1]}, r"image_std=\[0, 1, 1\]"),
        ({"image_mean": 0.5}, "image_mean=0.5"),
        ({"mlp_ratio": "4"}, "mlp_ratio='4'"),
        ({"dtype": "os.system"}, "dtype='os.system' is unknown; give a floating-point one"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"num_codes": 77}, r"decoder.head.weight of shape \[24, 16\]; the sizes in its config ask for \[77, 16\]"),
        ({"num_hidden_layers": 3}, r"encoder.blocks.2.attn.proj.bias, .* and 8 more missing; it is incomplete"),
        ({"num_hidden_layers": 1}, r"encoder.blocks.1.attn.proj.bias, .* unknown to MAEVQGAN"),
        ({"model_type": "bert"}, "is a bert model; expected mae_vqgan"),
        ({"model_type": None}, "config.json does not say its model_type"),
    ],
)
def test_configs_that_lie(folder, settings, words):
    configured(folder, **settings)
    refused(folder, words)


def test_configs_that_are_none(folder):
    for text, words in (("{", "is not JSON"), ("[]", "does not say its model_type"), ("[" * 10**5, "is not JSON")):
        (folder / "config.json").write_text(text)
        refused(folder, words)
    (folder / "config.json").unlink()
    refused(folder, "there is no .*config.json", error=FileNotFoundError)


def test_weights_that_are_cut_whole_numbers_or_absent(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    numbers = {name: value.to(torch.int32) for name, value in load_file(weights).items()}
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 100):
        weights.write_bytes(content)
        refused(
            folder,
            r"model.safetensors is (truncated, damaged or no safetensors file: |not a complete safetensors file \()",
        )
    save_file(numbers, weights, metadata={"format": "pt"})
    refused(folder, "model.safetensors: .* holds I32; expected floating point")
    weights.unlink()
    refused(folder, "has no model.safetensors; a model folder has one")


def test_an_index_that_lies(folder):
    indexed(folder)
    MAEVQGAN(folder, dispatch=True)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for entry, words in (
        ({"nowhere": "a.safetensors"}, "looks for nowhere in a.safetensors, which does not have it"),
        ({"nowhere": "b.safetensors"}, "looks for nowhere in b.safetensors, which is not there"),
        ({"nowhere": "../a.safetensors"}, r"in '\.\./a.safetensors'; expected a file of its folder"),
        ({"nowhere": 3}, "in 3; expected a file of its folder"),
    ):
        index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | entry}))
        refused(folder, words)
    index.write_text("{}")
    refused(folder, "index.json does not say its weight_map")


def test_folders_of_other_models_are_checked_alike(tmp_path):
    ViTMAEForPreTraining(vit_mae_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for settings, words in (
        ({"num_attention_heads": 0}, "no model can be built of the config of "),
        ({"hidden_size": 32}, "of shape .*; the sizes in its config ask for"),
        ({"num_hidden_layers": 3}, "vit.layers.2.* missing; it is incomplete"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | settings))
        refused(tmp_path, words, ViTMAE)
