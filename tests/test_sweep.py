"""The search over a recipe's settings: spaces, choices and stops as functions, then whole searches on a tiny model."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from command_line import light_training, read_lines, refuse, run_cli, succeed, write_rows
from weitiao.errors import RecipeError, ResumeError, RunError
from weitiao.recipe import Lora, Recipe, load_recipe, make_recipe
from weitiao.runs import RunFolder
from weitiao.search import choosing as choosing_module
from weitiao.search import sweep as sweep_module
from weitiao.search.choosing import choose_values, require_optuna
from weitiao.search.pruning import judge
from weitiao.search.space import Search, Space, apply_values, load_space, make_search
from weitiao.search.sweep import Sweep, sweep_recipe
from weitiao.search.trials import Journal, State, Trial
from weitiao.train import loop as loop_module

LABELS = ("体育", "科技", "财经")
GOOD, POOR = 3e-2, 1e-9
"""A learning rate by which the tiny model learns the labels, and one by which it learns nothing."""


@pytest.fixture(scope="module", autouse=True)
def lighter_work() -> Iterator[None]:
    with light_training(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "draw_curve", lambda path, metrics: path.write_bytes(b"no curve"))
        yield


@pytest.fixture
def recipe(tmp_path: Path, tiny_qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Rows whose label stands in the text's first sign; 18 to learn from and 6 to score on."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "context": f"Input: 选一个标签。\n\n{sign * 4}{end}\nAnswer: ",
            "target": json.dumps([label], ensure_ascii=False),
        }
        for sign, label in zip("球星钱", LABELS, strict=True)
        for end in "甲乙丙丁戊己庚辛"
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    return make_recipe(
        {
            "name": "rows",
            "model": {"path": str(tiny_qwen2_folder), "dtype": "float32"},
            "data": {"train": "rows.jsonl", "held_out": 0.25},
            "method": {"rank": 4, "alpha": 8},
            "train": {"epochs": 3, "batch_size": 6, "learning_rate": GOOD, "compile": "never", "save_every": 3},
        }
    )


def space_of(parameters: dict[str, Any], **more: Any) -> Space:
    return Space.model_validate({"parameters": parameters, "prune": "none", **more})


def search_of(parameters: dict[str, Any], recipe: Recipe, **more: Any) -> Search:
    return make_search(recipe, space_of(parameters, **more))


def run_sweep(recipe: Recipe, space: Space, *, resume: bool = False, screen: io.StringIO | None = None) -> Sweep:
    return sweep_recipe(recipe, space, resume=resume, console=Console(file=screen or io.StringIO(), width=200))


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


def test_successive_halving_lets_the_best_third_go_on() -> None:
    space = space_of({"method.rank": [1, 2]}, prune="halving", prune_after=3)
    others = [scored(number, 0.1 * number, 0.1 * number, 0.1 * number) for number in range(6)]
    assert "is not among the best third of 7 trials" in judge(space, scored(6, 0.05), others)
    assert judge(space, scored(6, 0.6), others) == ""
    assert judge(space, scored(6, 0.6, 0.0), others) == "", "no rung at the second scoring"


# --- The journal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["", '{"trial": 1, "val', '{"trial": 1, "values": {"a": "体'])
def test_a_journal_is_read_back_as_it_was_up_to_the_line_that_a_crash_cut(cut: str, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    journal = Journal(path)
    trial = journal.begin({"method.targets": ["q_proj"], "name": "体"})
    journal.score(trial, step=3, steps=6, score=0.5)
    journal.score(trial, step=6, steps=6, score=0.25)
    journal.end(trial, "finished", seconds=2.0)
    with path.open("ab") as stream:
        stream.write(cut.encode()[: -1 if cut.endswith("体") else None])
    again = Journal(path)
    assert [each.to_json() for each in again.trials] == [trial.to_json()]
    assert again.begin({"name": "b"}).number == 1
    assert [each.values["name"] for each in Journal(path).trials] == ["体", "b"]


def test_a_journal_that_was_meddled_with_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_text('{"trial": 4, "state": "finished"}\n', encoding="utf-8")
    with pytest.raises(RunError, match="line 1, is none of this program's"):
        Journal(path)


# --- Whole searches --------------------------------------------------------------------------------------------------


def test_a_sweep_leaves_runs_a_table_best_first_and_the_best_recipe(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (tmp_path / "space.yaml").write_text(
        f"search: grid\nparameters: {{train.learning_rate: [{POOR}, {GOOD}]}}\n", encoding="utf-8"
    )
    printed = succeed("sweep", "recipe.yaml", "space.yaml", "train.epochs=2")
    folder = Path("runs/rows-sweep")
    assert printed.index("trial-001") < printed.index("trial-000"), "the better one comes first"
    assert f"weitiao evaluate {folder}/trial-001" in printed
    table = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    assert [(trial["trial"], trial["values"]) for trial in table["trials"]] == [
        ("trial-001", {"train.learning_rate": GOOD}), ("trial-000", {"train.learning_rate": POOR})
    ]  # fmt: skip
    assert table["trials"][0]["score"] > table["trials"][1]["score"]
    assert (folder / "parameters.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    best = load_recipe(folder / "best.yaml")
    assert (best.name, best.train.learning_rate, best.train.epochs) == ("rows-best", GOOD, 2)
    own = load_recipe(folder / "trial-001" / "recipe.yaml")
    assert own == best.model_copy(update={"name": "trial-001"})
    assert "loss" in (folder / "trial-001" / "training.log").read_text(encoding="utf-8")
    scores = [line["score"] for line in table["trials"][0]["scores"]]
    succeed("evaluate", folder / "trial-001", "--no-base")
    report = json.loads((folder / "trial-001/evaluations/dev/report.json").read_text(encoding="utf-8"))
    (evaluated,) = report["sides"]["tuned"]["scores"]
    assert evaluated["metrics"][evaluated["primary"]] == pytest.approx(max(scores), abs=1e-4), "the report is rounded"
    listed = json.loads(succeed("runs", "runs", "--json"))
    assert [run["name"] for run in listed] == ["rows-sweep/trial-000", "rows-sweep/trial-001"]
    assert "already holds a search. Go on with --resume" in refuse("sweep", "recipe.yaml", "space.yaml")


def test_a_poor_trial_is_stopped_and_is_a_run_all_the_same(recipe: Recipe) -> None:
    space = space_of({"train.learning_rate": [GOOD, 1.1 * GOOD, POOR]}, search="grid", prune="median", prune_after=2)
    screen = io.StringIO()
    found = run_sweep(recipe, space, screen=screen)
    assert [trial.state for trial in found.trials] == ["finished", "finished", "stopped"]
    poor = found.trials[2]
    assert (max(poor.scores), poor.steps) == (6, 9), "one scoring before its end"
    assert poor.reason.startswith(
        "Stopped at step 6 of 9: 0.667 after scoring 2 is below 1.000, the median of 2 trials"
    )
    assert poor.reason in screen.getvalue()
    run = RunFolder.open(found.folder / poor.name)
    assert poor.reason in (run.path / "training.log").read_text(encoding="utf-8")
    assert max(line["step"] for line in run.read_metrics()) == 6
    assert found.best is not poor


class Killed(BaseException):
    """What a kill is to the code that it hits."""


def test_a_sweep_that_is_killed_twice_goes_on_as_if_it_had_not_been(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its second scoring was written down, then after the third from there: in another trial."""
    space = space_of(WIDE, search="tpe", trials=2)
    whole = run_sweep(recipe, space)
    scored: list[int] = []
    score = Journal.score

    def run_until(count: int, *, resume: bool) -> list[Trial]:
        def score_or_die(journal: Journal, trial: Trial, **settings: Any) -> None:
            score(journal, trial, **settings)
            scored.append(trial.number)
            if len(scored) == count:
                raise Killed

        scored.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "score", score_or_die)
            return list(run_sweep(recipe.model_copy(update={"name": "killed"}), space, resume=resume).trials)

    with pytest.raises(Killed):
        run_until(2, resume=False)
    with pytest.raises(Killed):
        run_until(3, resume=True)
    assert scored == [0, 0, 1], "the first trial went on from its checkpoint, one scoring of three was done"
    with pytest.raises(RunError, match="Go on with --resume"):
        run_until(99, resume=False)
    trials = run_until(99, resume=True)
    assert scored == [1, 1, 1], "what was finished is not repeated"
    assert list(map(summary, trials)) == list(map(summary, whole.trials)), "equal seeds, equal trials"


def summary(trial: Trial) -> dict[str, Any]:
    return {key: value for key, value in trial.to_json().items() if key != "seconds"}


def test_ctrl_c_saves_the_trial_and_says_what_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (tmp_path / "space.yaml").write_text("search: grid\nparameters: {method.rank: [2, 4]}\n", encoding="utf-8")
    score = Journal.score

    def score_and_press(journal: Journal, trial: Trial, **settings: Any) -> None:
        score(journal, trial, **settings)
        if len(journal.trials) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "score", score_and_press)
        stopped = run_cli("sweep", "recipe.yaml", "space.yaml", "train.epochs=2")
    assert stopped.exit_code == 130
    assert "saving after this step" in stopped.stderr
    assert "Go on with: weitiao sweep recipe.yaml space.yaml train.epochs=2 --resume" in stopped.stderr
    states = [trial.state for trial in Journal(Path("runs/rows-sweep/trials.jsonl")).trials]
    assert states == ["finished", "running"]
    assert "trial-001" in succeed("sweep", "recipe.yaml", "space.yaml", "train.epochs=2", "--resume")


def test_trials_that_diverge_or_fail_are_results(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1})})
    space = space_of(
        {"train.learning_rate": [1e30, GOOD], "method.targets": ["all-linear", ["nothing"]]}, search="grid"
    )
    found = run_sweep(recipe, space)
    assert [trial.state for trial in found.trials] == ["diverged", "failed", "finished", "failed"]
    assert "diverged" in found.trials[0].reason
    assert "nothing" in found.trials[1].reason
    assert found.ranked[0] is found.best is found.trials[2]
    began: list[str] = []
    tune = sweep_module.tune_model
    monkeypatch.setattr(
        sweep_module, "tune_model", lambda own, **settings: (began.append(own.name), tune(own, **settings))
    )
    run_sweep(recipe, space, resume=True)
    assert began == ["trial-001", "trial-003"], "what failed is tried once more, what diverged would diverge again"


def test_a_search_whose_first_trials_fail_alike_ends(recipe: Recipe) -> None:
    lost = recipe.model_copy(update={"method": Lora(targets=("nothing",))})
    with pytest.raises(RunError, match=r"(?s)The first two trials failed alike.*nothing"):
        run_sweep(lost, space_of({"train.warmup": [0, 0.1, 0.2]}, search="grid"))
    assert [line["state"] for line in read_lines(Path("runs/rows-sweep/trials.jsonl")) if "state" in line] == [
        "failed", "failed"
    ]  # fmt: skip


def test_a_search_without_scored_dev_rows_is_refused(recipe: Recipe) -> None:
    never = recipe.model_copy(update={"train": recipe.train.model_copy(update={"evaluate_every": "never"})})
    with pytest.raises(RecipeError, match="A search needs dev rows"):
        run_sweep(never, space_of({"method.rank": [1, 2]}))
    assert not Path("runs").exists()


def test_a_search_goes_on_only_with_its_own_recipe_and_space(recipe: Recipe) -> None:
    with pytest.raises(RunError, match="There is no search to resume"):
        run_sweep(recipe, space_of({"method.rank": [1, 2]}), resume=True)
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1})})
    found = run_sweep(short, space_of({"method.rank": [1, 2, 3]}, trials=1))
    with pytest.raises(ResumeError, match=r"space.seed: was 0, is 1"):
        run_sweep(short, space_of({"method.rank": [1, 2, 3]}, trials=1, seed=1), resume=True)
    with pytest.raises(ResumeError, match=r"recipe.train.epochs"):
        run_sweep(recipe, space_of({"method.rank": [1, 2, 3]}, trials=1), resume=True)
    shutil.rmtree(found.folder / "trial-000" / "checkpoints")
    more = run_sweep(short, space_of({"method.rank": [1, 2, 3]}, trials=2), resume=True)
    assert [summary(trial) for trial in more.trials][:1] == [summary(trial) for trial in found.trials]
    assert len(more.trials) == 2, "a search can be given more trials"
