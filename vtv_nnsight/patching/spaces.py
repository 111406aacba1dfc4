"""The units of a model that can be patched, in a fixed order.

    >>> space = PatchSpace(model, prompts.layout, granularity="quadrant")
    >>> space.names[0]
    'encoder.blocks.0.attn.heads[0] @ cls'

Units are heads, or whole layers' activations: `PatchSpace(model, sites=("attn", "mlp"))` (see `models.sites`). The
heads and their order are those of *Finding Visual Task Vectors* (ECCV 2024, §4.3 and its released files): stage, layer,
head, then group of positions, CLS first. The units of other sites follow those of their stage's heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from einops import rearrange

from vtv_nnsight.files import refusing
from vtv_nnsight.models.interface import GRANULARITIES, HEADS, SITES, ByStage, InContextModel
from vtv_nnsight.models.sites import module_path, validate_sites, validate_stages
from vtv_nnsight.text import check_kind
from vtv_nnsight.vectors.compatibility import geometry, layout_of, stages_of


class Units(NamedTuple):
    """Of every unit of a space, LongTensors [n]."""

    stage: torch.Tensor
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
        stages: Names of the stages to patch; all of the model's by default.
        sites: What of a layer is patched: "heads", "attn" (the attention's output), "mlp", "residual" (the layer's
            output), or several of them. A layer has one unit of a site for each group.

    Attributes:
        layout, granularity, sites: Those given.
        stages: The model's stages, with units or without, once for each site (see `Stage.at`).
        groups: By stage and site, name of a group → LongTensor of its absolute positions; none where there are no
            units.
        fingerprint: What a model, a vector or another space must share with it.

    Raises:
        ValueError: when the granularity is unknown, or stages or sites are not the model's.
    """

    def __init__(
        self,
        model: InContextModel,
        layout: Any = None,
        granularity: str = "quadrant",
        stages: str | Sequence[str] | None = None,
        sites: str | Sequence[str] = HEADS,
    ) -> None:
        check_kind(model, InContextModel, "a space's model", "a model, such as MAEVQGAN()")
        layout = layout or model.layout
        check_kind(layout, type(model.layout), "layout", "a layout, such as that of the prompts")
        sites = validate_sites(model, sites)
        patched = [stage.name for stage in validate_stages(model, stages)]
        facts = geometry(model, layout) | {"granularity": granularity, "patched_stages": patched}
        groups, paths = ByStage(), ByStage()
        for stage in (stage.at(site) for stage in model.stages for site in sites):
            paths[stage.key] = [module_path(model, stage, layer) for layer in range(stage.layers)]
            if stage.name in patched:
                groups[stage.key] = model.groups(stage.name, granularity, layout)
        self._build(facts if sites == (HEADS,) else facts | {"sites": list(sites)}, groups, paths)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> PatchSpace:
        """The space of `metadata`, without its model.

        Raises:
            ValueError: when it is not the metadata of a space.
        """
        with refusing("this metadata", "is not that of a space of units"):
            facts = dict(metadata)
            units = facts.pop("units")
            layout, sites = layout_of(facts), facts.get("sites", (HEADS,))
            groups, paths = ByStage(), ByStage()
            for stage in (stage.at(site) for stage in stages_of(facts) for site in sites):
                content = units[str(stage.key)]
                paths[stage.key] = content["layers"]
                if stage.name in facts["patched_stages"]:
                    groups[stage.key] = {n: _read_places(n, at, layout) for n, at in content["groups"].items()}
                if len(paths[stage.key]) != stage.layers:
                    raise ValueError("it names more or fewer layers than it has")
            space = cls.__new__(cls)
            space._build(facts, groups, paths)
            if not len(space):
                raise ValueError("it has no units")
        return space

    @property
    def metadata(self) -> dict[str, Any]:
        """Its fingerprint and all else that makes it, as JSON values: what `from_metadata` reads."""
        units = {
            str(key): {"layers": paths, "groups": {group: at.tolist() for group, at in self.groups[key].items()}}
            for key, paths in self._paths.items()
        }
        return self.fingerprint | {"units": units}

    def _build(self, facts: dict[str, Any], groups: ByStage, paths: ByStage) -> None:
        self.fingerprint, self.granularity = facts, facts["granularity"]
        self.layout, self.sites = layout_of(facts), tuple(facts.get("sites", (HEADS,)))
        if not self.sites or not set(self.sites) <= set(SITES):
            raise ValueError(f"its sites {list(self.sites)} are unknown")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"its granularity {self.granularity!r} is unknown")
        self.stages = tuple(stage.at(site) for stage in stages_of(facts) for site in self.sites)
        self.groups = ByStage({stage.key: groups.get(stage.key, {}) for stage in self.stages})
        self._paths = ByStage({stage.key: paths[stage.key] for stage in self.stages})
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
        return ByStage({s.key: (s.layers, s.heads, len(self.groups[s.key])) for s in self.stages})

    @cached_property
    def _counts(self) -> ByStage:
        """By stage, the number of units."""
        return self._shapes.map(math.prod)

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __repr__(self) -> str:
        units = ", ".join(f"{key} {count}" for key, count in self._counts.items())
        by = self.granularity.replace("quadrant", self.layout.REGION)
        return f"PatchSpace({len(self)} units by {by}: {units})"

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
        paths, groups = list(self._paths.values()), [list(names) for names in self.groups.values()]
        names, told = [], self.granularity != "head" and self.layout.num_positions > 1
        for stage, layer, head, group in zip(*(part.tolist() for part in self.units)):
            place = f" @ {groups[stage][group]}" if told else ""
            unit = f".heads[{head}]" if self.stages[stage].site == HEADS else ""
            names.append(f"{paths[stage][layer]}{unit}{place}")
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

    def by_region(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """One value for each unit, [n] → title of a stage and group, such as "encoder, query" → [layer, head].

        Raises:
            ValueError: for a space with a unit a token, which has too many regions to draw.
        """
        if self.granularity == "token":
            raise ValueError("a space with a unit a token has too many regions to draw; average over positions first.")
        parts = self.split(values)
        return {
            f"{key}, {name}": parts[key][..., i] for key, names in self.groups.items() for i, name in enumerate(names)
        }

    def mask(self, choices: torch.Tensor) -> ByStage:
        """The positions of the chosen units.

        Args:
            choices: [n] or [batch, n]; bool, or float for gates (differentiable).

        Returns:
            By stage, [layer, position, head] or [batch, layer, position, head], zero outside the units; with the
            space's fingerprint, which `patch` compares.
        """

        def spread(values: torch.Tensor, group_at: torch.Tensor) -> torch.Tensor:
            values = rearrange(values, "... layer head group -> ... layer group head")
            elsewhere = values.new_zeros(*values.shape[:-2], 1, values.shape[-1])
            return torch.cat([values, elsewhere], dim=-2).index_select(-2, group_at.to(values.device))

        mask = self.split(torch.as_tensor(choices)).map(spread, self._group_at)
        mask.fingerprint = self.fingerprint
        return mask

    def average(self, values: ByStage) -> torch.Tensor:
        """Mean over each unit's positions of values by stage, [..., layer, head, position], such as a score: [..., n].
        Positions that are NaN do not count."""
        parts = []
        for key, groups in self.groups.items():
            part = values[key]
            means = [part.index_select(-1, members.to(part.device)).nanmean(-1) for members in groups.values()]
            if means:
                parts.append(torch.stack(means, dim=-1).flatten(-3))
        return torch.cat(parts, dim=-1)


def _read_places(name: str, places: Any, layout: Any) -> torch.Tensor:
    """The positions of a group, from a file."""
    at = torch.as_tensor(places)
    if at.dtype != torch.long or at.ndim != 1 or not ((at >= 0) & (at < layout.num_positions)).all():
        raise ValueError(f"the places of {name!r} are not positions from 0 to {layout.num_positions - 1}")
    return at
