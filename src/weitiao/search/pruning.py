"""Whether a trial is so much worse than the others that the rest of its training is not worth the time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .space import Space
from .trials import Trial


def judge(space: Space, trial: Trial, others: Sequence[Trial]) -> str:
    """Why `trial` should be stopped after its last scoring, as a sentence; "" when it should go on.

    Trials are compared by their number of scorings: the second scoring of one with the second of the others.

    Args:
        space: says by which rule, and after how many trials.
        trial: the running one, scored at least once.
        others: those before it.
    """
    number = len(trial.scores)
    comparable = [best for other in others if other.counts and (best := other.best_at(number)) is not None]
    own = trial.best
    if space.prune == "none" or own is None or len(comparable) < space.prune_after:
        return ""
    if max(trial.scores) < space.prune_from * trial.steps:
        return ""
    if space.prune == "median":
        middle = statistics.median(comparable)
        if own < middle:
            return f"{own:.3f} after scoring {number} is below {middle:.3f}, the median of {len(comparable)} trials"
    elif _is_halved(trial, [other for other in others if other.counts]):
        return f"{own:.3f} after scoring {number} is not among the best third of {len(comparable) + 1} trials"
    return ""


def _is_halved(trial: Trial, others: Sequence[Trial]) -> bool:
    """Whether asynchronous successive halving (Li et al. 2020) stops `trial`: of each rung the best third goes on.

    Rungs are scorings 1, 3, 9 … Optuna's pruner keeps its rungs with the trials, so these are told to it once more.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    stopped = False
    for one in (*others, trial):
        asked = study.ask()
        best = -float("inf")
        for number, step in enumerate(sorted(one.scores), start=1):
            best = max(best, one.scores[step])
            asked.report(best, number)
            stopped = asked.should_prune()
        if one is not trial:
            study.tell(asked, state=TrialState.PRUNED)
    return stopped
