"""The whole API fuzzed from its own description, and ten minutes of everything that can go wrong at once."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings

from served_models import serving
from weitiao.serve.guard import Bounds
from weitiao.serve.limits import Limits
from weitiao.serve.server import Server

pytestmark = pytest.mark.slow

MINUTES = float(os.environ.get("WEITIAO_LOAD_MINUTES", "10"))
CLIENTS = 40
TEXTS = ("你好", "去年王安搬到了北京。", "x" * 60, "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"))


@pytest.fixture(scope="module")
def served(tuned_run: Path) -> Iterator[tuple[str, Server]]:
    bounds = Bounds(max_body_bytes=50_000, body_seconds=2.0)
    with serving(tuned_run, bounds=bounds, limits=Limits(max_rows=4, max_queue=8)) as address_and_server:
        yield address_and_server


def test_nothing_that_the_description_allows_breaks_the_server(served: tuple[str, Server]) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
    from schemathesis.checks import not_a_server_error

    schema = schemathesis.openapi.from_url(f"{served[0]}/openapi.json")
    tried = Counter[int]()
    for operation in schema.get_all_operations():
        found = operation.ok()

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=found.as_strategy())
        def try_it(case: Any) -> None:
            response = case.call(timeout=60)
            tried[response.status_code] += 1
            case.validate_response(response, checks=[not_a_server_error])

        try_it()
    assert sum(tried.values()) > 300 and not [status for status in tried if status >= 500], tried
    assert served[1].worker.alive and served[1].worker.stats().errors == 0


class _Clients:
    """Clients that behave well and badly, by chance."""

    def __init__(self, url: str, until: float) -> None:
        self.url, self.until = url, until
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []

    def run(self, seed: int) -> None:
        draw = random.Random(seed)
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while time.monotonic() < self.until:
                kind = draw.choice(_KINDS)
                try:
                    getattr(self, f"_{kind}")(client, draw)
                except (httpx.HTTPError, OSError) as error:
                    if kind not in ("leave", "half_open"):
                        self.wrong.append(f"{kind}: {error!r}")

    def _count(self, reply: httpx.Response, *allowed: int) -> None:
        self.statuses[reply.status_code] += 1
        if reply.status_code not in allowed:
            self.wrong.append(f"{reply.status_code}: {reply.text[:200]}")

    def _chat(self, client: httpx.Client, draw: random.Random) -> None:
        reply = client.post("/v1/chat/completions", json=_body(draw))
        self._count(reply, 200, 429)

    def _stream(self, client: httpx.Client, draw: random.Random) -> None:
        with client.stream("POST", "/v1/chat/completions", json={**_body(draw), "stream": True}) as reply:
            reply.read()
            self._count(reply, 200, 429)
            if reply.status_code == 200 and not reply.text.endswith("data: [DONE]\n\n"):
                self.wrong.append(f"a stream without its end: {reply.text[-100:]!r}")

    def _task(self, client: httpx.Client, draw: random.Random) -> None:
        route = f"/v1/tasks/{draw.choice(['objects', 'labels'])}"
        self._count(client.post(route, json={"text": draw.choice(TEXTS)}), 200, 400, 429)

    def _leave(self, client: httpx.Client, draw: random.Random) -> None:
        body = {**_body(draw), "stream": True, "max_tokens": 300}
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            for number, _ in enumerate(reply.iter_lines()):
                if number > draw.randrange(6):
                    break

    def _half_open(self, client: httpx.Client, draw: random.Random) -> None:
        host, _, port = self.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n{")
            if draw.random() < 0.5:
                connection.recv(100)

    def _malformed(self, client: httpx.Client, draw: random.Random) -> None:
        content = draw.choice([b"", b"{", b"[]", b"null", b'{"model": NaN}', b"\xff\xfe", os.urandom(64), b"[" * 5000])
        reply = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
        self._count(reply, 400)

    def _too_long(self, client: httpx.Client, draw: random.Random) -> None:
        reply = client.post("/v1/chat/completions", json={**_body(draw), "user": "长" * draw.choice([600, 40_000])})
        self._count(reply, 200, 413, 429)
        prompt = {**_body(draw), "messages": [{"role": "user", "content": "长" * 3000}]}
        self._count(client.post("/v1/chat/completions", json=prompt), 400)

    def _bad_schema(self, client: httpx.Client, draw: random.Random) -> None:
        schema = draw.choice(
            [{"type": "x"}, {"not": {}}, {"$ref": "#"}, {"pattern": "("}, {"type": "array", "minItems": -1}]
        )
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        self._count(client.post("/v1/chat/completions", json={**_body(draw), "response_format": form}), 400)

    def _figures(self, client: httpx.Client, draw: random.Random) -> None:
        self._count(
            client.get(draw.choice(["/metrics", "/v1/statistics", "/health", "/ready", "/v1/models", "/"])), 200
        )


_KINDS = (
    "chat",
    "chat",
    "stream",
    "stream",
    "task",
    "leave",
    "half_open",
    "malformed",
    "too_long",
    "bad_schema",
    "figures",
)


def _body(draw: random.Random) -> dict[str, Any]:
    return {
        "model": "train",
        "messages": [{"role": "user", "content": draw.choice(TEXTS)}],
        "response_format": {"type": "text"},
        "max_tokens": draw.randrange(1, 40),
        "temperature": draw.choice([0, 1, 2]),
        "n": draw.choice([1, 1, 1, 3]),
        "stop": draw.choice([None, ["。", "a"]]),
    }


def test_ten_minutes_of_mixed_load_leave_the_server_as_it_was(served: tuple[str, Server]) -> None:
    url, server = served
    own = psutil.Process()
    clients = _Clients(url, time.monotonic() + 60 * MINUTES)
    threads = [threading.Thread(target=clients.run, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        memory.append(own.memory_info().rss)
    assert not clients.wrong, (len(clients.wrong), clients.wrong[:10])
    assert clients.statuses[200] > 50 and clients.statuses[429] > 0
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (server.worker.stats().running or server.worker.stats().queued):
        time.sleep(0.1)
    stats = server.worker.stats()
    assert stats.alive and stats.errors == 0 and (stats.running, stats.queued) == (0, 0)
    assert stats.accepted == stats.finished + stats.cancelled + stats.failed
    third = len(memory) // 3
    early, late = max(memory[third : 2 * third]), max(memory[2 * third :])
    assert late < 1.1 * early, f"{early >> 20} MB, then {late >> 20} MB"
    assert httpx.get(f"{url}/ready").status_code == 200
