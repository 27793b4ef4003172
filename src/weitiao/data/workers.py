"""Light worker processes: a function of this package applied to many parts of an input, on all cores, in order.

    with Workers() as workers:
        for result in workers.map(partial(convert_block, converter), blocks):
            …

A worker is a fresh interpreter that imports what the function's module imports and nothing else: never the main
program, so that scripts without a guard, notebooks and ``python -c`` are no trap; never torch, so that it takes little
memory and starts in a tenth of a second. Parts and results are pickled, the function by its name. What a function
raises is raised in the caller. Ctrl-C ends the workers with their parent; so does the parent's death, whatever its
cause.

Knows nothing of what is worked on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

from weitiao.errors import DataError, WeitiaoError

Part = TypeVar("Part")
Result = TypeVar("Result")

MOST_WORKERS = 8
"""More are not started: one process puts the results together, and it cannot keep pace with more."""

_SETTING = "WEITIAO_WORKERS"
_START = "import sys; sys.path[:] = sys.argv[2:]; from weitiao.data.workers import serve; serve(int(sys.argv[1]))"
_PATIENCE_SECONDS = 5.0


def num_workers() -> int:
    """How many processes are worth starting: one for each core that this process may use; 1 means none.

    ``WEITIAO_WORKERS`` sets another number. Raises DataError when it is no number from 1 on.
    """
    said = os.environ.get(_SETTING, "")
    if said:
        if not said.isdecimal() or int(said) < 1:
            raise DataError(f"{_SETTING} is {said!r}, not a number of processes. Set it to 1 or more, or remove it.")
        return int(said)
    if os.name != "posix" or not sys.executable:  # pipes are inherited in another way; Python is built into a program
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


class Workers:
    """Worker processes, started when there is work for them and ended with the ``with`` block."""

    def __init__(self, count: int | None = None) -> None:
        """
        Args:
            count: of processes; by default `num_workers`. With 1 everything is done in this process.

        Raises:
            DataError: as `num_workers`.
        """
        self.count = num_workers() if count is None else count
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._started: list[_Worker] = []
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        for worker in self._started:
            worker.stop()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[Result]:
        """``function(part)`` for each of `parts`, in their order; a few parts for each worker are held at a time.

        A single part is not worth a process: it is done in this one.

        Raises what `function` raises, and DataError when a worker dies.
        """
        coming = iter(parts)
        first = list(islice(coming, 2))
        if self.count == 1 or len(first) < 2:
            yield from map(function, chain(first, coming))
            return
        waiting: deque[Future[Result]] = deque()
        threads = self._start()
        parts, failure = chain(first, coming), None
        try:
            while failure is None:
                try:
                    waiting.append(threads.submit(self._apply, function, next(parts)))
                except StopIteration:
                    break
                except Exception as error:  # noqa: BLE001 - of making the parts; what was begun before it still counts
                    failure = error
                if len(waiting) > 2 * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
        if failure is not None:
            raise failure

    def _start(self) -> ThreadPoolExecutor:
        """The threads that talk to the workers, one to each."""
        if self._threads is None:
            for _ in range(self.count):
                worker = _Worker()
                self._started.append(worker)
                self._idle.put(worker)
            self._threads = ThreadPoolExecutor(max_workers=self.count, thread_name_prefix="weitiao-worker")
        return self._threads

    def _apply(self, function: Callable[[Part], Result], part: Part) -> Result:
        worker = self._idle.get()
        try:
            return worker.apply(function, part)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process and the pipe to it."""

    def __init__(self) -> None:
        ours, theirs = Pipe()
        self._pipe = ours
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs.fileno()), *map(str, sys.path)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def apply(self, function: Callable[[Part], Result], part: Part) -> Result:
        try:
            self._pipe.send((function, part))
            done, result = self._pipe.recv()
        except (EOFError, OSError):
            raise DataError(self._explain_death()) from None
        if not done:
            raise result
        return result  # type: ignore[no-any-return]  # the pipe cannot say of which type

    def _explain_death(self) -> str:
        try:
            code = self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            return "A process that worked on rows does not answer any more. Run the same again."
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        why = "The system does so when memory runs out. " if code == -signal.SIGKILL else ""
        return (
            f"A process that worked on rows {how} before it was done. {why}"
            f"Run the same again; with {_SETTING}=1 set, no other processes are started."
        )

    def stop(self) -> None:
        """End the process, whatever it is at."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()


def serve(descriptor: int) -> None:
    """What a worker does: apply what comes through the pipe until its other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # these reach the whole group or job; the parent answers them for all
    pipe: Connection[Any, Any] = Connection(descriptor)
    try:
        while True:
            function, part = pipe.recv()
            try:
                answer = (True, function(part))
            except WeitiaoError as error:
                answer = (False, error)
            except Exception as error:  # noqa: BLE001 - a bug of ours, whose traceback ends here: it is sent as text
                answer = (False, RuntimeError("In a worker process:\n" + "".join(traceback.format_exception(error))))
            pipe.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has ended or needs no more
