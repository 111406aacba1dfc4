"""The intervention itself.

>>> with model.trace(prompts.query_only()):
...     patch(model, vectors["segmentation"], patches)
...     logits = model.output.logits.save()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from vtv_nnsight.layouts import place_names
from vtv_nnsight.models.interface import HEADS, SITES, ByStage, InContextModel, Stage
from vtv_nnsight.models.sites import read, write
from vtv_nnsight.patching.sets import PatchSet
from vtv_nnsight.text import join_names
from vtv_nnsight.vectors import Activations, TaskVector, TaskVectors, zero_vector
from vtv_nnsight.vectors.compatibility import check_compatible, fingerprint, stages_of


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
    owner = fingerprint(model, cached=True)
    with unset_fake_temporarily():  # in a scan, too, what is patched is real
        masks = [ByStage(units.mask if isinstance(units, PatchSet) else units) for units in sets]
    for v, units in zip(vectors, sets):
        check_compatible(v.label, v.fingerprint, "this model", owner)
        if isinstance(units, PatchSet):
            check_compatible("the patch set", units.fingerprint, "this model", owner)
            check_compatible("the patch set", units.fingerprint, v.label, v.fingerprint)
    known = {(stage, site) for stage in owner["stages"] for site in SITES}
    if unknown := [key for mask in masks for key in mask if key not in known]:
        raise ValueError(f"a mask of {str(unknown[0])!r} was given; this model has {', '.join(owner['stages'])}.")
    for stage in stages_of(owner):
        with unset_fake_temporarily():
            steps = [
                _Step(stage.at(site), v, mask[stage.name, site], scale, mode)
                for site in SITES
                for v, mask in zip(vectors, masks)
                if (stage.name, site) in mask
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
        self, stage: Stage, vector: TaskVector | Activations, mask: torch.Tensor, scale: float, mode: str
    ) -> None:
        self.stage, self.vector, self.mode = stage, vector, mode
        values = vector.values.get(stage.key)
        if values is not None and (mask.ndim not in (3, 4) or mask.shape[-3:] != values.shape[-4:-1]):
            raise ValueError(
                f"a mask of shape {list(mask.shape)} does not fit the {stage.key}; expected [layer, position, head] = "
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
                f"{vector.label}: there is no {stage.site} of the {stage.name}, only {', '.join(vector.values.sites)}; "
                f"collect with sites={[*vector.values.sites, stage.site]}."
            )
        self.values, self.present, self.shown = values, vector.present[stage.key], None
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
        z = read(model, self.stage, layer)
        if isinstance(z, FakeTensor):
            return
        for given, what in ((self.mask, "a mask for"), (self.values, "activations of")):
            if given.ndim > 3 + (given is self.values) and len(given) != len(z):
                raise ValueError(f"{what} {len(given)} rows was given; this batch has {len(z)}.")
        mask = self._mask(layer, seen).to(z.device)[..., None]
        new = _at(self.values.select(-4, layer), seen).to(z)
        if mask.dtype == torch.bool and not torch.is_grad_enabled() and self.stage.site == HEADS:
            torch.where(mask, new, z, out=z)
            return
        if mask.dtype == torch.bool:
            changed = torch.where(mask, new, z)
        else:
            there = self.present.to(z.device)[seen][..., None, None]
            step = new - z if self.mode == "replace" else new
            changed = z + mask.to(z.dtype) * torch.where(there, step, 0)
        write(model, self.stage, layer, changed)

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
