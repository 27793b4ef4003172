"""The learning curve: nested shares of rows, the power law, what it foretells, then a whole curve on a tiny model."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from command_line import quick_training, refuse, succeed
from weitiao.check.examine import Subject, check_subject
from weitiao.data.mixture import choose_share
from weitiao.dataset import load_dataset
from weitiao.errors import RecipeError, ResumeError, RunError
from weitiao.recipe import Recipe, load_recipe, make_recipe
from weitiao.search import learning_curve as curve_module
from weitiao.search.curve_page import describe_forecast
from weitiao.search.learning_curve import FEWEST_DEV_ROWS, learning_curve, make_curve, rises
from weitiao.search.power_law import EXPONENTS, fit_power_law

SHARES = (0.25, 0.5, 1.0)


@pytest.fixture(scope="module", autouse=True)
def lighter_work() -> Iterator[None]:
    with quick_training():
        yield


@pytest.fixture
def recipe(tmp_path: Path, tiny_qwen2_folder: Path, sample_rows: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Two tasks of nine train rows and three dev rows each."""
    monkeypatch.chdir(tmp_path)
    return make_recipe(
        {
            "name": "rows",
            "model": {"path": str(tiny_qwen2_folder), "dtype": "float32"},
            "data": {"train": str(sample_rows), "held_out": 0.25},
            "method": {"rank": 4},
            "train": {
                "epochs": 1,
                "batch_size": 6,
                "learning_rate": 1e-2,
                "compile": "never",
                "evaluate_every": "never",
            },
            "generate": {"max_new_tokens": 12},
        }
    )


def with_data(recipe: Recipe, **data: Any) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})


# --- Shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_smaller_share_lies_within_a_larger_one_and_strata_are_in_it_alike(seed: int) -> None:
    strata = [*"a" * 40, *"b" * 20, *"c" * 7, "d", "e"]
    before: set[int] = set()
    for share in (0.1, 0.25, 0.3, 0.5, 0.75, 1.0):
        places = choose_share(strata, share=share, seed=seed)
        assert places == sorted(set(places))
        assert len(places) == round(share * len(strata))
        assert before <= set(places)
        before = set(places)
        taken = Counter(strata[place] for place in places)
        assert all(abs(taken[kind] - share * count) < 1.5 for kind, count in Counter(strata).items())


def test_other_seeds_choose_other_rows_and_a_share_is_never_empty() -> None:
    strata = ["a"] * 30
    assert choose_share(strata, share=0.2, seed=1) == choose_share(strata, share=0.2, seed=1)
    assert choose_share(strata, share=0.2, seed=1) != choose_share(strata, share=0.2, seed=2)
    assert len(choose_share(strata, share=0.001, seed=1)) == 1


def test_a_recipe_learns_from_its_share_and_is_scored_on_the_same_rows(recipe: Recipe) -> None:
    whole, half = load_dataset(recipe), load_dataset(with_data(recipe, share=0.5))
    assert half.dev == whole.dev
    assert set(half.train_tasks) == set(whole.train_tasks)
    assert len(half.train) == len(half.weights) == len(half.train_tasks) == 9
    assert {row.source for row in half.train} < {row.source for row in whole.train}
    assert half.fingerprint != whole.fingerprint
    assert "9 of 18 train rows are learnt (data.share: 0.5)." in half.notes


def test_check_counts_the_rows_that_are_learnt(recipe: Recipe) -> None:
    for share, rows in ((1.0, 18), (0.5, 9)):
        subject = Subject(name="recipe.yaml", recipe=with_data(recipe, share=share), is_recipe=True, has_model=True)
        plan = check_subject(subject).plan
        assert plan is not None and plan.work.rows == rows


def test_the_split_can_have_a_seed_of_its_own(recipe: Recipe) -> None:
    other = make_recipe(recipe.model_dump(mode="json"), ["train.seed=7"])
    own = make_recipe(recipe.model_dump(mode="json"), ["train.seed=7", "data.seed=42"])
    dev = [load_dataset(each).dev for each in (recipe, other, own)]
    assert dev[0] == dev[2] != dev[1]


# --- The power law ---------------------------------------------------------------------------------------------------

ROWS = np.array([100.0, 200.0, 400.0])


@pytest.mark.parametrize(("a", "b", "c"), [(0.9, 3.0, 0.5), (0.7, 20.0, 1.0), (1.0, 0.9, 0.12), (0.8, 500.0, 1.6)])
def test_points_on_a_power_law_give_that_law(a: float, b: float, c: float) -> None:
    law = fit_power_law(ROWS, np.array([a - b * ROWS**-c]))
    assert law.at(800.0)[0] == pytest.approx(a - b * 800**-c, abs=0.002)
    assert law.at(400.0)[0] == pytest.approx(a - b * 400**-c, abs=0.002)


def test_a_law_never_falls_and_never_passes_1() -> None:
    chance = np.random.default_rng(3)
    scores = chance.uniform(0, 1, size=(200, 3))
    law = fit_power_law(ROWS, scores)
    assert (law.b >= 0).all()
    assert (law.a <= 1).all() and (law.a >= 0).all()
    assert set(law.c) <= set(EXPONENTS)
    assert (law.at(800.0) - law.at(400.0) >= 0).all()
    falling = fit_power_law(ROWS, np.array([[0.9, 0.8, 0.7]]))
    assert falling.at(800.0)[0] == pytest.approx(0.8), "the mean is the nearest that does not fall"


def test_no_other_law_within_the_bounds_is_nearer() -> None:
    """Against a search of all a, b and c on a fine grid."""
    scores = np.array([[0.30, 0.55, 0.62], [0.6, 0.9, 1.0], [0.5, 0.52, 0.70]])
    law = fit_power_law(ROWS, scores)
    found = np.square(np.stack([law.at(rows) for rows in ROWS], axis=1) - scores).sum(axis=1)
    a, b = np.meshgrid(np.linspace(0, 1, 201), np.linspace(0, 1.5, 301), indexing="ij")
    for number, points in enumerate(scores):
        least = min(
            sum(np.square(a - b * (rows / 100) ** -c - score) for rows, score in zip(ROWS, points, strict=True)).min()
            for c in EXPONENTS
        )
        assert found[number] <= least + 1e-6


# --- What is foretold ------------------------------------------------------------------------------------------------


def curve_of(means: list[float], *, spread: float, dev_rows: int = 200, seeds: int = 1) -> Any:
    """The curve of points whose dev rows, drawn again, move them all together and each a little on its own."""
    chance = np.random.default_rng(1)
    figures = np.repeat(np.array(means)[:, None], seeds, axis=1)
    noise = chance.normal(0, spread, size=(3, seeds, curve_module.RESAMPLES))
    return make_curve("t", "f1", SHARES, [50, 100, 200], figures, figures[:, :, None] + noise, dev_rows=dev_rows)


def test_a_clear_rise_foretells_a_gain_with_an_interval_around_it() -> None:
    curve = curve_of([0.40, 0.55, 0.65], spread=0.005)
    told = curve.forecast
    assert told.verdict == "More rows pay."
    low, high = told.gain_interval
    assert 0.01 < low < told.gain < high
    assert told.gain == pytest.approx(0.0667, abs=0.002), "each doubling brings two thirds of the one before"
    assert (told.rows, told.score) == (400, pytest.approx(0.65 + told.gain, abs=1e-3))
    assert [point.score for point in curve.points] == [0.40, 0.55, 0.65]
    assert all(point.interval[0] < point.score < point.interval[1] for point in curve.points)


def test_a_level_curve_foretells_little_and_a_noisy_one_nothing() -> None:
    assert curve_of([0.80, 0.80, 0.80], spread=0.001).forecast.verdict == "More rows like these would bring little."
    noisy = curve_of([0.60, 0.63, 0.65], spread=0.04).forecast
    assert noisy.verdict.startswith("Cannot be told from 3 points: label more dev rows or train several seeds")
    assert noisy.gain_interval[0] < 0.01 < noisy.gain_interval[1]
    assert "seeds" not in curve_of([0.60, 0.63, 0.65], spread=0.04, seeds=3).forecast.verdict


def test_a_curve_that_rises_ever_faster_says_that_the_law_falls_behind() -> None:
    told = describe_forecast(curve_of([0.3, 0.4, 0.6], spread=0.005))
    assert told.endswith("More rows pay. The last score lies 0.031 above the law, so it may be more.")
    assert "so it may be more" not in describe_forecast(curve_of([0.4, 0.55, 0.65], spread=0.005))


def test_few_dev_rows_foretell_nothing_however_equal_the_scores() -> None:
    told = curve_of([1.0, 1.0, 1.0], spread=0.0, dev_rows=FEWEST_DEV_ROWS - 1).forecast
    assert told.verdict.startswith(f"Cannot be told: {FEWEST_DEV_ROWS - 1} dev rows are too few")


def test_seeds_that_differ_widen_the_interval() -> None:
    figures = np.array([[0.40, 0.50], [0.50, 0.60], [0.60, 0.70]])
    drawn = np.repeat(figures[:, :, None], curve_module.RESAMPLES, axis=2)
    point = make_curve("t", "f1", SHARES, [50, 100, 200], figures, drawn, dev_rows=200).points[0]
    assert (point.score, point.by_seed) == (pytest.approx(0.45), (0.40, 0.50))
    assert point.interval == pytest.approx((0.40, 0.50)), "one seed twice, or the other, is half of all draws"


@pytest.mark.parametrize(("rows", "good"), [([1, 2, 3], True), ([0, 2, 4], False), ([2, 2, 4], False)])
def test_a_curve_needs_rows_that_rise(rows: list[int], good: bool) -> None:
    assert rises(rows) is good


# --- A whole curve ---------------------------------------------------------------------------------------------------


def test_a_curve_trains_nested_shares_and_tells_each_task(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in its second training, then gone on with: what was finished is not repeated."""
    Path("recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    began: list[str] = []
    tune = curve_module.tune_model

    def tune_or_stop(own: Recipe, **settings: Any) -> Any:
        began.append(own.name)
        if len(began) == 2:
            raise KeyboardInterrupt
        return tune(own, **settings)

    monkeypatch.setattr(curve_module, "tune_model", tune_or_stop)
    with pytest.raises(KeyboardInterrupt):
        learning_curve(recipe, console=Console(file=io.StringIO()))
    assert "already holds a curve" in refuse("learning-curve", "recipe.yaml")
    printed = succeed("learning-curve", "recipe.yaml", "--resume")
    names = [f"share-{share}-seed-42" for share in (25, 50, 100)]
    assert began == [names[0], names[1], names[1], names[2]]
    folder = Path("runs/rows-curve")
    rows: set[str] = set()
    for name, count in zip(names, (4, 9, 18), strict=True):
        own = load_recipe(folder / name / "recipe.yaml")
        dataset = load_dataset(own)
        assert len(dataset.train) == count
        assert rows < {row.source for row in dataset.train}
        assert dataset.dev == load_dataset(recipe).dev
        rows = {row.source for row in dataset.train}
    data = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    assert [curve["task"] for curve in data["tasks"]] == ["labels", "triples", "all tasks"]
    for curve in data["tasks"]:
        assert [point["share"] for point in curve["points"]] == [0.25, 0.5, 1.0]
        assert curve["forecast"]["rows"] == 2 * curve["points"][-1]["rows"]
        assert curve["forecast"]["verdict"].startswith("Cannot be told: 3 dev rows are too few")
        report = json.loads((folder / names[2] / "evaluations/dev/report.json").read_text(encoding="utf-8"))
        for score in report["sides"]["tuned"]["scores"]:
            if score["task"] == curve["task"]:
                assert curve["points"][2]["score"] == pytest.approx(score["metrics"][score["primary"]], abs=1e-4)
    page = (folder / "curve.md").read_text(encoding="utf-8")
    assert "As many rows again (18 → 36) are foretold" in page
    assert "As many rows again (18 → 36) are foretold" in printed
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ResumeError, match=r"recipe.method.rank: was 4, is 8"):
        learning_curve(make_recipe(recipe.model_dump(mode="json"), ["method.rank=8"]), resume=True)


def test_shares_that_make_no_curve_are_refused_before_anything_is_written(recipe: Recipe) -> None:
    Path("recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    for shares in ("50,100", "25,50,75", "50,25,100", "0,50,100"):
        assert "Give three or more, rising, the last 100" in refuse("learning-curve", "recipe.yaml", "--shares", shares)
    assert "Write percents" in refuse("learning-curve", "recipe.yaml", "--shares", "a,b,c")
    assert "shares further apart" in refuse("learning-curve", "recipe.yaml", "--shares", "24,25,100")
    assert "the curve sets it" in refuse("learning-curve", "recipe.yaml", "data.share=0.5")
    with pytest.raises(RecipeError, match="needs dev rows"):
        learning_curve(with_data(recipe, held_out=0.0))
    with pytest.raises(RunError, match="no curve to resume"):
        learning_curve(recipe, resume=True)
    assert not Path("runs").exists()
