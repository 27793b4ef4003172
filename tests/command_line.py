"""The command line run inside a test: what it printed, and rows for it on the disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from weitiao.cli import app
from weitiao.train import plan as plan_module
from weitiao.train import scoring as scoring_module


def run_cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def succeed(*arguments: object) -> str:
    """What the command printed on stdout, having ended with code 0."""
    result = run_cli(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refuse(*arguments: object) -> str:
    """The sentences on stderr of a command that ended with code 2."""
    result = run_cli(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def light_training() -> Iterator[None]:
    """One thread, and no measuring of the machine's speed: tiny models do not gain by either."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_matrix_peak", lambda dtype, device: 1e10)
        yield
    torch.set_num_threads(before)


@contextmanager
def quick_training() -> Iterator[None]:
    """As `light_training`, and no curve is drawn: at every scoring that takes as long as the rest of a tiny run."""
    with light_training(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring_module, "draw_curve", lambda path, metrics: path.write_bytes(b"no curve"))
        yield


def write_topics(path: Path) -> None:
    """Two dozen rows of a single character and a number, with one of three labels each."""
    rows = []
    for number, text in enumerate(("球", "门", "网", "队", "星", "光", "芯", "电", "钱", "股", "税", "账") * 2):
        context = f"Instruction: 回答。\nInput: 选一个标签。\n\n{text}{number}\nAnswer: "
        target = json.dumps([("体育", "科技", "财经")[number % 12 // 4]], ensure_ascii=False)
        rows.append({"context": context, "target": target})
    write_rows(path, rows)
