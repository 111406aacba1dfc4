"""`patch`: activations in the place of a model's own. The twin of `capture`.

>>> with model.trace(prompts.query_only()):
...     patch(model, vectors["segmentation"], patches)
...     logits = model.output.logits.save()
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from numbers import Real
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from vtv_nnsight.finite import check_finite
from vtv_nnsight.models import inside_trace
from vtv_nnsight.models.inside_trace import last_tokens
from vtv_nnsight.models.interface import GRANULARITIES, HEADS, SITES, ByStage, InContextModel, Place, Stage
from vtv_nnsight.models.nnsight_remote import PLAIN
from vtv_nnsight.models.nnsight_verbs import CallingBlock
from vtv_nnsight.models.sites import module_path, place_of, running_layout, running_prompts, token_positions
from vtv_nnsight.patching.sets import PatchSet
from vtv_nnsight.patching.spaces import PatchSpace
from vtv_nnsight.text import check_choice, join_names, quoted
from vtv_nnsight.vectors import Activations, TaskVector, TaskVectors, zero_vector
from vtv_nnsight.vectors.compatibility import check_compatible, fingerprint, sent

Patches = Any
"""Where to patch: a PatchSet, a search's result, masks by stage and site, or names of units."""
MODES = ("replace", "add")
"""What `patch` can do with a vector."""


def patch(
    model: InContextModel,
    vector: TaskVector | Activations | Sequence[TaskVector | Activations],
    patches: Patches,
    *,
    scale: float | torch.Tensor = 1.0,
    mode: str = "replace",
    steps: str = "first",
) -> None:
    """Put a task vector's activations in the place of the model's own, inside `trace`, `generate`, `edit` or an invoke.

    What is typed is what happens: the lines below it, and later invokes without prompts, see what it has put there; it
    sees the edits above. Call it in any order with `capture`, and as often as you like; a later patch is on top.

    Args:
        model: The model that is traced (or the one that `edit` hands out).
        vector: What to put there; faster when it is on the model's device. `Activations` have a row for each row of the
            batch. Or a list, with as many patches.
        patches: Where. A PatchSet or a SearchResult; or what `PatchSpace.mask` returns: by stage, [layer, position,
            head] for all rows, or [batch, layer, position, head] with a mask for each row (float masks are gates,
            which mix the two activations and through which gradients flow); or names of units of one space, as
            `PatchSpace.names` has them: ["decoder.blocks.0.mlp @ output"].
        scale: How far to go: 0 leaves an activation as it is, 1 replaces it, 2 goes as far again. With mode="add", how
            much of the vector to add. A tensor has a number for each row of the batch: a sweep in one forward.
        mode: "replace": the vector in the place of the activation. "add": the vector on top of it, as one steers
            language models.
        steps: "first": in the first forward of the traced call. "all": in each of its forwards.

    Raises:
        TypeError: when vector, patches or scale are of another kind.
        ValueError: when vector, patches, model and prompts do not belong together, naming what differs; when patches
            ask for layers, positions or sites that the vector lacks or positions that the prompt does not show (a
            whole head is patched at the tokens there are); when what would be put there is not finite; outside a
            block; or when the model has run past the first of the places.
    """
    check_choice(MODES, mode=mode)
    block = CallingBlock("patch", model, "with model.trace(prompts): patch(model, vector, patches)")
    prompts, layout = running_prompts(block), running_layout(block)
    vectors = as_vectors(vector)
    with unset_fake_temporarily():  # in a scan, too, what is patched is real
        sets = _as_sets(model, patches, layout)
        if len(vectors) != len(sets):
            raise ValueError(f"{len(vectors)} vectors and {len(sets)} patch sets were given; give as many of both.")
        edits = _edits(model, vectors, sets, layout, _as_scale(scale), mode)
    by_stage = [(stage, changes) for stage in model.stages if (changes := _changes(model, stage, edits))]

    def run(step: int) -> None:
        for stage, changes in by_stage:
            seen = token_positions(model, stage.name, prompts if step == 0 else None, changes[0][0], block)
            for edit in edits:
                if edit.stage.name == stage.name:
                    edit.begin(seen)
            for place, layer, at_place in changes:
                inside_trace.change(place, partial(_apply, at_place, layer))

    if by_stage:
        block.run(run, steps=steps)


def planned(
    model: InContextModel, vector: Any, patches: Any, layout: Any, scale: Any = 1.0, mode: str = "replace"
) -> list[tuple[str, torch.Tensor, torch.Tensor, str]]:
    """What `patch` would do to prompts of a layout, for `inside_trace.write`: (site, values, mask, mode)."""
    sets = _as_sets(model, patches, layout)
    edits = _edits(model, as_vectors(vector), sets, layout, _as_scale(scale), mode)
    return [(edit.stage.site, edit.values, edit.mask, edit.mode) for edit in edits]


def ablate(model: InContextModel, patches: Patches, to: str | TaskVector | TaskVectors | Activations = "zero") -> None:
    """Silence units: `patch` with what says nothing of the task.

    Args:
        model, patches: As for `patch`.
        to: "zero"; a vector, or all tasks' `TaskVectors`, for their mean; or `Activations`, such as those of the
            same queries under another task's example (resample ablation).

    Raises:
        ValueError: as `patch` does, and when `to` is something else.
    """
    patch(model, silence(model, patches, to), patches)


def silence(model: InContextModel, patches: Patches, to: Any) -> TaskVector | Activations:
    """What `ablate` puts there."""
    with unset_fake_temporarily():
        if isinstance(to, str) and to == "zero":
            return zero_vector(model, SITES, patches.space.layout if isinstance(patches, PatchSet) else None)
        if isinstance(to, (TaskVector, Activations)):
            return to
        if isinstance(to, TaskVectors):
            return to.mean()
    raise ValueError(f'to={to!r} is unknown; give "zero", a vector, TaskVectors (their mean) or Activations.')


def as_vectors(vector: Any) -> list[TaskVector | Activations]:
    """A vector, activations, or a list of them, as a list.

    Raises:
        TypeError: when it is something else.
    """
    vectors = list(vector) if isinstance(vector, (list, tuple)) else [vector]
    for one in vectors:
        if not isinstance(one, (TaskVector, Activations)):
            raise TypeError(f"patch was given a {type(one).__name__} as its vector; give a TaskVector or Activations.")
    return vectors


def _as_scale(scale: Any) -> float | torch.Tensor:
    """A number, or a tensor [batch, 1, 1, 1]."""
    is_tensor = isinstance(scale, torch.Tensor) and scale.ndim < 2 and not scale.is_complex()
    if not is_tensor and not isinstance(scale, Real):
        raise TypeError(f"scale={scale!r} is no scale; give a number, or a tensor with a number for each row.")
    check_finite(scale, "scale", "give a number from 0 (as it is) to 1 (the vector), or beyond")
    each: float | torch.Tensor = scale[:, None, None, None] if is_tensor and scale.ndim else scale
    return each


def _as_sets(model: InContextModel, patches: Any, layout: Any) -> list[PatchSet | Mapping[Any, torch.Tensor]]:
    """Sets and masks of what `patch` was given."""
    patches = getattr(patches, "patches", patches)
    is_bundle = isinstance(patches, Mapping) and any(isinstance(x, (tuple, TaskVector)) for x in patches.values())
    if isinstance(patches, (PatchSet, Mapping)) and not is_bundle:
        if isinstance(patches, Mapping) and not patches:
            raise ValueError("patches={} holds no mask; give one by stage, or PatchSet.random(space, 0) for no unit.")
        return [patches]
    if is_bundle or not isinstance(patches, Iterable) or isinstance(patches, torch.Tensor):
        raise TypeError(f"patch was given a {type(patches).__name__} as its patches; give a PatchSet, masks or names.")
    patches = [patches] if isinstance(patches, str) else list(patches)
    if not patches:
        raise ValueError("patches=[] names no unit; give names, or PatchSet.random(space, 0) for a set without any.")
    if not all(isinstance(name, str) for name in patches):
        return [one for part in patches for one in _as_sets(model, part, layout)]
    sites = (HEADS, *model.outputs(model.stages[0].name, 0))
    spaces = (PatchSpace(model, layout, granularity, sites=sites) for granularity in GRANULARITIES)
    unknown, everywhere = patches, set(patches)
    for space in spaces:  # the space of tokens, which is large, is made only where the ones before lack a name
        missing = [name for name in patches if name not in space.index_of]
        if not missing:
            return [PatchSet.named(space, patches)]
        unknown, everywhere = min(unknown, missing, key=len), everywhere.intersection(missing)
    if everywhere:
        raise ValueError(f"{quoted(min(everywhere))} is not a unit of this model; PatchSpace(model).names has such.")
    raise ValueError(f"{quoted(unknown[0])} is not a unit of the space of the others; name units of one PatchSpace.")


def _edits(
    model: InContextModel,
    vectors: Sequence[TaskVector | Activations],
    sets: Sequence[Any],
    layout: Any,
    scale: float | torch.Tensor,
    mode: str,
) -> list[_Edit]:
    """What to do at each stage and site, where vectors, sets, model and the layout of its prompts belong together."""
    owner = fingerprint(model, cached=True)
    for vector, units in zip(vectors, sets):
        facts = getattr(units, "fingerprint", None) or {}
        for what, of_it in ((vector.label, vector.fingerprint), ("the patch set", facts)):
            check_compatible(what, of_it, "this model", owner)
            if layout:
                check_compatible(what, of_it, "these prompts, which are to be made in its layout", asdict(layout))
        check_compatible("the patch set", facts, vector.label, vector.fingerprint)
    masks = [ByStage(units.mask if isinstance(units, PatchSet) else units) for units in sets]
    known = {(stage.name, site): stage for stage in model.stages for site in SITES}
    if unknown := [key for mask in masks for key in mask if key not in known]:
        raise ValueError(f"a mask of {str(unknown[0])!r} was given; this model has {', '.join(owner['stages'])}.")
    edits = [
        _Edit(model, stage.at(key[1]), vector, mask[key], scale, mode)
        for key, stage in known.items()
        for vector, mask in zip(vectors, masks)
        if key in mask
    ]
    edits = [edit for edit in edits if edit.layers]
    for edit in edits:
        edit.check_vector()
    return edits


def _changes(model: InContextModel, stage: Stage, edits: Sequence[_Edit]) -> list[tuple[Place, int, list[_Edit]]]:
    """The places of a stage that are changed, in the order in which the model reaches them."""
    of_stage = [edit for edit in edits if edit.stage.name == stage.name]
    changes = []
    for layer in sorted(set[int]().union(*(edit.layers for edit in of_stage))):
        of_layer = (edit for edit in of_stage if layer in edit.layers)
        for site, at_place in groupby(of_layer, key=lambda edit: edit.stage.site):
            changes.append((place_of(model, stage.at(site), layer), layer, list(at_place)))
    return changes


def _apply(edits: Sequence[_Edit], layer: int, z: torch.Tensor) -> torch.Tensor:
    for edit in edits:
        z = edit.change(z, layer)
    return z


class _Edit:
    """One vector and its mask, at one site of a stage."""

    def __init__(
        self,
        model: InContextModel,
        stage: Stage,
        vector: TaskVector | Activations,
        mask: torch.Tensor,
        scale: float | torch.Tensor,
        mode: str,
    ) -> None:
        self.model, self.stage, self.vector, self.mode = model, stage, vector, mode
        values = vector.values.get(stage.key)
        if not isinstance(mask, torch.Tensor) or mask.is_complex():
            raise TypeError(f"the mask of the {stage.key} is a {type(mask).__name__}; give a tensor, bool or float.")
        check_finite(mask, f"the mask of the {stage.key}", "give True and False, or gates from 0 to 1")
        if isinstance(vector, Activations) and values is not None and mask.ndim > 2:
            places = max(mask.shape[-2], model.layout.num_positions)
            values = values[..., :places, :, :]  # of a text, activations have more positions than units
        if not mask.is_floating_point() and len(others := mask[(mask != 0) & (mask != 1)]):
            raise ValueError(f"the mask of the {stage.key} holds {others[0]}; give True and False, or float gates.")
        if values is not None:
            expected = [stage.layers, values.shape[-3], stage.heads]
            if list(values.shape[-4:]) != [*expected, stage.head_dim]:
                raise ValueError(f"{vector.label} has shape {list(values.shape)} at {stage.key}; expected {expected}.")
            if mask.ndim not in (3, 4) or list(mask.shape[-3:]) != expected:
                raise ValueError(f"a mask of shape {list(mask.shape)} does not fit {stage.key}; expected {expected}.")
        if isinstance(scale, torch.Tensor) and scale.ndim and mask.ndim == 4 and len(mask) != len(scale):
            raise ValueError(f"scale has {len(scale)} numbers for masks of {len(mask)} rows; give one for each row.")
        units = mask if mask.dtype == torch.bool else mask.detach() != 0
        self.units = (units.any(0) if units.ndim == 4 else units).cpu()
        busy = self.units.flatten(1).any(1) | mask.requires_grad  # gates that are 0 need their gradient, too
        self.layers = set(busy.nonzero()[:, 0].tolist())
        self.values = values
        self.per_row = "a scale for" if isinstance(scale, torch.Tensor) and scale.ndim else "a mask for"
        scale = scale.to(mask.device) if isinstance(scale, torch.Tensor) else scale
        plain = mask.dtype == torch.bool and isinstance(scale, Real) and scale == 1 and mode == "replace"
        self.mask = mask if plain else mask * scale

    def check_vector(self) -> None:
        """Refuse a vector that has nothing at these units."""
        label, held = self.vector.label, ", ".join(map(str, self.vector.values))
        if not held:
            raise ValueError(f"{label} are there after their block; patch with them in a later block.")
        if self.values is None:
            raise ValueError(f"{label}: there is nothing of the {self.stage.key}, only of the {held}; collect it too.")
        if self.values.is_meta:
            raise ValueError(f"{label} are of a scan, shapes alone; capture them in a trace.")
        self._check_finite()

    def _check_finite(self) -> None:
        """Refuse a vector that is NaN or infinite where it is put; gates of 0 multiply all of a layer."""
        reached = self.units
        if self.mask.dtype != torch.bool:
            reached = torch.zeros_like(reached).index_fill(0, torch.tensor(sorted(self.layers)), True)
        layer, position, head = reached.nonzero().to(self.values.device).unbind(1)
        bad = ~self.values[..., layer, position, head, :].isfinite().all(-1)
        bad = bad & self.vector.present_rows[self.stage.key].to(bad.device)[:, position]
        if bad.any():
            at = bad.any(0).nonzero()[0]
            (place,) = self.model.layout.place_names(position[at])
            unit = f".heads[{head[at].item()}]" * (self.stage.site == HEADS)
            path = module_path(self.model, self.stage, int(layer[at])) + unit
            raise ValueError(f"{self.vector.label} is not finite at {path}, {place}; capture it, and look for NaN.")

    def begin(self, seen: torch.Tensor) -> None:
        """Get ready for a forward that has the stage's first tokens at the positions `seen`, [token] or [batch,
        token]."""
        self.mask_at_tokens: torch.Tensor | None = None
        if not isinstance(seen, FakeTensor):
            with unset_fake_temporarily():
                self.tokens, self.seen = last_tokens(seen, self.units.shape[1])
                self._check_tokens(self.seen.cpu())

    def _check_tokens(self, seen: torch.Tensor) -> None:
        """Refuse what cannot be patched at these positions; of a whole head, those that are not shown may be left
        out."""
        rows = seen if seen.ndim == 2 else seen[None]
        places = self.units.shape[1]  # and one for tokens that have none
        visible = torch.zeros(len(rows), places + 1, dtype=torch.bool).scatter_(1, rows % (places + 1), True)[:, :-1]
        present = self.vector.present_rows[self.stage.key].cpu()[:, :places]
        if len({len(visible), len(present)} - {1}) > 1:
            return  # as many rows as there are not: `change` says so
        patched = self.units.any(2).any(0)
        hidden, lacked = patched & ~visible.all(0), patched & (visible & ~present).any(0)
        if hidden.any():
            (everywhere,) = self.model.groups(self.stage.name, "head").values()
            hidden &= (self.units & ~self.units[:, everywhere].all(1, keepdim=True)).any(2).any(0)
        for wrong, why in (
            (hidden, "these prompts do not show them to it"),
            (lacked, f"{self.vector.label} lack{'s' if isinstance(self.vector, TaskVector) else ''} them"),
        ):
            if wrong.any():
                names = join_names(self.model.layout.place_names(wrong.nonzero()[:, 0]))
                raise ValueError(f"the {self.stage.name} cannot be patched at {names}: {why}.")

    def change(self, z: torch.Tensor, layer: int) -> torch.Tensor:
        """A layer's activations [batch, token, head, head_dim] with the vector's in their place."""
        if isinstance(z, FakeTensor):
            return z
        for given, what in ((self.mask, self.per_row), (self.values, "activations of")):
            if given.ndim > 3 + (given is self.values) and len(given) != len(z):
                raise ValueError(f"{what} {len(given)} rows was given; this batch has {len(z)}.")
        tokens, seen = self.tokens, self.seen
        new, mask, present = inside_trace.at(self.values.select(-4, layer), seen), self._mask(layer), None
        if mask.dtype != torch.bool:
            present = inside_trace.at(self.vector.present_rows[self.stage.key][..., None, None], seen)
        mixed = inside_trace.mix(z[:, tokens], new, mask, present, self.mode)
        if mixed.shape[1] == z.shape[1]:
            return mixed
        return torch.cat([z[:, : tokens.start], mixed, z[:, tokens.stop :]], dim=1)

    def _mask(self, layer: int) -> torch.Tensor:
        """The mask of a layer at the tokens, [token, head] or [row, token, head]."""
        if self.seen.ndim == 2:
            return inside_trace.at(self.mask.select(-3, layer)[..., None], self.seen)[..., 0]
        if self.mask_at_tokens is None:
            self.mask_at_tokens = self.mask.index_select(-2, self.seen.to(self.mask.device))
        return self.mask_at_tokens.select(-3, layer)


PLAIN[patch] = lambda _: inside_trace.patch
PLAIN[PatchSet] = lambda patches: sent("the patch set", patches.fingerprint, patches.mask)
