"""What `capture` and `patch` do inside a trace: plain functions of tensors, and plain reads and writes of a module's
`.input` or `.output`. It imports torch alone, so that it can be sent to where a model runs.

Activations are [batch, token, head, head_dim] at every site; a network's own tensors are [batch, token, width] or
[batch * stream, row, column, width], the first of a tuple where a module gives several things.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Place = Any
"""Where a layer's activations are, see `interface.Place`: (module as nnsight has it, side, heads, streams)."""


def read(place: Place) -> Any:
    """What a place's module is given, (args, kwargs), or gives."""
    module, side, *_ = place
    return module.inputs if side == "input" else module.output


def change(place: Place, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put a function of the activations in their place."""
    raw, (module, side, *_) = read(place), place
    value = join(place, function(split(place, first(raw))), first(raw))
    if side == "input":
        module.inputs = ((value, *raw[0][1:]), raw[1])
    else:
        module.output = (value, *raw[1:]) if isinstance(raw, tuple) else value


def split(place: Place, value: torch.Tensor) -> torch.Tensor:
    """The network's own tensor as [batch, token, head, head_dim]."""
    _, _, heads, streams = place
    z = value.unflatten(-1, (heads, -1))
    return z if z.ndim == 4 else z.unflatten(0, (-1, streams)).flatten(1, 3)


def join(place: Place, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `split`, in the shape of `like`."""
    streams, z = place[3], value.flatten(2)
    if like.ndim == 4:
        z = z.unflatten(1, (streams, *like.shape[1:3])).flatten(0, 1)
    return z


def first(raw: Any) -> torch.Tensor:
    """The first tensor of what a module is given or gives: attention layers of transformers give their pattern beside
    it."""
    while isinstance(raw, tuple):
        raw = raw[0]
    tensor: torch.Tensor = raw
    return tensor


def stop_gradient(module: Any) -> None:
    """Let gradients pass by a module from its input to its output, and none through what it adds."""
    before, raw = first(module.input), module.output
    value = before + (first(raw) - before).detach()
    module.output = (value, *raw[1:]) if isinstance(raw, tuple) else value


def mix(
    z: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, present: torch.Tensor | None, mode: str = "replace"
) -> torch.Tensor:
    """Activations with other values in their place, or on top of them.

    Args:
        z: [batch, token, head, head_dim].
        values: [token, head, head_dim], for all rows, or with a batch in front.
        mask: [token, head], or with a batch in front: bool to replace, float to go as far.
        present: bool [batch or 1, token, 1, 1], where there are values; of a float mask.
        mode: "replace" or "add".
    """
    values, mask = values.to(z), mask.to(z.device)[..., None]
    if mask.dtype == torch.bool:
        return torch.where(mask, values, z)
    step = values - z if mode == "replace" else values
    if present is not None:
        step = torch.where(present.to(z.device), step, 0)
    return z + mask.to(z.dtype) * step


def at(values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """[position, head, dim], or [row, position, head, dim], at the positions `seen`, [token] or [row, token]."""
    seen = seen.to(values.device)
    if seen.ndim == 1:
        return values.index_select(-3, seen)
    if values.ndim == 3:
        return values[seen]
    return values[torch.arange(len(values), device=values.device)[:, None], seen]


def put(values: torch.Tensor, layer: int, z: torch.Tensor, seen: torch.Tensor) -> None:
    """Write activations of a layer into [row, layer, position, head, head_dim], at the positions `seen` of the first
    tokens, [token], or [row, token] with negative numbers where there is none."""
    seen, z = seen.to(values.device), z[:, : seen.shape[-1]]
    if seen.ndim == 1:
        values.select(1, layer)[:, seen] = z
    else:
        rows, tokens = (seen >= 0).nonzero(as_tuple=True)
        values.select(1, layer)[rows, seen[rows, tokens]] = z[rows, tokens]


def last_tokens(seen: torch.Tensor, places: int) -> tuple[slice, torch.Tensor]:
    """Of tokens at positions [token] or [row, token], those at the last `places` of them, and their positions,
    told once where rows agree: texts have more tokens than vectors have positions, and count from the end."""
    tokens = slice(max(0, seen.shape[-1] - places), seen.shape[-1])
    seen = seen[..., tokens]
    return tokens, seen[0] if seen.ndim == 2 and bool((seen == seen[:1]).all()) else seen


def patched(z: torch.Tensor, values: Any, mask: Any, mode: str = "replace", after: int = 0) -> torch.Tensor:
    """Activations with other values at a text's last tokens, of which `after` are not the prompt's.

    Args:
        z: [batch, token, head, head_dim].
        values: [position, head, head_dim], counted from the end of the prompt, or with a batch in front.
        mask: [position, head], or with a batch in front, as for `mix`.
    """
    stop = z.shape[1] - after
    count = min(mask.shape[-2], values.shape[-3], stop)
    values, mask = values[..., :count, :, :].flip(-3), mask[..., :count, :].flip(-2)
    present = None if mask.dtype == torch.bool else ~values[..., :1, :1].isnan()
    mixed = mix(z[:, stop - count : stop], values, mask, present, mode)
    return mixed if count == z.shape[1] else torch.cat([z[:, : stop - count], mixed, z[:, stop:]], dim=1)


CAPTURED = "vtv_nnsight capture"
"""The key that tells what `capture` gave where this package is not installed."""


def capture(model: Any, sites: Any = "heads", stages: Any = None, layers: Any = None, *, steps: str = "first") -> Any:
    """What `vectors.capture` is there: {site: {layer: [row, position, head, head_dim]}}, positions from the end."""
    sites = [sites] if isinstance(sites, str) else sites
    if not set(sites) <= set(model.places):
        raise ValueError(f"sites={sites} are not sites of this model; choose from {', '.join(model.places)}.")
    captured: list[dict[str, Any]] = [{CAPTURED: True}]
    count = len(model.places["heads"])
    layers = layers["layers"] if isinstance(layers, dict) else range(count) if layers is None else layers
    numbers = sorted({layers} if isinstance(layers, int) else set(layers))
    if not numbers or not set(numbers) <= set(range(count)):
        raise ValueError(f"layers {numbers} are not layers of this model; it has 0 to {count - 1}.")
    if stages not in (None, "layers", ["layers"], ("layers",)):
        raise ValueError(f"stages={stages} are not stages of this model; it has 'layers'.")

    def keep(step: int) -> None:
        if step == len(captured):
            captured.append({CAPTURED: True})
        for layer in numbers:
            for site, places in model.places.items():
                if site in sites:
                    z = split(places[layer], first(read(places[layer])))
                    stop = z.shape[1] - (model.after if step == 0 else 0)
                    captured[step].setdefault(site, {})[layer] = z.detach()[:, :stop].flip(1)

    result: Any = captured if steps == "all" else captured[0]
    result.save()
    beside(model, keep, steps)
    return result


def patch(
    model: Any, vector: Any, patches: Any, *, scale: Any = 1.0, mode: str = "replace", steps: str = "first"
) -> None:
    """What `patching.patch` is there, of values and masks by site."""
    vectors, sets = (list(part) if isinstance(part, (list, tuple)) else [part] for part in (vector, patches))
    sets = [getattr(masks, "patches", masks) for masks in sets]
    if any(isinstance(masks, str) for masks in sets):
        raise ValueError("names of units stay here; make a set above the block, PatchSet.named(space, names).")
    if len(vectors) != len(sets):
        raise ValueError(f"{len(vectors)} vectors and {len(sets)} patch sets were given; give as many of both.")
    if mode not in ("replace", "add"):
        raise ValueError(f"mode={mode!r} is unknown; choose from replace, add.")
    pairs = list(zip(vectors, sets))
    for values, masks in pairs:
        for site, mask in masks.items():
            check_shapes(site, values.get(site), mask)
    replaces = mode == "replace" and isinstance(scale, (int, float)) and scale == 1
    scale = scale[:, None, None, None] if isinstance(scale, torch.Tensor) and scale.ndim else scale
    writes = [
        (site, values[site], mask if replaces and mask.dtype == torch.bool else mask * scale, mode)
        for values, masks in pairs
        for site, mask in masks.items()
    ]
    beside(model, lambda step: write(model, writes, model.after if step == 0 else 0), steps)


def check_shapes(site: str, values: Any, mask: torch.Tensor) -> None:
    """Refuse a mask that has other layers, positions and heads than a vector: activations have more positions."""
    if values is None:
        if mask.any():
            raise ValueError(f"there is nothing of the {site} to patch in; collect it too.")
    elif isinstance(values, torch.Tensor) and values.ndim == 4 and mask.shape[-3:] != values.shape[:-1]:
        raise ValueError(f"a mask of shape {list(mask.shape)} does not fit {site}; expected {list(values.shape[:-1])}.")


def write(model: Any, writes: Any, after: int = 0) -> None:
    """Put other values in their place, layer by layer: (site, values, mask, mode) with values [layer, position, head,
    head_dim] and a mask [layer, position, head], or with a batch in front, as for `patched`."""
    for layer in range(len(model.places["heads"])):
        for site, places in model.places.items():
            here = []
            for _, values, mask, mode in [part for part in writes if part[0] == site]:
                mask = mask.select(-3, layer)
                if mask.any() or mask.requires_grad:
                    values = values[layer] if isinstance(values, dict) else values.select(-4, layer)
                    here.append((values, mask, mode, after))
            if here:
                write_layer(places[layer], here)


def write_layer(place: Place, writes: Any) -> None:
    """Put the values of one place there, one after the other: arguments of `patched`."""

    def edit(z: torch.Tensor) -> torch.Tensor:
        for part in writes:
            z = patched(z, *part)
        return z

    change(place, edit)


def followed(texts: list[list[int]], answers: list[list[int]], width: int) -> list[list[int]]:
    """Tokens of texts, each with all tokens of its answer but the last, as many for all rows: what follows a row's own
    answer is seen by none of its tokens."""
    return [text + answer[:-1] + [0] * (width - len(answer)) for text, answer in zip(texts, answers)]


def beside(model: Any, function: Callable[[int], None], steps: str) -> None:
    """Run a function of the step as a worker before the block that calls this, as `nnsight_verbs` does."""
    if steps not in ("first", "all"):
        raise ValueError(f"steps={steps!r} is unknown; choose 'first' or 'all'.")
    interleaver = model.interleaver
    kind = type(interleaver.mediators[0])
    caller = kind.current("a verb")
    if hasattr(interleaver, "connection") and caller.pending is not None:  # a sandbox, which knows its workers by now
        raise ValueError(TOO_LATE)

    def run() -> None:
        step = 0
        try:
            function(step)
            while steps == "all":
                step += 1
                worker.iteration = step
                function(step)
        except Exception as error:  # the run has ended
            if type(error).__name__ != "OutOfOrderError":
                raise
            if step == 0:
                raise ValueError(TOO_LATE) from error

    worker = kind(compile("run()", "a verb", "exec"), {"run": run}, {})
    worker.batch_group = caller.batch_group
    interleaver.mediators.insert(interleaver.mediators.index(caller), worker)
    worker.start(interleaver)
    interleaver.reindex()


TOO_LATE = "capture or patch comes too late: write it above the first line of this block that reads the model."
NONE = -100
"""In the place of a token where a row has none."""


def width_of(truth: torch.Tensor) -> int:
    """Tokens of the longest of the true answers [row, token, 2]."""
    return int((truth[..., 0] != NONE).sum(1).max())


def first_tokens(logits: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [batch, vocabulary] where right and wrong answers first differ, and the tokens there [batch, 1 or 2]."""
    logits = logits[:, -width_of(truth) :]
    at, ids = deciding(truth.to(logits.device))
    return logits[torch.arange(len(logits), device=logits.device), at], ids


def differ(truth: torch.Tensor) -> torch.Tensor:
    """Where right and wrong answers have tokens that are not the same, [row, token]."""
    return (truth[..., 0] != truth[..., 1]) & (truth != NONE).all(-1)


def deciding(truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a right and a wrong answer first differ, [row], and the tokens of both there, [row, 2]; where there is no
    wrong one, the first token of the right one, [row, 1]."""
    if (truth[:, 0, 1] == NONE).all():
        return torch.zeros_like(truth[:, 0, 0]), truth[:, 0, :1]
    at = differ(truth).int().argmax(1)
    return at, truth[torch.arange(len(truth), device=truth.device), at]


def answer_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Losses [batch] of logits against tokens of the answers [batch, token, 2]: see `CausalLM.losses`."""
    width, truth = width_of(truth), truth.to(logits.device)
    log = logits[:, -width:].float().log_softmax(-1)
    if (truth[:, 0, 1] != NONE).any():
        at, ids = deciding(truth)
        right, wrong = log[torch.arange(len(log), device=log.device), at].gather(1, ids).unbind(1)
        return wrong - right
    ids = truth[:, :width, 0]
    each = -log.gather(-1, ids.clamp(min=0)[..., None])[..., 0]
    there = ids != NONE
    return (each * there).sum(1) / there.sum(1)


def forward(model: Any, inputs: dict[str, Any], writes: Any, after: int) -> Any:
    """Logits [row, token, vocabulary] of one forward, with other values in their place."""
    with model.trace(**inputs):
        write(model, writes, after)
        logits = model.output.logits
    return logits


def called(model: Any, method: str, inputs: Any, options: dict[str, Any]) -> Any:
    """What a method of the model, "trace" or "generate", gives in a block that does nothing."""
    with getattr(model, method)(*inputs, **options) as tracer:
        result = tracer.result
    return result


def readings(model: Any, inputs: dict[str, Any], sites: Any) -> dict[str, list[torch.Tensor]]:
    """The activations of every layer, [batch, token, head, head_dim], by site."""
    values: dict[str, list[torch.Tensor]] = {site: [] for site in sites}
    with model.trace(**inputs):
        for layer in range(len(model.places["heads"])):
            for site, places in model.places.items():
                if site in values:
                    values[site].append(split(places[layer], first(read(places[layer]))).clone())
    return values


def moments(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over a batch [token, head, head_dim], and the sums of squared distances to it, averaged over the head's
    dimensions [token, head]."""
    z = z.to(torch.float32 if z.device.type == "mps" else torch.float64)
    mean = z.mean(0)
    return mean, (z - mean).square().sum(0).mean(-1)


def merge(
    n: int, mean: torch.Tensor, spread: torch.Tensor, m: int, other: torch.Tensor, others: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The moments of `n` prompts and of `m` others together."""
    step = other - mean
    return mean + step * (m / (n + m)), spread + others + step.square().mean(-1) * (n * m / (n + m))


def collect_moments(model: Any, tasks: Any, sites: Any, positions: int) -> Any:
    """By task and site, the moments of the last tokens of batches, a forward's inputs each: [layer, position, …],
    positions from the end."""
    found: dict[str, Any] = {}
    for task, batches in tasks.items():
        total: dict[str, Any] = {}
        count = 0
        for inputs in batches:
            with torch.no_grad():
                values, rows = readings(model, inputs, sites), len(inputs["input_ids"])
            for site, layers in values.items():
                parts = zip(*[moments(z[:, -positions:]) for z in layers])
                mean, spread = [torch.stack(part).cpu().flip(1) for part in parts]
                if count:
                    before, about = total[site]
                    mean, spread = merge(count, before, about, rows, mean, spread)
                total[site] = mean, spread
            count += rows
        found[task] = total
    return found


def collect_rows(model: Any, batches: Any, sites: Any) -> Any:
    """Of each batch, a forward's inputs, by site, the activations [layer, row, token, head, head_dim]."""
    with torch.no_grad():
        parts = [readings(model, inputs, sites) for inputs in batches]
    return [{site: torch.stack(layers).cpu() for site, layers in part.items()} for part in parts]


def answer(model: Any, asks: Any) -> Any:
    """Losses [row], and logits [row, vocabulary] where the answer begins or the tokens that were said, for each ask."""
    answers = []
    with torch.no_grad():
        for ask in asks:
            logits = forward(model, ask["inputs"], ask["writes"], ask["after"])
            said = first_tokens(logits, ask["truth"])[0].cpu()
            loss = answer_loss(logits, ask["truth"]).cpu()
            if ask["say"]:
                with model.generate(**ask["say"]) as tracer:
                    write(model, ask["writes"])
                    said = tracer.result
            answers.append((loss, said.cpu()))
    return answers
