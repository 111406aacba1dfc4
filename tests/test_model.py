import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from vtv_nnsight import metrics
from vtv_nnsight.layouts import Layout
from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig, MAEVQGANModel
from vtv_nnsight.models.mae_vqgan.transformer import sincos_positions
from vtv_nnsight.prompts import VisualPrompt

LAYOUT = Layout()


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def canvases(golden):
    return torch.stack([golden["canvas_a"], golden["canvas_b"]]).float() / 255


def run(model, prompt):
    return model(prompt.canvas, prompt.visible, prompt.decoded).logits


def prompt_of(canvas, shot):
    prompt = VisualPrompt.from_canvas(canvas)
    return prompt if shot == "one_shot" else prompt.query_only()


def output_logits(prompt, logits):
    return logits[:, LAYOUT.index(prompt.decoded, LAYOUT.regions["output"]) - 1]


@pytest.mark.parametrize("shot", ["one_shot", "zero_shot"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_golden_logits_and_loss(golden, golden_model, canvases, shot, attention):
    prompt = prompt_of(canvases, shot)
    patterns = []
    handle = golden_model.encoder.blocks[5].attn.softmax.register_forward_hook(lambda *call: patterns.append(call[-1]))
    golden_model.set_attn_implementation(attention)
    try:
        logits = output_logits(prompt, run(golden_model, prompt))
    finally:
        golden_model.set_attn_implementation("sdpa")
        handle.remove()
    assert len(patterns) == (attention == "eager")
    torch.testing.assert_close(logits[0], golden[f"a_{shot}_logits_q4"], atol=2e-5, rtol=0)
    if shot == "one_shot":
        torch.testing.assert_close(logits[1], golden["b_one_shot_logits_q4"], atol=2e-5, rtol=0)
    codes = golden["a_target_tokens"][LAYOUT.regions["output"]]
    torch.testing.assert_close(metrics.token_loss(logits[:1], codes[None]), golden[f"a_{shot}_nll"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_golden_head_activations(golden, golden_model, canvases, stack):
    """z through each head's slice of the projection, with the whole bias, is what was published."""
    blocks, seen = getattr(golden_model, stack).blocks, {}

    def keep(layer):
        return lambda module, inputs: seen.update({layer: inputs[0]})

    handles = [block.attn.proj.register_forward_pre_hook(keep(i)) for i, block in enumerate(blocks)]
    run(golden_model, prompt_of(canvases[1:], "one_shot"))
    for handle in handles:
        handle.remove()
    layers = [int(name.rsplit("_", 1)[1]) for name in golden if name.startswith(f"b_heads_{stack}_")]
    assert layers
    for layer in layers:
        proj = blocks[layer].attn.proj
        z = seen[layer][0].unflatten(-1, (16, -1))
        heads = torch.einsum("thd,ohd->tho", z, proj.weight.unflatten(-1, (16, -1))) + proj.bias
        torch.testing.assert_close(heads, golden[f"b_heads_{stack}_{layer}"], atol=2e-5, rtol=0)


def test_golden_tokens(golden, golden_model, canvases):
    assert torch.equal(golden_model.vqgan.encode(canvases[:1])[0], golden["a_target_tokens"])


@pytest.mark.parametrize("shot", ["one_shot", "zero_shot"])
def test_golden_completed_canvases(golden, golden_model, canvases, shot):
    prompt = prompt_of(canvases[:1], shot)
    inputs = prompt.canvas, prompt.visible, prompt.decoded
    published = golden[f"a_{shot}_image"].permute(2, 0, 1).int()
    drawn = golden_model.generate(*inputs, paste=False)[0]
    assert ((drawn * 255).round().int() - published).abs().le(1).float().mean() >= 0.999
    pasted = golden_model.generate(*inputs)[0]
    shown = torch.zeros(196).index_fill(0, prompt.visible, 1).view(14, 14).kron(torch.ones(16, 16)).bool()
    assert torch.equal(pasted[:, shown], prompt.canvas[0][:, shown])
    assert torch.equal(pasted[:, ~shown], drawn[:, ~shown])


def test_canvases_are_truncated_to_steps_of_a_255th(golden_model, canvases):
    prompt = VisualPrompt.from_canvas((canvases[:1] * 0.999).clamp(0, 1))
    steps = golden_model.generate(prompt.canvas, prompt.visible, prompt.decoded) * 255
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    shown = prompt.region("query").mul(255).floor()
    assert torch.equal(steps[..., 113:, :111].round()[..., 15:, :96], shown[..., 15:, :96])


@pytest.fixture
def small(small_config):
    torch.manual_seed(0)
    return MAEVQGANModel(small_config()).eval()


def small_prompt(rows=3):
    layout = Layout(canvas_size=64)
    canvas = torch.rand(rows, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return VisualPrompt.from_canvas(canvas, layout)


def test_rows_do_not_see_each_other(small):
    prompt = small_prompt()
    together = run(small, prompt)
    assert together.shape == (3, 16, 24)
    torch.testing.assert_close(together, torch.cat([run(small, row) for row in prompt]), atol=1e-5, rtol=0)


def test_what_is_hidden_is_not_seen(small):
    prompt = small_prompt(1)
    blank = prompt.canvas.clone()
    blank[..., 32:, 32:] = 1
    assert torch.equal(run(small, prompt), small(blank, prompt.visible, prompt.decoded).logits)
    blank[..., :32, :32] = 1
    assert not torch.allclose(run(small, prompt), small(blank, prompt.visible, prompt.decoded).logits)


def test_order_of_patches_does_not_matter(small):
    prompt = small_prompt()
    visible, decoded = prompt.visible.flip(0), prompt.decoded.flip(0)
    torch.testing.assert_close(
        small(prompt.canvas, visible, decoded).logits.flip(1), run(small, prompt), atol=1e-5, rtol=0
    )


def test_masks_of_each_row(small):
    prompt = small_prompt(2)
    shared = small(prompt.canvas, prompt.visible, prompt.decoded).logits
    own = small(prompt.canvas, prompt.visible.expand(2, -1), prompt.decoded.expand(2, -1)).logits
    torch.testing.assert_close(own, shared, atol=1e-6, rtol=0)
    visible = torch.stack([torch.tensor([0, 3, 7]), torch.tensor([15, 2, 9])])
    mixed = small(prompt.canvas, visible, prompt.decoded.expand(2, -1)).logits
    for i in range(2):
        alone = small(prompt.canvas[i : i + 1], visible[i], prompt.decoded).logits
        torch.testing.assert_close(mixed[i : i + 1], alone, atol=1e-5, rtol=0)


def test_gradients_reach_all_that_is_trained(small):
    prompt = small_prompt(1)
    with torch.enable_grad():
        codes = small.vqgan.encode(prompt.canvas)
        F.cross_entropy(run(small, prompt).flatten(0, 1), codes.flatten()).backward()
    without = {name for name, p in small.named_parameters() if p.requires_grad and p.grad is None}
    assert without and all(name.startswith("vqgan.") for name in without)
    assert small.encoder.pos_embed.grad is None and not small.encoder.pos_embed.requires_grad


def test_save_and_load(small, tmp_path):
    small.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(small.state_dict())
    for loaded in (MAEVQGANModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, MAEVQGANModel) and not loaded.training
        assert torch.equal(run(loaded, small_prompt()), run(small, small_prompt()))
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == small.config.to_diff_dict()
    half = MAEVQGANModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert run(half, small_prompt()).dtype == torch.bfloat16
    torch.testing.assert_close(run(half, small_prompt()).float(), run(small, small_prompt()), atol=0.05, rtol=0.05)
    completed = half.generate(small_prompt().canvas, small_prompt().visible, small_prompt().decoded)
    assert completed.dtype == torch.float32


@pytest.mark.parametrize(
    "sizes",
    [
        dict(image_size=112, patch_size=8, vqgan_fold=2),
        dict(image_size=96, patch_size=16, mlp_ratio=2.5, vqgan_attention_levels=()),
        dict(patch_size=4, vqgan_fold=1, vqgan_num_res_blocks=2, vqgan_attention_levels=(1, 2)),
        dict(num_attention_heads=1, decoder_hidden_size=48, decoder_num_attention_heads=3, num_codes=7),
        dict(patch_size=8, vqgan_fold=8, vqgan_channel_multipliers=(1,), vqgan_attention_levels=()),
    ],
)
def test_odd_sizes(small_config, sizes):
    config = small_config(**sizes)
    model = MAEVQGANModel(config).eval()
    layout = Layout(config.image_size, config.patch_size)
    assert config.layout == layout
    prompt = VisualPrompt.from_canvas(torch.rand(2, 3, config.image_size, config.image_size), layout)
    assert run(model, prompt).shape == (2, layout.num_patches, config.num_codes)
    codes = model.vqgan.encode(prompt.canvas)
    assert codes.shape == (2, layout.num_patches) and codes.max() < config.num_codes
    for form in (prompt, prompt.query_only()):
        completed = model.generate(form.canvas, form.visible, form.decoded)
        assert completed.shape == prompt.canvas.shape and completed.min() >= 0 and completed.max() <= 1


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(num_attention_heads=5), "hidden_size=32 is not a multiple of its 5"),
        (dict(decoder_hidden_size=18), "decoder_hidden_size=18 is not a multiple of 4"),
        (dict(patch_size=8), "reduces 16x but patch_size=8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(small_config, sizes, words):
    with pytest.raises(ValueError, match=words):
        small_config(**sizes)


def test_defaults_are_the_published_model():
    with torch.device("meta"):
        model = MAEVQGANModel(MAEVQGANConfig())
    assert len(model.encoder.blocks) == 24 and len(model.decoder.blocks) == 8
    assert model.encoder.blocks[0].attn.head_dim == 64 and model.decoder.blocks[0].attn.head_dim == 32
    assert MAEVQGANConfig().layout == LAYOUT


def test_weights_start_as_in_mae(small_config):
    torch.manual_seed(0)
    model = MAEVQGANModel(small_config(hidden_size=256, decoder_hidden_size=128, num_attention_heads=8))
    for stack in (model.encoder, model.decoder):
        width = stack.norm.weight.shape[0]
        assert torch.equal(stack.pos_embed, sincos_positions(4, width)) and not stack.pos_embed.requires_grad
        fc1, norm = stack.blocks[0].mlp.fc1, stack.blocks[0].norm1
        assert fc1.weight.std().item() == pytest.approx((2 / (5 * width)) ** 0.5, rel=0.03)  # Xavier, fan 4 to 1
        assert not fc1.bias.any() and not norm.bias.any() and (norm.weight == 1).all()
    assert model.encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_the_last_predictions_can_be_had_alone(small):
    prompt = small_prompt(2)
    every = run(small, prompt)
    few = small(prompt.canvas, prompt.visible, prompt.decoded, logits_to_keep=3).logits
    assert few.shape[1] == 3
    torch.testing.assert_close(few, every[:, -3:], atol=1e-5, rtol=0)


def test_positions_tell_rows_from_columns():
    embedding = sincos_positions(4, 32)[0]
    assert not embedding[0].any()
    patches = embedding[1:].view(4, 4, 32)
    column, row = patches.split(16, dim=-1)
    assert torch.equal(column[0], column[3]) and torch.equal(row[:, 0], row[:, 3])
    assert torch.equal(column[0, :, 0], torch.arange(4.0).sin()) and len(patches.flatten(0, 1).unique(dim=0)) == 16


def test_the_tokenizer_goes_to_the_nearest_code(small):
    vqgan = small.vqgan
    latent = vqgan.codebook.weight[[3, 0, 20]][None] + 1e-4
    assert vqgan.nearest(latent).tolist() == [[3, 0, 20]]
    drawn = vqgan.decode(torch.zeros(2, 16, dtype=torch.long))
    assert drawn.shape == (2, 3, 64, 64) and torch.equal(drawn[0], drawn[1])
