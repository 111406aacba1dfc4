import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from vtv_nnsight import Layout, data, tasks
from vtv_nnsight.inpainters import MAE, Inpainter


def config(**more):
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=64)
    decoder = dict(decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    return ViTMAEConfig(**sizes, **decoder, decoder_intermediate_size=16, patch_size=16, **more)


@pytest.fixture
def mae():
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(config())
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return MAE(model)


@pytest.fixture
def prompts(mae):
    return tasks.identity.prompts(data.scenes("train", n=30, seed=0), n=3, layout=mae.layout)


def test_the_layout_is_the_models(mae):
    assert mae.layout == Layout(canvas_size=64, patch_size=16)


def test_what_is_seen_stays_and_the_output_is_painted(mae, prompts):
    canvas = mae.generate(prompts)
    shown = prompts.layout.pixels(prompts.visible)
    assert canvas.shape == prompts.canvas.shape
    assert torch.equal(canvas[..., shown], prompts.canvas.mul(255).floor().div(255)[..., shown])
    assert not torch.equal(canvas[..., ~shown], prompts.canvas[..., ~shown])
    assert not torch.equal(mae.generate(prompts, paste=False)[..., shown], canvas[..., shown])


def test_hidden_patches_are_not_looked_at(mae, prompts):
    blank = prompts.canvas.clone()
    blank[..., ~prompts.layout.pixels(prompts.visible)] = 0
    assert torch.equal(mae.fill(blank, prompts.visible), mae.fill(prompts.canvas, prompts.visible))
    other = prompts.canvas.clone()
    other[..., :16, :16] = 0
    assert not torch.equal(mae.fill(other, prompts.visible), mae.fill(prompts.canvas, prompts.visible))


def test_it_is_transformers_own_forward(mae, prompts):
    """With the patches that MAE itself would have kept."""
    model = mae.model
    noise = torch.rand(1, 16, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    output = model((prompts[0].canvas - mean) / std, noise=noise)
    visible = (output.mask[0] == 0).nonzero()[:, 0]
    expected = model.unpatchify(output.logits) * std + mean
    torch.testing.assert_close(mae.fill(prompts[0].canvas, visible), expected)
    assert len(visible) == 4 and model.config.mask_ratio == 0.75


def test_it_loads_what_transformers_saved(mae, prompts, tmp_path):
    mae.model.save_pretrained(tmp_path)
    assert torch.equal(MAE.from_pretrained(tmp_path).generate(prompts), mae.generate(prompts))


def test_what_does_not_fit_is_refused(mae, prompts):
    with pytest.raises(ValueError, match="do not fit a model"):
        mae.generate(tasks.identity.prompts(data.scenes("train", n=30, seed=0), n=1))
    with pytest.raises(ValueError, match="without query_only"):
        mae.generate(prompts.query_only())
    with pytest.raises(ValueError, match="norm_pix_loss"):
        MAE(ViTMAEForPreTraining(config(norm_pix_loss=True)))


def test_another_model_is_one_class(prompts):
    class Grey(Inpainter):
        layout = Layout(64, 16)

        def fill(self, canvas, visible):
            return torch.full_like(canvas, 0.5)

    canvas = Grey().generate(prompts)
    hidden = ~prompts.layout.pixels(prompts.visible)
    assert (canvas[..., hidden] == 127 / 255).all() and not (canvas == 127 / 255).all()
