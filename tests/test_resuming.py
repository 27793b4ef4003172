"""Which checkpoint a run goes on from: the one asked for, the newest that is whole; what is damaged is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from command_line import quick_training, refuse, run_cli, write_topics
from weitiao.apply import open_run
from weitiao.cli.models import join_resume
from weitiao.errors import ContractError, RunError
from weitiao.recipe import load_recipe
from weitiao.runs import RunFolder
from weitiao.train import loop as loop_module
from weitiao.train.checkpoint import list_checkpoints, step_of
from weitiao.train.manifest import MANIFEST, damage_in, write_manifest
from weitiao.tune import tune_model

STEPS, SAVED = 9, (1, 2, 3, 4, 5, 6)


@pytest.fixture(autouse=True, scope="module")
def light() -> Iterator[None]:
    with quick_training():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """Rows, a recipe, the run never stopped in runs/whole, and in runs/tiny one with the checkpoints `SAVED`."""
    home = tmp_path_factory.mktemp("resuming")
    write_topics(home / "rows.jsonl")
    recipe = {
        "name": "tiny",
        "model": {"path": str(tiny_llama_folder), "dtype": "float32"},
        "data": {"train": "rows.jsonl"},
        "method": {"dropout": 0.1, "rank": 4},
        "generate": {"max_new_tokens": 4},
        "train": {
            "epochs": 1.5, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "compile": "never",
            "save_every": 1, "evaluate_every": 2, "keep_checkpoints": 20,
        },
    }  # fmt: skip
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert run_cli("train", "recipe.yaml", "name=whole").exit_code == 0
        take_step, taken = loop_module.take_step, []

        def break_down(*args: object) -> object:
            taken.append(None)
            if len(taken) > SAVED[-1]:
                raise RunError("the power is gone")
            return take_step(*args)  # type: ignore[arg-type]

        patch.setattr(loop_module, "take_step", break_down)
        assert run_cli("train", "recipe.yaml").exit_code == 2
    return home


@pytest.fixture
def run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy of runs/tiny, beside the rows, the recipe and runs/whole."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return RunFolder("runs/tiny")


def checkpoint(run: RunFolder, step: int) -> Path:
    return run.checkpoints / f"step-{step:06}"


def steps(run: RunFolder) -> list[int]:
    return [step_of(path) for path in list_checkpoints(run)]


def resume(*words: str) -> str:
    """What is said by a training that goes on and ends as the one never stopped did."""
    result = run_cli("train", "recipe.yaml", *words)
    assert result.exit_code == 0, result.output
    for part in ("adapter", "best"):
        found = [Path(f"runs/{name}/{part}/adapter_model.safetensors").read_bytes() for name in ("tiny", "whole")]
        assert found[0] == found[1], part
    return result.stderr


# --- What --resume says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["r.yaml", "--resume"], ["r.yaml", "--resume=yes"]),
        (["--resume", "r.yaml"], ["--resume=yes", "r.yaml"]),
        (["r.yaml", "--resume", "20", "a=b"], ["r.yaml", "--resume=20", "a=b"]),
        (["r.yaml", "--resume", "train.epochs=2"], ["r.yaml", "--resume=yes", "train.epochs=2"]),
        (["r.yaml", "--resume", "--help"], ["r.yaml", "--resume=yes", "--help"]),
        (["r.yaml", "--resume=7", "--resume"], ["r.yaml", "--resume=7", "--resume=yes"]),
        (["r.yaml", "--resume", "maybe"], ["r.yaml", "--resume=maybe"]),
        (["r.yaml", "--resume", "--", "--resume"], ["r.yaml", "--resume=yes", "--", "--resume"]),
        (["r.yaml", "a=b"], ["r.yaml", "a=b"]),
    ],
)
def test_resume_takes_the_next_word_only_where_it_is_a_value(words: list[str], joined: list[str]) -> None:
    assert join_resume(words) == joined


@pytest.mark.parametrize("words", [
    ("--resume",), ("--resume", "yes"), ("--resume=yes",), ("--resume", "train.log_every=2"), ("--resume", "auto"),
    ("--resume", "6"), ("--resume", "runs/tiny/checkpoints/step-000006"),
])  # fmt: skip
def test_every_way_to_name_the_newest_goes_on_from_there(words: tuple[str, ...], run: RunFolder) -> None:
    said = resume(*words)
    assert "Going on from step 6 (runs/tiny/checkpoints/step-000006)." in said
    assert "later steps" not in said


@pytest.mark.parametrize(
    "named", ["3", "003", "runs/tiny/checkpoints/step-000003", "./runs/../runs/tiny/checkpoints/step-000003/"]
)
def test_an_earlier_checkpoint_is_gone_on_from_and_the_later_ones_are_told_and_overtaken(
    named: str, run: RunFolder
) -> None:
    said = resume("--resume", named, "train.save_every=epoch")
    assert "Going on from step 3" in said
    assert "The checkpoints of later steps (4, 5, 6) stay until the next one is saved, and are then removed" in said
    assert steps(run) == [1, 2, 3, 6, 9]
    logged = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in logged if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in logged if line["kind"] == "dev"] == [2, 4, 6, 8, 9]


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ("7", "runs/tiny has no checkpoint of step 7. There are those of the steps 1, 2, 3, 4, 5, 6, in runs/tiny/ch"),
        (
            "maybe",
            "--resume maybe: there is no such folder. Write --resume alone or yes for the newest checkpoint, auto",
        ),
        ("configs/ds_zero_2.json", "--resume configs/ds_zero_2.json: there is no such folder."),
        (
            "runs/whole/checkpoints/step-000009",
            "that folder is no checkpoint of the run runs/tiny, which cannot go on from",
        ),
        ("runs/tiny", "--resume runs/tiny: that folder is no checkpoint of the run runs/tiny"),
        ("-1", "No such option"),
        ("", "--resume : that folder is no checkpoint of the run runs/tiny"),
    ],
)
def test_what_names_no_checkpoint_is_refused_with_those_there_are(named: str, sentence: str, run: RunFolder) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    said = " ".join(refuse("train", "recipe.yaml", f"--resume={named}" if not named.startswith("-") else named).split())
    assert sentence in said
    assert named == "-1" or "There are those of the steps 1, 2, 3, 4, 5, 6" in said
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_the_library_takes_the_same_forms(run: RunFolder) -> None:
    recipe = load_recipe(Path("recipe.yaml"), ())
    with pytest.raises(RunError, match="no checkpoint of step 44"):
        tune_model(recipe, resume=44)
    done = tune_model(recipe, resume=checkpoint(run, 5))
    assert (done.adapter / "adapter_config.json").exists()
    assert steps(done) == list(range(1, STEPS + 1))


def test_auto_begins_a_run_that_has_not_begun(run: RunFolder) -> None:
    shutil.rmtree(run.path)
    said = resume("--resume", "auto")
    assert "Going on" not in said
    assert run_cli("train", "recipe.yaml", "--resume", "auto").exit_code == 0, "nor does it mind one that is done"


def test_a_run_without_a_checkpoint_begins_at_the_first_step(run: RunFolder) -> None:
    shutil.rmtree(run.checkpoints)
    assert "has no checkpoint of step 3. It has none yet" in refuse("train", "recipe.yaml", "--resume", "3")
    assert "No checkpoint was saved yet: starting from the first step." in resume("--resume")


def test_a_training_may_save_by_time_too(run: RunFolder) -> None:
    resume("--resume", "train.save_every=epoch", "train.save_minutes=1e-9")
    assert steps(run) == list(range(1, STEPS + 1))


# --- Damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """One bit in the middle of the file is another; the file becomes one of its own, were it linked before."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("file", "harm", "told"),
    [
        ("weights.safetensors", flip, "weights.safetensors is not what was written, by its checksum"),
        ("optimiser.pt", flip, "optimiser.pt is not what was written, by its checksum"),
        ("state.json", flip, "state.json is not what was written, by its checksum"),
        ("optimiser.pt", cut, "optimiser.pt has "),
        ("state.json", remove, "state.json is missing"),
        (MANIFEST, remove, "manifest.json is missing"),
        (MANIFEST, lambda path: path.write_bytes(b""), "manifest.json cannot be read"),
        (MANIFEST, lambda path: path.write_text('{"files": 3}'), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_gone_on_from(
    file: str, harm: Callable[[Path], None], told: str, run: RunFolder
) -> None:
    harm(checkpoint(run, 6) / file)
    said = resume("--resume")
    assert f"  runs/tiny/checkpoints/step-000006: {told}" in said
    assert "Going back from step 6 to step 5: 1 step is lost and taken again." in said
    assert steps(run) == list(range(1, STEPS + 1))
    assert not any(damage_in(path) for path in list_checkpoints(run))


def test_several_damaged_ones_are_all_named(run: RunFolder) -> None:
    for step in (4, 5, 6):
        cut(checkpoint(run, step) / "weights.safetensors")
    said = resume("--resume", "auto")
    assert [f"step-{step:06}: weights.safetensors has" in said for step in (3, 4, 5, 6)] == [False, True, True, True]
    assert "Going back from step 6 to step 3: 3 steps are lost and taken again." in said


def test_where_all_are_damaged_nothing_is_trained_or_removed(run: RunFolder) -> None:
    for step in SAVED:
        flip(checkpoint(run, step) / "optimiser.pt")
    said = refuse("train", "recipe.yaml", "--resume")
    assert "No checkpoint of this run is whole:" in said
    assert all(f"step-{step:06}: optimiser.pt is not what was written" in said for step in SAVED)
    assert steps(run) == list(SAVED)


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(run: RunFolder) -> None:
    flip(checkpoint(run, 4) / "optimiser.pt")
    said = refuse("train", "recipe.yaml", "--resume", "4")
    assert "step-000004 is damaged: optimiser.pt is not what was written" in said
    assert "There are those of the steps 1, 2, 3, 5, 6, in" in said


@pytest.mark.parametrize("harm", [flip, cut, remove])
def test_a_best_adapter_that_was_damaged_is_brought_back_from_the_checkpoint(
    harm: Callable[[Path], None], run: RunFolder
) -> None:
    file = run.best / "adapter_model.safetensors"
    shutil.copyfile(file, run.path / "copy")
    file.unlink()  # checkpoints hold links to the same file: that would be damaged in all of them
    shutil.move(run.path / "copy", file)
    harm(file)
    resume("--resume")


def test_a_best_adapter_damaged_in_the_checkpoint_too_is_told_and_the_best_of_the_rest_is_kept(run: RunFolder) -> None:
    cut(run.best / "adapter_model.safetensors")
    cut(checkpoint(run, 6) / "best" / "adapter_config.json")
    result = run_cli("train", "recipe.yaml", "--resume")
    assert result.exit_code == 0, result.output
    assert "The best adapter so far, of step " in result.stderr
    assert "is damaged (adapter_" in result.stderr
    assert not damage_in(run.best)


def test_a_checkpoint_brings_back_the_best_adapter_of_its_time(run: RunFolder) -> None:
    """Where training is not exact to the bit, a later one would stand for the best of the earlier scorings."""
    saved = checkpoint(run, 3) / "best"
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    shutil.rmtree(run.best)
    run.best.mkdir()
    (run.best / "adapter_model.safetensors").write_bytes(b"of a later step")
    write_manifest(run.best)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        take_step = loop_module.take_step

        def look(*args: object) -> object:
            seen.append({path.name: path.read_bytes() for path in run.best.iterdir()})
            return take_step(*args)  # type: ignore[arg-type]

        patch.setattr(loop_module, "take_step", look)
        resume("--resume", "3")
    assert seen[0] == before


def test_checkpoints_take_no_room_for_the_best_adapter(run: RunFolder) -> None:
    resume("--resume")
    linked = (run.best / "adapter_model.safetensors").stat()
    saved = (checkpoint(run, STEPS) / "best" / "adapter_model.safetensors").stat()
    assert saved.st_ino == linked.st_ino


def test_a_run_whose_adapter_was_changed_is_not_opened(run: RunFolder) -> None:
    resume("--resume")
    open_run("runs/tiny")
    flip(run.adapter / "adapter_model.safetensors")
    with pytest.raises(ContractError, match=r"adapter in runs/tiny/adapter is not the one this contract was written"):
        open_run("runs/tiny")
    resume("--resume")
    open_run("runs/tiny")
