"""Task vectors: the mean output of every attention head at every position, task by task.

*Finding Visual Task Vectors* (ECCV 2024, arXiv 2404.05729), §4. The activation of a head is z = softmax(qkᵀ/√d)·v,
before the output projection:

    >>> prompts = {task.name: task.prompts(images, n=100, layout=model.layout) for task in tasks.VTV}
    >>> vectors = TaskVectors.collect(model, prompts)
    >>> vectors["segmentation"].mean["encoder"].shape       # [layer, position, head, head_dim]
    >>> scores = vectors.score()                            # high where a head tells tasks apart
    >>> vectors.save("vectors.safetensors")

Means and scores are dicts by the model's stages (see `stages.ByStage`); beside heads, `sites=("heads", "mlp")` collects
whole layers' activations (see `sites`). Positions are absolute: 0 is CLS and 1 + i is patch i (see `layouts`). What a
prompt does not show a stage is NaN: absent, not zero, and arithmetic keeps it so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange

from vtv_nnsight.digests import tensor_digest
from vtv_nnsight.files import read_tensors, write_tensors
from vtv_nnsight.images import png
from vtv_nnsight.layouts import Layout
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import HEADS, SITES, ByStage, InContextModel, Stage, default_batch_size
from vtv_nnsight.models.sites import at_sites, module_path, read, sites_in, split_key, stage_key, validate_sites
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import VisualPrompt, as_rows
from vtv_nnsight.vectors.compatibility import check_compatible, fingerprint, geometry, layout_of, stages_of

SAVE_EVERY = 10.0
"""Seconds between two writes of a resumable run's state."""


@dataclass(frozen=True, eq=False)
class TaskVector:
    """The mean activation of every head, for one task. Vectors add and scale: `a + b - c`, `0.5 * a`, `-a`.

    Args:
        task: Its name.
        mean: By stage (and site, see `sites`), [layer, position, head, head_dim]; NaN at the positions that the prompts
            did not show.
        variance: By stage, [layer, position, head]: variance over the prompts (n - 1 below), averaged over the head's
            dimensions; None for a vector that arithmetic made.
        count: Number of prompts.
        fingerprint: The model and the layout that it belongs to (see `stages.fingerprint`).
    """

    task: str
    mean: ByStage
    variance: ByStage | None
    count: int
    fingerprint: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", ByStage(self.mean))
        object.__setattr__(self, "variance", None if self.variance is None else ByStage(self.variance))

    @property
    def values(self) -> ByStage:
        """What is patched in: the mean."""
        return self.mean

    @property
    def label(self) -> str:
        """For errors."""
        return f"the vector of {self.task!r}"

    @cached_property
    def present(self) -> ByStage:
        """By stage, bool [position]: the positions that are not absent."""
        return self.mean.map(lambda mean: ~mean[0, :, 0, 0].isnan())

    def to(self, *args: Any, **kwargs: Any) -> TaskVector:
        """Move or cast, as `torch.Tensor.to` does."""
        mean, variance = (
            values and values.map(lambda x: x.to(*args, **kwargs)) for values in (self.mean, self.variance)
        )
        return replace(self, mean=mean, variance=variance)

    def __add__(self, other: TaskVector) -> TaskVector:
        return self._combine(other, "+", torch.add)

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self._combine(other, "-", torch.sub)

    def __mul__(self, factor: float) -> TaskVector:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        mean = self.mean.map(lambda mean: mean * factor)
        return replace(self, task=f"{factor:g} * ({self.task})", mean=mean, variance=None)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        return self * (1 / divisor)

    def __neg__(self) -> TaskVector:
        return -1 * self

    def __repr__(self) -> str:
        shapes = ", ".join(f"{stage} {list(mean.shape)}" for stage, mean in self.mean.items())
        return f"TaskVector({self.task!r} of {self.count} prompts: {shapes})"

    def _combine(self, other: TaskVector, sign: str, function: Callable) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        _check_alike(other, self)
        return TaskVector(
            f"{self.task} {sign} {other.task}",
            self.mean.map(function, other.mean),
            None,
            min(self.count, other.count),
            self.fingerprint | other.fingerprint,
        )


def _finite(values: torch.Tensor, what: str) -> torch.Tensor:
    if not values.isfinite().all():
        raise ValueError(f"{what} is not finite in {values.dtype}; look for NaN, or save it as torch.float32.")
    return values


def _check_alike(other: TaskVector, first: TaskVector) -> None:
    check_compatible(other.label, other.fingerprint, f"that of {first.task!r}", first.fingerprint)
    if other.mean.keys() != first.mean.keys():
        found, own = (", ".join(sites_in(vector.mean)) for vector in (other, first))
        raise ValueError(f"{other.label} has the sites {found}, that of {first.task!r} {own}; collect the same.")


def zero_vector(model: InContextModel, sites: Sequence[str] = (HEADS,)) -> TaskVector:
    """Zeros at every position, whatever the layout: what ablation by zero patches in."""
    places, zero = model.layout.num_positions, torch.zeros(())
    mean = {s.name: zero.expand(s.layers, places, s.heads, s.head_dim) for s in at_sites(model.stages, sites)}
    return TaskVector("zero", mean, None, 0, geometry(model))


@dataclass(frozen=True, eq=False)
class Activations:
    """What single prompts' activations are, a row for each: `patch` puts them into as many other prompts, row by row,
    such as a one-shot run into the query alone, or the run under another task's example into this one.

        >>> run = Activations.collect(model, prompts)
        >>> with model.trace(prompts.query_only()):
        ...     patch(model, run, chosen)

    Args:
        values: By stage (and site, see `sites`), [row, layer, position, head, head_dim]; NaN at the positions that the
            prompts did not show.
        fingerprint: The model and the layout that they belong to (see `stages.fingerprint`).
    """

    values: ByStage
    fingerprint: dict[str, Any]
    label = "the activations"

    @classmethod
    def collect(
        cls,
        model: InContextModel,
        prompts: VisualPrompt,
        *,
        sites: str | Sequence[str] = HEADS,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> Activations:
        """Run prompts through the model and keep all that every head says, on the CPU and in the model's dtype. (A
        prompt of a ViT-L takes 23 MB in float32.) Arguments are `TaskVectors.collect`'s.

        Raises:
            ValueError: when there are no prompts, or the model has no such site.
        """
        if not len(prompts):
            raise ValueError("there are no prompts to collect; give at least one.")
        sites, parts, device = validate_sites(model, sites), [], device_of(model)
        owner = fingerprint(model, prompts.layout)
        with progress_bar(total=len(prompts), desc="collecting", unit="prompt", disable=not progress) as bar:
            for batch in prompts.split(batch_size or default_batch_size(model)):
                found = _read_all(model, batch.to(device), sites, torch.clone)
                parts.append(found.map(lambda layers: torch.stack(layers, 1).cpu()))
                bar.update(len(batch))
        values = ByStage()
        for name in parts[0]:
            seen = model.positions(split_key(name)[0], prompts).cpu()
            own = rearrange(torch.cat([part[name] for part in parts]), "row layer ... -> (row layer) ...")
            placed = scatter(own, seen, prompts.layout.num_positions)
            values[name] = rearrange(placed, "(row layer) ... -> row layer ...", row=len(prompts))
        return cls(values, owner)

    @cached_property
    def present(self) -> ByStage:
        """By stage, bool [position]: the positions that are not absent."""
        return self.values.map(lambda values: ~values[0, 0, :, 0, 0].isnan())

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __getitem__(self, rows: int | slice | Sequence[int] | torch.Tensor) -> Activations:
        """Those of some prompts, always several rows: an int gives one."""
        rows = as_rows(rows.cpu() if isinstance(rows, torch.Tensor) else rows, len(self))
        return replace(self, values=self.values.map(lambda values: values[rows]))

    def to(self, *args: Any, **kwargs: Any) -> Activations:
        """Move or cast, as `torch.Tensor.to` does."""
        return replace(self, values=self.values.map(lambda x: x.to(*args, **kwargs)))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{stage} {list(values.shape)}" for stage, values in self.values.items())
        return f"Activations(of {len(self)} prompts: {shapes})"


class TaskVectors(Mapping[str, TaskVector]):
    """Task name → TaskVector, all of one model and one layout.

    Args:
        vectors: The vectors; their names are their tasks'.

    Raises:
        ValueError: when there are none, or when one belongs to another model or layout than the first, or has other
            sites.
    """

    def __init__(self, vectors: Mapping[str, TaskVector]) -> None:
        if not vectors:
            raise ValueError("there are no task vectors; give at least one.")
        first, *others = vectors.values()
        for other in others:
            _check_alike(other, first)
        self._vectors = dict(vectors)

    def __getitem__(self, task: str) -> TaskVector:
        if task not in self._vectors:
            raise KeyError(f"there is no vector of {task!r}; choose from {', '.join(self)}.")
        return self._vectors[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def __repr__(self) -> str:
        return "TaskVectors(\n" + "".join(f"  {vector!r}\n" for vector in self.values()) + ")"

    def to(self, *args: Any, **kwargs: Any) -> TaskVectors:
        """Move or cast, as `torch.Tensor.to` does."""
        return TaskVectors({name: vector.to(*args, **kwargs) for name, vector in self.items()})

    def mean(self) -> TaskVector:
        """The mean over tasks: what ablation by the mean patches in."""
        return replace(reduce(add, self.values()) / len(self), task="mean over tasks")

    @classmethod
    def collect(
        cls,
        model: InContextModel,
        prompts: Mapping[str, VisualPrompt],
        *,
        sites: str | Sequence[str] = HEADS,
        batch_size: int | None = None,
        resume: str | Path | None = None,
        progress: bool = True,
    ) -> TaskVectors:
        """Run prompts through the model and average what every head says (ECCV 2024, §4.1).

        One trace a batch. Means and variances are accumulated in float64 (Chan, Golub and LeVeque, 1979), so that the
        batch size does not show in them, and kept in float32.

        Args:
            model: The model, on its device and in its dtype.
            prompts: Task name → prompts, one or more of each and all of one layout.
            sites: What to average: "heads", "attn", "mlp", "residual", or several of them (see `sites`).
            batch_size: Rows a trace; None is `stages.default_batch_size`, 32 for MAE-VQGAN.
            resume: A file for the state, written every few seconds; a run that finds it goes on where it stopped.
            progress: Show a progress bar.

        Raises:
            ValueError: when a task has no prompts, layouts differ, the model has no such site, an activation is not
                finite (naming layer and head), or `resume` is of other prompts, other sites or another model.
        """
        layout, sites = _shared_layout(prompts), validate_sites(model, sites)
        device = device_of(model)
        owner = fingerprint(model, layout)
        found = _read_state(resume, owner, prompts, sites) if resume else {}
        saved = time.monotonic()
        total, done = sum(map(len, prompts.values())), sum(moments.count for moments in found.values())
        with progress_bar(total=total, initial=done, desc="collecting", unit="prompt", disable=not progress) as bar:
            for task, rows in prompts.items():
                bar.set_postfix_str(task)
                rows = rows[found[task].count :] if task in found else rows
                for batch in rows.split(batch_size or default_batch_size(model)):
                    new = measure(model, batch.to(device), sites)
                    found[task] = _merge(found[task], new) if task in found else new
                    bar.update(len(batch))
                    if resume and time.monotonic() - saved > SAVE_EVERY:
                        _write_state(resume, found, owner, prompts)
                        saved = time.monotonic()
        if resume:
            _write_state(resume, found, owner, prompts)
        return cls({task: found[task].vector(task, owner) for task in prompts})

    def score(self, over: str | None = None) -> ByStage:
        """How well a head tells the tasks apart: the variance of the tasks' means over the mean variance within a task,
        both averaged over the head's dimensions (ECCV 2024, §4.2).

        Args:
            over: None for [layer, head, position]; "position" sums both variances over the positions first,
                for [layer, head]; "head" over the heads, for [layer, position].

        Returns:
            Ratios by stage; NaN at the positions that some task lacks, 0 where nothing varies.

        Raises:
            ValueError: with fewer than two tasks, or a task of fewer than two prompts.
        """
        dims = {None: None, "position": 1, "head": 2}
        if over not in dims:
            raise ValueError(f"over={over!r} cannot be summed over; choose 'position', 'head' or None.")
        if len(self) < 2:
            raise ValueError(f"a score compares tasks and there is only {', '.join(self)}; collect two or more.")
        for name, vector in self.items():
            if vector.variance is None:
                raise ValueError(f"the vector of {name!r} has no variance; collect it from two or more prompts.")

        def ratio(means: list[torch.Tensor], variances: list[torch.Tensor]) -> torch.Tensor:
            between = torch.stack(means).double().var(0).mean(-1)
            within = torch.stack(variances).double().mean(0)
            absent = between.isnan() | within.isnan()
            if over:
                between, within = (v.masked_fill(absent, 0).sum(dims[over]) for v in (between, within))
                absent = absent.all(dims[over])
            scores = torch.where(between > 0, between / within, 0.0).masked_fill(absent, torch.nan).float()
            return scores if over else rearrange(scores, "layer position head -> layer head position")

        vectors, scores = list(self.values()), ByStage()
        for stage in vectors[0].mean:
            scores[stage] = ratio([v.mean[stage] for v in vectors], [v.variance[stage] for v in vectors])
        return scores

    def _repr_png_(self) -> bytes | None:
        """How well each head tells the tasks apart, in a notebook; none of a single task."""
        from vtv_nnsight import plots  # which is further along, and draws what this is

        if len(self) < 2 or any(vector.variance is None for vector in self.values()):
            return None
        return png(plots.score_map(self.score(), layout_of(next(iter(self.values())).fingerprint)))

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a safetensors file: the positions that are present, with counts and fingerprint. `load` gives float32,
        whatever dtype the file has.

        Raises:
            ValueError: when a value is NaN, or too large for the dtype.
        """
        tensors = {}
        for name, vector in self.items():
            for stage, present in vector.present.items():
                tensors[f"{name}/{stage}/present"] = present
                for field in FIELDS:
                    if values := getattr(vector, field):
                        kept = values[stage][:, present].to(dtype)
                        tensors[f"{name}/{stage}/{field}"] = _finite(kept, f"the {field} of {name!r}")
        counts = {name: vector.count for name, vector in self.items()}
        first = next(iter(self.values()))
        told = {"counts": counts, "fingerprint": first.fingerprint} | {"sites": list(sites_in(first.mean))}
        write_tensors(path, KIND, tensors, told)

    @classmethod
    def load(cls, path: str | Path) -> TaskVectors:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: when there is no such file, it is incomplete or damaged, or it is something
                else.
        """
        tensors, metadata = read_tensors(path, KIND)
        try:
            owner = metadata["fingerprint"]
            stages, places = at_sites(stages_of(owner), _sites_told(metadata)), layout_of(owner).num_positions
            vectors = {
                name: TaskVector(name, *(_read_values(tensors, name, f, stages, places) for f in FIELDS), count, owner)
                for name, count in metadata["counts"].items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} holds no whole task vectors: {reason}; collect them again.") from error
        return cls(vectors)


KIND = "task vectors"
FIELDS = ("mean", "variance")


def _sites_told(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    sites = tuple(metadata["sites"])
    if not sites or not set(sites) <= set(SITES):
        raise ValueError(f"its sites {list(sites)} are unknown")
    return sites


def _read_values(
    tensors: Mapping[str, torch.Tensor], task: str, field: str, stages: Sequence[Stage], places: int
) -> ByStage | None:
    """A field of a task's vector, by stage, from the tensors of a file; None for a variance that it does not have."""
    values = ByStage()
    if field == "variance" and f"{task}/{stages[0].name}/{field}" not in tensors:
        return None
    for stage in stages:
        key = f"{task}/{stage.name}"
        found, present = tensors[f"{key}/{field}"], tensors[f"{key}/present"]
        sizes = (stage.heads, stage.head_dim)[: 2 if field == "mean" else 1]
        expected = (stage.layers, int(present.sum()), *sizes)
        if present.shape != (places,) or present.dtype != torch.bool or found.shape != expected:
            raise ValueError(
                f"{key}/{field} has shape {list(found.shape)} at {list(present.shape)} positions, not {list(expected)} "
                f"at [{places}]"
            )
        if not found.isfinite().all():
            raise ValueError(f"{key}/{field} holds numbers that are NaN or infinite")
        values[stage.name] = scatter(found.float(), present.nonzero()[:, 0], places)
    return values


class Moments(NamedTuple):
    """What `collect` keeps of some prompts, in float64, NaN where absent."""

    count: int
    mean: ByStage
    """By stage, [layer, position, head, head_dim]."""
    spread: ByStage
    """Sums of squared distances to the mean, averaged over the head's dimensions: by stage, [layer, position, head]."""

    def vector(self, task: str, owner: dict[str, Any]) -> TaskVector:
        """The vector of a task, of the model and layout that a fingerprint tells of."""
        variance = self.spread.map(lambda spread: (spread / (self.count - 1)).float()) if self.count > 1 else None
        return TaskVector(task, self.mean.map(torch.Tensor.float), variance, self.count, owner)


def measure(model: InContextModel, prompts: VisualPrompt, sites: Sequence[str] = (HEADS,)) -> Moments:
    """The moments of every head over one batch of prompts, in one trace.

    Raises:
        ValueError: naming the first layer and head whose activation is not finite.
    """
    places = prompts.layout.num_positions
    means, spreads = ByStage(), ByStage()
    for name, layers in _read_all(model, prompts, sites, _moments).items():
        stage, site = split_key(name)
        mean, spread = (torch.stack(parts).cpu() for parts in zip(*layers))
        bad = ~mean.isfinite().all(-1).all(1)
        if bad.any():
            layer, head = bad.nonzero()[0].tolist()
            own = f"{module_path(model, stage, layer, site)}.{f'heads[{head}]' if site == HEADS else 'output'}"
            raise ValueError(
                f"{own} is not finite (NaN or infinite) on these prompts; check the weights, or load the model in "
                "another dtype."
            )
        seen = model.positions(stage, prompts).cpu()
        means[name], spreads[name] = scatter(mean, seen, places), scatter(spread, seen, places)
    return Moments(len(prompts), means, spreads)


def _read_all(
    model: InContextModel, prompts: VisualPrompt, sites: Sequence[str], function: Callable[[torch.Tensor], Any]
) -> ByStage:
    """`function` of the activations of every layer, in one trace, which ends with the last of them: by stage and site,
    a list."""
    with torch.no_grad(), model.trace(prompts) as tracer:
        found = {
            (stage_key(stage.name, site), layer): function(read(model, stage, layer, site))
            for stage in model.stages
            for layer in range(stage.layers)
            for site in sites
        }.save()
        tracer.stop()
    layers = ByStage()
    for (name, _), value in found.items():
        layers.setdefault(name, []).append(value)
    return layers


def _moments(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = z.to(torch.float32 if z.device.type == "mps" else torch.float64)
    mean = z.mean(0)
    return mean, (z - mean).square().sum(0).mean(-1)


def _merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of prompts together."""
    n, m = a.count, b.count
    step = b.mean.map(torch.sub, a.mean)
    mean = a.mean.map(lambda mean, step: mean + step * (m / (n + m)), step)
    spread = a.spread.map(lambda x, y, step: x + y + step.square().mean(-1) * (n * m / (n + m)), b.spread, step)
    return Moments(n + m, mean, spread)


def scatter(values: torch.Tensor, at: torch.Tensor, places: int) -> torch.Tensor:
    """[layer, token, ...] → [layer, position, ...], NaN at the positions that no token has."""
    out = values.new_full((len(values), places, *values.shape[2:]), torch.nan)
    out[:, at] = values
    return out


def _shared_layout(prompts: Mapping[str, VisualPrompt]) -> Layout:
    if not prompts:
        raise ValueError("there are no tasks to collect; give {task name: prompts}.")
    for task, rows in prompts.items():
        if not len(rows):
            raise ValueError(f"there are no prompts of {task!r}; give at least one.")
    (first, rows), *others = prompts.items()
    for task, other in others:
        if other.layout != rows.layout:
            raise ValueError(
                f"the prompts of {first!r} are in {rows.layout} and those of {task!r} in {other.layout}; collect one "
                "layout at a time."
            )
    return rows.layout


def _write_state(path: str | Path, found: dict[str, Moments], owner: dict, prompts: Mapping[str, VisualPrompt]) -> None:
    tensors = {
        f"{task}/{field}/{stage}": values
        for task, moments in found.items()
        for field in ("mean", "spread")
        for stage, values in getattr(moments, field).items()
    }
    counts = {task: moments.count for task, moments in found.items()}
    digests = _digests(prompts)
    told = {"counts": counts, "prompts": digests, "fingerprint": owner}
    sites = sites_in(next(iter(found.values())).mean)
    write_tensors(path, "collection", tensors, told | {"sites": list(sites)})


def _read_state(
    path: str | Path, owner: dict, prompts: Mapping[str, VisualPrompt], sites: tuple[str, ...]
) -> dict[str, Moments]:
    if not Path(path).exists():
        return {}
    tensors, metadata = read_tensors(path, "collection")
    check_compatible(f"the state in {path}", metadata["fingerprint"], "this model and layout", owner)
    if metadata["prompts"] != {
        task: tensor_digest(rows.canvas, rows.visible, rows.decoded) for task, rows in prompts.items()
    }:
        raise ValueError(f"the state in {path} is of other prompts; remove it, or name another file.")
    if _sites_told(metadata) != sites:
        raise ValueError(f"the state in {path} is of other sites; remove it, or name another file.")

    def by_stage(task: str, field: str) -> ByStage:
        return ByStage({s.name: tensors[f"{task}/{field}/{s.name}"] for s in at_sites(stages_of(owner), sites)})

    return {
        task: Moments(count, by_stage(task, "mean"), by_stage(task, "spread"))
        for task, count in metadata["counts"].items()
    }


def _digests(prompts: Mapping[str, VisualPrompt]) -> dict[str, str]:
    return {task: tensor_digest(rows.canvas, rows.visible, rows.decoded) for task, rows in prompts.items()}
