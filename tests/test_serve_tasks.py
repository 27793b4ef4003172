"""Typed answers, feedback that becomes rows, figures, the terminal's chat, and the proof that routes are one model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from command_line import read_lines, run_cli, succeed
from served_models import serving
from weitiao.apply import RunInUse, open_run
from weitiao.data.records import read_records
from weitiao.serve.server import Server
from weitiao.serve.terminal import TerminalChat
from weitiao.verify import verify_run

TEXT = "去年王安搬到了北京。"


@pytest.fixture(scope="module")
def work(tuned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run with its rows, evaluated on its dev rows."""
    copy = tmp_path_factory.mktemp("tasks") / "work"
    shutil.copytree(tuned_run.parents[1], copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copy)
        succeed("evaluate", "runs/train", "--no-base")
    return copy


@pytest.fixture(scope="module")
def rated(work: Path) -> Path:
    return work / "rated.jsonl"


@pytest.fixture(scope="module")
def served(work: Path, rated: Path) -> Iterator[tuple[str, Server]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        with serving("train=runs/train", feedback=rated) as address_and_server:
            yield address_and_server


@pytest.fixture(scope="module")
def merged(work: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        succeed("export", "runs/train", "merged")
    return work / "merged"


def ask(served: tuple[str, Server], task: str, text: str = TEXT, **fields: Any) -> dict[str, Any]:
    reply = httpx.post(f"{served[0]}/v1/tasks/{task}", json={"text": text, **fields}, timeout=60)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def test_a_text_gets_a_typed_answer_with_the_confidence_of_each_value(served: tuple[str, Server]) -> None:
    answer = ask(served, "labels")
    assert (
        answer["valid"] and answer["answer"] in (["南方"], ["北方"]) and json.loads(answer["text"]) == answer["answer"]
    )
    assert [field["value"] for field in answer["fields"]] == answer["answer"]
    assert 0 < answer["fields"][0]["confidence"] <= 1 and 0 < answer["confidence"] <= 1
    assert (answer["object"], answer["task"], answer["model"]) == ("task.answer", "labels", "train")


def test_answers_are_those_of_predict(served: tuple[str, Server], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    succeed("predict", "runs/train", "dev.jsonl", "-o", "answers.jsonl")
    for line in read_lines(work / "answers.jsonl"):
        text = line["context"].split("\n\n")[1].removesuffix("\nAnswer: ")
        answer = ask(served, line["task"], text)
        assert answer["text"] == line["prediction"] and answer["reason"] == line["reason"]
        assert answer["confidence"] == pytest.approx(line["confidence"], abs=1e-5)


def test_the_openapi_description_has_the_schema_of_each_tasks_answers(served: tuple[str, Server]) -> None:
    described = httpx.get(f"{served[0]}/openapi.json").json()
    listed = httpx.get(f"{served[0]}/v1/tasks").json()["data"]
    assert {task["id"] for task in listed} == {"objects", "labels"}
    for task in listed:
        route = described["paths"][f"/v1/tasks/{task['id']}"]["post"]
        shape = route["responses"]["200"]["content"]["application/json"]["schema"]
        assert shape["properties"]["answer"]["anyOf"][0] == task["schema"]
        answer = ask(served, task["id"])
        jsonschema.validate(answer, shape)
        if answer["valid"]:
            jsonschema.validate(answer["answer"], task["schema"])


def test_tasks_that_are_not_there_are_named_beside_those_that_are(served: tuple[str, Server]) -> None:
    for route, body in [("/v1/tasks/poems", {"text": "x"}), ("/v1/tasks/labels", {"text": "x", "model": "y"})]:
        reply = httpx.post(served[0] + route, json=body)
        assert reply.status_code == 404 and ("labels" in reply.text or "train" in reply.text)
    assert httpx.post(f"{served[0]}/v1/tasks/labels", json={"text": ""}).status_code == 400
    assert httpx.post(f"{served[0]}/v1/tasks/labels", json={"txt": "a"}).json()["error"]["param"] == "text"


def test_feedback_becomes_rows_that_training_reads(served: tuple[str, Server], rated: Path) -> None:
    def rate(**fields: Any) -> httpx.Response:
        return httpx.post(f"{served[0]}/v1/feedback", json=fields)

    right, wrong, bad = ask(served, "labels"), ask(served, "objects"), ask(served, "objects")
    assert rate(id=right["id"], thumb="up").status_code == 200
    correction = [{"人": "王安", "城": "北京"}]
    assert rate(id=wrong["id"], thumb="down", correction=correction, comment="两个都错").status_code == 200
    assert rate(id=bad["id"], thumb="down").status_code == 200
    misfit = rate(id=bad["id"], thumb="down", correction=[{"人": "王安"}])
    assert misfit.status_code == 400 and "lacks 城" in misfit.json()["error"]["message"]
    assert rate(id="task-0", thumb="up").status_code == 404
    assert rate(id=right["id"], thumb="up", correction=["南方"]).status_code == 400
    records = read_records(rated)
    assert [record.task for record in records] == ["labels", "objects"]
    assert json.loads(str(records[1].target)) == correction and TEXT in records[1].prompt
    assert len(read_lines(rated.with_suffix(".wrong.jsonl"))) == 1
    figures = httpx.get(f"{served[0]}/v1/statistics").json()["models"]["train"]["objects"]
    assert figures["feedback"] == {"up": 0, "down": 2, "corrected": 1}
    assert figures["asked"] >= 2 and figures["latency_p50_seconds"] > 0
    assert 'weitiao_task_answers_total{model="train",task="objects"' in httpx.get(f"{served[0]}/metrics").text


def test_each_choice_of_a_reply_can_be_rated_by_itself(served: tuple[str, Server], rated: Path) -> None:
    body = {"model": "train", "messages": [{"role": "user", "content": "你好"}], "n": 2, "max_tokens": 8}
    body |= {"response_format": {"type": "text"}, "temperature": 2, "seed": 1}
    reply = httpx.post(f"{served[0]}/v1/chat/completions", json=body, timeout=60).json()
    first, second = (choice["message"]["content"] for choice in reply["choices"])
    assert first != second
    for answer_id in (reply["id"], f"{reply['id']}.1"):
        rating = {"id": answer_id, "thumb": "down", "comment": answer_id}
        assert httpx.post(f"{served[0]}/v1/feedback", json=rating).status_code == 200
    kept = read_lines(rated.with_suffix(".wrong.jsonl"))[-2:]
    assert [line["messages"][-1]["content"] for line in kept] == [first, second]


def test_drift_is_the_confidence_less_what_the_dev_rows_led_to_expect(served: tuple[str, Server]) -> None:
    ask(served, "labels")
    figures = httpx.get(f"{served[0]}/v1/statistics").json()["models"]["train"]["labels"]
    assert figures["expected_confidence"] is not None
    drift = figures["mean_confidence"] - figures["expected_confidence"]
    assert figures["confidence_drift"] == pytest.approx(drift)


def test_without_a_feedback_file_none_is_taken(tuned_run: Path) -> None:
    with serving(tuned_run) as (url, _server):
        refused = httpx.post(f"{url}/v1/feedback", json={"id": "x", "thumb": "up"})
    assert refused.status_code == 403 and "--feedback" in refused.json()["error"]["message"]


# --- The terminal ----------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(served: tuple[str, Server]) -> TerminalChat:
    return TerminalChat(server=served[1], model=served[1].models["train"])


def said(talk: TerminalChat, line: str) -> str:
    return "".join(talk.say(line))


def test_the_terminal_streams_replies_and_keeps_the_conversation(talk: TerminalChat) -> None:
    said(talk, "/set max_tokens 8")
    said(talk, "/free")
    first = said(talk, "你好")
    assert talk.turns[0] == {"role": "user", "content": "你好"} and first.startswith(talk.turns[1]["content"])
    assert "[cut at 8 tokens]" in first
    said(talk, "再见")
    assert len(talk.turns) == 4
    said(talk, "/undo")
    assert len(talk.turns) == 2
    said(talk, "/new")
    assert talk.turns == []


def test_the_terminal_asks_tasks_and_says_how_sure_the_model_is(talk: TerminalChat) -> None:
    told = said(talk, f"/task labels {TEXT}")
    assert json.loads(told.split("\n  ")[0] if "\n  0" not in told else told[: told.index("]") + 1]) in (
        ["南方"],
        ["北方"],
    )
    assert "the whole" in told
    assert "Its tasks: " in said(talk, "/task poems x") and "Say what text" in said(talk, "/task labels")
    assert "labels: " in said(talk, "/tasks")


def test_the_terminal_tells_what_it_does_not_know(talk: TerminalChat, tmp_path: Path) -> None:
    assert "There is no /nix" in said(talk, "/nix") and "/save FILE" in said(talk, "/help")
    assert "no setting" in said(talk, "/set heat 3") and "is no number" in said(talk, "/set temperature warm")
    said(talk, "/set temperature 9")
    assert "temperature" in said(talk, "你好")
    said(talk, "/set temperature -")
    said(talk, "/set max_tokens 3")
    said(talk, "/system 你是小微。")
    said(talk, "/free")
    said(talk, "你好")
    file = tmp_path / "talk.jsonl"
    assert str(file) in said(talk, f"/save {file}")
    if talk.turns[1]["content"].strip():
        assert read_records(file)[0].instruction == "你是小微。"


def test_weitiao_chat_reads_lines_until_the_end(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    lines = iter(["/task labels \\", TEXT, "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    result = run_cli("chat", "runs/train")
    assert result.exit_code == 0 and "the whole" in result.stdout and "/help" in result.stderr


# --- One model by every route ----------------------------------------------------------------------------------------


def test_every_route_asks_the_same_tokens_and_gets_the_same_answers(
    served: tuple[str, Server], work: Path, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    checks = verify_run("runs/train", urls=[served[0]], merged=merged)
    assert [(check.route, check.first) for check in checks] == [("merged", None), (served[0], None)]
    printed = succeed("verify", "runs/train", "--rows", "3")
    assert "server: 3 of 3 prompts and 3 answers are the same" in printed


def test_a_route_that_differs_is_shown_at_its_first_difference(
    served: tuple[str, Server], work: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    other = tmp_path / "other"
    shutil.copytree(merged, other)
    for path in (other / "chat_template.jinja", other / "tokenizer_config.json"):
        if path.exists():
            path.write_text(path.read_text("utf-8").replace("<|im_start|>assistant", "<|im_start|>model"), "utf-8")
    checks = verify_run("runs/train", merged=other, urls=[served[0]], rows=2)
    first, same = checks[0].first, checks[0].same_prompts
    assert (checks[0].route, same) == ("merged", 0) and first is not None and first.what == "prompt"
    assert "differs at token" in first.describe()


def test_the_wordings_of_the_rows_are_kept_with_their_tasks(work: Path) -> None:
    run = RunInUse.of(open_run(work / "runs" / "train"))
    (wording,) = next(task for task in run.tasks if task.name == "labels").phrasings
    assert wording.ask(TEXT)[-1].text == f"Instruction: 回答。\nInput: 在哪一边？\n\n{TEXT}\nAnswer: "
    assert wording.find_text(wording.ask(TEXT)) == TEXT
