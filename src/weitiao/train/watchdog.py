"""A line for whoever reads the log of a training that stands still: since when, and at what. Nothing is ended."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

SILENT_SECONDS = 600.0
"""A phase is told as standing still after ten minutes, or ten times the longest that it took before."""

_TIMES_LONGEST = 10.0
_LOOKS_PER_SILENCE = 20


class Watchdog:
    """Watches, in a thread of its own, that one phase follows the other."""

    def __init__(self, say: Callable[[str], None], *, silent_seconds: float | None = None) -> None:
        """`say` is told after `silent_seconds`, by default `SILENT_SECONDS`."""
        self._say = say
        self._silent_seconds = SILENT_SECONDS if silent_seconds is None else silent_seconds
        self._watched = threading.get_ident()
        self._phase, self._began, self._told = "starting", time.monotonic(), 0
        self._longest: dict[str, float] = {}
        self._step = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def enter(self, phase: str, *, step: int) -> None:
        """The training now does `phase`, such as ``reading rows``, of `step`."""
        now = time.monotonic()
        self._longest[self._phase] = max(self._longest.get(self._phase, 0.0), now - self._began)
        self._phase, self._began, self._told, self._step = phase, now, 0, step

    def _watch(self) -> None:
        while not self._ended.wait(self._silent_seconds / _LOOKS_PER_SILENCE):
            phase, waited = self._phase, time.monotonic() - self._began
            patience = max(self._silent_seconds, _TIMES_LONGEST * self._longest.get(phase, 0.0))
            if waited > patience * 2**self._told:  # told after 10, 20, 40 minutes …
                self._told += 1
                self._say(
                    f"No step for {_duration(waited)}; since then: {phase} (step {self._step}), at {self._place()}. "
                    f"Training is not ended by this; end it with Ctrl-C or SIGTERM, twice if once does not do."
                )

    def _place(self) -> str:
        """Where the watched thread is: the innermost line of this package's own that it is in."""
        frame: FrameType | None = sys._current_frames().get(self._watched)
        package = str(Path(__file__).parents[1])
        while frame is not None and frame.f_back is not None and not frame.f_code.co_filename.startswith(package):
            frame = frame.f_back
        return "an unknown place" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
