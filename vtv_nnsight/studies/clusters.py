"""Does a head tell tasks apart? Its activations on single prompts, and how well they cluster by task.

    >>> heads = activations(model, {task.name: task.prompts(images, n=50, layout=model.layout) for task in tasks.VTV})
    >>> figures = silhouettes(heads)                            # by stage: [layer, head], from -1 to 1
    >>> plots.projection(heads, "encoder", layer=3, head=5)

After *Finding Visual Task Vectors* (ECCV 2024, §4.2 and its t-SNE figures).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vtv_nnsight.layouts import named_positions
from vtv_nnsight.models.interface import ByStage, InContextModel, batch_size_of
from vtv_nnsight.progress import progress_bar
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.report.plots import silhouette
from vtv_nnsight.vectors import Activations


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
    heads = ByStage({stage.name: {} for stage in model.stages})
    with progress_bar(total=sum(map(len, prompts.values())), unit="prompt", disable=not progress) as bar:
        for task, rows in prompts.items():
            places, parts = named_positions(rows.layout.regions).get(region), []
            if places is None:
                known = ", ".join(rows.layout.regions)
                raise ValueError(f"{region!r} is not a region; choose 'cls' or one of {known}.")
            for batch in rows.split(batch_size_of(model, batch_size)):
                values = Activations.collect(model, batch, batch_size=len(batch), progress=False).values
                parts.append({stage: z[:, :, places].float().nanmean(2) for stage, z in values.items()})
                bar.update(len(batch))
            for stage, by_task in heads.items():
                by_task[task] = torch.cat([part[stage] for part in parts])
    heads = heads.map(lambda by_task: None if any(z.isnan().any() for z in by_task.values()) else by_task)
    if not any(heads.values()):
        raise ValueError(f"no stage sees {region!r} of these prompts; choose another region.")
    return heads


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
