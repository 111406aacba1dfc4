"""Where a task vector goes: the units that can be chosen, sets of them, and the intervention itself.

    >>> space = PatchSpace(model, prompts.layout, granularity="quadrant")
    >>> chosen = PatchSet.random(space, 40)
    >>> with model.trace(prompts.query_only()):
    ...     patch(model, vectors["segmentation"], chosen)
    ...     logits = model.output.logits.save()

Units and their order are those of *Finding Visual Task Vectors* (ECCV 2024, §4.3 and its released files): stack, layer,
head, then group of positions, CLS first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from vtv_nnsight.files import write_text
from vtv_nnsight.layouts import CLS, Layout, positions
from vtv_nnsight.vectors import STACKS, Sizes, Stacks, TaskVector, fingerprint, refuse, zero_vector

GRANULARITIES = ("head", "quadrant", "token")


class Units(NamedTuple):
    """Of every unit of a space, LongTensors [n]."""

    stack: torch.Tensor
    """Its index in `STACKS`."""
    layer: torch.Tensor
    head: torch.Tensor
    group: torch.Tensor
    """Its index among the groups of its stack."""


class PatchSpace:
    """The units of a model that can be patched, in a fixed flat order: stack, layer, head, group of positions.

    Args:
        model: A MAEVQGAN; its weights need not be loaded.
        layout: The layout of the prompts; the model's own by default.
        granularity: "head": all tokens of a head are one unit. "quadrant": the encoder's tokens are grouped as CLS and
            query, the decoder's as CLS, query and output. "token": every token that a stack sees zero-shot.
        stacks: Restrict the space to "encoder" or "decoder".

    Attributes:
        groups: Stacks of dicts: name of a group → LongTensor of its absolute positions.
        fingerprint: What a model, a vector or another space must share with it.

    Raises:
        ValueError: when granularity or stacks is none of those.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout | None = None,
        granularity: str = "quadrant",
        stacks: str | Sequence[str] = STACKS,
    ) -> None:
        stacks = [stacks] if isinstance(stacks, str) else list(stacks)
        if not stacks or not set(stacks) <= set(STACKS):
            raise ValueError(f"stacks={stacks} are not stacks of the model; choose from {', '.join(STACKS)}.")
        facts = fingerprint(model, layout or model.layout)
        facts.pop("weights", None)
        self._build(facts | {"granularity": granularity, "stacks": [s for s in STACKS if s in stacks]})

    @classmethod
    def from_fingerprint(cls, facts: dict[str, Any]) -> PatchSpace:
        """The space of a fingerprint, without its model."""
        space = cls.__new__(cls)
        space._build(facts)
        return space

    def _build(self, facts: dict[str, Any]) -> None:
        if facts["granularity"] not in GRANULARITIES:
            raise ValueError(
                f"granularity={facts['granularity']!r} is unknown; choose from {', '.join(GRANULARITIES)}."
            )
        self.fingerprint = facts
        self.granularity = facts["granularity"]
        self.layout = Layout(**{name: facts[name] for name in Layout.__dataclass_fields__ if name in facts})
        self.sizes = Stacks(*(Sizes(*(facts[f"{stack} {name}"] for name in Sizes._fields)) for stack in STACKS))
        groups = _groups(self.layout, self.granularity)
        self.groups = Stacks(*({} if s not in facts["stacks"] else g for s, g in zip(STACKS, groups)))
        self._group_at = self.groups.map(self._index_positions)

    def _index_positions(self, groups: dict[str, torch.Tensor]) -> torch.Tensor:
        """[position] → the index of its group; for those in none, the number of groups."""
        index = torch.full((self.layout.num_positions,), len(groups))
        for i, members in enumerate(groups.values()):
            index[members] = i
        return index

    @cached_property
    def _counts(self) -> Stacks:
        return self.sizes.map(lambda size, groups: size.layers * size.heads * len(groups), self.groups)

    def __len__(self) -> int:
        return sum(self._counts)

    def __repr__(self) -> str:
        units = ", ".join(f"{stack} {count}" for stack, count in self._counts._asdict().items())
        return f"PatchSpace({len(self)} units by {self.granularity}: {units})"

    @cached_property
    def units(self) -> Units:
        """Stack, layer, head and group of every unit."""
        parts = []
        for i, (size, groups) in enumerate(zip(self.sizes, self.groups)):
            axes = (torch.arange(n) for n in (size.layers, size.heads, len(groups)))
            layer, head, group = torch.meshgrid(*axes, indexing="ij")
            parts.append(torch.stack([torch.full_like(layer, i), layer, head, group]).flatten(1))
        return Units(*torch.cat(parts, dim=1))

    @cached_property
    def names(self) -> list[str]:
        """Such as "encoder.blocks.3.attn.heads[5] @ query"."""
        groups = self.groups.map(list)
        names = []
        for stack, layer, head, group in zip(*(part.tolist() for part in self.units)):
            place = f" @ {groups[stack][group]}" if self.granularity != "head" else ""
            names.append(f"{STACKS[stack]}.blocks.{layer}.attn.heads[{head}]{place}")
        return names

    @cached_property
    def rank(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def split(self, values: torch.Tensor) -> Stacks:
        """One value a unit, [..., n] → Stacks of [..., layer, head, group]."""
        if values.shape[-1:] != (len(self),):
            raise ValueError(f"values of shape {list(values.shape)} are not one for each of {len(self)} units.")
        shapes = self.sizes.map(lambda size, groups: (size.layers, size.heads, len(groups)), self.groups)
        parts = Stacks(*values.split(list(self._counts), dim=-1))
        return parts.map(lambda part, shape: part.reshape(*part.shape[:-1], *shape), shapes)

    def mask(self, choices: torch.Tensor) -> Stacks:
        """The positions of the chosen units.

        Args:
            choices: [n] or [batch, n]; bool, or float for gates (differentiable).

        Returns:
            Stacks of [layer, position, head] or [batch, layer, position, head], zero outside the units.
        """

        def spread(values: torch.Tensor, group_at: torch.Tensor) -> torch.Tensor:
            values = rearrange(values, "... layer head group -> ... layer group head")
            elsewhere = values.new_zeros(*values.shape[:-2], 1, values.shape[-1])
            return torch.cat([values, elsewhere], dim=-2).index_select(-2, group_at.to(values.device))

        return self.split(torch.as_tensor(choices)).map(spread, self._group_at)

    def average(self, values: Stacks) -> torch.Tensor:
        """Mean over each unit's positions of Stacks of [..., layer, head, position], such as a score: [..., n].
        Positions that are NaN do not count."""
        parts = []
        for stack, groups in zip(values, self.groups):
            means = [stack.index_select(-1, members.to(stack.device)).nanmean(-1) for members in groups.values()]
            if means:
                parts.append(torch.stack(means, dim=-1).flatten(-3))
        return torch.cat(parts, dim=-1)


def _groups(layout: Layout, granularity: str) -> Stacks:
    if granularity == "head":
        everywhere = {"all tokens": positions(layout.all_patches)}
        return Stacks(everywhere, everywhere)
    cls = {"cls": torch.tensor([CLS])}
    if granularity == "quadrant":
        regions = {name: positions(layout.regions[name])[1:] for name in ("query", "output")}
        return Stacks(cls | {"query": regions["query"]}, cls | regions)
    seen = Stacks(layout.regions["query"], layout.query_band)
    return seen.map(lambda ids: cls | {f"patch {i}": place for i, place in zip(ids.tolist(), positions(ids)[1:, None])})


@dataclass(frozen=True, eq=False)
class PatchSet:
    """Some units of a space, as a set: `|`, `&`, `-`, `in`, `len`, and iteration over names.

    Args:
        space: The space.
        choices: bool [n], one for each of its units.

    Raises:
        ValueError: when choices are not one for each unit, or two sets are of different spaces.
    """

    space: PatchSpace
    choices: torch.Tensor

    def __post_init__(self) -> None:
        choices = torch.as_tensor(self.choices).detach().cpu().bool()
        if choices.shape != (len(self.space),):
            raise ValueError(f"choices of shape {list(choices.shape)} are not one for each of {len(self.space)} units.")
        object.__setattr__(self, "choices", choices)

    @classmethod
    def named(cls, space: PatchSpace, names: Iterable[str]) -> PatchSet:
        """The units of these names."""
        choices = torch.zeros(len(space), dtype=torch.bool)
        for name in names:
            if name not in space.rank:
                raise ValueError(f"{name!r} is not a unit of {space!r}.")
            choices[space.rank[name]] = True
        return cls(space, choices)

    @classmethod
    def random(cls, space: PatchSpace, k: int, seed: int = 0) -> PatchSet:
        """`k` units drawn without replacement."""
        if not 0 <= k <= len(space):
            raise ValueError(f"k={k} units were asked for; {space!r} has {len(space)}.")
        choices = torch.zeros(len(space), dtype=torch.bool)
        choices[torch.randperm(len(space), generator=torch.Generator().manual_seed(seed))[:k]] = True
        return cls(space, choices)

    @cached_property
    def mask(self) -> Stacks:
        """Stacks of bool [layer, position, head]."""
        return self.space.mask(self.choices)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.space.fingerprint

    def __or__(self, other: PatchSet) -> PatchSet:
        return self._combine(other, torch.logical_or)

    def __and__(self, other: PatchSet) -> PatchSet:
        return self._combine(other, torch.logical_and)

    def __sub__(self, other: PatchSet) -> PatchSet:
        return self._combine(other, torch.gt)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PatchSet):
            return NotImplemented
        return self.fingerprint == other.fingerprint and torch.equal(self.choices, other.choices)

    def __len__(self) -> int:
        return int(self.choices.sum())

    def __iter__(self) -> Iterator[str]:
        return (self.space.names[i] for i in self.choices.nonzero()[:, 0].tolist())

    def __contains__(self, name: str) -> bool:
        return name in self.space.rank and bool(self.choices[self.space.rank[name]])

    def __repr__(self) -> str:
        return f"PatchSet({len(self)} of {self.space!r})"

    def jaccard(self, other: PatchSet) -> float:
        """Size of the intersection over that of the union; 1 for two empty sets."""
        union = len(self | other)
        return len(self & other) / union if union else 1.0

    def save(self, path: str | Path) -> None:
        """Write a JSON file: the space's fingerprint and the units' names."""
        facts = {"kind": "patch set", "space": self.fingerprint, "patches": list(self)}
        write_text(path, json.dumps(facts, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PatchSet:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: when there is no such file, it is incomplete, or it is something else.
        """
        try:
            facts = json.loads(Path(path).read_text())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no file {path}.") from error
        except ValueError as error:
            raise ValueError(f"{path} is not a complete patch set ({error}); make it again.") from error
        if not isinstance(facts, dict) or facts.get("kind") != "patch set":
            raise ValueError(f"{path} is not a patch set; expected what PatchSet.save writes.")
        return cls.named(PatchSpace.from_fingerprint(facts["space"]), facts["patches"])

    def _combine(self, other: PatchSet, function: Any) -> PatchSet:
        if not isinstance(other, PatchSet):
            return NotImplemented
        refuse("a patch set", other.fingerprint, "the other", self.fingerprint)
        return PatchSet(self.space, function(self.choices, other.choices))


def patch(
    model: Any,
    vector: TaskVector | Sequence[TaskVector],
    patches: PatchSet | Stacks | Sequence[PatchSet | Stacks],
    *,
    scale: float = 1.0,
) -> None:
    """Put a task vector's activations in the place of the model's own, inside `trace`, `generate` or `edit`.

    A block goes through the model once, and so does this: call it once in a block (lists of vectors and of patches
    patch several, later ones on top), before anything else that the block reads of the encoder or the decoder. What
    lies before the last patched layer is read in a block of its own, which sees the patches:

        with model.trace() as tracer:
            with tracer.invoke(prompts):
                patch(model, vector, patches)
            with tracer.invoke():
                z = model.decoder.blocks[0].attn.heads.save()

    Args:
        model: The model that is traced (or the one that `edit` hands out).
        vector: What to put there; faster when it is on the model's device.
        patches: Where. A PatchSet, or what `PatchSpace.mask` returns: Stacks of [layer, position, head] for all rows,
            or of [batch, layer, position, head] with a mask for each row. Float masks are gates, which mix the two
            activations and through which gradients flow.
        scale: How far to go: 0 leaves an activation as it is, 1 replaces it, 2 goes as far again.

    Raises:
        ValueError: when vector, patches and model do not belong together, naming what differs, or when patches ask for
            positions that the vector lacks or the prompt does not show. (A whole head is patched at the tokens there
            are.)
    """
    vectors, sets = ([x] if isinstance(x, (TaskVector, PatchSet, Stacks)) else list(x) for x in (vector, patches))
    if len(vectors) != len(sets):
        raise ValueError(f"{len(vectors)} vectors and {len(sets)} patch sets were given; give as many of both.")
    facts = fingerprint(model)
    with unset_fake_temporarily():  # in a scan, too, what is patched is real
        masks = [chosen.mask if isinstance(chosen, PatchSet) else chosen for chosen in sets]
    for v, chosen in zip(vectors, sets):
        refuse(f"the vector of {v.task!r}", v.fingerprint, "this model", facts)
        if isinstance(chosen, PatchSet):
            refuse("the patch set", chosen.fingerprint, "this model", facts)
            refuse("the patch set", chosen.fingerprint, f"the vector of {v.task!r}", v.fingerprint)
    for stack in STACKS:
        with unset_fake_temporarily():
            steps = [_Step(stack, v, getattr(mask, stack), scale) for v, mask in zip(vectors, masks)]
        layers = sorted({layer for step in steps for layer in step.layers})
        if not layers:
            continue
        envoy = getattr(model, stack)
        seen = envoy.positions
        if not isinstance(seen, FakeTensor):
            for step in steps:
                step.check(seen.cpu())
        for layer in layers:
            for step in steps:
                if layer in step.layers:
                    step.apply(envoy.blocks[layer].attn, layer, seen)


def ablate(model: Any, patches: PatchSet | Stacks, to: TaskVector | None = None) -> None:
    """Silence units: `patch` with zeros, or with `to`, such as the mean over tasks (`vectors.mean()`)."""
    with unset_fake_temporarily():
        to = zero_vector(model) if to is None else to
    patch(model, to, patches)


class _Step:
    """One vector and its mask, in one stack."""

    def __init__(self, stack: str, vector: TaskVector, mask: torch.Tensor, scale: float) -> None:
        self.stack, self.vector, self.scale = stack, vector, scale
        self.values, self.present = getattr(vector.mean, stack), getattr(vector.present, stack)
        if mask.ndim not in (3, 4) or mask.shape[-3:] != self.values.shape[:3]:
            raise ValueError(
                f"a mask of shape {list(mask.shape)} does not fit the {stack}; expected [layer, position, head] = "
                f"{list(self.values.shape[:3])}, with or without a batch in front."
            )
        self.mask = mask if mask.dtype == torch.bool and scale == 1 else mask * scale
        asked = mask if mask.dtype == torch.bool else mask.detach() != 0
        self.asked = (asked.any(0) if asked.ndim == 4 else asked).cpu()
        busy = self.asked.flatten(1).any(1) | mask.requires_grad  # gates that are 0 need their gradient, too
        self.layers = set(busy.nonzero()[:, 0].tolist())

    def check(self, seen: torch.Tensor) -> None:
        """Refuse what cannot be patched at the positions `seen` [token]."""
        shown = torch.zeros(self.asked.shape[1], dtype=torch.bool).index_fill(0, seen, True)
        whole = self.asked.all(1, keepdim=True)
        for wrong, why in (
            ((self.asked & ~whole).any(2).any(0) & ~shown, "these prompts do not show them to it"),
            (self.asked.any(2).any(0) & shown & ~self.present.cpu(), f"the vector of {self.vector.task!r} lacks them"),
        ):
            if wrong.any():
                places = ["cls" if p == CLS else f"patch {p - 1}" for p in wrong.nonzero()[:, 0].tolist()]
                more = f" and {len(places) - 4} more" if len(places) > 4 else ""
                raise ValueError(f"the {self.stack} cannot be patched at {', '.join(places[:4])}{more}: {why}.")

    def apply(self, attention: Any, layer: int, seen: torch.Tensor) -> None:
        z = attention.heads
        if isinstance(z, FakeTensor):
            return
        if self.mask.ndim == 4 and len(self.mask) != len(z):
            raise ValueError(f"a mask for {len(self.mask)} rows was given; this batch has {len(z)}.")
        mask = self.mask.select(-3, layer).to(z.device).index_select(-2, seen)[..., None]
        new = self.values[layer].index_select(0, seen.to(self.values.device)).to(z)
        if mask.dtype != torch.bool:
            there = self.present.to(z.device)[seen][:, None, None]
            attention.heads = z + mask.to(z.dtype) * torch.where(there, new - z, 0)
        elif torch.is_grad_enabled():
            attention.heads = torch.where(mask, new, z)
        else:
            torch.where(mask, new, z, out=z)
