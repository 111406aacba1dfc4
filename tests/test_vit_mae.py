import pytest
import torch
from helpers import logits_of, vit_mae_config
from transformers import ViTMAEForPreTraining

from vtv_nnsight import Layout, PatchSet, PatchSpace, TaskVectors, data, patch, tasks
from vtv_nnsight.models.vit_mae import ViTMAE
from vtv_nnsight.testing import check_model

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.fixture(scope="module")
def module():
    """transformers' own model, of which every weight shows."""
    torch.manual_seed(0)
    module = ViTMAEForPreTraining(vit_mae_config()).eval()
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return module


@pytest.fixture(scope="module")
def model(module):
    return ViTMAE(module)


@pytest.fixture(scope="module")
def prompts(model):
    return tasks.identity.prompts(data.scenes("train", n=30, seed=0), n=3, layout=model.layout)


def test_it_does_what_the_interface_promises(model, prompts):
    check_model(model, prompts)


def test_the_layout_is_the_models(model):
    assert model.layout == Layout(canvas_size=64, patch_size=16)


def test_what_is_seen_stays_and_the_output_is_painted(model, prompts):
    canvas = model.generate(prompts)
    shown = prompts.layout.pixels(prompts.visible)
    assert canvas.shape == prompts.canvas.shape and not canvas.requires_grad
    assert torch.equal(canvas[..., shown], prompts.canvas.mul(255).floor().div(255)[..., shown])
    assert not torch.equal(canvas[..., ~shown], prompts.canvas[..., ~shown])
    assert not torch.equal(model.generate(prompts, paste=False)[..., shown], canvas[..., shown])
    with model.generate(prompts) as tracer:
        traced = tracer.result.save()
    assert torch.equal(traced, canvas)
    assert torch.equal(model.paint(model(prompts), prompts), canvas)


def test_hidden_patches_are_not_looked_at(model, prompts):
    blank = prompts.canvas.clone()
    blank[..., ~prompts.layout.pixels(prompts.visible)] = 0
    logits = logits_of(model, prompts)
    assert torch.equal(logits_of(model, blank, prompts.visible, prompts.decoded), logits)
    other = prompts.canvas.clone()
    other[..., :16, :16] = 0
    assert not torch.equal(logits_of(model, other, prompts.visible, prompts.decoded), logits)


def hooked(module, prompts):
    """transformers' own answer to one-shot prompts: heads of every layer, predictions and pictures."""
    noise = torch.ones(len(prompts), 16)
    noise[:, prompts.visible] = 0  # it keeps the patches of least "noise"
    heads, handles = [], []
    for layer in (*module.vit.layers, *module.decoder.decoder_layers):
        hook = layer.attention.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
        handles.append(hook)
    ratio, module.config.mask_ratio = module.config.mask_ratio, 1 - (len(prompts.visible) + 0.5) / 16
    with torch.no_grad():
        logits = module((prompts.canvas - MEAN) / STD, noise=noise).logits
    module.config.mask_ratio = ratio
    for handle in handles:
        handle.remove()
    return heads, logits, (module.unpatchify(logits) * STD + MEAN).clamp(0, 1)


def test_it_is_transformers_own_forward(module, model, prompts):
    """In its heads, its predictions and, within 1/255, its pictures."""
    expected, logits, pictures = hooked(module, prompts)
    with torch.no_grad(), model.trace(prompts):
        places = model.encoder.positions.save()
        heads = [layer.attention.heads for stack in (model.encoder, model.decoder) for layer in stack.layers].save()
        found = model.output.logits.save()
    assert [tuple(z.shape) for z in heads] == [(3, 13, 2, 8), (3, 13, 2, 8), (3, 17, 2, 4)]
    assert places.tolist() == [0, *(1 + prompts.visible).tolist()]
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    for z, other in zip(heads, expected):
        torch.testing.assert_close(z.flatten(-2), other, rtol=1e-4, atol=1e-5)
    drawn = model.generate(prompts, paste=False)
    assert (drawn - pictures).abs().max() <= 1 / 255 + 1e-6


def test_the_kept_patches_may_be_any(module, model, prompts):
    """Those that transformers itself would have kept, of every row."""
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    output = module((prompts.canvas - MEAN) / STD, noise=noise)
    visible = torch.stack([(row == 0).nonzero()[:, 0] for row in output.mask])
    assert visible.shape == (3, 4)
    logits = logits_of(model, prompts.canvas, visible, torch.arange(16).expand(3, -1))
    torch.testing.assert_close(logits, output.logits, rtol=1e-4, atol=1e-5)


def test_query_only_is_a_canvas_of_the_query_alone(model, prompts):
    """Nothing of the example is seen, and what is decoded is the query's band, repeated over the canvas."""
    zero = prompts.query_only()
    other = prompts.canvas.clone()
    other[..., :32, :] = 0
    assert torch.equal(logits_of(model, other, zero.visible, zero.decoded), logits_of(model, zero))
    assert logits_of(model, zero).shape == (3, 8, 768)
    drawn = model.generate(zero, paste=False)
    assert torch.equal(drawn[..., :32, :], drawn[..., 32:, :])


def test_the_loss_has_gradients(model, prompts):
    loss, truth = model.losses[0], model.truth(prompts)
    gate = torch.ones(2, requires_grad=True)
    with model.trace(prompts):
        attention = model.encoder.layers[0].attention
        attention.heads = attention.heads * gate[:, None]
        value = loss.value(model.output, prompts, truth).save()
        logits = model.output.logits.save()
    value.sum().backward()
    output = prompts.layout.regions["output"]
    patches = model._module.original.patchify((prompts.canvas - MEAN) / STD)
    expected = (logits[:, output] - patches[:, output]).square().mean((1, 2))
    torch.testing.assert_close(value, expected)
    assert value.shape == (3,) and gate.grad.abs().min() > 0 and loss.differentiable


def test_it_has_vectors_and_units(model, prompts):
    vectors = TaskVectors.collect(model, {"identity": prompts}, progress=False)
    space = PatchSpace(model, prompts.layout)
    assert len(space) == 2 * 2 * 2 + 1 * 2 * 3
    assert space.names[0] == "encoder.layers.0.attention.heads[0] @ cls"
    logits = []
    for chosen in (PatchSet.random(space, 0), PatchSet.random(space, len(space))):
        with torch.no_grad(), model.trace(prompts.query_only()):
            patch(model, vectors["identity"], chosen)
            logits.append(model.output.logits.save())
    assert torch.equal(logits[0], logits_of(model, prompts.query_only()))
    assert (logits[1] - logits[0]).abs().max() > 0.01


def test_narrowed_outputs_are_part_of_all(model, prompts):
    with torch.no_grad(), model.trace(prompts):
        decoded = model.restrict_to_output(prompts).decoded.save()
        logits = model.output.logits.save()
    output = prompts.layout.regions["output"]
    torch.testing.assert_close(logits, logits_of(model, prompts)[:, output])
    assert torch.equal(decoded, output)


def test_patterns_under_eager_attention(module, model, prompts):
    eager = ViTMAE(module, attn_implementation="eager")
    with torch.no_grad(), eager.trace(prompts):
        pattern = eager.decoder.layers[0].attention.pattern.save()
    assert pattern.shape == (3, 2, 17, 17)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(3, 2, 17))
    with pytest.raises(ValueError, match="can only be read; change model.decoder"), eager.trace(prompts):
        eager.decoder.layers[0].attention.pattern = pattern
    with pytest.raises(ValueError, match='load the model with attn_implementation="eager"'), model.trace(prompts):
        model.decoder.layers[0].attention.pattern.save()


def test_it_loads_what_transformers_saved(module, model, prompts, tmp_path):
    module.save_pretrained(tmp_path)
    lazy = ViTMAE(tmp_path)
    with lazy.scan(prompts):
        shape = lazy.output.logits.shape.save()
    assert not lazy.dispatched and tuple(shape) == (3, 16, 768)
    assert torch.equal(lazy.generate(prompts), model.generate(prompts))
    lazy.save_pretrained(tmp_path / "again")
    half = ViTMAE(str(tmp_path / "again"), dtype=torch.bfloat16)
    assert half.generate(prompts).dtype == torch.float32 and half._module.dtype == torch.bfloat16


def test_what_does_not_fit_is_refused(model, prompts, tmp_path):
    with pytest.raises(ValueError, match="does not fit Layout"):
        model.generate(tasks.identity.prompts(data.scenes("train", n=30, seed=0), n=1))
    normalised = ViTMAEForPreTraining(vit_mae_config(norm_pix_loss=True))
    with pytest.raises(ValueError, match="trained with norm_pix_loss: its answers have no picture"):
        ViTMAE(normalised)
    normalised.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained with norm_pix_loss"):
        ViTMAE(tmp_path)
    with pytest.raises(TypeError, match="Linear is no source of ViTMAE"):
        ViTMAE(torch.nn.Linear(1, 1))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is a bert model; expected vit_mae"):
        ViTMAE(tmp_path)
