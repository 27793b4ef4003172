"""Monitors: real event files and databases read back, keys kept out of runs, trainings that outlive broken monitors."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from test_train import Screen, recipe_for, run_recipe, weights_file, without_speed
from weitiao.errors import RecipeError, RunError
from weitiao.monitor import choosing, several
from weitiao.monitor.base import Ending, Monitor, MonitoredRun, Started
from weitiao.monitor.figures import flat_figures
from weitiao.monitor.several import start_monitors, without_secrets
from weitiao.monitor.state import read_state
from weitiao.recipe import Recipe, load_recipe, make_recipe
from weitiao.runs import RunFolder, Sample
from weitiao.train import plan as plan_module
from weitiao.tune import tune_model

PLAIN = {"name": "tiny", "model": "m", "data": {"train": "rows.jsonl"}}
TRAIN_LINE = {"kind": "train", "step": 3, "loss": 1.5, "task_losses": {"标签": 2.0, "a/b": 1.0}, "grad_norm": None}
DEV_LINE = {"kind": "dev", "step": 3, "loss": 0.5, "task_losses": {}, "overall": 0.75, "scores": {"标签": {"f1": 0.75}}}
SAMPLES = (Sample(task="标签", source="dev.jsonl:1", question="哪|个？\n`x` <b>", gold='["体育"]', answer='["财经"]'),)
SCORED = ("train.epochs=1", "train.evaluate_every=3", "train.price_per_hour=36")
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001"
    "a5f645400000000049454e44ae426082"
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, one thread, no measuring of the machine, no network and nobody logged in anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_module, "_matrix_peak", lambda dtype, device: 1e10)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "SWANLAB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_with(*monitors: object) -> Recipe:
    return make_recipe({**PLAIN, "monitor": list(monitors)})


def make_run() -> RunFolder:
    run = RunFolder.create("runs/tiny", resume=False)
    run.curve.write_bytes(PNG)
    return run


def show_everything(recipe: Recipe, *, resume: bool = False) -> tuple[RunFolder, list[str]]:
    """What a short training would show, shown; with what was said."""
    run = RunFolder("runs/tiny") if resume else make_run()
    said: list[str] = []
    monitors = start_monitors(recipe.monitor, run, recipe, resume=resume, say=said.append)
    monitors.begin(0, 6)
    monitors.record(TRAIN_LINE)
    monitors.record(DEV_LINE)
    monitors.show_samples(3, SAMPLES)
    monitors.drew(3, run.curve)
    monitors.finish("finished")
    return run, said


def events_of(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "images": 0})
    return accumulator.Reload()


def text_of(accumulator: EventAccumulator, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors(f"{tag}/text_summary")]


# ---- the recipe ---------------------------------------------------------------------------------------------------


def test_monitors_are_named_alone_in_a_list_or_with_options() -> None:
    (alone,) = make_recipe({**PLAIN, "monitor": "tensorboard"}).monitor
    (options,) = make_recipe({**PLAIN, "monitor": {"name": "swanlab", "mode": "local"}}).monitor
    several = recipe_with("tensorboard", {"name": "mlflow", "tracking_uri": "mlruns"})
    assert (alone.name, options.mode, [each.name for each in several.monitor]) == (
        "tensorboard", "local", ["tensorboard", "mlflow"],
    )  # fmt: skip
    Path("recipe.yaml").write_text(several.to_yaml(), encoding="utf-8")
    assert load_recipe("recipe.yaml") == several


@pytest.mark.parametrize(
    ("monitor", "told"),
    [
        ("tensorbord", "monitor.0.name: 'tensorbord' is none of 'swanlab', 'tensorboard'"),
        ({"mode": "local"}, "monitor.0: say which monitor it is, such as name: tensorboard"),
        ({"name": "swanlab", "mod": "local"}, "monitor.0.mod: there is no such key. Did you mean mode?"),
        ({"name": "wandb", "mode": "local"}, "monitor.0.mode: Input should be 'online', 'offline' or 'disabled'"),
    ],
)
def test_mistakes_are_named(monitor: object, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_with(monitor)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "monitor",
    [
        {"name": "swanlab", "api_key": "sw-123456"},
        {"name": "wandb", "Token": "sw-123456"},
        {"name": "mlflow", "tracking_uri": "https://me:sw-123456@mlflow.example"},
    ],
)
def test_keys_are_refused_in_a_recipe_and_not_shown(monitor: object) -> None:
    with pytest.raises(RecipeError, match="a recipe is kept with the run") as caught:
        recipe_with(monitor)
    assert "sw-123456" not in str(caught.value)


def test_a_missing_package_is_told_with_its_command_before_anything_is_done(
    tiny_llama_folder: Path, sample_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = choosing.importlib.util.find_spec
    monkeypatch.setattr(
        choosing.importlib.util, "find_spec", lambda name: None if name in ("wandb", "swanboard") else found(name)
    )
    screen = Screen()
    with pytest.raises(RecipeError, match=r"package wandb is not installed.*pip install 'weitiao\[wandb\]'"):
        run_recipe(recipe_for(tiny_llama_folder, sample_rows, "monitor=wandb"), screen=screen)
    assert screen.getvalue() == ""
    assert not Path("runs").exists()
    with pytest.raises(RecipeError, match=r"swanboard.*pip install 'swanlab\[dashboard\]'"):
        choosing.require_packages(recipe_with({"name": "swanlab", "mode": "local"}).monitor)


# ---- figures ------------------------------------------------------------------------------------------------------


def test_lines_become_flat_figures_none_of_which_is_the_folder_of_another() -> None:
    assert flat_figures(TRAIN_LINE) == {"train/loss": 1.5, "train/task_loss/标签": 2.0, "train/task_loss/a_b": 1.0}
    dev = flat_figures(DEV_LINE)
    assert dev == {"dev/loss": 0.5, "dev/overall": 0.75, "dev/score/标签/f1": 0.75}
    names = [*flat_figures(TRAIN_LINE), *dev]
    assert not [one for one in names for other in names if other.startswith(f"{one}/")]


# ---- TensorBoard, by a real training ------------------------------------------------------------------------------


def test_tensorboard_shows_what_metrics_jsonl_holds(tiny_llama_folder: Path, sample_rows: Path) -> None:
    run = run_recipe(recipe_for(tiny_llama_folder, sample_rows, *SCORED, "monitor=tensorboard"))
    events = events_of(run.path / "tensorboard")
    shown = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    lines = run.read_metrics()
    expected = {(name, line["step"]): value for line in lines for name, value in flat_figures(line).items()}
    assert shown.keys() == expected.keys()
    assert all(math.isclose(shown[key], expected[key], rel_tol=1e-6) for key in expected)
    tags = {tag for tag, _ in shown}
    assert {"train/loss", "train/task_loss/labels", "train/learning_rate", "train/grad_norm"} <= tags
    assert {"train/tokens_per_second", "train/memory_bytes", "train/price", "dev/loss"} <= tags
    assert {"dev/score/labels/primary", "dev/score/triples/f1", "dev/overall"} <= tags
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert last["price"] == pytest.approx(last["seconds"] / 100, rel=0.01, abs=1e-4)
    assert 50 * 2**20 < last["memory_bytes"] < 2**36
    assert [image.step for image in events.Images("curve")] == [3, 6, 6]
    assert events.Images("curve")[-1].encoded_image_string == run.curve.read_bytes()
    assert events.Images("curve")[-1].width == 960
    ((step, samples), (last_step, _)) = run.read_samples()
    assert (step, last_step) == (3, 6)
    assert {sample.task for sample in samples} == {"labels", "triples"}
    first, _ = text_of(events, "dev/samples")
    assert first.startswith("| task | source | question | gold | answer |\n| --- |")
    assert len(first.splitlines()) == 2 + len(samples)
    assert "learning_rate: 0.01" in text_of(events, "recipe")[0]


def test_a_resumed_training_writes_steps_anew_and_may_change_its_monitors(
    tiny_llama_folder: Path, sample_rows: Path
) -> None:
    recipe = recipe_for(tiny_llama_folder, sample_rows, "monitor=tensorboard")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, screen=Screen("step 3/12"))
    run = RunFolder("runs/tiny")
    state = read_state(run)
    assert state is not None
    assert state.status == "interrupted"
    other = recipe.model_copy(update={"monitor": recipe_with({"name": "tensorboard", "folder": "elsewhere"}).monitor})
    run_recipe(other, resume=True)
    (elsewhere,) = Path("elsewhere").iterdir()
    steps = [event.step for event in events_of(elsewhere).Scalars("train/loss")]
    assert steps == list(range(state.step + 1, 13))
    assert [event.step for event in events_of(run.path / "tensorboard").Scalars("train/loss")] == list(
        range(1, state.step + 1)
    )


def test_figures_of_steps_that_a_crash_lost_are_shown_once() -> None:
    run, recipe = make_run(), recipe_with("tensorboard")
    for begin, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        monitors = start_monitors(recipe.monitor, run, recipe, resume=begin > 0, say=print)
        monitors.begin(begin, 5)
        for step in steps:
            monitors.record({"kind": "train", "step": step, "loss": float(begin)})
        monitors.finish("failed")
    shown = events_of(run.path / "tensorboard").Scalars("train/loss")
    assert [(event.step, event.value) for event in shown] == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 2)]


def test_texts_of_rows_stand_in_their_cells() -> None:
    run, said = show_everything(recipe_with("tensorboard"))
    assert said == ["monitor tensorboard: tensorboard --logdir runs/tiny/tensorboard"]
    (table,) = text_of(events_of(run.path / "tensorboard"), "dev/samples")
    row = '| 标签 | dev.jsonl:1 | 哪\\|个？<br>\\`x\\` &lt;b> | ["体育"] | ["财经"] |'
    assert table.splitlines()[2:] == [row]


def test_no_row_leaves_the_machine_where_tables_are_off() -> None:
    run, _ = show_everything(recipe_with({"name": "tensorboard", "tables": False}))
    assert all("体育".encode() not in file.read_bytes() for file in (run.path / "tensorboard").iterdir())


# ---- broken monitors ----------------------------------------------------------------------------------------------


class Broken(Monitor):
    """Starts, and then does what `trouble` does at every log line."""

    name = "broken"

    def __init__(self, trouble: Callable[[], None], start: Callable[[], None] = lambda: None) -> None:
        self._trouble, self._start = trouble, start

    def start(self, run: MonitoredRun) -> Started:
        self._start()
        return Started(reference="r")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trouble()

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None: ...
    def image(self, step: int, name: str, path: Path) -> None: ...
    def finish(self, ending: Ending) -> None: ...


def raising(error: BaseException) -> Callable[[], None]:
    def trouble() -> None:
        raise error

    return trouble


def test_a_monitor_that_fails_is_said_once_and_changes_no_bit(
    tiny_llama_folder: Path, sample_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "sw-123456")
    alone = run_recipe(recipe_for(tiny_llama_folder, sample_rows, "train.epochs=1", name="alone"))
    error = ConnectionError("no route to https://me:secret@host with sw-123456\nmore")
    monkeypatch.setattr(several, "make_monitor", lambda options: Broken(raising(error)))
    screen = Screen()
    recipe = recipe_for(tiny_llama_folder, sample_rows, "train.epochs=1", "monitor=tensorboard")
    run = run_recipe(recipe, screen=screen)
    said = [line for line in screen.getvalue().splitlines() if "monitor" in line]
    assert said == [
        "The monitor tensorboard has failed (ConnectionError: no route to https://***@host with ***) and is left out "
        "from here on. The training is not touched; metrics.jsonl has all figures."
    ]
    assert weights_file(run) == weights_file(alone)
    assert without_speed(run.read_metrics()) == without_speed(alone.read_metrics())


def test_a_monitor_that_leaves_the_program_does_not_end_the_training() -> None:
    run, said = make_run(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(several, "make_monitor", lambda options: Broken(raising(SystemExit(3))))
        monitors = start_monitors(
            recipe_with("wandb").monitor, run, recipe_with("wandb"), resume=False, say=said.append
        )
        monitors.record(TRAIN_LINE)
        monitors.record(TRAIN_LINE)
        monitors.finish("finished")
    (sentence,) = said
    assert "SystemExit: 3" in sentence


def test_a_monitor_that_hangs_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(several, "FINISH_SECONDS", 0.1)
    monkeypatch.setattr(several, "_MOST_WAITING", 5)
    monkeypatch.setattr(several, "make_monitor", lambda options: Broken(lambda: gate.wait(30) and None))
    said: list[str] = []
    recipe = recipe_with("wandb", "mlflow")
    monitors = start_monitors(recipe.monitor, make_run(), recipe, resume=False, say=said.append)
    for _ in range(10):
        monitors.record(TRAIN_LINE)
    monitors.finish("finished")
    gate.set()
    assert [sentence.partition(" and is")[0] for sentence in said] == [
        "The monitor wandb has failed (5 messages wait for it)",
        "The monitor mlflow has failed (5 messages wait for it)",
    ]


def test_what_is_left_to_send_is_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(several, "FINISH_SECONDS", 0.1)
    monkeypatch.setattr(several, "make_monitor", lambda options: Broken(lambda: gate.wait(30) and None))
    said: list[str] = []
    recipe = recipe_with("wandb")
    monitors = start_monitors(recipe.monitor, make_run(), recipe, resume=False, say=said.append)
    monitors.record(TRAIN_LINE)
    monitors.finish("finished")
    gate.set()
    (sentence,) = said
    assert "not everything was sent within 0 seconds of the end" in sentence


def test_a_monitor_that_cannot_start_stops_a_new_run_and_no_resumed_one(
    tiny_llama_folder: Path, sample_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken(raising(ValueError()), start=raising(RunError("nobody is logged in. Run wandb login.")))
    monkeypatch.setattr(several, "make_monitor", lambda options: broken)
    recipe = recipe_for(tiny_llama_folder, sample_rows, "train.epochs=1", "monitor=tensorboard")
    with pytest.raises(RunError, match=r"could not be started: nobody is logged in. Run wandb login\. Mend that"):
        run_recipe(recipe)
    without = recipe.model_copy(update={"monitor": ()})
    assert run_recipe(without).contract.exists(), "the failed start must not stand in the way of the next"
    screen = Screen()
    assert run_recipe(recipe, resume=True, screen=screen).contract.exists()
    assert "The training goes on without it." in screen.getvalue()


def test_no_key_of_the_environment_is_written_into_the_run(
    tiny_llama_folder: Path, sample_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {name: f"secret-of-{name.lower()}" for name in (
        "SWANLAB_API_KEY", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN",
        "TRACKIO_WRITE_TOKEN",
    )}  # fmt: skip
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    run = run_recipe(recipe_for(tiny_llama_folder, sample_rows, *SCORED, "monitor=tensorboard"))
    files = [file for file in run.path.rglob("*") if file.is_file()]
    assert {run.environment, run.recipe, run.state, run.monitors} <= set(files)
    for file in files:
        content = file.read_bytes()
        assert not [name for name, value in keys.items() if value.encode() in content], file
    assert without_secrets("at https://u:p@h/x with secret-of-hf_token") == "at https://***@h/x with ***"


def test_a_python_user_gets_monitors_as_the_command_line_does(tiny_llama_folder: Path, sample_rows: Path) -> None:
    recipe = recipe_for(tiny_llama_folder, sample_rows, "train.epochs=0.5", "monitor=[tensorboard]")
    run = tune_model(recipe, runs="elsewhere", console=Console(file=Screen()))
    assert list((run.path / "tensorboard").glob("events.out.tfevents.*"))
