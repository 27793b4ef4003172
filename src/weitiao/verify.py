"""Whether a tuned model is asked and answers alike by every route: opened with its adapter, merged, served.

What differs between training and serving is found by looking at the tokens: each route must make the same prompt of the
same row, token by token, and answer it alike. The first difference is shown.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

from rich.console import Console

from .apply import RunInUse, open_run
from .data.reading import Said, read_like
from .data.record import Record
from .errors import DataError, RunError
from .evaluate.predict import Answerer
from .evaluation import load_run_rows
from .generate.chat import reply_of
from .models.opening import open_model
from .recipe import load_recipe
from .render.base import Renderer
from .serve.protocol import ChatRequest
from .serve.requests import Failed
from .serving import open_server
from .tasks.base import Task

USUAL_ROWS = 20
_PATIENCE_SECONDS = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """What one route made of one row."""

    prompt_ids: tuple[int, ...]
    answer: str
    """The text; of a refused answer the reason, behind ``refused:``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Where a route first differs from the run."""

    source: str
    """The row."""
    what: Literal["prompt", "answer"]
    place: int
    """Counted from 0: of the token of a prompt, of the character of an answer."""
    expected: str
    found: str

    def describe(self) -> str:
        """``dev.jsonl:3: the prompt differs at token 17: '\\n' here, ' ' there``."""
        unit = "token" if self.what == "prompt" else "character"
        where = f"{self.source}: the {self.what} differs at {unit} {self.place}"
        return f"{where}: {self.expected} in the run, {self.found} there"


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteCheck:
    """How one route compares with the run."""

    route: str
    rows: int
    same_prompts: int
    same_answers: int
    first: Difference | None
    """None where nothing differs."""

    @property
    def holds(self) -> bool:
        """Whether nothing differs."""
        return self.first is None


def verify_run(
    path: str | Path,
    *,
    urls: Sequence[str] = (),
    merged: str | Path | None = None,
    data: str | Path | None = None,
    rows: int = USUAL_ROWS,
    api_key: str = "",
    model_name: str | None = None,
    base_model: str | None = None,
    said: Said | None = None,
    console: Console | None = None,
) -> list[RouteCheck]:
    """Ask every route the same rows; returns how each compares with the run as evaluation asks it.

    Args:
        path: the run folder.
        urls: servers that serve it, such as ``http://127.0.0.1:8000``; each is a route.
        merged: a folder that `weitiao export` wrote; a route.
        data: a file of rows; by default the run's dev rows.
        rows: how many of them; the server started here is asked them, too.
        api_key: what the servers want to be let in.
        model_name: the run's name there; by default the name of its folder.
        base_model: where the base model lies now, if it was moved.
        said: how the rows of `data` are to be read, where otherwise than those the run learnt from.
        console: where progress is shown.

    Raises:
        DataError, RunError, ContractError, ModelError: the run, the rows or a route cannot be used.
    """
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    run = RunInUse.of(open_run(path, base_model=base_model))
    records = _rows_of(run, data, said)[:rows]
    tasks = run.assign(records)
    asked = run.prepare(records, tasks, console)
    console.print(f"asking {len(asked)} rows of {run.folder.path}")
    expected = _answers(run.answerer(), asked, tasks)
    renderer, name = run.opened.renderer, model_name or run.folder.path.resolve().name
    checks = []
    if merged is not None:
        console.print(f"asking {merged}")
        found = _merged_answers(run, Path(merged), asked, tasks)
        checks.append(_compare("merged", asked, expected, found, renderer))
    del run
    gc.collect()
    for url in urls:
        console.print(f"asking {url}")
        client = _Client(url.rstrip("/").removesuffix("/v1"), api_key)
        found = [client.answer(name, record) for record in records]
        checks.append(_compare(url, asked, expected, found, renderer))
    if not urls:
        console.print("asking a server started here")
        found = _served_answers(path, base_model, records, tasks)
        checks.append(_compare("server", asked, expected, found, renderer))
    return checks


def _rows_of(run: RunInUse, data: str | Path | None, said: Said | None) -> list[Record]:
    if data is not None:
        records = read_like(run.contract.reading, str(data), said=said, require_target=False)
    else:
        records = list(load_run_rows(run, load_recipe(run.folder.recipe)).dev)
    if not records:
        raise DataError(f"There are no dev rows to ask: {run.folder.path} held none apart. Give some with --data.")
    return records


def _answers(answerer: Answerer, records: Sequence[Record], tasks: Sequence[Task]) -> list[Answered]:
    """What the model answers, each row by itself: which rows run together would tip roundings."""
    alone = replace(answerer, batch_rows=1)
    replies = {reply.index: reply for reply in alone.answer(records, tasks)}
    return [
        Answered(
            prompt_ids=tuple(answerer.renderer.render_prompt(record.messages, record.tools)),
            answer=_told(replies[place].text, replies[place].refusal),
        )
        for place, record in enumerate(records)
    ]


def _merged_answers(run: RunInUse, folder: Path, records: Sequence[Record], tasks: Sequence[Task]) -> list[Answered]:
    opened = open_model(str(folder), dtype=run.contract.dtype, must_speak=True)
    return _answers(replace(run.answerer(), model=opened.model, renderer=opened.renderer), records, tasks)


def _served_answers(
    path: str | Path, base_model: str | None, records: Sequence[Record], tasks: Sequence[Task]
) -> list[Answered]:
    """What a server says, asked past HTTP but by the same way as its requests."""
    server = open_server([str(path)], base_model=base_model)
    try:
        model = next(iter(server.models.values()))
        found = []
        for record, task in zip(records, tasks, strict=True):
            request = ChatRequest.model_validate({**chat_of(model.name, record), "task": task.name})
            ask = model.ask(request)
            done = server.submit(ask, request, model, key="")[0].wait()
            if isinstance(done, Failed):
                raise RunError(f"{record.source}: {done.reason}")
            held = ask.constraint is not None
            reply = reply_of(done.generation, model.opened.renderer, ask.tools, held=held)
            found.append(Answered(prompt_ids=ask.prompt_ids, answer=_told(reply.text, reply.refusal)))
        return found
    finally:
        server.worker.close()


class _Client:
    """A server that serves the run."""

    def __init__(self, url: str, api_key: str) -> None:
        self.url, self.api_key = url, api_key

    def answer(self, name: str, record: Record) -> Answered:
        """The tokens that the server makes of a row, and what it answers to it."""
        chat = chat_of(name, record)
        tokens = self._post("/tokenize", {key: chat[key] for key in chat if key in ("model", "messages", "tools")})
        message = self._post("/v1/chat/completions", {**chat, "temperature": 0})["choices"][0]["message"]
        text = message.get("content") or ""
        for call in message.get("tool_calls") or ():
            text += json.dumps(call["function"], ensure_ascii=False)
        return Answered(prompt_ids=tuple(tokens["tokens"]), answer=_told(text, message.get("refusal") or ""))

    def _post(self, route: str, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = HttpRequest(self.url + route, data=json.dumps(body).encode(), headers=headers)
        try:
            with urlopen(request, timeout=_PATIENCE_SECONDS) as response:
                return json.load(response)
        except HTTPError as error:
            said = error.read().decode("utf-8", errors="replace")[:500]
            raise RunError(f"{self.url}{route} answered {error.code}: {said}") from None
        except (URLError, OSError, ValueError) as error:
            raise RunError(f"{self.url} cannot be asked: {error}. Is a server running there?") from None


def chat_of(name: str, record: Record) -> dict[str, Any]:
    """A row as a request of the protocol."""
    shape: dict[str, Any] = {"model": name, "messages": []}
    ids: list[str] = []
    for number, turn in enumerate(record.messages):
        message: dict[str, Any] = {"role": turn.role, "content": turn.text}
        if turn.calls:
            ids = [f"call_{number}_{place}" for place in range(len(turn.calls))]
            message["tool_calls"] = [_call(call_id, one) for call_id, one in zip(ids, turn.calls, strict=True)]
        if turn.role == "tool":
            message |= {"role": "tool", "tool_call_id": ids.pop(0)} if ids else {"role": "function"}
        shape["messages"].append(message)
    if record.tools:
        shape["tools"] = [{"type": "function", "function": dict(tool)} for tool in record.tools]
    return shape


def _call(call_id: str, call: Any) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _told(text: str, refusal: str) -> str:
    return f"refused: {refusal}" if refusal else text


def _compare(
    route: str,
    records: Sequence[Record],
    expected: Sequence[Answered],
    found: Sequence[Answered],
    renderer: Renderer,
) -> RouteCheck:
    first: Difference | None = None
    same = {"prompt": 0, "answer": 0}
    for record, ours, theirs in zip(records, expected, found, strict=True):
        pairs: list[tuple[Literal["prompt", "answer"], Any, Any, Callable[[Any], str]]] = [
            ("prompt", ours.prompt_ids, theirs.prompt_ids, lambda token: repr("".join(renderer.show_tokens([token])))),
            ("answer", ours.answer, theirs.answer, repr),
        ]
        for what, one, other, shown in pairs:
            same[what] += one == other
            if one != other and first is None:
                alike = (n for n, pair in enumerate(zip(one, other)) if pair[0] != pair[1])
                place = next(alike, min(len(one), len(other)))
                first = Difference(
                    source=record.source,
                    what=what,
                    place=place,
                    expected=_at(one, place, what, shown),
                    found=_at(other, place, what, shown),
                )
    return RouteCheck(
        route=route, rows=len(records), same_prompts=same["prompt"], same_answers=same["answer"], first=first
    )


def _at(whole: Any, place: int, what: str, shown: Callable[[Any], str]) -> str:
    if place >= len(whole):
        return "the end"
    return shown(whole[place]) if what == "prompt" else repr(whole[place : place + 20])
