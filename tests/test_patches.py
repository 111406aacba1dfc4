import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import LAYOUT, all_heads, random_module, random_prompts

from vtv_nnsight import (
    MAEVQGAN,
    Layout,
    PatchSet,
    PatchSpace,
    TaskVectors,
    VisualPrompt,
    ablate,
    capture,
    evaluate,
    patch,
    search,
    tasks,
)
from vtv_nnsight.evaluation import Condition
from vtv_nnsight.layouts import CLS, positions
from vtv_nnsight.models.interface import GRANULARITIES, QUERY_ONLY, ByStage
from vtv_nnsight.patching.forward import find_loss, losses
from vtv_nnsight.report.gates import generate_with_gates
from vtv_nnsight.runs.bundles import Bundle
from vtv_nnsight.vectors import zero_vector


@pytest.fixture(scope="module")
def module():
    return random_module()


@pytest.fixture(scope="module")
def model(module):
    return MAEVQGAN(module)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(4)


@pytest.fixture(scope="module")
def vectors(model, prompts):
    other = random_prompts(5, 1)
    by_task = {"a": prompts[:1], "b": other, "zero-shot": other.query_only()}
    return TaskVectors.collect(model, by_task, progress=False)


def logits(model, prompts, *args, **kwargs):
    with torch.no_grad(), model.trace(prompts):
        if args:
            patch(model, *args, **kwargs)
        out = model.output.logits.save()
    return out


def by_hand(module, prompts, vector, mask, scale=1.0):
    """Logits of a patch with forward hooks and loops: what `patch` must equal."""
    handles = []
    for stack in ("encoder", "decoder"):
        seen = positions(prompts.visible if stack == "encoder" else prompts.decoded)
        for layer, block in enumerate(getattr(module, stack).blocks):
            attention = block.attn

            def hook(_, args, attention=attention, layer=layer, i=stack, seen=seen):
                z = args[0].reshape(*args[0].shape[:-1], attention.num_heads, attention.head_dim).clone()
                for row in range(len(z)):
                    chosen = (mask[i][row] if mask[i].ndim == 4 else mask[i])[layer]
                    for token, position in enumerate(seen.tolist()):
                        for head in chosen[position].nonzero()[:, 0].tolist():
                            new = vector.mean[i][layer, position, head]
                            z[row, token, head] += scale * (new - z[row, token, head])
                return (z.flatten(-2),)

            handles.append(attention.proj.register_forward_pre_hook(hook))
    try:
        with torch.no_grad():
            return module(prompts.canvas, prompts.visible, prompts.decoded).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def golden_traced(golden, golden_model):
    model = MAEVQGAN(golden_model)
    a, b = (VisualPrompt.from_canvas(golden[f"canvas_{name}"]) for name in "ab")
    return model, a, TaskVectors.collect(model, {"b": b}, progress=False)["b"]


@pytest.mark.parametrize(
    "shot, name, granularity",
    [
        ("zero_shot", "g0", "head"),
        ("one_shot", "g0", "head"),
        ("zero_shot", "g1", "quadrant"),
        ("zero_shot", "g2", "token"),
    ],
)
def test_golden(golden, golden_traced, shot, name, granularity):
    model, a, b = golden_traced
    chosen = PatchSet(PatchSpace(model, a.layout, granularity), golden[f"mask_{name}"])
    a = a.query_only() if shot == "zero_shot" else a
    output = a.layout.index(a.decoded, a.layout.regions["output"]) - 1
    expected = golden[f"a_{shot}_patched_{name}_logits_q4"]
    found = logits(model, a, b, chosen)[0, output]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert (expected - golden[f"a_{shot}_logits_q4"]).abs().max() > 1e-3
    with model.generate(a, paste=False) as tracer:
        patch(model, b, chosen)
        drawn = tracer.result.save()
    published = golden[f"a_{shot}_patched_{name}_image"].permute(2, 0, 1).int()
    assert ((drawn[0] * 255).round().int() - published).abs().le(1).float().mean() >= 0.999


def test_published_counts_and_order(golden_traced):
    model, a, _ = golden_traced
    spaces = {name: PatchSpace(model, a.layout, name) for name in QUERY_ONLY}
    assert [len(space) for space in spaces.values()] == [512, 1152, 31872]
    names = spaces["quadrant"].names
    assert names[3 * 32 + 5 * 2 + 1] == "encoder.blocks.3.attn.heads[5] @ query"
    assert names[768 + 2 * 48 + 7 * 3 + 2] == "decoder.blocks.2.attn.heads[7] @ output"
    assert spaces["token"].names[50 * 17 + 1] == "encoder.blocks.1.attn.heads[1] @ patch 98"
    assert spaces["token"].names[19200 + 99] == "decoder.blocks.0.attn.heads[1] @ cls"
    for stack, sizes in (("encoder", (384, 768, 19200)), ("decoder", (128, 384, 12672))):
        assert tuple(len(PatchSpace(model, a.layout, name, stack)) for name in QUERY_ONLY) == sizes


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_masks_hold_the_units_positions(model, granularity):
    space = PatchSpace(model, granularity=granularity)
    where = {"cls": torch.tensor([CLS]), "all tokens": positions(LAYOUT.all_patches)}
    where |= {region: 1 + ids for region, ids in LAYOUT.regions.items()}
    for i in torch.randperm(len(space), generator=torch.Generator().manual_seed(0))[:12].tolist():
        stack, layer, head, group = (int(part[i]) for part in space.units)
        path = ("encoder", "decoder")[stack]
        name = list(space.groups[path])[group]
        expected = ByStage(
            encoder=torch.zeros(3, 197, 4, dtype=torch.bool), decoder=torch.zeros(2, 197, 2, dtype=torch.bool)
        )
        expected[path][layer, where.get(name) if name in where else 1 + int(name.split()[1]), head] = True
        found = space.mask(torch.arange(len(space)) == i)
        assert all(map(torch.equal, found.values(), expected.values()))
        at = "" if granularity == "head" else f" @ {name}"
        assert space.names[i] == f"{path}.blocks.{layer}.attn.heads[{head}]{at}"
    assert space.mask(torch.zeros(5, len(space)))["decoder"].shape == (5, 2, 197, 2)


def test_cells_are_all_that_a_one_shot_prompt_shows(model, prompts, vectors):
    space = PatchSpace(model, granularity="cell")
    assert list(space.groups["encoder"]) == ["cls", "example_input", "example_output", "query"]
    assert list(space.groups["decoder"]) == ["cls", "example_input", "example_output", "query", "output"]
    assert space.names[4 * 5 + 1] == "encoder.blocks.1.attn.heads[1] @ example_input"
    everything, heads = PatchSet(space, torch.ones(len(space))), PatchSpace(model, granularity="head")
    whole = logits(model, prompts, vectors["b"], PatchSet(heads, torch.ones(len(heads))))
    assert torch.equal(logits(model, prompts, vectors["b"], everything), whole)
    with pytest.raises(ValueError, match="encoder cannot be patched at patch 0.* these prompts do not show them"):
        logits(model, prompts.query_only(), vectors["b"], everything)


def test_every_patch_is_in_one_cell_or_the_background():
    layout = Layout(112, 8, examples=2)  # three rows of cells in fourteen of patches
    space = PatchSpace(MAEVQGAN(random_module()), layout, "cell")
    at = torch.cat(list(space.groups["decoder"].values()))
    assert len(at) == len(at.unique()) == layout.num_positions
    assert set(layout.regions["example_input_1"].tolist()) & set(layout.regions["example_input_2"].tolist())
    assert torch.equal(space.groups["decoder"]["query"], 1 + layout.regions["query"])
    assert list(space.groups["decoder"])[:2] == ["cls", "background"]


def test_split_and_average_follow_the_units(model):
    space = PatchSpace(model)
    values = torch.arange(len(space)).double()
    split = space.split(values)
    for i, (stack, layer, head, group) in enumerate(zip(*(part.tolist() for part in space.units))):
        assert split[list(split)[stack]][layer, head, group] == i
    masks = space.mask(values).map(lambda mask: mask.mT)
    torch.testing.assert_close(space.average(masks), values)
    masks["encoder"][0, 0, 1 + LAYOUT.regions["query"][:5]] = torch.nan
    torch.testing.assert_close(space.average(masks), values)
    decoder = PatchSpace(model, stages="decoder")
    torch.testing.assert_close(decoder.average(masks), values[24:])
    assert not decoder.mask(torch.ones(len(decoder)))["encoder"].any()


@pytest.mark.parametrize(
    ("granularity", "shot"),
    [(name, shot) for name in QUERY_ONLY for shot in ("one-shot", "zero-shot")] + [("cell", "one-shot")],
)
def test_patches_equal_hooks(model, module, prompts, vectors, granularity, shot):
    space = PatchSpace(model, LAYOUT, granularity)
    chosen = PatchSet.random(space, len(space) // 3)
    prompts = prompts.query_only() if shot == "zero-shot" else prompts
    expected = by_hand(module, prompts, vectors["b"], chosen.mask)
    found = logits(model, prompts, vectors["b"], chosen)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - logits(model, prompts)).abs().max() > 1e-2
    with model.trace(prompts):
        patch(model, vectors["b"], chosen)
        with_gradients = model.output.logits.save()
    torch.testing.assert_close(with_gradients, expected, rtol=0, atol=1e-5)


def test_a_mask_for_each_row(model, module, prompts, vectors):
    space = PatchSpace(model, granularity="token")
    choices = torch.rand(4, len(space), generator=torch.Generator().manual_seed(0)) < torch.tensor(
        [[0.0], [0.1], [0.5], [1]]
    )
    masks, zero_shot = space.mask(choices), prompts.query_only()
    found = logits(model, zero_shot, vectors["zero-shot"], masks)
    torch.testing.assert_close(found, by_hand(module, zero_shot, vectors["zero-shot"], masks), rtol=0, atol=1e-5)
    for row in range(4):
        alone = logits(model, zero_shot[row], vectors["zero-shot"], PatchSet(space, choices[row]))
        torch.testing.assert_close(found[row : row + 1], alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="a mask for 4 rows was given; this batch has 2"):
        logits(model, zero_shot[:2], vectors["zero-shot"], masks)


@pytest.mark.parametrize("shot", ["one-shot", "zero-shot"])
def test_a_prompts_own_vector_everywhere_changes_nothing_and_anothers_does(model, prompts, shot):
    form = (lambda p: p.query_only()) if shot == "zero-shot" else (lambda p: p)
    own, other = (TaskVectors.collect(model, {"x": form(prompts[i])}, progress=False)["x"] for i in (0, 1))
    everywhere = PatchSet(PatchSpace(model, granularity="head"), torch.ones(16))
    plain = logits(model, form(prompts[0]))
    torch.testing.assert_close(logits(model, form(prompts[0]), own, everywhere), plain, rtol=0, atol=1e-5)
    patched = logits(model, form(prompts[0]), other, everywhere)
    assert (patched - plain).abs().max() > 1e-2
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(form(prompts[0])):
            patch(model, other, everywhere)
        with tracer.invoke():
            seen = [block.attn.heads for block in model.decoder.blocks].save()
            patched_again = model.output.logits.save()
    for layer, z in enumerate(seen):
        at = positions(form(prompts).decoded)
        torch.testing.assert_close(z[0], other.mean["decoder"][layer, at], rtol=0, atol=0)
    assert torch.equal(patched, patched_again)


def test_only_layers_with_something_to_do_are_touched(model, prompts, vectors, monkeypatch):
    space = PatchSpace(model)
    chosen = PatchSet.named(
        space, ["encoder.blocks.1.attn.heads[2] @ query", "decoder.blocks.1.attn.heads[0] @ output"]
    )
    from vtv_nnsight.patching import patching as patches

    touched, change = [], patches._Edit.change
    monkeypatch.setattr(patches._Edit, "change", lambda s, z, i: touched.append((s.stage.name, i)) or change(s, z, i))
    logits(model, prompts, vectors["b"], chosen)
    assert touched == [("encoder", 1), ("decoder", 1)]
    before = all_heads(model, prompts)
    with model.edit() as (_, edited):
        patch(edited, vectors["b"], chosen)
    with torch.no_grad(), edited.trace(prompts):
        z = edited.encoder.blocks[1].attn.heads.clone().save()
    changed = (z != before["encoder"][1]).any(-1).any(0)
    expected = torch.zeros_like(changed)
    expected[LAYOUT.index(prompts.visible, LAYOUT.regions["query"]), 2] = True
    assert torch.equal(changed, expected)


def test_scale_gates_and_their_gradients(model, module, prompts, vectors):
    space, zero_shot = PatchSpace(model), prompts.query_only()
    chosen = PatchSet.random(space, 15)
    plain, patched = logits(model, zero_shot), logits(model, zero_shot, vectors["b"], chosen)
    half = logits(model, zero_shot, vectors["b"], chosen, scale=0.5)
    torch.testing.assert_close(half, by_hand(module, zero_shot, vectors["b"], chosen.mask, 0.5), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model, zero_shot, vectors["b"], chosen, scale=0), plain, rtol=0, atol=1e-6)
    gates = space.mask(0.5 * chosen.choices.float().expand(4, -1))
    torch.testing.assert_close(logits(model, zero_shot, vectors["b"], gates), half, rtol=0, atol=1e-6)
    assert (half - patched).abs().max() > 1e-2

    def loss(gates):
        with model.trace(zero_shot):
            patch(model, vectors["zero-shot"], space.mask(gates))
            total = model.output.logits.square().mean().save()
        return total

    gates = torch.zeros(len(space), requires_grad=True)
    loss(gates).backward()
    for i in (1, 20, 35):
        step = torch.zeros(len(space))
        step[i] = 1e-2
        with torch.no_grad():
            slope = (loss(step) - loss(-step)) / 2e-2
        torch.testing.assert_close(gates.grad[i], slope, rtol=0.05, atol=1e-4)
    by_row = torch.zeros(4, len(space), requires_grad=True)
    loss(by_row).backward()
    torch.testing.assert_close(by_row.grad.sum(0), gates.grad, rtol=1e-4, atol=1e-7)
    idle = [space.names[i] for i in (gates.grad == 0).nonzero()[:, 0].tolist()]
    assert idle == [f"decoder.blocks.1.attn.heads[{head}] @ cls" for head in range(2)]


def test_several_vectors_at_once(model, module, prompts, vectors):
    space, zero_shot = PatchSpace(model), prompts.query_only()
    first, second = PatchSet.random(space, 10, seed=1), PatchSet.random(space, 10, seed=2)
    both = logits(model, zero_shot, [vectors["a"], vectors["b"]], [first, second])
    made = vectors["b"].mean.map(torch.clone)
    for i in made:
        only_first = (first.mask[i] & ~second.mask[i])[..., None]
        made[i][:] = torch.where(only_first, vectors["a"].mean[i], made[i])
    from dataclasses import replace

    expected = by_hand(module, zero_shot, replace(vectors["b"], mean=made), (first | second).mask)
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-5)
    assert len(first & second) and (both - logits(model, zero_shot, vectors["b"], second)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="2 vectors and 1 patch sets"):
        logits(model, zero_shot, [vectors["a"], vectors["b"]], [first])


def test_edit_generate_and_scan(model, module, prompts, vectors, tmp_path):
    space, zero_shot = PatchSpace(model), prompts.query_only()
    chosen = PatchSet.random(space, 12)
    with model.edit() as (_, edited):
        patch(edited, vectors["b"], chosen)
    for form in (zero_shot, prompts, zero_shot[:2]):
        expected = logits(model, form, vectors["b"], chosen)
        assert torch.equal(logits(edited, form), expected)
        assert not torch.equal(logits(model, form), expected)
    with model.generate(zero_shot) as tracer:
        patch(model, vectors["b"], chosen)
        canvas = tracer.result.save()
    assert torch.equal(edited.generate(zero_shot), canvas)
    module.save_pretrained(tmp_path)
    lazy = MAEVQGAN(tmp_path)
    with lazy.scan(zero_shot):
        patch(lazy, vectors["b"], chosen)
        shape = lazy.output.logits.shape.save()
    assert shape == (4, 98, 64) and lazy.encoder.cls_token.device.type == "meta"


def test_invokes_patch_their_own_rows(model, vectors):
    """49 rows are as many as the query's patches: ids are not rows."""
    space, many = PatchSpace(model), random_prompts(49, 5).query_only()
    chosen = [PatchSet.random(space, 12, seed=seed) for seed in (1, 2)]
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(many[:30]):
            patch(model, vectors["b"], chosen[0])
            first = model.output.logits.save()
        with tracer.invoke(many[30:45]):
            patch(model, vectors["zero-shot"], space.mask(chosen[1].choices.expand(15, -1)))
            second = model.output.logits.save()
        with tracer.invoke(many[45:]):
            third = model.output.logits.save()
    torch.testing.assert_close(first, logits(model, many[:30], vectors["b"], chosen[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(second, logits(model, many[30:45], vectors["zero-shot"], chosen[1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(third, logits(model, many[45:]), rtol=0, atol=1e-5)


def test_ablation(model, module, prompts, vectors):
    chosen = PatchSet.random(PatchSpace(model), 12)
    with torch.no_grad(), model.trace(prompts):
        ablate(model, chosen)
        zeroed = model.output.logits.save()
    torch.testing.assert_close(zeroed, by_hand(module, prompts, zero_vector(model), chosen.mask), rtol=0, atol=1e-5)
    mean = TaskVectors({name: vectors[name] for name in "ab"}).mean()
    with torch.no_grad(), model.trace(prompts):
        ablate(model, chosen, to=mean)
        averaged = model.output.logits.save()
    torch.testing.assert_close(averaged, by_hand(module, prompts, mean, chosen.mask), rtol=0, atol=1e-5)
    assert (averaged - zeroed).abs().max() > 1e-2


def test_what_does_not_belong_together_is_refused(model, prompts, vectors):
    space = PatchSpace(model)
    chosen, zero_shot = PatchSet.random(space, 36), prompts.query_only()
    heads = PatchSet.random(PatchSpace(model, granularity="head"), 16)
    with pytest.raises(
        ValueError, match=r"encoder cannot be patched at patch 0, patch 1, .* more: the vector of 'zero-shot' lacks"
    ):
        logits(model, prompts, vectors["zero-shot"], heads)
    upper = VisualPrompt(prompts.canvas, LAYOUT.regions["example_input"], LAYOUT.all_patches, LAYOUT)
    with pytest.raises(ValueError, match=r"encoder cannot be patched at patch 98.* do not show them"):
        logits(model, upper, vectors["b"], chosen)
    assert logits(model, upper, TaskVectors.collect(model, {"u": upper}, progress=False)["u"], heads) is not None
    with pytest.raises(ValueError, match="vector of 'b' does not fit this model: it has other weights"):
        logits(MAEVQGAN(random_module(1)), zero_shot, vectors["b"], chosen)
    with pytest.raises(ValueError, match="encoder layers 3, not 2"):
        logits(MAEVQGAN(random_module(num_hidden_layers=2)), zero_shot, vectors["b"], chosen)
    horizontal = PatchSet.random(PatchSpace(model, Layout(112, 8, order="horizontal")), 10)
    with pytest.raises(ValueError, match="patch set does not fit .* order 'horizontal', not 'vertical'"):
        logits(model, zero_shot, vectors["b"], horizontal)
    with pytest.raises(ValueError, match=r"a mask of shape \[36\] does not fit encoder"):
        logits(model, zero_shot, vectors["b"], {"encoder": chosen.choices, "decoder": chosen.choices})


def test_what_may_be_patched_and_what_is_refused_in_a_sentence(model, prompts, vectors):
    space, vector, rows = PatchSpace(model), vectors["b"], prompts.query_only()
    units = PatchSet.random(space, 7)
    found = search.random(model, vector, tasks.Segmentation(), rows, space, budget=4, progress=False)
    expected, of_result = logits(model, rows, vector, units), logits(model, rows, vector, found.patches)
    for patches in (
        list(units),
        tuple(units),
        set(units),
        dict.fromkeys(units).keys(),
        units.mask,
        [units],
        [units.mask],
    ):
        assert torch.equal(logits(model, rows, vector, patches), expected)
    assert torch.equal(logits(model, rows, vector, found), of_result)
    assert torch.equal(logits(model, rows, [vector], [found]), of_result)
    name = list(units)[0]
    assert torch.equal(logits(model, rows, vector, name), logits(model, rows, vector, [name]))
    head = PatchSpace(model, granularity="head").names[0]
    bundle = Bundle(vectors, {"b": found})
    for wrong, patches, error, words in (
        (units, vector, TypeError, "a PatchSet as its vector"),
        (bundle, units, TypeError, "a Bundle as its vector"),
        (vectors, units, TypeError, "a TaskVectors as its vector"),
        (found, units, TypeError, "a SearchResult as its vector"),
        (vector.mean, units, TypeError, "a ByStage as its vector"),
        (None, units, TypeError, "a NoneType as its vector"),
        (vector, vector, TypeError, "a TaskVector as its patches"),
        (vector, units.choices, TypeError, "a Tensor as its patches; give a PatchSet"),
        (vector, space, TypeError, "a PatchSpace as its patches"),
        (vector, None, TypeError, "a NoneType as its patches"),
        (vector, [0, 1], TypeError, "a int as its patches"),
        (vector, bundle, TypeError, "a Bundle as its patches"),
        (vector, vectors, TypeError, "a TaskVectors as its patches"),
        (vector, {"b": units.choices}, ValueError, "a mask of 'b' was given; this model has encoder, decoder"),
        (vector, {"encoder": [0]}, TypeError, "the mask of the encoder is a list"),
        (vector, {3: units.choices}, TypeError, "3 is neither the name of a stage nor"),
        (vector, [], ValueError, r"patches=\[\] names no unit"),
        ([], [], ValueError, r"patches=\[\] names no unit"),
        (vector, [[], units], ValueError, r"patches=\[\] names no unit"),
        (vector, [head, name], ValueError, "is not a unit of the space of the others"),
        (vector, [name, "x"], ValueError, "'x' is not a unit of this model; PatchSpace.model..names has such"),
        (vector, [units, units], ValueError, "1 vectors and 2 patch sets were given"),
    ):
        with pytest.raises(error, match=words):
            logits(model, rows, wrong, patches)
    for other in (MAEVQGAN(random_module(1)), model.encoder, "tiny"):
        with pytest.raises(ValueError, match="patch was given a .* is not the model of this trace"), model.trace(rows):
            patch(other, vector, units)
        words = "capture was given a .* is not the model of this trace"
        with pytest.raises(ValueError, match=words), model.trace(rows):
            capture(other)


def test_prompts_without_a_truth_are_not_scored(model, prompts, vectors):
    cells = {name: prompts.region(name)[0] for name in ("example_input", "example_output", "query")}
    unknown = VisualPrompt.cat([*prompts, VisualPrompt.from_cells(cells, LAYOUT)])
    space, task, queries = PatchSpace(model), tasks.Segmentation(), unknown.query_only()
    for score in (
        lambda: evaluate(model, task, unknown, progress=False),
        lambda: search.random(model, vectors["b"], task, queries, space, budget=4, progress=False),
        lambda: search.random(model, vectors["b"], task, queries, space, loss="pixels", budget=4, progress=False),
        lambda: search.random(
            model, vectors["b"], task, prompts.query_only(), space, held_out=queries, budget=4, progress=False
        ),
        lambda: model.truth(unknown),
    ):
        with pytest.raises(ValueError, match="have no truth to be scored by"):
            score()
    assert logits(model, queries, vectors["b"], PatchSet.random(space, 5)) is not None  # an answer needs none


def test_a_scale_for_each_row(model, prompts, vectors):
    rows, units = prompts.query_only(), PatchSet.random(PatchSpace(model), 36)
    scales, vector = torch.tensor([0.0, 0.5, 1.0, 2.0]), vectors["b"]
    expected = torch.cat([logits(model, rows[i], vector, units, scale=scales[i].item()) for i in range(4)])
    torch.testing.assert_close(logits(model, rows, vector, units, scale=scales), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model, rows[2], vector, units, scale=torch.tensor(1)), expected[2:3])
    masks = PatchSpace(model).mask(units.choices.float().expand(4, -1))
    torch.testing.assert_close(logits(model, rows, vector, masks, scale=scales), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(rows[:1]):
            patch(model, vector, units, scale=scales[:1])
        with tracer.invoke(rows[1:]):
            patch(model, vector, units, scale=scales[1:])
        with tracer.invoke():
            swept = model.output.logits.save()
    torch.testing.assert_close(swept, expected, rtol=1e-4, atol=1e-5)
    for scale, error, words in (
        (scales[:3], ValueError, "a scale for 3 rows was given; this batch has 4"),
        (scales[None], TypeError, "is no scale; give a number, or a tensor with a number for each row"),
        ([1.0] * 4, TypeError, "is no scale"),
        ("1", TypeError, "is no scale"),
        (None, TypeError, "is no scale"),
    ):
        with pytest.raises(error, match=words):
            logits(model, rows, vector, units, scale=scale)
    with pytest.raises(ValueError, match="scale has 3 numbers for masks of 4 rows"):
        logits(model, rows, vector, masks, scale=scales[:3])


def broken(vector, value, layer=1, dim=3):
    """A vector with a value in one of its numbers, at the first position of the query."""
    place, head = 1 + LAYOUT.regions["query"][0], 1
    mean = vector.mean.map(torch.clone)
    mean["encoder"][layer, place, head, dim] = value
    return replace(vector, mean=mean)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nothing_that_is_not_finite_is_patched_painted_scored_or_saved(model, prompts, vectors, value, tmp_path):
    space, vector, rows = PatchSpace(model), vectors["b"], prompts.query_only()
    units, task = PatchSet(space, torch.ones(len(space), dtype=torch.bool)), tasks.Segmentation()
    one = PatchSet.named(space, ["encoder.blocks.0.attn.heads[0] @ query"])
    gates = torch.zeros(len(space)).index_fill(0, torch.tensor([5]), value)
    bad, scales = broken(vector, value), torch.tensor([1, 1, 1, value])
    with model.trace(prompts):
        run = capture(model)
    run.values["decoder"][2, 1, -1, 1, 3] = value
    changed = replace(vector, mean=vector.mean.map(torch.clone))
    assert logits(model, rows, changed, units).isfinite().all()
    changed.mean["encoder"][1, 1 + LAYOUT.regions["query"][0], 1, 3] = value  # after it was looked at
    for patched, patches, scale in (
        (vector, units, value),
        (vector, units, scales),
        (vector, space.mask(gates), 1.0),
        (bad, units, 1.0),
        (bad, space.mask(0.0 * gates.nan_to_num(0, 0, 0) + one.choices), 1.0),  # 0 times it is not 0
        (run, units, 1.0),
        (vector + bad, units, 0.0),
        (changed, units, 1.0),
    ):
        with pytest.raises(ValueError, match=f"(is|holds) {value}|is not finite at"):
            logits(model, rows, patched, patches, scale=scale)
    for make in (lambda: vector * value, lambda: run / (0 * value if value != value else 0), lambda: value * run):
        with pytest.raises(ValueError, match="the factor is"):
            make()
    for save in (
        lambda: TaskVectors({"b": bad}).save(tmp_path / "v"),
        lambda: TaskVectors({"b": broken(vector, value, layer=0, dim=0)}).save(tmp_path / "v"),
        lambda: run.save(tmp_path / "v"),
        lambda: TaskVectors({"a": vectors["b"], "b": bad}).score(),
    ):
        with pytest.raises(ValueError, match="not finite|holds"):
            save()
    assert not list(tmp_path.iterdir())

    def spoil(model):
        model.decoder.blocks[0].attn.heads[:, :, 0] = value

    for answer in (
        lambda: evaluate(model, task, prompts, {"x": Condition(run=spoil)}, progress=False),
        lambda: evaluate(model, task, prompts, {"x": Condition("zero", bad, units)}, progress=False),
        lambda: search.random(model, bad, task, rows, space, budget=40, progress=False),
        lambda: losses(model, prompts, find_loss(model), model.truth(prompts), spoil),
        lambda: generate_with_gates(model, prompts[0], vector, space, gates[None]),
    ):
        with pytest.raises(ValueError, match=f"(is|holds) (nan|{value})|is not finite at"):
            answer()
    with pytest.raises(ValueError, match="the model's logits holds nan; look for"), model.generate(prompts):
        spoil(model)


def test_what_would_broadcast_or_be_cut_is_refused(model, prompts, vectors):
    space, vector = PatchSpace(model), vectors["b"]
    units = PatchSet.random(space, 36)
    flat = replace(vector, mean=vector.mean.map(lambda mean: mean.mean(-1, keepdim=True)))
    few = replace(vector, mean=vector.mean.map(lambda mean: mean[:1]))
    for wrong in (flat, few):
        with pytest.raises(ValueError, match=r"'b' has shape .* at encoder; expected \["):
            logits(model, prompts, wrong, units)
    for cut in (lambda: vector.to(torch.int64), lambda: replace(vector, mean=vector.mean.map(torch.Tensor.long))):
        with pytest.raises(TypeError, match="'b' is torch.int64 at the encoder, which drops fractions"):
            cut()
    for choices in (torch.rand(len(space)), torch.full((len(space),), torch.nan), 2 * units.choices.int()):
        with pytest.raises(ValueError, match="a unit is in a set or not; give True and False"):
            PatchSet(space, choices)
    for choices in (list(units), list(units)[0], None):
        with pytest.raises(TypeError, match="choices are True and False, one for each unit"):
            PatchSet(space, choices)
    with pytest.raises(TypeError, match="a MAEVQGAN was given as the space"):
        PatchSet(model, units.choices)
    with pytest.raises(TypeError, match="k=2.5 is no whole number"):
        PatchSet.random(space, 2.5)
    for factor, kind in ((255, torch.uint8), (-1, torch.int8)):
        gates = units.mask.map(lambda mask, factor=factor, kind=kind: factor * mask.to(kind))
        with pytest.raises(ValueError, match=f"the mask of the encoder holds {factor}; give True and False, or float"):
            logits(model, prompts, vector, gates)
    for wrong in (vector.mean.map(lambda mean: mean[None]), vector.mean.map(torch.Tensor.numpy)):
        with pytest.raises(TypeError, match=r"'b' is .* at the encoder; give a tensor \[layer, position, head"):
            replace(vector, mean=wrong)
    name = list(units)[0]
    assert list(PatchSet.named(space, name)) == [name]
    assert PatchSet(space, units.choices.double()) == PatchSet(space, units.choices.tolist()) == units


LAYOUTS = {
    "order": Layout(112, 8, order="horizontal"),
    "examples": Layout(112, 8, examples=2),
    "background": Layout(112, 8, background="black"),
    "gap": Layout(112, 8, gap=8),
}


@pytest.mark.parametrize("fact", LAYOUTS)
def test_another_layout_than_that_of_the_prompts_is_refused(model, vectors, fact):
    layout, task = LAYOUTS[fact], tasks.Segmentation()
    others, space = random_prompts(4, layout=layout).query_only(), PatchSpace(model, granularity="head")
    theirs, units = TaskVectors.collect(model, {"a": others}, progress=False)["a"], PatchSet.random(space, 9)
    words = f"does not fit these prompts, which are to be made in its layout: it has .*{fact} "
    with model.trace(random_prompts(4)):
        run = capture(model)
    names, vector = list(units), vectors["b"]
    for what, patched, patches in (
        ("the vector of 'b'", vector, names),
        ("the activations", run, names),
        ("the patch set", theirs, units),
        ("the patch set", theirs, units.mask),
        ("the vector of 'b'", [theirs, vector], [names, names]),
    ):
        with pytest.raises(ValueError, match=f"^{what} {words}"):
            logits(model, others, patched, patches)
        with pytest.raises(ValueError, match=f"^{what} {words}"), model.trace() as tracer:
            with tracer.invoke(others.canvas, others.visible, others.decoded):
                pass
            with tracer.invoke(others):
                pass
            with tracer.invoke():
                patch(model, patched, patches)
    assert logits(model, others, theirs, names) is not None
    with torch.no_grad(), model.trace(others.canvas, others.visible, others.decoded):  # tensors tell no layout
        patch(model, vector, units)
    for call in (
        lambda: search.random(model, vector, task, others, space, budget=4, progress=False),
        lambda: search.random(model, theirs, task, others, space, budget=4, progress=False),
        lambda: evaluate(model, task, others, {"b": (vector, units)}, progress=False),
        lambda: evaluate(model, task, others, {"a": (theirs, units)}, progress=False),
        lambda: generate_with_gates(model, others[0], vector, space, units.choices[None]),
        lambda: generate_with_gates(model, others[0], theirs, space, units.choices[None]),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    found = search.random(model, vector, task, random_prompts(4).query_only(), space, budget=4, progress=False)
    with pytest.raises(ValueError, match="units of 'a' does not fit the vectors"):
        Bundle(TaskVectors({"a": theirs}), {"a": found})


def test_sets(model):
    space = PatchSpace(model)
    a, b = PatchSet.random(space, 10, seed=1), PatchSet.random(space, 12, seed=2)
    assert len(a) == 10 and a == PatchSet.random(space, 10, seed=1) and a != b
    assert set(a | b) == set(a) | set(b) and set(a & b) == set(a) & set(b) and set(a - b) == set(a) - set(b)
    assert (
        a.jaccard(b) == len(set(a) & set(b)) / len(set(a) | set(b))
        and a.jaccard(a) == 1
        and (a - a).jaccard(a - a) == 1
    )
    assert next(iter(a)) in a and next(iter(b - a)) not in a and "nonsense" not in a
    assert PatchSet.named(space, reversed(list(a))) == a
    with pytest.raises(ValueError, match="granularity 'token', not 'quadrant'"):
        a | PatchSet.random(PatchSpace(model, granularity="token"), 3)
    with pytest.raises(ValueError, match="shape \\[35\\]"):
        PatchSet(space, torch.zeros(35))
    with pytest.raises(ValueError, match="k=37"):
        PatchSet.random(space, 37)
    with pytest.raises(ValueError, match="'region' is unknown"):
        PatchSpace(model, granularity="region")
    with pytest.raises(ValueError, match=r"\['middle'\]"):
        PatchSpace(model, stages="middle")


def test_equal_sets_have_equal_hashes(model, tmp_path):
    a, b = PatchSet.random(PatchSpace(model), 10), PatchSet.random(PatchSpace(model), 10)
    a.save(tmp_path / "a.json")
    assert a is not b and len({a, b, PatchSet.load(tmp_path / "a.json")}) == 1
    others = [PatchSet.random(PatchSpace(model), 10, seed=1), PatchSet.random(PatchSpace(model, stages="decoder"), 10)]
    assert len({a, *others}) == 3


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"space": 3, "patches": []},
        {"space": {}, "patches": []},
        {"space": {"stages": ["encoder"]}, "patches": []},
        {"space": {"stages": 3, "patched_stages": [], "granularity": "head"}, "patches": []},
        {"space": None, "patches": []},
        {"space": {}, "patches": [["nested"]]},
    ],
)
def test_sets_that_are_not_whole_are_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "patches.json"
    for text in (json.dumps({"kind": "patch set"} | content), "[" * 10**6):
        path.write_text(text)
        with pytest.raises(ValueError, match="^[^ ]*patches.json is no whole patch set"):
            PatchSet.load(path)


def test_sets_of_unknown_units_are_refused(model, tmp_path):
    path = tmp_path / "patches.json"
    PatchSet.random(PatchSpace(model), 3).save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"patches": ["encoder.blocks.99.attn.heads[0] @ query"]}))
    with pytest.raises(ValueError, match="is not a unit of"):
        PatchSet.load(path)
    for name, value in (
        ("encoder layers", 10**9),
        ("decoder heads", -1),
        ("canvas_size", 8 * 10**6),
        ("stages", []),
        ("granularity", "x"),
        ("examples", math.inf),
        ("gap", math.nan),
    ):
        wrong = {name: held for name, held in content["space"].items() if name != "units"} | {name: value}
        path.write_text(json.dumps(content | {"space": wrong}))
        with pytest.raises(ValueError, match="not that of a space of units"):
            PatchSet.load(path)
    for stage, at in (("encoder", [10**9]), ("decoder", ["x"]), ("decoder", [-5000])):
        wrong = json.loads(json.dumps(content))
        wrong["space"]["units"][stage]["groups"]["query"] = at
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="not that of a space of units"):
            PatchSet.load(path)


def test_a_set_is_read_from_a_file_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "a device or a pipe; expected"), (tmp_path, "is a folder; expected")):
        with pytest.raises(ValueError, match=words):
            PatchSet.load(path)


def test_sets_save_and_load(model, tmp_path):
    path = tmp_path / "patches.json"
    chosen = PatchSet.random(PatchSpace(model, Layout(112, 8, order="horizontal"), "token", "decoder"), 9)
    chosen.save(path)
    loaded = PatchSet.load(path)
    assert loaded == chosen and loaded.space.layout.order == "horizontal" and list(tmp_path.iterdir()) == [path]
    assert all(map(torch.equal, loaded.mask.values(), chosen.mask.values()))
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValueError, match="is no whole patch set"):
        PatchSet.load(path)
    path.write_text(json.dumps({"kind": "other"}))
    with pytest.raises(ValueError, match="is no whole patch set: its kind is .other."):
        PatchSet.load(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        PatchSet.load(tmp_path / "nothing.json")


def test_rows_that_see_patches_of_their_own(model, module, prompts, vectors):
    """Patch ids [batch, patch]: each row as if it were alone with its patches."""
    generator = torch.Generator().manual_seed(3)
    shown = LAYOUT.visible
    visible = torch.stack([shown[torch.randperm(len(shown), generator=generator)[:60]] for _ in range(3)])
    canvas, decoded = prompts.canvas[:3], LAYOUT.all_patches.expand(3, -1)
    space = PatchSpace(model, granularity="head")
    mask = space.mask(torch.rand(3, len(space), generator=generator) < 0.5)
    with torch.no_grad(), model.trace(canvas, visible, decoded):
        patch(model, vectors["a"], mask)
        found = model.output.logits.save()
    for row in range(3):
        alone = SimpleNamespace(canvas=canvas[row : row + 1], visible=visible[row], decoded=decoded[row])
        own = mask.map(lambda values, row=row: values[row])
        torch.testing.assert_close(found[row], by_hand(module, alone, vectors["a"], own)[0], rtol=1e-4, atol=1e-5)
