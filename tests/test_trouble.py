"""What a training says when it goes wrong: losses that are no number or jump, steps that do not come."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from command_line import quick_training, read_lines, refuse, run_cli
from weitiao.data.workers import Workers
from weitiao.errors import DataError
from weitiao.runs import RunFolder
from weitiao.train import loop as loop_module
from weitiao.train import watchdog as watchdog_module
from weitiao.train.checkpoint import list_checkpoints
from weitiao.train.manifest import damage_in
from weitiao.train.trouble import SpikeWatch
from weitiao.train.watchdog import Watchdog

# --- Jumps of the loss -----------------------------------------------------------------------------------------------


def falling(step: int, draw: random.Random, scatter: float) -> float:
    """The loss of a training that goes well, its rows of different difficulty."""
    return (0.3 + 3 * math.exp(-step / 150)) * math.exp(scatter * draw.gauss(0, 1))


@pytest.mark.parametrize("scatter", [0.0, 0.05, 0.2, 0.4, 0.7])
def test_a_training_that_goes_well_has_hardly_a_jump(scatter: float) -> None:
    draw, told = random.Random(1), 0
    for _ in range(5):
        watch = SpikeWatch()
        told += sum(watch.jumped_from(falling(step, draw, scatter)) is not None for step in range(1000))
    assert told <= 3, "of five thousand steps"


@pytest.mark.parametrize("length", [1, 5, 30])
def test_a_jump_is_told_once_however_long_it_lasts_and_the_next_one_again(length: int) -> None:
    draw, watch = random.Random(2), SpikeWatch()
    told = {}
    for step in range(600):
        high = any(start <= step < start + length for start in (200, 400))
        median = watch.jumped_from(falling(step, draw, 0.1) * (4 if high else 1))
        if median is not None:
            told[step] = median
    assert list(told) == [200, 400]
    assert told[200] == pytest.approx(0.3 + 3 * math.exp(-150 / 150), rel=0.2), "of steps 100 to 200"


def test_there_is_no_jump_before_there_is_a_usual_loss_nor_where_everything_is_learnt() -> None:
    watch = SpikeWatch()
    assert [watch.jumped_from(loss) for loss in (1.0, 9.0, 1.0, 99.0)] == [None] * 4
    watch = SpikeWatch()
    assert all(watch.jumped_from(1e-5 * (1 + step % 7 * 20)) is None for step in range(300))


# --- Trainings -------------------------------------------------------------------------------------------------------

STRANGE = "Ω"
"""Of its two bytes the first stands in no Chinese or Latin text, so only the row that holds it has their token."""


@pytest.fixture(autouse=True, scope="module")
def light() -> Iterator[None]:
    with quick_training():
        yield


@pytest.fixture
def run(tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """rows.jsonl, recipe.yaml, a model folder of its own; the run is not begun."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama_folder, "model")
    with Path("rows.jsonl").open("w", encoding="utf-8") as stream:
        for number, text in enumerate(("球", "门", "网", "队", "星", "光", "芯", "电", "钱", "股", "税", "账") * 2):
            strange = f"，这一行比别的长，里面还有一个别处没有的字 {STRANGE}" if number == 6 else ""
            context = f"Instruction: 回答。\nInput: 选一个标签。\n\n{text}{number}{strange}\nAnswer: "
            target = json.dumps([("体育", "科技", "财经")[number % 12 // 4]], ensure_ascii=False)
            stream.write(json.dumps({"context": context, "target": target}, ensure_ascii=False) + "\n")
    recipe = {
        "name": "tiny",
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": "rows.jsonl", "held_out": 0},
        "method": {"rank": 4},
        "train": {
            "epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "compile": "never",
            "save_every": 1, "evaluate_every": "never",
        },
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return RunFolder("runs/tiny")


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def test_a_row_whose_loss_is_no_number_is_told_from_a_model_that_diverged(run: RunFolder) -> None:
    """The embedding of one token is broken: only the row that holds it has no loss."""
    tokens = json.loads(Path("model/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    weights = load_file("model/model.safetensors")
    weights["model.embed_tokens.weight"][tokens["Î"]] = math.nan  # the byte 0xCE, as byte-level BPE writes it
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    said = in_one_line(refuse("train", "recipe.yaml"))
    found = re.search(r"Step (\d): the loss of the step is not finite\.", said)
    assert found is not None, said
    assert "other rows have a finite loss; this row alone gives none: rows.jsonl:7. Mend it or leave it out" in said
    assert "learning_rate" not in said
    assert [path.name for path in list_checkpoints(run)][-1:] == [f"step-{int(found[1]) - 1:06}"] * (int(found[1]) > 1)
    assert all(math.isfinite(line["loss"]) for line in read_lines(run.metrics))
    assert not any(damage_in(path) for path in list_checkpoints(run))


def test_a_diverged_model_is_not_blamed_on_the_rows(run: RunFolder) -> None:
    said = refuse("train", "recipe.yaml", "train.learning_rate=1e20", "train.warmup=0", "train.save_every=1")
    lines = said.strip().splitlines()
    assert "training has diverged. Lower train.learning_rate" in lines[-3]
    assert re.search(r"(the model has diverged, the rows are not at fault|the model is diverging)\.", lines[-2])
    assert len(re.findall(r"rows\.jsonl:\d+", lines[-2])) == 4, "the rows of the step"
    assert re.fullmatch(r"The checkpoint of step \d+ stands\.", lines[-1])


def test_a_jump_of_the_loss_is_told_with_the_rows_of_its_step(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step, taken = loop_module.take_step, []

    def jump(*args: Any, **kwargs: Any) -> Any:
        taken.append(None)
        loss, *rest = take_step(*args, **kwargs)
        return (loss * (30 if len(taken) in (40, 41) else 1), *rest)

    monkeypatch.setattr(loop_module, "take_step", jump)
    result = run_cli("train", "recipe.yaml", "train.epochs=8", "train.learning_rate=1e-4", "train.save_every=epoch")
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if "jumped" in line]
    assert len(told) == 1
    assert re.fullmatch(
        r"Step 40: the loss jumped to \d+\.\d\d; the median of the steps before is \d\.\d\d\. The highest rows of this "
        r"step: (rows\.jsonl:\d+ \(\d+\.\d\d\)(, )?){3}\. Training goes on\.",
        told[0],
    )
    own = [float(loss) for loss in re.findall(r"\((\d+\.\d\d)\)", told[0])]
    assert own == sorted(own, reverse=True)


# --- Standing still --------------------------------------------------------------------------------------------------


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_training_that_stands_still_says_at_what_and_is_not_ended(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog_module, "SILENT_SECONDS", 0.3)
    step_rows = loop_module.step_rows

    def hang(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, rows in enumerate(step_rows(*args, **kwargs), 1):
            if number == 3:
                time.sleep(1)
            yield rows

    monkeypatch.setattr(loop_module, "step_rows", hang)
    result = run_cli("train", "recipe.yaml")
    assert result.exit_code == 0, result.output
    assert re.search(r"No step for \d seconds?; since then: reading rows \(step 3\), at loop\.py:\d+\. ", result.stderr)
    assert "Training is not ended by this" in result.stderr


def test_standing_still_is_told_ever_more_rarely_and_what_always_takes_long_not_at_all() -> None:
    said: list[str] = []
    with Watchdog(said.append, silent_seconds=0.1) as dog:
        dog.enter("training", step=7)
        wait_for(lambda: len(said) == 3)
        dog.enter("saving", step=7)
        count = len(said)
        dog.enter("training", step=8)
        time.sleep(0.6)
        assert len(said) == count, "ten times as long as it took before is not over"
    assert all("since then: training (step 7), at " in line for line in said)
    waited = [float(line.split()[3]) for line in said]
    assert waited == sorted(waited)
    time.sleep(0.2)
    assert len(said) == count, "it ends with its block"


# --- Places and processes that fail ----------------------------------------------------------------------------------


def test_a_folder_of_checkpoints_that_is_no_folder_any_more_ends_training_in_a_sentence(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step, taken = loop_module.take_step, []

    def replace_folder(*args: Any, **kwargs: Any) -> Any:
        taken.append(None)
        if len(taken) == 3:
            shutil.move(run.checkpoints, "moved")
            run.checkpoints.write_bytes(b"")
        return take_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "take_step", replace_folder)
        assert "runs/tiny/checkpoints/step-000003 could not be written" in refuse("train", "recipe.yaml")
    run.checkpoints.unlink()
    shutil.move("moved", run.checkpoints)
    result = run_cli("train", "recipe.yaml", "--resume")
    assert result.exit_code == 0, result.output
    assert "Going on from step 2" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_workers_leave_signals_for_the_whole_job_to_their_parent(number: signal.Signals) -> None:
    with Workers(2) as workers:
        results = workers.map(abs, range(-20, 0))
        assert next(results) == 20
        time.sleep(0.5)  # both have started by then
        for worker in workers._started:
            worker._process.send_signal(number)
        assert list(results) == list(range(19, 0, -1))


def test_a_killed_worker_ends_reading_in_a_sentence() -> None:
    killed = pytest.raises(DataError, match=r"was ended by SIGKILL before it was done.*WEITIAO_WORKERS=1")
    with killed, Workers(2) as workers:
        results = workers.map(abs, range(-200, 0))
        next(results)
        workers._started[0]._process.kill()
        list(results)
