import copy
import inspect
import io
import json
import runpy
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import accelerate
import nnsight
import pytest
import torch
from helpers import DATA, FINE, logits_of, make_config, random_prompts
from nnsight.intervention.batching import Batcher
from nnsight.intervention.envoy import Envoy, eproperty
from PIL import Image
from safetensors.torch import load_file, save_file

from vtv_nnsight import MAEVQGAN, Layout, VisualPrompt
from vtv_nnsight.models import sources as model_sources
from vtv_nnsight.models.devices import available_devices, resolve_device
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.prompts import Canvases, crop


@pytest.fixture(scope="module")
def module():
    """A small model with weights large enough for every edit to show in the logits."""
    torch.manual_seed(0)
    module = MAEVQGANModel(make_config(**FINE)).eval()
    for parameter in module.parameters():
        if parameter.ndim < 2:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module


@pytest.fixture(scope="module")
def folder(module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The golden model in the published layout: (all in one file, without the tokenizer, the tokenizer)."""
    folder = tmp_path_factory.mktemp("golden")
    whole, apart, vqgan = folder / "golden.pth", folder / "apart.pth", folder / "last.ckpt"
    script = [sys.executable, str(DATA / "make_checkpoint.py")]
    subprocess.run([*script, str(whole)], check=True)
    subprocess.run([*script, str(apart), "--split-vqgan", str(vqgan)], check=True)
    return whole, apart, vqgan


@pytest.fixture
def model(module):
    return MAEVQGAN(module)


@pytest.fixture
def eager(module):
    return MAEVQGAN(module, attn_implementation="eager")


@pytest.fixture(scope="module")
def prompts():
    canvas = torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    return VisualPrompt.from_canvas(canvas, Layout(112, 8))


def attentions(model):
    return [block.attn for stack in (model.encoder, model.decoder) for block in stack.blocks]


def run_hooked(module, prompts, edit=None):
    """A forward with hand-written hooks on every attention: the heads, and the logits."""
    heads, handles = [], []
    for attention in attentions(module):

        def hook(_, args, attention=attention):
            z = args[0].reshape(*args[0].shape[:-1], attention.num_heads, attention.head_dim)
            if edit is not None:
                z = edit(z)
            heads.append(z)
            return (z.flatten(-2),)

        handles.append(attention.proj.register_forward_pre_hook(hook))
    try:
        return heads, module(prompts.canvas, prompts.visible, prompts.decoded).logits
    finally:
        for handle in handles:
            handle.remove()


def silenced(z):
    z = z.clone()
    z[:, 2:9, 1] = 0
    return z


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("grad", [False, True])
def test_heads_read_as_hooks_do(model, module, prompts, grad):
    with torch.set_grad_enabled(grad):
        expected, expected_logits = run_hooked(module, prompts)
        with model.trace(prompts):
            heads = [attention.heads for attention in attentions(model)].save()
            logits = model.output.logits.save()
    assert [tuple(z.shape) for z in heads] == [(3, 148, 4, 8)] * 3 + [(3, 197, 2, 8)] * 2
    assert same(heads, expected)
    assert torch.equal(logits, expected_logits)


@pytest.mark.parametrize("grad", [False, True])
def test_edits_in_place_and_whole_equal_hooks(model, module, prompts, grad):
    with torch.set_grad_enabled(grad):
        expected = run_hooked(module, prompts, silenced)[1]
        with model.trace(prompts):
            for attention in attentions(model):
                attention.heads[:, 2:9, 1] = 0
            in_place = model.output.logits.save()
        with model.trace(prompts):
            for attention in attentions(model):
                attention.heads = silenced(attention.heads)
            whole = model.output.logits.save()
        with model.trace(prompts):
            for attention in attentions(model):
                attention.heads[:, :, 1] += attention.heads[:, :, 0]
                attention.heads *= 2
            twice = model.output.logits.save()
    assert torch.equal(in_place, expected)
    assert torch.equal(whole, expected)
    assert not torch.equal(expected, run_hooked(module, prompts)[1])

    def added(z):
        z = z.clone()
        z[:, :, 1] += z[:, :, 0]
        return z * 2

    assert torch.equal(twice, run_hooked(module, prompts, added)[1])


def test_a_wrong_write_says_what_was_expected(model, prompts):
    zeros = torch.zeros(3, 148, 4, 8)  # of which less than all rows, tokens, heads or dimensions would broadcast
    for wrong in (zeros.flatten(2), zeros.mT, zeros[:1], zeros[:, :1], zeros[:, :, :1], zeros[..., :1], 0.0):
        message = r"encoder\.blocks\.0\.attn\.heads was given .*head_dim\] = \[3, 148, 4, 8\]"
        with pytest.raises(ValueError, match=message), model.trace(prompts):
            model.encoder.blocks[0].attn.heads = wrong


def test_heads_outside_a_trace(model):
    with pytest.raises(ValueError, match="outside of interleaving"):
        model.encoder.blocks[0].attn.heads  # noqa: B018


def test_other_names(model, module, prompts):
    seen = {}
    block = module.encoder.blocks[1]
    handles = [
        part.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
        for name, part in {"block": block, "norm1": block.norm1, "mlp": block.mlp, "head": module.decoder.head}.items()
    ]
    with torch.no_grad():
        logits = module(prompts.canvas, prompts.visible, prompts.decoded).logits
        for handle in handles:
            handle.remove()
        with model.trace(prompts):
            norm1 = model.encoder.blocks[1].norm1.output.save()
            mlp = model.encoder.blocks[1].mlp.output.save()
            stream = model.encoder.blocks[1].output.save()
            head = model.decoder.head.output.save()
            out = model.output.logits.save()
    assert same([norm1, mlp, stream, head, out], [seen["norm1"], seen["mlp"], seen["block"], seen["head"], logits])
    assert stream.shape == (3, 148, 32)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradients(module, prompts, implementation):
    model = MAEVQGAN(module, attn_implementation=implementation)
    plain = model._module

    gates = torch.full((2, 4), 0.5, requires_grad=True)
    with model.trace(prompts):
        attention = model.encoder.blocks[0].attn
        attention.heads = attention.heads * gates[0, :, None]
        attention = model.encoder.blocks[1].attn
        attention.heads *= gates[1, :, None]
        loss = model.output.logits.square().mean().save()
    loss.backward()

    expected = torch.full((2, 4), 0.5, requires_grad=True)
    rows = iter(expected)

    def gated(z):
        row = next(rows, None)
        return z if row is None else z * row[:, None]

    run_hooked(plain, prompts, gated)[1].square().mean().backward()
    torch.testing.assert_close(gates.grad, expected.grad)
    assert gates.grad.abs().min() > 0


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("invokes", [False, True])
def test_gradients_of_heads_after_an_edit(module, prompts, implementation, invokes):
    model = MAEVQGAN(module, attn_implementation=implementation)
    grads = []
    if invokes:
        with model.trace() as tracer:
            with tracer.invoke(prompts[:1]):
                model.encoder.blocks[1].attn.heads[:] = 0
            with tracer.invoke(prompts[1:]):
                z = model.encoder.blocks[0].attn.heads
                z[:, 2:9, 1] = 0
                y = model.decoder.blocks[0].attn.heads
                loss = model.output.logits.square().sum()
                with loss.backward():
                    grads = [y.grad, z.grad].save()
    else:
        with model.trace(prompts[1:]):
            z = model.encoder.blocks[0].attn.heads
            z[:, 2:9, 1] = 0
            y = model.decoder.blocks[0].attn.heads
            loss = model.output.logits.square().sum()
            with loss.backward():
                grads = [y.grad, z.grad].save()

    turns = iter(range(5))
    heads, logits = run_hooked(model._module, prompts[1:], lambda z: silenced(z) if next(turns) == 0 else z)
    expected = torch.autograd.grad(logits.square().sum(), [heads[3], heads[0]])
    for grad, reference in zip(grads, expected):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-6)


def test_gradients_with_frozen_weights_and_no_grad_blocks(module, prompts):
    model = MAEVQGAN(module, dtype=torch.float32)
    model._module.requires_grad_(False)
    with model.trace(prompts):
        z = model.encoder.blocks[0].attn.heads
        z.requires_grad_(True)
        loss = model.output.logits.square().sum()
        with loss.backward():
            grad = z.grad.save()
    assert grad.abs().max() > 0

    gate = torch.ones(4, requires_grad=True)
    with model.trace(prompts):
        attention = model.encoder.blocks[0].attn
        attention.heads = attention.heads * gate[:, None]
        z = model.encoder.blocks[1].attn.heads
        with torch.no_grad():
            z[:, :, 2] = 0
        loss = model.output.logits.square().sum().save()
    loss.backward()
    assert gate.grad.abs().max() > 0


@pytest.mark.parametrize("grad", [False, True])
def test_invokes_equal_separate_traces(model, prompts, grad):
    with torch.set_grad_enabled(grad):
        with model.trace() as tracer:
            with tracer.invoke(prompts[:1]):
                first = model.encoder.blocks[1].attn.heads.save()
                model.decoder.blocks[0].attn.heads[:, :, 1] = 0
                first_logits = model.output.logits.save()
            with tracer.invoke(prompts[1:]):
                second = model.encoder.blocks[1].attn.heads.save()
                second_logits = model.output.logits.save()
            with tracer.invoke(prompts[:1]):
                attention = model.decoder.blocks[0].attn
                attention.heads = attention.heads * 2
                third_logits = model.output.logits.save()
            with tracer.invoke():
                everything = model.output.logits.save()
        with model.trace(prompts[:1]):
            first_alone = model.encoder.blocks[1].attn.heads.save()
            model.decoder.blocks[0].attn.heads[:, :, 1] = 0
            first_logits_alone = model.output.logits.save()
        with model.trace(prompts[1:]):
            second_alone = model.encoder.blocks[1].attn.heads.save()
            second_logits_alone = model.output.logits.save()
        with model.trace(prompts[:1]):
            attention = model.decoder.blocks[0].attn
            attention.heads = attention.heads * 2
            third_logits_alone = model.output.logits.save()
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first, first_alone, **close)
    torch.testing.assert_close(second, second_alone, **close)
    torch.testing.assert_close(first_logits, first_logits_alone, **close)
    torch.testing.assert_close(second_logits, second_logits_alone, **close)
    torch.testing.assert_close(third_logits, third_logits_alone, **close)
    assert torch.equal(everything, torch.cat([first_logits, second_logits, third_logits]))


def test_a_batcher_that_cuts_multiples(model, monkeypatch):
    """nnsight's next rule (its pull request 722) cuts any leading dimension that is a multiple of the batch: patch ids,
    of which there are 147 and 196 for seven rows, stay whole, and invokes are what separate traces are."""

    def factor(batcher, tensor):
        times, rest = divmod(len(tensor), batcher.total) if tensor.ndim else (0, 0)
        return 0 if rest else times

    def narrow(self, tensor, group):
        start, size = (factor(self, tensor) * n for n in group)
        return tensor.narrow(0, start, size) if size else tensor

    def widen(self, full, group, edited):
        start, size = (factor(self, full) * n for n in group)
        return torch.cat([full[:start], edited, full[start + size :]]) if size else edited

    monkeypatch.setattr(Batcher, "_narrow_tensor", narrow)
    monkeypatch.setattr(Batcher, "_widen_tensor", widen)
    rows = random_prompts(7, layout=model.layout)
    assert len(rows.visible) == 147 and len(rows.decoded) == 196
    seen = {}

    def read(name):
        decoder = model.decoder
        seen[name, "heads"] = model.encoder.blocks[1].attn.heads.save()
        seen[name, "ids"] = [x for x in decoder.inputs[0] if x.dtype == torch.long].save()
        decoder.blocks[0].attn.heads[:, :, 1] = 0
        decoder.blocks[1].mlp.output = decoder.blocks[1].mlp.output * 2
        seen[name, "logits"] = model.output.logits.save()

    with torch.no_grad():
        with model.trace() as tracer:
            with tracer.invoke(rows[:3]):
                read("first")
            with tracer.invoke(rows[3:]):
                read("second")
        for name, part in (("first alone", rows[:3]), ("second alone", rows[3:])):
            with model.trace(part):
                read(name)
    for name in ("first", "second"):
        for what in ("heads", "logits"):
            torch.testing.assert_close(seen[name, what], seen[f"{name} alone", what], rtol=1e-4, atol=1e-5)
        assert [len(ids) for ids in seen[name, "ids"]] == [len(ids) for ids in seen[f"{name} alone", "ids"]]
    assert any(len(ids) > 100 for ids in seen["first", "ids"])


def test_barrier_hands_heads_across_invokes(model, prompts):
    with torch.no_grad():
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(prompts[:1]):
                z = model.encoder.blocks[1].attn.heads
                barrier()
            with tracer.invoke(prompts[1:2]):
                barrier()
                model.encoder.blocks[1].attn.heads = z
                patched = model.output.logits.save()
        with model.session():
            with model.trace(prompts[:1]):
                z = model.encoder.blocks[1].attn.heads
            with model.trace(prompts[1:2]):
                model.encoder.blocks[1].attn.heads = z
                expected = model.output.logits.save()
        with model.trace(prompts[1:2]):
            clean = model.output.logits.save()
    torch.testing.assert_close(patched, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(clean, expected)


def test_cache(model, prompts):
    with torch.no_grad(), model.trace(prompts) as tracer:
        cache = tracer.cache(modules=[model.encoder.blocks[0].attn])
        out = model.encoder.blocks[0].attn.output.save()
    assert torch.equal(cache["model.encoder.blocks.0.attn"].output, out)


def test_heads_are_cached_as_the_projections_input(model, prompts):
    with torch.no_grad(), model.trace(prompts) as tracer:
        attention = model.encoder.blocks[0].attn
        cache = tracer.cache(modules=[attention.proj], include_inputs=True)
        attention.heads[:, :, 1] = 0
        z = attention.heads.save()
    assert torch.equal(cache["model.encoder.blocks.0.attn.proj"].input, z.flatten(-2)) and not z[:, :, 1].any()


def test_a_call_is_one_untraced_forward(folder, module, prompts):
    lazy = MAEVQGAN(folder)
    with torch.no_grad():
        expected = module(prompts.canvas, prompts.visible, prompts.decoded).logits
        assert torch.equal(lazy(prompts).logits, expected)
        assert torch.equal(lazy(prompts.canvas, prompts.visible, decoded=prompts.decoded).logits, expected)
    with pytest.raises(TypeError, match="was given str; give a VisualPrompt"):
        lazy("picture.png")


def test_a_model_runs_one_trace_at_a_time(module, prompts):
    model, words = MAEVQGAN(module), "a trace of this model is running, around this line or in another thread; let it"

    def traced():
        with model.trace(prompts):
            pass

    def scanned():
        with model.scan(prompts):
            pass

    def generated():
        with model.generate(prompts):
            pass

    calls = (traced, scanned, generated, lambda: model.generate(prompts), lambda: model(prompts))
    calls += (
        lambda: model(prompts.canvas, prompts.visible, prompts.decoded),
        lambda: model.trace(prompts, trace=False),
    )
    expected = logits_of(model, prompts)
    for call in calls:
        with pytest.raises(RuntimeError, match=words), model.trace(prompts):
            assert len(model.encoder.blocks[0].output)
            call()
        with pytest.raises(RuntimeError, match=words), model.generate(prompts):
            call()
    with ThreadPoolExecutor(1) as thread, torch.no_grad(), model.trace(prompts):
        assert len(model.encoder.blocks[0].output)
        errors = [thread.submit(call).exception() for call in calls].save()
        found = model.output.logits.save()
    assert all(isinstance(error, RuntimeError) and words in str(error) for error in errors)
    assert torch.equal(found, expected)
    assert torch.equal(logits_of(model, prompts), expected)
    with torch.no_grad(), model.session():
        with model.trace(prompts):
            first = model.output.logits.save()
        second = model(prompts).logits.save()
    assert torch.equal(first, expected) and torch.equal(second, expected)


def test_positions_cannot_be_written(model, prompts):
    with pytest.raises(ValueError, match="encoder.positions can only be read: they follow"), model.trace(prompts):
        model.encoder.positions = torch.arange(3)


def test_patches_of_each_row(model, module, prompts):
    rows = torch.Generator().manual_seed(0)
    visible = torch.stack([torch.randperm(196, generator=rows)[:20] for _ in range(3)])
    decoded = torch.arange(196).expand(3, -1)
    with torch.no_grad():
        expected = module(prompts.canvas, visible, decoded).logits
        with model.trace(prompts.canvas, visible, decoded):
            positions = model.encoder.positions.save()
            logits = model.output.logits.save()
        with model.trace() as tracer:
            with tracer.invoke(prompts.canvas[:1], visible[0], decoded[0]):
                first = model.output.logits.save()
            with tracer.invoke(prompts.canvas[1:], visible[1:], decoded[1:]):
                seen = model.encoder.positions.save()
                rest = model.output.logits.save()
    assert torch.equal(positions, torch.cat([torch.zeros(3, 1, dtype=torch.long), 1 + visible], 1))
    assert torch.equal(logits, expected) and torch.equal(seen, positions[1:])
    torch.testing.assert_close(torch.cat([first, rest]), expected, rtol=1e-4, atol=1e-5)
    for wrong, message in (
        (visible[:2], "visible has 2 rows for 3 canvases"),
        (visible + torch.tensor([[0], [0], [190]]), r"visible holds patch ids from \d+ to \d+; this"),
        (visible * torch.tensor([[1], [0], [1]]), "visible names a patch twice in a row"),
        (visible[:, :0], "visible is empty"),
    ):
        with pytest.raises(ValueError, match=message), model.trace(prompts.canvas, wrong, decoded):
            model.output.save()
    with pytest.raises(ValueError, match=r"patches that they share; give visible and decoded as \[patch\]"):
        model.generate(prompts.canvas, visible, decoded)


def test_scan_loads_no_weights(folder, prompts):
    model = MAEVQGAN(folder, dtype=torch.bfloat16, attn_implementation="eager")
    single = prompts[:1]
    with model.scan(prompts):
        pattern = model.encoder.blocks[0].attn.pattern.shape.save()
        dtype = nnsight.save(model.encoder.blocks[1].attn.heads.dtype)
        heads = model.encoder.blocks[2].attn.heads.shape.save()
        logits = model.output.logits.shape.save()
    with model.scan(prompts.canvas, prompts.visible, prompts.decoded):
        plain = model.output.logits.shape.save()
    with model.scan() as tracer:
        with tracer.invoke(prompts):
            pass
        with tracer.invoke(single):
            alone = model.output.logits.shape.save()
    assert not model.dispatched and model.device.type == "meta"
    assert (tuple(pattern), dtype, tuple(heads)) == ((3, 4, 148, 148), torch.bfloat16, (3, 148, 4, 8))
    assert tuple(logits) == tuple(plain) == (3, 196, 64) and tuple(alone) == (1, 196, 64)
    assert model.layout == Layout(112, 8)


def test_generate(model, module, prompts):
    expected = module.generate(prompts.canvas, prompts.visible, prompts.decoded)
    with model.generate(prompts) as tracer:
        logits = model.output.logits.save()
        canvas = tracer.result.save()
    with model.generate(prompts) as tracer:
        for attention in attentions(model):
            attention.heads[:, :, 1] = 0
        edited = tracer.result.save()
    assert torch.equal(model.generate(prompts), expected)
    assert torch.equal(model.generate(prompts.canvas, prompts.visible, decoded=prompts.decoded), expected)
    assert torch.equal(canvas, expected) and canvas.shape == (3, 3, 112, 112)
    assert logits.shape == (3, 196, 64)
    assert not torch.equal(edited, expected)
    whole = module.generate(prompts.canvas, prompts.visible, prompts.decoded, paste=False)
    assert torch.equal(model.generate(prompts, paste=False), whole)
    with model.generate(prompts, paste=False) as tracer:
        drawn = tracer.result.save()
    assert torch.equal(drawn, whole) and not torch.equal(whole, expected)
    zero_shot = model.generate(prompts.query_only())
    assert zero_shot.shape == expected.shape


def test_what_is_generated_shows_itself(model, prompts, tmp_path):
    canvases = model.generate(prompts)
    assert isinstance(canvases, Canvases) and torch.equal(canvases.answer, crop(canvases, "output", prompts.layout))
    with Image.open(io.BytesIO(canvases._repr_png_())) as picture:
        assert picture.size == (3 * 120, 120)
    assert repr(canvases) == "Canvases([3, 3, 112, 112], torch.float32, cpu)"
    with model.generate(prompts) as tracer:
        traced = tracer.result.save()  # nnsight's `save`
        answer = tracer.result.answer.save()
        tracer.result.picture().save(tmp_path / "traced.png")  # the picture's own
    assert isinstance(traced, Canvases) and torch.equal(answer, canvases.answer)
    assert Image.open(tmp_path / "traced.png").size == (3 * 120, 120)
    with model.generate() as tracer:
        with tracer.invoke(prompts[:1]):
            first = tracer.result.answer.save()
        with tracer.invoke(prompts[1:]):
            rest = tracer.result.save()
    assert torch.equal(first, canvases.answer[:1]) and torch.equal(rest.answer, canvases.answer[1:])
    horizontal = Layout(112, 8, order="horizontal")
    sideways = model.generate(VisualPrompt.from_canvas(prompts.canvas, horizontal))
    assert torch.equal(sideways.answer, crop(sideways, "output", horizontal))


def test_what_is_generated_is_a_tensor_like_any_other(model, module, prompts, tmp_path):
    canvases = model.generate(prompts)
    expected = module.generate(prompts.canvas, prompts.visible, prompts.decoded)
    for made in (canvases[:1], canvases * 1, canvases.clone(), torch.cat([canvases]), canvases.half(), canvases.answer):
        assert type(made) is torch.Tensor
    assert (canvases.numpy() == expected.numpy()).all() and float((canvases - expected).abs().max()) == 0
    canvases[:, :, 0] = 0.5
    copied = copy.deepcopy(canvases)
    assert torch.equal(copied, canvases) and torch.equal(copied.answer, canvases.answer)
    torch.save(canvases, tmp_path / "canvases.pt")
    save_file({"canvases": canvases}, tmp_path / "canvases.safetensors")
    for read in (torch.load(tmp_path / "canvases.pt"), load_file(tmp_path / "canvases.safetensors")["canvases"]):
        assert type(read) is torch.Tensor and torch.equal(read, canvases)


def test_generate_in_the_body_of_a_one_line_with(model, prompts):
    expected = model.generate(prompts)
    with torch.no_grad(): canvas = model.generate(prompts)  # fmt: skip # noqa: E701
    with torch.no_grad(), torch.autocast("cpu", enabled=False): other = model.generate(prompts)  # fmt: skip # noqa: E701
    assert torch.equal(canvas, expected) and torch.equal(other, expected)
    with torch.no_grad(), model.generate(prompts) as tracer:
        traced = tracer.result.save()
    assert torch.equal(traced, expected)
    with pytest.raises(ValueError, match="must start on its own line"):  # noqa: SIM117
        with model.generate(prompts) as tracer: canvas = tracer.result.save()  # fmt: skip # noqa: E701


def test_painting_needs_no_gradients(model, module, prompts):
    assert not module.generate(prompts.canvas, prompts.visible, prompts.decoded).requires_grad
    assert not model.generate(prompts).requires_grad


def test_generate_in_invokes(model, prompts):
    with model.generate(paste=False) as tracer:
        with tracer.invoke(prompts[:1]):
            first = tracer.result.save()
        with tracer.invoke(prompts[1:]):
            second = tracer.result.save()
    torch.testing.assert_close(torch.cat([first, second]), model.generate(prompts, paste=False), rtol=0, atol=1 / 255)


def test_edits_are_stored(model, prompts):
    with torch.no_grad():
        with model.edit() as (_, edited):
            edited.decoder.blocks[0].attn.heads[:, :, 1] = 0
            edited.decoder.blocks[1].attn.heads[:] = 1
        with model.trace(prompts):
            clean = model.output.logits.save()
        with model.trace(prompts):
            model.decoder.blocks[0].attn.heads[:, :, 1] = 0
            model.decoder.blocks[1].attn.heads[:] = 1
            by_hand = model.output.logits.save()
        for _ in range(2):
            with edited.trace(prompts):
                stored = edited.output.logits.save()
            assert torch.equal(stored, by_hand) and not torch.equal(stored, clean)
        with model.generate(prompts) as tracer:
            model.decoder.blocks[0].attn.heads[:, :, 1] = 0
            model.decoder.blocks[1].attn.heads[:] = 1
            canvas = tracer.result.save()
        assert torch.equal(edited.generate(prompts), canvas)
        assert not torch.equal(model.generate(prompts), canvas)
        with edited.generate(prompts) as tracer:
            traced = tracer.result.save()
        assert torch.equal(traced, canvas)
        assert edited.layout == model.layout


def test_pattern(eager, model, prompts):
    with torch.no_grad():
        with eager.trace(prompts):
            qkv = eager.encoder.blocks[1].attn.qkv.output.save()
            pattern = eager.encoder.blocks[1].attn.pattern.save()
            heads = eager.encoder.blocks[1].attn.heads.save()
            logits = eager.output.logits.save()
        q, k, v = qkv.view(3, 148, 3, 4, 8).permute(2, 0, 3, 1, 4)
        assert torch.equal(pattern, (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1))
        torch.testing.assert_close(pattern.sum(-1), torch.ones(3, 4, 148))
        with model.trace(prompts):
            sdpa_heads = model.encoder.blocks[1].attn.heads.save()
        torch.testing.assert_close(heads, sdpa_heads, rtol=1e-4, atol=1e-5)

        uniform = torch.full_like(pattern, 1 / 148)
        with eager.trace(prompts):
            eager.encoder.blocks[1].attn.pattern = uniform
            flat = eager.encoder.blocks[1].attn.heads.save()
            changed = eager.output.logits.save()
        torch.testing.assert_close(flat, v.mean(2, keepdim=True).expand_as(v).transpose(1, 2), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(changed, logits)
        with eager.trace(prompts):
            eager.encoder.blocks[1].attn.pattern[:] = 1 / 148
            in_place = eager.output.logits.save()
        assert torch.equal(in_place, changed)
        with pytest.raises(ValueError, match=r"attn.pattern was given shape \[1, 4, 148, 148\]"), eager.trace(prompts):
            eager.encoder.blocks[1].attn.pattern = uniform[:1]


def test_gradients_after_an_edit_of_the_pattern(module, prompts):
    model = MAEVQGAN(module, attn_implementation="eager")
    scale = torch.tensor(0.5, requires_grad=True)
    with model.trace() as tracer:
        with tracer.invoke(prompts[:1]):
            model.encoder.blocks[1].attn.pattern[:, 0] *= 0
        with tracer.invoke(prompts[1:]):
            pattern = model.encoder.blocks[1].attn.pattern
            pattern[:, 1] *= scale
            pattern[:, 2] = 1 / 148
            loss = model.output.logits.square().sum().save()
    loss.backward()

    softmax = model._module.encoder.blocks[1].attn.softmax

    def edit(_, __, output):
        heads = [output[:, 0], output[:, 1] * expected, torch.full_like(output[:, 2], 1 / 148), output[:, 3]]
        return torch.stack(heads, 1)

    expected = torch.tensor(0.5, requires_grad=True)
    handle = softmax.register_forward_hook(edit)
    model._module(prompts.canvas[1:], prompts.visible, prompts.decoded).logits.square().sum().backward()
    handle.remove()
    torch.testing.assert_close(scale.grad, expected.grad, rtol=1e-4, atol=1e-6)
    assert scale.grad.abs() > 0


def test_pattern_without_eager(model, prompts):
    with pytest.raises(ValueError, match='load the model with attn_implementation="eager"'), model.trace(prompts):
        model.encoder.blocks[0].attn.pattern.save()
    with pytest.raises(ValueError, match='load the model with attn_implementation="eager"'), model.trace(prompts):
        model.encoder.blocks[0].attn.pattern = 0


def test_repr_shows_heads_and_pattern(model):
    tree = repr(model)
    assert "(heads) -> Tensor: outputs z of the heads, [batch, token, head, head_dim]" in tree.replace("torch.", "")
    assert "(pattern)" in tree and "(vqgan): VQGAN(" in tree


def test_the_docstring_example_runs(folder, tmp_path):
    code = inspect.cleandoc(MAEVQGAN.__doc__).split("gradients flow through them.")[1].split("Weights are loaded")[0]
    example = tmp_path / "example.py"
    example.write_text(textwrap.dedent(code).replace('"tiny"', repr(str(folder))))
    names = runpy.run_path(str(example))
    assert names["z"].shape == (2, 148, 4, 8) and names["canvas"].shape == (2, 3, 112, 112)


def test_golden_heads(checkpoint):
    golden = load_file(DATA / "model.safetensors")
    model = MAEVQGAN(checkpoint[0])
    prompt = VisualPrompt.from_canvas(golden["canvas_b"], model.layout)
    layers = [("encoder", 0), ("encoder", 11), ("encoder", 23), ("decoder", 0), ("decoder", 7)]
    with torch.no_grad(), model.trace(prompt):
        heads = [getattr(model, stack).blocks[i].attn.heads for stack, i in layers].save()
        logits = model.output.logits.save()
    for (stack, i), z in zip(layers, heads):
        proj = getattr(model._module, stack).blocks[i].attn.proj
        weight = proj.weight.detach().unflatten(1, z.shape[-2:])
        projected = torch.einsum("thd,whd->thw", z[0], weight) + proj.bias.detach()
        assert (projected - golden[f"b_heads_{stack}_{i}"]).abs().max() < 2e-5
    output = model.layout.regions["output"]
    assert (logits[0, output] - golden["b_one_shot_logits_q4"]).abs().max() < 2e-5


def test_tensors_as_input(model, prompts):
    with torch.no_grad():
        with model.trace(prompts):
            expected = model.output.logits.save()
        with model.trace(prompts.canvas, prompts.visible, prompts.decoded):
            positional = model.output.logits.save()
        with model.trace(canvas=prompts.canvas, visible=prompts.visible, decoded=prompts.decoded):
            named = model.output.logits.save()
    assert same([positional, named], [expected, expected])
    canvas, ids = prompts.canvas, prompts.visible
    for wrong, message in (
        (("picture.png",), "was given str; give a VisualPrompt"),
        ((3,), "was given int"),
        ((canvas,), r"was given canvas \(1 unnamed\); give a VisualPrompt, or canvas"),
        ((torch.tensor(1.0),), "was given Tensor"),
        ((canvas, ids, ids, ids), r"\(4 unnamed\)"),
        ((prompts, ids), r"\(2 unnamed\)"),
        ((canvas[:, :, :96], ids, ids), r"canvas has shape \(3, 3, 96, 112\)"),
        ((canvas / 0, ids, ids), "canvas holds"),
        ((canvas, ids.float(), ids), "visible must be a LongTensor"),
        ((canvas, ids + 100, ids), "grid has 0 to 195"),
        ((prompts[:0],), "no canvases"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            model.generate(*wrong)
        with pytest.raises((TypeError, ValueError), match=message), model.trace(*wrong):
            model.output.save()
    with pytest.raises(ValueError, match="was given nothing; give a VisualPrompt"):
        model.generate()


def test_layouts(model, prompts):
    flipped = VisualPrompt.from_canvas(prompts.canvas, Layout(112, 8, order="horizontal"))
    several = VisualPrompt.from_canvas(prompts.canvas, Layout(112, 8, examples=2))
    for other in (flipped, several):
        with torch.no_grad(), model.trace(other):
            logits = model.output.logits.save()
        assert logits.shape == (3, 196, 64)
    foreign = VisualPrompt.from_canvas(torch.rand(1, 3, 224, 224))
    message = r"Layout\(canvas_size=224.* does not fit .*Layout\(canvas_size=112"
    with pytest.raises(ValueError, match=message), model.trace(foreign):
        model.output.save()
    for other in (flipped, several, prompts.query_only()):
        with pytest.raises(ValueError, match=r"cannot share .*`with model\.session\(\):`"), model.trace() as tracer:
            with tracer.invoke(prompts):
                model.output.save()
            with tracer.invoke(other):
                model.output.save()
    with pytest.raises(ValueError, match="share one forward"), model.generate() as tracer:
        with tracer.invoke(prompts):
            model.output.save()
        with tracer.invoke(prompts, paste=False):
            model.output.save()
    with torch.no_grad(), model.trace(prompts):
        again = model.output.logits.save()
    assert again.shape == (3, 196, 64)


def sources(module, folder, checkpoint):
    whole, apart, vqgan = checkpoint
    return {
        "module": lambda **kwargs: MAEVQGAN(module, **kwargs),
        "folder": lambda **kwargs: MAEVQGAN(folder, **kwargs),
        "folder name": lambda **kwargs: MAEVQGAN(str(folder), **kwargs),
        "checkpoint": lambda **kwargs: MAEVQGAN(whole, **kwargs),
        "apart": lambda **kwargs: MAEVQGAN(apart, vqgan=vqgan, **kwargs),
    }


@pytest.mark.parametrize("kind", ["module", "folder", "folder name", "checkpoint", "apart"])
def test_sources_and_their_options(module, folder, checkpoint, kind):
    make = sources(module, folder, checkpoint)[kind]
    lazy = make()
    assert lazy.dispatched == (kind == "module")
    prompt = VisualPrompt.from_canvas(
        torch.rand(1, 3, lazy.layout.canvas_size, lazy.layout.canvas_size), lazy.layout
    ).query_only()
    with torch.no_grad(), lazy.trace(prompt):
        logits = lazy.output.logits.save()
    assert lazy.dispatched and logits.dtype == torch.float32
    assert not any(parameter.is_meta for parameter in lazy._module.parameters())

    assert (make(dtype=None, device_map=None)._module is module) == (kind == "module")
    model = make(dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager", revision="main", dispatch=True)
    assert model.dispatched and model.device.type == "cpu"
    assert {p.dtype for p in model._module.parameters()} == {torch.bfloat16}
    with torch.no_grad(), model.trace(prompt):
        pattern = model.decoder.blocks[0].attn.pattern.save()
        model.decoder.blocks[0].attn.heads[:] = 0
        half = model.output.logits.save()
    assert pattern.dtype == half.dtype == torch.bfloat16
    assert module.dtype == torch.float32 and module.config._attn_implementation == "sdpa"

    automatic = make(device_map="auto", dtype="auto")
    with torch.no_grad(), automatic.trace(prompt):
        again = automatic.output.logits.save()
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)


def test_published_heads_can_be_told(checkpoint):
    model = MAEVQGAN(checkpoint[0], num_attention_heads=8)
    assert model.encoder.blocks[0].attn.num_heads == 8 and model.decoder.blocks[0].attn.num_heads == 16
    model.dispatch()
    assert model._module.config.num_attention_heads == 8


def test_bad_sources(module, folder, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="Linear is no source"):
        MAEVQGAN(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="int is no source"):
        MAEVQGAN(3)
    with pytest.raises(OSError, match="nowhere"):
        MAEVQGAN(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"nowhere\.pth"):
        MAEVQGAN(tmp_path / "nowhere.pth")
    for source in (module, folder):
        with pytest.raises(ValueError, match="vqgan= is for a published checkpoint file"):
            MAEVQGAN(source, vqgan="last.ckpt")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="is a bert model; expected mae_vqgan"):
        MAEVQGAN(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a bert model; expected mae_vqgan"):
        MAEVQGAN(tmp_path / "bert", dispatch=True)
    monkeypatch.setattr(model_sources, "files", lambda _: tmp_path)
    with pytest.raises(FileNotFoundError, match='"tiny" has no config.json and no model.safetensors'):
        MAEVQGAN("tiny")


def test_to_and_autocast(folder, prompts):
    model = MAEVQGAN(folder)
    assert model.to(torch.bfloat16) is model
    with torch.no_grad(), model.trace(prompts):
        z = model.encoder.blocks[0].attn.heads.save()
        logits = model.output.logits.save()
    assert z.dtype == logits.dtype == torch.bfloat16
    assert model.generate(prompts).dtype == torch.float32
    model.to("cpu", torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), model.trace(prompts):
        z = model.encoder.blocks[0].attn.heads.save()
        model.encoder.blocks[1].attn.heads = torch.zeros(3, 148, 4, 8)
        logits = model.output.logits.save()
    assert z.dtype == logits.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(prompts).shape == (3, 3, 112, 112)


def test_offloaded_weights(folder, module, prompts, tmp_path):
    """Weights that lie on the disk are on "meta" until a module runs, and a tokenizer of its own device is brought its
    inputs: what `device_map` does over several GPUs."""
    expected = module.generate(prompts.canvas, prompts.visible, prompts.decoded)
    place = {"encoder": "cpu", "decoder": "cpu", "vqgan": "disk"}
    part = MAEVQGAN(folder, device_map=place, offload_folder=str(tmp_path))
    whole = MAEVQGAN(folder, dispatch=True)
    accelerate.cpu_offload(whole._module, execution_device=torch.device("cpu"))
    assert whole._module.encoder.cls_token.is_meta and whole.device == torch.device("cpu")
    for model in (part, whole):
        assert torch.equal(model.generate(prompts), expected)
        with torch.no_grad(), model.trace(prompts):
            z = model.encoder.blocks[1].attn.heads.save()
        assert z.device.type == "cpu" and not z.is_meta
        assert model._module.vqgan.codebook.weight.is_meta
        assert torch.equal(model._module.vqgan.encode(prompts.canvas), module.vqgan.encode(prompts.canvas))


def test_devices_that_are_not_there():
    absent = next(name for name in ("cuda:99", "mps:99", "xpu:99") if name not in available_devices())
    for name in (absent, "tpu", "meta", "gpu", "cpu:7x"):
        with pytest.raises(ValueError, match=f"there is no device '{name}' here; choose one of cpu"):
            resolve_device(name)
    assert resolve_device("cpu") == torch.device("cpu") and available_devices()[0] == "cpu"
    assert all(str(resolve_device(name)) == name for name in available_devices())


def test_users_own_envoys(module, prompts):
    class BlockEnvoy(Envoy):
        @eproperty(key="output", description="the residual stream")
        def stream(self, value):
            return value

    model = MAEVQGAN(module, envoys={"blocks.*": BlockEnvoy}, rename={"encoder": "eye"})
    with torch.no_grad(), model.trace(prompts):
        z = model.eye.blocks[0].attn.heads.save()
        stream = model.encoder.blocks[0].stream.save()
    assert z.shape == (3, 148, 4, 8) and stream.shape == (3, 148, 32)
