"""A server that answers as vLLM does where weitiao asks it, with a real tiny model behind it; and a `vllm` to launch.

It takes vLLM's names of `/v1/completions` and no others, computes with our own worker, and sends events in vLLM's
shapes (`vllm/entrypoints/openai/completion/protocol.py`): token ids, log-probabilities by ``token_id:N``, the stop
token among them, usage in the last event.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from weitiao.contract import Contract
from weitiao.generate.constraint import compiler_of
from weitiao.generate.sampling import Choice, Sampling, Steering
from weitiao.models.adapter_set import AdapterSet
from weitiao.models.opening import open_model
from weitiao.runs import RunFolder
from weitiao.serve.listening import socket_for
from weitiao.serve.requests import Piece, Request
from weitiao.serve.worker import Worker

KEY = "stub-key"
_KNOWN = {
    "model", "prompt", "max_tokens", "n", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop_token_ids", "ignore_eos",
    "skip_special_tokens", "logprobs", "return_tokens_as_token_ids", "return_token_ids", "logit_bias",
    "structured_outputs",
}  # fmt: skip


class Stub:
    """The server's state: what it was asked, and how it is to fail."""

    def __init__(self, run: Path, *, name: str) -> None:
        folder = RunFolder.open(run)
        contract = Contract.read(folder.contract)
        self.opened = open_model(contract.base, dtype=contract.dtype)
        self.worker = Worker(AdapterSet(self.opened.model, {name: folder.adapter}))  # type: ignore[arg-type]
        self.name = name
        self.bodies: list[dict[str, Any]] = []
        self.fail_with: int | None = None
        self.well = True
        self.pause_s = 0.0
        """After every event."""
        self.num_gone = 0
        """Clients that went away in the middle."""
        self.forms = True
        """Whether structured outputs are kept."""

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/health")
        async def health() -> Response:
            return Response(status_code=200 if self.well else 503)

        @app.get("/v1/models")
        async def models(http: HttpRequest) -> Response:
            if http.headers.get("authorization") != f"Bearer {KEY}":
                return JSONResponse({"error": "Unauthorized"}, status_code=401)
            names = ["weitiao-base", self.name]
            return JSONResponse({"object": "list", "data": [{"id": name, "max_model_len": 400} for name in names]})

        @app.post("/v1/completions", response_model=None)
        async def completions(http: HttpRequest) -> Response:
            body = await http.json()
            self.bodies.append(body)
            if self.fail_with is not None:
                error = {"error": {"message": "the stub was told to fail", "code": self.fail_with}}
                return JSONResponse(error, status_code=self.fail_with)
            assert set(body) <= _KNOWN, f"vLLM knows no {set(body) - _KNOWN}"
            return StreamingResponse(self._events(body), media_type="text/event-stream")

        return app

    def _request(self, body: dict[str, Any]) -> Request:
        constraint = None
        if self.forms and "structured_outputs" in body:
            compiler = compiler_of(self.opened.renderer, self.opened.model.config.get_text_config().vocab_size)
            constraint = compiler.compile(body["structured_outputs"]["grammar"])
        return Request(
            prompt_ids=body["prompt"],
            stop_ids=body["stop_token_ids"],
            limit=body["max_tokens"],
            sampling=Sampling(
                temperature=body["temperature"], top_p=body["top_p"], top_k=body["top_k"], seed=body["seed"]
            ),
            steering=Steering(
                presence_penalty=body["presence_penalty"],
                frequency_penalty=body["frequency_penalty"],
                logit_bias={int(token): bias for token, bias in body.get("logit_bias", {}).items()},
                min_p=body["min_p"],
                num_top=body["logprobs"],
            ),
            constraint=constraint,
            adapter=None if body["model"] == "weitiao-base" else body["model"],
        )

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        ticket = self.worker.submit_all([self._request(body)])[0]
        first: dict[str, Any] = {"prompt_token_ids": body["prompt"]}
        async with aclosing(ticket.events()) as events:
            async for event in events:
                try:
                    await asyncio.sleep(self.pause_s)
                except asyncio.CancelledError:
                    self.num_gone += 1
                    raise
                if isinstance(event, Piece):
                    yield _sse({"choices": [{**_shape(event.tokens), **first, "finish_reason": None}]})
                    first = {}
                    continue
                assert hasattr(event, "generation"), event
                # a form that cannot end any more is cut by the limit there
                finish = "stop" if event.finish == "stop" else "length"
                stop = Choice(token=body["stop_token_ids"][0], logprob=event.generation.stop_logprob)
                yield _sse(
                    {"choices": [{**_shape((stop,) if finish == "stop" else ()), **first, "finish_reason": finish}]}
                )
                usage = {"prompt_tokens": event.usage.prompt_tokens, "completion_tokens": event.usage.completion_tokens}
                yield _sse({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def _shape(tokens: tuple[Choice, ...]) -> dict[str, Any]:
    logprobs = {
        "tokens": [f"token_id:{one.token}" for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        # vLLM tells the chosen token among the alternatives, too
        "top_logprobs": [{f"token_id:{token}": value for token, value in one.top} for one in tokens],
        "text_offset": [0] * len(tokens),
    }
    return {"index": 0, "text": "", "logprobs": logprobs, "token_ids": [one.token for one in tokens]}


def _sse(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


@contextmanager
def running(stub: Stub) -> Iterator[str]:
    """The address of the stub on localhost."""
    server = uvicorn.Server(uvicorn.Config(stub.app(), log_config=None, timeout_graceful_shutdown=1))
    with socket_for("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            stub.worker.close()


def make_executable(folder: Path, *, stub_url: str) -> None:
    """A command ``vllm`` in `folder` that keeps its arguments there and hands what it is asked on to the stub."""
    script = f"""\
        #!{sys.executable}
        import http.server, json, os, pathlib, sys, urllib.request

        folder = pathlib.Path({str(folder)!r})
        folder.joinpath("arguments.json").write_text(json.dumps(sys.argv[1:]))
        folder.joinpath("pid").write_text(str(os.getpid()))
        if "--broken" in sys.argv:
            sys.exit("CUDA is not to be had")

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self):
                if self.path != "/health" and self.headers["Authorization"] != "Bearer " + os.environ["VLLM_API_KEY"]:
                    self.send_response(401)
                    self.end_headers()
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
                head = {{"Content-Type": "application/json", "Authorization": "Bearer {KEY}"}}
                asked = urllib.request.Request({stub_url!r} + self.path, data=body, headers=head)
                with urllib.request.urlopen(asked) as reply:
                    told = reply.read()
                self.send_response(200)
                self.send_header("Content-Length", str(len(told)))
                self.end_headers()
                self.wfile.write(told)

            do_GET = do_POST = answer

            def log_message(self, *told):
                pass

        port = int(sys.argv[sys.argv.index("--port") + 1])
        http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
        """
    path = folder / "vllm"
    path.write_text(textwrap.dedent(script), encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def is_running(pid: int) -> bool:
    """Whether there is a process `pid`."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
