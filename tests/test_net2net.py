"""VQGAN's own transformer, on small random weights in a file as taming-transformers writes them."""

import pytest
import torch
from helpers import GPT_CODES, GPT_HEADS, GPT_LAYERS, GPT_WIDTH, beit_module, net2net_weights
from torch.nn import functional as F

from vtv_nnsight import Layout, Net2Net, PatchSpace, TaskVectors, data, evaluate, tasks
from vtv_nnsight.models import load_model


class Hyperparameters(dict):
    """What Lightning pickles beside the weights, and a user does not have."""


@pytest.fixture(scope="module")
def state():
    return net2net_weights()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("taming") / "last.ckpt"
    torch.save({"epoch": 3, "state_dict": state, "hyper_parameters": Hyperparameters(n_head=GPT_HEADS)}, path)
    return path


@pytest.fixture(scope="module")
def model(file):
    return Net2Net(file, num_attention_heads=GPT_HEADS, dispatch=True)


@pytest.fixture(scope="module")
def prompts(model):
    return tasks.identity.prompts(data.scenes("train", n=30, seed=0), n=3, layout=model.layout)


def gpt(state, tokens, places):
    """Logits [batch, token, code] of the transformer, all tokens at once and step for step as it was published."""
    state = {name.removeprefix("transformer."): value for name, value in state.items()}

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (GPT_WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    x = state["tok_emb.weight"][tokens] + state["pos_emb"][0, places]
    count, size = tokens.shape[1], GPT_WIDTH // GPT_HEADS
    for i in range(GPT_LAYERS):
        h = norm(x, f"blocks.{i}.ln1")
        q, k, v = (
            linear(h, f"blocks.{i}.attn.{n}").view(-1, count, GPT_HEADS, size) for n in ("query", "key", "value")
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / size**0.5
        scores = scores.masked_fill(state[f"blocks.{i}.attn.mask"][:, :, :count, :count] == 0, -torch.inf)
        z = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(-1, count, GPT_WIDTH)
        x = x + linear(z, f"blocks.{i}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"blocks.{i}.ln2"), f"blocks.{i}.mlp.0")), f"blocks.{i}.mlp.2")
    return norm(x, "ln_f") @ state["head.weight"].T


def one_by_one(model, state, prompts, condition=(0,)):
    """Codes and logits [batch, decoded patch, …], the whole sequence run anew for each code."""
    shown = prompts.layout.pixels(prompts.visible)
    codes = model._module.vqgan.encode(torch.where(shown, prompts.canvas, torch.ones(()))).clone()
    ids, begin = prompts.decoded.tolist(), torch.tensor([condition] * len(codes))
    places = torch.tensor([*range(len(condition)), *(len(condition) + i for i in ids)])
    every = []
    for rank, patch in enumerate(ids):
        tokens = torch.cat([begin, codes[:, ids[:rank]]], 1)
        every.append(gpt(state, tokens, places[: tokens.shape[1]])[:, -1])
        if patch not in prompts.visible.tolist():
            codes[:, patch] = every[-1].argmax(-1)
    return codes[:, ids], torch.stack(every, 1)


@pytest.mark.parametrize("form", ["one-shot", "zero-shot"])
@torch.no_grad()
def test_codes_are_sampled_row_by_row(model, state, prompts, form):
    """As when the whole sequence is run for each: the hidden patches', the visible ones given."""
    asked = prompts.query_only() if form == "zero-shot" else prompts
    codes, logits = one_by_one(model, state, asked)
    with model.trace(asked):
        found = model.output.save()
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-4)
    hidden = ~torch.isin(asked.decoded, asked.visible)
    assert hidden.sum() == 16 and len(found.codes[:, hidden].unique()) > 3
    assert not torch.equal(found.codes[0, hidden], found.codes[1, hidden])


@torch.no_grad()
def test_conditions_come_before_the_codes(state, tmp_path):
    """A class, or several tokens, for which there are places."""
    path = tmp_path / "last.ckpt"
    long = net2net_weights(codes=20, length=70)
    torch.save({"state_dict": long}, path)
    with pytest.raises(ValueError, match="has 70 places, and the codes need 81"):
        Net2Net(path, num_attention_heads=GPT_HEADS, image_size=36)
    for condition in (19, (3, 4, 5)):
        model = Net2Net(path, num_attention_heads=GPT_HEADS, condition=condition, dispatch=True)
        prompts = tasks.identity.prompts(data.scenes("train", n=30, seed=0), n=2, layout=model.layout)
        tokens = (condition,) if isinstance(condition, int) else condition
        codes, logits = one_by_one(model, long, prompts, tokens)
        found = model(prompts)
        assert found.logits.shape[-1] == GPT_CODES  # entries of the vocabulary that are no codes are never drawn
        torch.testing.assert_close(found.logits[:, 0], logits[:, 0, :GPT_CODES], rtol=1e-4, atol=1e-4)
        assert found.codes.max() < GPT_CODES
    with pytest.raises(ValueError, match="condition=20 is unknown to the transformer; give 0 to 19"):
        Net2Net(path, num_attention_heads=GPT_HEADS, condition=20)


def test_hidden_patches_are_not_looked_at(model, prompts):
    shown = prompts.layout.pixels(prompts.visible)
    other = prompts.canvas.clone()
    other[..., ~shown] = 0
    found = model(other, prompts.visible, prompts.decoded)
    assert torch.equal(found.codes, model(prompts).codes)
    other[..., shown] = 1 - other[..., shown]
    assert not torch.equal(model(other, prompts.visible, prompts.decoded).codes, found.codes)


def test_what_is_seen_stays_and_the_codes_are_painted(model, prompts):
    assert model.layout == Layout(canvas_size=32, patch_size=4)
    canvas, shown = model.generate(prompts), prompts.layout.pixels(prompts.visible)
    assert torch.equal(canvas[..., shown], prompts.canvas.mul(255).floor().div(255)[..., shown])
    drawn = model._module.vqgan.decode(model(prompts).codes)
    assert (canvas - drawn)[..., ~shown].abs().max() <= 1 / 255 + 1e-6
    assert torch.equal(model.paint(model(prompts), prompts), canvas)
    with model.generate(prompts) as tracer:
        traced = tracer.result.save()
    assert torch.equal(traced, canvas)
    rows = model.generate(prompts.query_only(), paste=False)
    assert rows.shape == canvas.shape
    codes = model._module.vqgan.encode(prompts.canvas)
    assert torch.equal(model.truth(prompts), codes[:, prompts.layout.regions["output"]])
    assert (model.ceiling(prompts) - model._module.vqgan.decode(codes)).abs().max() <= 1 / 255 + 1e-6


def test_sampling_is_seeded(model, prompts):
    def codes(**sampling):
        return model(prompts, **sampling).codes

    hot = codes(temperature=1.0, seed=1)
    assert torch.equal(codes(temperature=1.0, seed=1), hot) and not torch.equal(codes(temperature=1.0, seed=2), hot)
    assert torch.equal(codes(temperature=1.0, top_k=1), codes()) and torch.equal(codes(temperature=1e-6), codes())
    assert not torch.equal(model.generate(prompts), model.generate(prompts, temperature=1.0, seed=1))
    few = model(prompts, temperature=5.0, top_k=2)
    hidden = ~torch.isin(prompts.decoded, prompts.visible)
    best = few.logits[:, hidden].topk(2).indices
    assert (best == few.codes[:, hidden, None]).any(-1).all() and not torch.equal(best[..., 0], few.codes[:, hidden])


def test_invokes_share_a_forward(model, prompts):
    alone = [model(prompts[i]) for i in range(2)]
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(prompts[0]):
            first = model.output.codes.save()
        with tracer.invoke(prompts[1]):
            second = model.output.codes.save()
    assert torch.equal(first, alone[0].codes) and torch.equal(second, alone[1].codes)


def test_a_published_file_is_evaluated(model, file, prompts):
    """RunResults by `load_model`; weights are not read before they are needed."""
    loaded = load_model(file, num_attention_heads=GPT_HEADS)
    assert isinstance(loaded, Net2Net) and not loaded.dispatched
    table = evaluate(loaded, tasks.identity, prompts, progress=False)
    assert set(table.frame["condition"]) == {"one-shot", "zero-shot", "tokenizer", "copy"}
    own = tasks.identity.score(model.paint(model(prompts), prompts)[..., 17:, 17:], prompts.region("output"))
    found = table.frame[table.frame["condition"] == "one-shot"]["score"]
    torch.testing.assert_close(torch.tensor(found.to_numpy()), own.double())
    assert table.frame["loss"].isna().all()
    half = Net2Net(file, num_attention_heads=GPT_HEADS, dtype=torch.bfloat16, dispatch=True)
    assert half._module.dtype == torch.bfloat16 and half.generate(prompts).dtype == torch.float32


@pytest.mark.slow
def test_models_of_vps_table_by_one_command(vtv, state, dalle_folder, tmp_path):
    """BEiT with its tokenizer in its folder, and the transformer's file, which must have 16 heads."""
    beit_module().save_pretrained(tmp_path / "beit")
    for part in dalle_folder.iterdir():
        (tmp_path / "beit" / part.name).write_bytes(part.read_bytes())
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    sources, out = ("tiny", "--beside", tmp_path / "beit", "--beside", tmp_path / "last.ckpt"), tmp_path / "out"
    code, said, complaint = vtv("evaluate", *sources, "--n", 12, "--tasks", "identity", "-o", out)
    assert code == 0, complaint
    assert {path.name for path in out.iterdir()} == {"0_tiny", "1_beit", "2_last.ckpt", "models.md"}
    assert said.count("identity, MSE ↓") == 3
    code, said, complaint = vtv("info", tmp_path / "last.ckpt")
    assert code == 0 and "Net2Net, canvas 32x32" in said, complaint
    code, said, complaint = vtv("info", tmp_path / "beit")
    assert code == 0 and "BEiT, canvas" in said, complaint


def test_what_it_does_not_offer_is_said(model, prompts):
    assert model.stages == () and model.losses == ()
    with pytest.raises(ValueError, match="there is no stage 'decoder': this model samples code by code"):
        model.attention("decoder", 0)
    for use in (PatchSpace, lambda each: TaskVectors.collect(each, {"identity": prompts}, progress=False)):
        with pytest.raises(ValueError, match="Net2Net has no heads to read or patch: it can be evaluated"):
            use(model)
    rows = [ids.expand(3, -1) for ids in (prompts.visible, prompts.decoded)]
    with pytest.raises(ValueError, match="codes are sampled for patches that rows share"):
        model(prompts.canvas, *rows)


def test_what_does_not_fit_is_refused(state, tmp_path):
    def refused(words, content, **options):
        torch.save({"state_dict": content}, tmp_path / "some.ckpt")
        with pytest.raises(ValueError, match=words):
            Net2Net(tmp_path / "some.ckpt", **{"num_attention_heads": GPT_HEADS, "dispatch": True, **options})

    refused("some.ckpt .*`embed_dim` must be divisible by num_heads", state, num_attention_heads=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'attn_implementation'"):
        Net2Net(tmp_path / "some.ckpt", attn_implementation="eager")
    picture = state | {"cond_stage_model.encoder.conv_in.weight": torch.zeros(2)}
    refused("was trained on conditions that are pictures", picture)
    refused("permuter.forward_shuffle_idx unknown", state | {"permuter.forward_shuffle_idx": torch.arange(4)})
    absent = {name: value for name, value in state.items() if name != "transformer.blocks.1.mlp.2.bias"}
    refused("some.ckpt: transformer.blocks.1.mlp.2.bias missing", absent)
    alone = {name: value for name, value in state.items() if name.startswith("transformer.")}
    refused("is not a VQGAN checkpoint: it has no 'first_stage_model.encoder.conv_in.weight'", alone)
    misshapen = state | {"transformer.blocks.0.attn.proj.weight": torch.zeros(3, 3)}
    refused(r"attn.proj.weight of shape \[3, 3\]; the other sizes ask for \[16, 16\]", misshapen)
    vqgan = {name.removeprefix("first_stage_model."): value for name, value in state.items() if "first" in name}
    refused("is not a VQGAN checkpoint", vqgan)
    refused("the transformer knows 8 codes, and its VQGAN has 16", state | net2net_weights(codes=8) | {
        name: value for name, value in state.items() if name.startswith("first_stage_model.")
    })  # fmt: skip
    with pytest.raises(FileNotFoundError, match="there is no file .*none.ckpt"):
        Net2Net(tmp_path / "none.ckpt")
    with pytest.raises(TypeError, match="Linear is no source of Net2Net"):
        Net2Net(torch.nn.Linear(1, 1))
