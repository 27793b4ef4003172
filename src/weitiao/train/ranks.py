"""The processes that train one run together, and what they tell each other.

Each holds a whole copy of what learns. Of an optimiser step each computes some of the rows, with the weights that these
have in the whole step, so that gradients and losses are summed and never averaged; then all take the same step. The
first process alone writes and speaks. Everything here is nothing at all for a process that trains alone (`ALONE`).

Every method is called by all processes, in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from ..errors import LostProcessError, RunError, WeitiaoError
from ..launch import Launch
from ..models.sources import first_line
from ..stopping import Stopped

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""For what another process still has to do, such as writing a checkpoint to a slow disk; then all end. That a process
has ended is seen at once, without this."""

_BUCKET_NUMBERS = 1 << 23
"""Gradients travel in pieces of 32 MB: few enough messages, and one is summed while the next is put together."""

_SECONDS_TO_DIE = 2.0
"""The system closes the connections of a process that was killed a moment before it counts it as ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """One of `size` processes: number `rank`."""

    rank: int = 0
    size: int = 1
    store: Store | None = None
    """Where each process says who it is, so that one that has ended can be named."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def add(self, values: Tensor) -> Tensor:
        """The sum of all processes' `values`, which have the same shape; put into `values`."""
        if self.size > 1:
            with _talking(self):
                dist.all_reduce(values)
        return values

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make each parameter's gradient the sum of all processes'; one that none has a gradient of keeps none.

        Of parameters spread over the processes the gradients were summed when they were spread.
        """
        parameters = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        if self.size == 1 or not parameters:
            return
        had = self.add(torch.tensor([float(parameter.grad is not None) for parameter in parameters]))
        learnt = [parameter for parameter, count in zip(parameters, had.tolist(), strict=True) if count]
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad.contiguous() for one in learnt]
        for parameter, gradient in zip(learnt, gradients, strict=True):
            parameter.grad = gradient
        with _talking(self):
            sent = []
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
                sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
            for bucket, flat, work in sent:
                work.wait()
                for gradient, summed in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
                    gradient.copy_(summed.view_as(gradient))

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Give `tensors` the values that they have in the first process; not those spread over the processes."""
        if self.size > 1:
            with _talking(self), torch.no_grad():
                for tensor in (one for one in tensors if not isinstance(one, DTensor)):
                    whole = tensor.contiguous()
                    dist.broadcast(whole, src=0)
                    tensor.copy_(whole)

    def by_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, where alone it is called."""
        if self.size == 1:
            return make()
        # pickled by torch, between processes of one user that one launcher started
        told: list[T | None] = [make() if self.is_first else None]
        with _talking(self):
            dist.broadcast_object_list(told, src=0)
        return cast(T, told[0])

    def gather(self, value: T) -> list[T]:
        """All processes' values, in the order of their numbers."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        with _talking(self):
            dist.all_gather_object(values, value)
        return cast(list[T], values)

    def agree_to_stop(self, asked: str) -> str:
        """The name of a signal that asked one of the processes for the end, "" when none was asked.

        Signals come to each process at a time of its own; after this all stop at the same step, or none.
        """
        if self.size == 1:
            return asked
        number = torch.tensor([signal.Signals[asked].value if asked else 0])
        with _talking(self):
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if int(number) else ""

    @contextmanager
    def noticing_loss(self) -> Iterator[None]:
        """Turn what torch raises when another process ends in the middle of a pass into a LostProcessError.

        The layers of a model that is spread over processes are put together by messages that are not sent from here.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (_is_of_messages(error) or _ended_here(self)):
                raise
            raise LostProcessError(_describe_loss(self, first_line(error))) from None

    def require_same(self, values: Mapping[str, str]) -> None:
        """Raise RunError when a process has another text under one of the names in `values` than the first has."""
        all_values = self.gather(dict(values))
        for name in values:
            for rank, its in enumerate(all_values):
                if its[name] != all_values[0][name]:
                    raise RunError(
                        f"Process {rank} has other {name} than process 0 ({its[name]:.24}, not "
                        f"{all_values[0][name]:.24}). Give every machine the same files."
                    )


ALONE = Ranks()
"""A process that trains by itself."""


@contextmanager
def joined(launch: Launch | None) -> Iterator[Ranks]:
    """The process as one of those that were launched together, from here on; `ALONE` when none were.

    What ends one process ends all. It is told once: by the process it happened to, and where that one can say nothing
    any more, by the first that misses it. The others leave with the code that a user's error has.

    Raises:
        RunError: there is no GPU for this process.
        LostProcessError: another process has ended, and none has said so yet.
    """
    if launch is None:
        yield ALONE
        return
    backend = "gloo"
    if torch.cuda.is_available():
        if launch.local_rank >= torch.cuda.device_count():
            raise RunError(
                f"Process {launch.local_rank} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}. Start as many processes as there are GPUs."
            )
        torch.cuda.set_device(launch.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    found, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    # the launcher's store outlives the processes: what those before a restart told is not for these
    found = PrefixStore(f"weitiao/{launch.restarts}/{size}", found)
    store = PrefixStore("told", found)
    dist.init_process_group(backend, store=found, rank=rank, world_size=size, timeout=PATIENCE)
    _tell(store, f"process/{rank}", json.dumps([platform.node(), os.getpid()]))
    try:
        yield Ranks(rank=rank, size=size, store=store)
    except LostProcessError:
        if _told(store, "end") or not _tell_first(store, "lost"):
            raise SystemExit(2) from None
        raise
    except WeitiaoError as error:
        _tell(store, "end", "error")
        if not _tell_first(store, hashlib.sha256(str(error).encode()).hexdigest()):
            raise SystemExit(2) from None
        raise
    except Stopped as stopped:
        _tell(store, "end", stopped.signal_name)
        if rank > 0:
            raise SystemExit(stopped.exit_code) from None
        raise
    except BaseException as error:
        _tell(store, "end", type(error).__name__)
        raise
    # only here: after an error, with messages under way, this could wait for a process that is gone
    dist.destroy_process_group()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` in their order, those of one dtype together up to the size of a bucket."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(one.numel() for one in bucket) + tensor.numel() > _BUCKET_NUMBERS
        if bucket and (full or tensor.dtype != bucket[0].dtype or tensor.device != bucket[0].device):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def _talking(ranks: Ranks) -> Iterator[None]:
    """Turn what torch raises when another process has ended, or says nothing any more, into a LostProcessError."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(_describe_loss(ranks, first_line(error))) from None


def _is_of_messages(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "ProcessGroup"))


def _describe_loss(ranks: Ranks, seen: str) -> str:
    ended = _ended_here(ranks)
    if ended:
        which = " and ".join(f"process {rank} of {ranks.size} (pid {pid})" for rank, pid in ended)
        what = f"{which[0].upper()}{which[1:]} {'has' if len(ended) == 1 else 'have'} ended"
    else:
        what = (
            f"One of the {ranks.size} processes, none of this machine, has ended or says nothing any more ({seen:.200})"
        )
    return (
        f"{what}, so the others end too. What was saved stands whole. Go on with --resume, on any number "
        f"of processes; torchrun --max-restarts=N does so by itself."
    )


def _ended_here(ranks: Ranks) -> list[tuple[int, int]]:
    """Those of the processes on this machine that have ended: number and pid."""
    if ranks.store is None:
        return []
    until = time.monotonic() + _SECONDS_TO_DIE
    while True:
        known = [(rank, _told(ranks.store, f"process/{rank}")) for rank in range(ranks.size) if rank != ranks.rank]
        places = [(rank, *json.loads(text)) for rank, text in known if text]
        ended = [(rank, pid) for rank, node, pid in places if node == platform.node() and not _lives(pid)]
        if ended or time.monotonic() > until:
            return ended
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


# What the processes tell each other beside the training goes through the launcher's store. It may be gone with the
# process that held it: then nothing was told, and whoever asks speaks for itself.


def _tell(store: Store, key: str, text: str) -> None:
    with suppress(RuntimeError):
        store.set(key, text)


def _tell_first(store: Store, key: str) -> bool:
    """Whether no process has told `key` before."""
    with suppress(RuntimeError):
        return int(store.add(f"first/{key}", 1)) == 1
    return True


def _told(store: Store, key: str) -> str:
    """What was told under `key`; "" for nothing."""
    with suppress(RuntimeError):
        if store.check([key]):
            return store.get(key).decode()
    return ""
