"""Many rows from end to end: killed while their tokens are written, trained on from the disk, read in bounded memory.

What takes minutes is marked slow.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from weitiao import token_cache
from weitiao.recipe import make_recipe
from weitiao.tune import tune_model

LABELS = ("体育", "科技", "财经")

PREPARE = """
import sys
from pathlib import Path
from weitiao.dataset import load_dataset
from weitiao.models.opening import open_renderer
from weitiao.recipe import make_recipe
from weitiao.token_cache import fit_side

rows, model, folder = sys.argv[1:]
recipe = make_recipe({"name": "t", "model": model, "data": {"train": rows, "held_out": 0}})
renderer = open_renderer(model)
print("reading", flush=True)
dataset = load_dataset(recipe)
print("tokenising", flush=True)
fitted, note = fit_side(recipe.data, dataset, "train", renderer, model=Path(model), folder=Path(folder))
print("found" if "from the cache" in note else "made", len(fitted.examples), fitted.examples.lengths.sum())
"""


def write_rows(path: Path, count: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            context = f"Instruction: 请回答。\nInput: 选一个标签。\n\n第{number}则短文，说的是一件小事。\nAnswer: "
            target = json.dumps([LABELS[number % 3]], ensure_ascii=False)
            file.write(json.dumps({"context": context, "target": target}, ensure_ascii=False) + "\n")
    return path


def start(rows: Path, model: Path, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "WEITIAO_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", PREPARE, str(rows), str(model), str(folder / "tokens")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> list[str]:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return output.splitlines()


def resident_bytes(pid: int) -> int:
    """What a process and its children hold in memory together; 0 when it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(int(child)) for child in children)


def test_training_from_the_disk_gives_the_adapter_of_training_from_memory(
    tiny_qwen2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEITIAO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    adapters = []
    for kept_from in (1_000, 1, 1):
        monkeypatch.setattr(token_cache, "KEPT_FROM", kept_from)
        values = {
            "name": f"run-{len(adapters)}",
            "model": {"path": str(tiny_qwen2_folder), "dtype": "float32"},
            "data": {"train": str(rows), "held_out": 0.2},
            "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "compile": "never", "save_every": 100,
                      "evaluate_every": "never"},
        }  # fmt: skip
        screen = io.StringIO()
        run = tune_model(make_recipe(values), console=Console(file=screen, width=200))
        adapters.append(load_file(run.adapter / "adapter_model.safetensors"))
    sets = [*(tmp_path / "cache" / "tokens").glob("*/examples.arrow")]
    assert len(sets) == 2, "train and dev rows were tokenised once, and found again"
    for other in adapters[1:]:
        assert adapters[0].keys() == other.keys()
        assert all(adapters[0][name].equal(other[name]) for name in other)


@pytest.mark.slow
def test_a_process_killed_while_it_tokenises_leaves_nothing_that_is_trusted(
    tiny_qwen2_folder: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 12_000)
    whole = finish(start(rows, tiny_qwen2_folder, tmp_path / "whole"))
    assert whole[-1].startswith("made 12000 ")
    draw = random.Random(0)
    folder = tmp_path / "killed"
    half_written = 0
    for moment in range(6):
        process = start(rows, tiny_qwen2_folder, folder)
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        assert process.stdout.readline() == "tokenising\n"
        if moment:
            while process.poll() is None and not [*folder.glob("tokens/.tmp-*/examples.arrow")]:
                time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        half_written += bool([*folder.glob("tokens/.tmp-*")])
        if [*folder.glob("tokens/*/index.json")]:
            break  # it was done before the kill
    assert half_written >= 3, "most kills came while a set was being written"
    after = finish(start(rows, tiny_qwen2_folder, folder))
    assert after[-1].split()[1:] == whole[-1].split()[1:]
    assert not [*folder.glob("tokens/.tmp-*")]


@pytest.mark.slow
def test_preparing_many_rows_takes_bounded_memory(tiny_qwen2_folder: Path, tmp_path: Path) -> None:
    growth = {}
    for count in (50_000, 200_000):
        rows = write_rows(tmp_path / f"{count}.jsonl", count)
        process = start(rows, tiny_qwen2_folder, tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        before = peak = resident_bytes(process.pid)
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.02)
        assert finish(process)[-1].startswith(f"made {count} ")
        growth[count] = peak - before
    assert growth[200_000] < 300e6, f"{growth} bytes above what was loaded before, worker processes included"
    per_row = (growth[200_000] - growth[50_000]) / 150_000
    assert per_row < 300, f"{per_row:.0f} bytes more for each row: one in memory takes about 2,000"
