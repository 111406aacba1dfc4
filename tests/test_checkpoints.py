import argparse
import collections
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DATA

from vtv_nnsight import MAEVQGAN
from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig, MAEVQGANModel
from vtv_nnsight.models.mae_vqgan.published import convert, describe, load_checkpoint


def published(checkpoint):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(checkpoint, weights_only=True)


@pytest.fixture
def state(checkpoint):
    """The state dict of `checkpoint`, for a test to change."""
    return published(checkpoint)["model"]


@pytest.fixture
def save(tmp_path):
    """save(state) → the path of a checkpoint that holds it."""

    def write(state, key="model", name="some.pth", legacy=False, **other):
        torch.save({key: state, **other}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        return tmp_path / name

    return write


def assert_same(model, other):
    """That two models agree in every tensor and every size."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in MAEVQGANConfig.__annotations__:
        assert getattr(model.config, name) == getattr(other.config, name), name


def test_sizes_are_read_off_the_shapes(checkpoint):
    config = describe(checkpoint)[0]
    expected = MAEVQGANConfig(
        hidden_size=64,
        decoder_hidden_size=32,
        code_dim=16,
        vqgan_z_channels=32,
        vqgan_channels=32,
        vqgan_channel_multipliers=(1, 1, 1, 1, 2),
        vqgan_num_res_blocks=1,
        vqgan_attention_levels=(4,),
    )
    assert config.to_diff_dict() == expected.to_diff_dict()


@pytest.mark.parametrize(
    "sizes",
    [
        dict(image_size=32, patch_size=8, vqgan_fold=2, mlp_ratio=3.0),
        dict(image_size=48, vqgan_attention_levels=(1, 2), vqgan_num_res_blocks=3, num_codes=5),
        dict(num_hidden_layers=1, decoder_num_hidden_layers=3, vqgan_channel_multipliers=(2, 1, 3), code_dim=4),
    ],
)
def test_other_sizes(small_config, sizes, checkpoint, save):
    """Models of any size come back from the published layout as they went."""
    model = MAEVQGANModel(small_config(**sizes))
    names = [
        ("vqgan.codebook", "vae.quantize.embedding"),
        ("vqgan.", "vae."),
        ("encoder.", ""),
        ("decoder.mask_token", "mask_token"),
        ("decoder.head", "decoder_pred"),
        ("decoder.", "decoder_"),
    ]
    state = {}
    for name, value in model.state_dict().items():
        ours, theirs = next(pair for pair in names if name.startswith(pair[0]))
        state[theirs + name.removeprefix(ours)] = value
    patch = model.config.patch_size
    weight = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = weight.view(-1, 3, patch, patch)
    heads = dict(num_attention_heads=4, decoder_num_attention_heads=2)
    assert_same(load_checkpoint(save(state), **heads), model)


def test_it_is_ready_to_run(checkpoint):
    model = load_checkpoint(checkpoint)
    assert not model.training and model.dtype == torch.float32
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "encoder.pos_embed",
        "decoder.pos_embed",
    }
    assert (
        MAEVQGAN(checkpoint, attn_implementation="eager", dispatch=True).network.config._attn_implementation == "eager"
    )


def test_the_tokenizer_may_lie_apart(checkpoint, split_checkpoint):
    path, vqgan = split_checkpoint
    assert_same(load_checkpoint(path, vqgan=vqgan), load_checkpoint(checkpoint))
    assert describe(path, vqgan=vqgan)[0].to_dict() == describe(checkpoint)[0].to_dict()


def test_the_tokenizer_that_is_named_wins(state, save):
    tokenizer = {name.removeprefix("vae."): value for name, value in state.items() if name.startswith("vae.")}
    tokenizer["quantize.embedding.weight"] = tokenizer["quantize.embedding.weight"] + 1
    model = load_checkpoint(save(state), vqgan=save(tokenizer, "state_dict", "last.ckpt"))
    assert torch.equal(model.vqgan.codebook.weight, state["vae.quantize.embedding.weight"] + 1)


def test_the_tokenizers_training_losses_are_left_out(checkpoint, state, save):
    state |= {"vae.loss.discriminator.main.0.weight": torch.ones(2), "vae.loss.logvar": torch.ones(())}
    assert_same(load_checkpoint(save(state)), load_checkpoint(checkpoint))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_both_file_formats(checkpoint, state, save, legacy):
    tokenizer = {name.removeprefix("vae."): value for name, value in state.items() if name.startswith("vae.")}
    rest = {name: value for name, value in state.items() if not name.startswith("vae.")}
    path = save(rest, legacy=legacy, args=argparse.Namespace(model="mae"))
    assert_same(
        load_checkpoint(path, vqgan=save(tokenizer, "state_dict", "last.ckpt", legacy)), load_checkpoint(checkpoint)
    )


def test_tensors_that_are_parts_or_parameters(checkpoint, state, save):
    """A state dict may hold views of larger tensors, transposed ones and Parameters."""
    stack = torch.stack([state["norm.weight"], state["norm.bias"]])
    state |= {"norm.weight": stack[0], "norm.bias": stack[1]}
    state["decoder_embed.weight"] = state["decoder_embed.weight"].T.contiguous().T
    state["cls_token"] = torch.nn.Parameter(state["cls_token"])
    assert not state["decoder_embed.weight"].is_contiguous()
    assert_same(load_checkpoint(save(collections.OrderedDict(state))), load_checkpoint(checkpoint))


@pytest.mark.slow
def test_dtypes(checkpoint, state, save):
    whole = load_checkpoint(checkpoint)
    half = load_checkpoint(checkpoint, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.config.dtype == torch.bfloat16
    assert_same(half.float(), whole.bfloat16().float())
    assert load_checkpoint(checkpoint, dtype="float16").dtype == torch.float16
    stored = save({name: value.half() for name, value in state.items()})
    assert load_checkpoint(stored, dtype="auto").dtype == torch.float16
    assert load_checkpoint(stored, dtype=torch.float32).dtype == torch.float32
    for name in ("os.system", "int8", "half precision"):
        with pytest.raises(ValueError, match=f"dtype='{name}' is unknown; give a floating-point one"):
            load_checkpoint(stored, dtype=name)


def test_writing_to_weights_leaves_the_file_alone(checkpoint):
    before = checkpoint.read_bytes()
    model = load_checkpoint(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not model.encoder.norm.weight.any()
    assert checkpoint.read_bytes() == before
    assert load_checkpoint(checkpoint).encoder.norm.weight.any()


MEASURE = """
import resource, sys, torch
from vtv_nnsight.models.mae_vqgan import published as checkpoints
def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
checkpoints.load_checkpoint(sys.argv[1])
before = peak()
model = checkpoints.load_checkpoint(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
sum(p.detach().view(torch.int8).flatten()[::512].sum() for p in model.parameters())
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1.3), ("bfloat16", 1.7)])
def test_memory_stays_near_the_size_of_the_file(checkpoint, state, save, dtype, most):
    """Peak resident memory of a load after which every page of every weight was read: those of the file, and a cast."""
    wide = dict(state)
    for name, value in state.items():
        if name.startswith(("blocks.", "decoder_blocks.")) and ".mlp.fc" in name and "fc2.bias" not in name:
            axis = 1 if "fc2" in name else 0
            wide[name] = torch.zeros(1).expand(*(24 * n if i == axis else n for i, n in enumerate(value.shape))).clone()
    path = save(wide)
    size = path.stat().st_size
    assert size > 80e6
    code = [sys.executable, "-c", MEASURE, str(checkpoint), str(path), dtype]
    grown = int(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    assert 0.3 * size < grown < most * size


class Loaded:
    """Runs a command when it is unpickled the plain way."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class AttributeDict(dict):
    """As Lightning's: a class that a reader of the file may not have."""


class Items(list):
    pass


Version = collections.namedtuple("Version", "major minor")


def foreign_entries(marker):
    """What Lightning files hold besides tensors, and what a hostile one may."""
    return {
        "callbacks": {AttributeDict: {"best": AttributeDict(a=1), "path": Path("a/b"), "score": np.float64(0.5)}},
        "hyper_parameters": AttributeDict(steps=Items([1, 2]), nested=AttributeDict(x=collections.defaultdict(list))),
        "version": Version(1, 0),
        "kinds": {frozenset([1]), complex(1, 2), torch.float16, torch.device("cpu"), torch.Size([2])},
        "array": np.arange(3),
        "args": argparse.Namespace(model="mae"),
        "system": Loaded(os.system, f"touch {marker}"),
        "builtin": Loaded(eval, f"open({str(marker)!r}, 'w')"),
        "module": Loaded(exec, f"import pathlib; pathlib.Path({str(marker)!r}).touch()"),
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_foreign_classes_are_ignored_and_nothing_runs(checkpoint, split_checkpoint, state, save, tmp_path, legacy):
    marker = tmp_path / "ran"
    tokenizer = {name.removeprefix("vae."): value for name, value in state.items() if name.startswith("vae.")}
    vqgan = save(tokenizer, "state_dict", "last.ckpt", legacy, **foreign_entries(marker))
    everything = save(state, legacy=legacy, **foreign_entries(marker))
    assert_same(load_checkpoint(split_checkpoint[0], vqgan=vqgan), load_checkpoint(checkpoint))
    assert_same(load_checkpoint(everything), load_checkpoint(checkpoint))
    assert not marker.exists()
    pickle.loads(pickle.dumps(foreign_entries(marker)))
    assert marker.exists(), "the entries are not hostile, so this test proves nothing"


def test_classes_that_do_not_exist_here_are_not_imported(state, save, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        module = types.ModuleType("lightning_nowhere")
        module.Callback = type("Callback", (), {"__module__": module.__name__})
        patch.setitem(sys.modules, module.__name__, module)
        path = save(state, callbacks={module.Callback: module.Callback()})
    (tmp_path / "lightning_nowhere.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert load_checkpoint(path).config.hidden_size == 64
    assert "lightning_nowhere" not in sys.modules and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_state_dict_that_is_a_payload_is_refused(save, tmp_path, legacy):
    marker = tmp_path / "ran"
    path = save(Loaded(os.system, f"touch {marker}"), legacy=legacy)
    with pytest.raises(ValueError, match="some.pth holds no state dict"):
        load_checkpoint(path)
    assert not marker.exists()


def test_a_weight_that_is_a_payload_is_missing(state, save, tmp_path):
    marker = tmp_path / "ran"
    state["norm.bias"] = Loaded(os.system, f"touch {marker}")
    with pytest.raises(ValueError, match=r"some.pth: norm.bias missing"):
        load_checkpoint(save(state))
    assert not marker.exists()


def test_plain_pickles_are_not_opened(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "vectors.pkl"
    path.write_bytes(pickle.dumps({"model": Loaded(os.system, f"touch {marker}")}))
    with pytest.raises(ValueError, match="vectors.pkl is not a PyTorch checkpoint"):
        load_checkpoint(path)
    assert not marker.exists()


def test_whole_numbers_are_no_weights(state, save):
    with pytest.raises(ValueError, match="some.pth: norm.bias of dtype int64; expected floating point"):
        load_checkpoint(save(state | {"norm.bias": state["norm.bias"].long()}))


def test_what_is_called_a_tensor_and_is_none(state, save):
    """Shapes that are no shapes, storages that are none: the entry is inert, and missed as a weight."""
    rebuild = torch._utils._rebuild_tensor_v2
    for arguments in ((AttributeDict(), 0, (64,), (1,), False, {}), (state["norm.bias"], 0, "wide", None, False, {})):
        with pytest.raises(ValueError, match="some.pth: norm.bias missing"):
            load_checkpoint(save(state | {"norm.bias": Loaded(rebuild, *arguments)}))


def refused(words, *args, error=ValueError, **kwargs):
    """That both ways into a file refuse it with these words."""
    for function in (load_checkpoint, describe):
        with pytest.raises(error, match=words) as caught:
            function(*args, **kwargs)
        assert "\n" not in str(caught.value)


def test_files_that_are_not_checkpoints(tmp_path):
    refused("there is no file .*nowhere.pth", tmp_path / "nowhere.pth", error=FileNotFoundError)
    refused("is a folder", tmp_path)
    refused("query_image.png is not a PyTorch checkpoint: it begins with .*PNG", DATA / "query_image.png")
    (tmp_path / "empty.pth").touch()
    refused("empty.pth is not a PyTorch checkpoint", tmp_path / "empty.pth")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>")
    refused("page.pth is not a PyTorch checkpoint: it begins with .*DOCTYPE", tmp_path / "page.pth")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    refused("arrays.npz .*truncated or damaged", tmp_path / "arrays.npz")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("kept", [0.0001, 0.5, 0.9999])
def test_truncated_files(state, save, kept, legacy):
    path = save(state, legacy=legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    refused("some.pth .*is truncated or damaged", path)


def test_checkpoints_of_something_else(save, split_checkpoint, state):
    resnet = {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.zeros(64), "fc.bias": torch.zeros(10)}
    refused("some.pth is not a VQGAN checkpoint: it has no 'vae.encoder.conv_in.weight'", save(resnet))
    vqgan = save(resnet, "state_dict", "last.ckpt")
    words = "last.ckpt is not a VQGAN checkpoint: it has no 'vae.encoder.conv_in.weight'"
    refused(words, split_checkpoint[0], vqgan)
    refused("is not a VQGAN checkpoint", split_checkpoint[1])
    refused("holds no state dict", save({"epoch": 3}))
    refused("holds no state dict", save([torch.ones(2)]))


def test_missing_and_unknown_tensors(state, save, split_checkpoint):
    gone = [name for name in state if name.startswith("blocks.7.")]
    with pytest.raises(ValueError, match=r"some.pth: blocks.7.norm1.weight, .* and 8 more missing"):
        load_checkpoint(save({name: value for name, value in state.items() if name not in gone}))
    refused("it has no 'pos_embed'", save({name: value for name, value in state.items() if name != "pos_embed"}))
    with pytest.raises(ValueError, match="some.pth: register_token unknown"):
        load_checkpoint(save(state | {"register_token": torch.ones(2)}))
    tokenizer = {name.removeprefix("vae."): value for name, value in state.items() if name.startswith("vae.")}
    del tokenizer["decoder.conv_in.bias"]
    with pytest.raises(ValueError, match="last.ckpt: vae.decoder.conv_in.bias missing"):
        load_checkpoint(split_checkpoint[0], save(tokenizer, "state_dict", "last.ckpt"))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("blocks.3.attn.qkv.weight", (180, 64), r"some.pth: blocks.3.attn.qkv.weight of shape \[180, 64\].* \[192"),
        ("cls_token", (64,), r"cls_token of shape \[64\].*\[1, 1, 64\]"),
        ("patch_embed.proj.weight", (64, 1, 16, 16), r"patch_embed.proj.weight of shape \[64, 256\]"),
        ("vae.decoder.conv_out.bias", (5,), r"vae.decoder.conv_out.bias of shape \[5\].*\[3\]"),
    ],
)
def test_misshapen_tensors(state, save, name, shape, words):
    with pytest.raises(ValueError, match=words):
        load_checkpoint(save(state | {name: torch.zeros(shape)}))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("pos_embed", (197, 64), "is not a MAE-VQGAN checkpoint: not enough values to unpack"),
        ("pos_embed", (1, 150, 64), "pos_embed has 150 positions; expected CLS and a square grid"),
        ("vae.encoder.down.2.block.0.conv2.weight", (40, 32, 3, 3), "a level of 40 channels"),
    ],
)
def test_shapes_that_sizes_are_read_off(state, save, name, shape, words):
    refused(words, save(state | {name: torch.zeros(shape)}))


def test_heads_that_do_not_divide_the_width(checkpoint):
    refused("hidden_size=64 is not a multiple of its 12", checkpoint, num_attention_heads=12)
    refused("decoder_hidden_size=32 is not a multiple of its 0", checkpoint, decoder_num_attention_heads=0)
    assert load_checkpoint(checkpoint, num_attention_heads=8).encoder.blocks[0].attn.head_dim == 8


def test_tokenizers_that_do_not_fit(split_checkpoint, state, save):
    path, _ = split_checkpoint
    refused(r"checkpoint.pth has no tokenizer; give vqgan= the last.ckpt of vqgan_imagenet_f16_1024", path)
    tokenizer = {name.removeprefix("vae."): value for name, value in state.items() if name.startswith("vae.")}
    large = save(tokenizer | {"quantize.embedding.weight": torch.zeros(16384, 16)}, "state_dict", "large.ckpt")
    refused("it predicts 1024 codes, and its tokenizer has 16384", path, large)
    coarse = {name: value for name, value in tokenizer.items() if "encoder.down.4" not in name}
    coarse = save(coarse, "state_dict", "f8.ckpt")
    refused("checkpoint.pth is not .*: the VQGAN reduces 8x but patch_size=16", path, coarse)


def test_convert(checkpoint, split_checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*new to make model in"):
        convert(checkpoint, tmp_path / "new" / "model")
    (tmp_path / "new").mkdir()
    out = convert(checkpoint, tmp_path / "new" / "model")
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    assert [file.name for file in out.parent.iterdir()] == ["model"]
    assert_same(MAEVQGANModel.from_pretrained(out), load_checkpoint(checkpoint))
    (tmp_path / "empty").mkdir()
    convert(split_checkpoint[0], tmp_path / "empty", vqgan=split_checkpoint[1], num_attention_heads=8)
    assert json.loads((tmp_path / "empty" / "config.json").read_text())["num_attention_heads"] == 8


def test_convert_overwrites_nothing_and_leaves_nothing_half_done(checkpoint, split_checkpoint, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="full is there already"):
        convert(checkpoint, tmp_path / "full")
    with pytest.raises(FileExistsError, match="notes.txt is there already"):
        convert(checkpoint, tmp_path / "full" / "notes.txt")
    with pytest.raises(ValueError, match="has no tokenizer"):
        convert(split_checkpoint[0], tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
