"""Painter and SegGPT against numbers of the released code, transformers, and hand-written hooks."""

import argparse
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange
from helpers import DATA, small_painter
from safetensors.torch import load_file
from transformers import SegGptConfig, SegGptForImageSegmentation

from vtv_nnsight import (
    MAEVQGAN,
    Layout,
    Painter,
    PatchSet,
    PatchSpace,
    SegGPT,
    TaskVectors,
    VisualPrompt,
    ablate,
    data,
    evaluate,
    patch,
    search,
    tasks,
)
from vtv_nnsight.images import denormalise, normalise
from vtv_nnsight.models import sources
from vtv_nnsight.models.painter_network import PainterOutput
from vtv_nnsight.prompts import crop
from vtv_nnsight.testing import check_model

KINDS = {"painter": Painter, "seggpt": SegGPT}
CLOSE = dict(rtol=0, atol=1e-4)
LAYOUT = Layout(128, 8, gap=0)


@pytest.fixture(scope="module")
def numbers():
    """What the released code gave, by name."""
    return load_file(DATA / "painter.safetensors")


@pytest.fixture(scope="module")
def tensors(weight_of):
    """Kind → the released state dict of the golden model of that kind."""
    shapes = json.loads((DATA / "painter_shapes.json").read_text())
    return {
        kind: {name: weight_of(f"{kind}.{name}", shape, seed=7) for name, shape in shapes[kind].items()}
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def released(tensors, tmp_path_factory):
    """Kind → a file in the released format."""
    folder = tmp_path_factory.mktemp("released")
    for kind in KINDS:
        torch.save({"model": tensors[kind]}, folder / f"{kind}.pth")
    return {kind: folder / f"{kind}.pth" for kind in KINDS}


@pytest.fixture(scope="module")
def models(released):
    """Kind → the golden model. Do not change its weights."""
    loaded = {"dispatch": True}  # `run_hooked` runs the networks themselves, and not through a trace
    seggpt = SegGPT(released["seggpt"], embedding_type="semantic", **loaded)
    return {"painter": Painter(released["painter"], **loaded), "seggpt": seggpt}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(models, kind):
    return models[kind]


@pytest.fixture(scope="module")
def prompts(numbers):
    return VisualPrompt.from_canvas(torch.cat([numbers["image"], numbers["target"]], dim=-1), LAYOUT)


@pytest.fixture(scope="module")
def of_one_query(prompts):
    """The prompts' examples, all with the first one's query."""
    canvas = prompts.canvas.clone()
    rows, columns = LAYOUT.cells["query"]
    canvas[:, :, rows, columns] = canvas[:1, :, rows, columns]
    return replace(prompts, canvas=canvas)


def predict(model, *inputs, **options):
    with torch.no_grad(), model.trace(*inputs, **options):
        prediction = model.output.prediction.save()
    return prediction


def heads_of(model, prompts):
    with torch.no_grad(), model.trace(prompts):
        heads = [layer.attention.heads for layer in model.encoder.layers].save()
    return heads


def run_hooked(model, prompts, edit):
    """A forward with hand-written hooks: z of every layer is edited as `edit(layer, z)`, z being [row, height, width,
    head, head_dim] with the rows of both streams, side by side, where there are two."""
    network, handles = model._module, []
    for i, layer in enumerate(network.encoder.layers):

        def hook(projection, inputs, i=i):
            z = rearrange(inputs[0], "... (head dim) -> ... head dim", head=4)
            return (edit(i, z.clone()).flatten(-2),)

        handles.append(layer.attention.proj.register_forward_pre_hook(hook))
    try:
        inputs = prompts.canvas, prompts.visible, prompts.decoded
        return network(*inputs, embedding_type=model.embedding_type).prediction
    finally:
        for handle in handles:
            handle.remove()


def transformers_inputs(prompts):
    """What transformers' own forward is given for the same prompts."""
    cells = {name: normalise(prompts.region(name)) for name in LAYOUT.cells}
    return {
        "pixel_values": cells["query"],
        "prompt_pixel_values": cells["example_input"],
        "prompt_masks": cells["example_output"],
    }


def test_one_shot_is_the_released_codes(model, kind, numbers, prompts):
    torch.testing.assert_close(predict(model, prompts), numbers[f"{kind}/one_shot"], **CLOSE)


def test_heads_are_the_released_codes(model, kind, numbers, prompts):
    heads = heads_of(model, prompts)
    assert [tuple(z.shape) for z in heads] == [(3, 256, 4, 16)] * 3 + [(3, 128, 4, 16)] * 21
    for layer in (0, 2, 3, 23):
        expected = numbers[f"{kind}/z/{layer}"]
        streams = 2 if layer < 3 else 1
        expected = rearrange(expected, "(stream b) h w head dim -> b (stream h w) head dim", stream=streams)
        torch.testing.assert_close(heads[layer], expected, **CLOSE)


def test_query_only_is_the_example_masked_away(model, kind, numbers, prompts):
    found = predict(model, prompts.query_only())
    torch.testing.assert_close(found[:, :, 1:], numbers[f"{kind}/query_only"][:, :, 1:], **CLOSE)
    assert (found - predict(model, prompts)).abs().max() > 0.1
    changed = prompts.canvas.clone()
    changed[:, :, :64] = 0.5
    assert torch.equal(predict(model, replace(prompts, canvas=changed).query_only()), found)


def test_query_only_patched(model, kind, numbers, prompts):
    """Chosen heads get, at the places that query-only prompts show, their mean over the one-shot prompts."""
    means = [z.mean(0) for z in heads_of(model, prompts)]
    rows = prompts.query_only()
    with torch.no_grad(), model.trace(rows):
        for stage in model.stages:
            seen, every = model.positions(stage.name), model.positions(stage.name, prompts)
            at = (every[None] == seen[:, None]).int().argmax(1)
            first = 0 if stage.name == "streams" else model.stages[0].layers
            for layer in range(stage.layers):
                chosen = [h for block, h in numbers[f"{kind}/chosen"].tolist() if block == first + layer]
                if chosen:
                    z = model.attention(stage.name, layer).heads
                    z[:, :, chosen] = means[first + layer][at][:, chosen]
        found = model.output.prediction.save()
    torch.testing.assert_close(found[:, :, 1:], numbers[f"{kind}/query_only_patched"][:, :, 1:], **CLOSE)


def test_ensemble_is_the_released_codes(models, numbers, of_one_query):
    found = predict(models["seggpt"], of_one_query, feature_ensemble=True)
    torch.testing.assert_close(found[:1], numbers["seggpt/ensemble_of_three"], **CLOSE)
    torch.testing.assert_close(found[:, :, 1:], found[:1, :, 1:].expand(3, -1, -1, -1), **CLOSE)
    alone = predict(models["seggpt"], of_one_query[0])
    torch.testing.assert_close(predict(models["seggpt"], of_one_query[0], feature_ensemble=True), alone, **CLOSE)


def test_nothing_is_left_behind_in_transformers_modules(models, of_one_query):
    model, layers = models["seggpt"], models["seggpt"]._module.encoder.layers
    before = predict(model, of_one_query)
    predict(model, of_one_query, feature_ensemble=True)
    predict(model, of_one_query.query_only())
    assert torch.equal(predict(model, of_one_query), before)
    assert not any(layer.attention._forward_hooks or "get_rel_pos" in vars(layer.attention) for layer in layers)


def test_instance_type(released, numbers, prompts, models):
    model = SegGPT(released["seggpt"], embedding_type="instance")
    torch.testing.assert_close(predict(model, prompts), numbers["seggpt/instance"], **CLOSE)
    assert SegGPT(released["seggpt"]).embedding_type == "instance"  # as in transformers and the released script
    assert model.identity() != models["seggpt"].identity() != models["painter"].identity()
    assert model.identity() == {"model": "SegGPT", "embedding_type": "instance"}


def test_what_the_answers_place_holds_does_not_matter(model, prompts):
    other = prompts.canvas.clone()
    rows, columns = LAYOUT.cells["output"]
    other[:, :, rows, columns] = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for form in (lambda p: p, VisualPrompt.query_only):
        blind = predict(model, form(replace(prompts, canvas=other)))
        assert torch.equal(blind, predict(model, form(prompts)))


def test_agrees_with_transformers(models, prompts):
    module = models["seggpt"]._module.original
    with torch.no_grad():
        expected = module(**transformers_inputs(prompts), embedding_type="semantic").pred_masks[:, :, 64:]
    torch.testing.assert_close(predict(models["seggpt"], prompts), expected, **CLOSE)


def test_ready_module_is_used_as_it_is(models, prompts):
    module = models["seggpt"]._module.original
    model = SegGPT(module, embedding_type="semantic")
    assert model._module.encoder.layers is module.model.encoder.layers
    assert torch.equal(predict(model, prompts), predict(models["seggpt"], prompts))
    half = SegGPT(module, embedding_type="semantic", dtype=torch.bfloat16)
    assert half._module.dtype == torch.bfloat16 and module.dtype == torch.float32


def test_folder_and_back(model, kind, prompts, tmp_path):
    model.save_pretrained(tmp_path)
    again = KINDS[kind](tmp_path, **({"embedding_type": "semantic"} if kind == "seggpt" else {}))
    assert not again.dispatched and again.layout == LAYOUT
    assert torch.equal(predict(again, prompts), predict(model, prompts))
    module = SegGptForImageSegmentation.from_pretrained(tmp_path)
    assert module.config.image_size == [128, 64] or tuple(module.config.image_size) == (128, 64)


def test_hub_ids_of_released_files(released, monkeypatch):
    asked = []

    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        return str(released["painter" if "painter" in name else "seggpt"])

    monkeypatch.setattr(sources, "hf_hub_download", download)
    Painter("BAAI/Painter")
    SegGPT("BAAI/SegGPT", revision="main")
    assert asked == [("BAAI/Painter", "painter_vit_large.pth", None), ("BAAI/SegGPT", "seggpt_vit_large.pth", "main")]


def test_sizes_are_read_off_the_file(tensors, released):
    config = SegGPT(released["seggpt"])._module.config
    expected = SegGptConfig(
        image_size=(128, 64),
        patch_size=8,
        hidden_size=64,
        num_attention_heads=4,
        pretrain_image_size=32,
        decoder_hidden_size=16,
    )
    ignored = {"transformers_version", "architectures", "dtype", "_name_or_path", "torch_dtype", "mlp_dim"}
    found, wanted = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config, expected))
    for values in (found, wanted):
        values["intermediate_hidden_state_indices"] = list(values["intermediate_hidden_state_indices"])
        values["image_size"] = list(values["image_size"])
    assert found == wanted and config.mlp_dim == 256
    assert SegGptConfig(image_size=(896, 448)).patch_size == 16  # the published size is transformers' default


def test_stages_and_positions(model, prompts):
    streams, merged = model.stages
    assert (streams.name, streams.layers, streams.streams) == ("streams", 3, 2)
    assert (merged.name, merged.layers, merged.streams) == ("merged", 21, 1)
    assert (streams.heads, streams.head_dim) == (merged.heads, merged.head_dim) == (4, 16)
    assert model.attention("merged", 0).path == "model.encoder.layers.3.attention"
    grid = 1 + torch.arange(256).view(16, 16)
    image, target = grid[:, :8].flatten(), grid[:, 8:].flatten()
    lower = grid[8:, :8].flatten(), grid[8:, 8:].flatten()
    zero = prompts.query_only()
    assert torch.equal(model.positions("streams", prompts), torch.cat([image, target]))
    assert torch.equal(model.positions("merged", prompts), image)
    assert torch.equal(model.positions("streams", zero), torch.cat(lower))
    assert torch.equal(model.positions("merged", zero), lower[0])
    for rows in (prompts, zero):
        with torch.no_grad(), model.trace(rows):
            found = [model.positions("streams"), model.attention("streams", 1).heads, model.positions("merged")].save()
        assert torch.equal(found[0], model.positions("streams", rows))
        assert torch.equal(found[2], model.positions("merged", rows))


def test_groups(model):
    lower = 1 + torch.arange(256).view(16, 16)[8:]
    streams, merged = (model.groups(stage, "quadrant") for stage in ("streams", "merged"))
    assert list(streams) == ["query", "output"] and list(merged) == ["query+output"]
    assert torch.equal(streams["output"], lower[:, 8:].flatten())
    assert torch.equal(merged["query+output"], streams["query"])
    assert len(model.groups("streams", "token")) == 128 and len(model.groups("merged", "token")) == 64
    for stage in ("streams", "merged"):  # wherever a stage has tokens
        (everywhere,) = model.groups(stage, "head").values()
        assert torch.equal(everywhere, torch.arange(257))


def test_the_loss_is_the_one_it_was_trained_with(model, kind, prompts):
    (loss,) = model.losses
    with torch.no_grad(), model.trace(prompts):
        output = model.output.save()
    found = loss.value(output, prompts, model.truth(prompts))
    module, inputs = model._module.original, transformers_inputs(prompts)
    options = {"labels": normalise(prompts.region("output")), "embedding_type": model.embedding_type}
    with torch.no_grad():
        rows = [module(**{k: v[i : i + 1] for k, v in inputs.items()}, **_row(options, i)).loss for i in range(3)]
    torch.testing.assert_close(found, torch.stack(rows), **CLOSE)


def _row(options, i):
    return {name: value[i : i + 1] if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def test_gradients_of_gates(model, prompts):
    """Gates on the heads of a layer of either stage get the gradient that hooks by hand give."""
    (loss,) = model.losses
    truth, rows = model.truth(prompts), prompts.query_only()
    gates = {stage: torch.full((4,), 0.5, requires_grad=True) for stage in ("streams", "merged")}
    with model.trace(rows):
        for stage, gate in gates.items():
            attention = model.attention(stage, 1)
            attention.heads = attention.heads * gate[:, None]
        value = loss.value(model.output, rows, truth).sum().save()
    found = torch.autograd.grad(value, list(gates.values()))
    by_layer = {1: gates["streams"], 4: gates["merged"]}
    prediction = run_hooked(model, rows, lambda i, z: z * by_layer[i][:, None] if i in by_layer else z)
    value = loss.value(PainterOutput(prediction=prediction), rows, truth).sum()
    for gradient, expected in zip(found, torch.autograd.grad(value, list(gates.values()))):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
        assert gradient.abs().min() > 0


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("query_only", [False, True])
def test_edits_in_place_and_whole_equal_hooks(model, prompts, grad, query_only):
    rows = prompts.query_only() if query_only else prompts
    lower = slice(0, None) if query_only else slice(8, None)

    def silenced(i, z):
        """Head 1 at the answer: the target's lower half, and after the merge the place that stands for it."""
        (z[1::2] if i < 3 else z)[:, lower, :, 1] = 0
        return z

    tokens = {
        0: slice(64, None) if query_only else slice(192, None),
        3: slice(0, None) if query_only else slice(64, None),
    }
    with torch.set_grad_enabled(grad):
        expected = run_hooked(model, rows, silenced)
        with model.trace(rows):
            for i, layer in enumerate(model.encoder.layers):
                layer.attention.heads[:, tokens[0 if i < 3 else 3], 1] = 0
            in_place = model.output.prediction.save()
        with model.trace(rows):
            for i, layer in enumerate(model.encoder.layers):
                z = layer.attention.heads.clone()
                z[:, tokens[0 if i < 3 else 3], 1] = 0
                layer.attention.heads = z
            whole = model.output.prediction.save()
    torch.testing.assert_close(in_place, expected, **CLOSE)
    torch.testing.assert_close(whole, expected, **CLOSE)
    assert (expected - predict(model, rows)).abs().max() > 0.01


@pytest.mark.parametrize("grad", [False, True])
def test_invokes_see_their_own_rows_of_both_streams(model, prompts, grad):
    def silence(layers):
        for layer in layers:
            layer.attention.heads[:, :, 1] = 0

    with torch.set_grad_enabled(grad):
        with model.trace() as tracer:
            with tracer.invoke(prompts[:1]):
                first = model.encoder.layers[1].attention.heads.save()
                pattern = model.encoder.layers[2].attention.pattern.save()
            with tracer.invoke(prompts[1:]):
                silence(model.encoder.layers[:1])
                stream = model.encoder.layers[0].output[0].save()
                silence(model.encoder.layers[1:])
                second = model.output.prediction.save()
            with tracer.invoke(prompts[:1]):
                attention = model.encoder.layers[2].attention
                attention.heads = attention.heads * 2
                third = model.output.prediction.save()
            with tracer.invoke():
                everything = model.output.prediction.save()
        with model.trace(prompts[:1]):
            first_alone = model.encoder.layers[1].attention.heads.save()
            pattern_alone = model.encoder.layers[2].attention.pattern.save()
        with model.trace(prompts[1:]):
            silence(model.encoder.layers)
            second_alone = model.output.prediction.save()
        with model.trace(prompts[:1]):
            attention = model.encoder.layers[2].attention
            attention.heads = attention.heads * 2
            third_alone = model.output.prediction.save()
    assert first.shape == (1, 256, 4, 16) and stream.shape == (4, 16, 8, 64)
    for found, expected in (
        (first, first_alone),
        (second, second_alone),
        (third, third_alone),
        (pattern, pattern_alone),
    ):
        torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(everything[:1], predict(model, prompts[:1]), **CLOSE)
    assert torch.equal(everything[1:3], second) and torch.equal(everything[3:], third)


def modules_of(model):
    """The modules around the merge: of a layer with two streams, the last one with two, and one after it."""
    layer, attention, mlp = model.encoder.layers[0], model.encoder.layers[0].attention, model.encoder.layers[0].mlp
    inside = [layer.layernorm_before, attention.qkv, attention.proj, attention, layer.layernorm_after]
    return [*inside, mlp.lin1, mlp.act, mlp.lin2, mlp, *model.encoder.layers[:3]]


def first(value):
    return first(value[0]) if isinstance(value, tuple) else value


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("edited", [False, True])
def test_all_of_several_invokes_is_as_in_traces_of_their_own(side, edited):
    """Of every module: what is read, edited in place, gradients, and gradients that are written."""
    model = SegGPT(small_painter(types=True))
    prompts = VisualPrompt.from_canvas(torch.rand(3, 3, 64, 64, generator=torch.manual_seed(0)), model.layout)
    mask = model._module.embeddings.mask_token
    with torch.no_grad(), model.trace(prompts[:1]):
        untouched = model.output.prediction.save()

    for module in modules_of(model):

        def look(rows, before=None, module=module):
            mask.grad = None
            with model.trace() as tracer:
                if before is not None:
                    with tracer.invoke(before):
                        others = model.output.prediction.save()
                with tracer.invoke(rows):
                    x = first(getattr(module, side))
                    seen = x.clone().save()
                    if edited and (module, side) != (model.encoder.layers[2], "input"):  # which PyTorch refuses
                        x[:, 2:5] *= 0.3
                    prediction = model.output.prediction.save()
                    with prediction.square().sum().backward():
                        gradient = x.grad.clone().save()
                        x.grad = gradient * 0.5
            return seen, prediction, gradient, mask.grad, *([] if before is None else [others])

        *several, others = look(prompts[1:], prompts[:1])
        torch.testing.assert_close(others, untouched, **CLOSE)
        for found, expected in zip(several, look(prompts[1:])):
            size = expected.abs().max().item()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * size, msg=f"{module.path}.{side}")


def test_skips_and_saved_rows_of_several_invokes():
    model = SegGPT(small_painter(types=True))
    prompts = VisualPrompt.from_canvas(torch.rand(3, 3, 64, 64), model.layout)
    layers = model.encoder.layers

    def skip():
        layers[0].skip((layers[0].input * 0.5,))
        layers[1].attention.proj.skip(layers[1].attention.proj.input * 0.3)
        return model.output.prediction

    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(prompts[:1]):
            a = skip().save()
        with tracer.invoke(prompts[1:]):
            b = skip().save()
    for found, rows in ((a, prompts[:1]), (b, prompts[1:])):
        with torch.no_grad(), model.trace(rows):
            expected = skip().save()
        torch.testing.assert_close(found, expected, **CLOSE)
    with model.trace() as tracer:
        with tracer.invoke(prompts[:1]):
            rows = layers[0].output[0].save()
        with tracer.invoke(prompts[1:]):
            layers[0].output[0][:] = 1
        with tracer.invoke():
            everything = layers[0].output[0].save()
    assert [bool((row == 1).all()) for row in everything] == [False, False, True, True, True, True]
    assert torch.equal(pickle.loads(pickle.dumps(rows.detach())), everything[:2])
    with model.scan() as tracer:
        with tracer.invoke(prompts[:1]):
            layers[0].output[0][:] = 0
        with tracer.invoke(prompts[1:]):
            shape = layers[0].output[0].shape.save()
    assert shape == (4, 8, 4, 32)


def test_pattern(model, prompts):
    with torch.no_grad(), model.trace(prompts):
        patterns = [model.encoder.layers[i].attention.pattern for i in (0, 5)].save()
    assert [tuple(p.shape) for p in patterns] == [(3, 4, 256, 128), (3, 4, 128, 128)]
    for pattern in patterns:
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
    with torch.no_grad(), model.trace(prompts):
        attention = model.encoder.layers[5].attention
        attention.pattern[:, 1] = 1 / 128
        even = attention.heads[:, :, 1].save()
    torch.testing.assert_close(even, even[:, :1].expand_as(even), **CLOSE)


@pytest.mark.slow
def test_scan_loads_no_weights(released, prompts):
    model = SegGPT(released["seggpt"], dtype=torch.bfloat16)
    for rows, shape in ((prompts, (3, 256, 4, 16)), (prompts.query_only(), (3, 128, 4, 16))):
        with model.scan(rows):
            positions = model.positions("streams").shape.save()
            first = model.encoder.layers[0].attention.heads.shape.save()
            merged = model.encoder.layers[3].attention.heads.shape.save()
            prediction = model.output.prediction.shape.save()
        assert tuple(first) == shape and tuple(merged) == (3, shape[1] // 2, 4, 16)
        assert tuple(positions) == (shape[1],) and tuple(prediction) == (3, 3, 64, 64)
    assert not model.dispatched and model.device.type == "meta"


def test_generate(model, prompts):
    expected = prompts.canvas.clone()
    rows, columns = LAYOUT.cells["output"]
    expected[:, :, rows, columns] = denormalise(predict(model, prompts)).clamp(0, 1)
    canvas = model.generate(prompts)
    assert canvas.shape == (3, 3, 128, 128)
    torch.testing.assert_close(canvas, expected, rtol=0, atol=1e-6)
    with model.generate(prompts) as tracer:
        traced = tracer.result.save()
    with model.generate(prompts) as tracer:
        model.encoder.layers[4].attention.heads[:, :, 1] = 0
        edited = tracer.result.save()
    assert torch.equal(traced, canvas) and not torch.equal(edited, canvas)
    assert torch.equal(canvas.answer, canvas[:, :, rows, columns])
    with torch.no_grad(), model.trace(prompts):
        output = model.output.save()
    assert torch.equal(model.paint(output, prompts), canvas)
    blind = model.generate(prompts.query_only())
    assert torch.equal(blind[:, :, :64], prompts.canvas[:, :, :64]) and not torch.equal(blind, canvas)


def test_edits_are_stored(model, prompts):
    with torch.no_grad():
        with model.edit() as (_, edited):
            edited.encoder.layers[1].attention.heads[:, :, 1] = 0
            edited.encoder.layers[7].attention.heads[:] = 1
        with model.trace(prompts):
            model.encoder.layers[1].attention.heads[:, :, 1] = 0
            model.encoder.layers[7].attention.heads[:] = 1
            by_hand = model.output.prediction.save()
    assert torch.equal(predict(edited, prompts), by_hand)
    assert not torch.equal(predict(model, prompts), by_hand)
    assert edited.identity() == model.identity() and edited.layout == model.layout
    assert torch.equal(edited.generate(prompts), model.paint(PainterOutput(prediction=by_hand), prompts))


def test_bfloat16(released, numbers, prompts, kind):
    model = KINDS[kind](
        released[kind], dtype=torch.bfloat16, **({"embedding_type": "semantic"} if kind == "seggpt" else {})
    )
    for rows, name in ((prompts, "one_shot"), (prompts.query_only(), "query_only")):
        found, expected = predict(model, rows), numbers[f"{kind}/{name}"]
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected)[:, :, 1:].square().mean() < 0.01 * expected.var()
    canvas = model.generate(prompts)
    assert canvas.dtype == torch.float32 and canvas.min() >= 0 and canvas.max() <= 1


def test_device_map(released, prompts, models):
    model = SegGPT(released["seggpt"], embedding_type="semantic", device_map={"": "cpu"})
    assert torch.equal(predict(model, prompts.query_only()), predict(models["seggpt"], prompts.query_only()))


def test_offloaded_weights(models, prompts, tmp_path):
    """Layers on disk come to the processor one at a time, query only as well as one-shot."""
    models["seggpt"].save_pretrained(tmp_path / "model")
    places = {"model.embeddings": "cpu", "model.encoder": "disk", "decoder": "cpu"}
    options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    model = SegGPT(tmp_path / "model", embedding_type="semantic", **options)
    for rows in (prompts, prompts.query_only()):
        torch.testing.assert_close(predict(model, rows), predict(models["seggpt"], rows), **CLOSE)
    assert model._module.encoder.layers[3].attention.rel_pos_h.is_meta


def test_a_wrong_write_says_what_was_expected(model, prompts):
    for wrong in (torch.zeros(3, 256, 64), torch.zeros(3, 256, 16, 4), torch.zeros(1, 256, 4, 16), 0.0):
        words = r"encoder\.layers\.0\.attention\.heads was given .*head_dim\] = \[3, 256, 4, 16\]"
        with pytest.raises(ValueError, match=words), model.trace(prompts):
            model.encoder.layers[0].attention.heads = wrong
    with pytest.raises(ValueError, match=r"pattern was given shape \[1, 4, 256, 128\]"), model.trace(prompts):
        model.encoder.layers[0].attention.pattern = torch.zeros(1, 4, 256, 128)


def test_prompts_that_do_not_fit(model, prompts):
    canvas = torch.rand(1, 3, 128, 128)
    for layout in (
        Layout(128, 8),
        Layout(128, 16, gap=0),
        replace(LAYOUT, order="horizontal"),
        replace(LAYOUT, examples=3),
    ):
        with pytest.raises(ValueError, match=r"a prompt of Layout\(.*does not fit Layout"):
            predict(model, VisualPrompt.from_canvas(canvas, layout))
    assert predict(model, VisualPrompt.from_canvas(canvas, replace(LAYOUT, background="black"))).shape == (1, 3, 64, 64)
    strange = replace(prompts, visible=prompts.visible[1:])
    with pytest.raises(ValueError, match="shows 191 of 256 patches is neither one-shot nor query only"):
        predict(model, strange)
    with pytest.raises(TypeError, match="embedding_type= belongs to the model"):
        predict(model, prompts, embedding_type="semantic")
    with pytest.raises(ValueError, match="cannot share a batch"), model.trace() as tracer:
        with tracer.invoke(prompts):
            pass
        with tracer.invoke(prompts.query_only()):
            pass


def test_ensembles_that_do_not_fit(models, prompts, of_one_query):
    with pytest.raises(ValueError, match="this batch has 3 queries"):
        predict(models["seggpt"], prompts, feature_ensemble=True)
    with pytest.raises(ValueError, match="query-only prompts show none"):
        predict(models["seggpt"], of_one_query.query_only(), feature_ensemble=True)
    with pytest.raises(TypeError, match="Painter has no feature ensemble"):
        predict(models["painter"], of_one_query, feature_ensemble=True)


def test_sources_of_another_kind(models, released, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"painter\.pth is a Painter .*load it with Painter"):
        SegGPT(released["painter"], dispatch=True)
    with pytest.raises(ValueError, match=r"seggpt\.pth is a SegGPT .*load it with SegGPT"):
        Painter(released["seggpt"], dispatch=True)
    for kind, other in (("painter", SegGPT), ("seggpt", Painter)):
        folder = tmp_path / kind
        models[kind].save_pretrained(folder)
        with pytest.raises(ValueError, match=f"load it with {KINDS[kind].__name__}"):
            other(folder, dispatch=True)
    with pytest.raises(ValueError, match=r"no Painter and no SegGPT: it has no 'segment_token_x'"):
        SegGPT(checkpoint)
    with pytest.raises(ValueError, match="is not a VQGAN checkpoint"):
        MAEVQGAN(released["seggpt"])
    with pytest.raises(TypeError, match="int is no source of SegGPT"):
        SegGPT(3)
    with pytest.raises(ValueError, match="embedding_type='class' is unknown; choose from semantic, instance"):
        SegGPT(released["seggpt"], embedding_type="class")


def test_a_fresh_module_drops_no_layers(models, prompts):
    module = SegGptForImageSegmentation(models["seggpt"]._module.config)
    assert module.training and module.config.drop_path_rate
    model = SegGPT(module)
    assert torch.equal(predict(model, prompts), predict(model, prompts))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("blocks.7.mlp.fc2.bias"), "blocks.7.mlp.fc2.bias missing; it is incomplete"),
        (lambda t: t.pop("type_token_ins"), "type_token_ins missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra unknown; it is of another model"),
        (lambda t: t.update({"norm.weight": torch.zeros(3)}), r"norm.weight of shape \[3\].*ask for \[64\]"),
        (lambda t: t.update(segment_token_x=torch.zeros(64)), r"segment_token_x of shape \[64\]"),
        (lambda t: t.update({n: torch.zeros(31, 16) for n in t if "rel_pos_w" in n}), "128x128 is not two square cell"),
    ],
)
def test_damaged_files(tensors, tmp_path, change, words):
    state = dict(tensors["seggpt"])
    change(state)
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=words):
        SegGPT(tmp_path / "x.pth", dispatch=True)


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*none.pth"):
        Painter(tmp_path / "none.pth")
    path = tmp_path / "x.pth"
    path.write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="x.pth .*truncated or damaged"):
        Painter(path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="x.pth holds no state dict"):
        Painter(path)


def test_files_run_nothing(tensors, tmp_path):
    """What a file holds beside tensors is not imported, nor called."""

    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    options = argparse.Namespace(model="painter_vit_large")
    torch.save({"model": tensors["painter"], "args": options, "evil": Evil()}, tmp_path / "x.pth")
    model = Painter(tmp_path / "x.pth", dispatch=True)
    assert torch.equal(model._module.embeddings.mask_token, tensors["painter"]["mask_token"])
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def vector(models, prompts):
    """Kind → the mean over the golden prompts, one-shot."""
    return {
        kind: TaskVectors.collect(model, {"golden": prompts}, progress=False)["golden"]
        for kind, model in models.items()
    }


def test_patch_is_the_released_codes(model, kind, numbers, prompts, vector):
    space = PatchSpace(model)
    chosen = [
        f"encoder.layers.{block}.attention.heads[{head}] @ {place}"
        for block, head in numbers[f"{kind}/chosen"].tolist()
        for place in (("query", "output") if block < 3 else ("query+output",))
    ]
    rows = prompts.query_only()
    with torch.no_grad(), model.trace(rows):
        patch(model, vector[kind], PatchSet.named(space, chosen))
        found = model.output.prediction.save()
    torch.testing.assert_close(found[:, :, 1:], numbers[f"{kind}/query_only_patched"][:, :, 1:], **CLOSE)


def test_units(model):
    space = PatchSpace(model)
    assert len(space) == 3 * 4 * 2 + 21 * 4
    assert space.names[:2] == [f"encoder.layers.0.attention.heads[0] @ {place}" for place in ("query", "output")]
    assert space.names[-1] == "encoder.layers.23.attention.heads[3] @ query+output"
    assert len(PatchSpace(model, granularity="head")) == 24 * 4
    assert len(PatchSpace(model, granularity="token")) == 3 * 4 * 128 + 21 * 4 * 64


def test_cells(model, prompts):
    space = PatchSpace(model, granularity="cell")
    assert list(space.groups["streams"]) == ["example_input", "query", "example_output", "output"]
    assert list(space.groups["merged"]) == ["example_input+example_output", "query+output"]
    for stage, groups in space.groups.items():
        at = torch.cat(list(groups.values()))
        assert torch.equal(at.sort().values, model.positions(stage.stage, prompts).sort().values)
    assert len(space) == 3 * 4 * 4 + 21 * 4 * 2


@pytest.mark.parametrize("granularity", ["head", "quadrant", "token"])
def test_everything_patched_hides_the_query(model, kind, prompts, vector, granularity):
    """When every head is patched at every place that there is, all prompts get one answer, one-shot and query only."""
    space = PatchSpace(model, granularity=granularity)
    everything = PatchSet(space, torch.ones(len(space), dtype=torch.bool))
    shots = (prompts, prompts.query_only()) if granularity == "head" else (prompts.query_only(),)
    for rows in shots:
        with torch.no_grad(), model.trace(rows):
            patch(model, vector[kind], everything)
            z = [model.attention("merged", 20).heads].save()
        assert torch.equal(z[0][0], z[0][1])
    with torch.no_grad(), model.trace(prompts.query_only()):
        ablate(model, everything)
        z = [model.attention("merged", 20).heads].save()
    assert z[0].abs().max() == 0


def test_a_vector_of_the_other_type(released, models, prompts, vector):
    other = SegGPT(released["seggpt"], embedding_type="instance")
    words = "vector of 'golden' does not fit this model: it has embedding_type 'semantic', not 'instance'"
    with pytest.raises(ValueError, match=words), other.trace(prompts):
        patch(other, vector["seggpt"], PatchSet.random(PatchSpace(other), 3))
    with pytest.raises(ValueError, match="does not fit"), models["painter"].trace(prompts):
        patch(models["painter"], vector["seggpt"], PatchSet.random(PatchSpace(models["painter"]), 3))


def test_it_does_what_the_interface_promises(kind):
    model = KINDS[kind](small_painter(kind == "seggpt"))
    check_model(model, tasks.segmentation.prompts(data.scenes("train", n=40, seed=0), n=2, layout=model.layout))


def test_a_whole_round(kind, tmp_path):
    """Collect, score, search with gradients and without, patch, evaluate; all of it through files."""
    model = KINDS[kind](small_painter(kind == "seggpt"))
    images = data.scenes("train", n=12, seed=0)
    both = tasks.segmentation, tasks.get("colorization")
    prompts = {task.name: task.prompts(images, n=6, seed=0, layout=model.layout) for task in both}
    TaskVectors.collect(model, prompts, batch_size=4, progress=False).save(tmp_path / "vectors.safetensors")
    vectors = TaskVectors.load(tmp_path / "vectors.safetensors")
    assert vectors.score()["merged"].shape == (2, 2, 65)
    task, rows = both[0], prompts["segmentation"].query_only()
    space = PatchSpace(model)
    options = {"budget": 120, "seed": 0, "batch_size": 8, "progress": False}
    result = search.gates(model, vectors["segmentation"], task, rows, space, **options)
    pixels = search.random(model, vectors["segmentation"], task, rows, space, loss="pixels", **options)
    assert len(result.patches) and pixels.patches.space.fingerprint == space.fingerprint
    result.patches.save(tmp_path / "patches.json")
    found = evaluate(
        model,
        task,
        prompts["segmentation"],
        {"one-shot": None, "task vectors": (vectors["segmentation"], PatchSet.load(tmp_path / "patches.json"))},
        progress=False,
    )
    answers = crop(model.generate(prompts["segmentation"]), "output", model.layout)
    scores = task.score(answers, prompts["segmentation"].region("output"))
    np.testing.assert_allclose(found.values("segmentation", "one-shot"), scores, atol=1e-4)
    assert np.isfinite(found.values("segmentation", "task vectors", "smooth l1 loss")).all()
    with pytest.raises(ValueError, match="loss='tokens' is unknown; choose from smooth_l1, pixels"):
        search.gates(model, vectors["segmentation"], task, rows, space, loss="tokens", **options)
