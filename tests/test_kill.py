"""A training run killed with SIGKILL at twenty moments, resumed each time, ends in the bits of one never stopped.

Two runs of sixty steps, killed ten times each: while starting, between any two steps, while a checkpoint is being
written, while the dev rows are scored, while the finished run's files are written. After every kill, and whenever a
checkpoint appears, the newest one is read whole. The moments are drawn from a seed and printed (pytest -rP shows them).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from weitiao.runs import RunFolder
from weitiao.train.checkpoint import list_checkpoints, read_progress

pytestmark = pytest.mark.slow

STEPS, SAVE_EVERY, EVALUATE_EVERY = 60, 3, 30
PATIENCE_SECONDS, MAX_POLLS = 300, 300_000
OF_MACHINE = ("tokens_per_second", "seconds", "memory_bytes")
TEXTS = ("球", "门", "网", "队", "星", "光", "芯", "电", "钱", "股", "税", "账")


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a process is killed."""

    kind: Literal["starting", "step", "checkpoint", "scoring", "finishing"]
    step: int
    """Not before this step; 0 for `starting`."""
    delay_seconds: float
    """From the moment the kind names (for `starting`: from the start of the process) to the kill."""


def draw_moments(seed: int) -> list[Moment]:
    """Ten moments in the order of their steps: one while starting, three each between steps and in checkpoints."""
    draw = random.Random(seed)
    steps = draw.sample(range(1, STEPS - 1), 6)
    moments = [Moment(kind="step", step=step, delay_seconds=draw.uniform(0, 0.02)) for step in steps[:3]]
    moments += [Moment(kind="checkpoint", step=step, delay_seconds=draw.uniform(0, 0.005)) for step in steps[3:]]
    moments += [Moment(kind="scoring", step=EVALUATE_EVERY, delay_seconds=draw.uniform(0, 0.4))]
    moments += [Moment(kind="finishing", step=STEPS, delay_seconds=draw.uniform(0, 0.4)) for _ in range(2)]
    moments.sort(key=lambda moment: moment.step)
    moments.insert(draw.randrange(len(moments)), Moment(kind="starting", step=0, delay_seconds=draw.uniform(1, 5)))
    return moments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_gemma3_folder: Path) -> Path:
    """rows.jsonl, recipe.yaml (with dropout, so that random numbers matter) and the run never stopped, runs/whole."""
    folder = tmp_path_factory.mktemp("kill")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for number, text in enumerate(TEXTS * 2):
            context = f"Instruction: 回答。\nInput: 选一个标签。\n\n{text}{number}\nAnswer: "
            target = json.dumps([("体育", "科技", "财经")[number % 12 // 4]], ensure_ascii=False)
            stream.write(json.dumps({"context": context, "target": target}, ensure_ascii=False) + "\n")
    train = {
        "epochs": 10, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "compile": "never",
        "save_every": SAVE_EVERY, "evaluate_every": EVALUATE_EVERY,
    }  # fmt: skip
    recipe = {
        "name": "whole",
        "model": {"path": str(tiny_gemma3_folder), "dtype": "float32"},
        "data": {"train": "rows.jsonl"},
        "method": {"dropout": 0.1},
        "train": train,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    process = start_training(folder, "whole")
    assert process.wait(PATIENCE_SECONDS) == 0, (folder / "log.txt").read_text(encoding="utf-8")
    assert len(steps_logged(RunFolder(folder / "runs" / "whole"))) == STEPS
    return folder


def start_training(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """`weitiao train` in `folder`, with --resume where the run has begun; what it says goes to log.txt."""
    command = [sys.executable, "-m", "weitiao", "train", "recipe.yaml", f"name={name}"]
    if (folder / "runs" / name / "recipe.yaml").exists():
        command.append("--resume")
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def read_lines(run: RunFolder) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in run.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines


def steps_logged(run: RunFolder) -> list[int]:
    return [line["step"] for line in read_lines(run) if line["kind"] == "train"]


def read_newest_checkpoint(run: RunFolder) -> int:
    """Read the newest checkpoint whole; returns its step, 0 when there is none."""
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        return 0
    weights = load_file(checkpoints[-1] / "weights.safetensors")
    states = torch.load(checkpoints[-1] / "optimiser.pt", weights_only=True)
    assert weights
    assert states.keys() == {"optimiser", "scheduler", "rng"}
    return read_progress(checkpoints[-1]).step


def moment_has_come(run: RunFolder, moment: Moment) -> Callable[[], bool]:
    """A question to be asked again and again while the process runs; old metrics do not count."""

    def changed() -> int:
        return run.metrics.stat().st_mtime_ns if run.metrics.exists() else 0

    before = changed()

    def has_come() -> bool:
        if moment.kind == "starting":
            return True
        if changed() == before or max(steps_logged(run), default=0) < moment.step:
            return False
        if moment.kind == "checkpoint":
            return any(run.checkpoints.glob(".tmp-*"))
        if moment.kind == "finishing":
            return (run.checkpoints / f"step-{STEPS:06}").exists()
        return True

    return has_come


def run_and_kill(folder: Path, name: str, moment: Moment) -> bool:
    """Start or resume the run and kill it at `moment`; False when it was done before."""
    run = RunFolder(folder / "runs" / name)
    has_come, newest = moment_has_come(run, moment), -1
    process = start_training(folder, name)
    try:
        polls = 0  # counted instead of seconds: this machine's processes are sometimes paused
        while process.poll() is None and not has_come():
            assert (polls := polls + 1) < MAX_POLLS, f"{moment} never came"
            step = max((int(path.name.removeprefix("step-")) for path in list_checkpoints(run)), default=0)
            if step != newest:
                newest = read_newest_checkpoint(run)
            time.sleep(0.0003)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment.delay_seconds)
    finally:
        process.kill()
        code = process.wait()
    assert code in (0, -9), (folder / "log.txt").read_text(encoding="utf-8")
    return code == -9


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_killed_ten_times_ends_in_the_bits_of_one_never_killed(seed: int, folder: Path) -> None:
    name, num_kills = f"killed-{seed}", 0
    run, whole = RunFolder(folder / "runs" / name), RunFolder(folder / "runs" / "whole")
    for moment in draw_moments(seed):
        for _ in range(5):  # a finishing run may be done before it is killed: then it is resumed and killed again
            if killed := run_and_kill(folder, name, moment):
                break
        assert killed, f"the run was always done before {moment}"
        num_kills += 1
        logged, left = max(steps_logged(run), default=0), [path.name for path in run.path.rglob(".[to]*-*")]
        newest = read_newest_checkpoint(run)
        print(f"{moment}: killed after step {logged}; newest checkpoint: {newest}; left over: {left}")
    process = start_training(folder, name)
    assert process.wait(PATIENCE_SECONDS) == 0, (folder / "log.txt").read_text(encoding="utf-8")
    assert num_kills == 10
    weights = "adapter_model.safetensors"
    assert (run.adapter / weights).read_bytes() == (whole.adapter / weights).read_bytes()
    assert (run.best / weights).read_bytes() == (whole.best / weights).read_bytes()
    without_speed = [
        [{key: value for key, value in line.items() if key not in OF_MACHINE} for line in read_lines(one)]
        for one in (run, whole)
    ]
    assert without_speed[0] == without_speed[1]
    assert not list(run.path.rglob(".[to]*-*"))
