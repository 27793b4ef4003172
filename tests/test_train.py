"""Training end to end on tiny models: what a run leaves behind, going on after a stop, early stopping, refusals."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from command_line import quick_training
from weitiao.contract import Contract
from weitiao.dataset import load_dataset
from weitiao.errors import DataError, RecipeError, ResumeError, RunError
from weitiao.models.opening import open_model
from weitiao.recipe import Lora, Recipe, Train, make_recipe
from weitiao.render.base import Example
from weitiao.render.fitting import fit_rows
from weitiao.runs import RunFolder
from weitiao.train import scoring as scoring_module
from weitiao.train.checkpoint import Progress, list_checkpoints, read_progress, save_checkpoint
from weitiao.train.loop import Outcome, train
from weitiao.train.manifest import write_manifest
from weitiao.train.model import can_compile
from weitiao.train.progress import draw_curve
from weitiao.train.scoring import Scoring
from weitiao.tune import tune_model
from weitiao.tuning.methods import add_adapter

STEPS_PER_EPOCH = 6  # 22 of the 24 sample rows are trained on, 4 at a time


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread (tiny products do not gain by a second) in a folder of its own, where runs/ goes.

    Measuring the machine's speed takes 0.2 s and drawing the curve as long, at every scoring: half of a tiny run's
    time. Where the curve is looked at, `draw_curve` is put back.
    """
    monkeypatch.chdir(tmp_path)
    with quick_training():
        yield


class Screen(io.StringIO):
    """What the console shows; presses Ctrl-C once, when the text `press_at` appears."""

    def __init__(self, press_at: str = "") -> None:
        super().__init__()
        self._press_at = press_at

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._press_at and self._press_at in text:
            self._press_at = ""
            os.kill(os.getpid(), signal.SIGINT)
        return written


def recipe_for(model: Path, rows: Path, *overrides: str, name: str = "tiny") -> Recipe:
    """Two epochs without scoring: fast, and enough to learn something."""
    values = {
        "name": name,
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(rows)},
        "train": {
            "epochs": 2,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "log_every": 1,
            "save_every": 5,
            "evaluate_every": "never",
            "compile": "never",
        },
        "generate": {"max_new_tokens": 8},
    }
    return make_recipe(values, overrides)


def run_recipe(recipe: Recipe, *, resume: bool = False, screen: Screen | None = None) -> RunFolder:
    return tune_model(recipe, resume=resume, console=Console(file=screen or Screen(), width=200))


def losses(run: RunFolder, kind: str = "train") -> list[float]:
    return [line["loss"] for line in run.read_metrics() if line["kind"] == kind]


def weights_file(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def without_speed(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What does not depend on the machine and the moment."""
    of_machine = ("tokens_per_second", "seconds", "memory_bytes")
    return [{key: value for key, value in line.items() if key not in of_machine} for line in metrics]


def digest_tree(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its content's digest."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def leftovers(folder: Path) -> list[Path]:
    return [*folder.rglob(".tmp-*"), *folder.rglob(".old-*")]


# --- What a run leaves behind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_loss_goes_down_and_the_run_folder_is_complete(
    family: str, sample_rows: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_module, "draw_curve", draw_curve)
    folder: Path = request.getfixturevalue(f"tiny_{family}_folder")
    run = run_recipe(recipe_for(folder, sample_rows))
    found = losses(run)
    assert len(found) == 2 * STEPS_PER_EPOCH
    assert sum(found[-3:]) < 0.95 * sum(found[:3])
    assert run.path == Path("runs/tiny")
    assert run.curve.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert Contract.read(run.contract).adapter_fingerprint == hashlib.sha256(weights_file(run)).hexdigest()
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 for value in adapter.values())
    assert any(value.abs().sum() > 0 for name, value in adapter.items() if "lora_B" in name), "B starts at zero"
    assert not leftovers(run.path)


def test_metrics_hold_one_line_per_log_and_scoring(tiny_llama_folder: Path, sample_rows: Path) -> None:
    run = run_recipe(recipe_for(tiny_llama_folder, sample_rows, "train.evaluate_every=epoch", "train.log_every=4"))
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 4), ("dev", 6), ("train", 8), ("train", 12), ("dev", 12)
    ]  # fmt: skip
    assert [line["epoch"] for line in lines if line["kind"] == "train"] == pytest.approx([4 / 6, 8 / 6, 2], abs=1e-4)
    assert all(line["loss"] > 0 for line in lines)
    assert all(0 <= line["scores"]["labels"]["primary"] <= 1 for line in lines if line["kind"] == "dev")


def test_the_loss_is_told_by_task_and_the_tasks_add_up_to_the_whole(tiny_llama_folder: Path, sample_rows: Path) -> None:
    screen = Screen()
    settings = ("train.batch_size=24", "train.log_every=1", "train.row_balance=0")  # a line is one step over all rows
    run = run_recipe(recipe_for(tiny_llama_folder, sample_rows, *settings), screen=screen)
    for line in (line for line in run.read_metrics() if line["kind"] == "train"):
        assert set(line["task_losses"]) == {"labels", "triples"}
        low, high = sorted(line["task_losses"].values())
        assert low < line["loss"] < high, "every token counts the same, so the whole lies between"
    first = next(line for line in run.read_metrics() if line["kind"] == "train")
    told = f"(labels {first['task_losses']['labels']:.3f}  triples {first['task_losses']['triples']:.3f})"
    assert told in screen.getvalue()


def test_a_task_that_weighs_more_is_learnt_faster(tiny_llama_folder: Path, sample_rows: Path) -> None:
    settings = ("train.epochs=6", "train.evaluate_every=never")
    plain = run_recipe(recipe_for(tiny_llama_folder, sample_rows, *settings, name="plain"))
    heavy = run_recipe(
        recipe_for(tiny_llama_folder, sample_rows, *settings, "train.task_weights={labels: 50}", name="heavy")
    )
    assert heavy.read_metrics()[-1]["task_losses"]["labels"] < plain.read_metrics()[-1]["task_losses"]["labels"]


def test_a_weight_for_a_task_that_is_not_there_is_refused(tiny_llama_folder: Path, sample_rows: Path) -> None:
    with pytest.raises(RecipeError, match=r"task_weights names 'label', but the tasks are .*labels"):
        run_recipe(recipe_for(tiny_llama_folder, sample_rows, "train.task_weights={label: 2}"))
    assert not Path("runs").exists()


@pytest.mark.parametrize("scores", [{}, {"labels": {"primary": 0.5}, "triples": {"primary": 0.25}}])
def test_the_curve_is_drawn_with_and_without_dev_scores(scores: dict[str, Any], tmp_path: Path) -> None:
    train_line = {"kind": "train", "step": 1, "loss": 2.0}
    sizes = set()
    for metrics in ([], [train_line], [train_line, {"kind": "dev", "step": 1, "loss": 2.5, "scores": scores}]):
        draw_curve(tmp_path / "curve.png", metrics)
        image = (tmp_path / "curve.png").read_bytes()
        assert image.startswith(b"\x89PNG\r\n\x1a\n")
        sizes.add(len(image))
    assert len(sizes) == 3, "each curve shows more than the one before"
    assert not leftovers(tmp_path)


def test_a_log_line_holds_the_mean_loss_since_the_last_one(tiny_llama_folder: Path, sample_rows: Path) -> None:
    each = losses(run_recipe(recipe_for(tiny_llama_folder, sample_rows)))
    run = run_recipe(recipe_for(tiny_llama_folder, sample_rows, "train.log_every=5", name="coarse"))
    expected = [sum(each[:5]) / 5, sum(each[5:10]) / 5, sum(each[10:]) / 2]
    assert losses(run) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_latest_checkpoints_are_kept_and_no_others(keep: int, tiny_llama_folder: Path, sample_rows: Path) -> None:
    settings = ("train.epochs=1", "train.save_every=1", f"train.keep_checkpoints={keep}")
    run = run_recipe(recipe_for(tiny_llama_folder, sample_rows, *settings))
    assert [path.name for path in list_checkpoints(run)] == [f"step-{step:06}" for step in range(7 - keep, 7)]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [path.name for path in list_checkpoints(run)]


def test_the_same_recipe_gives_the_same_adapter_bit_for_bit(tiny_qwen2_folder: Path, sample_rows: Path) -> None:
    first = run_recipe(recipe_for(tiny_qwen2_folder, sample_rows, "train.epochs=1", name="first"))
    torch.rand(3)
    second = run_recipe(recipe_for(tiny_qwen2_folder, sample_rows, "train.epochs=1", name="second"))
    other = run_recipe(recipe_for(tiny_qwen2_folder, sample_rows, "train.epochs=1", "train.seed=7", name="other"))
    assert weights_file(first) == weights_file(second)
    assert weights_file(first) != weights_file(other)


@pytest.mark.parametrize("setting", ["gradient_checkpointing=true", "packing=false", "tokens_per_pass=64"])
def test_memory_settings_leave_the_losses_unchanged(setting: str, tiny_gemma3_folder: Path, sample_rows: Path) -> None:
    settings = ("train.epochs=1", "train.evaluate_every=4")
    plain = run_recipe(recipe_for(tiny_gemma3_folder, sample_rows, *settings))
    same = run_recipe(recipe_for(tiny_gemma3_folder, sample_rows, *settings, f"train.{setting}", name="other"))
    assert losses(same)[0] == pytest.approx(losses(plain)[0], rel=1e-6)
    assert losses(same) == pytest.approx(losses(plain), rel=1e-3), "later ones part by the optimiser's rounding only"
    assert losses(same, "dev") == pytest.approx(losses(plain, "dev"), rel=1e-3)


def test_rows_of_weight_2_make_an_epoch_longer(tiny_llama_folder: Path, sample_rows: Path) -> None:
    weighted = f"data.train=[{{path: {sample_rows}, weight: 2}}]"
    recipe = recipe_for(tiny_llama_folder, sample_rows, "train.epochs=1", weighted)
    assert len(losses(run_recipe(recipe))) == 11, "44 rows, 4 at a time"


# --- Stopping and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "press_at"),
    [
        ((), "step 1/12"),
        (("method.dropout=0.2",), "step 7/12"),
        (("method.dropout=0.2", "train.evaluate_every=3", "train.log_every=2"), "dev at step 6"),
        (("train.evaluate_every=epoch", "train.epochs=1.5", "train.keep_checkpoints=1"), "step 8/9"),
    ],
)
def test_a_run_stopped_by_ctrl_c_and_resumed_ends_in_the_bits_of_one_never_stopped(
    overrides: tuple[str, ...], press_at: str, tiny_gemma3_folder: Path, sample_rows: Path
) -> None:
    whole = run_recipe(recipe_for(tiny_gemma3_folder, sample_rows, *overrides, name="whole"))
    recipe = recipe_for(tiny_gemma3_folder, sample_rows, *overrides, name="parts")
    screen = Screen(press_at)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, screen=screen)
    assert "Continue with --resume" in screen.getvalue()
    assert not Path("runs/parts/contract.json").exists(), "the run must not look finished"
    torch.rand(5)  # another process has another state of the random numbers
    parts = run_recipe(recipe, resume=True)
    assert weights_file(parts) == weights_file(whole)
    assert without_speed(parts.read_metrics()) == without_speed(whole.read_metrics())
    assert not leftovers(parts.path)


def test_dropout_changes_the_run_it_is_resumed_in(tiny_gemma3_folder: Path, sample_rows: Path) -> None:
    """Else the proofs above would hold without the random state being saved."""
    whole = run_recipe(recipe_for(tiny_gemma3_folder, sample_rows, "method.dropout=0.2", name="whole"))
    recipe = recipe_for(tiny_gemma3_folder, sample_rows, "method.dropout=0.2", name="parts")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, screen=Screen("step 7/12"))
    run = RunFolder("runs/parts")
    file = list_checkpoints(run)[-1] / "optimiser.pt"
    states = torch.load(file, weights_only=True)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        states["rng"]["cpu"] = torch.get_rng_state()
    torch.save(states, file)
    write_manifest(file.parent)
    assert weights_file(run_recipe(recipe, resume=True)) != weights_file(whole)


def test_a_run_resumed_from_an_earlier_checkpoint_measures_the_steps_after_it_again(
    tiny_gemma3_folder: Path, sample_rows: Path
) -> None:
    settings = ("method.dropout=0.2", "train.evaluate_every=4")
    whole = run_recipe(recipe_for(tiny_gemma3_folder, sample_rows, *settings, name="whole"))
    recipe = recipe_for(tiny_gemma3_folder, sample_rows, *settings, name="parts")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, screen=Screen("dev at step 8"))
    shutil.rmtree("runs/parts/checkpoints/step-000008")
    parts = run_recipe(recipe, resume=True)
    assert weights_file(parts) == weights_file(whole)
    assert without_speed(parts.read_metrics()) == without_speed(whole.read_metrics())


def test_ctrl_c_in_the_last_step_finishes_the_run(tiny_llama_folder: Path, sample_rows: Path) -> None:
    recipe = recipe_for(tiny_llama_folder, sample_rows, "train.epochs=1")
    run = run_recipe(recipe, screen=Screen("step 6/6"))
    assert run.contract.exists()


def test_resuming_a_finished_run_changes_nothing(tiny_llama_folder: Path, sample_rows: Path) -> None:
    recipe = recipe_for(tiny_llama_folder, sample_rows, "train.epochs=1", "train.evaluate_every=3")
    run = run_recipe(recipe)
    before = digest_tree(run.path)
    again = digest_tree(run_recipe(recipe, resume=True).path)
    assert {name for name in before if before[name] != again[name]} <= {"curve.png"}
    assert before.keys() == again.keys()


def test_a_new_run_does_not_overwrite_one_that_is_there(tiny_llama_folder: Path, sample_rows: Path) -> None:
    recipe = recipe_for(tiny_llama_folder, sample_rows, "train.epochs=1")
    before = digest_tree(run_recipe(recipe).path)
    with pytest.raises(RunError, match=r"already holds a run.*--resume.*name=OTHER"):
        run_recipe(recipe)
    assert digest_tree(Path("runs/tiny")) == before


def test_a_run_that_is_not_there_cannot_be_resumed(tiny_llama_folder: Path, sample_rows: Path) -> None:
    with pytest.raises(RunError, match="no run to resume in runs/tiny"):
        run_recipe(recipe_for(tiny_llama_folder, sample_rows), resume=True)
    assert not Path("runs/tiny").exists()


@pytest.fixture
def stopped_run(tiny_llama_folder: Path, sample_rows: Path, tmp_path: Path) -> tuple[Path, Path]:
    """runs/tiny stopped at step 3 of 12, with a model folder and rows that may be changed."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama_folder, model)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe_for(model, sample_rows), screen=Screen("step 3/12"))
    return model, sample_rows


def refusal(recipe: Recipe) -> str:
    """The sentence with which resuming is refused; nothing of the run has changed."""
    before = digest_tree(Path("runs"))
    with pytest.raises(ResumeError) as caught:
        run_recipe(recipe, resume=True)
    assert digest_tree(Path("runs")) == before
    return str(caught.value)


def test_a_changed_row_is_named_when_resuming(stopped_run: tuple[Path, Path]) -> None:
    model, rows = stopped_run
    text = rows.read_text(encoding="utf-8")
    rows.write_text(text.replace("机器人学会了", "机器人没学会"), encoding="utf-8")
    sentence = refusal(recipe_for(model, rows))
    assert "\n  data: was '" in sentence
    assert "recipe" not in sentence
    rows.write_text(text, encoding="utf-8")
    assert run_recipe(recipe_for(model, rows), resume=True).contract.exists()


def test_an_added_row_is_named_with_both_counts(stopped_run: tuple[Path, Path]) -> None:
    model, rows = stopped_run
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join([*lines, lines[1].replace("望远镜", "显微镜")]), encoding="utf-8")
    sentence = refusal(recipe_for(model, rows))
    assert "rows.labels.train: was 11, is 12" in sentence
    assert "name=OTHER" in sentence


def test_changed_settings_are_named_with_old_and_new_value(stopped_run: tuple[Path, Path]) -> None:
    model, rows = stopped_run
    sentence = refusal(recipe_for(model, rows, "train.learning_rate=0.5", "method.rank=3"))
    assert "recipe.train.learning_rate: was 0.01, is 0.5" in sentence
    assert "recipe.method.rank: was 16, is 3" in sentence
    assert "base model" not in sentence


def test_another_base_model_is_named_when_resuming(stopped_run: tuple[Path, Path]) -> None:
    model, rows = stopped_run
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    sentence = refusal(recipe_for(model, rows))
    assert "base model: was '" in sentence
    assert "data" not in sentence.splitlines()[1]


def test_what_does_not_change_the_weights_may_change_between_sittings(
    stopped_run: tuple[Path, Path], tmp_path: Path
) -> None:
    model, rows = stopped_run
    moved = tmp_path / "moved"
    model.rename(moved)
    rows = rows.rename(tmp_path / "moved.jsonl")
    settings = ("train.log_every=3", "train.save_every=2", "train.keep_checkpoints=1", "evaluate.base=false")
    assert run_recipe(recipe_for(moved, rows, *settings), resume=True).contract.exists()


@pytest.mark.parametrize("file", ["weights.safetensors", "optimiser.pt"])
@pytest.mark.parametrize("size", [0, 1, 40, 400, -100])
def test_a_checkpoint_cut_short_is_named_and_the_one_before_it_resumes(
    file: str, size: int, stopped_run: tuple[Path, Path]
) -> None:
    model, rows = stopped_run
    run = RunFolder("runs/tiny")
    whole = list_checkpoints(run)[-1]
    cut = run.checkpoints / "step-000004"
    shutil.copytree(whole, cut)
    data = (cut / file).read_bytes()
    (cut / file).write_bytes(data[:size])
    screen = Screen()
    assert run_recipe(recipe_for(model, rows), resume=True, screen=screen).contract.exists()
    told = screen.getvalue()
    assert f"{cut}: {file} has {len(data[:size]):,} bytes instead of {len(data):,}" in told
    assert "Going back from step 4 to step 3: 1 step is lost and taken again." in told
    assert "Going on from step 3" in told
    assert losses(run) == losses(run_recipe(recipe_for(model, rows, name="whole")))


def test_a_file_that_holds_no_tensors_though_it_is_what_was_written_ends_in_a_sentence(
    stopped_run: tuple[Path, Path],
) -> None:
    model, rows = stopped_run
    newest = list_checkpoints(RunFolder("runs/tiny"))[-1]
    (newest / "weights.safetensors").write_bytes(b"nothing")
    write_manifest(newest)
    with pytest.raises(RunError, match=r"checkpoint .*step-000003 cannot be read.*Delete it to resume"):
        run_recipe(recipe_for(model, rows), resume=True)


class Crash(BaseException):
    """The process is gone."""


class Fuse:
    """Lets `calls_left` of the wrapped calls through; then the process counts as gone and every further call fails."""

    def __init__(self, calls_left: int) -> None:
        self.calls_left = calls_left

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise Crash
            return function(*args, **kwargs)

        return wrapped


def crash_while_saving(run: RunFolder, step: int, calls_left: int) -> bool:
    """Save a checkpoint, the process vanishing at a call that touches the disk; whether it came to that."""
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.weight, step)
    optimiser = torch.optim.AdamW(layer.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0)
    fuse = Fuse(calls_left)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (Path, "rename"),
                            (Path, "replace"), (Path, "unlink"), (Path, "write_bytes"), (Path, "mkdir")):  # fmt: skip
            patch.setattr(owner, name, fuse.wrap(getattr(owner, name)))
        try:
            save_checkpoint(run, layer, optimiser, scheduler, Progress(step=step), keep=1)
        except Crash:
            return True
    return False


def test_a_crash_at_any_moment_of_saving_leaves_one_whole_checkpoint(tmp_path: Path) -> None:
    """Saving a new step, and replacing a step that stands there already; the folder is then opened as --resume does."""
    for step in (7, 5):
        for calls_left in range(100):
            path = tmp_path / f"run-{step}-{calls_left}"
            run = RunFolder(path)
            run.checkpoints.mkdir(parents=True)
            run.recipe.write_text("", encoding="utf-8")
            assert not crash_while_saving(run, 5, calls_left=1000)
            crashed = crash_while_saving(run, step, calls_left)
            run = RunFolder.create(path, resume=True)
            newest = list_checkpoints(run)[-1]
            saved = read_progress(newest).step
            assert saved in (5, step)
            assert torch.equal(load_file(newest / "weights.safetensors")["weight"], torch.full((2, 2), float(saved)))
            assert torch.load(newest / "optimiser.pt", weights_only=True).keys() == {"optimiser", "scheduler", "rng"}
            assert not leftovers(path)
            if not crashed:
                break
        assert calls_left > 8, "every call was a moment to crash"
        assert saved == step


# --- Scoring while training ------------------------------------------------------------------------------------------


def parts_for(model: Path, rows: Path) -> tuple[Any, list[Example], list[Example]]:
    """A tiny model with an adapter, train examples and dev examples."""
    opened = open_model(str(model), dtype="float32")
    dataset = load_dataset(recipe_for(model, rows))
    sides = [(dataset.train, dataset.train_tasks), (dataset.dev, dataset.dev_tasks)]
    examples = [
        list(fit_rows(records, tasks, opened.renderer, max_length=999, overlong="error").examples)
        for records, tasks in sides
    ]
    return add_adapter(opened.model, Lora(rank=4), seed=1), examples[0], examples[1]  # type: ignore[arg-type]


def train_with_scores(
    model: Path, rows: Path, scores: Sequence[float], **settings: Any
) -> tuple[Outcome, RunFolder, list[dict[str, torch.Tensor]]]:
    """Train, the dev scores being `scores` one after the other; also gives the adapter as it was at each scoring."""
    tuned, examples, dev = parts_for(model, rows)
    seen: list[dict[str, torch.Tensor]] = []

    def on_eval(generator: torch.nn.Module) -> Scoring:
        assert not generator.training
        seen.append({name: p.detach().clone() for name, p in generator.named_parameters() if "lora" in name})
        return Scoring(overall=scores[len(seen) - 1], tasks={"all": {"primary": scores[len(seen) - 1]}})

    defaults: dict[str, Any] = {"batch_size": 4, "learning_rate": 1e-2, "evaluate_every": 1, "compile": "never"}
    run = RunFolder.create("runs/scored", resume=False)
    outcome = train(
        tuned,
        examples,
        [1.0] * len(examples),
        dev,
        settings=Train(**(defaults | settings)),
        run=run,
        on_eval=on_eval,
        console=Console(file=Screen()),
    )
    return outcome, run, seen


def test_the_adapter_of_the_best_scoring_is_the_one_kept(tiny_llama_folder: Path, sample_rows: Path) -> None:
    scores = [0.1, 0.4, 0.9, 0.2, 0.9, 0.3]
    outcome, run, seen = train_with_scores(tiny_llama_folder, sample_rows, scores, epochs=1)
    assert (outcome.best_step, outcome.best_score, outcome.finished) == (3, 0.9, True)
    kept = load_file(run.adapter / "adapter_model.safetensors")
    assert kept
    for name, value in kept.items():
        [inside] = [seen[2][other] for other in seen[2] if other.replace(".default", "") in name]
        torch.testing.assert_close(value, inside, rtol=0, atol=0)


def test_training_stops_after_patience_scorings_without_a_better_one(
    tiny_llama_folder: Path, sample_rows: Path
) -> None:
    scores = [0.1, 0.3, 0.2, 0.3, 0.3, 0.9]
    outcome, run, seen = train_with_scores(tiny_llama_folder, sample_rows, scores, epochs=1, patience=3, log_every=1)
    assert (outcome.step, outcome.steps, outcome.finished) == (5, 6, True)
    assert (outcome.best_step, outcome.best_score) == (2, 0.3)
    assert len(seen) == len(losses(run, "dev")) == len(losses(run)) == 5


def test_without_patience_training_goes_on_whatever_the_scores(tiny_llama_folder: Path, sample_rows: Path) -> None:
    outcome, _, seen = train_with_scores(tiny_llama_folder, sample_rows, [0.5, 0.4, 0.3, 0.2, 0.1, 0.0], epochs=1)
    assert (outcome.step, outcome.best_step, len(seen)) == (6, 1, 6)


def test_without_task_scores_the_dev_loss_chooses_the_best_step(tiny_llama_folder: Path, sample_rows: Path) -> None:
    tuned, examples, dev = parts_for(tiny_llama_folder, sample_rows)
    settings = Train(epochs=1, batch_size=4, learning_rate=3e-2, evaluate_every=1, compile="never")
    run = RunFolder.create("runs/scored", resume=False)
    weights = [1.0] * len(examples)
    outcome = train(tuned, examples, weights, dev, settings=settings, run=run, console=Console(file=Screen()))
    found = losses(run, "dev")
    assert outcome.best_step == 1 + found.index(min(found))
    assert outcome.best_score == -min(found)


def test_a_run_stopped_early_takes_no_further_step_when_resumed(tiny_llama_folder: Path, sample_rows: Path) -> None:
    settings = ("train.evaluate_every=1", "train.patience=2", "train.learning_rate=1e-12", "train.warmup=0")
    recipe = recipe_for(tiny_llama_folder, sample_rows, *settings)
    run = run_recipe(recipe)
    assert len(losses(run)) == 3, "no score is better than the first, so two more end it"
    before = weights_file(run)
    assert len(losses(run_recipe(recipe, resume=True))) == 3
    assert weights_file(run) == before


# --- Refusals --------------------------------------------------------------------------------------------------------


def test_a_diverging_run_ends_in_a_sentence_and_keeps_its_checkpoints_whole(
    tiny_llama_folder: Path, sample_rows: Path
) -> None:
    settings = ("train.learning_rate=1e6", "train.save_every=1", "train.warmup=0", "train.epochs=5")
    with pytest.raises(RunError, match=r"training has diverged.*learning_rate.*1000000"):
        run_recipe(recipe_for(tiny_llama_folder, sample_rows, *settings))
    run = RunFolder("runs/tiny")
    assert not run.contract.exists()
    assert not leftovers(run.path)
    assert all(math.isfinite(loss) for loss in losses(run))
    for checkpoint in list_checkpoints(run):
        assert all(value.isfinite().all() for value in load_file(checkpoint / "weights.safetensors").values())


def test_layers_that_are_not_there_are_refused_before_a_run_folder_is_made(
    tiny_llama_folder: Path, sample_rows: Path
) -> None:
    with pytest.raises(RecipeError, match=r"matches no layer.*q_proj"):
        run_recipe(recipe_for(tiny_llama_folder, sample_rows, "method.targets=[wrong_proj]"))
    assert not Path("runs/tiny").exists()


def test_rows_that_are_all_dropped_are_refused_before_a_run_folder_is_made(
    tiny_llama_folder: Path, sample_rows: Path
) -> None:
    settings = ("data.max_length=9", "data.overlong=drop")
    with pytest.raises(DataError, match=r"longer than 9 tokens.*data\.max_length"):
        run_recipe(recipe_for(tiny_llama_folder, sample_rows, *settings))
    assert not Path("runs/tiny").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::torch")  # the compiler warns about itself, and stops where a warning is an error
@pytest.mark.skipif(not can_compile(), reason="torch.compile needs a C++ compiler, and there is none on this machine")
def test_compiled_layers_learn_what_eager_ones_learn_stopped_and_resumed_too(
    tiny_gemma3_folder: Path, sample_rows: Path
) -> None:
    settings = ("train.evaluate_every=4", "train.max_grad_norm=1")
    eager = losses(run_recipe(recipe_for(tiny_gemma3_folder, sample_rows, *settings, name="eager")))
    compiled = recipe_for(tiny_gemma3_folder, sample_rows, *settings, "train.compile=always", name="compiled")
    screen = Screen("step 7/12")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(compiled, screen=screen)
    assert "Compiling the layers" in screen.getvalue()
    run = run_recipe(compiled, resume=True)
    assert losses(run)[0] == pytest.approx(eager[0], rel=1e-5)
    assert losses(run) == pytest.approx(eager, rel=1e-2)
