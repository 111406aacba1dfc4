"""`capture`, the twin of `patch`: against hooks, and any order of both among a user's own reads and edits."""

import pytest
import torch
from helpers import LAYOUT, logits_of, random_module, random_prompts, small_painter
from nnsight.intervention.envoy import traceable

from vtv_nnsight import MAEVQGAN, Painter, PatchSet, PatchSpace, TaskVectors, VisualPrompt, ablate, capture, patch
from vtv_nnsight.layouts import positions
from vtv_nnsight.models.canvas import Inputs
from vtv_nnsight.models.interface import HEADS, SITES
from vtv_nnsight.models.nnsight_compat import heads_of
from vtv_nnsight.models.sites import place_of
from vtv_nnsight.vectors import Activations

EXACT = dict(rtol=0, atol=0, equal_nan=True)
CLOSE = dict(rtol=1e-4, atol=1e-5, equal_nan=True)


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
def others():
    return random_prompts(3, 1)


@pytest.fixture(scope="module")
def vector(model):
    return TaskVectors.collect(model, {"a": random_prompts(4, 2)}, sites=SITES, progress=False)["a"]


@pytest.fixture(scope="module")
def units(model):
    return PatchSet.random(PatchSpace(model), 12)


def modules(model):
    """(stage at a site, layer, the module, whether its input is read), for each, in the order of the run."""
    for stage in model.stages:
        for layer in range(stage.layers):
            for site in SITES:
                place = place_of(model, stage.at(site), layer)
                yield stage.at(site), layer, place.module._module, place.side == "input"


def hooked(model, prompts, backward=False):
    """By hand: (stage and site, layer) → [batch, token, head, head_dim], or their gradients of a sum of squares."""
    values, handles = {}, []
    for stage, layer, module, before in modules(model):

        def keep(raw, key=(stage.key, layer)):
            raw.retain_grad() if backward else None
            values[key] = raw

        if before:
            handles.append(module.register_forward_pre_hook(lambda _, args, keep=keep: keep(args[0])))
        else:
            handles.append(module.register_forward_hook(lambda _, args, out, keep=keep: keep(out)))
    try:
        with torch.set_grad_enabled(backward):
            output = model._module(prompts.canvas, prompts.visible, prompts.decoded)
        if backward:
            loss_of(output).backward()
    finally:
        for handle in handles:
            handle.remove()
    heads = {stage.key: stage.heads for stage, *_ in modules(model)}
    return {
        (key, layer): (raw.grad if backward else raw).unflatten(-1, (heads[key], -1))
        for (key, layer), raw in values.items()
    }


def loss_of(output):
    return output.logits.square().mean()


def seen_by(stage, prompts):
    return positions(prompts.visible if stage == "encoder" else prompts.decoded)


def assert_holds(values, expected, prompts, rows=slice(None), **close):
    """Values by stage and site are those by hand at the positions of their tokens, and NaN elsewhere."""
    for (key, layer), z in expected.items():
        seen = seen_by(key.stage, prompts)
        torch.testing.assert_close(values[key][:, layer, seen], z[rows], **close or EXACT)
        elsewhere = torch.ones(LAYOUT.num_positions, dtype=torch.bool)
        elsewhere[seen] = False
        assert values[key][:, layer, elsewhere].isnan().all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["one-shot", "zero-shot"])
def test_it_is_what_hooks_see(module, prompts, form, implementation):
    model = MAEVQGAN(module, attn_implementation=implementation)
    prompts = prompts if form == "one-shot" else prompts.query_only()
    with torch.no_grad(), model.trace(prompts):
        run = capture(model, SITES)
        logits = model.output.logits.save()
    assert list(map(str, run.values))[:5] == [
        "encoder", "encoder.attn", "encoder.mlp", "encoder.residual", "decoder"
    ]  # fmt: skip
    assert run.values["encoder"].shape == (3, 3, LAYOUT.num_positions, 4, 8) and len(run) == 3
    assert run.values["decoder", "mlp"].shape == (3, 2, LAYOUT.num_positions, 1, 16)
    assert_holds(run.values, hooked(model, prompts), prompts)
    assert torch.equal(logits, logits_of(model, prompts))
    assert "encoder [3, 3, 197, 4, 8]" in repr(run)


def test_inside_generate_and_invokes(model, prompts, others):
    with model.generate(prompts) as tracer:
        run = capture(model)
        canvas = tracer.result.save()
    with torch.no_grad(), model.trace(prompts):
        plain = capture(model)
    assert_same(run, plain)
    assert torch.equal(canvas, model.generate(prompts))
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(prompts[:2]):
            first = capture(model)
        with tracer.invoke(others):
            second = capture(model, "mlp", "decoder")
        with tracer.invoke():
            every = capture(model)
    assert_same(first, plain[:2], **CLOSE)
    assert len(second) == 3 and list(map(str, second.values)) == ["decoder.mlp"]
    assert len(every) == 5
    assert_same(every[:2], first)


def assert_same(one, other, **close):
    assert one.values.keys() == other.values.keys()
    for key, values in one.values.items():
        torch.testing.assert_close(values, other.values[key], **close or EXACT)


def test_values_are_copies(model, prompts):
    with torch.no_grad(), model.trace(prompts):
        run = capture(model)
        model.encoder.blocks[0].attn.heads[:] = 0
        model.encoder.blocks[1].output[:] = 0
        again = capture(model, layers={"encoder": 2})
    plain = Activations.collect(model, prompts, progress=False)
    assert torch.equal(run.values["encoder"][:, 0].nan_to_num(), plain.values["encoder"][:, 0].nan_to_num())
    assert (again.values["encoder"][:, 2] - plain.values["encoder"][:, 2]).abs().nan_to_num().max() > 1e-3
    assert not run.values["encoder"].requires_grad


def test_on_an_edited_model(model, prompts, vector, units):
    with model.edit() as (_, edited):
        patch(edited, vector, units)
    with torch.no_grad(), edited.trace(prompts):
        run = capture(edited)
    with torch.no_grad(), model.trace(prompts):
        patch(model, vector, units)
        expected = capture(model)
    assert_same(run, expected)
    with pytest.raises(ValueError, match="capture in an edit gives nothing back; write it in a trace of the edited"):
        with model.edit() as (_, edited):
            capture(edited)
        with edited.trace(prompts):
            edited.output.save()


def test_a_scan_gives_shapes_alone(module, prompts, units, vector, tmp_path):
    module.save_pretrained(tmp_path)
    lazy = MAEVQGAN(tmp_path)
    with lazy.scan(prompts):
        run = capture(lazy, ("heads", "mlp"))
    assert run.values["decoder"].shape == (3, 2, 197, 2, 8) and run.values["encoder", "mlp"].is_meta
    assert lazy.device.type == "meta"
    words = "the activations are of a scan, shapes alone; capture them in a trace"
    with pytest.raises(ValueError, match=words), lazy.trace(prompts):
        patch(lazy, run, units)


def test_rows_that_lack_positions(model, prompts, vector):
    """Patch ids [batch, patch], as tensors: each row has positions of its own, and there is no layout to compare."""
    generator = torch.Generator().manual_seed(3)
    visible = torch.stack([LAYOUT.visible[torch.randperm(147, generator=generator)[:60]] for _ in range(3)])
    decoded = LAYOUT.all_patches.expand(3, -1)
    with torch.no_grad(), model.trace(prompts.canvas, visible, decoded):
        run = capture(model, SITES)
    assert "order" not in run.fingerprint
    for row in range(3):
        alone = VisualPrompt(prompts.canvas[row : row + 1], visible[row], LAYOUT.all_patches, LAYOUT)
        assert_holds(run[row].values, hooked(model, alone), alone, **CLOSE)
        assert run.present_rows["encoder"][row].sum() == 61
    assert run.present["encoder"].sum() < 61 and run.present["decoder"].all()
    everything = PatchSet(PatchSpace(model, granularity="head"), torch.ones(16))
    with torch.no_grad(), model.trace(prompts.canvas, visible, decoded):
        patch(model, run, everything)
        logits = model.output.logits.save()
    torch.testing.assert_close(logits, logits_of(model, prompts.canvas, visible, decoded), **CLOSE)
    words = "encoder cannot be patched at patch .*: the activations lack them"
    with pytest.raises(ValueError, match=words), model.trace(prompts.canvas, visible.flip(0), decoded):
        patch(model, run, everything)
    inputs = (prompts.canvas, LAYOUT.visible, LAYOUT.all_patches)
    with torch.no_grad(), model.trace(*inputs):
        patch(model, vector, PatchSet.random(PatchSpace(model), 5))
        from_tensors = capture(model)
    with torch.no_grad(), model.trace(prompts):
        patch(model, vector, PatchSet.random(PatchSpace(model), 5))
        from_prompts = capture(model)
    assert_same(from_tensors, from_prompts)


@pytest.mark.parametrize("inside", [True, False])
def test_gradients_after_a_plain_backward(model, prompts, inside):
    with model.trace(prompts):
        run = capture(model, SITES)
        loss = loss_of(model.output).save()
        if inside:
            loss.backward()
    if not inside:
        with pytest.raises(ValueError, match="no gradient came to these activations"):
            run.grad  # noqa: B018
        loss.backward()
    assert_holds(run.grad, hooked(model, prompts, backward=True), prompts, **CLOSE)
    model._module.zero_grad()


def test_gradients_of_several_invokes(model, prompts, others):
    with model.trace() as tracer:
        with tracer.invoke(prompts[:2]):
            first = capture(model, SITES)
            one = loss_of(model.output).save()
        with tracer.invoke(others):
            second = capture(model, SITES)
            two = loss_of(model.output).save()
    (one + two).backward()
    assert_holds(first.grad, hooked(model, prompts[:2], backward=True), prompts, **CLOSE)
    assert_holds(second.grad, hooked(model, others, backward=True), others, **CLOSE)


def test_gradients_where_things_are_edited_and_where_nothing_depends(model, prompts, vector, units):
    with model.trace(prompts):
        run = capture(model, layers={"encoder": [0, 1], "decoder": [1]})
        model.encoder.blocks[1].attn.heads[:] = 0
        middle = model.encoder.blocks[1].output.square().mean().save()
        model.output.logits.save()
    middle.backward()
    assert run.grad["encoder"][:, 0].nan_to_num().abs().max() > 0
    assert run.grad["encoder"][:, 1].nansum() == 0 == run.grad["decoder"][:, 1].nansum()
    assert run.grad["encoder"][:, 2].isnan().all() and run.grad["decoder"][:, 0].isnan().all()
    before = run.grad["encoder"].clone()
    with model.trace(prompts):
        again = capture(model)
        loss = model.encoder.blocks[1].output.square().mean().save()
    loss.backward(retain_graph=True)
    once = again.grad["encoder"]
    loss.backward()
    torch.testing.assert_close(again.grad["encoder"], 2 * once, **CLOSE)
    assert before.isnan().any()
    with torch.no_grad(), model.trace(prompts):
        without = capture(model)
    with pytest.raises(ValueError, match="no gradient came"):
        without.grad  # noqa: B018


@pytest.fixture(scope="module")
def painter():
    return Painter(small_painter(False))


@pytest.fixture(scope="module")
def painted():
    shape = (3, 3, 64, 64)
    layout = Painter(small_painter(False)).layout
    return VisualPrompt.from_canvas(torch.rand(shape, generator=torch.Generator().manual_seed(0)), layout)


def test_two_streams(painter, painted):
    """Where a network has two rows for a prompt: values and gradients of several invokes are those of each alone."""
    with painter.trace() as tracer:
        with tracer.invoke(painted[:2]):
            first = capture(painter, SITES)
            one = painter.output.prediction.square().sum().save()
        with tracer.invoke(painted[2:]):
            second = capture(painter, SITES)
            two = painter.output.prediction.square().sum().save()
    (one + two).backward()
    for rows, run in ((painted[:2], first), (painted[2:], second)):
        with painter.trace(rows):
            alone = capture(painter, SITES)
            heads = [painter.attention("streams", i).heads for i in range(2)].save()
            loss = painter.output.prediction.square().sum().save()
        loss.backward()
        assert_same(run, alone, rtol=1e-4, atol=1e-5, equal_nan=True)
        for key, slopes in run.grad.items():
            torch.testing.assert_close(slopes, alone.grad[key], rtol=1e-3, atol=1e-3, equal_nan=True)
        seen = painter.positions("streams", rows)
        for layer, z in enumerate(heads):
            torch.testing.assert_close(alone.values["streams"][:, layer, seen], z.detach(), **EXACT)
        assert alone.grad["streams", "residual"].nan_to_num().abs().max() > 0


def test_activation_patching(model, prompts, others, vector):
    """A whole run put into another is that run; one unit is what the vector of a single prompt does there."""
    space = PatchSpace(model, granularity="cell", sites=SITES)
    with torch.no_grad(), model.trace(prompts):
        run = capture(model, SITES)
        expected = model.output.logits.save()
    with torch.no_grad(), model.trace(others):
        patch(model, run, PatchSet(space, torch.ones(len(space))))
        logits = model.output.logits.save()
    torch.testing.assert_close(logits, expected, **CLOSE)
    name = "decoder.blocks.0.attn.heads[1] @ query"
    alone = [TaskVectors.collect(model, {"x": prompts[i]}, progress=False)["x"] for i in range(3)]
    with torch.no_grad(), model.trace(others):
        patch(model, run, [name])
        logits = model.output.logits.save()
    for i, one in enumerate(alone):
        with torch.no_grad(), model.trace(others[i]):
            patch(model, one, PatchSet.named(PatchSpace(model), [name]))
            row = model.output.logits.save()
        torch.testing.assert_close(logits[i : i + 1], row, **CLOSE)
    with torch.no_grad(), model.trace(others):
        patch(model, vector, ["decoder.blocks.1.mlp @ output", "decoder.blocks.1 @ query"])
        by_name = model.output.logits.save()
    chosen = PatchSet.named(
        PatchSpace(model, sites=SITES), ["decoder.blocks.1.mlp @ output", "decoder.blocks.1 @ query"]
    )
    with torch.no_grad(), model.trace(others):
        patch(model, vector, chosen)
        assert torch.equal(by_name, model.output.logits.save())
    with pytest.raises(ValueError, match="'decoder.blocks.9' is not a unit of this model"), model.trace(others):
        patch(model, vector, ["decoder.blocks.9"])


def test_save_load_slice_and_arithmetic(model, prompts, others, tmp_path):
    with torch.no_grad(), model.trace(prompts):
        a = capture(model, ("heads", "residual"), layers={"encoder": [1], "decoder": [0, 1]})
    with torch.no_grad(), model.trace(others):
        b = capture(model, ("heads", "residual"), layers={"encoder": [1], "decoder": [0, 1]})
    a.save(tmp_path / "a.safetensors")
    loaded = Activations.load(tmp_path / "a.safetensors")
    assert_same(loaded, a)
    assert (
        loaded.fingerprint == a.fingerprint and loaded.layers["encoder"] == [1] and loaded.layers["decoder"] == [0, 1]
    )
    assert_same(a[[2, 0]], a[torch.tensor([2, 0])])
    assert len(a[1]) == 1 and torch.equal(a[1:].values["decoder"].nan_to_num(), a.values["decoder"][1:].nan_to_num())
    for key, x in a.values.items():
        y = b.values[key]
        for made, expected in (
            (a + b, x + y),
            (a - b, x - y),
            (2 * a, x * 2),
            (a * 0.5, x * 0.5),
            (a / 4, x * 0.25),
            (-a, -x),
            (a + 0.5 * (b - a), x + (y - x) * 0.5),
        ):
            torch.testing.assert_close(made.values[key], expected, **EXACT)
    with pytest.raises(ValueError, match="are not of as many rows"):
        a + b[:2]
    with pytest.raises(ValueError, match="are not of as many rows, of the same stages and sites"):
        a - Activations.collect(model, others, progress=False)
    with pytest.raises(ValueError, match="activations does not fit the others: it has .*order"):
        a + Activations(b.values, b.fingerprint | {"order": "horizontal"})
    with pytest.raises(TypeError):
        a * a
    (tmp_path / "b").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        Activations.load(tmp_path / "b")
    TaskVectors.collect(model, {"x": prompts}, progress=False).save(tmp_path / "vectors")
    with pytest.raises(ValueError, match="holds task vectors; expected activations"):
        Activations.load(tmp_path / "vectors")


def test_files_of_activations_are_checked(model, prompts, tmp_path):
    from vtv_nnsight.files import read_tensors, write_tensors

    Activations.collect(model, prompts, progress=False).save(tmp_path / "a")
    tensors, metadata = read_tensors(tmp_path / "a", "activations")
    for change, words in (
        ({"encoder/values": tensors["encoder/values"][:, :1]}, "has shape"),
        ({"encoder/layers": tensors["encoder/layers"] + 1}, "has shape"),
        ({"decoder/positions": tensors["decoder/positions"] - 1}, "has shape"),
        ({"decoder/values": tensors["decoder/values"][:2]}, "not as many of each stage"),
    ):
        write_tensors(tmp_path / "b", "activations", tensors | change, metadata)
        with pytest.raises(ValueError, match=f"b holds no whole activations: .*{words}"):
            Activations.load(tmp_path / "b")
    write_tensors(tmp_path / "b", "activations", tensors, {})
    with pytest.raises(ValueError, match="it has no 'fingerprint'"):
        Activations.load(tmp_path / "b")


# What is typed is what happens


def test_any_order_of_both_verbs(model, prompts, vector):
    """capture, patch, capture, patch, patch in a list's loop, capture: each sees what is above it."""
    space = PatchSpace(model, sites=SITES)
    sets = [PatchSet.random(space, 15, seed=seed) for seed in range(4)]
    vectors = [vector, 0.5 * vector, -vector, 2 * vector]
    with torch.no_grad(), model.trace(prompts):
        plain = capture(model, SITES)
        patch(model, vectors[0], sets[0])
        one = capture(model, SITES)
        for v, chosen in zip(vectors[1:], sets[1:]):
            patch(model, v, chosen)
        every = capture(model, SITES)
        logits = model.output.logits.save()
    with torch.no_grad(), model.trace(prompts):
        patch(model, vectors, sets)
        listed = model.output.logits.save()
    assert torch.equal(logits, listed) and not torch.equal(logits, logits_of(model, prompts))
    # a capture between two patches has, at a place, what the first made of what the whole run brings there
    assert_holds_units(every, sets, vectors)
    first_layer = [run.values["encoder"][:, 0].nan_to_num() for run in (plain, one, every)]
    assert_same_rows(first_layer[0], Activations.collect(model, prompts, progress=False).values["encoder"][:, 0])
    mask = [chosen.mask["encoder"][0] for chosen in sets]
    there = ~plain.values["encoder"][:, 0].isnan()
    new = torch.where(mask[0][..., None], vectors[0].mean["encoder"][0], plain.values["encoder"][:, 0])
    torch.testing.assert_close(first_layer[1], torch.where(there, new, 0.0), rtol=0, atol=0)
    for v, chosen in zip(vectors[1:], mask[1:]):
        new = torch.where(chosen[..., None], v.mean["encoder"][0], new)
    torch.testing.assert_close(first_layer[2], torch.where(there, new, 0.0), rtol=0, atol=0)


def assert_same_rows(a, b):
    torch.testing.assert_close(a.nan_to_num(), b.nan_to_num(), **EXACT)


def assert_holds_units(run, sets, vectors):
    """At each unit of sets, a run has what the last vector to be patched there has."""
    for key, values in run.values.items():
        left = torch.ones(values.shape[1:4], dtype=torch.bool)
        for v, chosen in list(zip(vectors, sets))[::-1]:
            here = chosen.mask[key] & left & ~values[0, ..., 0].isnan()
            for row in values:
                torch.testing.assert_close(row[here], v.mean[key][here], rtol=0, atol=1e-6)
            left &= ~chosen.mask[key]


def test_a_read_after_patch_sees_it_and_one_before_does_not(model, prompts, vector):
    name = "encoder.blocks.1.attn.heads[2] @ query"
    chosen, at = PatchSet.named(PatchSpace(model), [name]), 1 + LAYOUT.regions["query"]
    seen = LAYOUT.index(prompts.visible, LAYOUT.regions["query"])
    expected = vector.mean["encoder"][1, at, 2].expand(3, -1, -1)
    plain = Activations.collect(model, prompts, progress=False).values["encoder"][:, 1, at, 2]
    with torch.no_grad(), model.trace(prompts):
        patch(model, vector, chosen)
        after = model.encoder.blocks[1].attn.heads.save()
    torch.testing.assert_close(after[:, seen, 2], expected, **EXACT)
    with torch.no_grad(), model.trace(prompts):
        before = model.encoder.blocks[1].attn.heads.save()
        patch(model, vector, chosen)
        again = model.encoder.blocks[1].attn.heads.save()
        logits = model.output.logits.save()
    torch.testing.assert_close(before[:, seen, 2], plain, **EXACT)
    torch.testing.assert_close(again[:, seen, 2], expected, **EXACT)
    with torch.no_grad(), model.trace(prompts):
        patch(model, vector, chosen)
        assert torch.equal(logits, model.output.logits.save())


def test_an_edit_after_capture_is_not_in_it_and_one_before_is(model, prompts):
    attention = model.encoder.blocks[1].attn
    with torch.no_grad(), model.trace(prompts):
        before = capture(model, layers={"encoder": [1]})
        attention.heads[:, :, 0] = 7
        between = capture(model, layers={"encoder": [1]})
        attention.heads = attention.heads + 1
        after = capture(model, layers={"encoder": [1]})
    values = [run.values["encoder"][:, 1][:, before.present["encoder"]] for run in (before, between, after)]
    plain = Activations.collect(model, prompts, progress=False)
    assert torch.equal(values[0], plain.values["encoder"][:, 1][:, plain.present["encoder"]])
    expected = values[0].clone()
    expected[:, :, 0] = 7
    assert torch.equal(values[1], expected) and torch.equal(values[2], expected + 1)


def test_with_gradients_the_order_is_the_same(model, prompts, vector, units):
    attention = model.encoder.blocks[1].attn
    with model.trace(prompts):
        before = capture(model, layers={"encoder": [1]})
        attention.heads[:, :, 0] = 7
        between = capture(model, layers={"encoder": [1]})
        patch(model, vector, ["encoder.blocks.1.attn.heads[0] @ query"])
        after = capture(model, layers={"encoder": [1]})
        loss = loss_of(model.output).save()
    loss.backward()
    assert not (before.values["encoder"][:, 1, 0, 0] == 7).any() and (between.values["encoder"][:, 1, 0, 0] == 7).all()
    query = 1 + LAYOUT.regions["query"]
    assert not (after.values["encoder"][:, 1, query, 0] == 7).any()
    assert before.grad["encoder"][:, 1, :, 0].nansum() == 0  # which the edit wrote over
    assert between.grad["encoder"][:, 1, query, 0].abs().sum() == 0  # which the patch wrote over
    assert between.grad["encoder"][:, 1, 0, 0].abs().sum() > 0 and after.grad["encoder"][:, 1, query, 0].abs().sum() > 0


def test_an_empty_invoke_sees_the_patches_of_all(model, prompts, others, vector, units):
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(prompts):
            patch(model, vector, units)
        with tracer.invoke(others):
            mine = capture(model)
            patch(model, -vector, units)
            one = capture(model)
        with tracer.invoke():
            every = capture(model)
            heads = model.decoder.blocks[0].attn.heads.clone().save()
    with torch.no_grad(), model.trace(prompts):
        patch(model, vector, units)
        first = capture(model)
    with torch.no_grad(), model.trace(others):
        patch(model, -vector, units)
        second = capture(model)
    assert_same(every[:3], first, **CLOSE)
    assert_same(every[3:], second, **CLOSE)
    assert_same(one, second, **CLOSE)
    seen = positions(prompts.decoded)
    assert torch.equal(heads, every.values["decoder"][:, 0, seen])
    there = units.mask["encoder"][0] & ~mine.values["encoder"][0, 0, ..., 0].isnan()
    assert not torch.equal(mine.values["encoder"][:, 0][:, there], one.values["encoder"][:, 0][:, there])


def test_ablate_and_capture(model, prompts, units):
    with torch.no_grad(), model.trace(prompts):
        ablate(model, units)
        run = capture(model)
    for key, values in run.values.items():
        there = units.mask[key] & ~values[0, ..., 0].isnan()
        assert (values[:, there] == 0).all() and (values[:, ~there].nan_to_num() != 0).any()


# Steps


class Repeating(MAEVQGAN):
    """Completes its own completion, twice: three forwards."""

    @traceable
    def generate(self, *inputs, layout=None):
        """The last canvas."""
        canvas, *shown = inputs
        for _ in range(3):
            canvas = self.paint(self.network.forward(canvas, *shown), Inputs(canvas, *shown))
        return canvas


@pytest.fixture(scope="module")
def repeating():
    return Repeating(random_module())


def test_steps_of_generate(repeating, prompts):
    model, units = repeating, PatchSet.random(PatchSpace(repeating), 12)
    vector = TaskVectors.collect(model, {"a": random_prompts(4, 2)}, progress=False)["a"]

    def step_by_step(patched):
        canvas, runs = prompts.canvas, []
        for step in range(3):
            rows = VisualPrompt(canvas, prompts.visible, prompts.decoded, LAYOUT)
            with torch.no_grad(), model.trace(rows):
                if step in patched:
                    patch(model, vector, units)
                runs.append(capture(model))
                output = model.output.save()
            canvas = model.paint(output, rows)
        return runs, canvas

    def trace(**steps):
        with model.generate(prompts) as tracer:
            patch(model, vector, units, **steps)
            runs = capture(model, steps="all")
            first = capture(model)
            canvas = tracer.result.save()
        return runs, first, canvas

    for steps, patched in (({}, {0}), ({"steps": "all"}, {0, 1, 2})):
        runs, first, canvas = trace(**steps)
        expected, answer = step_by_step(patched)
        assert len(runs) == 3
        for run, other in zip(runs, expected):
            assert_same(run, other, **CLOSE)
        assert_same(first, expected[0], **CLOSE)
        torch.testing.assert_close(canvas, answer, rtol=0, atol=2 / 255)
    with torch.no_grad(), model.trace(prompts):
        only = capture(model, steps="all")
    assert len(only) == 1
    with pytest.raises(ValueError, match="steps='last' is unknown; choose 'first' or 'all'"), model.trace(prompts):
        capture(model, steps="last")
    words = 'patch cannot be called in a loop over steps; write patch.*steps="all"'
    with pytest.raises(ValueError, match=words), model.generate(prompts) as tracer:
        for _ in tracer.all():
            patch(model, vector, units)


# Layers and stages


def test_layers_and_stages(model, prompts, others, units):
    with torch.no_grad(), model.trace(prompts):
        whole = capture(model)
        two = capture(model, stages="encoder", layers=[2, 0])
        one = capture(model, layers={"decoder": 1})
        both = capture(model, stages=["decoder", "encoder"], layers={"decoder": [1]})
    assert list(map(str, two.values)) == ["encoder"] and two.layers["encoder"] == [0, 2]
    for layer in (0, 2):  # the index stays the model's own
        assert_same_rows(two.values["encoder"][:, layer], whole.values["encoder"][:, layer])
    assert two.values["encoder"][:, 1].isnan().all()
    assert list(map(str, one.values)) == ["decoder"] and one.layers["decoder"] == [1]
    assert list(map(str, both.values)) == ["encoder", "decoder"]
    assert both.layers["encoder"] == [0, 1, 2] and both.layers["decoder"] == [1]
    with torch.no_grad(), model.trace(others):
        patch(model, one, ["decoder.blocks.1.attn.heads[0] @ query"])
    with (
        pytest.raises(ValueError, match=r"is not finite at decoder\.blocks\.0\.attn\.heads\[1\], .*; capture it"),
        model.trace(others),
    ):
        patch(model, one, ["decoder.blocks.0.attn.heads[1] @ query"])
    for words, options in (
        (r"layers=\[0\] are of several stages \(encoder, decoder\); give a dict", {"layers": [0]}),
        (r"layers \[5\] are not layers of the decoder; it has 0 to 1", {"layers": {"decoder": 5}}),
        (r"layers \[-1\] are not layers", {"layers": {"decoder": [-1]}}),
        (r"stages=\['middle'\] are not stages of the model", {"stages": "middle"}),
        (r"stages=\['middle'\] are not stages of the model", {"layers": {"middle": 0}}),
        (r"sites=\['tail'\] are not sites", {"sites": "tail"}),
    ):
        with pytest.raises(ValueError, match=words), model.trace(prompts):
            capture(model, **options)


def test_layers_are_numbers_where_there_is_one_stage(prompts):
    class OneStage(MAEVQGAN):
        @property
        def stages(self):
            return super().stages[:1]

    model = OneStage(random_module())
    with torch.no_grad(), model.trace(prompts):
        run = capture(model, layers=[1, 2])
        last = capture(model, layers=2)
    assert run.layers["encoder"] == [1, 2] and last.layers["encoder"] == [2]


# What is too late, or out of place


@pytest.mark.parametrize("verb", ["capture", "patch"])
def test_a_verb_that_comes_too_late_says_so(model, prompts, vector, units, verb):
    def call():
        return capture(model) if verb == "capture" else patch(model, vector, units)

    words = (
        f"{verb} comes too late: the model has run past encoder.blocks.0.attn.proj.input in this block; write {verb}"
    )
    with pytest.raises(ValueError, match=words), model.trace(prompts):
        model.encoder.blocks[1].output.save()
        call()
    with (
        pytest.raises(ValueError, match="comes too late"),
        model.trace(prompts.canvas, prompts.visible, prompts.decoded),
    ):
        model.encoder.blocks[1].output.save()
        call()
    with torch.no_grad(), model.trace() as tracer:  # the block is too late, an empty invoke is not
        with tracer.invoke(prompts):
            model.encoder.blocks[1].output.save()
        with tracer.invoke():
            call()
    assert logits_of(model, prompts) is not None  # the model is as it was


def test_what_lies_ahead_is_not_too_late(model, prompts, vector):
    """A block that has read the first stage captures and patches the second."""
    name = "decoder.blocks.0.attn.heads[0] @ query"
    with torch.no_grad(), model.trace(prompts):
        middle = model.encoder.blocks[1].output.clone().save()
        run = capture(model, stages="decoder")
        rest = capture(model, layers={"encoder": [2]})
        patch(model, vector, [name])
        logits = model.output.logits.save()
    whole = Activations.collect(model, prompts, progress=False)
    assert_same_rows(run.values["decoder"][:, 0], whole.values["decoder"][:, 0])
    assert_same_rows(rest.values["encoder"][:, 2], whole.values["encoder"][:, 2])
    with torch.no_grad(), model.trace(prompts):
        patch(model, vector, [name])
        assert torch.equal(logits, model.output.logits.save())
    assert middle.shape == (3, 148, 32)


def test_outside_a_block(model, prompts, vector, units):
    with pytest.raises(
        ValueError, match="capture is called inside the block of a trace or an invoke: with model.trace"
    ):
        capture(model)
    with pytest.raises(ValueError, match="patch is called inside the block of a trace or an invoke"):
        patch(model, vector, units)
    with torch.no_grad(), model.trace(prompts):
        run = capture(model)
    assert len(run) == 3
    words = "the activations are there after their block; patch with them in a later"
    with pytest.raises(ValueError, match=words), model.trace(prompts):
        early = capture(model)
        patch(model, early, units)


def test_what_was_never_run_says_so(model, prompts, vector):
    units = ["encoder.blocks.0.attn.heads[0] @ query", "encoder.blocks.1.attn.heads[0] @ query"]
    with (
        pytest.raises(
            ValueError, match="patch waited for encoder.blocks.1.attn.proj.input, which the model did not run"
        ),
        torch.no_grad(),
        model.trace(prompts),
    ):
        patch(model, vector, units)
        x = model.encoder.blocks[1].input
        model.encoder.blocks[1].skip(x)


def test_a_run_that_is_stopped_keeps_what_it_had(model, prompts, vector, units):
    with torch.no_grad(), model.trace(prompts) as tracer:
        run = capture(model)
        patch(model, vector, units)
        model.encoder.blocks[1].output.save()
        tracer.stop()
    assert run.layers["encoder"] == [0, 1] and "decoder" not in run.values


def test_a_run_that_fails_says_what_failed_and_nothing_else(model, prompts, vector, units, recwarn):
    def fail(*_):
        raise MemoryError("all of it")

    handle = model._module.encoder.register_forward_pre_hook(fail)
    try:
        with pytest.raises(MemoryError, match="all of it"), model.trace(prompts):
            patch(model, vector, units)
            run = capture(model)
            model.output.logits[:, 0].save()
            print(run)
    finally:
        handle.remove()
    assert not recwarn.list


def test_errors_in_a_later_stage_end_the_run_in_one_sentence(model, prompts, vector):
    words = "the decoder cannot be patched at patch 0.*do not show them"
    with pytest.raises(ValueError, match=words), model.trace(prompts.query_only()):
        patch(model, vector, ["decoder.blocks.0.attn.heads[0] @ example_input"])
    assert logits_of(model, prompts) is not None


def test_heads_must_be_what_a_module_is_given(model):
    class Strange:
        heads = heads_of("proj")
        path = "model.attn"

    Strange.heads.key = "proj.output"
    from vtv_nnsight.models.nnsight_verbs import projection_of

    with pytest.raises(TypeError, match="model.attn.heads are not the input of a module; make them with heads_of"):
        projection_of(Strange())
    assert projection_of(model.attention("encoder", 0)).path == "model.encoder.blocks.0.attn.proj"


def test_collecting_is_capturing(model, prompts):
    with torch.no_grad(), model.trace(prompts):
        run = capture(model, SITES)
    assert_same(Activations.collect(model, prompts, sites=SITES, batch_size=2, progress=False), run, **CLOSE)
    mean = TaskVectors.collect(model, {"a": prompts}, sites=SITES, progress=False)["a"].mean
    for key, values in run.values.items():
        torch.testing.assert_close(mean[key], values.double().mean(0).float(), **CLOSE)
    assert HEADS in run.values.sites


def test_names_of_units_of_one_space_in_any_order(model, others, vector):
    names = ["encoder.blocks.0.attn.heads[0] @ query", "encoder.blocks.0.attn.heads[0] @ example_input"]
    for order in (names, names[::-1]):
        with model.trace(others):
            patch(model, vector, order)
            logits = model.output.logits.save()
        space = PatchSpace(model, others.layout, "cell")
        with model.trace(others):
            patch(model, vector, PatchSet.named(space, names))
            expected = model.output.logits.save()
        assert torch.equal(logits, expected)
    with pytest.raises(ValueError, match="'nothing' is not a unit of this model"), model.trace(others):
        patch(model, vector, [names[0], "nothing"])


def test_a_stage_that_was_not_captured_is_named(model, prompts, others):
    with model.trace(prompts):
        activations = capture(model, stages="encoder")
    with pytest.raises(ValueError, match="there is nothing of the decoder, only of the encoder"), model.trace(others):
        patch(model, activations, ["decoder.blocks.0.attn.heads[0] @ query"])
    with (
        pytest.raises(ValueError, match="layers= names decoder, which stages=encoder leaves out"),
        model.trace(prompts),
    ):
        capture(model, stages="encoder", layers={"decoder": [0]})
