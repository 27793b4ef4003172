"""Being asked to stop: by Ctrl-C, or by the signals with which batch systems end and move their jobs.

A training that is asked finishes its step, saves and leaves; a second time, it leaves at once. What it leaves with says
whether the same command, run again, goes on: see `Stopped.exit_code`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

RESUMABLE = 75
"""What a process exits with that was ended from outside and can go on: EX_TEMPFAIL of sysexits.h, "try again"."""

_CTRL_C = 130
_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
"""Ctrl-C; the end of a job that a batch system foretells; what Slurm is asked to send some time before it."""


class Stopped(KeyboardInterrupt):
    """The process was asked to stop and stops; what was saved stands whole.

    As for Ctrl-C, no ``except Exception`` catches it.
    """

    def __init__(self, signal_name: str, *, go_on: str = "") -> None:
        """
        Args:
            signal_name: of the signal that asked.
            go_on: the command that goes on, where one does.
        """
        self.signal_name, self.go_on = signal_name, go_on
        super().__init__(signal_name)

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as every shell has it; else `RESUMABLE`."""
        return _CTRL_C if self.signal_name == "SIGINT" else RESUMABLE

    def __str__(self) -> str:
        by = "" if self.signal_name == "SIGINT" else f" by {self.signal_name}"
        return f"Stopped{by}." + (f" Go on with: {self.go_on}" if self.go_on else "")


class StopSignals:
    """Catches the signals while its ``with`` block runs; may be entered again inside of it.

    A signal raises `Stopped` where the program is, except within `deferring`: there the first one is kept for whoever
    asks `asked`, and only the second one raises. Signals reach the main thread alone; in another one nothing is caught.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` tells the user that a signal has come, in one line."""
        self.asked = ""
        """Name of the signal that asked for the end, "" before one has."""
        self._say, self._depth, self._deferred = say, 0, False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                if name in signal.Signals.__members__:  # Windows has no SIGUSR1
                    self._before[signal.Signals[name]] = signal.signal(signal.Signals[name], self._handle)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before.clear()

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Within this the first signal only sets `asked`, and says that the step is finished and saved first."""
        with self._keeping(deferred=True):
            yield

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Within this, a part of what is deferring, a signal raises `Stopped`: what is done here can be done again.

        Raises Stopped at once when a signal has come before.
        """
        if self.asked:
            raise Stopped(self.asked)
        with self._keeping(deferred=False):
            yield

    @contextmanager
    def _keeping(self, *, deferred: bool) -> Iterator[None]:
        before, self._deferred = self._deferred, deferred
        try:
            yield
        finally:
            self._deferred = before

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name, again = signal.Signals(number).name, bool(self.asked)
        self.asked = name
        if again or not self._deferred:
            raise Stopped(name)
        if name == "SIGINT":
            self._say("Ctrl-C: saving after this step. Press it again to leave at once.")
        else:
            self._say(f"{name}: saving after this step. A second signal leaves at once.")
