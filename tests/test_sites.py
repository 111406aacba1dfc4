"""Attention, MLP and residual stream beside heads, single prompts' activations, and adding: against plain hooks."""

import pytest
import torch
from einops import rearrange
from helpers import LAYOUT, random_module, random_prompts, small_painter, vit_mae_config
from transformers import ViTMAEForPreTraining

from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, TaskVectors, ablate, patch
from vtv_nnsight.layouts import positions
from vtv_nnsight.models.interface import SITES
from vtv_nnsight.models.painter import SegGPT
from vtv_nnsight.models.vit_mae import ViTMAE
from vtv_nnsight.testing import check_model
from vtv_nnsight.vectors import Activations, zero_vector

LAYERS = ("attn", "mlp", "residual")


@pytest.fixture(scope="module")
def module():
    return random_module()


@pytest.fixture(scope="module")
def model(module):
    return MAEVQGAN(module)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(3)


@pytest.fixture(scope="module")
def vectors(model):
    by_task = {name: random_prompts(4, seed) for seed, name in enumerate("ab", 1)}
    return TaskVectors.collect(model, by_task, sites=SITES, progress=False)


def place(block, site):
    return {"attn": block.attn, "mlp": block.mlp, "residual": block}[site]


def hooked(module, prompts, change):
    """Logits with `change(stage, site, layer, z [batch, token, head, head_dim], seen)` in the place of every z."""
    handles = []
    for stage in ("encoder", "decoder"):
        seen = positions(prompts.visible if stage == "encoder" else prompts.decoded)
        for layer, block in enumerate(getattr(module, stage).blocks):

            def heads(_, args, stage=stage, layer=layer, seen=seen, number=block.attn.num_heads):
                z = rearrange(args[0], "b t (h d) -> b t h d", h=number)
                return (change(stage, "heads", layer, z, seen).flatten(-2),)

            handles.append(block.attn.proj.register_forward_pre_hook(heads))
            for site in LAYERS:

                def whole(_, args, out, stage=stage, layer=layer, seen=seen, site=site):
                    return change(stage, site, layer, out[:, :, None], seen)[:, :, 0]

                handles.append(place(block, site).register_forward_hook(whole))
    try:
        with torch.no_grad():
            return module(prompts.canvas, prompts.visible, prompts.decoded).logits
    finally:
        for handle in handles:
            handle.remove()


def test_it_does_what_the_interface_promises(model, prompts):
    check_model(model, prompts)


def everywhere(model):
    """A mask of every stage and site, with nothing chosen."""
    stages = [stage.at(site) for stage in model.stages for site in SITES]
    return {s.key: torch.zeros(s.layers, 197, s.heads, dtype=torch.bool) for s in stages}


def logits(model, prompts, *args, **kwargs):
    with torch.no_grad(), model.trace(prompts):
        patch(model, *args, **kwargs)
        out = model.output.logits.save()
    return out


def replacing(mask, values, scale=1.0, mode="replace"):
    """A `change` for `hooked`, with loops; values by key, [layer, position, head, dim] or a row in front."""

    def change(stage, site, layer, z, seen):
        z, own = z.clone(), (stage, site)
        for row in range(len(z)):
            chosen = mask[own][layer]
            new = values[own][row] if values[own].ndim == 5 else values[own]
            for token, position in enumerate(seen.tolist()):
                for head in chosen[position].nonzero()[:, 0].tolist():
                    step = new[layer, position, head] - (z[row, token, head] if mode == "replace" else 0)
                    z[row, token, head] += scale * step
        return z

    return change


def test_collecting_is_what_hooks_see(model, module, vectors):
    seen_values = {}

    def record(stage, site, layer, z, seen):
        seen_values[(stage, site), layer] = (z.double(), seen)
        return z

    hooked(module, random_prompts(4, 1), record)
    assert len(seen_values) == 5 * 4
    for (name, layer), (z, seen) in seen_values.items():
        found = vectors["a"].mean[name][layer, seen]
        torch.testing.assert_close(found.double(), z.mean(0), rtol=0, atol=1e-5)
        variance = vectors["a"].variance[name][layer, seen]
        torch.testing.assert_close(variance.double(), z.var(0).mean(-1), rtol=1e-4, atol=1e-8)
    assert set(vectors.score()) == {(stage, site) for stage in ("encoder", "decoder") for site in SITES}


@pytest.mark.parametrize("site", [*LAYERS, SITES])
@pytest.mark.parametrize("form", ["one-shot", "query only"])
def test_patches_equal_hooks(model, module, prompts, vectors, site, form):
    space = PatchSpace(model, sites=site)
    chosen = PatchSet.random(space, len(space) // 2, seed=1)
    prompts = prompts.query_only() if form == "query only" else prompts
    mask, values = chosen.mask, vectors["b"].mean
    full = everywhere(model) | mask
    expected = hooked(module, prompts, replacing(full, values))
    found = logits(model, prompts, vectors["b"], chosen)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    added = logits(model, prompts, vectors["b"], chosen, mode="add", scale=0.7)
    expected = hooked(module, prompts, replacing(full, values, 0.7, "add"))
    torch.testing.assert_close(added, expected, rtol=0, atol=2e-5)
    assert (added - found).abs().max() > 1e-2


def test_units_have_the_modules_names(model):
    space = PatchSpace(model, sites=("mlp", "heads", "residual"))
    assert space.sites == ("heads", "mlp", "residual")
    assert [str(stage.key) for stage in space.stages][:4] == ["encoder", "encoder.mlp", "encoder.residual", "decoder"]
    assert "encoder.blocks.1.mlp @ query" in space.index_of and "decoder.blocks.1 @ output" in space.index_of
    assert "decoder.blocks.1.attn.heads[1] @ cls" in space.index_of
    assert len(space) == 36 + 2 * (3 * 2 + 2 * 3)
    whole = PatchSpace(model, granularity="head", sites="attn")
    assert whole.names == [f"{s}.blocks.{i}.attn" for s, n in (("encoder", 3), ("decoder", 2)) for i in range(n)]
    assert PatchSpace(model, stages="decoder", sites="mlp").names[0] == "decoder.blocks.0.mlp @ cls"


def test_float_gates_and_their_gradients(model, prompts, vectors):
    space, query = PatchSpace(model, sites=SITES), prompts.query_only()

    def loss(gates, mode):
        with model.trace(query):
            patch(model, vectors["b"], space.mask(gates), mode=mode)
            total = model.output.logits.square().mean().save()
        return total

    for mode in ("replace", "add"):
        gates = torch.full((len(space),), 0.1, requires_grad=True)
        loss(gates, mode).backward()
        names = ["encoder.blocks.1.mlp @ query", "decoder.blocks.0.attn @ output", "encoder.blocks.0 @ query"]
        for name in names:
            step = torch.zeros(len(space))
            step[space.index_of[name]] = 1e-2
            with torch.no_grad():
                slope = (loss(gates + step, mode) - loss(gates - step, mode)) / 2e-2
            torch.testing.assert_close(gates.grad[space.index_of[name]], slope, rtol=0.05, atol=1e-4)


def test_edit_scan_and_invokes(model, module, prompts, vectors, tmp_path):
    space, query = PatchSpace(model, sites=("mlp", "residual")), prompts.query_only()
    chosen = PatchSet.random(space, 9)
    expected = logits(model, query, vectors["b"], chosen)
    with model.edit() as (_, edited):
        patch(edited, vectors["b"], chosen)
    with torch.no_grad(), edited.trace(query):
        found = edited.output.logits.save()
    assert torch.equal(found, expected)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(query[:1]):
            plain = model.output.logits.save()
        with tracer.invoke(query[1:]):
            patch(model, vectors["b"], chosen)
            rest = model.output.logits.save()
    torch.testing.assert_close(rest, expected[1:], rtol=0, atol=1e-5)
    with torch.no_grad(), model.trace(query[:1]):
        bare = model.output.logits.save()
    torch.testing.assert_close(plain, bare, rtol=0, atol=1e-5)
    module.save_pretrained(tmp_path)
    lazy = MAEVQGAN(tmp_path)
    with lazy.scan(query):
        patch(lazy, vectors["b"], chosen)
        shape = lazy.output.logits.shape.save()
    assert shape == (3, 98, 64)


def test_a_prompts_own_activations(model, module, prompts):
    others = random_prompts(3, 9)
    run = Activations.collect(model, others, sites=SITES, batch_size=2, progress=False)
    space = PatchSpace(model, granularity="cell", sites=SITES)
    chosen = PatchSet.random(space, len(space) // 3)
    for mode in ("replace", "add"):
        expected = hooked(module, prompts, replacing(chosen.mask, run.values, 1.0, mode))
        found = logits(model, prompts, run, chosen, mode=mode)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    everything = PatchSet(PatchSpace(model, granularity="cell"), torch.ones(len(PatchSpace(model, granularity="cell"))))
    own = Activations.collect(model, prompts, progress=False)
    with torch.no_grad(), model.trace(prompts):
        plain = model.output.logits.save()
    torch.testing.assert_close(logits(model, prompts, own, everything), plain, rtol=0, atol=1e-5)
    swapped = logits(model, prompts[[2, 1]], own[torch.tensor([2, 1])], everything)
    torch.testing.assert_close(swapped, plain[[2, 1]], rtol=0, atol=1e-5)
    query = PatchSet(PatchSpace(model), torch.ones(36))
    into = logits(model, prompts.query_only(), own, query)
    assert (into - logits(model, prompts.query_only(), own[[1, 2, 0]], query)).abs().max() > 1e-2
    with pytest.raises(ValueError, match="activations of 3 rows was given; this batch has 2"):
        logits(model, prompts[:2], own, everything)
    with pytest.raises(ValueError, match="there are no prompts to collect"):
        Activations.collect(model, prompts[:0], progress=False)
    with pytest.raises(ValueError, match="the activations lack them"):
        hidden = Activations.collect(model, prompts.query_only(), progress=False)
        logits(model, prompts, hidden, everything)


def test_ablation(model, module, prompts, vectors):
    chosen = PatchSet.random(PatchSpace(model, sites=("attn", "mlp")), 8)
    full = everywhere(model)
    own = Activations.collect(model, random_prompts(3, 9), sites=("attn", "mlp"), progress=False)
    zero, mean = zero_vector(model, SITES), vectors.mean()
    for to, values in (("zero", zero.mean), (vectors, mean.mean), (mean, mean.mean), (own, own.values)):
        with torch.no_grad(), model.trace(prompts):
            ablate(model, chosen, to)
            found = model.output.logits.save()
        expected = hooked(module, prompts, replacing(full | chosen.mask, full | dict(values)))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="to='mean' is unknown; give"), model.trace(prompts):
        ablate(model, chosen, "mean")


def test_files(model, vectors, tmp_path):
    vectors.save(tmp_path / "vectors.safetensors")
    again = TaskVectors.load(tmp_path / "vectors.safetensors")
    for name, mean in vectors["b"].mean.items():
        torch.testing.assert_close(again["b"].mean[name], mean, rtol=0, atol=0, equal_nan=True)
    chosen = PatchSet.random(PatchSpace(model, sites=("heads", "mlp")), 7)
    chosen.save(tmp_path / "set.json")
    loaded = PatchSet.load(tmp_path / "set.json")
    assert loaded == chosen and loaded.space.names == chosen.space.names
    prompts = {name: random_prompts(4, seed) for seed, name in enumerate("ab", 1)}
    collected = TaskVectors.collect(model, prompts, sites=("heads", "mlp"), progress=False)
    mean = vectors["a"].mean["decoder", "mlp"]
    torch.testing.assert_close(collected["a"].mean["decoder", "mlp"], mean, equal_nan=True)


def test_odd_sites_and_modes_are_told(model, prompts, vectors):
    words = r"sites=\['mpl'\] are not sites of this model; choose from heads, attn, mlp, residual"
    with pytest.raises(ValueError, match=words):
        PatchSpace(model, sites="mpl")
    with pytest.raises(ValueError, match=words):
        TaskVectors.collect(model, {"a": prompts}, sites=["mpl"], progress=False)
    heads = TaskVectors.collect(model, {"a": prompts}, progress=False)["a"]
    chosen = PatchSet.random(PatchSpace(model, sites="mlp"), 3)
    with pytest.raises(ValueError, match="there is nothing of the encoder.mlp, only of the encoder"):
        logits(model, prompts, heads, PatchSet(chosen.space, torch.ones(len(chosen.space))))
    with pytest.raises(ValueError, match="mode='above' is unknown; choose from replace, add"):
        logits(model, prompts, vectors["a"], chosen, mode="above")
    with pytest.raises(ValueError, match="a mask of 'middle' was given"):
        logits(model, prompts, vectors["a"], {"middle": torch.ones(3, 197, 4)})
    with pytest.raises(ValueError, match="has the sites heads, that of 'a' heads, attn, mlp, residual"):
        vectors["a"] + heads
    assert model.layout == LAYOUT


def vit_mae():
    return ViTMAE(ViTMAEForPreTraining(vit_mae_config()).eval())


def painter():
    return SegGPT(small_painter(True).eval())


@pytest.mark.parametrize("make", [vit_mae, painter])
def test_other_families(make):
    """Everything that another run has at a site, put into this one, is what a hook that swaps the outputs does."""
    torch.manual_seed(0)
    model = make()
    network = model._module
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    prompts, others = (random_prompts(2, seed, model.layout).query_only() for seed in (0, 1))
    run = Activations.collect(model, others, sites=LAYERS, progress=False)
    layers = network.decoder.layers if make is vit_mae else network.encoder.layers
    stages = {"decoder": 0} if make is vit_mae else {"streams": 0, "merged": 2}
    for stage, first in stages.items():
        own = layers[first]
        for site, module in (("attn", own.attention), ("mlp", own.mlp), ("residual", own)):
            outputs = []

            def hook(_, args, out, outputs=outputs):
                outputs.append(out)
                return outputs[0]

            handle = module.register_forward_hook(hook)
            with torch.no_grad():
                for rows in (others, prompts):
                    expected = list(network(rows.canvas, rows.visible, rows.decoded).values())[0]
            handle.remove()
            space = PatchSpace(model, stages=stage, sites=site)
            chosen = PatchSet.named(space, [name for name in space.names if f"layers.{first}" in name])
            with torch.no_grad(), model.trace(prompts):
                patch(model, run, chosen)
                output = model.output.save()
            torch.testing.assert_close(list(output.values())[0], expected, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                bare = list(network(prompts.canvas, prompts.visible, prompts.decoded).values())[0]
            assert (bare - expected).abs().max() > 1e-3
