"""Throughput and latency of served models under load: weitiao, one request at a time, and `transformers serve`.

    python benchmarks/serve_load.py runs/demo examples/starter/heldout.jsonl [--requests 64] [--clients 1,8,32]

All sides serve the same model on this machine, one after the other in one run, each in a process of its own. They are
asked the same rows in the same order by so many clients at a time, each of which sends its next request when the last
one is answered. Greedy, at most --tokens tokens, streamed where the side can stream.

    weitiao              the run as it is served, answers held to their forms; these are compared with evaluation's
    weitiao, free        the same without a form, as the other sides write
    one at a time        the exported model behind a lock and `generate`, the way of ChatGLM3's demo server
    transformers serve   the exported model

Exits with 1 where an answer differs from evaluation's, or where 32 clients are not served 4 times as fast as one at a
time, or not as fast as by `transformers serve`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from machine import describe_machine

WANTED_RATIO, WANTED_PEER_RATIO = 4.0, 1.0


@dataclass(kw_only=True)
class Load:
    """What so many clients saw of one side."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    answers: dict[int, str] = field(default_factory=dict)
    characters: int = 0

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.latencies) / self.seconds

    def describe(self) -> str:
        """One line of the table."""
        rates = f"{self.rate:7.2f} requests/s {self.characters / self.seconds:8.1f} characters/s"
        times = [at(values, share) for values in (self.latencies, self.firsts) for share in (0.5, 0.95)]
        return f"{rates}  " + " ".join(f"{seconds:6.2f}" for seconds in times)


def at(values: Sequence[float], share: float) -> float:
    """The quantile of `values`."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def ask_all(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> Load:
    """Ask `bodies` by so many clients at a time."""
    load, lock, waiting = Load(), threading.Lock(), iter(enumerate(bodies))

    def run() -> None:
        with httpx.Client(base_url=url, timeout=1200) as client:
            while True:
                with lock:
                    number, body = next(waiting, (-1, {}))
                if number < 0:
                    return
                started = time.perf_counter()
                text, first = read_reply(client, body)
                ended = time.perf_counter()
                with lock:
                    load.latencies.append(ended - started)
                    load.firsts.append((first or ended) - started)
                    load.answers[number] = text
                    load.characters += len(text)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = time.perf_counter() - started
    assert len(load.answers) == len(bodies), "a client failed"
    return load


def read_reply(client: httpx.Client, body: dict[str, Any]) -> tuple[str, float | None]:
    """The text of a reply and when its first piece came."""
    if not body["stream"]:
        reply = client.post("/v1/chat/completions", json=body)
        reply.raise_for_status()
        return str(reply.json()["choices"][0]["message"]["content"] or ""), None
    text, first = "", None
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            for choice in json.loads(line[6:]).get("choices", ()):
                piece = choice["delta"].get("content") or ""
                first = first or (time.perf_counter() if piece else None)
                text += piece
    return text, first


@contextmanager
def running(command: Sequence[str], port: int) -> Iterator[str]:
    """A server process; its address."""
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(list(command), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            if process.poll() is not None:
                assert process.stderr is not None
                raise SystemExit(f"{command} ended: {process.stderr.read()[-2000:]}")
            try:
                if httpx.get(f"{url}/health").status_code < 500:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        threading.Thread(target=lambda: process.stderr.read() if process.stderr else "", daemon=True).start()
        yield url
    finally:
        process.terminate()
        process.wait(60)


def serve_one_at_a_time(folder: str, port: int) -> None:
    """The way of the servers it stands for: `generate` under a lock, whole replies."""
    import torch
    import uvicorn
    from fastapi import FastAPI, Request
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from weitiao.models.opening import native_dtype

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, native_dtype())).eval()
    app, lock = FastAPI(), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {}

    @app.post("/v1/chat/completions")
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        with lock, torch.inference_mode():
            messages = body["messages"]
            if tokenizer.chat_template:
                ids = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            else:
                ids = tokenizer(messages[-1]["content"], return_tensors="pt")
            out = model.generate(**ids, max_new_tokens=body["max_tokens"], do_sample=False)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        return {"choices": [{"message": {"content": text}}]}

    assert Request  # the route's own type is plain
    uvicorn.run(app, port=port, log_level="error")


def main() -> int:
    """Run the sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--one-at-a-time", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one_at_a_time:
        serve_one_at_a_time(given.run, given.port)
        return 0

    from weitiao.apply import RunInUse, open_run
    from weitiao.data.reading import read_like
    from weitiao.verify import chat_of

    print(describe_machine())
    run = RunInUse.of(open_run(given.run))
    records = read_like(run.contract.reading, given.data, require_target=False)
    records = [records[number % len(records)] for number in range(given.requests)]
    distinct = {record.source: record for record in records}
    tasks = run.assign(list(distinct.values()))
    replies = {reply.index: reply.text for reply in run.answerer().answer(list(distinct.values()), tasks)}
    expected = dict(zip(distinct, (replies[place] for place in range(len(distinct))), strict=True))
    free = {"temperature": 0, "max_tokens": given.tokens}
    chats = [chat_of("demo", record) for record in records]
    del run
    python = sys.executable
    counts = [int(count) for count in given.clients.split(",")]
    print(f"{given.requests} requests; latency p50 p95, first piece p50 p95 in seconds")
    with tempfile.TemporaryDirectory() as temporary:
        merged = str(Path(temporary) / "demo")
        subprocess.run([python, "-m", "weitiao", "export", given.run, merged], check=True, capture_output=True)
        template = Path(merged) / "chat_template.jinja"
        if not template.exists():  # `transformers serve` asks nothing of models without one: the text as it is, then
            template.write_text("{{ bos_token }}{{ messages[-1]['content'] }}", encoding="utf-8")
        ours = [python, "-m", "weitiao", "serve", f"demo={given.run}", "--port", str(given.port)]
        naive = [python, __file__, merged, "-", "--one-at-a-time", "--port", str(given.port)]
        peer = [
            python,
            "-m",
            "transformers.cli.transformers",
            "serve",
            merged,
            "--port",
            str(given.port),
            "--device",
            "cpu",
        ]
        text = {"response_format": {"type": "text"}}
        sides = {
            "weitiao": (ours, [{**chat, "stream": True} for chat in chats]),
            "weitiao, free": (ours, [{**chat, **free, **text, "stream": True} for chat in chats]),
            "one at a time": (naive, [{**chat, **free, "stream": False} for chat in chats]),
            "transformers serve": (peer, [{**chat, **free, "model": merged, "stream": True} for chat in chats]),
        }
        seen: dict[tuple[str, int], Load] = {}
        for side, (command, bodies) in sides.items():
            with running(command, given.port) as url:
                ask_all(url, bodies[:2], 1)  # the first requests make kernels and load what is loaded late
                for count in counts:
                    seen[side, count] = load = ask_all(url, bodies, count)
                    print(f"{side:20} {count:3} clients {load.describe()}", flush=True)
    most = max(counts)
    wrong = [
        (count, record.source)
        for count in counts
        for number, record in enumerate(records)
        if seen["weitiao", count].answers[number] != expected[record.source]
    ]
    ratio = seen["weitiao, free", most].rate / seen["one at a time", most].rate
    peer_ratio = seen["weitiao, free", most].rate / seen["transformers serve", most].rate
    print(f"{len(wrong)} of {len(records) * len(counts)} answers differ from evaluation's: {wrong[:5]}")
    print(
        f"{most} clients: {ratio:.1f} x one at a time (wanted {WANTED_RATIO:g}), {peer_ratio:.1f} x transformers serve"
    )
    return int(bool(wrong) or ratio < WANTED_RATIO or peer_ratio < WANTED_PEER_RATIO)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
