"""Requests run by a vLLM server: sent as tokens, told as tokens, so that the routes cannot tell it from our own worker.

    worker = VllmWorker("http://127.0.0.1:8001", names={"run-a": "run-a"}, …)
    ticket, = worker.submit_all([Request(…)])
    worker.close(drain_s=30)

One thread runs an event loop with a connection for each request. vLLM batches, queues and caches; here requests are
counted, so that a queue has an end. Whatever happens, every ticket ends with `Done` or `Failed`. Knows no text.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import httpx

from .limits import Limits, require_fitting
from .rates import Rates, Stats, quantile
from .requests import BusyError, ClosedError, Failed, FailKind, Piece, Request, Ticket, UnfitError
from .vllm_wire import Reading, VllmError, body_of

_LOOK_S = 2.0
"""Between two looks at whether the server is well."""
_SILENCE_S = 600.0
"""So long the server may say nothing of a request: it may wait for its turn there."""
_CONNECT_S = 10.0


class VllmWorker:
    """Runs requests on a vLLM server."""

    def __init__(
        self,
        url: str,
        *,
        names: Mapping[str | None, str],
        max_positions: int,
        vocab_size: int,
        end_id: int | None = None,
        between_ids: Sequence[int] = (),
        limits: Limits | None = None,
        api_key: str = "",
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the thread.

        Args:
            url: the server's address, without ``/v1``.
            names: for each adapter, and for None, the base model, what the server calls it.
            max_positions: most tokens of a prompt and its answer together.
            vocab_size: number of the model's tokens.
            end_id: the tokenizer's own end token: the one that vLLM allows where a form ends.
            between_ids: tokens that training writes between an answer and its stop token.
            limits: of which `max_rows` and `max_queue` together are most requests at a time.
            api_key: what the server wants to be let in.
            on_close: is called once nothing is asked any more.
        """
        self.url = url.rstrip("/")
        self.limits = limits or Limits()
        self.max_positions = max_positions
        self._names = dict(names)
        self._vocab_size = vocab_size
        self._end_id = end_id
        self._between_ids = tuple(between_ids)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._on_close = on_close
        self._lock = threading.Lock()
        """Held for whatever several threads touch: the counts and the wish to close."""
        self._in_flight: dict[Ticket, asyncio.Task[None] | None] = {}
        self._num_running = 0
        self._closing = False
        self._stop_at = 0.0
        self._well = True
        self._rates = Rates()
        self._counts = dict.fromkeys(
            ("accepted", "finished", "refused_busy", "cancelled", "failed", "errors", "prompt_tokens",
             "cached_tokens", "completion_tokens", "prefix_hits"), 0
        )  # fmt: skip
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._live, name="weitiao-vllm", daemon=True)
        self._thread.start()

    # --- From any thread ---------------------------------------------------------------------------------------------

    def submit_all(self, requests: Sequence[Request]) -> list[Ticket]:
        """Send all of `requests` or none. Raises BusyError, ClosedError or UnfitError."""
        for request in requests:
            require_fitting(
                request,
                adapters=[name for name in self._names if name is not None],
                max_positions=self.max_positions,
                vocab_size=self._vocab_size,
            )
            if request.adapter not in self._names:
                raise UnfitError(f"The vLLM server at {self.url} does not serve the base model by itself.")
        with self._lock:
            if self._closing or not self._thread.is_alive():
                raise ClosedError("The server is shutting down and takes no more requests.")
            most = self.limits.max_rows + self.limits.max_queue
            if len(self._in_flight) + len(requests) > most:
                self._counts["refused_busy"] += len(requests)
                seconds = self._rates.wait_s(len(self._in_flight))
                raise BusyError(
                    f"{len(self._in_flight)} requests are on their way to vLLM, of at most {most}. Try again in "
                    f"{seconds} seconds.",
                    retry_after_s=seconds,
                )
            tickets = [Ticket(request, self._wake) for request in requests]
            self._in_flight.update(dict.fromkeys(tickets))
            self._counts["accepted"] += len(tickets)
            self._loop.call_soon_threadsafe(self._begin, tickets)
        return tickets

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those that are there finish for `drain_s` seconds, then fail the rest; waits."""
        with self._lock:
            self._closing = True
            self._stop_at = time.monotonic() + drain_s
            if self._thread.is_alive() and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the vLLM server was well when it was last looked at."""
        return self._thread.is_alive() and self._well

    def stats(self) -> Stats:
        """This moment, as far as it is seen from here; steps and caches are vLLM's own (its ``/metrics``)."""
        alive = self.alive
        with self._lock:
            rates = self._rates
            return Stats(
                alive=alive,
                closing=self._closing,
                queued=len(self._in_flight) - self._num_running,
                running=self._num_running,
                **self._counts,
                steps=0,
                unshareable=0,
                adapter_switches=0,
                tokens_per_second=rates.tokens_per_second,
                requests_per_second=rates.requests_per_second,
                first_token_p50_s=quantile(rates.first_tokens, 0.5),
                first_token_p95_s=quantile(rates.first_tokens, 0.95),
                latency_p50_s=quantile(rates.latencies, 0.5),
                latency_p95_s=quantile(rates.latencies, 0.95),
                cache_bytes=0,
                kept_bytes=0,
            )

    def _wake(self) -> None:
        with self._lock:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._let_go)

    # --- The worker's thread -----------------------------------------------------------------------------------------

    def _live(self) -> None:
        try:
            self._loop.run_until_complete(self._work())
        finally:
            with self._lock:
                self._closing = True
                left = list(self._in_flight)
                self._loop.close()
            for ticket in left:
                self._fail(ticket, "The worker has ended by an error of its own.", "error")
            self._on_close()

    async def _work(self) -> None:
        timeout = httpx.Timeout(_SILENCE_S, connect=_CONNECT_S)
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        # a proxy that the environment names is for the world outside
        async with httpx.AsyncClient(
            base_url=self.url, headers=self._headers, timeout=timeout, limits=unlimited, trust_env=False
        ) as self._client:
            watch = asyncio.create_task(self._watch())
            await self._end.wait()
            while (tasks := self._tasks()) and time.monotonic() < self._stop_at:
                await asyncio.wait(tasks, timeout=0.05)
            for task in tasks:
                task.cancel()
            watch.cancel()
            await asyncio.gather(*tasks, watch, return_exceptions=True)

    def _tasks(self) -> list[asyncio.Task[None]]:
        with self._lock:
            return [task for task in self._in_flight.values() if task is not None]

    async def _watch(self) -> None:
        """Look at the server now and then."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                self._well = (await self._client.get("/health", timeout=_CONNECT_S)).status_code == 200
            except httpx.HTTPError:
                self._well = False

    def _begin(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            task = self._loop.create_task(self._run(ticket))
            task.add_done_callback(partial(self._ended, ticket))
            with self._lock:
                self._in_flight[ticket] = task

    def _ended(self, ticket: Ticket, _: asyncio.Task[None]) -> None:
        """Forget a ticket whose task is over; one that was cancelled before it began has told nothing yet."""
        if ticket.ended is None:
            self._fail_cancelled(ticket)
        with self._lock:
            self._in_flight.pop(ticket, None)
            self._num_running -= ticket.first_token is not None

    def _let_go(self) -> None:
        """End what was cancelled; closing its connection is what tells vLLM."""
        with self._lock:
            tasks = [task for ticket, task in self._in_flight.items() if ticket.cancelled and task is not None]
        for task in tasks:
            task.cancel()

    async def _run(self, ticket: Ticket) -> None:
        """Run one request to its end, whatever happens."""
        try:
            await self._ask(ticket)
        except asyncio.CancelledError:
            self._fail_cancelled(ticket)
        except _StatusError as error:
            self._fail(ticket, str(error), error.kind)
        except (VllmError, httpx.HTTPError) as error:
            self._fail(ticket, self._sentence(error), "error")
        except Exception as error:  # noqa: BLE001 - whatever came in must not end the others
            self._fail(ticket, f"vLLM's answer could not be read: {type(error).__name__}: {error!s:.200}", "error")

    async def _ask(self, ticket: Ticket) -> None:
        request = ticket.request
        stop_ids = {*request.stop_ids}
        if request.grammar is not None and self._end_id is not None:
            stop_ids.add(self._end_id)
        body = body_of(request, model=self._names[request.adapter], stop_ids=stop_ids)
        reading = Reading(request, stop_ids=stop_ids, between_ids=self._between_ids)
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise _StatusError(response.status_code, (await response.aread()).decode(errors="replace"))
            async for line in response.aiter_lines():
                if line.startswith("data:") and (data := line.removeprefix("data:").strip()) != "[DONE]":
                    self._tell(ticket, reading, json.loads(data))
        done = reading.done()
        ticket.put(done)
        assert ticket.ended is not None
        first = ticket.first_token or ticket.ended
        with self._lock:
            for name in ("prompt_tokens", "cached_tokens", "completion_tokens"):
                self._counts[name] += getattr(done.usage, name)
            self._counts["finished"] += 1
            self._counts["prefix_hits"] += done.usage.cached_tokens > 0
            self._rates.finished(first_token_s=first - ticket.submitted, latency_s=ticket.ended - ticket.submitted)

    def _tell(self, ticket: Ticket, reading: Reading, event: dict[str, Any]) -> None:
        """Tell a ticket what an event of the stream holds."""
        if error := event.get("error"):
            code = error.get("code") if isinstance(error, dict) else None
            raise _StatusError(code if isinstance(code, int) else 500, json.dumps(event))
        if tokens := reading.take(event):
            with self._lock:
                self._num_running += ticket.first_token is None
                self._rates.wrote(len(tokens))
            ticket.put(Piece(tokens=tokens))
        if ticket.cancelled:  # its listener has gone with its loop
            raise asyncio.CancelledError

    def _sentence(self, error: Exception) -> str:
        if isinstance(error, VllmError):
            return str(error)
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return f"The vLLM server at {self.url} cannot be reached. Is it running?"
        if isinstance(error, httpx.TimeoutException):
            return f"The vLLM server at {self.url} said nothing for {_SILENCE_S:.0f} seconds."
        return f"The connection to the vLLM server at {self.url} broke: {type(error).__name__} {error!s:.200}".rstrip()

    def _fail_cancelled(self, ticket: Ticket) -> None:
        if ticket.cancelled:
            self._fail(ticket, "The request was cancelled.", "cancelled")
        else:
            self._fail(ticket, "The server is shutting down.", "shutdown")

    def _fail(self, ticket: Ticket, reason: str, kind: FailKind) -> None:
        with self._lock:
            self._counts["cancelled" if kind == "cancelled" else "failed"] += 1
            self._counts["errors"] += kind == "error"
        ticket.put(Failed(reason=reason, kind=kind))


class _StatusError(Exception):
    """vLLM answered with an error; what it comes to here, as a sentence."""

    def __init__(self, status: int, body: str) -> None:
        said = _message(body)
        self.kind: FailKind = "error"
        if status in (400, 404, 413, 422):
            self.kind, text = "unfit", f"vLLM cannot run this request: {said}"
        elif status in (429, 503):
            self.kind, text = "busy", f"vLLM takes no more requests for the moment: {said}"
        elif status in (401, 403):
            text = "vLLM asks for another API key. Set VLLM_API_KEY to the one it was started with."
        else:
            text = f"vLLM failed at this request ({status}): {said}"
        super().__init__(text)


def _message(body: str) -> str:
    """What an error's body says, in one line."""
    try:
        told = json.loads(body)
    except ValueError:
        told = body
    if isinstance(told, dict):
        inner = told.get("error", told)
        told = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(told).split())[:300] or "it says no more"
