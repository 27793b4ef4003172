"""One of the workers that Ray starts to train a run together; it trains as a process under torchrun does.

What it has to say goes through `Exchange`, a folder that all machines see.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from ..errors import LostProcessError, RunError, WeitiaoError
from ..launch import OWN_LAUNCH, read_launch
from ..recipe import Recipe
from ..runs import write_json, write_text
from ..stopping import Stopped, StopSignals
from ..train.ranks import joined
from ..tune import tune_model

_LOOK_SECONDS = 0.5
_SHOW_SECONDS = 5.0
"""Until a file written on one machine is seen on another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """A folder through which the workers and who started them tell each other something."""

    folder: Path
    key: str
    """Another one for every command."""

    @property
    def said(self) -> Path:
        """What the first worker prints."""
        return self.folder / "said.txt"

    @property
    def ray(self) -> Path:
        """What Ray prints."""
        return self.folder / "ray.txt"

    @property
    def starts(self) -> Path:
        """A line for each time that the workers were started."""
        return self.folder / "starts"

    @property
    def _token(self) -> Path:
        return self.folder / "key"

    @property
    def _stop(self) -> Path:
        return self.folder / "stop"

    @property
    def _end(self) -> Path:
        return self.folder / "end.json"

    def make(self) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True)
        write_text(self._token, self.key)

    def is_seen(self) -> bool:
        """Whether this machine sees the folder that was made."""
        return self._token.is_file() and self._token.read_text(encoding="utf-8") == self.key

    def ask_to_stop(self, signal_name: str) -> None:
        """Tell the workers that a signal asked for the end."""
        write_text(self._stop, signal_name)

    def asked_to_stop(self) -> str:
        """The name of the signal; "" before one came."""
        return self._stop.read_text(encoding="utf-8") if self._stop.exists() else ""

    def end(self, kind: str, text: str = "") -> None:
        """Tell how the training ended: ``done``, ``stopped`` by a signal, or with an ``error``."""
        write_json(self._end, [kind, text])

    def ended(self) -> tuple[str, str] | None:
        """What `end` was told; None as long as it was not."""
        if not self._end.exists():
            return None
        kind, text = json.loads(self._end.read_text(encoding="utf-8"))
        return kind, text


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What the workers are to train."""

    recipe: Recipe
    resume: str | None
    runs: Path
    folder: Path
    """The working directory, to which the recipe's paths are relative."""
    exchange: Exchange
    width: int
    """Of the lines that are printed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a worker stands among the others."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    nodes: int
    address: str
    """Of the first worker's machine."""
    port: int
    restarts: int


def free_address(exchange: Exchange, host: str) -> tuple[str, int, int]:
    """For the first worker: its address, a free port of it, and how often workers were started before."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = int(probe.getsockname()[1])
    with exchange.starts.open("a+", encoding="utf-8") as stream:
        stream.write(f"{platform.node()} {os.getpid()}\n")
        stream.seek(0)
        return host, port, len(stream.readlines()) - 1


def train_together(order: Order, place: Place) -> None:
    """Train the run as worker `place`; returns when there is nothing to try again.

    Raises:
        LostProcessError, RuntimeError: another worker has ended, so that all are to be started anew.
    """
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.size),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_size),
        GROUP_WORLD_SIZE=str(place.nodes),
        MASTER_ADDR=place.address,
        MASTER_PORT=str(place.port),
        TORCHELASTIC_RESTART_COUNT=str(place.restarts),
        **{OWN_LAUNCH: order.exchange.key},
    )
    os.chdir(order.folder)
    exchange = order.exchange
    if exchange.ended() is not None:
        return  # another worker told an error, and what was left of the others died of it
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(exchange.said.open("a", encoding="utf-8", buffering=1)) if place.rank == 0 else None
        console = Console(file=file, quiet=file is None, width=order.width, markup=False, emoji=False, highlight=False)
        if place.restarts:
            console.print(f"A worker ended; all were started anew ({place.restarts}).")
        stops = StopSignals(lambda text: None)
        stack.enter_context(_following(exchange, stops))
        try:
            with joined(read_launch()) as ranks:
                try:
                    resume = False if order.resume is None else order.resume
                    tune_model(order.recipe, resume=resume, runs=order.runs, console=console, stops=stops, ranks=ranks)
                except LostProcessError:
                    raise
                except WeitiaoError as error:
                    exchange.end("error", str(error))
                    raise
                except Stopped as stopped:
                    exchange.end("stopped", stopped.signal_name)
                    raise
        except LostProcessError:
            raise
        except (WeitiaoError, Stopped):
            _leave()  # the others wait for this one, whose process lives on
            return  # told; Ray need not start anything anew
        except SystemExit:
            _wait_for_end(exchange)
            return
        if place.rank == 0:
            exchange.end("done")


def _leave() -> None:
    """Close the connections to the other workers, as the end of the process would."""
    if dist.is_initialized():
        # in a thread, since with messages under way this may wait for a worker that is gone
        thread = threading.Thread(target=dist.destroy_process_group, name="weitiao-leave", daemon=True)
        thread.start()
        thread.join(_SHOW_SECONDS)


def _wait_for_end(exchange: Exchange) -> None:
    """Return when another worker has told the end; raise RuntimeError when none has, since then one has died."""
    until = time.monotonic() + _SHOW_SECONDS
    while time.monotonic() < until:
        if exchange.ended() is not None:
            return
        time.sleep(_LOOK_SECONDS)
    raise RuntimeError("another worker has ended")


@contextlib.contextmanager
def _following(exchange: Exchange, stops: StopSignals) -> Iterator[None]:
    """Within this `stops` is asked for the end as soon as `exchange` is."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_SECONDS):
            if asked := exchange.asked_to_stop():
                stops.asked = asked
                return

    thread = threading.Thread(target=look, name="weitiao-stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def require_seen(exchange: Exchange, folder: Path) -> str:
    """In a sentence what this machine does not see of the run, "" for nothing."""
    for what, path, seen in (
        ("the runs", exchange.folder.parent, exchange.is_seen()),
        ("the working directory", folder, folder.is_dir()),
    ):
        if not seen:
            return (
                f"{platform.node()} does not see {what} in {path} as the machine does where the command was given. Put "
                f"rows, model and runs on storage that all machines see under the same path."
            )
    return ""


def raise_end(ended: tuple[str, str]) -> None:
    """Raise what ended the training, unless it is done.

    Raises:
        RunError: the sentence of a worker's error.
        Stopped: a signal asked for the end.
    """
    kind, text = ended
    if kind == "error":
        raise RunError(text)
    if kind == "stopped":
        raise Stopped(text)
