"""Where a task vector goes: the units that can be chosen, sets of them, and the intervention itself.

    >>> space = PatchSpace(model, prompts.layout, granularity="quadrant")
    >>> chosen = PatchSet.random(space, 40)
    >>> with model.trace(prompts.query_only()):
    ...     patch(model, vectors["segmentation"], chosen)
    ...     logits = model.output.logits.save()

Units are heads, or whole layers' activations: `PatchSpace(model, sites=("attn", "mlp"))` (see `sites`). The heads and
their order are those of *Finding Visual Task Vectors* (ECCV 2024, §4.3 and its released files): stage, layer, head,
then group of positions, CLS first. The units of other sites follow those of their stage's heads.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from vtv_nnsight.files import write_text
from vtv_nnsight.images import png
from vtv_nnsight.layouts import Layout, place_names
from vtv_nnsight.models.interface import HEADS, SITES, ByStage, InContextModel, Stage
from vtv_nnsight.models.sites import at_sites, module_path, read, sites_in, split_key, stage_key, validate_sites, write
from vtv_nnsight.text import join_names
from vtv_nnsight.vectors import Activations, TaskVector, TaskVectors, zero_vector
from vtv_nnsight.vectors.compatibility import check_compatible, fingerprint, geometry, layout_of, stages_of


class Units(NamedTuple):
    """Of every unit of a space, LongTensors [n]."""

    stack: torch.Tensor
    """The number of its stage among `PatchSpace.stages`."""
    layer: torch.Tensor
    head: torch.Tensor
    group: torch.Tensor
    """Its number among the groups of its stage."""


class PatchSpace:
    """The units of a model that can be patched, in a fixed flat order: stage, layer, head, group of positions.

    Args:
        model: The model; its weights need not be loaded.
        layout: The layout of the prompts; the model's own by default.
        granularity: "head": all tokens of a head are one unit. "quadrant": the tokens of each region that a query-only
            prompt shows a stage; of MAE-VQGAN, CLS and query in the encoder, CLS, query and output in the decoder.
            "token": every token that a stage sees of such a prompt. "cell": the tokens of every cell of a one-shot
            prompt, the example's too.
        stacks: Names of the stages to patch; all of the model's by default.
        sites: What of a layer is patched: "heads", "attn" (the attention's output), "mlp", "residual" (the layer's
            output), or several of them. A layer has one unit of a site for each group.

    Attributes:
        layout, granularity, sites: Those given.
        stages: The model's stages, with units or without, once for each site (see `sites.at_sites`).
        groups: By stage, name of a group → LongTensor of its absolute positions; none where there are no units.
        fingerprint: What a model, a vector or another space must share with it.

    Raises:
        ValueError: when the granularity is unknown, or stacks or sites are not the model's.
    """

    def __init__(
        self,
        model: InContextModel,
        layout: Layout | None = None,
        granularity: str = "quadrant",
        stacks: str | Sequence[str] | None = None,
        sites: str | Sequence[str] = HEADS,
    ) -> None:
        sites = validate_sites(model, sites)
        names = [stage.name for stage in model.stages]
        chosen = names if stacks is None else [stacks] if isinstance(stacks, str) else list(stacks)
        if not chosen or not set(chosen) <= set(names):
            raise ValueError(f"stacks={chosen} are not stages of the model; choose from {', '.join(names)}.")
        layout = layout or model.layout
        found = geometry(model, layout)
        found |= {"granularity": granularity, "stacks": [name for name in names if name in chosen]}
        groups, paths = {}, {}
        for stage in model.stages:
            for site in sites:
                name = stage_key(stage.name, site)
                paths[name] = [module_path(model, stage.name, layer, site) for layer in range(stage.layers)]
                if stage.name in chosen:
                    groups[name] = model.groups(stage.name, granularity, layout)
        self._build(found if sites == (HEADS,) else found | {"sites": list(sites)}, groups, paths)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> PatchSpace:
        """The space of `metadata`, without its model.

        Raises:
            ValueError: when it is not the metadata of a space.
        """
        try:
            found = dict(metadata)
            units = found.pop("units")
            layout = layout_of(found)
            groups = {
                stage: {name: _read_places(name, places, layout) for name, places in own["groups"].items()}
                for stage, own in units.items()
                if split_key(stage)[0] in found["stacks"]
            }
            space = cls.__new__(cls)
            space._build(found, groups, {stage: own["layers"] for stage, own in units.items()})
            if any(len(space._paths[stage.name]) != stage.layers for stage in space.stages):
                raise ValueError("it names more or fewer layers than it has")
            if not len(space):
                raise ValueError("it has no units")
        except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise ValueError(f"this is not a space of units: {reason}.") from error
        return space

    @property
    def metadata(self) -> dict[str, Any]:
        """Its fingerprint and all else that makes it, as JSON values: what `from_metadata` reads."""
        units = {
            name: {"layers": paths, "groups": {group: at.tolist() for group, at in self.groups[name].items()}}
            for name, paths in self._paths.items()
        }
        return self.fingerprint | {"units": units}

    def _build(
        self, found: dict[str, Any], groups: Mapping[str, dict[str, torch.Tensor]], paths: Mapping[str, list[str]]
    ) -> None:
        self.fingerprint, self.granularity = found, found["granularity"]
        self.layout, self.sites = layout_of(found), tuple(found.get("sites", (HEADS,)))
        if not self.sites or not set(self.sites) <= set(SITES):
            raise ValueError(f"its sites {list(self.sites)} are unknown")
        self.stages = at_sites(stages_of(found), self.sites)
        self.groups = ByStage({stage.name: groups.get(stage.name, {}) for stage in self.stages})
        self._paths = {stage.name: paths[stage.name] for stage in self.stages}
        self._group_at = self.groups.map(self._index_positions)

    def _index_positions(self, groups: dict[str, torch.Tensor]) -> torch.Tensor:
        """[position] → the number of its group; for those in none, the number of groups."""
        index = torch.full((self.layout.num_positions,), len(groups))
        for i, members in enumerate(groups.values()):
            index[members] = i
        return index

    @cached_property
    def _shapes(self) -> ByStage:
        """By stage, (layers, heads, groups)."""
        return ByStage({s.name: (s.layers, s.heads, len(self.groups[s.name])) for s in self.stages})

    @cached_property
    def _counts(self) -> ByStage:
        """By stage, the number of units."""
        return self._shapes.map(math.prod)

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __repr__(self) -> str:
        units = ", ".join(f"{stage} {count}" for stage, count in self._counts.items())
        return f"PatchSpace({len(self)} units by {self.granularity}: {units})"

    @cached_property
    def units(self) -> Units:
        """Stage, layer, head and group of every unit."""
        parts = []
        for i, shape in enumerate(self._shapes.values()):
            layer, head, group = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
            parts.append(torch.stack([torch.full_like(layer, i), layer, head, group]).flatten(1))
        return Units(*torch.cat(parts, dim=1))

    @cached_property
    def names(self) -> list[str]:
        """Such as "encoder.blocks.3.attn.heads[5] @ query", or "decoder.blocks.2.mlp @ output"."""
        paths, groups = list(self._paths.values()), [list(own) for own in self.groups.values()]
        names = []
        for stage, layer, head, group in zip(*(part.tolist() for part in self.units)):
            place = f" @ {groups[stage][group]}" if self.granularity != "head" else ""
            own = f".heads[{head}]" if split_key(self.stages[stage].name)[1] == HEADS else ""
            names.append(f"{paths[stage][layer]}{own}{place}")
        return names

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Name of a unit → its number."""
        return {name: i for i, name in enumerate(self.names)}

    def split(self, values: torch.Tensor) -> ByStage:
        """One value for each unit, [..., n] → by stage, [..., layer, head, group]."""
        if values.shape[-1:] != (len(self),):
            raise ValueError(f"values of shape {list(values.shape)} are not one for each of {len(self)} units.")
        parts = ByStage(zip(self._counts, values.split(list(self._counts.values()), dim=-1)))
        return parts.map(lambda part, shape: part.reshape(*part.shape[:-1], *shape), self._shapes)

    def mask(self, choices: torch.Tensor) -> ByStage:
        """The positions of the chosen units.

        Args:
            choices: [n] or [batch, n]; bool, or float for gates (differentiable).

        Returns:
            By stage, [layer, position, head] or [batch, layer, position, head], zero outside the units.
        """

        def spread(values: torch.Tensor, group_at: torch.Tensor) -> torch.Tensor:
            values = rearrange(values, "... layer head group -> ... layer group head")
            elsewhere = values.new_zeros(*values.shape[:-2], 1, values.shape[-1])
            return torch.cat([values, elsewhere], dim=-2).index_select(-2, group_at.to(values.device))

        return self.split(torch.as_tensor(choices)).map(spread, self._group_at)

    def average(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean over each unit's positions of values by stage, [..., layer, head, position], such as a score: [..., n].
        Positions that are NaN do not count."""
        parts = []
        for name, groups in self.groups.items():
            own = values[name]
            means = [own.index_select(-1, members.to(own.device)).nanmean(-1) for members in groups.values()]
            if means:
                parts.append(torch.stack(means, dim=-1).flatten(-3))
        return torch.cat(parts, dim=-1)


def _read_places(name: str, places: Any, layout: Layout) -> torch.Tensor:
    """The positions of a group, from a file."""
    found = torch.as_tensor(places)
    if found.dtype != torch.long or found.ndim != 1 or not ((found >= 0) & (found < layout.num_positions)).all():
        raise ValueError(f"the places of {name!r} are not positions from 0 to {layout.num_positions - 1}")
    return found


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
            if name not in space.index_of:
                raise ValueError(f"{name!r} is not a unit of {space!r}.")
            choices[space.index_of[name]] = True
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
    def mask(self) -> ByStage:
        """By stage, bool [layer, position, head]."""
        return self.space.mask(self.choices)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of its space."""
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

    def __hash__(self) -> int:
        return hash((json.dumps(self.fingerprint, sort_keys=True), self.choices.numpy().tobytes()))

    def __len__(self) -> int:
        return int(self.choices.sum())

    def __iter__(self) -> Iterator[str]:
        return (self.space.names[i] for i in self.choices.nonzero()[:, 0].tolist())

    def __contains__(self, name: str) -> bool:
        return name in self.space.index_of and bool(self.choices[self.space.index_of[name]])

    def __repr__(self) -> str:
        return f"PatchSet({len(self)} of {self.space!r})"

    def jaccard(self, other: PatchSet) -> float:
        """Size of the intersection over that of the union; 1 for two empty sets."""
        union = len(self | other)
        return len(self & other) / union if union else 1.0

    def save(self, path: str | Path) -> None:
        """Write a JSON file: the space and the units' names."""
        content = {"kind": KIND, "space": self.space.metadata, "patches": list(self)}
        text = re.sub(r"\[[\d\s,]+\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(content, indent=1))
        write_text(path, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PatchSet:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: when there is no such file, it is incomplete, or it is something else.
        """
        try:
            content = json.loads(Path(path).read_text())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no file {path}.") from error
        except ValueError as error:
            raise ValueError(f"{path} is not a complete patch set ({error}); make it again.") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ValueError(f"{path} is not a patch set; expected what PatchSet.save writes.")
        space, names = content.get("space"), content.get("patches")
        if not isinstance(space, dict) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"{path} is not a complete patch set (it lacks its space or its patches); make it again.")
        return cls.named(PatchSpace.from_metadata(space), names)

    def _repr_png_(self) -> bytes | None:
        """Its map, in a notebook; none of single tokens, which are too many to draw."""
        from vtv_nnsight.search import plots  # which is further along, and draws what this is

        return None if self.space.granularity == "token" else png(plots.units(self))

    def _combine(self, other: PatchSet, function: Any) -> PatchSet:
        if not isinstance(other, PatchSet):
            return NotImplemented
        check_compatible("a patch set", other.fingerprint, "the other", self.fingerprint)
        return PatchSet(self.space, function(self.choices, other.choices))


KIND = "patch set"


def patch(
    model: InContextModel,
    vector: TaskVector | Activations | Sequence[TaskVector | Activations],
    patches: PatchSet | Mapping[str, torch.Tensor] | Sequence[PatchSet | Mapping[str, torch.Tensor]],
    *,
    scale: float = 1.0,
    mode: str = "replace",
) -> None:
    """Put a task vector's activations in the place of the model's own, inside `trace`, `generate` or `edit`.

    A block goes through the model once, and so does this: call it once in a block (lists of vectors and of patches
    patch several, later ones on top), before anything else that the block reads of the model's stages. What
    lies before the last patched layer is read in a block of its own, which sees the patches:

        with model.trace() as tracer:
            with tracer.invoke(prompts):
                patch(model, vector, patches)
            with tracer.invoke():
                z = model.attention("decoder", 0).heads.save()

    Args:
        model: The model that is traced (or the one that `edit` hands out).
        vector: What to put there; faster when it is on the model's device. `Activations` have a row for each row of the
            batch.
        patches: Where. A PatchSet, or what `PatchSpace.mask` returns: by stage, [layer, position, head] for all rows,
            or [batch, layer, position, head] with a mask for each row. Float masks are gates, which mix the two
            activations and through which gradients flow.
        scale: How far to go: 0 leaves an activation as it is, 1 replaces it, 2 goes as far again. With mode="add", how
            much of the vector to add.
        mode: "replace": the vector in the place of the activation. "add": the vector on top of it, as one steers
            language models.

    Raises:
        ValueError: when vector, patches and model do not belong together, naming what differs, or when patches ask for
            positions or sites that the vector lacks or positions that the prompt does not show. (A whole head is
            patched at the tokens there are.)
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}.")
    single = (TaskVector, Activations, PatchSet, Mapping)
    vectors, sets = ([x] if isinstance(x, single) else list(x) for x in (vector, patches))
    if len(vectors) != len(sets):
        raise ValueError(f"{len(vectors)} vectors and {len(sets)} patch sets were given; give as many of both.")
    own = fingerprint(model, cached=True)
    with unset_fake_temporarily():  # in a scan, too, what is patched is real
        masks = [chosen.mask if isinstance(chosen, PatchSet) else chosen for chosen in sets]
    for v, chosen in zip(vectors, sets):
        check_compatible(v.label, v.fingerprint, "this model", own)
        if isinstance(chosen, PatchSet):
            check_compatible("the patch set", chosen.fingerprint, "this model", own)
            check_compatible("the patch set", chosen.fingerprint, v.label, v.fingerprint)
    known = {stage_key(stage, site) for stage in own["stages"] for site in SITES}
    if unknown := [name for mask in masks for name in mask if name not in known]:
        raise ValueError(f"a mask of {unknown[0]!r} was given; this model has {', '.join(own['stages'])}.")
    for stage in stages_of(own):
        with unset_fake_temporarily():
            steps = [
                _Step(stage, site, v, mask[stage_key(stage.name, site)], scale, mode)
                for site in SITES
                for v, mask in zip(vectors, masks)
                if stage_key(stage.name, site) in mask
            ]
        layers = sorted({layer for step in steps for layer in step.layers})
        if not layers:
            continue
        seen = model.positions(stage.name)
        if not isinstance(seen, FakeTensor):
            for step in steps:
                step.check(seen.cpu(), model)
        for layer in layers:
            for step in steps:
                if layer in step.layers:
                    step.apply(model, layer, seen)


MODES = ("replace", "add")
"""What `patch` can do with a vector."""


def ablate(
    model: InContextModel,
    patches: PatchSet | Mapping[str, torch.Tensor],
    to: str | TaskVector | TaskVectors | Activations = "zero",
) -> None:
    """Silence units: `patch` with what says nothing of the task.

    Args:
        model, patches: As for `patch`.
        to: "zero"; a vector, or all tasks' `TaskVectors`, whose mean is taken; or `Activations`, such as those of the
            same queries under another task's example (resample ablation).

    Raises:
        ValueError: as `patch` does, and when `to` is something else.
    """
    with unset_fake_temporarily():
        if isinstance(to, str) and to == "zero":
            to = zero_vector(model, SITES)
        elif isinstance(to, TaskVectors):
            to = to.mean()
        elif not isinstance(to, (TaskVector, Activations)):
            raise ValueError(f'to={to!r} is unknown; give "zero", a vector, TaskVectors (their mean) or Activations.')
    patch(model, to, patches)


class _Step:
    """One vector and its mask, at one site of a stage."""

    def __init__(
        self, stage: Stage, site: str, vector: TaskVector | Activations, mask: torch.Tensor, scale: float, mode: str
    ) -> None:
        self.stage, self.site, self.vector, self.mode = stage, site, vector, mode
        name = stage_key(stage.name, site)
        values = vector.values.get(name)
        if values is not None and (mask.ndim not in (3, 4) or mask.shape[-3:] != values.shape[-4:-1]):
            raise ValueError(
                f"a mask of shape {list(mask.shape)} does not fit the {name}; expected [layer, position, head] = "
                f"{list(values.shape[-4:-1])}, with or without a batch in front."
            )
        asked = mask if mask.dtype == torch.bool else mask.detach() != 0
        self.asked = (asked.any(0) if asked.ndim == 4 else asked).cpu()
        busy = self.asked.flatten(1).any(1) | mask.requires_grad  # gates that are 0 need their gradient, too
        self.layers = set(busy.nonzero()[:, 0].tolist())
        if not self.layers:
            return
        if values is None:
            raise ValueError(
                f"{vector.label}: there is no {site} of the {stage.name}, only {', '.join(sites_in(vector.values))}; "
                f"collect with sites={[*sites_in(vector.values), site]}."
            )
        self.values, self.present, self.shown = values, vector.present[name], None
        self.mask = mask if mask.dtype == torch.bool and scale == 1 and mode == "replace" else mask * scale

    def check(self, seen: torch.Tensor, model: InContextModel) -> None:
        """Refuse what cannot be patched at the positions `seen`, [token] or [batch, token]; of a whole head, those that
        are not shown may be left out."""
        if not self.layers:
            return
        rows = seen if seen.ndim == 2 else seen[None]
        shown = torch.zeros(len(rows), self.asked.shape[1], dtype=torch.bool).scatter_(1, rows, True)
        asked = self.asked.any(2).any(0)
        hidden, lacked = asked & ~shown.all(0), asked & shown.any(0) & ~self.present.cpu()
        if hidden.any():
            (everywhere,) = model.groups(self.stage.name, "head").values()
            hidden &= (self.asked & ~self.asked[:, everywhere].all(1, keepdim=True)).any(2).any(0)
        for wrong, why in (
            (hidden, "these prompts do not show them to it"),
            (lacked, f"{self.vector.label} lack{'s' if isinstance(self.vector, TaskVector) else ''} them"),
        ):
            if wrong.any():
                places = join_names(place_names(wrong.nonzero()[:, 0]))
                raise ValueError(f"the {self.stage.name} cannot be patched at {places}: {why}.")

    def apply(self, model: InContextModel, layer: int, seen: torch.Tensor) -> None:
        z = read(model, self.stage, layer, self.site)
        if isinstance(z, FakeTensor):
            return
        for given, what in ((self.mask, "a mask for"), (self.values, "activations of")):
            if given.ndim > 3 + (given is self.values) and len(given) != len(z):
                raise ValueError(f"{what} {len(given)} rows was given; this batch has {len(z)}.")
        mask = self._mask(layer, seen).to(z.device)[..., None]
        new = _at(self.values.select(-4, layer), seen).to(z)
        if mask.dtype == torch.bool and not torch.is_grad_enabled() and self.site == HEADS:
            torch.where(mask, new, z, out=z)
            return
        if mask.dtype == torch.bool:
            changed = torch.where(mask, new, z)
        else:
            there = self.present.to(z.device)[seen][..., None, None]
            step = new - z if self.mode == "replace" else new
            changed = z + mask.to(z.dtype) * torch.where(there, step, 0)
        write(model, self.stage, layer, self.site, changed)

    def _mask(self, layer: int, seen: torch.Tensor) -> torch.Tensor:
        """The mask of a layer at the positions `seen`, [token, head] or [row, token, head]."""
        if seen.ndim == 2:
            return _at(self.mask.select(-3, layer)[..., None], seen)[..., 0]
        if self.shown is None:
            self.shown = self.mask.index_select(-2, seen.to(self.mask.device))
        return self.shown.select(-3, layer)


def _at(values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """[position, head, dim], or [row, position, head, dim], at the positions `seen`, [token] or [row, token]."""
    seen = seen.to(values.device)
    if seen.ndim == 1:
        return values.index_select(-3, seen)
    if values.ndim == 3:
        return values[seen]
    return values[torch.arange(len(values), device=values.device)[:, None], seen]
