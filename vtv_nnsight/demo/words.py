"""What the tab for words of `vtv demo` computes: what a language model says after a query."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from vtv_nnsight import tasks
from vtv_nnsight.demo.playing import VECTOR, ZERO_SHOT, AnyPlayer, Player, load_model_of, packaged_rows
from vtv_nnsight.evaluation.conditions import FEW_SHOT
from vtv_nnsight.models.sources import EMBEDDED, family_of
from vtv_nnsight.patching import PatchSet, patch
from vtv_nnsight.runs import bundles
from vtv_nnsight.text_prompts import TextLayout, TextPrompts
from vtv_nnsight.vectors import TaskVector

PACKAGED = "smollm2"
"""The bundle in the package with a language model's vectors."""


class WordPlayer(AnyPlayer):
    """A language model and its vectors.

    Args:
        model, bundle, source: As of `AnyPlayer`.
    """

    def few_shot(self, task: str, query: str, shots: int, seed: int = 0) -> TextPrompts:
        """A prompt of examples from the task's list, none of which has the query's word in it.

        Raises:
            ValueError: when there is no query.
        """
        asked: Any = tasks.get(task)
        word = query.strip().casefold()
        others = [row for row in asked.rows if word not in (text.casefold() for text in row.values())]
        examples = np.random.default_rng(seed).choice(len(others), min(shots, len(others)), replace=False)
        return asked.prompt([others[i] for i in examples], query)

    def answers(
        self, task: str, query: str, vector: TaskVector, units: PatchSet, scale: float = 1.0, shots: int = 8
    ) -> dict[str, str]:
        """What the model says zero-shot, few-shot and with the task vector, and "truth" where the list has it."""
        asked: Any = tasks.get(task)
        few_shot, edit = self.few_shot(task, query, shots), partial(patch, vector=vector, patches=units, scale=scale)
        with self._lock:  # a model is traced by one visitor at a time
            zero_shot = asked.prompt([], query)
            said = {ZERO_SHOT: self.model.say(zero_shot), FEW_SHOT: self.model.say(few_shot)}
            said[VECTOR] = self.model.say(zero_shot, edit=edit)
        known = [row[asked.needs] for row in asked.rows if [row[name] for name in asked.inputs] == [query.strip()]]
        return {condition: texts[0].strip() for condition, texts in said.items()} | {"truth": "".join(known[:1])}

    def code(self, task: str, other: str | None, share: float, units: PatchSet, query: str, scale: float) -> str:
        """Python that prints the answer with the vector, as it is pasted."""
        lines = [
            "from vtv_nnsight import PatchSet, bundles, patch, tasks",
            "",
            *self.patched_code(task, other, share, units),
            f"prompt = task.prompt([], {query!r})",
            f"(answer,) = model.say(prompt, edit=lambda traced: patch(traced, vector, units, scale={scale:g}))",
            "print(answer.strip())",
        ]
        return "\n".join(lines) + "\n"


def load_players(
    vectors: str | None = None, model: str | None = None, device: str | None = None
) -> tuple[Player, WordPlayer | None]:
    """The players of pictures and of words for a bundle and its model. Where these are of words, pictures are the
    embedded model's.

    Args:
        vectors: A bundle's source; by default the packaged one that a model of this kind may fit.
        model: The model's source; by default where the bundle's run read it.
        device: Of the model.

    Raises:
        FileNotFoundError, ValueError: when there is no such bundle, or it is not of this model.
    """
    of_words = vectors is None and model is not None and family_of(model) == "causal_lm"
    bundle = bundles.load(vectors or (PACKAGED if of_words else EMBEDDED))
    loaded = load_model_of(bundle, model, device)
    if isinstance(loaded.layout, TextLayout):
        return Player.load(device=device), WordPlayer(loaded, bundle, source=model)
    return Player(loaded, bundle, packaged_rows(), source=model), None
