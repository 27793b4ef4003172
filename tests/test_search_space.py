"""What a search tries and stops, as functions: spaces held against a recipe, values chosen, poor trials told."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from weitiao.errors import RecipeError
from weitiao.recipe import Lora, Recipe, make_recipe
from weitiao.search import choosing as choosing_module
from weitiao.search.choosing import choose_values, require_optuna
from weitiao.search.pruning import judge
from weitiao.search.space import Search, Space, apply_values, load_space, make_search
from weitiao.search.trials import State, Trial


@pytest.fixture
def recipe() -> Recipe:
    """A recipe of which nothing is ever opened."""
    return make_recipe(
        {"name": "rows", "model": "nowhere", "data": {"train": "rows.jsonl"}, "method": {"rank": 4, "alpha": 8}}
    )


def space_of(parameters: dict[str, Any], **more: Any) -> Space:
    return Space.model_validate({"parameters": parameters, "prune": "none", **more})


def search_of(parameters: dict[str, Any], recipe: Recipe, **more: Any) -> Search:
    return make_search(recipe, space_of(parameters, **more))


def scored(number: int, *scores: float, state: State = "finished", **values: Any) -> Trial:
    """A trial scored at steps 1, 2, 3 …"""
    return Trial(number=number, values=values, state=state, scores=dict(enumerate(scores, start=1)), steps=len(scores))


# --- The space -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"train.learning_rat": [1, 2]}, "there is no such key in this recipe. Did you mean train.learning_rate?"),
        ({"method.epochs": [1, 2]}, "method.epochs: there is no such key in this recipe. Did you mean train.epochs?"),
        ({"train.batch_size": [4, "many"]}, "train.batch_size: Input should be a valid integer"),
        ({"train.warmup": {"low": 0, "high": 2}}, "train.warmup: Input should be less than 1"),
        ({"method.rank": {"low": 8, "high": 4}}, "method.rank: from 8 to 4 is no range"),
        ({"method.rank": {"low": 2, "high": 8, "step": 1.5}}, "method.rank takes whole numbers: step: 1.5"),
        ({"train.warmup": {"low": 0, "high": 0.5, "scale": "log"}}, "scale: log needs values above 0"),
        ({"method.rank": [8]}, "leaves no choice"),
        ({"train.learning_rate": [1e-4, "1e-4"]}, "stands twice"),
        ({"method": [{"rank": 4}, {"rank": 8}], "method.alpha": [1, 2]}, "method.alpha: it is a part of method"),
        ({"name": ["a", "b"]}, "changes nothing about the tuned model"),
        ({"evaluate.best_by": ["overall", "labels.accuracy"]}, "trials must be scored alike"),
        ({"method.name": ["lora", "ptuning_v2"]}, "method.rank: there is no such key"),
        ({"train.seed": [1, 2]}, "Give files of dev rows (data.dev) or data.seed."),
        ({"data.retrieve": [0, 2], "data.turns": ["all", "flagged"]}, "data.retrieve=2, data.turns=all: "),
    ],
)
def test_a_space_that_the_recipe_cannot_use_is_refused(
    parameters: dict[str, Any], sentence: str, recipe: Recipe
) -> None:
    with pytest.raises(RecipeError) as refused:
        search_of(parameters, recipe)
    assert sentence in str(refused.value)


def test_all_mistakes_of_a_space_are_named_at_once(recipe: Recipe) -> None:
    with pytest.raises(RecipeError) as refused:
        search_of({"train.epoch": [1, 2], "method.rank": ["a", "b"]}, recipe)
    assert "train.epochs" in str(refused.value)
    assert "method.rank" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("parameters: {method.rank: [1, 2]}\ntrial: 3", "trial: there is no such key. Did you mean trials?"),
        ("parameters: {method.rank: [1, 2]}\nsearch: best", "search: Input should be 'grid', 'random' or 'tpe'"),
        ("parameters: {}", "parameters: "),
        ("parameters: {method.rank: {low: 1, high: 4, stepp: 1}}", "stepp"),
        ("- method.rank", "must hold the key parameters:"),
        ("parameters: [", "is not YAML"),
    ],
)
def test_a_file_that_is_no_space_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as refused:
        load_space(tmp_path / "space.yaml")
    assert sentence in str(refused.value)


def test_values_are_those_the_recipe_would_hold(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(
        "search: grid\nparameters:\n  train.learning_rate: [1e-5, 1e-4]\n  method.rank: {low: 4, high: 12, step: 4}\n"
        "  method.targets: [all-linear, [q_proj, v_proj]]\n",
        encoding="utf-8",
    )
    search = make_search(recipe, load_space(tmp_path / "space.yaml"))
    assert [parameter.grid for parameter in search.parameters] == [
        (1e-5, 1e-4), (4, 8, 12), ("all-linear", ["q_proj", "v_proj"])
    ]  # fmt: skip
    assert (search.num_trials, search.grid_size) == (12, 12)
    tried = apply_values(recipe, next(search.grid()), name="first")
    assert (tried.name, tried.train.learning_rate, tried.method) == ("first", 1e-5, Lora(rank=4, alpha=8))
    methods = search_of({"method": [{"rank": 2}, {"name": "ptuning_v2"}]}, recipe, search="grid")
    assert [values["method"] for values in methods.grid()] == [{"rank": 2}, {"name": "ptuning_v2"}]
    named = search_of({"train.task_weights.labels": [1, 2]}, recipe, search="grid")
    assert [apply_values(recipe, values, name="n").train.task_weights for values in named.grid()] == [
        {"labels": 1.0}, {"labels": 2.0}
    ]  # fmt: skip


def test_a_grid_needs_values_that_can_be_counted_and_all_of_them(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"train.learning_rate: a grid needs a list of values"):
        search_of({"train.learning_rate": {"low": 1e-5, "high": 1e-3}}, recipe, search="grid")
    with pytest.raises(RecipeError, match="trials: 2 is less than the 3 of the grid"):
        search_of({"method.rank": [1, 2, 3]}, recipe, search="grid", trials=2)


# --- Choosing --------------------------------------------------------------------------------------------------------

WIDE = {
    "train.learning_rate": {"low": 1e-5, "high": 1e-1, "scale": "log"},
    "method.rank": {"low": 2, "high": 32},
    "train.schedule": ["linear", "cosine"],
}


def choose(search: Search, count: int, worth: Any = lambda values: 0.0) -> list[Trial]:
    """So many trials, each worth what `worth` makes of its values; None: it failed."""
    trials: list[Trial] = []
    for number in range(count):
        values = choose_values(search, trials)
        assert values is not None
        figure = worth(values)
        found = {"state": "failed"} if figure is None else {"scores": {1: figure}, "state": "finished"}
        trials.append(Trial(number=number, values=values, **found))  # type: ignore[arg-type]
    return trials


@pytest.mark.parametrize("way", ["random", "tpe"])
def test_equal_seeds_choose_equal_values_and_all_lie_in_the_space(way: str, recipe: Recipe) -> None:
    def worth(values: dict[str, Any]) -> float | None:
        return None if values["train.learning_rate"] > 0.05 else -values["method.rank"]

    found = [
        [trial.values for trial in choose(search_of(WIDE, recipe, search=way, seed=seed), 15, worth)]
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    for values in found[0]:
        assert 1e-5 <= values["train.learning_rate"] <= 1e-1
        assert values["method.rank"] in range(2, 33) and isinstance(values["method.rank"], int)
        assert values["train.schedule"] in ("linear", "cosine")
    assert {values["train.schedule"] for values in found[0]} == {"linear", "cosine"}
    decades = [math.floor(math.log10(values["train.learning_rate"])) for values in found[0]]
    assert len(set(decades)) >= 3, "a logarithmic range is not all in its last decade"


def test_tpe_tries_more_where_trials_were_good_and_fewer_where_they_failed(recipe: Recipe) -> None:
    def worth(values: dict[str, Any]) -> float | None:
        rate = values["train.learning_rate"]
        return None if rate > 1e-2 else -abs(math.log10(rate) + 3)

    near = {}
    for way in ("random", "tpe"):
        trials = choose(search_of(WIDE, recipe, search=way), 40, worth)[20:]
        near[way] = sum(trial.best is not None and trial.best > -0.5 for trial in trials)
    assert near["tpe"] >= 2 * near["random"]


@pytest.mark.parametrize("way", ["random", "tpe"])
def test_no_values_are_tried_twice_and_all_are_tried(way: str, recipe: Recipe) -> None:
    search = search_of({"method.rank": [1, 2, 3], "train.schedule": ["linear", "cosine"]}, recipe, search=way)
    trials = choose(search, 6)
    assert {(trial.values["method.rank"], trial.values["train.schedule"]) for trial in trials} == {
        (rank, schedule) for rank in (1, 2, 3) for schedule in ("linear", "cosine")
    }
    assert choose_values(search, trials) is None


def test_without_optuna_tpe_and_halving_are_refused_and_the_rest_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing_module.importlib.util, "find_spec", lambda name: None)
    for more in ({"search": "tpe"}, {"prune": "halving"}):
        with pytest.raises(RecipeError, match=r"pip install 'weitiao\[sweep\]'"):
            require_optuna(space_of({"method.rank": [1, 2]}, **more))
    require_optuna(space_of({"method.rank": [1, 2]}, prune="median"))


# --- Stopping --------------------------------------------------------------------------------------------------------


def test_a_trial_below_the_median_of_as_many_scorings_is_stopped() -> None:
    space = space_of({"method.rank": [1, 2]}, prune="median", prune_after=3)
    others = [scored(0, 0.2, 0.6), scored(1, 0.4, 0.5), scored(2, 0.3, 0.9, 0.9)]
    assert "0.290 after scoring 1 is below 0.300, the median of 3 trials" in judge(space, scored(3, 0.29), others)
    assert judge(space, scored(3, 0.3), others) == ""
    assert judge(space, scored(3, 0.61, 0.1), others) == "", "its best figure so far counts"
    assert judge(space, scored(3, 0.1, 0.1, 0.1), others) == "", "only one other was scored three times"
    assert judge(space, scored(3, 0.1), [*others[:2], scored(2, 0.3, state="failed")]) == ""
    assert judge(space_of({"method.rank": [1, 2]}), scored(3, 0.1), others) == ""
    early = dataclasses.replace(scored(3, 0.1), steps=4)
    assert judge(space, early, others) == "", "a quarter of its training says too little"
    early.steps = 3
    assert judge(space, early, others)


def test_successive_halving_lets_the_best_third_go_on() -> None:
    space = space_of({"method.rank": [1, 2]}, prune="halving", prune_after=3)
    others = [scored(number, 0.1 * number, 0.1 * number, 0.1 * number) for number in range(6)]
    assert "is not among the best third of 7 trials" in judge(space, scored(6, 0.05), others)
    assert judge(space, scored(6, 0.6), others) == ""
    assert judge(space, scored(6, 0.6, 0.0), others) == "", "no rung at the second scoring"
