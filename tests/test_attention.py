import pytest
import torch
from attention import attention_to_regions

from vtv_nnsight import MAEVQGAN, Layout, data, tasks
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel


@pytest.fixture
def module(small_config):
    torch.manual_seed(0)
    module = MAEVQGANModel(small_config(decoder_num_hidden_layers=2)).eval()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


@pytest.fixture
def images():
    return data.scenes("train", n=12, seed=0)


@pytest.mark.parametrize("zero_shot", [False, True])
def test_attention_to_regions_is_the_pattern_summed(module, images, zero_shot):
    module.set_attn_implementation("eager")
    prompts = tasks.identity.prompts(images, n=3, layout=Layout(64, 16))
    prompts = prompts.query_only() if zero_shot else prompts
    found = attention_to_regions(MAEVQGAN(module), prompts)
    assert set(found) == {"cls", "query", "output"} | (set() if zero_shot else {"example_input", "example_output"})
    patterns = []
    for block in module.decoder.blocks:
        block.attn.softmax.register_forward_hook(lambda *args: patterns.append(args[-1]))
    module(prompts.canvas, prompts.visible, prompts.decoded)
    seen = prompts.decoded.tolist()
    rank = {name: [1 + seen.index(i) for i in prompts.layout.regions[name].tolist()] for name in found if name != "cls"}
    for layer, pattern in enumerate(patterns):
        mean = pattern.mean((0, 1))[rank["output"]].mean(0)
        for name in found:
            expected = mean[rank[name]].sum() if name != "cls" else mean[0]
            torch.testing.assert_close(found[name][layer], expected)
    torch.testing.assert_close(sum(found.values()), torch.ones(2))


def test_attention_is_read_however_the_model_was_loaded(module, images):
    prompts = tasks.identity.prompts(images, n=2, layout=Layout(64, 16))
    found = []
    for implementation in ("sdpa", "eager"):
        module.set_attn_implementation(implementation)
        found.append(attention_to_regions(MAEVQGAN(module), prompts))
        assert module.config._attn_implementation == implementation
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])
