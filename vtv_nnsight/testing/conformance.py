"""What collecting, patching, searching and evaluating rely on in a model, checked on a few prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from nnsight import save
from torch.nn.modules.module import register_module_forward_hook

from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.inside_trace import first
from vtv_nnsight.models.interface import QUERY_ONLY, CanvasModel, InContextModel
from vtv_nnsight.models.nnsight_compat import network_of
from vtv_nnsight.patching.forward import forward, losses, residuals, start_from
from vtv_nnsight.prompts import Prompts, VisualPrompt
from vtv_nnsight.vectors import capture

Promises = Iterator[tuple[Any, str]]
"""Of each promise: whether it is kept, and what to say where it is not."""
STEP = 0.02
"""How far gates move when a slope is measured."""


@torch.no_grad()
def check_model(model: InContextModel, prompts: Prompts) -> None:
    """Check that a model does what `InContextModel` promises, in a dozen forwards and six more for each layer.

    - Heads have the shape that their stage says, at the positions that `positions` says, once each; units are made of
      positions that zero-shot prompts show.
    - What is read, by name or by `capture`, is what the modules compute: forward hooks see the same values.
    - Writing what was read changes nothing, and writing zeros changes the output.
    - An attention's output is affine in its heads, which are what its output projection is given.
    - The residual stream is what came in plus what attention and MLP add, where a model has these sites.
    - Prompts of several invokes get the outputs that each has alone, and an edit stays in its invoke.
    - A run that starts behind a layer gives the output of a whole one, where `reread` says which others it needs.
    - `restrict_to_output` leaves the losses as they are.
    - Gradients of a differentiable loss reach every layer, and are what finite differences measure.
    - Of a `CanvasModel`: what a prompt hides decides nothing, neither the truth, nor the example of a zero-shot prompt;
      and `paint` gives pictures.

    A model without stages is checked for what needs none.

    Args:
        model: The model, with random weights or any others; its weights are loaded.
        prompts: Prompts of its layout with an example and their answers, two or more.

    Raises:
        AssertionError: in a sentence that names the stage and the layer, and what was expected of them.
        ValueError: when there are fewer than two prompts.
    """
    if len(prompts) < 2:
        raise ValueError(f"check_model was given {len(prompts)} prompt; give two or more.")
    forward(model, prompts)  # loads the weights
    prompts = prompts.to(device_of(model))
    checks: tuple[Any, ...] = CHECKS + (CANVAS_CHECKS if isinstance(model, CanvasModel) else ())
    for check in checks:
        for kept, sentence in check(model, prompts):
            if not kept:
                raise AssertionError(sentence)


def check_positions(model: InContextModel, prompts: Prompts) -> Promises:
    """Heads are [batch, token, head, head_dim] with tokens at `positions`; zero-shot prompts show those of units."""
    for stage in model.stages:
        name, last = stage.name, int(model.lengths(prompts).max())
        with model.trace(prompts):
            seen = save(model.positions(name))
            shapes = save([list(model.attention(name, layer).heads.shape) for layer in range(stage.layers)])
        same = torch.equal(seen.cpu(), model.positions(name, prompts).cpu())
        yield same, f"{name}: positions differ inside and outside a trace of the same prompts."
        distinct = len(seen.unique()) == len(seen) and 0 <= seen.min() <= seen.max() <= last
        yield distinct, f"{name}: positions are not different numbers from 0 to {last}."
        sizes = [len(prompts), len(seen), stage.heads, stage.head_dim]
        for i, shape in enumerate(shapes):
            yield shape == sizes, f"{name}, layer {i}: heads have shape {shape}; its stage and positions say {sizes}."
        visible = model.positions(name, prompts.query_only()).cpu()
        for kind in QUERY_ONLY[1:]:
            for unit, positions in model.groups(name, kind).items():
                inside = torch.isin(positions.cpu(), visible).all()
                yield inside, f"{name}: the {kind} {unit!r} has positions that zero-shot prompts do not show."


def check_reads(model: InContextModel, prompts: Prompts) -> Promises:
    """Forward hooks see what is read, and the residual stream is what came in plus what attention and MLP add."""
    calls: list[tuple[Any, Any, Any]] = []
    with register_module_forward_hook(lambda *call: calls.append(call)), model.trace(prompts):
        activations: Any = capture(model) if model.stages else None
        reads = save([read(attention, sites) for _, attention, sites in layers_of(model)])
    seen = {stage.name: model.positions(stage.name, prompts) for stage in model.stages}
    captured = chain(*(activations.values[name][:, :, positions].unbind(1) for name, positions in seen.items()))
    hooked = {module: first(output) for module, _, output in calls}
    for (place, attention, sites), (before, heads, outputs), values in zip(layers_of(model), reads, captured):
        inside = set(network_of(attention).modules())
        inputs = [x.flatten() for x in tensors([args for module, args, _ in calls if module in inside])]
        numbers = heads.flatten().sort().values
        given = any(len(x) == len(numbers) and torch.equal(x.sort().values, numbers) for x in inputs)
        yield given, f"{place}: heads are not what any module of its attention is given."
        yield torch.equal(values, heads), f"{place}: capture gives other values than its heads."
        for site, output in outputs.items():
            same = torch.equal(output, hooked[network_of(sites[site])])
            yield same, f"{place}: its {site} is not what a forward hook on the module sees."
        if {"attn", "mlp", "residual"} <= set(sites):
            added = close(before + outputs["attn"] + outputs["mlp"], outputs["residual"])
            yield added, f"{place}: residual is not the layer's input plus its attn and its mlp."


def check_writes(model: InContextModel, prompts: Prompts) -> Promises:
    """Writing what was read changes nothing, writing zeros does, and an attention's output is affine in its heads."""
    expected, _ = forward(model, prompts)
    for place, attention, sites in layers_of(model):
        outputs, attended = [], []
        for factor in (0.0, 1.0, 2.0):
            with model.trace(prompts, **model.scoring):
                attention.heads = attention.heads * factor
                attended.append(first(attention.output).clone())
                for module in sites.values():
                    module.output = module.output
                outputs.append(save(model.output))
        zero, once, twice = attended
        yield close(outputs[1], expected), f"{place}: writing what was read changes the output."
        yield not close(outputs[0], expected), f"{place}: the output stays as it is when all heads are set to zero."
        words = "twice the heads do not add twice as much to the attention's output"
        affine = close(twice - once, once - zero)
        yield affine, f"{place}: {words}; heads are what its output projection is given."


def check_invokes(model: InContextModel, prompts: Prompts) -> Promises:
    """Prompts of several invokes get the outputs that each has alone, and an edit stays in its invoke."""
    parts = prompts[:1], prompts[1:]
    alone = [forward(model, rows)[0] for rows in parts]
    with model.trace() as tracer:
        outputs: list[Any] = save([])
        for rows in parts:
            with tracer.invoke(rows, **model.scoring):
                outputs.append(model.output)
    yield close(outputs, alone), "the outputs of two invokes are not those of their prompts alone."
    for place, attention, _ in layers_of(model):
        with model.trace() as tracer:
            with tracer.invoke(parts[0], **model.scoring):
                attention.heads = attention.heads * 0.0
            with tracer.invoke(parts[1], **model.scoring):
                output = save(model.output)
        yield close(output, alone[1]), f"{place}: an edit of its heads in one invoke changes the output of another."


def check_starts(model: InContextModel, prompts: Prompts) -> Promises:
    """A run that starts behind a layer gives the output of a whole one."""
    if model.reread is None:
        return
    expected, _ = forward(model, prompts)
    for number, (place, _, _) in enumerate(layers_of(model)):
        layers = sorted({number, *(other for other in model.reread if other < number)})
        left = dict(zip(layers, residuals(model, prompts, layers)))
        same = close(forward(model, prompts, partial(start_from, left=left))[0], expected)
        yield same, f"{place}: a run that starts behind it gives another output; reread={model.reread} lacks a layer."


def check_hidden(model: CanvasModel, prompts: VisualPrompt) -> Promises:
    """What a prompt hides decides nothing."""
    noise = torch.rand(prompts.canvas.shape, generator=torch.Generator().manual_seed(0)).to(prompts.canvas)
    one_shot = "the output of one-shot prompts depends on the truth, which they hide."
    zero_shot = "the output of zero-shot prompts depends on their examples, or on the truth."
    for form, sentence in ((prompts, one_shot), (prompts.query_only(), zero_shot)):
        canvas = torch.where(form.layout.pixels(form.visible), form.canvas, noise)
        other = VisualPrompt(canvas, form.visible, form.decoded, form.layout)
        yield close(forward(model, other)[0], forward(model, form)[0]), sentence


def check_painting(model: CanvasModel, prompts: VisualPrompt) -> Promises:
    """`paint` gives pictures."""
    output, _ = forward(model, prompts)
    with torch.enable_grad():
        canvas = model.paint(output, prompts)
    low, high, shape, expected = canvas.min(), canvas.max(), list(canvas.shape), list(prompts.canvas.shape)
    painted = shape == expected and not canvas.requires_grad and 0 <= low <= high <= 1
    yield painted, f"paint gives {shape} from {low:.3g} to {high:.3g}; expected {expected} in [0, 1] without gradients."


def check_losses(model: InContextModel, prompts: Prompts) -> Promises:
    """`restrict_to_output` and `cached` leave the losses as they are."""
    output, _ = forward(model, prompts)
    restricted, answered = forward(model, prompts, restrict=True)
    cached, _ = forward(model, prompts, cached=model.cached(prompts))
    truth = model.truth(prompts)
    for loss in model.losses:
        value, again = loss.value(output, prompts, truth), loss.value(restricted, answered, truth)
        name, shape = f"loss {loss.name!r}", list(value.shape)
        is_number = shape == [len(prompts)] and value.isfinite().all()
        yield is_number, f"{name} is not a finite number for each prompt: its shape is {shape}."
        yield close(again, value), f"{name} differs when restrict_to_output leaves out what losses do not read."
        went_on = close(loss.value(cached, prompts, truth), value)
        yield went_on, f"{name} differs when the model goes on from what `cached` gives of the prompts."


def check_gradients(model: InContextModel, prompts: Prompts) -> Promises:
    """Gradients of a differentiable loss reach every layer, and are what finite differences measure."""
    loss = next((loss for loss in model.losses if loss.differentiable), None)
    if loss is None or not model.stages:
        return
    truth = model.truth(prompts)

    def measure(*gates: torch.Tensor) -> torch.Tensor:
        def scale(model: InContextModel) -> None:
            for (_, attention, _), gate in zip(layers_of(model), chain(*gates)):
                attention.heads = attention.heads * gate[:, None]

        return losses(model, prompts, loss, truth, scale).sum()

    gates = [torch.ones(stage.layers, stage.heads, device=device_of(model)) for stage in model.stages]
    with torch.enable_grad():
        slopes = torch.autograd.grad(measure(*[x.requires_grad_() for x in gates]), gates, materialize_grads=True)
    for (place, _, _), slope in zip(layers_of(model), chain(*slopes)):
        reached = slope.isfinite().all() and slope.any()
        yield reached, f"{place}: no gradient of loss {loss.name!r} reaches its heads."
    for i, stage in enumerate(model.stages):
        norm = slopes[i].norm().item()
        moves = (far * slopes[i] / norm for far in (STEP, -STEP))
        up, down = (measure(*gates[:i], gates[i] + move, *gates[i + 1 :]).item() for move in moves)
        rise = (up - down) / (2 * STEP)
        words = f"the loss rises by {rise:.3g} along the gradient of its heads, which says {norm:.3g}."
        yield abs(rise - norm) <= 0.05 * norm + 1e-3 * abs(up), f"{stage.name}: {words}"


CHECKS = (check_positions, check_reads, check_writes, check_invokes, check_starts, check_losses, check_gradients)
CANVAS_CHECKS = (check_hidden, check_painting)


def layers_of(model: InContextModel) -> list[tuple[str, Any, Mapping[str, Any]]]:
    """Every layer, in the order in which they run: its name for people, its attention, and its modules by site."""
    layers = ((stage.name, layer) for stage in model.stages for layer in range(stage.layers))
    return [(f"{stage}, layer {i}", model.attention(stage, i), model.outputs(stage, i)) for stage, i in layers]


def read(attention: Any, sites: Mapping[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor, dict[str, torch.Tensor]]:
    """Inside a trace: the stream that comes into a layer, its heads, and its outputs by site."""
    before = first(sites["residual"].input).clone() if "residual" in sites else None
    return before, attention.heads.clone(), {site: first(module.output).clone() for site, module in sites.items()}


def tensors(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors of an output, however it is nested."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def close(a: Any, b: Any) -> bool:
    """Whether outputs are equal but for rounding, of the size of the largest value of each of their tensors."""
    a, b = tensors(a), tensors(b)
    return [x.shape for x in a] == [y.shape for y in b] and all(
        (x.double() - y.double()).abs().max() <= torch.finfo(x.dtype).eps ** 0.6 * y.double().abs().max()
        for x, y in zip(a, b)
        if x.numel()
    )
