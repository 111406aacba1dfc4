"""Prompts run through a model batch by batch, and what is kept of their activations: their moments, for task vectors,
or all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from vtv_nnsight.finite import WHERE, check_finite
from vtv_nnsight.models import inside_trace
from vtv_nnsight.models.devices import device_of, remote_of
from vtv_nnsight.models.inside_trace import last_tokens, merge, moments, put
from vtv_nnsight.models.interface import HEADS, ByStage, InContextModel, Stage, batch_size_of
from vtv_nnsight.models.nnsight_remote import there
from vtv_nnsight.models.sites import list_layers, module_path, read_layers, validate_sites
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import Prompts
from vtv_nnsight.text import check_kind
from vtv_nnsight.vectors.compatibility import differences, fingerprint
from vtv_nnsight.vectors.files import scatter


class Moments(NamedTuple):
    """What is kept of some prompts' activations, in float64, NaN where absent.

    Args:
        prompts: Number of prompts.
        mean: By stage and site, [layer, position, head, head_dim].
        spread: Sums of squared distances to the mean, averaged over the head's dimensions: [layer, position, head].
    """

    prompts: int
    mean: ByStage
    spread: ByStage

    def variance(self) -> ByStage | None:
        """By stage and site, [layer, position, head] in float32; None of a single prompt."""
        return self.spread.map(lambda spread: (spread / (self.prompts - 1)).float()) if self.prompts > 1 else None


def collect_moments(
    model: InContextModel,
    prompts: Mapping[str, Prompts],
    sites: str | Sequence[str] = HEADS,
    *,
    batch_size: int | None = None,
    progress: bool = True,
    remote: bool | str | None = None,
) -> tuple[dict[str, Moments], dict[str, Any]]:
    """Moments of each task's activations, and the fingerprint of what they belong to: see `TaskVectors.collect`."""
    check_kind(prompts, Mapping, "prompts of tasks", "{task.name: prompts}")
    layout, sites, remote = _shared_layout(prompts), validate_sites(model, sites), remote_of(model, remote)
    device = device_of(model, remote)
    owner = fingerprint(model, layout)
    moments, asked, far = dict[str, Moments](), dict[str, Any](), cast(Any, model)
    total = sum(map(len, prompts.values()))
    with progress_bar(total=total, desc="collecting", unit="prompt", disable=not progress) as bar:
        for task, rows in prompts.items():
            bar.set_postfix_str(task)
            lengths = model.lengths(rows)
            rows = rows[lengths.argsort(stable=True)] if len(lengths) > 1 else rows
            batches = rows.split(batch_size_of(model, batch_size, prompts=rows))
            if remote:
                asked[task] = [far.seen(batch) for batch in batches]
                continue
            for batch in batches:
                new = measure(model, batch.to(device), sites)
                moments[task] = _merge(moments[task], new) if task in moments else new
                bar.update(len(batch))
        if remote:
            moments = _moments_there(model, remote, asked, sites, layout.num_positions)
            bar.update(total)
    return moments, owner


def collect_rows(
    model: InContextModel,
    prompts: Prompts,
    sites: str | Sequence[str] = HEADS,
    *,
    batch_size: int | None = None,
    progress: bool = True,
    remote: bool | str | None = None,
) -> tuple[ByStage, dict[str, Any]]:
    """Every prompt's activations, and the fingerprint of what they belong to: see `Activations.collect`."""
    if not len(prompts):
        raise ValueError("there are no prompts to collect; give at least one.")
    places, remote = list_layers(model, sites), remote_of(model, remote)
    device = device_of(model, remote)
    parts: list[ByStage] = []
    owner = fingerprint(model, prompts.layout)
    positions = max(prompts.layout.num_positions, int(model.lengths(prompts).max()))

    def keep(step: int, stage: Stage, layer: int, z: torch.Tensor, seen: torch.Tensor) -> None:
        put_rows(parts[-1], stage, layer, z.cpu(), seen, positions)

    with progress_bar(total=len(prompts), desc="collecting", unit="prompt", disable=not progress) as bar:
        batches = list(prompts.split(batch_size_of(model, batch_size, prompts=prompts)))
        if remote:
            far, stage = cast(Any, model), model.stages[0]
            inputs, names = [far.seen(batch) for batch in batches], list(validate_sites(model, sites))
            for batch, values in zip(batches, there(model, remote, inside_trace.collect_rows, inputs, names)):
                parts.append(ByStage())
                for site, layers in values.items():
                    for layer, z in enumerate(layers):
                        keep(0, stage.at(site), layer, z, model.positions(stage.name, batch))
        for batch in () if remote else batches:
            parts.append(ByStage())
            with torch.no_grad(), model.trace(batch.to(device)):
                read_layers(model, places, keep, stop=True)
            bar.update(len(batch))
    return ByStage({key: torch.cat([part[key] for part in parts]) for key in parts[0]}), owner


def _moments_there(
    model: Any, remote: bool | str, batches: Mapping[str, Any], sites: Sequence[str], positions: int
) -> dict[str, Moments]:
    """The moments of tasks' prompts, by inputs of their batches, made where the model runs."""
    if min(len(ids) for parts in batches.values() for part in parts for ids in part["input_ids"]) < positions:
        raise ValueError(f"a vector of {positions} tokens was asked for, and one of these prompts has fewer.")
    every = there(model, remote, inside_trace.collect_moments, dict(batches), list(sites), positions)
    key = model.stages[0].name
    for task, total in every.items():
        check_finite(torch.stack([mean.sum() for mean, _ in total.values()]), f"an activation of {task!r}", WHERE)
    return {
        task: Moments(
            sum(len(part["input_ids"]) for part in batches[task]),
            *(ByStage({(key, site): pair[i] for site, pair in total.items()}) for i in (0, 1)),
        )
        for task, total in every.items()
    }


def put_rows(values: ByStage, stage: Stage, layer: int, z: torch.Tensor, seen: torch.Tensor, places: int) -> None:
    """Copy activations of a layer to where they belong in [row, layer, position, head, head_dim], NaN at first, of
    `places` positions or as many as are seen; in a scan there are shapes alone."""
    scan = isinstance(z, FakeTensor)
    if stage.key not in values:
        with unset_fake_temporarily():
            places = places if isinstance(seen, FakeTensor) else max(places, int(seen.max()) + 1)
            sizes = (len(z), stage.layers, places, *z.shape[2:])
            values[stage.key] = torch.full(sizes, torch.nan, dtype=z.dtype, device="meta" if scan else z.device)
    if not scan:
        put(values[stage.key], layer, z.detach(), seen)


def measure(model: InContextModel, prompts: Prompts, sites: Sequence[str] = (HEADS,)) -> Moments:
    """The moments of every head over one batch of prompts, in one trace.

    Raises:
        ValueError: naming the first layer and head that has an activation which is not finite.
    """
    positions, means, spreads, at = prompts.layout.num_positions, ByStage(), ByStage(), ByStage()
    layers: dict[Stage, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def keep(step: int, stage: Stage, layer: int, z: torch.Tensor, seen: torch.Tensor) -> None:
        tokens, at[stage.key] = last_tokens(seen, positions)
        layers.setdefault(stage, []).append(moments(z[:, tokens]))

    with torch.no_grad(), model.trace(prompts):
        read_layers(model, list_layers(model, sites), keep, stop=True)
    for stage, parts in layers.items():
        mean, spread = (torch.stack(values).cpu() for values in zip(*parts))
        bad = ~mean.isfinite().all(-1).all(1)
        if bad.any():
            layer, head = bad.nonzero()[0].tolist()
            unit = f"{module_path(model, stage, layer)}.{f'heads[{head}]' if stage.site == HEADS else 'output'}"
            raise ValueError(f"{unit} is not finite (NaN or infinite) on these prompts; check weights and dtype.")
        seen = at[stage.key].cpu()
        if seen.ndim == 2:
            raise ValueError(f"a vector of {positions} tokens was asked for, and one of these prompts has fewer.")
        means[stage.key], spreads[stage.key] = scatter(mean, seen, positions), scatter(spread, seen, positions)
    return Moments(len(prompts), means, spreads)


def _merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of prompts together."""
    merged = {
        key: merge(a.prompts, a.mean[key], a.spread[key], b.prompts, b.mean[key], b.spread[key]) for key in a.mean
    }
    means, spreads = (ByStage({key: parts[i] for key, parts in merged.items()}) for i in (0, 1))
    return Moments(a.prompts + b.prompts, means, spreads)


def _shared_layout(prompts: Mapping[str, Prompts]) -> Any:
    if not prompts:
        raise ValueError("there are no tasks to collect; give {task name: prompts}.")
    for task, rows in prompts.items():
        if not isinstance(rows, Prompts):
            raise TypeError(f"{task!r} has a {type(rows).__name__}; give prompts, such as TextPrompts(texts).")
        if not len(rows):
            raise ValueError(f"there are no prompts of {task!r}; give at least one.")
    (first, rows), *others = prompts.items()
    for task, other in others:
        if differences(asdict(other.layout), asdict(rows.layout)):
            raise ValueError(f"{first!r} has prompts in {rows.layout}, {task!r} in {other.layout}; collect each.")
    return rows.layout
