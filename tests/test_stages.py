"""Values by stage, and fingerprints."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_module, random_prompts

from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, TaskVectors, patch
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import ByStage, StageSite
from vtv_nnsight.vectors.compatibility import check_compatible, differences, fingerprint, stages_of

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def module():
    return random_module()


def changed(module, change):
    """A copy of a module with changed weights."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        change(other)
    return MAEVQGAN(other)


def negate(module):
    module.encoder.blocks[1].attn.qkv.weight.neg_()


def swap(module):
    blocks = module.decoder.blocks
    blocks[0], blocks[1] = blocks[1], blocks[0]


def redraw(module):
    for parameter in module.encoder.parameters():
        parameter.normal_(std=0.02)


def scale(module):
    module.vqgan.decoder.conv_out.weight.mul_(1 + 1e-4)


@pytest.mark.parametrize("change", [negate, swap, redraw, scale])
def test_other_weights_are_noticed(module, change):
    model, other = MAEVQGAN(module), changed(module, change)
    assert differences(fingerprint(other), fingerprint(model)) == ["other weights"]
    for dtype in (torch.bfloat16, torch.float16):
        if change is not scale:  # a change of 1e-4 is below what either dtype tells from rounding
            low = MAEVQGAN(copy.deepcopy(other._module).to(dtype))
            assert differences(fingerprint(low), fingerprint(model)) == ["other weights"]


def test_a_part_in_128_of_a_single_number_is_noticed_in_every_tensor(module):
    model = MAEVQGAN(copy.deepcopy(module))
    before = fingerprint(model)
    for name, parameter in model._module.named_parameters():
        number = parameter.detach().flatten()[-1]
        kept = number.item()
        number += max(abs(kept), 1e-3) / 128
        assert differences(fingerprint(model), before) == ["other weights"], name
        number.fill_(kept)
    assert not differences(fingerprint(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_are_the_same_model(module, dtype, tmp_path):
    model, copied = MAEVQGAN(module), copy.deepcopy(module).to(dtype)
    copied.save_pretrained(tmp_path)
    for other in (MAEVQGAN(copied), MAEVQGAN(tmp_path, dispatch=True), MAEVQGAN(tmp_path, dtype=dtype, dispatch=True)):
        assert not differences(fingerprint(other), fingerprint(model))
    back = MAEVQGAN(copied.float())
    assert not differences(fingerprint(back), fingerprint(model))


def test_two_roundings_cannot_be_compared_and_say_so(module):
    half, other = MAEVQGAN(module, dtype=torch.float16), changed(module, negate)
    low = MAEVQGAN(other._module, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="load one of the two models in float32"):
        check_compatible("a", fingerprint(half), "b", fingerprint(low))


def test_lazy_weights_have_no_fingerprint_before_they_are_loaded(module, tmp_path):
    module.save_pretrained(tmp_path)
    lazy = MAEVQGAN(tmp_path)
    assert "weights" not in fingerprint(lazy)
    assert device_of(lazy) == torch.device("cpu")
    assert fingerprint(lazy) == fingerprint(MAEVQGAN(module))
    assert json.loads(json.dumps(fingerprint(lazy))) == fingerprint(lazy)
    assert stages_of(fingerprint(lazy)) == lazy.stages


def test_a_patch_notices_weights_that_were_written_to(module):
    model, prompts = MAEVQGAN(copy.deepcopy(module)), random_prompts(2).query_only()
    vector = TaskVectors.collect(model, {"a": prompts}, progress=False)["a"]
    chosen = PatchSet.random(PatchSpace(model), 5)

    def run():
        with torch.no_grad(), model.trace(prompts):
            patch(model, vector, chosen)
            logits = model.output.logits.save()
        return logits

    expected, layer = run(), model._module.decoder.blocks[0].mlp.fc1
    changes = (lambda: layer.weight.neg_(), lambda: setattr(layer.weight, "data", layer.weight.data.neg()))
    for change in changes:
        with torch.no_grad():
            change()
        with pytest.raises(ValueError, match="'a' does not fit this model: it has other weights"):
            run()
        with torch.no_grad():
            layer.weight.neg_()
        assert torch.equal(run(), expected)
    layer.weight = torch.nn.Parameter(2 * layer.weight.detach())
    with pytest.raises(ValueError, match="other weights"):
        run()


WRITES = (lambda weight: weight.data.neg_(), lambda weight: np.negative(weight.numpy(), out=weight.numpy()))


@pytest.mark.parametrize("write", WRITES, ids=["data", "numpy"])
def test_writes_that_torch_does_not_count_are_noticed_when_collecting_and_not_when_patching(module, write):
    model, prompts = MAEVQGAN(copy.deepcopy(module)), random_prompts(2).query_only()
    weight = model._module.decoder.blocks[0].mlp.fc1.weight.requires_grad_(False)

    def collect():
        return TaskVectors.collect(model, {"a": prompts}, progress=False)["a"]

    before = collect()
    write(weight)
    assert not differences(fingerprint(model, cached=True), before.fingerprint)  # as the docstring says
    assert differences(collect().fingerprint, before.fingerprint) == ["other weights"]
    assert differences(fingerprint(model, cached=True), before.fingerprint) == ["other weights"]
    write(weight)
    assert collect().fingerprint == before.fingerprint


def test_weights_in_other_places_are_other_weights(module):
    model = MAEVQGAN(copy.deepcopy(module))
    before = fingerprint(model)
    swap(model._module)
    assert differences(fingerprint(model), before) == ["other weights"]
    swap(model._module)
    assert fingerprint(model) == before


def test_digests_are_of_what_the_state_dict_holds(module):
    """Also a buffer that it holds, and not one that it leaves out."""
    own = copy.deepcopy(module)
    before = fingerprint(MAEVQGAN(own))
    own.encoder.register_buffer("fleeting", torch.ones(3), persistent=False)
    assert fingerprint(MAEVQGAN(own)) == before
    own.encoder.register_buffer("kept", torch.ones(3))
    assert differences(with_buffer := fingerprint(MAEVQGAN(own)), before) == ["other weights"]
    own.encoder.kept.data[1] = 2
    assert differences(fingerprint(MAEVQGAN(own)), with_buffer) == ["other weights"]


def test_weights_that_lie_in_strides_are_the_same_weights(module):
    own = copy.deepcopy(module)
    layer = own.decoder.blocks[0].mlp.fc1
    layer.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous().t())
    assert not layer.weight.is_contiguous()
    assert not differences(fingerprint(MAEVQGAN(own)), fingerprint(MAEVQGAN(module)))


def test_a_collection_ends_with_the_last_activation_it_reads(module):
    model, run = MAEVQGAN(module), []
    last = module.decoder.blocks[-1]
    parts = {"qkv": last.attn.qkv, "mlp": last.mlp, "head": module.decoder.head}
    hooks = [part.register_forward_pre_hook(lambda *_, name=name: run.append(name)) for name, part in parts.items()]
    for sites, expected in (("heads", ["qkv"]), ("mlp", ["qkv", "mlp"])):
        TaskVectors.collect(model, {"a": random_prompts(2)}, sites=sites, progress=False)
        assert run == expected
        run.clear()
    for hook in hooks:
        hook.remove()


def test_values_by_stage():
    values = ByStage(encoder=2, decoder=3)
    assert values.map(lambda a, b: a * b, {"encoder": 5, "decoder": 7}) == ByStage(encoder=10, decoder=21)
    assert copy.deepcopy(values) == values and list(map(str, values)) == ["encoder", "decoder"]


def test_a_stage_at_a_site_is_a_value_of_two_fields():
    values = ByStage({"encoder": 1, ("encoder", "mlp"): 2, StageSite("decoder", "residual"): 3})
    assert values["encoder"] == 1 == values["encoder", "heads"] and values["encoder", "mlp"] == 2
    assert "encoder" in values and ("decoder", "residual") in values and "decoder" not in values
    assert "encoder.mlp" not in values and values.get("decoder") is None and values.get(("encoder", "mlp")) == 2
    assert [str(key) for key in values] == ["encoder", "encoder.mlp", "decoder.residual"]
    assert [(key.stage, key.site) for key in values][1] == ("encoder", "mlp")
    assert values.sites == ("heads", "mlp", "residual")
    assert pickle.loads(pickle.dumps(values)) == values
    with pytest.raises(KeyError, match="decoder"):
        values["decoder"]
