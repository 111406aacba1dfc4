"""What takes the place of ablated units: the same query under another task's example."""

from __future__ import annotations

from vtv_nnsight.prompts import VisualPrompt


def counterfactual(prompts: VisualPrompt, others: VisualPrompt) -> VisualPrompt:
    """The queries of `prompts` under the examples of `others`: what a model has at its units when it is shown another
    task, and all else is as it was. MIB's counterfactual inputs (arXiv 2504.13151, §2) of visual prompts.

        >>> other = Activations.collect(model, counterfactual(prompts, lowlight_prompts))
        >>> curves = faithfulness(model, other, prompts, space, rankings, measure, direction="out")

    Args:
        prompts: Prompts of one task.
        others: As many prompts of another task, of the same layout. Their queries are not looked at.

    Raises:
        ValueError: when there are more or fewer of the others, or they are of another layout.
    """
    return prompts.with_examples(others)
