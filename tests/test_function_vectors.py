"""Function vectors against their definition, with hooks written by hand on small models of chance weights."""

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from vtv_nnsight import CausalLM, PatchSet, PatchSpace, TaskVectors, evaluate, tasks
from vtv_nnsight.studies import function_vectors as rival

TASK = tasks.Words("opposite", {f"big{c}": f"small{c}" for c in "abcdef"})
CHARACTERS = sorted({*"bigsmallcdefQA: \n", "§"})
SIZES = dict(vocab_size=len(CHARACTERS), hidden_size=16, num_hidden_layers=3, num_attention_heads=4)
FAMILIES = {
    "llama": LlamaConfig(intermediate_size=32, num_key_value_heads=2, **SIZES),
    "gpt2": GPT2Config(**SIZES),
    "gemma3": Gemma3TextConfig(intermediate_size=32, num_key_value_heads=2, head_dim=8, **SIZES),
}


@pytest.fixture(scope="module", params=FAMILIES)
def setting(request):
    """A model, a vector of heads and residual stream, and the prompts that it is of."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="§"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()
    with torch.no_grad():
        for weights in network.parameters():
            weights += 0.3 * torch.randn_like(weights)  # biases and norms, too
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="§", pad_token="§")
    model = CausalLM(network, tokenizer=wrapped)
    prompts = TASK.prompts(TASK.rows, n=4, shots=2)
    vectors = TaskVectors.collect(model, {TASK.name: prompts}, sites=["heads", "residual"], progress=False)
    return model, network, vectors[TASK.name], prompts


def blocks(network):
    """The decoder layers, their output projections, and what stands behind these."""
    layers = network.transformer.h if hasattr(network, "transformer") else network.model.layers
    norms = [getattr(layer, "post_attention_layernorm", None) for layer in layers]
    projections = [getattr(layer, "attn", None) or layer.self_attn for layer in layers]
    return layers, [getattr(attention, "c_proj", None) or attention.o_proj for attention in projections], norms


@torch.no_grad()
def logits(model, network, texts):
    """[text, vocabulary], of what comes after each text, alone."""
    rows = [model.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    return torch.cat([network(row).logits[:, -1] for row in rows]).double()


def probabilities(model, network, prompts):
    right = [model.tokenizer(answer).input_ids[0] for answer in prompts.answers]
    return logits(model, network, prompts.texts).softmax(-1)[torch.arange(len(right)), right]


def test_corrupted_prompts_are_the_same_with_their_answers_in_another_order():
    right, wrong = TASK.prompts(TASK.rows, 6, 3, shots=5), rival.corrupted_prompts(TASK, TASK.rows, 6, 3, shots=5)
    assert right.query_texts == wrong.query_texts and right.answers == wrong.answers and right.texts != wrong.texts
    for one, other in zip(right.texts, wrong.texts):
        assert sorted(one.split()) == sorted(other.split()) and one.split()[1::4] == other.split()[1::4]


def test_indirect_effects_are_differences_of_probabilities(setting):
    model, network, vector, _ = setting
    corrupted = rival.corrupted_prompts(TASK, TASK.rows, 3, shots=2)
    effects = rival.indirect_effects(model, vector, TASK, corrupted)
    space, before = PatchSpace(model), probabilities(model, network, corrupted[:-1])
    for unit in (1, 6, 11):
        layer, head = divmod(unit, 4)
        mean = vector.mean["layers"][layer, 0, head]

        def put(module, inputs, mean=mean, head=head):
            z = inputs[0].clone()
            z.view(*z.shape[:2], 4, -1)[:, -1, head] = mean
            return (z,)

        with blocks(network)[1][layer].register_forward_pre_hook(put):
            after = probabilities(model, network, corrupted[:-1])
        assert space.names[unit].endswith(f"heads[{head}]")
        assert effects[unit].item() == pytest.approx((after - before).mean().item(), abs=1e-6)
    assert effects.abs().max() > 1e-4


def test_a_function_vector_is_what_its_heads_add_to_the_residual_stream(setting):
    model, network, vector, _ = setting
    choices = torch.tensor([False, True, True, False, *[False] * 4, True, False, False, True])
    made = rival.function_vector(model, vector, PatchSet(PatchSpace(model), choices)).mean["layers", "residual"]
    expected = torch.zeros(16)
    with torch.no_grad():
        for layer, (project, norm) in enumerate(zip(*blocks(network)[1:])):
            z = vector.mean["layers"][layer, 0]
            weight = project.weight if norm is None and hasattr(project, "nx") else project.weight.T
            parts = torch.stack([z[h] @ weight.view(4, -1, 16)[h] for h in range(4)])
            if hasattr(network.config, "query_pre_attn_scalar"):  # Gemma: the norm of all heads' sum
                whole = parts.sum(0)
                parts = parts * (whole.square().mean() + norm.eps).rsqrt() * (1 + norm.weight)
            expected += parts[choices.view(3, 4)[layer]].sum(0)
    assert made.shape == (3, 1, 1, 16) and torch.allclose(made, expected.expand_as(made), atol=1e-5)


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_the_best_layer_is_where_the_vector_helps_most(setting, mode):
    model, network, vector, prompts = setting
    if mode == "add":
        vector = rival.function_vector(model, vector, PatchSet.random(PatchSpace(model), 5))
    judged, by_layer = tasks.scored_by(TASK, rival.PROBABILITY), []
    for layer, module in enumerate(blocks(network)[0]):

        def change(module, inputs, output, layer=layer):
            hidden = output if torch.is_tensor(output) else output[0]
            value = vector.mean["layers", "residual"][layer, 0, 0]
            hidden[:, -1] = value + (hidden[:, -1] if mode == "add" else 0)
            return output

        with module.register_forward_hook(change):
            by_layer.append(probabilities(model, network, prompts.query_only()))
    best = rival.best_layer(model, judged, prompts, [vector], mode)
    layer = max(range(3), key=lambda layer: by_layer[layer].mean())
    assert best.patches.choices.tolist() == [i == layer for i in range(3)]
    table = evaluate(model, judged, prompts, {"best": best}, keep=0, progress=False)
    assert table.values(TASK.name, "best").tolist() == pytest.approx(by_layer[layer].tolist(), abs=1e-6)


def test_one_example_has_no_other_order_and_two_are_swapped():
    with pytest.raises(ValueError, match="shots=1"):
        rival.corrupted_prompts(TASK, TASK.rows, 3, shots=1)
    right, wrong = TASK.prompts(TASK.rows, 8, shots=2), rival.corrupted_prompts(TASK, TASK.rows, 8, shots=2)
    assert not any(one == other for one, other in zip(right.texts, wrong.texts))


def test_heads_are_counted_and_their_effects_finite(setting):
    model, effects = setting[0], torch.arange(12.0)
    assert rival.top_heads(model, effects, 2).choices.nonzero().flatten().tolist() == [10, 11]
    for k in (-2, 0, 13, 2.5):
        with pytest.raises((TypeError, ValueError), match=f"k={k}"):
            rival.top_heads(model, effects, k)
    with pytest.raises(ValueError, match="an effect"):
        rival.top_heads(model, effects * torch.nan, 2)


def test_a_function_vector_is_of_this_model_and_of_heads_at_the_last_token(setting):
    model, network, vector, prompts = setting
    heads = rival.top_heads(model, torch.arange(12.0), 2)
    other = CausalLM(AutoModelForCausalLM.from_config(network.config).eval(), tokenizer=model.tokenizer)
    with pytest.raises(ValueError, match="other weights"):
        rival.function_vector(other, vector, heads)
    before = PatchSpace(model, TASK.prompts(TASK.rows, 1, shots=2, positions=2).layout)
    with pytest.raises(ValueError, match="at the last token"):
        rival.function_vector(model, vector, PatchSet(before, torch.ones(len(before), dtype=torch.bool)))
    stream = TaskVectors.collect(model, {TASK.name: prompts}, sites="residual", progress=False)[TASK.name]
    with pytest.raises(ValueError, match="has no heads"):
        rival.function_vector(model, stream, heads)
    with pytest.raises(ValueError, match="1 corrupted prompt"):
        rival.indirect_effects(model, vector, TASK, prompts[:1])
    with pytest.raises(TypeError, match="vectors"):
        rival.best_layer(model, TASK, prompts, vector)
