"""Search for the units to patch so that the model does a task with no examples (ECCV 2024, §4.3).

    >>> space = PatchSpace(model, prompts.layout)
    >>> result = search.reinforce(model, vectors["segmentation"], tasks.segmentation, prompts.query_only(), space)
    >>> result.patches, result.held_out_loss, result.history

Every algorithm is a function of the same arguments and returns a `SearchResult`:

| function      | how it searches                                              | what it reads         |
|---------------|--------------------------------------------------------------|-----------------------|
| `reinforce`   | score-function gradients of Bernoullis; also the paper's own | losses                |
| `gates`       | hard-concrete gates by gradient                              | gradients, and losses |
| `attribution` | gradient x (vector - activation), the top units              | gradients, and losses |
| `mediation`   | the effect of each unit alone, the top units                 | losses                |
| `ranking`     | the task score of each unit, the top units                   | losses, for the size  |
| `greedy`      | random changes, kept when better                             | losses                |
| `random`      | random sets, the best one                                    | losses                |

Arguments that all of them share:

- model, vector, task, prompts, space, loss, batch_size, held_out: as for `Objective`. Lists of vectors, tasks and
  prompts look for one set that serves several tasks.
- budget: Patched evaluations that may be spent, one mask on one prompt each, those of the held-out prompts included; a
  gradient of one prompt counts as three. 8000 by default.
- seed: Of the split into training and held-out prompts, and of all that is random in the search.
- resume: A file that keeps what the search has learnt. When it exists the search goes on where it was interrupted, and
  ends as it would have.
- progress: Show a progress bar with the held-out loss.

An algorithm proposes masks and reads losses and nothing else: `search.reinforce.on(objective, budget=…)` runs it on any
objective. To write a new one, see `vtv_nnsight.search.algorithm`.
"""

from vtv_nnsight.search import plots
from vtv_nnsight.search.attribution import attribution
from vtv_nnsight.search.gates import gates
from vtv_nnsight.search.greedy import greedy
from vtv_nnsight.search.mediation import mediation
from vtv_nnsight.search.objective import LOSSES, Objective
from vtv_nnsight.search.random import random
from vtv_nnsight.search.ranking import ranking
from vtv_nnsight.search.reinforce import reinforce
from vtv_nnsight.search.result import SearchResult, Step

ALGORITHMS = {
    function.__name__: function for function in (reinforce, gates, attribution, mediation, ranking, greedy, random)
}

__all__ = [*ALGORITHMS, "ALGORITHMS", "LOSSES", "Objective", "SearchResult", "Step", "plots"]
