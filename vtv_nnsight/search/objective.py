"""The loss of sets of units on prompts: what every search asks, and the only place where it runs the model.

    >>> objective = Objective(model, vector, task, prompts.query_only(), space)
    >>> choices = torch.rand(64, len(space)) < 0.3                     # 64 sets
    >>> objective(choices, objective.train[:1].expand(64))             # each on the first training prompt: [64]

Every row of a batch has its own set, and a batch runs in one trace. What does not change is computed once: what the
loss compares with, the prompts and the vector on the model's device. Unless loss="pixels", no answer is painted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, cast

import torch
from accelerate.utils import reduce
from accelerate.utils.memory import should_reduce_batch_size

from vtv_nnsight.digests import tensor_digest
from vtv_nnsight.finite import check_whole
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.inside_trace import first, stop_gradient
from vtv_nnsight.models.interface import InContextModel, batch_size_of
from vtv_nnsight.parallel import processes
from vtv_nnsight.patching import PatchSpace, patch
from vtv_nnsight.patching.forward import Edit, find_loss, give_like, losses, remember, residuals, start_from
from vtv_nnsight.patching.patching import as_vectors
from vtv_nnsight.prompts import Prompts
from vtv_nnsight.search.holdout import hold_out
from vtv_nnsight.search.loops import batches_of
from vtv_nnsight.search.prefixes import Prefixes, Start
from vtv_nnsight.tasks import AnyTask
from vtv_nnsight.vectors import Activations, TaskVector
from vtv_nnsight.vectors.compatibility import fingerprint


class Objective:
    """Called with sets and prompts, gives losses. Counts them, batches them, and shares them out over processes.

    Under `accelerate launch`, batches go to the processes in turn and only losses come back, so that every process sees
    the same ones: those of a single process, since the batches are the same. (On CPUs, start the processes with
    `torchrun --nproc-per-node 2`: accelerate's own `--cpu` starts several under MPI alone.)

    Args:
        model: The model, on its device and in its dtype.
        vector, task, prompts: What to patch in, how answers are scored, and prompts with the truth in their output cell
            (`query_only()` for zero-shot). Lists of all three look for one set that serves several tasks. In the place
            of a vector, `Activations` have a row for each prompt, those of `held_out` (separate prompts) last.
        space: The units.
        loss: The name of one of the model's `losses`, by default its first (of MAE-VQGAN "tokens", the mean
            cross-entropy of the output's logits against the tokenizer's codes of the truth); or "pixels", the task's
            own loss of the painted answer, as published.
        batch_size: Rows of a trace; halved when memory runs out. None: 16 on a CPU, 256 elsewhere, and fewer where the
            canvas has more patches than MAE-VQGAN's (`models.interface.default_batch_size`).
        held_out: The share of the prompts that is held out, so that they share no picture with the others (see
            `holdout.split_prompts`), or separate prompts (a list, for several tasks).
        seed: Of the split.

    Attributes:
        model, space, loss, batch_size: Those given.
        tasks: The task or tasks, as a list.
        vectors: The vector or vectors on the model's device, as a list.
        prompts: All prompts on the model's device, task by task, those to train on first.
        train, held_out: LongTensors of prompt numbers, tasks taking turns.
        group: LongTensor [prompt], the number of each prompt's task.
        late: Bool [unit], the units of the last stage; None where layers before them cannot be left out, or there are
            none.
        differentiable: Whether `gradient` can be asked.
        evaluations: Patched evaluations made, one set on one prompt each, gradients included.

    Raises:
        ValueError: when the model has no such loss, vectors, tasks and prompts are not as many, no prompts are left to
            train or hold out, or activations are not one for each prompt.
    """

    remote: bool | str = False
    """Where the model runs, if not here."""

    def __init__(
        self,
        model: InContextModel,
        vector: TaskVector | Activations | Sequence[TaskVector | Activations],
        task: AnyTask | Sequence[AnyTask],
        prompts: Prompts | Sequence[Prompts],
        space: PatchSpace,
        *,
        loss: str | None = None,
        batch_size: int | None = None,
        held_out: float | Prompts | Sequence[Prompts] = 0.25,
        seed: int = 0,
    ) -> None:
        share = held_out if isinstance(held_out, (int, float)) else None
        given = {"vectors": as_vectors(vector), "tasks": _listed(task), "prompts": _listed(prompts)}
        given["held_out"] = _listed(held_out) if share is None else [share] * len(given["prompts"])
        if len({len(values) for values in given.values()}) > 1:
            counts = ", ".join(f"{len(values)} {name}" for name, values in given.items())
            raise ValueError(f"{counts} were given; give one of each, or as many of each.")
        self.tasks: list[AnyTask] = given["tasks"]
        device = device_of(model, self.remote)
        self.model = model
        self.space: Any = space
        self._loss_of = [find_loss(model, loss, task) for task in self.tasks]
        self.loss, self.differentiable = self._loss_of[0].name, self._loss_of[0].differentiable
        check_whole(seed=seed, batch_size=1 if batch_size is None else batch_size)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} holds nothing; give 1 or more.")
        self.vectors = [values.to(device) for values in given["vectors"]]
        parts = hold_out(given["prompts"], given["held_out"] if share is None else share, seed)
        self.prompts: Prompts = given["prompts"][0].cat([rows for pair in parts for rows in pair]).to(device)
        most = 16 if device.type == "cpu" else 256
        self.batch_size = batch_size_of(model, batch_size, most, self.prompts)
        self._fits = self.batch_size
        sizes = torch.tensor([[len(rows) for rows in pair] for pair in parts])
        self.group = torch.arange(len(parts)).repeat_interleave(sizes.sum(1))
        self._first = sizes.sum(1).cumsum(0) - sizes.sum(1)
        for values, count in zip(self.vectors, sizes.sum(1).tolist()):
            if isinstance(values, Activations) and (len(values) != count or share is not None):
                held = f"give held_out= as prompts, not {share}" if share is not None else "those held out included"
                raise ValueError(f"activations of {len(values)} prompts were given for {count}; {held}.")
        numbers = torch.arange(len(self.prompts)).split(sizes.flatten().tolist())
        chunks = [chunk for part in numbers for chunk in part.split(self.batch_size)]
        self._prefixes = Prefixes(model, space, self._left, chunks)
        late = self._prefixes.layer >= sum(stage.layers for stage in model.stages[:-1])
        self.late = late if model.reread is not None and late.any() else None
        self.train, self.held_out = _in_turn(numbers[0::2]), _in_turn(numbers[1::2])
        self.evaluations = 0
        self.prompts.check_truth()
        kinds = torch.stack([self.group, model.answer_lengths(self.prompts).expand(len(self.prompts))])
        self._kinds = kinds.unique(dim=1, return_inverse=True)[1]  # which run together: of one task, as long answers
        with torch.no_grad():
            self._truth = (self._loss_of[0].truth or model.truth)(self.prompts)

    @property
    def stride(self) -> int:
        """Rows worth asking for at once: a batch or a few of every task for every process."""
        batches: int = len(self.tasks) * processes().num_processes * (1 if self._truth.device.type == "cpu" else 4)
        return self.batch_size * batches

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the losses depend on, in words and digests (JSON values)."""
        means = [values for vector in self.vectors for values in vector.values.values()]
        return {
            "loss": self.loss,
            "tasks": [task.name for task in self.tasks],
            "prompts": f"{len(self.train)} + {len(self.held_out)} held out",
            "dtype": str(next(self.model.parameters()).dtype),
            "model": fingerprint(self.model),
            "data": f"{self.prompts.digest} {tensor_digest(self.train, *means)}",
            "space": self.space.fingerprint,
        }

    def __call__(self, choices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The loss of each set on its prompt.

        Args:
            choices: Bool [row, unit].
            rows: Prompt numbers [row].

        Returns:
            Float64 [row], on the CPU.
        """
        return self.among(choices)(choices, rows)

    def among(self, sets: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The objective, for sets [set, unit] that are asked together: what they have in common is computed once (see
        `prefixes`)."""
        shared = self._prefixes.shared(sets)

        @torch.no_grad()
        def losses_of(choices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            def of_batch(batch: torch.Tensor) -> torch.Tensor:
                return self._losses(choices[batch], rows[batch], shared=shared).double()[:, None]

            return self._shared(of_batch, rows, 1)[:, 0]

        return losses_of

    @property
    def layers(self) -> int:
        """Layers that gradients can be kept out of: all of the model's, or none where it does not tell where the
        residual stream is."""
        stages = self.model.stages
        known = "residual" in self.model.outputs(stages[0].name, 0)
        return sum(stage.layers for stage in stages) if known else 0

    def gradient(
        self, gates: torch.Tensor, rows: torch.Tensor, drop: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each prompt under gates, and its gradient there.

        Args:
            gates: Float [row, unit], from 0 (the activation as it is) to 1 (the vector).
            rows: Prompt numbers [row].
            drop: The number of a layer, counted through the stages, that gradients do not flow through: they pass it by
                along the residual stream (`inside_trace.stop_gradient`).

        Returns:
            Float64 losses [row] and gradients [row, unit], on the CPU.

        Raises:
            ValueError: when the loss has no gradient, as "pixels" has none.
        """
        find_loss(self.model, self.loss, self.tasks[0], gradient=True)

        def batch_gradient(batch: torch.Tensor) -> torch.Tensor:
            leaf = gates[batch].to(self._truth.device, torch.float32).requires_grad_()
            with torch.enable_grad():
                values = self._losses(leaf, rows[batch], drop)
                (gradient,) = torch.autograd.grad(values.sum(), leaf)
            return torch.column_stack([values.detach(), gradient]).double()

        values = self._shared(batch_gradient, rows, 1 + len(self.space))
        return values[:, 0], values[:, 1:]

    def _shared(self, function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, width: int) -> torch.Tensor:
        """`function` of batches of row numbers → [row, width], each batch done by one of the processes."""
        state = processes()
        values = torch.zeros(len(rows), width, dtype=torch.float64)
        batches = batches_of(self._kinds[rows], self.batch_size, len(self.tasks))
        for batch in batches[state.process_index :: state.num_processes]:
            values[batch] = self._fitting(function, batch).cpu()
        self.evaluations += len(rows)
        if state.num_processes > 1:
            values = reduce(values.to(state.device), "sum").cpu()
        return values

    def _fitting(self, function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        """`function` of a batch, in parts that fit into memory."""
        while True:
            try:
                return torch.cat([function(part) for part in batch.split(self._fits)])
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or self._fits == 1:
                    raise
                self._fits = max(1, min(self._fits, len(batch)) // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _without(self, drop: int) -> InContextModel:
        """The model, with a layer that gradients do not flow through."""
        stage, layer = [(stage, layer) for stage in self.model.stages for layer in range(stage.layers)][drop]
        with self.model.edit() as (_, edited):
            stop_gradient(edited.outputs(stage.name, layer)["residual"])
        return cast(InContextModel, edited)

    def _losses(
        self, choices: torch.Tensor, rows: torch.Tensor, drop: int | None = None, shared: set[Start] | None = None
    ) -> torch.Tensor:
        """Losses [row] of one batch of one task."""
        model = self.model if drop is None else self._without(drop)
        left = {} if shared is None else self._prefixes.left(choices, rows, shared)
        late = self._edit(choices & (self._prefixes.layer > max(left)) if left else choices, rows)

        def edit(model: InContextModel) -> None:
            late(model)
            if left:
                start_from(model, left)

        task, rows = int(self.group[rows[0]]), rows.to(self._truth.device)
        cached = self._cached and [self._cached[row] for row in rows.tolist()]
        return losses(model, self.prompts[rows], self._loss_of[task], self._truth[rows], edit, cached)

    @cached_property
    def _cached(self) -> list[Any] | None:
        """Of each prompt, what no set can change."""
        return remember(self.model, self.prompts, self._fits)

    def _left(self, layers: list[int], units: torch.Tensor, rows: torch.Tensor) -> list[Any]:
        """What layers leave of prompts of one task, under a set [unit]."""
        parts = [
            residuals(self.model, self.prompts[part], layers, self._edit(units.expand(len(part), -1), part))
            for part in rows.split(self._fits)
        ]
        return [give_like(raws[0], torch.cat(list(map(first, raws)), 1)) for raws in zip(*parts)]

    def _edit(self, choices: torch.Tensor, rows: torch.Tensor) -> Edit:
        """What patches one batch of one task."""
        task = int(self.group[rows[0]])
        vector = self.vectors[task]
        if isinstance(vector, Activations):
            vector = vector[rows - self._first[task]]
        return partial(patch, vector=vector, patches=self.space.mask(choices.to(self._truth.device)))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _in_turn(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """The numbers of several tasks, one of each in turn as far as they go."""
    longest = max(map(len, numbers))
    return torch.cat([part[place : place + 1] for place in range(longest) for part in numbers])
