"""What collecting, patching, searching and evaluating rely on in a model, checked on a few prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from nnsight import save

from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import QUERY_ONLY, InContextModel, Stage
from vtv_nnsight.models.nnsight_compat import network_of
from vtv_nnsight.prompts import VisualPrompt


def check_model(model: InContextModel, prompts: VisualPrompt) -> None:
    """Check that a model does what `InContextModel` promises, in a dozen forwards and eight more for each layer.

    - Heads have the shape that their stage says, at the positions that `positions` says, once each; units are made of
      positions that zero-shot prompts show.
    - What is read is what the modules compute: forward hooks see the same values.
    - Writing what was read changes nothing, and writing zeros changes the output.
    - An attention's output is affine in its heads, which are what its output projection is given.
    - The residual stream is what came in plus what attention and MLP add, where a model has these sites.
    - Prompts of several invokes get the outputs that each has alone, and an edit stays in its invoke.
    - What a prompt hides decides nothing: neither the truth, nor the example of a zero-shot prompt.
    - `paint` gives pictures, and `restrict_to_output` leaves the losses as they are.
    - Gradients of a differentiable loss reach every layer, and are what finite differences measure.

    A model without stages is checked for what needs none.

    Args:
        model: The model, with random weights or any others; its weights are loaded.
        prompts: One-shot prompts of its layout, two or more, whose output cells hold the truth.

    Raises:
        AssertionError: in a sentence that names the stage and the layer, and what was expected of them.
        ValueError: when there are fewer than two prompts.
    """
    if len(prompts) < 2:
        raise ValueError(f"check_model was given {len(prompts)} prompt; give two or more.")
    run(model, prompts)  # loads the weights
    prompts = prompts.to(device_of(model))
    for check in CHECKS:
        check(model, prompts)


def check_positions(model: InContextModel, prompts: VisualPrompt) -> None:
    """Heads are [batch, token, head, head_dim] with tokens at `positions`."""
    for stage in model.stages:
        expected = model.positions(stage.name, prompts)
        with torch.no_grad(), model.trace(prompts):
            seen = save(model.positions(stage.name))
            shapes = save([model.attention(stage.name, layer).heads.shape for layer in range(stage.layers)])
        require(
            torch.equal(seen.cpu(), expected.cpu()),
            f"{stage.name}: positions differ inside and outside a trace of the same prompts.",
        )
        require(
            len(seen.unique()) == len(seen) and seen.min() >= 0 and seen.max() <= model.layout.num_patches,
            f"{stage.name}: positions are not different numbers from 0 to {model.layout.num_patches}.",
        )
        shape = [len(prompts), len(seen), stage.heads, stage.head_dim]
        for layer, found in enumerate(shapes):
            require(
                list(found) == shape,
                f"{stage.name}, layer {layer}: heads have shape {list(found)}; its stage and positions say {shape}.",
            )
        shown = model.positions(stage.name, prompts.query_only()).cpu()
        for granularity in QUERY_ONLY[1:]:
            for name, places in model.groups(stage.name, granularity).items():
                require(
                    torch.isin(places.cpu(), shown).all(),
                    f"{stage.name}: the {granularity} {name!r} has positions that zero-shot prompts do not show.",
                )


def check_hooks(model: InContextModel, prompts: VisualPrompt) -> None:
    """Forward hooks see the same values."""
    for stage, layer in layers_of(model):
        inputs: list[torch.Tensor] = []
        outputs: dict[str, torch.Tensor] = {}
        handles = []
        attention, others = model.attention(stage.name, layer), model.outputs(stage.name, layer)
        for child in network_of(attention).modules():
            handles.append(child.register_forward_pre_hook(lambda _, args, seen=inputs: seen.extend(tensors(args))))
        for site, module in others.items():
            hook = lambda _, args, output, seen=outputs, site=site: seen.update({site: first(output)})  # noqa: E731
            handles.append(network_of(module).register_forward_hook(hook))
        try:
            with torch.no_grad(), model.trace(prompts):
                heads = save(attention.heads.clone())
                read = save({site: first(module.output).clone() for site, module in others.items()})
        finally:
            for handle in handles:
                handle.remove()
        values = heads.flatten().sort().values
        require(
            any(x.numel() == values.numel() and torch.equal(x.flatten().sort().values, values) for x in inputs),
            f"{stage.name}, layer {layer}: heads are not what any module of its attention is given.",
        )
        for site, value in read.items():
            require(
                torch.equal(value, outputs[site]),
                f"{stage.name}, layer {layer}: its {site} is not what a forward hook on the module sees.",
            )


def check_writes(model: InContextModel, prompts: VisualPrompt) -> None:
    """Writing what was read changes nothing, writing zeros does, and an attention's output is affine in its heads."""
    expected = run(model, prompts)
    for stage, layer in layers_of(model):
        outputs, attended = [], []
        for factor in (0.0, 1.0, 2.0):
            with torch.no_grad(), model.trace(prompts):
                scale_heads(model, stage, layer, factor)
                attended.append(first(model.attention(stage.name, layer).output).clone())
                for module in model.outputs(stage.name, layer).values():
                    module.output = module.output
                outputs.append(save(model.output))
        nothing, once, twice = attended
        require(
            close(tensors(outputs[1]), expected),
            f"{stage.name}, layer {layer}: writing what was read changes the output.",
        )
        require(
            not close(tensors(outputs[0]), expected),
            f"{stage.name}, layer {layer}: the output stays as it is when all heads are set to zero.",
        )
        require(
            close([twice - once], [once - nothing]),
            f"{stage.name}, layer {layer}: twice the heads do not add twice as much to the attention's output; heads "
            "are what its output projection is given.",
        )


def check_residual(model: InContextModel, prompts: VisualPrompt) -> None:
    """The residual stream is what came in plus what attention and MLP add."""
    for stage, layer in layers_of(model):
        modules = model.outputs(stage.name, layer)
        if not {"attn", "mlp", "residual"} <= set(modules):
            continue
        with torch.no_grad(), model.trace(prompts):
            before = save(first(modules["residual"].input).clone())
            attn = save(first(modules["attn"].output).clone())
            mlp = save(first(modules["mlp"].output).clone())
            after = save(first(modules["residual"].output).clone())
        require(
            close([before + attn + mlp], [after]),
            f"{stage.name}, layer {layer}: residual is not the layer's input plus its attn and its mlp.",
        )


def check_invokes(model: InContextModel, prompts: VisualPrompt) -> None:
    """Prompts of several invokes get the outputs that each has alone, and an edit stays in its invoke."""
    alone = [run(model, rows) for rows in (prompts[:1], prompts[1:])]
    with torch.no_grad(), model.trace() as tracer:
        outputs: list[Any] = save([])
        for rows in (prompts[:1], prompts[1:]):
            with tracer.invoke(rows):
                outputs.append(model.output)
    require(
        close(tensors(outputs), [*alone[0], *alone[1]]),
        "the outputs of two invokes are not those of their prompts alone.",
    )
    for stage, layer in layers_of(model):
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(prompts[:1]):
                scale_heads(model, stage, layer, 0.0)
            with tracer.invoke(prompts[1:]):
                output = save(model.output)
        require(
            close(tensors(output), alone[1]),
            f"{stage.name}, layer {layer}: an edit of its heads in one invoke changes the output of another.",
        )


def check_hidden(model: InContextModel, prompts: VisualPrompt) -> None:
    """What a prompt hides decides nothing."""
    noise = torch.rand(prompts.canvas.shape, generator=torch.Generator().manual_seed(0)).to(prompts.canvas)
    for form, words in (
        (prompts, "the output of one-shot prompts depends on the truth, which they hide."),
        (prompts.query_only(), "the output of zero-shot prompts depends on their examples, or on the truth."),
    ):
        canvas = torch.where(form.layout.pixels(form.visible), form.canvas, noise)
        other = VisualPrompt(canvas, form.visible, form.decoded, form.layout)
        require(close(run(model, other), run(model, form)), words)


def check_answers(model: InContextModel, prompts: VisualPrompt) -> None:
    """`paint` gives pictures; `restrict_to_output` leaves the losses as they are."""
    with torch.no_grad(), model.trace(prompts):
        output = save(model.output)
    with torch.no_grad(), model.trace(prompts):
        answered = save(model.restrict_to_output(prompts))
        restricted = save(model.output)
    canvas = model.paint(output, prompts)
    require(
        canvas.shape == prompts.canvas.shape and not canvas.requires_grad and 0 <= canvas.min() <= canvas.max() <= 1,
        f"paint gives {list(canvas.shape)} from {canvas.min():.3g} to {canvas.max():.3g}; expected "
        f"{list(prompts.canvas.shape)} in [0, 1] without gradients.",
    )
    truth = model.truth(prompts)
    for loss in model.losses:
        value = loss.value(output, prompts, truth)
        require(
            value.shape == (len(prompts),) and bool(value.isfinite().all()),
            f"loss {loss.name!r} is not a finite number for each prompt: its shape is {list(value.shape)}.",
        )
        require(
            close([loss.value(restricted, answered, truth)], [value]),
            f"loss {loss.name!r} differs when restrict_to_output leaves out what losses do not read.",
        )


def check_gradients(model: InContextModel, prompts: VisualPrompt) -> None:
    """Gradients of a differentiable loss reach every layer, and are what finite differences measure."""
    loss = next((loss for loss in model.losses if loss.differentiable), None)
    places = layers_of(model)
    if loss is None or not places:
        return
    truth = model.truth(prompts)

    def measure(gates: list[torch.Tensor]) -> torch.Tensor:
        with model.trace(prompts):
            for (stage, layer), gate in zip(places, gates):
                scale_heads(model, stage, layer, gate[:, None])
            value = save(loss.value(model.output, prompts, truth).sum())
        return value

    ones = [torch.ones(stage.heads, device=prompts.device) for stage, _ in places]
    gates = [gate.clone().requires_grad_() for gate in ones]
    slopes = torch.autograd.grad(measure(gates), gates, materialize_grads=True)
    for (stage, layer), slope in zip(places, slopes):
        require(
            slope.isfinite().all() and slope.any(),
            f"{stage.name}, layer {layer}: no gradient of loss {loss.name!r} reaches its heads.",
        )
    for stage in model.stages:
        steps = [slope * (place.name == stage.name) for (place, _), slope in zip(places, slopes)]
        norm = torch.cat(steps).norm()
        with torch.no_grad():
            up, down = (measure([x + far * step / norm for x, step in zip(ones, steps)]) for far in (STEP, -STEP))
        measured = (up - down).item() / (2 * STEP)
        require(
            abs(measured - norm.item()) <= 0.05 * norm.item() + 1e-3 * abs(up.item()),
            f"{stage.name}: the loss rises by {measured:.3g} along the gradient of its heads, which says {norm:.3g}.",
        )


CHECKS: tuple[Callable[[InContextModel, VisualPrompt], None], ...] = (
    check_positions,
    check_hooks,
    check_writes,
    check_residual,
    check_invokes,
    check_hidden,
    check_answers,
    check_gradients,
)
STEP = 0.02
"""How far gates move when a slope is measured."""


def layers_of(model: InContextModel) -> list[tuple[Stage, int]]:
    """Every layer, in the order in which they run."""
    return [(stage, layer) for stage in model.stages for layer in range(stage.layers)]


@torch.no_grad()
def run(model: InContextModel, prompts: VisualPrompt) -> list[torch.Tensor]:
    """The tensors of a model's output."""
    with model.trace(prompts):
        output = save(model.output)
    return tensors(output)


def scale_heads(model: InContextModel, stage: Stage, layer: int, factor: float | torch.Tensor) -> None:
    """Inside a trace: multiply the heads of a layer, by a number or by one for each head."""
    attention = model.attention(stage.name, layer)
    attention.heads = attention.heads * factor


def tensors(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors of an output, however it is nested."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def first(output: Any) -> torch.Tensor:
    """What a module hands on, of a tensor or of a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Whether tensors are equal but for rounding, of the size of their largest value."""
    if [x.shape for x in a] != [y.shape for y in b]:
        return False
    pairs = [(x, y) for x, y in zip(a, b) if x.numel()]
    return all(
        (x.double() - y.double()).abs().max() <= torch.finfo(x.dtype).eps ** 0.6 * y.double().abs().max()
        for x, y in pairs
    )


def require(condition: Any, sentence: str) -> None:
    """Raise an AssertionError of a sentence unless a condition holds."""
    if not condition:
        raise AssertionError(sentence)
