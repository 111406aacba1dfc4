"""Task vectors: the mean output of every attention head at every position, task by task; and single prompts'
activations.

*Finding Visual Task Vectors* (ECCV 2024, arXiv 2404.05729), §4. The activation of a head is z = softmax(qkᵀ/√d)·v,
before the output projection:

    >>> prompts = {task.name: task.prompts(images, n=100, layout=model.layout) for task in tasks.VTV}
    >>> vectors = TaskVectors.collect(model, prompts)
    >>> vectors["segmentation"].mean["encoder"].shape       # [layer, position, head, head_dim]
    >>> scores = vectors.score()                            # high where a head tells tasks apart
    >>> vectors.save("vectors.safetensors")

Means and scores are dicts by the model's stages (see `models.interface.ByStage`); beside heads,
`sites=("heads", "mlp")` collects whole layers' activations: `mean["encoder", "mlp"]` (see `models.sites`). Positions
are absolute: 0 is CLS and 1 + i is patch i (see `layouts`). What a prompt does not show a stage is NaN: absent, not
zero, and arithmetic keeps it so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from numbers import Real
from operator import add
from pathlib import Path
from typing import Any, TypeVar

import torch
from einops import rearrange

from vtv_nnsight import maps
from vtv_nnsight.finite import check_finite
from vtv_nnsight.models.inside_trace import put
from vtv_nnsight.models.interface import HEADS, ByStage, InContextModel, StageSite
from vtv_nnsight.prompts import Prompts, as_rows
from vtv_nnsight.text import quoted
from vtv_nnsight.vectors import files
from vtv_nnsight.vectors.collecting import collect_moments, collect_rows
from vtv_nnsight.vectors.compatibility import check_compatible, layout_of

Self = TypeVar("Self", bound="Linear")


class Linear:
    """What adds and scales: `a + b - c`, `0.5 * a`, `a / 2`, `-a`."""

    def __add__(self: Self, other: Self) -> Self:
        return self._combine(other, "+", torch.add) if isinstance(other, type(self)) else NotImplemented

    def __sub__(self: Self, other: Self) -> Self:
        return self._combine(other, "-", torch.sub) if isinstance(other, type(self)) else NotImplemented

    def __mul__(self: Self, factor: float) -> Self:
        if not isinstance(factor, Real):
            return NotImplemented
        check_finite(factor, "the factor", "scale by a finite number")
        return self._scale(factor)

    __rmul__ = __mul__

    def __truediv__(self: Self, divisor: float) -> Self:
        if not isinstance(divisor, Real):
            return NotImplemented
        check_finite(divisor, "the factor", "scale by a finite number")
        return self * (1 / divisor if divisor else math.inf)

    def __neg__(self: Self) -> Self:
        return -1 * self

    def _combine(self: Self, other: Self, sign: str, function: Callable[..., Any]) -> Self:
        raise NotImplementedError

    def _scale(self: Self, factor: float) -> Self:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class TaskVector(Linear):
    """The mean activation of every head, for one task. Vectors add and scale: `a + b - c`, `0.5 * a`, `-a`.

    Args:
        task: Its name.
        mean: By stage and site, [layer, position, head, head_dim]; NaN at the positions that the prompts did not show.
        variance: By stage, [layer, position, head]: variance over the prompts (n - 1 below), averaged over the head's
            dimensions; None for a vector that arithmetic made.
        count: Number of prompts.
        fingerprint: The model and the layout that it belongs to (see `vectors.compatibility.fingerprint`).
    """

    task: str
    mean: ByStage
    variance: ByStage | None
    count: int
    fingerprint: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", ByStage(self.mean))
        object.__setattr__(self, "variance", None if self.variance is None else ByStage(self.variance))
        files.check_floating(self.mean, self.label, "[layer, position, head, head_dim]")

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
        return files.present_positions(self.mean, self.label)

    @cached_property
    def present_rows(self) -> ByStage:
        """The same with a row in front, as `Activations` have them: bool [1, position]."""
        return self.present.map(lambda present: present[None])

    def to(self, *args: Any, **kwargs: Any) -> TaskVector:
        """Move or cast, as `torch.Tensor.to` does."""

        def move(values: torch.Tensor) -> torch.Tensor:
            return values.to(*args, **kwargs)

        return replace(self, mean=self.mean.map(move), variance=self.variance and self.variance.map(move))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{key} {list(mean.shape)}" for key, mean in self.mean.items())
        return f"TaskVector({self.task!r} of {self.count} prompts: {shapes})"

    def _combine(self, other: TaskVector, sign: str, function: Callable[..., Any]) -> TaskVector:
        _check_alike(other, self)
        return TaskVector(
            f"{self.task} {sign} {other.task}",
            self.mean.map(function, other.mean),
            None,
            min(self.count, other.count),
            self.fingerprint | other.fingerprint,
        )

    def _scale(self, factor: float) -> TaskVector:
        mean = self.mean.map(lambda mean: mean * factor)
        return replace(self, task=f"{factor:g} * ({self.task})", mean=mean, variance=None)


def _check_alike(other: TaskVector, first: TaskVector) -> None:
    check_compatible(other.label, other.fingerprint, f"that of {first.task!r}", first.fingerprint)
    if other.mean.keys() != first.mean.keys():
        theirs, ours = (", ".join(vector.mean.sites) for vector in (other, first))
        raise ValueError(f"{other.label} has the sites {theirs}, that of {first.task!r} {ours}; collect the same.")


@dataclass(frozen=True, eq=False)
class Activations(Linear):
    """What single prompts' activations are, a row for each: `patch` puts them into as many other prompts, row by row,
    such as a one-shot run into the query alone, or the run under another task's example into this one. Two of as many
    rows add, and they scale, as vectors do.

        >>> with model.trace(prompts):
        ...     run = capture(model)                          # or Activations.collect(model, prompts), batch by batch
        >>> with model.trace(prompts.query_only()):
        ...     patch(model, run, units)

    Args:
        values: By stage and site, [row, layer, position, head, head_dim]; NaN at layers that were not captured and at
            positions that a row does not have.
        fingerprint: The model and, of prompts, the layout that they belong to (see
            `vectors.compatibility.fingerprint`).
    """

    values: ByStage
    fingerprint: dict[str, Any]
    _gradients: ByStage = field(default_factory=ByStage, init=False, repr=False)
    label = "the activations"

    def __post_init__(self) -> None:
        files.check_floating(self.values, self.label, "[row, layer, position, head, head_dim]")

    @classmethod
    def collect(
        cls,
        model: InContextModel,
        prompts: Prompts,
        *,
        sites: str | Sequence[str] = HEADS,
        batch_size: int | None = None,
        progress: bool = True,
        remote: bool | str | None = None,
    ) -> Activations:
        """Run prompts through the model and keep all that every head says, on the CPU and in the model's dtype. (A
        prompt of a ViT-L takes 23 MB in float32.) Arguments are `TaskVectors.collect`'s.

        Raises:
            ValueError: when there are no prompts, or the model has no such site.
        """
        return cls(*collect_rows(model, prompts, sites, batch_size=batch_size, progress=progress, remote=remote))

    @cached_property
    def present(self) -> ByStage:
        """By stage, bool [position]: the positions that are absent in no row."""
        return self.present_rows.map(lambda present: present.all(0))

    @cached_property
    def present_rows(self) -> ByStage:
        """By stage, bool [row, position]: the positions that are not absent."""
        return self.values.map(lambda values: (~values[..., 0, 0].isnan()).any(1))

    @cached_property
    def layers(self) -> ByStage:
        """By stage, the numbers of the layers that were captured."""
        there = self.values.map(lambda values: (~values[..., 0, 0].isnan()).any(2).any(0))
        return there.map(lambda present: present.nonzero()[:, 0].tolist())

    @property
    def grad(self) -> ByStage:
        """The gradients of a loss with respect to what was captured, after its `backward()`: as `values`, and added up
        over several backward passes.

        Raises:
            ValueError: when no gradient came.
        """
        if not self._gradients:
            raise ValueError("no gradient came to these activations; call backward() on a loss of the same run.")
        return self.values.map(
            lambda values, slopes: slopes.masked_fill(values.isnan(), torch.nan),
            {key: self._gradients.get(key, torch.zeros_like(values)) for key, values in self.values.items()},
        )

    def add_gradient(self, key: StageSite, layer: int, gradient: torch.Tensor, seen: torch.Tensor) -> None:
        """Add the gradient of a layer, [batch, token, head, head_dim] at the positions `seen`, to `grad`."""
        if key not in self._gradients:
            self._gradients[key] = torch.zeros_like(self.values[key])
        there = torch.zeros_like(self._gradients[key][:, :1])
        put(there, 0, gradient, seen)
        self._gradients[key][:, layer] += there[:, 0]

    def __len__(self) -> int:
        return len(next(iter(self.values.values()))) if self.values else 0

    def __getitem__(self, rows: int | slice | Sequence[int] | torch.Tensor) -> Activations:
        """Those of some prompts, always several rows: an int gives one."""
        rows = as_rows(rows.cpu() if isinstance(rows, torch.Tensor) else rows, len(self))
        return replace(self, values=self.values.map(lambda values: values[rows]))

    def to(self, *args: Any, **kwargs: Any) -> Activations:
        """Move or cast, as `torch.Tensor.to` does."""
        return replace(self, values=self.values.map(lambda x: x.to(*args, **kwargs)))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: the layers and positions that are present, in their dtype, with the fingerprint."""
        files.write_activations(path, self.values, self.fingerprint)

    @classmethod
    def load(cls, path: str | Path) -> Activations:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: when there is no such file, it is incomplete or damaged, or it is something
                else.
        """
        return cls(*files.read_activations(path))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{key} {list(values.shape)}" for key, values in self.values.items())
        return f"Activations(of {len(self)} prompts: {shapes})"

    def _combine(self, other: Activations, sign: str, function: Callable[..., Any]) -> Activations:
        check_compatible("activations", other.fingerprint, "the others", self.fingerprint)
        shapes = [one.values.map(lambda values: values.shape) for one in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{self!r} {sign} {other!r} are not of as many rows, of the same stages and sites.")
        return Activations(self.values.map(function, other.values), self.fingerprint | other.fingerprint)

    def _scale(self, factor: float) -> Activations:
        return replace(self, values=self.values.map(lambda values: values * factor))


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
            raise KeyError(f"there is no vector of {quoted(task)}; choose from {', '.join(self)}.")
        return self._vectors[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def __repr__(self) -> str:
        return "TaskVectors(\n" + "".join(f"  {vector!r}\n" for vector in self.values()) + ")"

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that were collected, in the order in which a layer computes them."""
        return next(iter(self.values())).mean.sites

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of its first vector; the others agree with it."""
        return next(iter(self.values())).fingerprint

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
        prompts: Mapping[str, Prompts],
        *,
        sites: str | Sequence[str] = HEADS,
        batch_size: int | None = None,
        progress: bool = True,
        remote: bool | str | None = None,
    ) -> TaskVectors:
        """Run prompts through the model and average what every head says (ECCV 2024, §4.1).

        One trace a batch. Means and variances are accumulated in float64 (Chan, Golub and LeVeque, 1979), so that the
        batch size does not show in them, and kept in float32.

        Args:
            model: The model, on its device and in its dtype.
            prompts: Task name → prompts, one or more of each and all of one layout.
            sites: What to average: "heads", "attn", "mlp", "residual", or several of them (see `models.sites`).
            batch_size: Rows a trace; None is `models.interface.default_batch_size`, 32 for MAE-VQGAN.
            progress: Show a progress bar.
            remote: Where the model runs, as for nnsight's `trace`, by default where it was made to. Means are made
                there.

        Raises:
            ValueError: when a task has no prompts, layouts differ, the model has no such site, an activation is not
                finite (naming layer and head).
        """
        options: Any = {"batch_size": batch_size, "progress": progress, "remote": remote}
        moments, owner = collect_moments(model, prompts, sites, **options)
        return cls(
            {
                task: TaskVector(task, part.mean.map(torch.Tensor.float), part.variance(), part.prompts, owner)
                for task, part in moments.items()
            }
        )

    def score(self, over: str | None = None) -> ByStage:
        """How well a head tells the tasks apart: the variance of the tasks' means over the mean variance within a task,
        both averaged over the head's dimensions (ECCV 2024, §4.2).

        Args:
            over: None for [layer, head, position]; "position" sums both variances over the positions first,
                for [layer, head]; "head" over the heads, for [layer, position].

        Returns:
            Ratios by stage; NaN at the positions that some task lacks, 0 where nothing varies.

        Raises:
            ValueError: with fewer than two tasks, a task of fewer than two prompts, or a vector that is not finite.
        """
        dims = {None: None, "position": 1, "head": 2}
        if over not in dims:
            raise ValueError(f"over={over!r} cannot be summed over; choose 'position', 'head' or None.")
        if len(self) < 2:
            raise ValueError(f"a score compares tasks and there is only {', '.join(self)}; collect two or more.")
        means, variances = [vector.mean for vector in self.values()], []
        for name, vector in self.items():
            if vector.variance is None:
                raise ValueError(f"the vector of {name!r} has no variance; collect it from two or more prompts.")
            files.present_positions(vector.mean, vector.label)
            variances.append(vector.variance)

        def ratio(means: list[torch.Tensor], variances: list[torch.Tensor]) -> torch.Tensor:
            between = torch.stack(means).double().var(0).mean(-1)
            within = torch.stack(variances).double().mean(0)
            absent = between.isnan() | within.isnan()
            if over:
                between, within = (v.masked_fill(absent, 0).sum(dims[over]) for v in (between, within))
                absent = absent.all(dims[over])
            scores = torch.where(between > 0, between / within, 0.0).masked_fill(absent, torch.nan).float()
            return scores if over else rearrange(scores, "layer position head -> layer head position")

        return ByStage({key: ratio([m[key] for m in means], [v[key] for v in variances]) for key in means[0]})

    def _repr_png_(self) -> bytes | None:
        """How well each head tells the tasks apart, in a notebook; none of a single task."""
        if len(self) < 2 or any(vector.variance is None for vector in self.values()):
            return None
        return maps.png(maps.score_map(self.score(), layout_of(self.fingerprint)))

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a safetensors file: the positions that are present, with counts and fingerprint. `load` gives float32,
        whatever dtype the file has.

        Raises:
            ValueError: when a value is NaN, infinite, or too large for the dtype.
        """
        content = {name: (vector.mean, vector.variance, vector.count) for name, vector in self.items()}
        files.write_vectors(path, content, self.fingerprint, dtype)

    @classmethod
    def load(cls, path: str | Path) -> TaskVectors:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: when there is no such file, it is incomplete or damaged, or it is something
                else.
        """
        content, owner = files.read_vectors(path)
        return cls({name: TaskVector(name, *fields, owner) for name, fields in content.items()})
