"""Does a head tell tasks apart? Its activations on single prompts, and how well they cluster by task.

    >>> heads = activations(model, {task.name: task.prompts(images, n=50, layout=model.layout) for task in tasks.VTV})
    >>> figures = silhouettes(heads)                            # per stack: [layer, head], from -1 to 1
    >>> plots.projection(heads, "encoder", layer=3, head=5)

After *Finding Visual Task Vectors* (ECCV 2024, §4.2 and its t-SNE figures).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vtv_nnsight.layouts import Layout, positions
from vtv_nnsight.progress import tqdm
from vtv_nnsight.prompts import VisualPrompt
from vtv_nnsight.vectors import STACKS, Stacks, ready


def activations(
    model: Any,
    prompts: Mapping[str, VisualPrompt],
    region: str = "query",
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> Stacks:
    """What every head says of every prompt, averaged over a region.

    Args:
        model: A MAEVQGAN.
        prompts: Task name → prompts.
        region: "cls", or a region of the prompts' layout that a stack sees; one that the encoder does not see, such as
            "output", gives None for it.

    Returns:
        Stacks of {task: [prompt, layer, head, head_dim]}.

    Raises:
        ValueError: when there are no prompts, or no stack sees the region.
    """
    if not prompts or not all(map(len, prompts.values())):
        raise ValueError("there are no prompts of some task; give at least one of each.")
    device = ready(model)
    found: dict[str, dict[str, list]] = {stack: {task: [] for task in prompts} for stack in STACKS}
    with tqdm(total=sum(map(len, prompts.values())), unit="prompt", disable=not progress) as bar:
        for task, rows in prompts.items():
            for batch in rows.split(batch_size):
                seen = [s for s in STACKS if _tokens(batch, s, region) is not None]
                if not seen:
                    raise ValueError(f"no stack sees {region!r} of these prompts; choose another region.")
                index = {s: _tokens(batch, s, region).to(device) for s in seen}
                with torch.no_grad(), model.trace(batch.to(device)):
                    means = {
                        s: [block.attn.heads[:, index[s]].mean(1).float() for block in getattr(model, s).blocks]
                        for s in seen
                    }.save()
                for stack in seen:
                    found[stack][task].append(torch.stack(means[stack], 1).cpu())
                bar.update(len(batch))
    return Stacks(*({t: torch.cat(parts) for t, parts in found[s].items()} if s in seen else None for s in STACKS))


def _tokens(prompts: VisualPrompt, stack: str, region: str) -> torch.Tensor | None:
    """Token indices of a region in a stack, or None where the stack does not see it."""
    seen = prompts.visible if stack == "encoder" else prompts.decoded
    places = region_positions(prompts.layout).get(region)
    if places is None:
        raise ValueError(f"{region!r} is not a region; choose 'cls' or one of {', '.join(prompts.layout.regions)}.")
    tokens = torch.isin(positions(seen).cpu(), places).nonzero()[:, 0]
    return tokens if len(tokens) else None


def region_positions(layout: Layout) -> dict[str, torch.Tensor]:
    """ "cls" and every region of a layout → LongTensor of absolute positions."""
    return {"cls": positions(layout.all_patches)[:1]} | {
        name: positions(ids)[1:] for name, ids in layout.regions.items()
    }


def silhouettes(heads: Stacks) -> Stacks:
    """How well the tasks cluster in each head: the mean silhouette (Rousseeuw, 1987) of `activations`, from -1 to 1.

    Returns:
        Stacks of [layer, head]; None for a stack that was not seen.

    Raises:
        ValueError: with fewer than two tasks.
    """

    def stack_silhouettes(by_task: dict[str, torch.Tensor] | None) -> torch.Tensor | None:
        if by_task is None:
            return None
        if len(by_task) < 2:
            raise ValueError(f"clusters compare tasks and there is only {', '.join(by_task)}; give two or more.")
        points = torch.cat(list(by_task.values())).permute(1, 2, 0, 3)
        labels = torch.arange(len(by_task)).repeat_interleave(torch.tensor([len(z) for z in by_task.values()]))
        return torch.stack([silhouette(layer, labels) for layer in points])

    return heads.map(stack_silhouettes)


def silhouette(points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean silhouette of labelled points [..., point, dim] by Euclidean distance: [...]. A cluster's only point counts
    0, as in scikit-learn."""
    points = points.double()
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    members = torch.nn.functional.one_hot(labels).double()
    sums, sizes = distances @ members, members.sum(0)
    own = sums.gather(-1, labels[:, None].expand(*sums.shape[:-1], 1))[..., 0] / (sizes[labels] - 1).clamp(min=1)
    others = (sums / sizes).masked_fill(members.bool(), torch.inf).amin(-1)
    widths = (others - own) / torch.maximum(others, own).clamp(min=torch.finfo(torch.float64).tiny)
    return widths.masked_fill(sizes[labels] == 1, 0.0).mean(-1)
