"""Task vectors: the mean output of every attention head at every position, task by task.

*Finding Visual Task Vectors* (ECCV 2024, arXiv 2404.05729), §4. The activation of a head is z = softmax(qkᵀ/√d)·v,
before the output projection:

    >>> prompts = {task.name: task.prompts(images, n=100, layout=model.layout) for task in tasks.VTV}
    >>> vectors = TaskVectors.collect(model, prompts)
    >>> vectors["segmentation"].mean.encoder.shape          # [layer, position, head, head_dim]
    >>> scores = vectors.score()                            # high where a head tells tasks apart
    >>> vectors.save("vectors.safetensors")

Positions are absolute: 0 is CLS and 1 + i is patch i (see `layouts`). What a prompt does not show a stack is NaN:
absent, not zero, and arithmetic keeps it so.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange

from vtv_nnsight.files import read_tensors, write_tensors
from vtv_nnsight.layouts import Layout, positions
from vtv_nnsight.progress import tqdm
from vtv_nnsight.prompts import VisualPrompt

SAVE_EVERY = 10.0
"""Seconds between two writes of a resumable run's state."""


class Stacks(NamedTuple):
    """One value for each stack of the model."""

    encoder: Any
    decoder: Any

    def map(self, function: Callable, *others: Stacks) -> Stacks:
        """`function` of each stack's value, beside those of `others`."""
        return Stacks(*(function(*values) for values in zip(self, *others)))


STACKS = Stacks._fields


class Sizes(NamedTuple):
    """The attention heads of a stack."""

    layers: int
    heads: int
    head_dim: int


def sizes(model: Any) -> Stacks:
    """`Sizes` of both stacks of a model (MAEVQGAN or MAEVQGANModel)."""
    config = _module(model).config
    return Stacks(
        Sizes(config.num_hidden_layers, config.num_attention_heads, config.hidden_size // config.num_attention_heads),
        Sizes(
            config.decoder_num_hidden_layers,
            config.decoder_num_attention_heads,
            config.decoder_hidden_size // config.decoder_num_attention_heads,
        ),
    )


def fingerprint(model: Any, layout: Layout | None = None) -> dict[str, Any]:
    """The facts that must agree before a vector or a patch set is used: the heads, the canvas, a few of the weights
    (where they are loaded) and, where a layout is given, its order and its examples."""
    facts = {
        f"{stack} {name}": value
        for stack, heads in sizes(model)._asdict().items()
        for name, value in heads._asdict().items()
    }
    own = (layout or _module(model).config.layout).as_dict()
    facts |= own if layout else {name: own[name] for name in ("canvas_size", "patch_size")}
    token = _module(model).decoder.mask_token.detach()
    if token.device.type != "meta" and type(token) in (torch.Tensor, torch.nn.Parameter):
        facts["weights"] = token.flatten()[:8].float().tolist()
    return facts


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What two fingerprints say differently, of the facts that both have. Weights may differ as dtypes round them."""

    def differ(name: str) -> bool:
        if name != "weights":
            return found[name] != expected[name]
        a, b = torch.tensor(found[name]), torch.tensor(expected[name])
        return bool((a - b).norm() > 0.02 * b.norm())

    names = [name for name in expected if name in found and differ(name)]
    return ["other weights" if n == "weights" else f"{n} {found[n]!r}, not {expected[n]!r}" for n in names]


def refuse(what: str, found: Mapping[str, Any], owner: str, expected: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the differences, where there are any."""
    if differ := differences(found, expected):
        raise ValueError(f"{what} does not fit {owner}: it has {'; '.join(differ)}.")


@dataclass(frozen=True, eq=False)
class TaskVector:
    """The mean activation of every head, for one task. Vectors add and scale: `a + b - c`, `0.5 * a`, `-a`.

    Args:
        task: Its name.
        mean: Stacks of [layer, position, head, head_dim]; NaN at the positions that the prompts did not show.
        variance: Stacks of [layer, position, head]: variance over the prompts (n - 1 below), averaged over the head's
            dimensions; None for a vector that arithmetic made.
        count: Number of prompts.
        fingerprint: The model and the layout that it belongs to.
    """

    task: str
    mean: Stacks
    variance: Stacks | None
    count: int
    fingerprint: dict[str, Any]

    @cached_property
    def present(self) -> Stacks:
        """Stacks of bool [position]: the positions that are not absent."""
        return self.mean.map(lambda mean: ~mean[0, :, 0, 0].isnan())

    def to(self, *args: Any, **kwargs: Any) -> TaskVector:
        """Move or cast, as `torch.Tensor.to` does."""
        mean, variance = (
            stacks and stacks.map(lambda x: x.to(*args, **kwargs)) for stacks in (self.mean, self.variance)
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
        shapes = ", ".join(f"{stack} {list(mean.shape)}" for stack, mean in self.mean._asdict().items())
        return f"TaskVector({self.task!r} of {self.count} prompts: {shapes})"

    def _combine(self, other: TaskVector, sign: str, function: Callable) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        refuse(f"the vector of {other.task!r}", other.fingerprint, f"that of {self.task!r}", self.fingerprint)
        return TaskVector(
            f"{self.task} {sign} {other.task}",
            self.mean.map(function, other.mean),
            None,
            min(self.count, other.count),
            self.fingerprint | other.fingerprint,
        )


def zero_vector(model: Any) -> TaskVector:
    """Zeros at every position, whatever the layout: what ablation by zero patches in."""
    places = _module(model).config.layout.num_positions
    mean = sizes(model).map(lambda size: torch.zeros(size.layers, places, size.heads, size.head_dim))
    return TaskVector("zero", mean, None, 0, fingerprint(model))


class TaskVectors(Mapping[str, TaskVector]):
    """Task name → TaskVector, all of one model and one layout.

    Args:
        vectors: The vectors; their names are their tasks'.

    Raises:
        ValueError: when there are none, or when one belongs to another model or layout than the first.
    """

    def __init__(self, vectors: Mapping[str, TaskVector]) -> None:
        if not vectors:
            raise ValueError("there are no task vectors; give at least one.")
        first, *others = vectors.values()
        for other in others:
            refuse(f"the vector of {other.task!r}", other.fingerprint, f"that of {first.task!r}", first.fingerprint)
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
        model: Any,
        prompts: Mapping[str, VisualPrompt],
        *,
        batch_size: int = 32,
        resume: str | Path | None = None,
        progress: bool = True,
    ) -> TaskVectors:
        """Run prompts through the model and average what every head says (ECCV 2024, §4.1).

        One trace a batch. Means and variances are accumulated in float64 (Chan, Golub and LeVeque, 1979), so that the
        batch size does not show in them, and kept in float32.

        Args:
            model: A MAEVQGAN, on its device and in its dtype.
            prompts: Task name → prompts, one or more of each and all of one layout.
            batch_size: Rows a trace.
            resume: A file for the state, written every few seconds; a run that finds it goes on where it stopped.
            progress: Show a progress bar.

        Raises:
            ValueError: when a task has no prompts, layouts differ, an activation is not finite (naming layer and head),
                or `resume` is of other prompts or another model.
        """
        layout = _shared_layout(prompts)
        device = ready(model)
        facts = fingerprint(model, layout)
        found = _read_state(resume, facts, prompts) if resume else {}
        saved = time.monotonic()
        total, done = sum(map(len, prompts.values())), sum(moments.count for moments in found.values())
        with tqdm(total=total, initial=done, desc="collecting", unit="prompt", disable=not progress) as bar:
            for task, rows in prompts.items():
                bar.set_postfix_str(task)
                rows = rows[found[task].count :] if task in found else rows
                for batch in rows.split(batch_size):
                    new = measure(model, batch.to(device))
                    found[task] = _merge(found[task], new) if task in found else new
                    bar.update(len(batch))
                    if resume and time.monotonic() - saved > SAVE_EVERY:
                        _write_state(resume, found, facts, prompts)
                        saved = time.monotonic()
        if resume:
            _write_state(resume, found, facts, prompts)
        return cls({task: found[task].vector(task, facts) for task in prompts})

    def score(self, over: str | None = None) -> Stacks:
        """How well a head tells the tasks apart: the variance of the tasks' means over the mean variance within a task,
        both averaged over the head's dimensions (ECCV 2024, §4.2).

        Args:
            over: None for Stacks of [layer, head, position]; "position" sums both variances over the positions first,
                for [layer, head]; "head" over the heads, for [layer, position].

        Returns:
            Ratios; NaN at the positions that some task lacks, 0 where nothing varies.

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

        means, variances = zip(*[(vector.mean, vector.variance) for vector in self.values()])
        return Stacks(*map(ratio, zip(*means), zip(*variances)))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: the positions that are present, in float32, with counts and fingerprint."""
        tensors = {}
        for name, vector in self.items():
            for stack, present in vector.present._asdict().items():
                tensors[f"{name}/{stack}/present"] = present
                for field in ("mean", "variance"):
                    if stacks := getattr(vector, field):
                        tensors[f"{name}/{stack}/{field}"] = getattr(stacks, stack)[:, present].float()
        facts = {"counts": {name: vector.count for name, vector in self.items()}}
        write_tensors(path, "task vectors", tensors, facts | {"fingerprint": next(iter(self.values())).fingerprint})

    @classmethod
    def load(cls, path: str | Path) -> TaskVectors:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: when there is no such file, it is incomplete, or it is something else.
        """
        tensors, facts = read_tensors(path, "task vectors")

        def stacks(name: str, field: str) -> Stacks | None:
            if f"{name}/encoder/{field}" not in tensors:
                return None
            presents = (tensors[f"{name}/{stack}/present"] for stack in STACKS)
            values = (tensors[f"{name}/{stack}/{field}"] for stack in STACKS)
            return Stacks(*(scatter(v, p.nonzero()[:, 0], len(p)) for v, p in zip(values, presents)))

        return cls(
            {
                name: TaskVector(name, stacks(name, "mean"), stacks(name, "variance"), count, facts["fingerprint"])
                for name, count in facts["counts"].items()
            }
        )


class Moments(NamedTuple):
    """What `collect` keeps of some prompts, in float64, NaN where absent."""

    count: int
    mean: Stacks
    """Stacks of [layer, position, head, head_dim]."""
    spread: Stacks
    """Sums of squared distances to the mean, averaged over the head's dimensions: Stacks of [layer, position, head]."""

    def vector(self, task: str, facts: dict[str, Any]) -> TaskVector:
        variance = self.spread.map(lambda spread: (spread / (self.count - 1)).float()) if self.count > 1 else None
        return TaskVector(task, self.mean.map(torch.Tensor.float), variance, self.count, facts)


def measure(model: Any, prompts: VisualPrompt) -> Moments:
    """The moments of every head over one batch of prompts, in one trace.

    Raises:
        ValueError: naming the first layer and head whose activation is not finite.
    """
    with torch.no_grad(), model.trace(prompts):
        encoder = [_moments(block.attn.heads) for block in model.encoder.blocks].save()
        decoder = [_moments(block.attn.heads) for block in model.decoder.blocks].save()
    places = prompts.layout.num_positions
    means, spreads = [], []
    for name, layers, seen in zip(STACKS, (encoder, decoder), (prompts.visible, prompts.decoded)):
        mean, spread = (torch.stack(parts).cpu() for parts in zip(*layers))
        bad = ~mean.isfinite().all(-1).all(1)
        if bad.any():
            layer, head = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name}.blocks.{layer}.attn.heads[{head}] is not finite (NaN or infinite) on these prompts; check the "
                "weights, or load the model in another dtype."
            )
        means.append(scatter(mean, positions(seen).cpu(), places))
        spreads.append(scatter(spread, positions(seen).cpu(), places))
    return Moments(len(prompts), Stacks(*means), Stacks(*spreads))


def ready(model: Any) -> torch.device:
    """Load the model's weights if they are not, and say where prompts must go."""
    model.dispatch()
    return model._module.encoder.cls_token.device


def _module(model: Any) -> Any:
    return getattr(model, "_module", model)


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


def _write_state(path: str | Path, found: dict[str, Moments], facts: dict, prompts: Mapping[str, VisualPrompt]) -> None:
    tensors = {
        f"{task}/{field}/{stack}": values
        for task, moments in found.items()
        for field in ("mean", "spread")
        for stack, values in getattr(moments, field)._asdict().items()
    }
    counts = {task: moments.count for task, moments in found.items()}
    digests = {task: _digest(rows) for task, rows in prompts.items()}
    write_tensors(path, "collection", tensors, {"counts": counts, "prompts": digests, "fingerprint": facts})


def _read_state(path: str | Path, facts: dict, prompts: Mapping[str, VisualPrompt]) -> dict[str, Moments]:
    if not Path(path).exists():
        return {}
    tensors, found = read_tensors(path, "collection")
    refuse(f"the state in {path}", found["fingerprint"], "this model and layout", facts)
    if found["prompts"] != {task: _digest(rows) for task, rows in prompts.items()}:
        raise ValueError(f"the state in {path} is of other prompts; remove it, or name another file.")

    def stacks(task: str, field: str) -> Stacks:
        return Stacks(*(tensors[f"{task}/{field}/{stack}"] for stack in STACKS))

    return {
        task: Moments(count, stacks(task, "mean"), stacks(task, "spread")) for task, count in found["counts"].items()
    }


def _digest(prompts: VisualPrompt) -> str:
    digest = hashlib.sha256()
    for tensor in (prompts.canvas, prompts.visible, prompts.decoded):
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
