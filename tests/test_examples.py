"""The recipes and rows of the examples: check finds nothing wrong, and what their page tells to type works."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from weitiao.cli import app
from weitiao.data.records import read_records

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent.name for path in (ROOT / "examples").glob("*/recipe.yaml"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own beside the examples, for recipes name paths from the project's folder."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), catch_exceptions=False)


def check(folder: str) -> dict[str, Any]:
    result = run("check", f"examples/{folder}/recipe.yaml", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_every_example_is_on_the_page() -> None:
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[([\w-]+)\]", page, re.MULTILINE)) == FOLDERS


def test_the_commands_of_the_page_end_well() -> None:
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        program, *words = shlex.split(line)
        result = run(*words)
        assert program == "weitiao" and result.exit_code == 0, result.output


def test_classification_asks_with_its_classes_and_has_one_label_for_each_answer() -> None:
    found = check("classification")
    assert (found["format"], found["rows"], found["dev"]) == ("text_category_output", 20, 4)
    [task] = found["tasks"]
    assert task["shape"] == "label" and {label["dev"] for label in task["labels"]} == {1}, "a dev row of every class"
    assert [finding for finding in found["findings"] if finding["grade"] != "note"] == []


def test_tool_calls_has_calls_results_and_answers() -> None:
    found = check("tool-calls")
    assert found["format"] == "messages" and [finding["grade"] for finding in found["findings"]].count("warning") == 0
    records = read_records("examples/tool-calls/rows.jsonl")
    assert all(len(record.tools) == 2 for record in records)
    calls = [call.name for record in records for turn in record.messages for call in turn.calls]
    assert {"get_weather", "set_alarm"} == set(calls) and len(calls) >= 10


def test_the_persona_is_held_out_by_time_and_holds_no_number() -> None:
    run("import-chats", "examples/persona", "--me", "小明", "-o", "chats", "--held-out", "0.2")
    found = check("persona")
    assert found["dev"] >= 1 and found["personal_data"] == {}
    train = [json.loads(line) for line in Path("chats/train.jsonl").read_text(encoding="utf-8").splitlines()]
    dev = [json.loads(line) for line in Path("chats/dev.jsonl").read_text(encoding="utf-8").splitlines()]
    assert max(row["end"] for row in train) < min(row["start"] for row in dev)
    assert "[电话1]" in json.dumps(train, ensure_ascii=False)
