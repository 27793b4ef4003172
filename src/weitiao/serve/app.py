"""The HTTP side: routes, errors in the protocol's shape, and what is logged of requests (no prompt, no reply)."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import FastAPI, Query
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.telemetry import TelemetryConfig
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.staticfiles import StaticFiles

from .. import __version__
from .chat_route import ChatReply
from .counting import Counting
from .embeddings import Embedder
from .feedback import FeedbackRequest
from .guard import Bounds, Guard
from .keys import Keys
from .leaving import unless_gone
from .plain_route import PlainReply, ask_plain, read_prompts
from .problems import RefusedError, bad_request, from_complaints, no_model
from .protocol import ChatRequest, CompletionRequest, EmbeddingRequest, TokenizeRequest
from .server import Server
from .task_route import TaskRequest, answer_shape, answer_task, describe_task, model_for

_PAGE = Path(__file__).parent / "page"
_LOG = logging.getLogger("weitiao.serve")
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
        }
    },
}
_STATUSES = {
    400: "The request cannot be answered as it is.",
    401: "An API key is missing or not known.",
    404: "No such model, task, answer or route.",
    408: "The body did not come in in time.",
    413: "The body is too long.",
    429: "The queue is full; Retry-After says when to come again.",
    500: "The model could not be run.",
    503: "The server is shutting down.",
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": said, "content": {"application/json": {"schema": _ERROR}}}
    for status, said in _STATUSES.items()
}
_NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
"""FastAPI would hand spans, figures and errors, texts of requests among them, to whatever collector the environment
names."""
# nothing is loaded from elsewhere, nothing runs inline, and no other page may frame it
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(
    server: Server,
    *,
    keys: Keys,
    bounds: Bounds | None = None,
    origins: Sequence[str] = (),
    hosts: Sequence[str] = ("*",),
    embedder: Embedder | None = None,
    drain_seconds: float = 30.0,
) -> FastAPI:
    """The server as an ASGI app; when it ends, running requests are finished, or cancelled with a reason.

    Args:
        server: models, worker, figures and feedback.
        keys: who may ask.
        bounds: how much a client may send, and how long it may take.
        origins: pages elsewhere that may ask, as ``https://…``; none: browsers let no other page ask.
        hosts: names by which the server may be called, against pages that point a name of theirs at localhost.
        embedder: answers ``/v1/embeddings``.
        drain_seconds: how long requests may go on after the server was told to end.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(server.worker.close, drain_seconds)

    middleware = [
        Middleware(Counting, figures=server.figures),
        Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
    ]
    if origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(origins),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
                expose_headers=["Retry-After"],
            )
        )
    app = FastAPI(
        title="weitiao",
        version=__version__,
        description="Answers of tuned models in the form that was labelled, in the shapes of OpenAI's protocol.",
        docs_url=None,  # it would load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        middleware=[*middleware, Middleware(Guard, keys=keys, bounds=bounds or Bounds())],
        responses=_RESPONSES,
        redirect_slashes=False,
        telemetry=_NO_TELEMETRY,
    )
    _add_errors(app)
    _add_openai_routes(app, server, embedder)
    _add_task_routes(app, server)
    _add_own_routes(app, server)
    return app


def _add_errors(app: FastAPI) -> None:
    """Every error in the protocol's shape."""

    @app.exception_handler(RefusedError)
    async def refused(_: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        if "json" not in request.headers.get("content-type", ""):
            said = bad_request("The body is not sent as JSON. Send the header Content-Type: application/json.")
            return JSONResponse(said.body, status_code=said.status)
        told = from_complaints(error.errors())
        return JSONResponse(told.body, status_code=told.status)

    @app.exception_handler(HTTPException)
    async def no_route(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = {404: f"There is nothing at {request.url.path[:200]}.", 405: f"{request.method} is not for this route."}
        told = RefusedError(error.status_code, said.get(error.status_code, str(error.detail)))
        return JSONResponse(told.body, status_code=told.status, headers=error.headers)

    @app.exception_handler(Exception)
    async def broken(_: HttpRequest, error: Exception) -> Response:
        _LOG.error("a request failed: %s", type(error).__name__, exc_info=error)
        told = RefusedError(500, "The server failed at this request; its log says why.", kind="server_error")
        return JSONResponse(told.body, status_code=told.status)


def _stream(chunks: AsyncGenerator[bytes]) -> StreamingResponse:
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)


def _key_of(request: HttpRequest) -> str:
    return str(request.scope.get("weitiao.key", ""))


def _add_openai_routes(app: FastAPI, server: Server, embedder: Embedder | None) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models that are served."""
        found = [_describe_model(one.name, one.created) for one in server.models.values()]
        found += [_describe_model(embedder.name, embedder.created)] if embedder is not None else []
        return {"object": "list", "data": found}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return _describe_model(name, server.model(name).created)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: ChatRequest, http: HttpRequest) -> Response:
        """A reply to a conversation, held to the form of its task."""
        chosen = server.model(request.model)
        ask = await run_in_threadpool(chosen.ask, request)
        num_top = request.top_logprobs or 0 if request.logprobs else 0
        tickets = server.submit(ask, request, chosen, key=_key_of(http), num_top=num_top)
        heading = server.heading(chosen, "chatcmpl")
        reply = ChatReply(server=server, model=chosen, request=request, ask=ask, tickets=tickets, heading=heading)
        if request.stream:
            return _stream(reply.stream())
        return JSONResponse(await unless_gone(http, reply.whole()), headers=_notes(ask.notes))

    @app.post("/v1/completions", response_model=None)
    async def completions(request: CompletionRequest, http: HttpRequest) -> Response:
        """Plain text that goes on."""
        chosen = server.model(request.model)
        prompts = read_prompts(request)
        asks = await run_in_threadpool(lambda: [ask_plain(chosen, prompt, request) for prompt in prompts])
        key, num_top = _key_of(http), request.logprobs or 0
        tickets = server.submit_all(asks, request, chosen, key=key, num_top=num_top)
        reply = PlainReply(
            server=server,
            model=chosen,
            request=request,
            asks=asks,
            tickets=tickets,
            heading=server.heading(chosen, "cmpl"),
        )
        return _stream(reply.stream()) if request.stream else JSONResponse(await unless_gone(http, reply.whole()))

    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        """The tokens that a conversation is asked in: what `weitiao verify` compares."""
        chosen = server.model(request.model)
        ask = await run_in_threadpool(chosen.ask, request.as_chat())
        return {"count": len(ask.prompt_ids), "max_model_len": chosen.max_context, "tokens": list(ask.prompt_ids)}

    @app.post("/v1/embeddings", response_model=None)
    async def embeddings(request: EmbeddingRequest) -> Response:
        """Vectors of texts, where an embedding model is served."""
        if embedder is None:
            raise RefusedError(
                404, "No embedding model is served. Start the server with --embeddings MODEL.", code="model_not_found"
            )
        if request.model != embedder.name:
            raise no_model(request.model, [embedder.name])
        return JSONResponse(await run_in_threadpool(embedder.answer, request))


def _describe_model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "weitiao"}


def _notes(notes: Sequence[str]) -> dict[str, str]:
    """What was done to a request, as a header: the protocol's reply has no place for it."""
    return {"X-Weitiao-Notes": quote("; ".join(notes), safe=" ;:,.'()")} if notes else {}


def _add_task_routes(app: FastAPI, server: Server) -> None:
    async def answer(task: str, request: TaskRequest, http: HttpRequest) -> dict[str, Any]:
        chosen = model_for(server, task, request.model)
        ask = await run_in_threadpool(
            chosen.ask_text, request.text, chosen.task_named(task), most_tokens=request.max_tokens
        )
        tickets = server.submit(ask, None, chosen, key=_key_of(http))
        reply: dict[str, Any] = await unless_gone(
            http, answer_task(server, chosen, ask, tickets, server.heading(chosen, "task"))
        )
        return reply

    @app.get("/v1/tasks")
    async def tasks(model: Annotated[str | None, Query()] = None) -> dict[str, Any]:
        """What the models were tuned to answer, with the JSON Schema of the answers."""
        chosen = [server.model(model)] if model is not None else list(server.models.values())
        found = [describe_task(one, task) for one in chosen for task in one.tasks]
        return {"object": "list", "data": found, "feedback": server.feedback.file is not None}

    known = {task.name: task for one in server.models.values() for task in one.tasks}
    for name, task in known.items():

        async def answer_one(request: TaskRequest, http: HttpRequest, name: str = name) -> dict[str, Any]:
            return await answer(name, request, http)

        app.post(
            f"/v1/tasks/{name}",
            name=f"answer {name}",
            description=f"Text in, answer out: {task.form.describe()}.",
            responses={200: {"content": {"application/json": {"schema": answer_shape(task)}}}},
        )(answer_one)

    @app.post("/v1/tasks/{task}")
    async def answer_any(task: str, request: TaskRequest, http: HttpRequest) -> dict[str, Any]:
        """Text in, answer out; names the tasks there are where there is no such."""
        return await answer(task, request, http)


def _add_own_routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/feedback")
    async def feedback(request: FeedbackRequest) -> dict[str, Any]:
        """What a user thinks of an answer; a right or corrected one becomes a training row."""
        given = await run_in_threadpool(server.feedback.take, request)
        corrected = request.correction is not None
        task = given.task.name if given.task is not None else None
        server.figures.rated(given.model, task, request.thumb, corrected=corrected)
        return {"object": "feedback", "id": request.id}

    @app.get("/v1/statistics")
    async def statistics() -> dict[str, Any]:
        """For each task: refused share, confidence and its drift, latency, ratings."""
        return {"object": "statistics", "models": server.figures.statistics()}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(server.figures.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/health")
    async def health() -> Response:
        """200 as long as the model can be run."""
        alive = server.worker.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, status_code=200 if alive else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """200 as long as new requests are taken."""
        stats = server.worker.stats()
        taking = stats.alive and not stats.closing
        told = {"status": "ready" if taking else "closing", "queued": stats.queued, "running": stats.running}
        return JSONResponse(told, status_code=200 if taking else 503)

    @app.get("/", response_class=FileResponse, include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_PAGE / "index.html", headers=_PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=_PAGE), name="page")
