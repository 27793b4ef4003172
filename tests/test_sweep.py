"""Whole searches over a recipe's settings on a tiny model, and the journal from which a broken-off one goes on."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from command_line import quick_training, read_lines, refuse, run_cli, succeed, write_rows
from weitiao.errors import RecipeError, ResumeError, RunError
from weitiao.recipe import Lora, Recipe, load_recipe, make_recipe
from weitiao.runs import RunFolder
from weitiao.search import sweep as sweep_module
from weitiao.search.space import Space
from weitiao.search.sweep import Sweep, sweep_recipe
from weitiao.search.trials import Journal, Trial

LABELS = ("体育", "科技", "财经")
GOOD, POOR = 3e-2, 1e-9
"""A learning rate by which the tiny model learns the labels, and one by which it learns nothing."""


@pytest.fixture(scope="module", autouse=True)
def lighter_work() -> Iterator[None]:
    with quick_training():
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


WIDE = {
    "train.learning_rate": {"low": 1e-5, "high": 1e-1, "scale": "log"},
    "method.rank": {"low": 2, "high": 32},
    "train.schedule": ["linear", "cosine"],
}


def space_of(parameters: dict[str, Any], **more: Any) -> Space:
    return Space.model_validate({"parameters": parameters, "prune": "none", **more})


def run_sweep(recipe: Recipe, space: Space, *, resume: bool = False, screen: io.StringIO | None = None) -> Sweep:
    return sweep_recipe(recipe, space, resume=resume, console=Console(file=screen or io.StringIO(), width=200))


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
