"""A hundred SIGKILLs and twenty SIGTERMs at random moments of several runs: each goes on and ends in the same bits.

The moments are drawn from a seed. A third of them lie anywhere in the start of a process, the others after its training
has begun: in steps, in checkpoints, in scorings, in the end. After each, every checkpoint there is holds what was
written, and no more is lost than the steps since the last one. `test_kill.py` aims at single kinds of moments instead.

Processes are forked from one that has loaded the libraries, so that a hundred starts take minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from weitiao.runs import RunFolder
from weitiao.train.checkpoint import list_checkpoints, step_of
from weitiao.train.manifest import damage_in

pytestmark = pytest.mark.slow

NUM_KILLS, NUM_TERMS, NUM_RUNS = 100, 20, 5
STEPS, SAVE_EVERY, EVALUATE_EVERY = 96, 3, 12
START_SECONDS, TRAINING_SECONDS = 1.5, 1.0
DONE = "Next: weitiao evaluate"
TEXTS = ("球", "门", "网", "队", "星", "光", "芯", "电", "钱", "股", "税", "账")

SERVER = """
import json, os, sys
import matplotlib.backends.backend_agg, matplotlib.figure, torch
import weitiao.check.examine, weitiao.tune
from weitiao.cli import app

torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        app(order["words"])
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """Starts `weitiao` in `folder`, one process at a time."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log.txt"
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def start(self, *words: str) -> int:
        """The number of the new process."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({"log": str(self._log), "words": words}) + "\n")
        self._server.stdin.flush()
        return int(self._read())

    def wait(self) -> int:
        """The code that the process exits with, negative for the number of a signal."""
        return int(self._read())

    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def _read(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_gemma3_folder: Path) -> Path:
    """rows.jsonl and recipe.yaml, with dropout, so that random numbers matter."""
    folder = tmp_path_factory.mktemp("survival")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for number, text in enumerate(TEXTS * 2):
            context = f"Instruction: 回答。\nInput: 选一个标签。\n\n{text}{number}\nAnswer: "
            target = json.dumps([("体育", "科技", "财经")[number % 12 // 4]], ensure_ascii=False)
            stream.write(json.dumps({"context": context, "target": target}, ensure_ascii=False) + "\n")
    recipe = {
        "name": "whole",
        "model": {"path": str(tiny_gemma3_folder), "dtype": "float32"},
        "data": {"train": "rows.jsonl"},
        "method": {"dropout": 0.1},
        "generate": {"max_new_tokens": 8},
        "train": {
            "epochs": 16, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "compile": "never",
            "save_every": SAVE_EVERY, "evaluate_every": EVALUATE_EVERY,
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def forks(folder: Path) -> Iterator[Forks]:
    forks = Forks(folder)
    forks.start("train", "recipe.yaml")
    assert forks.wait() == 0, forks.said()
    yield forks
    forks.close()


def read_lines(run: RunFolder) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in run.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines


def last_step(run: RunFolder) -> int:
    return max((line["step"] for line in read_lines(run) if line["kind"] == "train"), default=0)


def newest(run: RunFolder) -> int:
    """The step of the newest checkpoint, all of them being whole; 0 when there is none."""
    checkpoints = list_checkpoints(run)
    assert [damage_in(path) for path in checkpoints] == [""] * len(checkpoints)
    return max(map(step_of, checkpoints), default=0)


def training_begins(run: RunFolder, pid: int) -> None:
    """Wait until the process writes metrics, or is gone."""

    def changed() -> int:
        return run.metrics.stat().st_mtime_ns if run.metrics.exists() else 0

    before = changed()
    for _ in range(60_000):
        if changed() != before or is_gone(pid):
            return
        time.sleep(0.001)
    pytest.fail("the training never began")


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def assert_same_as_whole(run: RunFolder, whole: RunFolder) -> None:
    for part in (run.adapter, run.best):
        name = "adapter_model.safetensors"
        assert (part / name).read_bytes() == (whole.path / part.name / name).read_bytes()
    of_machine = ("tokens_per_second", "seconds", "memory_bytes")
    without = [
        [{key: value for key, value in line.items() if key not in of_machine} for line in read_lines(one)]
        for one in (run, whole)
    ]
    assert without[0] == without[1]
    assert not [*run.path.rglob(".tmp-*"), *run.path.rglob(".old-*")]


class Killer:
    """Starts and resumes runs one after the other and sends each process a signal at a random moment."""

    def __init__(self, forks: Forks, folder: Path, *, kind: str, seed: int) -> None:
        self.forks, self.folder, self.kind, self.draw = forks, folder, kind, random.Random(seed)
        self.whole = RunFolder(folder / "runs" / "whole")
        self.num_finished, self.num_sent, self.most_lost = 0, 0, 0
        self.moments: Counter[str] = Counter()

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "runs" / f"{self.kind}-{self.num_finished}")

    def send(self, number: signal.Signals, *, earliest_seconds: float = 0.0) -> int:
        """Send `number` to a process that begins the present run or goes on with it; the code it exits with,
        0 where it was done before.
        """
        saved = newest(self.run)
        pid = self.forks.start("train", "recipe.yaml", f"name={self.run.path.name}", "--resume", "auto")
        if self.draw.random() < 1 / 3:
            time.sleep(max(earliest_seconds, self.draw.uniform(0, START_SECONDS)))
        else:
            training_begins(self.run, pid)
            time.sleep(self.draw.uniform(0, TRAINING_SECONDS))
        with contextlib.suppress(ProcessLookupError):  # the process was faster, and is done
            os.kill(pid, number)
        code = self.forks.wait()
        if saved and (found := re.search(r"Going on from step (\d+)", self.forks.said())):
            assert int(found[1]) == saved, "a training goes on from its newest checkpoint"
        if code == 0 or DONE in self.forks.said():  # also where the signal met an interpreter that was shutting down
            self.finish()
            return 0
        self.num_sent += 1
        return code

    def finish(self) -> None:
        assert self.run.contract.exists()
        assert_same_as_whole(self.run, self.whole)
        self.num_finished += 1

    def note(self) -> None:
        """Where the process was when it was killed, as far as the run's folder shows."""
        step, saved = last_step(self.run), newest(self.run)
        lost = max(0, step - saved)
        self.most_lost = max(self.most_lost, lost)
        left = [path.name for path in self.run.path.rglob(".tmp-*")]
        where = "writing" if left else "finishing" if saved == STEPS else "before a checkpoint" if not saved else "else"
        self.moments[where] += 1

    def finish_if(self, due: bool) -> None:
        """Where it is `due` and the present run has begun, let it come to its end; the next is another one."""
        if due and self.run.recipe.exists():
            self.forks.start("train", "recipe.yaml", f"name={self.run.path.name}", "--resume")
            assert self.forks.wait() == 0, self.forks.said()
            self.finish()


def test_a_hundred_kills_lose_no_more_than_the_steps_since_the_last_checkpoint(forks: Forks, folder: Path) -> None:
    killer = Killer(forks, folder, kind="killed", seed=1)
    while killer.num_sent < NUM_KILLS:
        code = killer.send(signal.SIGKILL)
        assert code in (0, -signal.SIGKILL), forks.said()
        if code:
            killer.note()
            killer.finish_if(killer.num_sent % (NUM_KILLS // NUM_RUNS) == 0)
    print(f"{NUM_KILLS} kills of {killer.num_finished} runs; most steps lost: {killer.most_lost}; {killer.moments}")
    assert killer.most_lost <= SAVE_EVERY
    assert killer.num_finished >= NUM_RUNS


def test_twenty_times_asked_to_end_nothing_is_lost_at_all(forks: Forks, folder: Path) -> None:
    killer = Killer(forks, folder, kind="asked", seed=2)
    while killer.num_sent < NUM_TERMS:
        before = newest(killer.run)
        code = killer.send(signal.SIGTERM, earliest_seconds=0.2)
        assert code in (0, 75), forks.said()
        if code:
            said = re.search(rf"Saved at step (\d+) of {STEPS}", forks.said())
            assert newest(killer.run) == (before if said is None else int(said[1]))
            assert said is None or last_step(killer.run) == int(said[1])
            killer.moments["before a step" if said is None else "in training"] += 1
            killer.finish_if(killer.num_sent % (NUM_TERMS // NUM_RUNS) == 0)
    print(f"{NUM_TERMS} times asked, {killer.num_finished} runs; {killer.moments}")
    assert killer.num_finished >= NUM_RUNS
    assert min(killer.moments.values()) >= 2
