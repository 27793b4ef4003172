"""A training that outlives the terminal it was started in: what it says goes to a file from then on."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class LastingStream(io.TextIOBase):
    """Writes to `stream` until that cannot be written any more, such as a terminal that was closed; then to `log`."""

    def __init__(self, stream: TextIO, log: Path) -> None:
        self._stream, self._log = stream, log

    @property
    def encoding(self) -> str:  # type: ignore[override]  # an attribute there, which a class cannot know beforehand
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._move()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._move()

    def _move(self) -> None:
        """Put the file into the place of the terminal; what is still in the stream's buffer goes there too."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, self._stream.fileno())
        os.close(file)
        self._stream.flush()


@contextmanager
def outliving_terminal(log: Path) -> Iterator[None]:
    """Within this the end of the terminal (SIGHUP) is no end of the program, and its words go to `log` from then on."""
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = LastingStream(stdout, log), LastingStream(stderr, log)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN) if "SIGHUP" in signal.Signals.__members__ else None
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        if before is not None:
            signal.signal(signal.SIGHUP, before)
