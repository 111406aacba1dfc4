"""BEiT and DALL-E's tokenizer, on small random weights; the tokenizer's files as they were published: whole modules,
pickled."""

import pytest
import torch
from helpers import DALLE_CODES, beit_config, beit_module, logits_of
from torch import nn
from torch.nn import functional as F
from transformers import BeitForMaskedImageModeling

from vtv_nnsight import BEiT, Layout, PatchSet, PatchSpace, TaskVectors, data, evaluate, patch, search, tasks
from vtv_nnsight.models import load_model
from vtv_nnsight.models.baselines.dalle import load_tokenizer
from vtv_nnsight.models.torch_files import read_tensors
from vtv_nnsight.testing import check_model


@pytest.fixture(scope="module")
def module():
    return beit_module()


@pytest.fixture(scope="module")
def model(module, dalle_folder):
    return BEiT(module, tokenizer=dalle_folder)


@pytest.fixture(scope="module")
def prompts(model):
    return tasks.identity.prompts(data.scenes("train", n=30, seed=0), n=3, layout=model.layout)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_tokenizers_files_are_read_without_running_them(dalle_parts, zipped, tmp_path):
    """Of torch's formats since 1.6 and before."""
    for name, part in dalle_parts.items():
        torch.save(part, tmp_path / f"{name}.pkl", _use_new_zipfile_serialization=zipped)
        found = {key: value for key, value in read_tensors(tmp_path / f"{name}.pkl").items()}
        assert found.keys() == part.state_dict().keys()
        assert all(torch.equal(value, found[key]) for key, value in part.state_dict().items())
    tokenizer = load_tokenizer(tmp_path)
    codes = torch.randint(DALLE_CODES, (2, 16), generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(codes.view(2, 4, 4), DALLE_CODES).permute(0, 3, 1, 2).float()
    expected = ((dalle_parts["decoder"](one_hot)[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    assert expected.shape == (2, 3, 32, 32) and expected.std() > 0.05
    torch.testing.assert_close(tokenizer.decode(codes), expected, rtol=1e-4, atol=1e-5)
    pixels = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0)).round()
    pixels = F.interpolate(pixels, scale_factor=8)
    found = tokenizer.encode(pixels)
    logits = dalle_parts["encoder"](0.8 * pixels + 0.1)
    torch.testing.assert_close(tokenizer.encoder(0.8 * pixels + 0.1), logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, logits.argmax(1).flatten(1)) and len(found.unique()) > 1


@pytest.mark.parametrize("more", [{}, {"use_absolute_position_embeddings": True, "use_mean_pooling": False}])
def test_one_shot_is_transformers_own_forward(dalle_folder, prompts, more):
    """With relative positions, as BEiT has them; and with absolute ones and a norm besides."""
    own = beit_module(**more)
    hidden = ~torch.isin(torch.arange(16), prompts.visible)
    with torch.no_grad():
        expected = own(2 * prompts.canvas - 1, bool_masked_pos=hidden.expand(3, -1)).logits
    found = logits_of(BEiT(own, tokenizer=dalle_folder), prompts)
    assert found.shape == (3, 16, DALLE_CODES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_query_only_leaves_the_example_out(module, model, prompts):
    """transformers' own answer where no token attends to those that are not decoded; of shared patches and of each
    row's."""
    zero = prompts.query_only()
    hidden = ~torch.isin(torch.arange(16), zero.visible)
    there = torch.cat([torch.tensor([True]), torch.isin(torch.arange(16), zero.decoded)])
    away = torch.zeros(3, 1, 17, 17).masked_fill(~there, -torch.inf)
    with torch.no_grad():
        pixels = 2 * prompts.canvas - 1
        expected = module(pixels, bool_masked_pos=hidden.expand(3, -1), attention_mask=away).logits[:, zero.decoded]
    torch.testing.assert_close(logits_of(model, zero), expected, rtol=1e-4, atol=1e-5)
    rows = [ids.expand(3, -1) for ids in (zero.visible, zero.decoded)]
    torch.testing.assert_close(logits_of(model, prompts.canvas, *rows), expected, rtol=1e-4, atol=1e-5)
    drawn = model.generate(zero, paste=False)
    assert torch.allclose(drawn[..., 8:24, :], drawn[..., 40:56, :], atol=0.3)  # repeated; the tokenizer blurs borders


def test_hidden_patches_are_painted_and_the_rest_stays(model, prompts):
    assert model.layout == Layout(canvas_size=64, patch_size=16)
    canvas, shown = model.generate(prompts), prompts.layout.pixels(prompts.visible)
    assert torch.equal(canvas[..., shown], prompts.canvas.mul(255).floor().div(255)[..., shown])
    assert not torch.equal(canvas[..., ~shown], prompts.canvas[..., ~shown])
    assert torch.equal(model.paint(model(prompts), prompts), canvas)
    codes = logits_of(model, prompts).argmax(-1)
    drawn = F.interpolate(model._module.tokenizer.decode(codes), size=64, mode="bicubic", antialias=True)
    assert (canvas - drawn.clamp(0, 1))[..., ~shown].abs().max() <= 1 / 255 + 1e-6
    blank = prompts.canvas.clone()
    blank[..., ~shown] = 0
    assert torch.equal(logits_of(model, blank, prompts.visible, prompts.decoded), logits_of(model, prompts))


def test_it_does_what_the_interface_promises(model, dalle_folder, prompts):
    """But for its layer scale, which no module applies: its attention and MLP are read before it."""
    check_model(BEiT(beit_module(layer_scale_init_value=0.0), tokenizer=dalle_folder), prompts)
    with pytest.raises(AssertionError, match="encoder, layer 0: residual is not the layer's input plus its attn and"):
        check_model(model, prompts)


def test_loss_and_ceiling_are_of_the_tokenizers_codes(model, dalle_parts, prompts):
    small = F.interpolate(prompts.canvas, size=32, mode="bicubic", antialias=True).clamp(0, 1)
    codes = dalle_parts["encoder"](0.8 * small + 0.1).argmax(1).flatten(1)
    output = prompts.layout.regions["output"]
    assert torch.equal(model.truth(prompts), codes[:, output])
    logits = logits_of(model, prompts)[:, output]
    (loss,) = model.losses
    expected = F.cross_entropy(logits.flatten(0, 1), codes[:, output].flatten(), reduction="none").view(3, -1).mean(1)
    torch.testing.assert_close(loss.value(model(prompts), prompts, codes[:, output]), expected)
    with torch.no_grad(), model.trace(prompts):
        narrowed = model.restrict_to_output(prompts)
        value = loss.value(model.output, narrowed, model.truth(prompts)).save()
    torch.testing.assert_close(value, expected)
    best = F.interpolate(model._module.tokenizer.decode(codes), size=64, mode="bicubic", antialias=True).clamp(0, 1)
    assert (model.ceiling(prompts) - best).abs().max() <= 1 / 255 + 1e-6


def test_it_has_heads_vectors_and_units(module, model, dalle_folder, prompts):
    heads, layer = [], module.beit.layers[1]
    hook = layer.attention.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    with torch.no_grad(), model.trace(prompts):
        z = model.encoder.layers[1].attention.heads.save()
    hook.remove()
    assert z.shape == (3, 17, 2, 8) and torch.equal(z.flatten(-2), heads[0])
    vectors = TaskVectors.collect(model, {"identity": prompts}, progress=False)
    space = PatchSpace(model, prompts.layout)
    assert len(space) == 2 * 2 * 3 and space.names[0] == "encoder.layers.0.attention.heads[0] @ cls"
    with torch.no_grad(), model.trace(prompts.query_only()):
        patch(model, vectors["identity"], PatchSet.random(space, len(space)))
        patched = model.output.logits.save()
    assert (patched - logits_of(model, prompts.query_only())).abs().max() > 0.01
    result = search.gates(
        model, vectors["identity"], tasks.identity, prompts.query_only(), space, budget=130, seed=0, progress=False
    )
    assert result.patches.space.fingerprint == space.fingerprint and result.evaluations <= 130
    eager = BEiT(module, tokenizer=dalle_folder, attn_implementation="eager")
    with torch.no_grad(), eager.trace(prompts):
        pattern = eager.encoder.layers[0].attention.pattern.save()
    torch.testing.assert_close(pattern.sum(-1), torch.ones(3, 2, 17))


def test_a_folder_is_evaluated(module, model, dalle_folder, prompts, tmp_path):
    """RunResults by `load_model`, with its tokenizer in the folder or given."""
    module.save_pretrained(tmp_path)
    given = load_model(tmp_path, tokenizer=dalle_folder)
    for part in dalle_folder.iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    own = load_model(tmp_path)
    assert isinstance(own, BEiT) and not own.dispatched and [loss.name for loss in own.losses] == ["tokens"]
    with own.scan(prompts):
        shape = own.output.logits.shape.save()
    assert tuple(shape) == (3, 16, DALLE_CODES) and not own.dispatched
    tables = [evaluate(each, tasks.identity, prompts, progress=False) for each in (model, given, own)]
    for table in tables:
        assert {"one-shot", "zero-shot", "tokenizer", "copy"} == set(table.frame["condition"])
        assert table.frame[table.frame["condition"] == "one-shot"]["loss"].notna().all()
        assert table.frame["score"].tolist() == tables[0].frame["score"].tolist()
    own.save_pretrained(tmp_path / "again")
    half = BEiT(tmp_path / "again", tokenizer=dalle_folder, dtype=torch.bfloat16)
    assert half.generate(prompts).dtype == torch.float32 and half._module.dtype == torch.bfloat16
    assert half._module.tokenizer.decoder.first.weight.dtype == torch.float32


def test_what_does_not_fit_is_refused(module, dalle_folder, dalle_parts, tmp_path):
    with pytest.raises(ValueError, match="has no mask token"):
        BEiT(BeitForMaskedImageModeling(beit_config(use_mask_token=False)))
    with pytest.raises(ValueError, match="relative positions in every layer"):
        BEiT(BeitForMaskedImageModeling(beit_config(use_relative_position_bias=True)))
    with pytest.raises(ValueError, match="the tokenizer has 32 codes, the model 40"):
        BEiT(BeitForMaskedImageModeling(beit_config(vocab_size=40)), tokenizer=dalle_folder)
    with pytest.raises(FileNotFoundError, match="there is no file .*decoder.pkl"):
        BEiT(module)
    with pytest.raises(TypeError, match="Linear is no source of BEiT"):
        BEiT(nn.Linear(1, 1))
    with pytest.raises(FileNotFoundError, match="there is no file .*decoder.pkl"):
        load_tokenizer(tmp_path)
    torch.save(dalle_parts["encoder"], tmp_path / "encoder.pkl")
    torch.save(nn.Linear(2, 2), tmp_path / "decoder.pkl")
    with pytest.raises(ValueError, match="is no part of DALL-E's tokenizer: it has no 'blocks.input.w'"):
        load_tokenizer(tmp_path)
    state = dalle_parts["decoder"].state_dict()
    torch.save({name: state[name] for name in state if "group_3.block_2" not in name}, tmp_path / "decoder.pkl")
    with pytest.raises(ValueError, match="group_3.block_2.* missing"):
        load_tokenizer(tmp_path)
    torch.save(state | {"blocks.group_2.block_1.res_path.conv_2.w": torch.zeros(1)}, tmp_path / "decoder.pkl")
    with pytest.raises(ValueError, match=r"conv_2.w of shape \[1\]; the other sizes ask for \[8, 8, 3"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="tokenizer=.* is for BEiT"):
        load_model("tiny", tokenizer=dalle_folder)


class Boom:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it was run')",))


def test_pickled_modules_run_nothing(dalle_parts, tmp_path):
    part = nn.Module()
    part.inner, part.boom = nn.Linear(2, 2), Boom()
    torch.save(part, tmp_path / "file.pth")
    assert read_tensors(tmp_path / "file.pth").keys() == {"inner.weight", "inner.bias"}
