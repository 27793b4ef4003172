"""The one thread that owns the model: requests join its batches, step by step, and leave when they end or are let go.

    worker = Worker(AdapterSet(base, {"run-a": folder}))
    ticket = worker.submit(Request(prompt_ids=…, stop_ids=…, limit=64, adapter="run-a"))   # from any thread
    async with contextlib.aclosing(ticket.events()) as events:                             # leaving early cancels
        async for event in events:
            …                                                          # Piece, Piece, …, then Done or Failed
    worker.close(drain_s=30)

Rows of one adapter share one batch (`generate/batch.py`); batches of different adapters take turns, a step each. A long
prompt is computed in parts, beside the steps of the others. What prompts begin with alike is computed once. Whatever
happens, every ticket ends with `Done` or `Failed`. Knows tokens only; text is `serve/streaming.py`'s business, and what
a request and its events are, `serve/requests.py` says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch

from ..generate.attention import attending_by_rows
from ..generate.batch import Batch
from ..generate.engine import check_model
from ..generate.heads import HeadStore
from ..generate.row import Generation, Row
from ..generate.sampling import Chooser
from ..models.adapter_set import AdapterSet
from ..models.prefix_lm import RowPrefix, row_prefix
from .fair_queue import FairQueue
from .limits import Limits, require_fitting
from .rates import Rates, Stats, quantile
from .requests import BusyError, ClosedError, Done, Failed, FailKind, Piece, Request, Ticket, UnfitError, Usage

__all__ = ["BusyError", "ClosedError", "Done", "Failed", "Limits", "Piece", "Request", "Stats", "Ticket", "UnfitError",
           "Usage", "Worker"]  # fmt: skip

_ROWS_AT_ONCE = 8
"""Cache is set aside for a multiple of so many rows: one copy of it in eight joins instead of one in each."""
_CANCELLED = "The request was cancelled."


@dataclass(kw_only=True, eq=False, slots=True)
class _Running:
    """A ticket that has a row."""

    ticket: Ticket
    row: Row
    num_told: int = 0
    """How many of its tokens the ticket has been told."""


class Worker:
    """Runs requests on a model that nobody else uses meanwhile."""

    def __init__(self, models: AdapterSet, *, limits: Limits | None = None, share_prompts: bool = True) -> None:
        """Starts the thread.

        Args:
            models: the base model, in evaluation mode, with its adapters; the worker's own from then on.
            limits: what is taken on at a time.
            share_prompts: whether what prompts begin with alike is computed once.

        Raises:
            ModelError: batches cannot run the model.
        """
        check_model(models.model, exact=False)
        self.models = models
        self.limits = limits or Limits()
        config = models.base.config.get_text_config()
        self.max_positions: int = config.max_position_embeddings
        """Most tokens of a prompt and its answer together."""
        self._vocab_size: int = config.vocab_size
        self._heads = HeadStore(self.limits.kept_bytes) if share_prompts else None
        self._batches: dict[str | None, Batch] = {}
        self._running: dict[str | None, list[_Running]] = {}
        """By adapter, in the order of their turns."""
        self._queue = FairQueue()
        self._prefixes: dict[Ticket, RowPrefix | None] = {}
        self._lock = threading.Condition()
        """Held for whatever several threads touch: the queue, the counts, the wish to close. Never during a step."""
        self._num_rows = 0
        self._cache_bytes = 0
        self._closing = False
        self._stop_at: float | None = None
        """When to let go what still runs."""
        self._death = ""
        self._rates = Rates()
        self._counts = dict.fromkeys(
            ("accepted", "finished", "refused_busy", "cancelled", "failed", "errors", "steps", "prompt_tokens",
             "cached_tokens", "completion_tokens", "unshareable", "adapter_switches"), 0
        )  # fmt: skip
        self._thread = threading.Thread(target=self._live, name="weitiao-worker", daemon=True)
        self._thread.start()

    # --- From any thread ---------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Ticket:
        """Let `request` wait for its turn.

        Raises:
            BusyError: the queue is full; says when to come again.
            ClosedError: the worker closes or has ended.
            UnfitError: it can never be run: empty or too long, an unknown adapter, a token that does not exist.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Ticket]:
        """The same of several, all or none: n answers to one prompt, which is computed once. Raises as `submit`."""
        prefixes = [self._check(request) for request in requests]
        if len(requests) > self.limits.max_queue:
            raise UnfitError(
                f"{len(requests)} answers are asked for at once, but {self.limits.max_queue} requests can wait here. "
                "Ask for fewer."
            )
        with self._lock:
            if self._closing or self._death:
                raise ClosedError(self._death or "The server is shutting down and takes no more requests.")
            waiting = len(self._queue) + len(requests)
            if waiting > self.limits.max_queue:
                self._counts["refused_busy"] += len(requests)
                seconds = self._rates.wait_s(waiting)
                raise BusyError(
                    f"{len(self._queue)} requests are waiting, of at most {self.limits.max_queue}. Try again in "
                    f"{seconds} seconds.",
                    retry_after_s=seconds,
                )
            tickets = [Ticket(request, self._wake) for request in requests]
            for ticket, prefix in zip(tickets, prefixes, strict=True):
                self._queue.push(ticket)
                self._prefixes[ticket] = prefix
            self._counts["accepted"] += len(tickets)
            self._lock.notify_all()
        return tickets

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those that are there finish for `drain_s` seconds, then fail the rest; waits."""
        with self._lock:
            self._closing = True
            self._stop_at = time.monotonic() + drain_s
            self._lock.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are run."""
        return self._thread.is_alive() and not self._death

    def stats(self) -> Stats:
        """The worker at this moment."""
        with self._lock:
            rates, heads = self._rates, self._heads
            return Stats(
                alive=self.alive,
                closing=self._closing,
                queued=len(self._queue),
                running=sum(map(len, self._running.values())),
                **self._counts,
                prefix_hits=heads.num_hits if heads is not None else 0,
                tokens_per_second=rates.tokens_per_second,
                requests_per_second=rates.requests_per_second,
                first_token_p50_s=quantile(rates.first_tokens, 0.5),
                first_token_p95_s=quantile(rates.first_tokens, 0.95),
                latency_p50_s=quantile(rates.latencies, 0.5),
                latency_p95_s=quantile(rates.latencies, 0.95),
                cache_bytes=self._cache_bytes,
                kept_bytes=heads.num_bytes if heads is not None else 0,
            )

    def _check(self, request: Request) -> RowPrefix | None:
        """The context of a request's prompt, in a prefix language model. Raises UnfitError."""
        require_fitting(
            request,
            adapters=self.models.names,
            max_positions=min(self.max_positions, self.limits.max_cache_tokens),
            vocab_size=self._vocab_size,
        )
        return row_prefix(self.models.base, request.prompt_ids)

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()

    # --- The worker's thread -----------------------------------------------------------------------------------------

    def _live(self) -> None:
        try:
            while self._prepare():
                with attending_by_rows(self.models.model):  # once for many steps
                    self._turn()
                    while self._prepare(waiting=False):
                        self._turn()
        except BaseException as error:
            self._death = f"The worker has ended by an error of its own: {type(error).__name__}: {error}."
            raise
        finally:
            with self._lock:
                reason = self._death or "The server is shutting down."
                self._closing = True
                for ticket in list(self._queue):
                    self._drop(ticket, reason, "error" if self._death else "shutdown")
                for group in self._running.values():
                    for running in group:
                        self._fail(running.ticket, reason, "error" if self._death else "shutdown")
                self._running.clear()

    def _prepare(self, *, waiting: bool = True) -> bool:
        """Let go what was cancelled, take in what has room, wait where there is nothing to do; False at the end.

        Not `waiting`: False where there is nothing to do.
        """
        while True:
            self._let_go()
            while (ticket := self._next()) is not None:
                self._join(ticket)
            with self._lock:
                busy = any(self._running.values())
                if self._stop_at is not None and (not (busy or self._queue) or time.monotonic() >= self._stop_at):
                    return False
                if busy:
                    return True
                if not self._queue and not waiting:
                    return False
                if not self._queue:
                    self._batches.clear()  # an idle worker holds no cache
                    self._cache_bytes = 0
                    self._lock.wait()

    def _let_go(self) -> None:
        """Take out the tickets that were cancelled."""
        with self._lock:
            for ticket in [ticket for ticket in self._queue if ticket.cancelled]:
                self._drop(ticket, _CANCELLED, "cancelled")
            for name, group in self._running.items():
                for running in [one for one in group if one.ticket.cancelled]:
                    group.remove(running)
                    self._batches[name].leave(running.row)
                    self._fail(running.ticket, _CANCELLED, "cancelled")

    def _next(self) -> Ticket | None:
        """Take a ticket whose turn it is, and for which there is room, out of the queue."""
        running = [one for group in self._running.values() for one in group]
        prefilling = sum(one.row.in_prompt for one in running)
        if len(running) >= self.limits.max_rows or prefilling >= self.limits.max_prefilling:
            return None
        with self._lock:
            for ticket in islice(self._queue, self.limits.max_rows):
                request = ticket.request
                if not self._fits(request):
                    return None  # nobody passes by, so that a long request gets its turn
                shares = self._prefixes[ticket] is None
                if not (shares and self._batch(request.adapter).coming_share(request.prompt_ids)):
                    self._queue.serve(ticket)
                    return ticket
                # else: a step later it can copy what now it would compute a second time
        return None

    def _fits(self, request: Request) -> bool:
        """Whether there is memory for one more row of this length, if all reach their limits; always for the first."""
        groups = {name: [one.ticket.request.num_positions for one in group] for name, group in self._running.items()}
        groups.setdefault(request.adapter, []).append(request.num_positions)
        alone = sum(map(len, groups.values())) == 1
        return (
            alone
            or sum(len(needs) * max(needs, default=0) for needs in groups.values()) <= self.limits.max_cache_tokens
        )

    def _batch(self, name: str | None) -> Batch:
        if name not in self._batches:
            self._batches[name] = Batch(
                self.models.model, past_states=self.models.past_states(name), heads=self._heads, owner=name or ""
            )
        return self._batches[name]

    def _join(self, ticket: Ticket) -> None:
        """Give `ticket`, which waits no more, a row."""
        request, prefix = ticket.request, self._prefixes.pop(ticket)
        try:
            row = self._row(request, prefix)
            ended = self._batch(request.adapter).join(row)
        except Exception as error:  # noqa: BLE001 - whatever it is must not end the others
            with self._lock:
                self._counts["errors"] += 1
                self._fail(ticket, _reason(error), "error")
            return
        running = _Running(ticket=ticket, row=row)
        ticket.cached_tokens = row.num_shared
        with self._lock:
            self._counts["unshareable"] += prefix is not None
            self._counts["prompt_tokens"] += row.num_prompt
            self._counts["cached_tokens"] += row.num_shared
            if ended is not None:
                self._tell(running, ended)
            else:
                self._running.setdefault(request.adapter, []).append(running)

    def _row(self, request: Request, prefix: RowPrefix | None) -> Row:
        self._num_rows += 1
        return Row(
            index=self._num_rows,
            prompt=tuple(request.prompt_ids),
            limit=request.limit,
            stop_ids=frozenset(request.stop_ids),
            chooser=Chooser(
                sampling=request.sampling,
                random=Random(f"{request.sampling.seed}/{request.choice}"),
                steering=request.steering,
            ),
            constraint=None if request.constraint is None else request.constraint.fork(),
            prefix=prefix,
        )

    def _turn(self) -> None:
        """One step of the next batch in turn."""
        name = next(name for name, group in self._running.items() if group)
        with self._lock:
            group = self._running[name] = self._running.pop(name)  # behind the others
        batch = self._batches[name]
        try:
            before = self.models.num_switches
            self.models.choose(name)
            ended = batch.step(capacity=self._capacity(len(group)), most_tokens=self.limits.prefill_tokens)
        except Exception as error:  # noqa: BLE001 - whatever a model raises must not end the others
            self._break_off(name, error)
            return
        with self._lock:
            self._counts["steps"] += 1
            self._counts["adapter_switches"] += self.models.num_switches - before
            ends = {done.index: done for done in ended}
            for running in group:
                self._tell(running, ends.get(running.row.index))
            group[:] = [running for running in group if running.row.index not in ends]
        batch.trim(capacity=self._capacity(len(group)))
        self._cache_bytes = sum(each.cache.num_bytes for each in self._batches.values())

    def _capacity(self, num_rows: int) -> int:
        """How many rows to set cache aside for."""
        return min(self.limits.max_rows, -(-num_rows // _ROWS_AT_ONCE) * _ROWS_AT_ONCE)

    def _break_off(self, name: str | None, error: Exception) -> None:
        """Fail the tickets of a batch that the model could not step, and begin a new one."""
        reason = _reason(error)
        with self._lock:
            self._counts["errors"] += 1
            del self._batches[name]
            for running in self._running.pop(name):
                self._fail(running.ticket, reason, "error")
        if self._heads is not None:
            self._heads.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- Telling tickets ---------------------------------------------------------------------------------------------

    def _tell(self, running: _Running, done: Generation | None) -> None:
        """Tell a ticket its new tokens, and how it ended if it did."""
        ticket, row = running.ticket, running.row
        new = tuple(row.choices[running.num_told :])
        running.num_told += len(new)
        count = len(new) + (done is not None and done.finish == "stop")
        if count:
            self._rates.wrote(count)
            self._counts["completion_tokens"] += count
        if new:
            ticket.put(Piece(tokens=new))
        if done is None:
            return
        usage = Usage(
            prompt_tokens=row.num_prompt,
            cached_tokens=row.num_shared,
            completion_tokens=len(row.tokens) + (done.finish == "stop"),
        )
        ticket.put(Done(finish=done.finish, usage=usage, generation=done, tokens=tuple(row.choices)))
        self._counts["finished"] += 1
        assert ticket.ended is not None
        first = ticket.first_token or ticket.ended
        self._rates.finished(first_token_s=first - ticket.submitted, latency_s=ticket.ended - ticket.submitted)

    def _drop(self, ticket: Ticket, reason: str, kind: FailKind) -> None:
        """Fail a ticket that waits."""
        self._queue.remove(ticket)
        del self._prefixes[ticket]
        self._fail(ticket, reason, kind)

    def _fail(self, ticket: Ticket, reason: str, kind: FailKind) -> None:
        self._counts["cancelled" if kind == "cancelled" else "failed"] += 1
        ticket.put(Failed(reason=reason, kind=kind))


def _reason(error: Exception) -> str:
    return f"The model could not be run: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
