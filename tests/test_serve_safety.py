"""Who is let in, how much may be sent, and that clients who dawdle, leave or are too many harm nobody else."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from command_line import run_cli
from served_models import serving
from weitiao.serve import listening
from weitiao.serve.guard import Bounds
from weitiao.serve.keys import ENVIRONMENT, Keys, add_key, read_keys
from weitiao.serve.limits import Limits
from weitiao.serve.server import Server

HELLO = {"model": "train", "messages": [{"role": "user", "content": "你好"}], "response_format": {"type": "text"}}
BOUNDS = Bounds(max_body_bytes=20_000, body_seconds=1.0)


@pytest.fixture(scope="module")
def key_and_keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Keys]:
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    key = add_key(file, "alice")
    assert key not in file.read_text() and file.stat().st_mode & 0o077 == 0
    return key, read_keys(file, {})


@pytest.fixture(scope="module")
def guarded(tuned_run: Path, key_and_keys: tuple[str, Keys]) -> Iterator[tuple[str, Server, str]]:
    key, keys = key_and_keys
    with serving(tuned_run, keys=keys, bounds=BOUNDS, limits=Limits(max_rows=2, max_queue=3)) as (url, server):
        yield url, server, key


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("headers", [{}, bearer("wrong"), {"Authorization": "Bearer"}, {"Authorization": "Basic eDp5"}])
def test_without_its_key_nothing_reaches_the_model(guarded: tuple[str, Server, str], headers: dict[str, str]) -> None:
    url, server, _ = guarded
    before = server.worker.stats().accepted
    for method, route in [
        ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/tasks/objects"),
        ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("POST", "/v1/feedback"),
    ]:  # fmt: skip
        reply = httpx.request(method, url + route, headers=headers, json=HELLO if method == "POST" else None)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    assert server.worker.stats().accepted == before


def test_with_its_key_it_does_and_health_needs_none(guarded: tuple[str, Server, str]) -> None:
    url, _, key = guarded
    reply = httpx.post(f"{url}/v1/chat/completions", headers=bearer(key), json={**HELLO, "max_tokens": 2}, timeout=60)
    assert reply.status_code == 200
    for route in ("/", "/health", "/ready", "/page/page.js"):
        assert httpx.get(url + route).status_code == 200


def test_keys_come_from_a_file_of_hashes_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    shown = run_cli("serve", "--new-key", "bob", "--keys", file)
    key = shown.stdout.strip()
    assert read_keys(file, {}).owner(key) == "bob" and read_keys(file, {}).owner(key + "x") is None
    assert read_keys(None, {ENVIRONMENT: "secret"}).owner("secret") == ENVIRONMENT
    again = run_cli("serve", "--new-key", "bob", "--keys", file)
    assert again.exit_code == 2 and "has a key for bob already" in again.stderr
    file.write_text("bob hunter2\n")
    broken = run_cli("serve", "nowhere", "--keys", file)
    assert broken.exit_code == 2 and f"{file}:1" in broken.stderr and "hunter2" not in broken.stderr


def test_bodies_too_long_are_refused_however_they_are_announced(guarded: tuple[str, Server, str]) -> None:
    url, _, key = guarded
    long = json.dumps({**HELLO, "user": "x" * 30_000}).encode()
    headers = {**bearer(key), "Content-Type": "application/json"}
    assert httpx.post(f"{url}/v1/chat/completions", headers=headers, content=long).status_code == 413

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(long), 5_000):
            yield long[start : start + 5_000]

    assert httpx.post(f"{url}/v1/chat/completions", headers=headers, content=pieces()).status_code == 413


def address_of(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


def test_a_body_that_never_comes_is_not_waited_for(guarded: tuple[str, Server, str]) -> None:
    url, _, key = guarded
    with socket.create_connection(address_of(url), timeout=20) as half_open:
        half_open.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode()
        )
        assert b" 408 " in half_open.recv(4096)


def test_a_head_that_never_comes_is_not_waited_for(
    guarded: tuple[str, Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "HEADER_SECONDS", 0.5)
    with socket.create_connection(address_of(guarded[0]), timeout=20) as silent:
        assert silent.recv(10) == b""
    with socket.create_connection(address_of(guarded[0]), timeout=20) as slow:
        slow.sendall(b"GET /health HT")
        assert slow.recv(10) == b""


def test_a_client_that_leaves_frees_its_row(guarded: tuple[str, Server, str]) -> None:
    url, server, key = guarded
    cancelled = server.worker.stats().cancelled
    body = {**HELLO, "max_tokens": 400, "logit_bias": {"5": 100}, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", headers=bearer(key), json=body, timeout=60) as reply:
        next(reply.iter_lines())
    body["stream"] = False
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", headers=bearer(key), json=body, timeout=httpx.Timeout(60, read=0.2))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and server.worker.stats().running + server.worker.stats().queued:
        time.sleep(0.05)
    stats = server.worker.stats()
    assert (stats.running, stats.queued) == (0, 0) and stats.cancelled >= cancelled + 1


def test_more_than_the_queue_holds_are_told_when_to_come_again(guarded: tuple[str, Server, str]) -> None:
    url, _, key = guarded
    body = {**HELLO, "max_tokens": 300, "logit_bias": {"5": 100}}
    statuses: list[int] = []

    def ask() -> None:
        reply = httpx.post(f"{url}/v1/chat/completions", headers=bearer(key), json=body, timeout=120)
        if reply.status_code == 429:
            assert int(reply.headers["Retry-After"]) >= 1
            assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        statuses.append(reply.status_code)

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429} and len(statuses) == 20


def test_prompts_of_one_request_are_taken_all_or_none(guarded: tuple[str, Server, str]) -> None:
    url, server, key = guarded
    accepted = server.worker.stats().accepted
    body = {"model": "train", "prompt": ["你"] * 4, "max_tokens": 2}  # the queue has three places
    reply = httpx.post(f"{url}/v1/completions", headers=bearer(key), json=body, timeout=60)
    assert reply.status_code == 400 and "3 requests can wait here" in reply.json()["error"]["message"]
    assert server.worker.stats().accepted == accepted
    body["prompt"] = ["你"] * 3
    assert httpx.post(f"{url}/v1/completions", headers=bearer(key), json=body, timeout=60).status_code == 200
    assert server.worker.stats().accepted == accepted + 3


def test_other_pages_may_not_ask_unless_named(tuned_run: Path, guarded: tuple[str, Server, str]) -> None:
    url = guarded[0]
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{url}/v1/chat/completions", headers=asked)
    assert "access-control-allow-origin" not in preflight.headers
    with serving(tuned_run, origins=["https://good.example"], hosts=["127.0.0.1"]) as (open_url, _server):
        named = {**asked, "Origin": "https://good.example"}
        preflight = httpx.options(f"{open_url}/v1/chat/completions", headers=named)
        assert preflight.headers["access-control-allow-origin"] == "https://good.example"
        refused = httpx.options(f"{open_url}/v1/chat/completions", headers=asked)
        assert "access-control-allow-origin" not in refused.headers
        rebound = httpx.get(f"{open_url}/v1/models", headers={"Host": "attacker.example"})
        assert rebound.status_code == 400


def test_what_is_said_is_not_logged(
    guarded: tuple[str, Server, str], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    url, _, key = guarded
    body = {**HELLO, "messages": [{"role": "user", "content": "我的密码是六六六"}], "max_tokens": 2}
    with caplog.at_level(logging.DEBUG):
        httpx.post(f"{url}/v1/chat/completions", headers=bearer(key), json=body, timeout=60)
        httpx.post(f"{url}/v1/chat/completions", headers=bearer(key), json={**body, "n": "我的密码"}, timeout=60)
    told = [record.getMessage() for record in caplog.records if record.name.startswith(("weitiao", "uvicorn"))]
    assert any("/v1/chat/completions 200" in line for line in told)
    written = "".join([*told, *capfd.readouterr()])
    assert "密码" not in written and key not in written


def test_the_end_lets_requests_finish_and_then_tells_why(tuned_run: Path) -> None:
    body = {**HELLO, "max_tokens": 480, "logit_bias": {"5": 100}, "stream": True}
    with serving(tuned_run, drain=0.0) as (url, server):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.worker.close()
            rest = [line.removeprefix("data: ") for line in lines if line]
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["error"]["code"] == "shutting_down"
        assert httpx.get(f"{url}/ready").status_code == 503
        late = httpx.post(f"{url}/v1/chat/completions", json=HELLO)
        assert late.status_code == 503 and late.headers["Retry-After"]
