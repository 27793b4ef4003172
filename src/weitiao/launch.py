"""Whether this process is one of several that a launcher, such as torchrun, started to train one run together.

What the launcher says stands in the environment; nothing is joined here, and torch is not needed to read it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from .errors import RunError

OWN_LAUNCH = "WEITIAO_LAUNCH"
"""What names the launch where `weitiao train --ray` started the processes."""

_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")

_NOT_TAKEN = {
    "ACCELERATE_MIXED_PRECISION": ("no", "say model.dtype in the recipe"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "say train.compile in the recipe"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "train.tokens_per_pass in the recipe cuts steps into passes"),
    "ACCELERATE_USE_FSDP": ("false", "say train.shard=fsdp in the recipe"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "name its file as train.deepspeed in the recipe"),
}
"""What accelerate's own settings may say, by the value that asks for nothing, and what to do instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What a launcher told this process."""

    rank: int
    """This process's number among all, from 0."""
    size: int
    """How many processes there are, those on other machines included."""
    local_rank: int
    """This process's number among those on this machine."""
    restarts: int
    """How often the launcher has started the processes anew, after one of them had ended."""
    key: str
    """The same for all restarts of one launch, and another for every other launch; "" where none is known."""


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """What the launcher of this process told it; None for a process that was started by itself.

    Raises:
        RunError: `environ` speaks of several processes, but not as torchrun and accelerate do.
    """
    size, known = environ.get("WORLD_SIZE"), [name for name in ("RANK", "LOCAL_RANK") if name in environ]
    for name in _OF_MPI if size is None else ():
        if int(environ.get(name, "1")) > 1:
            raise RunError(
                f"{name} is {environ[name]}: processes started by mpirun do not find each other, and each would train "
                f"the whole run. Start them with torchrun or accelerate launch."
            )
    if size is None or (size == "1" and not known):
        return None
    if len(known) < 2 or "MASTER_ADDR" not in environ:
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR") if name not in environ]
        raise RunError(
            f"WORLD_SIZE is {size}, but {' and '.join(missing)} are not set. Start the processes with torchrun or "
            f"accelerate launch, or unset WORLD_SIZE to train in this process alone."
        )
    for name, (plain, instead) in _NOT_TAKEN.items():
        if environ.get(name, plain).lower() != plain:
            raise RunError(f"accelerate launch says {name}={environ[name]}, which weitiao does not take: {instead}.")
    return Launch(
        rank=int(environ["RANK"]),
        size=int(size),
        local_rank=int(environ["LOCAL_RANK"]),
        restarts=int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        key=_key(environ),
    )


def require_alone(verb: str) -> None:
    """Raise RunError when a launcher started several processes to do `verb`, which one process does.

    All of them would do the whole of it, and write the same files.
    """
    launch = read_launch()
    if launch is not None and launch.size > 1:
        raise RunError(
            f"weitiao {verb} is done by one process, but {launch.size} were launched (WORLD_SIZE={launch.size}). Run "
            f"it without torchrun or accelerate launch; only weitiao train takes several processes."
        )


def _key(environ: Mapping[str, str]) -> str:
    """What our own launcher says; else of one machine the launcher's process, of several the name of their launch."""
    if own := environ.get(OWN_LAUNCH):
        return own
    if environ.get("GROUP_WORLD_SIZE", "1") == "1":
        launcher = psutil.Process(os.getppid())
        return f"{platform.node()}/{launcher.pid}/{launcher.create_time():.0f}"
    name = environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name
