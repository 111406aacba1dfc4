"""Search for the units to patch so that the model does a task with no examples (ECCV 2024, §4.3).

    >>> space = PatchSpace(model, prompts.layout)
    >>> result = search.reinforce(model, vectors["segmentation"], tasks.segmentation, prompts.query_only(), space)
    >>> result.patches, result.held_out_loss, result.history

Every algorithm is called with the same arguments and returns a `SearchResult`. `search.ALGORITHMS` has them by name,
each with its one-line `description`, its `options`, and whether it `needs_gradient`, `needs_scores` or
`takes_size`.

Arguments that all of them share:

- model, vector, task, prompts, space, loss, batch_size, held_out: as for `Objective`. Lists of vectors, tasks and
  prompts look for one set that serves several tasks.
- budget: Patched evaluations that may be spent, one mask on one prompt each, those of the held-out prompts included; a
  gradient of one prompt counts as three. 4000 by default.
- seed: Of the split into training and held-out prompts, and of all that is random in the search.
- vectors: The `TaskVectors` of all tasks. Only an algorithm that compares tasks (`ranking`) looks at them, so they can
  be given to every one.
- resume: A file that keeps what the search has learnt. When it exists the search goes on where it was interrupted, and
  ends as it would have.
- remote, remote_evaluations: Where the model runs, as for nnsight's `trace`, by default where it was made to; and the
  evaluations of one job there, about.
- progress: Show a progress bar with the held-out loss.

An algorithm proposes masks and reads losses and nothing else: `search.reinforce.on(objective, budget=…)` runs it on any
`SearchObjective`, of a model or not. To write a new one, see `vtv_nnsight.search.budget`; a file of this folder is
all it takes. (It is also a name of `search` at once; the imports below tell editors so.)
"""

from importlib import import_module
from pkgutil import iter_modules

from vtv_nnsight.models.interface import PIXELS
from vtv_nnsight.search.baselines import greedy, mediation, random, ranking
from vtv_nnsight.search.bootstrap import consistent_attribution
from vtv_nnsight.search.budget import Search, SearchObjective
from vtv_nnsight.search.gradients import attribution, gates
from vtv_nnsight.search.objective import Objective
from vtv_nnsight.search.registry import ALGORITHMS, Algorithm
from vtv_nnsight.search.result import NamedUnits, SearchResult, Step
from vtv_nnsight.search.score_function import reinforce

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
ALGORITHMS.update({name: ALGORITHMS.pop(name) for name in sorted(ALGORITHMS)})
globals().update(ALGORITHMS)


__all__ = [
    "ALGORITHMS", "PIXELS", "Algorithm", "NamedUnits", "Objective", "Search", "SearchObjective", "SearchResult", "Step",
    "attribution", "consistent_attribution", "gates", "greedy", "mediation", "random", "ranking", "reinforce",
]  # fmt: skip
