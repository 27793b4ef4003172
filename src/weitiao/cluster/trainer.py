"""What of a training is Ray Train's: the workers, their GPUs, and that all are started anew when one dies.

How they train together is `train.ranks`, as under torchrun: Ray's own process group is not made. Loads Ray.
"""

from __future__ import annotations

from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.backend import Backend
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig
from ray.util import get_node_ip_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import RunError
from .session import Share
from .train_worker import Order, Place, free_address, require_seen, train_together


class _NoGroup(Backend):  # type: ignore[misc]  # ray is not looked into
    """Sets up nothing but that a machine's workers see each other's GPUs, as processes under torchrun do."""

    share_cuda_visible_devices = True


class _OwnGroup(TorchConfig):  # type: ignore[misc]
    """The workers join each other by themselves."""

    @property
    def backend_cls(self) -> type[_NoGroup]:
        return _NoGroup


def make_trainer(order: Order, share: Share, *, max_failures: int) -> Any:
    """Ray Train's trainer for `order`; its workers are started anew so often at most."""
    resources = {"CPU": float(share.cpus), **({"GPU": share.gpus} if share.gpus else {})}
    return TorchTrainer(
        _work,
        train_loop_config={"order": order},
        torch_config=_OwnGroup(),
        scaling_config=ScalingConfig(num_workers=share.workers, use_gpu=share.gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name="ray",
            storage_path=str(order.exchange.folder),
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _work(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    order, context = config["order"], get_context()
    rank = context.get_world_rank()
    first = free_address(order.exchange, get_node_ip_address()) if rank == 0 else None
    host, port, restarts = broadcast_from_rank_zero(first)
    place = Place(
        rank=rank,
        size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_size=context.get_local_world_size(),
        nodes=1 if context.get_local_world_size() == context.get_world_size() else 2,
        address=host,
        port=port,
        restarts=restarts,
    )
    train_together(order, place)


def require_seen_everywhere(ray: Any, order: Order) -> None:
    """Raise RunError when a machine does not see what the workers read and write."""
    look = ray.remote(require_seen)
    found = [
        look.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        ).remote(order.exchange, order.folder)
        for node in ray.nodes()
        if node["Alive"]
    ]
    for sentence in ray.get(found):
        if sentence:
            raise RunError(sentence)
