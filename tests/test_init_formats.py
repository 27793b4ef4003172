"""weitiao init on every format: it says which format each source has, and asks for what it cannot know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from test_formats import ROWS
from weitiao.cli import app
from weitiao.data.formats import FORMATS
from weitiao.recipe import load_recipe

IDENTITY = [
    {"instruction": f"你是谁？{number}", "input": "", "output": "我是{{name}}，由<AUTHOR>开发。"} for number in range(4)
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_init(*words: str) -> Result:
    return CliRunner().invoke(app, ["init", *words], catch_exceptions=False)


def write(name: str, *rows: dict[str, Any]) -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


@pytest.mark.parametrize("name", [one.name for one in FORMATS])
def test_the_recipe_says_the_format_of_each_source_and_loads(name: str) -> None:
    write("rows.jsonl", ROWS[name])
    other = write("more.jsonl", ROWS["question_answer"])
    result = run_init("rows.jsonl", other)
    assert result.exit_code == 0, result.stderr
    text = Path("recipe.yaml").read_text(encoding="utf-8")
    assert f"- rows.jsonl   # {name}\n" in text and "- more.jsonl   # question_answer\n" in text
    assert [source.path for source in load_recipe("recipe.yaml").data.train] == ["rows.jsonl", "more.jsonl"]


def test_a_source_of_two_formats_is_told_by_both() -> None:
    run_init(write("rows.jsonl", ROWS["alpaca"], ROWS["messages"]))
    assert "- rows.jsonl   # alpaca, messages\n" in Path("recipe.yaml").read_text(encoding="utf-8")


def test_placeholders_are_asked_for_once_each_with_the_option_to_type() -> None:
    result = run_init(write("identity.jsonl", *IDENTITY))
    assert result.exit_code == 2 and not Path("recipe.yaml").exists()
    lines = [line for line in result.stderr.splitlines() if "identity.jsonl:1" in line]
    assert len(lines) == 2 and "4 rows hold the placeholder {{name}}" in lines[0]
    assert "--placeholder name=…" in lines[0] and "--placeholder author=…" in lines[1]


def test_placeholders_given_are_written_down_and_used() -> None:
    result = run_init(write("identity.jsonl", *IDENTITY), "--placeholder", "name=小微", "--placeholder", "author=")
    assert result.exit_code == 0, result.stderr
    assert load_recipe("recipe.yaml").data.placeholders == {"name": "小微", "author": None}
    check = CliRunner().invoke(app, ["check", "recipe.yaml", "--json"], catch_exceptions=False)
    assert json.loads(check.stdout)["rejected"] == 0


def test_bad_rows_are_told_before_placeholders() -> None:
    result = run_init(write("identity.jsonl", *IDENTITY, {"instruction": "缺答案"}))
    assert result.exit_code == 2 and "identity.jsonl:5: output" in result.stderr


def test_options_of_the_rows_are_written_down_for_train_and_dev_alike() -> None:
    rows = [{"text": f"第{number}次等了九天", "label": "物流"} for number in range(4)]
    Path("rows.jsonl").write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("gb18030"))
    Path("dev.jsonl").write_bytes('{"text": "味道不错", "label": "口味"}'.encode("gb18030"))
    words = ["--format", "text_label", "--prompt", "哪一类？\\n\\n{text}", "--system", "你是客服：主管。"]
    result = run_init("rows.jsonl", "--dev", "dev.jsonl", *words, "--encoding", "gb18030")
    assert result.exit_code == 0, result.stderr
    data = load_recipe("recipe.yaml").data
    for source in (*data.train, *data.dev):
        assert (source.format, source.prompt, source.system, source.encoding) == (
            "text_label", "哪一类？\n\n{text}", "你是客服：主管。", "gb18030",
        )  # fmt: skip
    assert yaml.safe_load(Path("recipe.yaml").read_text(encoding="utf-8"))["data"]["dev"][0]["path"] == "dev.jsonl"


def test_the_help_names_every_format_of_the_table() -> None:
    text = " ".join(CliRunner().invoke(app, ["init", "--help"]).stdout.split())
    for one in FORMATS:
        assert one.name in text
