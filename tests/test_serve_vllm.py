"""The server before vLLM: the same answers as computed here, over HTTP, from a stub that speaks vLLM's protocol."""

from __future__ import annotations

import ast
import configparser
import contextlib
import json
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from llguidance import LLMatcher, LLTokenizer

import vllm_stub
from command_line import refuse
from served_models import serving
from test_docs import commands
from weitiao.errors import ModelError, RunError
from weitiao.models.shell import open_shell
from weitiao.serve.vllm_options import VllmOptions
from weitiao.serve.vllm_process import launch_command, require_lora
from weitiao.serve.vllm_wire import grammar_behind
from weitiao.serving import open_server

ASKED = "谁搬到了哪里？\n\n去年王安搬到了上海。"


@pytest.fixture(scope="module")
def stub(tuned_run: Path) -> Iterator[tuple[vllm_stub.Stub, str]]:
    made = vllm_stub.Stub(tuned_run, name="demo")
    with vllm_stub.running(made) as url:
        yield made, url


@pytest.fixture(scope="module")
def sides(tuned_run: Path, stub: tuple[vllm_stub.Stub, str]) -> Iterator[tuple[str, str]]:
    """The addresses of a server that computes itself, and of one before the stub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", vllm_stub.KEY)
        options = VllmOptions(url=stub[1])
        with serving(f"demo={tuned_run}") as (own, _), serving(f"demo={tuned_run}", vllm=options) as (far, _):
            yield own, far


@pytest.fixture(autouse=True)
def _healed(stub: tuple[vllm_stub.Stub, str]) -> Iterator[None]:
    yield
    stub[0].fail_with, stub[0].forms, stub[0].well, stub[0].pause_s = None, True, True, 0.0


def ask(url: str, **fields: Any) -> httpx.Response:
    body = {"model": "demo", "messages": [{"role": "user", "content": ASKED}], **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def choices(url: str, **fields: Any) -> Any:
    reply = ask(url, **fields)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


FREE: dict[str, Any] = {"response_format": {"type": "text"}, "max_tokens": 12}


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["b", "c"]}}, "required": ["a"], "additionalProperties": False}
FIELDS: dict[str, dict[str, Any]] = {
    "usual": {},
    "free": FREE,
    "logprobs": {**FREE, "logprobs": True, "top_logprobs": 3},
    "penalties": {**FREE, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    "bias": {**FREE, "logit_bias": {"5": 100}},
    "stop": {**FREE, "stop": "a"},
    "cut inside the form": {"response_format": {"type": "json_object"}, "max_tokens": 4},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_answers_are_those_of_our_own_worker(sides: tuple[str, str], fields: dict[str, Any]) -> None:
    own, far = sides
    assert choices(far, temperature=0, **fields) == choices(own, temperature=0, **fields)


def test_an_answer_cut_inside_its_form_is_refused(sides: tuple[str, str]) -> None:
    (one,) = choices(sides[1], **FIELDS["cut inside the form"])
    assert one["message"]["content"] is None and one["finish_reason"] == "length"
    assert one["message"]["refusal"].startswith("The limit of 4 tokens was reached inside the answer: it cannot end")


def test_typed_answers_and_their_confidence_are_the_same(sides: tuple[str, str]) -> None:
    told = httpx.get(f"{sides[0]}/v1/tasks").json()["data"]
    assert told
    for task in told:
        name = task.get("name") or task["id"]
        found = [httpx.post(f"{url}/v1/tasks/{name}", json={"text": "去年钱方搬到了北京。"}).json() for url in sides]
        for one in found:
            for changing in ("id", "created", "latency_ms"):
                del one[changing]
            del one["usage"]["prompt_tokens_details"]  # what is cached where is each side's own
        assert found[0] == found[1] and "confidence" in found[0]


def test_streams_tell_the_same_text_piece_by_piece(sides: tuple[str, str]) -> None:
    texts = []
    for url in sides:
        body = {"model": "demo", "messages": [{"role": "user", "content": ASKED}], "stream": True, **FREE}
        lines = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).text.split("\n\n")
        assert lines[-2] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        texts.append([event["choices"][0]["delta"].get("content") for event in events])
    assert texts[0] == texts[1] and len(texts[0]) > 3


def test_several_choices_are_drawn_with_seeds_of_their_own(
    sides: tuple[str, str], stub: tuple[vllm_stub.Stub, str]
) -> None:
    del stub[0].bodies[:]
    drawn = [
        [one["message"]["content"] for one in choices(sides[1], n=3, seed=7, temperature=1.0, **FREE)] for _ in "ab"
    ]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3
    assert len({body["seed"] for body in stub[0].bodies}) == 3


def test_plain_completions_go_to_vllm_too(sides: tuple[str, str]) -> None:
    body = {"model": "demo", "prompt": "去年", "max_tokens": 6, "logprobs": 2, "temperature": 0}
    own, far = (httpx.post(f"{url}/v1/completions", json=body).json() for url in sides)
    assert own["choices"] == far["choices"]
    assert own["usage"]["completion_tokens"] == far["usage"]["completion_tokens"]


def test_vllm_gets_our_tokens_and_nothing_is_left_to_its_defaults(
    sides: tuple[str, str], stub: tuple[vllm_stub.Stub, str]
) -> None:
    asked = {"model": "demo", "messages": [{"role": "user", "content": ASKED}]}
    tokens = httpx.post(f"{sides[0]}/tokenize", json=asked).json()["tokens"]
    choices(sides[1], temperature=0.5, top_p=0.9, top_k=5, seed=1)
    body = stub[0].bodies[-1]
    assert body["prompt"] == tokens and body["model"] == "demo"
    assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) == (0.5, 0.9, 5, 1.0)
    assert body["ignore_eos"] and set(stub[0].opened.renderer.stop_ids) <= set(body["stop_token_ids"])


def test_a_client_that_goes_away_ends_the_request_at_vllm(
    sides: tuple[str, str], stub: tuple[vllm_stub.Stub, str]
) -> None:
    before, stub[0].pause_s = stub[0].num_gone, 0.05
    letter = stub[0].opened.tokenizer("a", add_special_tokens=False)["input_ids"][0]
    fields = {"response_format": {"type": "text"}, "max_tokens": 300, "logit_bias": {letter: 100}, "stream": True}
    body = {"model": "demo", "messages": [{"role": "user", "content": ASKED}], **fields}
    with httpx.stream("POST", f"{sides[1]}/v1/chat/completions", json=body) as reply:
        next(line for line in reply.iter_lines() if '"content":"' in line and '"content":""' not in line)
    wait_until(lambda: stub[0].num_gone == before + 1)
    wait_until(lambda: stub[0].worker.stats().running == 0)


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to hold")


@pytest.mark.parametrize(
    ("status", "told", "said"),
    [
        (500, 500, "vLLM failed at this request (500): the stub was told to fail"),
        (400, 400, "vLLM cannot run this request: the stub was told to fail"),
        (429, 429, "vLLM takes no more requests for the moment: the stub was told to fail"),
        (401, 500, "vLLM asks for another API key. Set VLLM_API_KEY to the one it was started with."),
    ],
)
def test_errors_of_vllm_are_told_as_ours(
    sides: tuple[str, str], stub: tuple[vllm_stub.Stub, str], status: int, told: int, said: str
) -> None:
    stub[0].fail_with = status
    reply = ask(sides[1])
    assert (reply.status_code, reply.json()["error"]["message"]) == (told, said)
    assert ("retry-after" in reply.headers) == (told == 429)


def test_an_answer_that_leaves_its_form_is_no_answer(sides: tuple[str, str], stub: tuple[vllm_stub.Stub, str]) -> None:
    stub[0].forms = False
    reply = ask(sides[1], **FIELDS["schema"])
    assert reply.status_code == 500
    assert "vLLM's answer is not in its form" in reply.json()["error"]["message"]


def test_a_server_that_is_gone_is_told_of(tuned_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", vllm_stub.KEY)
    monkeypatch.setattr("weitiao.serve.vllm_worker._LOOK_S", 0.1)
    other = vllm_stub.Stub(tuned_run, name="demo")
    with contextlib.ExitStack() as far:
        url = far.enter_context(vllm_stub.running(other))
        with serving(f"demo={tuned_run}", vllm=VllmOptions(url=url)) as (address, _):
            far.close()
            reply = ask(address)
            assert reply.status_code == 500
            assert reply.json()["error"]["message"] == f"The vLLM server at {url} cannot be reached. Is it running?"
            wait_until(lambda: httpx.get(f"{address}/health").status_code == 503)
            assert httpx.get(f"{address}/ready").status_code == 503


def test_what_cannot_be_served_is_said(
    tuned_run: Path, stub: tuple[vllm_stub.Stub, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = VllmOptions(url=stub[1])
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(RunError, match="Set VLLM_API_KEY"):
        open_server([f"demo={tuned_run}"], vllm=options)
    monkeypatch.setenv("VLLM_API_KEY", vllm_stub.KEY)
    with pytest.raises(RunError, match="serves weitiao-base, demo, not other"):
        open_server([f"other={tuned_run}"], vllm=options)
    with pytest.raises(RunError, match="no vLLM server that is well"):
        open_server([f"demo={tuned_run}"], vllm=VllmOptions(url="http://127.0.0.1:9"))
    with pytest.raises(RunError, match="is no address"):
        VllmOptions(url="127.0.0.1:8001")
    with pytest.raises(RunError, match="runs already"):
        VllmOptions(url=stub[1], arguments="--tensor-parallel-size 2")


def test_a_vllm_that_is_started_serves_the_run_and_ends_with_the_server(
    tuned_run: Path, stub: tuple[vllm_stub.Stub, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_stub.make_executable(tmp_path, stub_url=stub[1])
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    told: list[str] = []
    options = VllmOptions(arguments="--tensor-parallel-size 2", say=told.append)
    with serving(f"demo={tuned_run}", vllm=options) as (address, _):
        assert choices(address, **FIELDS["schema"])[0]["message"]["content"].startswith('{"a"')
        pid = int((tmp_path / "pid").read_text())
        assert vllm_stub.is_running(pid)
    assert not vllm_stub.is_running(pid)
    given = json.loads((tmp_path / "arguments.json").read_text())
    assert given[0] == "serve" and given[-2:] == ["--tensor-parallel-size", "2"]
    assert given[given.index("--lora-modules") + 1] == f"demo={tuned_run / 'adapter'}"
    assert given[given.index("--structured-outputs-config.backend") + 1] == "guidance"
    assert told[0].startswith("vLLM is starting; its log: ") and told[-1].startswith("vLLM is ready")


def test_a_merged_model_is_served_under_the_name_of_its_run(
    tuned_run: Path,
    tiny_qwen2_folder: Path,
    stub: tuple[vllm_stub.Stub, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm_stub.make_executable(tmp_path, stub_url=stub[1])
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    server = open_server([f"demo={tuned_run}"], vllm=VllmOptions(model=tiny_qwen2_folder))
    server.worker.close()
    given = json.loads((tmp_path / "arguments.json").read_text())
    assert given[1] == str(tiny_qwen2_folder) and given[given.index("--served-model-name") + 1] == "demo"
    assert "--enable-lora" not in given
    assert not vllm_stub.is_running(int((tmp_path / "pid").read_text()))


def test_options_of_vllm_want_its_engine(tuned_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "are for --engine vllm" in refuse("serve", tuned_run, "--vllm-url", "http://127.0.0.1:9")
    assert "the command vllm is not found" in refuse("serve", tuned_run, "--engine", "vllm")


def test_a_vllm_that_does_not_start_is_told_with_its_last_words(
    tuned_run: Path, stub: tuple[vllm_stub.Stub, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="the command vllm is not found"):
        open_server([f"demo={tuned_run}"], vllm=VllmOptions())
    vllm_stub.make_executable(tmp_path, stub_url=stub[1])
    with pytest.raises(RunError, match=r"ended with code 1 before it was ready.*CUDA is not to be had"):
        open_server([f"demo={tuned_run}"], vllm=VllmOptions(arguments="--broken"))


def test_adapters_that_vllm_cannot_compute_are_to_be_merged(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 20, "use_dora": false}')
    assert require_lora(tmp_path, name="demo") == 20
    command = launch_command(tmp_path, name="base", adapters={"demo": tmp_path}, dtype="bfloat16", port=1)
    assert command[command.index("--max-lora-rank") + 1] == "32"
    for config in ('{"peft_type": "IA3"}', '{"peft_type": "LORA", "r": 8, "use_dora": true}'):
        (tmp_path / "adapter_config.json").write_text(config)
        with pytest.raises(RunError, match="Merge it"):
            require_lora(tmp_path, name="demo")


def test_a_model_without_weights_speaks_as_the_model_does(tiny_qwen2_folder: Path, tmp_path: Path) -> None:
    shell = open_shell(str(tiny_qwen2_folder))
    assert {parameter.device.type for parameter in shell.model.parameters()} == {"meta"}
    assert shell.renderer.stop_ids
    original = tmp_path / "chatglm"
    shutil.copytree(tiny_qwen2_folder, original)
    (original / "config.json").write_text(
        '{"model_type": "chatglm", "position_encoding_2d": true, "architectures": ["ChatGLMModel"]}'
    )
    with pytest.raises(ModelError, match="Serve it without --engine vllm"):
        open_shell(str(original))


def test_a_form_behind_a_blank_is_one_grammar() -> None:
    both = grammar_behind(" ", 'start: answer\nanswer: "ja" | "nein"')
    tokenizer = LLTokenizer("byte")
    whole = [LLMatcher(tokenizer, LLMatcher.grammar_from_lark(both)) for _ in range(3)]
    fits = [
        one.try_consume_tokens(list(text.encode())) == len(text) for one, text in zip(whole, (" ja", " nein", "ja"))
    ]
    assert fits == [True, True, False]


def test_files_on_the_deployment_page_are_whole() -> None:
    page = (Path(__file__).parent.parent / "docs" / "deployment.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    blocks = {kind: [body for its, body in found if its == kind] for kind, _ in found}
    ray, compose = (yaml.safe_load(block) for block in blocks["yaml"])
    (python,) = blocks["python"]
    compile(python, "ray_serve.py", "exec")
    (config,) = ray["applications"][0]["args"]["llm_configs"]
    call = next(node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call) and node.keywords)
    shown = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    assert shown == config, "the YAML and the Python say the same"
    assert set(compose["services"]) == {"vllm", "weitiao"}
    unit = configparser.ConfigParser(delimiters="=")
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(blocks["ini"][0])
    lines = [unit["Service"]["ExecStart"], compose["services"]["weitiao"]["command"]]
    for line in lines:
        _, verb, *arguments = shlex.split(line)
        commands()[verb].make_context(verb, arguments)
