"""docs/checking.md says what weitiao check finds, prints and ends with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from weitiao.cli import app

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "checking.md").read_text(encoding="utf-8")


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[number]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(block("json"), encoding="utf-8")
    return "rows.jsonl"


def test_the_example_is_what_check_prints(rows: str) -> None:
    result = CliRunner().invoke(app, ["check", rows], catch_exceptions=False)
    assert result.exit_code == 1
    assert result.stdout.rstrip() == block("text").rstrip()


def test_the_keys_of_the_json_are_those_of_the_table(rows: str) -> None:
    printed = json.loads(CliRunner().invoke(app, ["check", rows, "--json"], catch_exceptions=False).stdout)
    table = PAGE.split("## For programs")[1]
    cells = re.findall(r"^\| (`.*?) \| (.*?) \|$", table, re.MULTILINE)
    assert [key for cell, _ in cells for key in re.findall(r"`(\w+)`", cell)] == list(printed)
    told = {cell.strip("`"): re.findall(r"`(\w+)`", meaning) for cell, meaning in cells}
    assert told["files"] == list(printed["files"][0])
    assert told["tasks"] == list(printed["tasks"][0])
    assert told["findings"] == list(printed["findings"][0])


def test_every_kind_of_finding_is_explained() -> None:
    """Codes stand in the code as ``code="…"``, as the kinds of faulty texts, and as the two kinds of misfits."""
    source = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("data", "tasks", "check")
        for path in (ROOT / "src" / "weitiao" / folder).glob("*.py")
    )
    codes = set(re.findall(r'code="([\w-]+)"', source))
    codes |= set(re.findall(r'kind="([\w-]+)",\n        grade', source))
    codes |= set(re.findall(r'"([\w-]+)": "(?:whose answer does not|that belong to no)', source))
    codes |= {"overlong-input", "overlong-answer"}
    explained = re.findall(r"^\| `([\w-]+)` \| (?:error|warning|note)", PAGE, re.MULTILINE)
    assert len(explained) == len(set(explained)) and set(explained) == codes
