import json

import pytest
from helpers import make_config, vit_mae_config
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


def refused(folder, words, model=MAEVQGAN, error=ValueError):
    """That a folder is refused in one sentence, whether its weights are read at once or later."""
    for dispatch in (True, False):
        with pytest.raises(error, match=words) as caught:
            model(folder, dispatch=dispatch).dispatch()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_attention_heads": 0}, "hidden_size=32 is not a multiple of its 0 attention heads"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"hidden_size": -32}, "negative dimension"),
        ({"patch_size": True}, "'patch_size' expected int, got bool"),
        ({"vqgan_channel_multipliers": "112"}, "Invalid item at index 0 in sequence 'vqgan_channel_multipliers'"),
        ({"vqgan_channel_multipliers": [1] * 99}, "the VQGAN reduces"),
        ({"vqgan_attention_levels": [7]}, "vqgan.decoder.up.2.attn.0.* unknown; it is of another model"),
        ({"image_mean": 0.5}, "'image_mean' expected a Sequence, got float"),
        ({"mlp_ratio": "4"}, "'mlp_ratio' expected float, got str"),
        ({"dtype": "os.system"}, "'torch' has no attribute 'os.system'"),
        ({"dtype": "int8"}, "not a floating-point dtype"),
        ({"num_codes": 77}, r"decoder.head.bias of shape \[24\]; the other sizes ask for \[77\]"),
        ({"num_hidden_layers": 3}, r"encoder.blocks.2.attn.proj.bias, .* and 8 more missing; it is incomplete"),
        ({"num_hidden_layers": 1}, r"encoder.blocks.1.attn.proj.bias, .* unknown"),
        ({"model_type": "bert"}, "is a bert model; expected mae_vqgan"),
        ({"model_type": None}, "model type `None`"),
    ],
)
def test_configs_that_lie(folder, settings, words):
    configured(folder, **settings)
    refused(folder, words)


def test_configs_that_are_none(folder):
    for text in ("{", "[" * 10**5):
        (folder / "config.json").write_text(text)
        refused(folder, "not a valid JSON file|recursion", error=(OSError, ValueError))
    (folder / "config.json").unlink()
    refused(folder, "has no usable config")


def test_weights_that_are_cut_or_absent(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 100):
        weights.write_bytes(content)
        refused(folder, "cannot be loaded: Error while deserializing header")
    weights.unlink()
    refused(folder, "no file named model.safetensors", error=OSError)


def test_folders_of_other_models_are_checked_alike(tmp_path):
    ViTMAEForPreTraining(vit_mae_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for settings, words in (
        ({"num_attention_heads": 0}, "division or modulo by zero"),
        ({"hidden_size": 32}, "of shape .*; the other sizes ask for"),
        ({"num_hidden_layers": 3}, "vit.layers.2.* missing; it is incomplete"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | settings))
        refused(tmp_path, words, ViTMAE)
