"""Does a head tell tasks apart? Its activations on single prompts, and how well they cluster by task.

    >>> heads = activations(model, {task.name: task.prompts(images, n=50, layout=model.layout) for task in tasks.VTV})
    >>> figures = silhouettes(heads)                            # by stage: [layer, head], from -1 to 1
    >>> plots.projection(heads, "encoder", layer=3, head=5)

After *Finding Visual Task Vectors* (ECCV 2024, §4.2 and its t-SNE figures).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vtv_nnsight.layouts import Layout, named_positions
from vtv_nnsight.models.devices import device_of
from vtv_nnsight.models.interface import ByStage, InContextModel, Stage, batch_size_of
from vtv_nnsight.models.sites import list_layers, read_layers
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.report.plots import silhouette


def activations(
    model: InContextModel,
    prompts: Mapping[str, VisualPrompt],
    region: str = "query",
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> ByStage:
    """What every head says of every prompt, averaged over a region.

    Args:
        model: The model.
        prompts: Task name → prompts.
        region: "cls", or a region of the prompts' layout that a stage sees; a stage that does not see it (MAE-VQGAN's
            encoder "output") has None.

    Returns:
        By stage, {task: [prompt, layer, head, head_dim]}.

    Raises:
        ValueError: when there are no prompts, or no stage sees the region.
    """
    if not prompts or not all(map(len, prompts.values())):
        raise ValueError("there are no prompts of some task; give at least one of each.")
    device = device_of(model)
    layers = {stage.name: stage.layers for stage in model.stages}
    batches: dict[str, dict[str, list[torch.Tensor]]] = {stage: {task: [] for task in prompts} for stage in layers}
    with progress_bar(total=sum(map(len, prompts.values())), unit="prompt", disable=not progress) as bar:
        for task, rows in prompts.items():
            tokens = {stage: _tokens(rows.layout, model.positions(stage, rows), region) for stage in layers}
            index = {stage: at.to(device) for stage, at in tokens.items() if len(at)}
            if not index:
                raise ValueError(f"no stage sees {region!r} of these prompts; choose another region.")
            for batch in rows.split(batch_size_of(model, batch_size)):
                for stage, means in _means(model, batch.to(device), index).items():
                    batches[stage][task].append(means)
                bar.update(len(batch))
    return ByStage(
        {s: {t: torch.cat(parts) for t, parts in batches[s].items()} if s in index else None for s in layers}
    )


@torch.no_grad()
def _means(model: InContextModel, prompts: VisualPrompt, index: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Means of the heads over some tokens of each stage: [prompt, layer, head, head_dim], on the CPU."""
    layers: dict[str, list[torch.Tensor]] = {stage: [] for stage in index}

    def keep(step: int, stage: Stage, layer: int, z: torch.Tensor, seen: torch.Tensor) -> None:
        layers[stage.name].append(z[:, index[stage.name]].mean(1).float())

    with model.trace(prompts):
        read_layers(model, list_layers(model, stages=list(index)), keep, stop=True)
    return {stage: torch.stack(means, 1).cpu() for stage, means in layers.items()}


def _tokens(layout: Layout, seen: torch.Tensor, region: str) -> torch.Tensor:
    """Which of the tokens at the positions `seen` lie in a region."""
    places = named_positions(layout.regions).get(region)
    if places is None:
        raise ValueError(f"{region!r} is not a region; choose 'cls' or one of {', '.join(layout.regions)}.")
    return torch.isin(seen.cpu(), places).nonzero()[:, 0]


def silhouettes(heads: ByStage) -> ByStage:
    """How well the tasks cluster in each head: the mean silhouette (Rousseeuw, 1987) of `activations`, from -1 to 1.

    Returns:
        By stage, [layer, head]; None for a stage that was not seen.

    Raises:
        ValueError: with fewer than two tasks.
    """

    def stage_silhouettes(by_task: dict[str, torch.Tensor] | None) -> torch.Tensor | None:
        if by_task is None:
            return None
        if len(by_task) < 2:
            raise ValueError(f"clusters compare tasks and there is only {', '.join(by_task)}; give two or more.")
        points = torch.cat(list(by_task.values())).permute(1, 2, 0, 3)
        labels = torch.arange(len(by_task)).repeat_interleave(torch.tensor([len(z) for z in by_task.values()]))
        return torch.stack([silhouette(layer, labels) for layer in points])

    return heads.map(stage_silhouettes)
