"""Trainings by several processes on this machine: rows, a recipe, torchrun, and what was measured."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from weitiao.models.own_weights import WEIGHTS_FILE
from weitiao.runs import RunFolder

TEXTS = ("球", "门", "网", "队", "星", "光", "芯", "电", "钱", "股", "税", "账")
LABELS = ("体育", "科技", "财经")
PATIENCE_SECONDS = 280

TOLERANCE = 1e-5
"""Of losses in float32: sums come in another order."""


def write_recipe(
    folder: Path, model: Path, *, rows: int = 24, method: Mapping[str, Any] | None = None, **train: Any
) -> Path:
    """`folder` with rows of different lengths, five dev rows and recipe.yaml, in float32 and without dropout."""
    for file, first, last in (("rows.jsonl", 0, rows), ("dev.jsonl", rows, rows + 5)):
        with (folder / file).open("w", encoding="utf-8") as stream:
            for number in range(first, last):
                text = TEXTS[number % 12] * (1 + number * 7 % 23)
                context = f"Instruction: 回答。\nInput: 选一个标签。\n\n{text}{number}\nAnswer: "
                target = json.dumps([LABELS[number % 12 // 4]], ensure_ascii=False)
                stream.write(json.dumps({"context": context, "target": target}, ensure_ascii=False) + "\n")
    settings = {"batch_size": 8, "learning_rate": 5e-3, "log_every": 1, "compile": "never", "save_every": 2, **train}
    recipe = {
        "name": "whole",
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": "rows.jsonl", "dev": "dev.jsonl"},
        "method": method or {"dropout": 0.0},
        "train": settings,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


def start(folder: Path, *words: str, processes: int = 1, restarts: int = 0) -> subprocess.Popen[str]:
    """`weitiao train recipe.yaml WORDS` in `folder`, under torchrun where there are several processes.

    What it says comes from its stdout, which must be read.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--max-restarts={restarts}"]
    command += ["-m", "weitiao", "train", "recipe.yaml", *words]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def train(folder: Path, *words: str, processes: int = 1) -> str:
    """What a training says that ends as it should."""
    process = start(folder, *words, processes=processes)
    said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, said
    return said


def run_of(folder: Path, name: str) -> RunFolder:
    return RunFolder(folder / "runs" / name)


def lines_of(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of `kind`, train or dev."""
    return [line for line in run.read_metrics() if line["kind"] == kind]


def adapter_of(run: RunFolder) -> dict[str, Tensor]:
    """What learnt: an adapter, or weights of the model's own."""
    files = [run.adapter / name for name in ("adapter_model.safetensors", WEIGHTS_FILE)]
    return load_file(next(file for file in files if file.exists()))


def furthest(one: RunFolder, other: RunFolder) -> float:
    """The largest difference of a number in two runs' adapters."""
    a, b = adapter_of(one), adapter_of(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a) if a else float(torch.inf)


def agree(one: RunFolder, other: RunFolder) -> None:
    """Every logged figure of two runs that does not depend on the machine is the same, and so are their adapters."""
    for kind, figures in (("train", ("loss", "grad_norm", "learning_rate")), ("dev", ("loss", "overall"))):
        lines, others = lines_of(one, kind), lines_of(other, kind)
        assert [line["step"] for line in lines] == [line["step"] for line in others]
        for line, its in zip(lines, others, strict=True):
            for name in figures:
                assert math.isclose(line[name], its[name], rel_tol=TOLERANCE, abs_tol=TOLERANCE), (line, its)
            assert line["task_losses"] == pytest.approx(its["task_losses"], rel=TOLERANCE)
    assert one.read_samples() == other.read_samples()
    assert furthest(one, other) < 20 * TOLERANCE


def wait_for_step(run: RunFolder, step: int, process: subprocess.Popen[str]) -> None:
    """Until `run` has logged `step`."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not any(line["step"] >= step for line in lines_of(run, "train")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)


def kill(process: subprocess.Popen[str], rank: int) -> int:
    """SIGKILL the process number `rank` of those that `process`, a torchrun, started, once there is one; its pid."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not (living := list(ranked(process.pid, rank))):
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(living[0], signal.SIGKILL)
    return living[0]


def finish_though_killed(process: subprocess.Popen[str], run: RunFolder, draw: random.Random) -> None:
    """Kill one of two processes of a launch with restarts, twice at random moments; return when it has ended well."""
    for step in (draw.randrange(1, 6), draw.randrange(6, 28)):
        wait_for_step(run, step, process)
        victim, delay = draw.randrange(2), draw.uniform(0, 0.3)
        print(f"process {victim} is killed {delay:.3f} s after step {step}")
        time.sleep(delay)
        kill(process, victim)
    said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, said
    assert said.count("Done in") == 1
    assert "Going on from step" in said


def ranked(launcher: int, rank: int) -> Iterator[int]:
    """The living processes number `rank` that `launcher` started."""
    for child in psutil.Process(launcher).children():
        with contextlib.suppress(psutil.Error):  # one that has ended meanwhile has no environment
            if child.status() != psutil.STATUS_ZOMBIE and child.environ().get("RANK") == str(rank):
                yield child.pid
