"""What the next trial tries: each combination of a grid in turn, values by chance, or where trials were good (TPE).

Every choice is a function of the seed, the trial's number and the trials before it. Nothing is kept between two, so a
search that was broken off goes on with the very values it would have tried.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError
from .space import Parameter, Search, Space, Value
from .trials import Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_DRAWS = 200
"""How often values are drawn in search of some that were not tried yet."""


def require_optuna(space: Space) -> None:
    """Raise RecipeError when `space` needs Optuna and it is not installed."""
    needed = [what for what, says in (("search: tpe", space.search == "tpe"),
                                      ("prune: halving", space.prune == "halving")) if says]  # fmt: skip
    if needed and importlib.util.find_spec("optuna") is None:
        raise RecipeError(
            f"{' and '.join(needed)} needs Optuna, which is not installed: pip install 'weitiao[sweep]'. Without it "
            f"there are search: grid or random, and prune: median or none."
        )


def choose_values(search: Search, past: Sequence[Trial]) -> dict[str, Value] | None:
    """The values of the trial after those in `past`; None when all combinations were tried."""
    if search.space.search == "grid":
        return next(itertools.islice(search.grid(), len(past), None), None)
    tried = {_key(trial.values) for trial in past}
    if search.space.search == "tpe":
        chosen = _by_tpe(search, past)
        if _key(chosen) not in tried:
            return chosen
    return next((values for values in _by_chance(search, len(past)) if _key(values) not in tried), None)


def _key(values: Mapping[str, Value]) -> str:
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def _by_chance(search: Search, number: int) -> Iterator[dict[str, Value]]:
    """Values drawn by chance; then, where they can be counted, all of them in turn."""
    chance = random.Random(f"trial/{search.space.seed}/{number}")
    for _ in range(_DRAWS):
        yield {parameter.key: parameter.draw(chance) for parameter in search.parameters}
    if search.grid_size:
        yield from search.grid()


def _by_tpe(search: Search, past: Sequence[Trial]) -> dict[str, Value]:
    """What Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) makes of `past`."""
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=random.Random(f"tpe/{search.space.seed}/{len(past)}").getrandbits(32))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    over = {parameter.key: _distribution(parameter) for parameter in search.parameters}
    for trial in past:
        params = {parameter.key: _to_optuna(parameter, trial.values[parameter.key]) for parameter in search.parameters}
        if trial.counts and trial.state == "finished":
            study.add_trial(create_trial(params=params, distributions=over, value=trial.best))
        else:  # one that failed has no figures and so counts as the worst there can be
            figures = dict(enumerate(trial.scores.values(), start=1)) if trial.counts else {}
            state = TrialState.PRUNED
            study.add_trial(create_trial(state=state, params=params, distributions=over, intermediate_values=figures))
    params = study.ask(over).params
    return {parameter.key: _from_optuna(parameter, params[parameter.key]) for parameter in search.parameters}


def _distribution(parameter: Parameter) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.choices:
        return CategoricalDistribution(range(len(parameter.choices)))
    log = parameter.scale == "log"
    high = parameter.grid[-1] if parameter.grid else parameter.high  # the last step may end before the range does
    if parameter.whole:
        step = 1 if parameter.step is None else int(parameter.step)
        return IntDistribution(int(parameter.low), int(high), log=log, step=step)
    return FloatDistribution(parameter.low, high, log=log, step=parameter.step)


def _to_optuna(parameter: Parameter, value: Value) -> Any:
    """A choice is told by its number: Optuna takes no lists or parts."""
    return parameter.choices.index(value) if parameter.choices else value


def _from_optuna(parameter: Parameter, value: Any) -> Value:
    return parameter.choices[value] if parameter.choices else parameter.rounded(value)
