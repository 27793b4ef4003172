"""Ray begun on this machine, or a Ray cluster joined; what its machines have to give.

Ray says nothing on the screen, and sends nothing to its makers.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RunError

LOCAL = "local"
"""The address that begins Ray on this machine alone, whatever cluster may run on it."""

_OBJECT_STORE_BYTES = 100 << 20
"""Rows and answers go through files, so that little goes through here."""

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray will do in time; until then it warns
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # a busy machine takes more than Ray's 60 to load torch
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # recipes name files relative to where the command was given
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a machine of the cluster has to give."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """How many workers there are, and what each has."""

    workers: int
    cpus: int
    gpus: float


def require_ray() -> None:
    """Raise RunError when Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise RunError("Ray is not installed here, which --ray needs: pip install 'weitiao[ray]'")


@contextmanager
def joined_cluster(address: str | None, *, workers: int | None, said: Path) -> Iterator[Any]:
    """The module `ray`, joined to the cluster at `address`; left at the end.

    What Ray prints meanwhile, such as pages about each process of its own that dies, goes to the file `said`.

    Args:
        address: None: RAY_ADDRESS where that is set, as ``ray job submit`` does, else this machine alone, where Ray
            is begun and ended.
        workers: how many are wanted: on this machine alone, Ray is told of so many cores at least.
        said: where Ray's lines go; they are added to what is there.

    Raises:
        RunError: Ray is not installed, or there is no such cluster.
    """
    require_ray()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    own = address == LOCAL
    if own:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray listens on every interface; now only to who has the token
    import ray  # only now: it reads these when it is loaded

    logging.getLogger("ray").setLevel(logging.ERROR)
    local: dict[str, Any] = {
        "num_cpus": max(os.cpu_count() or 1, workers or 1),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    with said.open("a", encoding="utf-8") as stream, redirect_stdout(stream):
        _begin(ray, address, local if own else {})
        try:
            yield ray
        finally:
            ray.shutdown()


def _begin(ray: Any, address: str, local: dict[str, Any]) -> None:
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
            **local,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = "begun on this machine" if local else f"joined at {address}"
        raise RunError(
            f"Ray could not be {where}: {str(error).strip().splitlines()[0]} Start a cluster with ray start --head, "
            f"and give its --address."
        ) from None


def machines_of(ray: Any) -> list[Machine]:
    """The machines of the cluster that are alive."""
    return [
        Machine(
            name=node["NodeManagerHostname"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def share_machines(machines: Sequence[Machine], *, workers: int | None, gpus_per_worker: float | None) -> Share:
    """What each of `workers` gets; None: one for each GPU, or for each machine where there are none.

    The cores are those of the fullest machine divided by its workers, so that all workers have room at once.

    Raises:
        RunError: there is no room for so many.
    """
    gpus = gpus_per_worker if gpus_per_worker is not None else float(any(one.gpus >= 1 for one in machines))
    room = sum(int(one.gpus / gpus) for one in machines) if gpus else None
    have = ", ".join(f"{one.name}: {one.cpus:g} cores and {one.gpus:g} GPUs" for one in machines)
    if workers is None:
        workers = room if room is not None else sum(one.cpus >= 1 for one in machines)
    if not workers or (room is not None and workers > room):
        raise RunError(
            f"There is no room in the cluster for {workers or 'any'} workers with {gpus:g} GPUs each. It has {have}. "
            f"Ask for fewer with --workers, or for a part of a GPU each with --gpus-per-worker 0.5."
        )
    most = int(max(one.cpus for one in machines))
    for cpus in range(most, 0, -1):
        if sum(_room(one, cpus, gpus) for one in machines) >= workers:
            return Share(workers=workers, cpus=cpus, gpus=gpus)
    raise RunError(
        f"There is no room in the cluster for {workers} workers with a core each. It has {have}. Ask for fewer with "
        f"--workers."
    )


def _room(machine: Machine, cpus: int, gpus: float) -> int:
    """How many workers with so many cores and GPUs `machine` has room for."""
    by_cpus = int(machine.cpus // cpus)
    return min(by_cpus, int(machine.gpus / gpus)) if gpus else by_cpus
