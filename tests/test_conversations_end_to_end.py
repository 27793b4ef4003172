"""Conversations with tools from rows to report and predictions, through the command line, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from typer.testing import CliRunner

from weitiao.cli import app
from weitiao.contract import Contract
from weitiao.train import plan as plan_module

TOOL = {
    "name": "weather",
    "description": "某城市的天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CITIES = ("北京", "上海", "广州", "成都", "西安", "杭州", "苏州", "南京", "天津", "重庆")


def run_cli(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def succeed(*words: object) -> str:
    result = run_cli(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def talk(city: str, number: int) -> dict[str, Any]:
    """A call, its result, an answer, and a last question whose answer is text or another call."""
    arguments = json.dumps({"city": city}, ensure_ascii=False)
    row: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": f"{city}天气？"},
            {"role": "assistant", "content": "查。", "function_call": {"name": "weather", "arguments": arguments}},
            {"role": "tool", "content": f"{number}度"},
            {"role": "assistant", "content": f"{number}度。", "loss": number % 2 == 0},
            {"role": "user", "content": f"<b>{city}</b>明天呢？"},
        ],
        "tools": [TOOL],
    }
    last = {"content": "不知道。"} if number % 3 else {"function_call": {"name": "weather", "arguments": arguments}}
    row["messages"].append({"role": "assistant", **last})
    return row


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_folder: Path) -> Iterator[Path]:
    """The folder of a finished run of two steps, inside the folder with its rows, which is the current one."""
    folder = tmp_path_factory.mktemp("talks")
    write(folder / "talks.jsonl", [talk(city, number) for number, city in enumerate(CITIES)])
    recipe = {
        "name": "talks",
        "model": {"path": str(tiny_qwen2_folder), "dtype": "float32"},
        "data": {"train": {"path": "talks.jsonl", "system": "你是{{name}}。"}, "placeholders": {"name": "小微"}},
        "train": {"epochs": 1, "batch_size": 5, "compile": "never", "evaluate_every": "never", "tokens_per_pass": 2048},
        "generate": {"max_new_tokens": 8},
        "evaluate": {"resamples": 10},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_matrix_peak", lambda dtype, device: 1e10)
        patch.chdir(folder)
        assert run_cli("check", "recipe.yaml").exit_code == 0
        succeed("train", "recipe.yaml")
        yield folder / "runs" / "talks"
    torch.set_num_threads(before)


def test_training_took_two_steps_and_the_contract_says_how_rows_were_asked(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert max(line["step"] for line in lines) == 2
    kept = Contract.read(run / "contract.json").reading
    assert kept["placeholders"] == {"name": "小微"} and [s["system"] for s in kept["sources"]] == ["你是{{name}}。"]


def test_check_counts_the_tokens_of_tools_and_calls_as_training_renders_them(run: Path) -> None:
    from weitiao.dataset import load_dataset
    from weitiao.models.opening import open_renderer
    from weitiao.recipe import load_recipe
    from weitiao.render.fitting import render_record

    recipe = load_recipe("recipe.yaml")
    dataset, renderer = load_dataset(recipe), open_renderer(recipe.model.path)
    rows = [*zip(dataset.train, dataset.train_tasks), *zip(dataset.dev, dataset.dev_tasks)]
    longest = max(len(example) for row, task in rows for example in render_record(row, task, renderer, turns="flagged"))
    printed = json.loads(run_cli("check", "recipe.yaml", "--json").stdout)
    [counted] = [lengths for lengths in printed["lengths"] if lengths["unit"] == "tokens"]
    assert abs(counted["max"] - longest) <= 0.02 * longest
    assert longest > 400, "the offer of tools is the larger part of it"


def test_evaluation_shows_the_conversation_with_its_tools_escaped(run: Path) -> None:
    succeed("evaluate", run)
    page = (run / "evaluations" / "dev" / "report.html").read_text(encoding="utf-8")
    worst = json.loads((run / "evaluations" / "dev" / "report.json").read_text(encoding="utf-8"))["worst"]
    speakers = [speaker for speaker, _ in worst[0]["before"]]
    assert speakers == ["tools", "system", "user", "assistant", "tool", "assistant"]
    assert worst[0]["before"][1][1] == "你是小微。", "the placeholder of the system message is filled"
    assert "tool_call" in worst[0]["before"][3][1] and '"weather"' in worst[0]["before"][0][1]
    assert not any(f"<b>{city}" in page for city in CITIES) and "&lt;b&gt;" in page and "tool_call" in page


def test_predictions_are_asked_with_the_runs_system_message_and_tools(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weitiao.render.template import TemplateRenderer

    rows = [talk(city, number) for number, city in enumerate(CITIES[:3])]
    for row in rows:
        del row["messages"][-1]  # the question is still to be answered
    asked: list[tuple[list[str], int]] = []
    render = TemplateRenderer.render_prompt

    def watch(self: TemplateRenderer, messages: Any, tools: Any = ()) -> tuple[int, ...]:
        asked.append(([message.text for message in messages], len(tools)))
        return render(self, messages, tools)

    monkeypatch.setattr(TemplateRenderer, "render_prompt", watch)
    succeed("predict", run, write(Path("new.jsonl"), rows), "-o", "answers.jsonl")
    assert {(texts[0], tools) for texts, tools in asked} == {("你是小微。", 1)}
    lines = [json.loads(line) for line in Path("answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["messages"] for line in lines] == [row["messages"] for row in rows]
    assert all(isinstance(line["prediction"], str) and line["task"] == "text" for line in lines)
    asked.clear()
    succeed("predict", run, "new.jsonl", "-o", "others.jsonl", "--system", "你是小红。")
    assert {texts[0] for texts, _ in asked} == {"你是小红。"}


def test_options_of_a_file_are_refused_where_no_file_is_given(run: Path) -> None:
    result = run_cli("evaluate", run, "--system", "S")
    assert result.exit_code == 2 and "--data" in result.stderr
