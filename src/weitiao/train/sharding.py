"""A model spread over the processes that train it: each holds a part of every layer's weights (FSDP2).

A layer is put together when it is computed, forwards and backwards, and taken apart again; the embedding, the output
layer and what else lies outside the layers are put together for a whole pass. A small adapter stays whole in every
process, and its gradients are summed as ever; weights of the model's own that learn are spread like all others, with
their gradients, and the optimiser's state follows them.

Putting a layer together is a message to all processes. So all compute as many passes (`step_batches` adds empty ones),
and in generation, where nobody knows how many there will be, one that is done keeps the others company
(`in_company`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..errors import ModelError, RunError
from ..models.own_weights import changed_weights_of, computing_dtype
from ..models.prompt_tuning import prompt_encoder_of
from ..recipe import Train
from ..tuning.pace import pace_of, set_pace
from .ranks import Ranks


def spreads(settings: Train, ranks: Ranks) -> bool:
    """Whether a training by `ranks` spreads its model over them: a process alone has nobody to share with."""
    return settings.shard == "fsdp" and ranks.size > 1


def shard_model(root: nn.Module, model: PreTrainedModel, settings: Train, ranks: Ranks, device: torch.device) -> None:
    """Spread the weights of `model` over `ranks`, onto `device`, layer by layer; parameters become `DTensor`s.

    Args:
        root: the module around `model` whose forward pass is a pass of training.
        model: the model with what learns in place; on the CPU, or on `device` already.
        settings: the recipe's `train` part.
        ranks: the processes, each with the same model.
        device: where each computes.

    Raises:
        ModelError, RunError: as `require_spreadable` does.
    """
    require_spreadable(model, settings, device)
    layers, own = layers_of(model), changed_weights_of(model) is not None
    whole = set() if own else {parameter for parameter in root.parameters() if parameter.requires_grad}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    paces = {name: pace_of(parameter) for name, parameter in root.named_parameters()}
    mesh = init_device_mesh(device.type, (ranks.size,))
    for module in [*layers, root]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for module in [*layers, root]:
        assert isinstance(module, FSDPModule)
        # the weights of a step's tokens sum to 1 over all processes, so gradients are summed and not averaged
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
    for name, parameter in root.named_parameters():
        set_pace(parameter, paces[name])


def require_spreadable(model: PreTrainedModel, settings: Train, device: torch.device) -> None:
    """Return when `model`, with what learns in place, can be spread over processes that compute on `device`.

    Raises:
        ModelError: it does not say what its layers are.
        RunError: something learns that cannot be learnt so; the sentence says what instead.
    """
    if not layers_of(model):
        raise ModelError(
            f"{type(model).__name__} does not say what its layers are, so it cannot be spread over processes. Set "
            f"train.shard: none."
        )
    if prompt_encoder_of(model) is not None:
        raise RunError(
            "Learnt tokens (method.name ptuning_v1 and prompt_tuning) learn through the keys and values inside of the "
            "layers, and these are taken apart by then where weights are spread over processes. Tune by lora or "
            "ptuning_v2, or set train.shard: none."
        )
    if changed_weights_of(model) is None:
        return
    if device.type == "cuda" and computing_dtype(model) == torch.float16:
        raise RunError(
            "Weights that learn in float16 need a loss scale, which is not kept for weights spread over processes. "
            "Set model.dtype: bfloat16, or train.shard: none."
        )
    if settings.optimiser != "adamw":
        raise RunError(
            f"train.optimiser={settings.optimiser} is not for weights spread over processes. Set train.optimiser: "
            f"adamw, whose state is spread with them, or train.shard: none."
        )


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of `model`, in the order in which it computes them."""
    names = set(model._no_split_modules or ())
    spread = {f"FSDP{name}" for name in names}  # how torch calls the class of what is spread
    return [module for module in model.get_decoder().modules() if type(module).__name__ in names | spread]


def check_order(root: nn.Module, model: PreTrainedModel, batch: object) -> None:
    """Prove on one pass that a call of the decoder computes its layers in turn, each once: `in_company` relies on it.

    Raises:
        ModelError: it does not.
    """
    layers = layers_of(model)
    calls: list[list[int]] = []  # learnt tokens before the rows take a call of their own

    def begin(_module: nn.Module, _inputs: object) -> None:
        calls.append([])

    def note(number: int) -> Callable[[nn.Module, object], None]:
        return lambda _module, _inputs: calls[-1].append(number)

    hooks = [layer.register_forward_pre_hook(note(number)) for number, layer in enumerate(layers)]
    hooks.append(model.get_decoder().register_forward_pre_hook(begin))
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            root(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if any(seen != list(range(len(layers))) for seen in calls):
        raise ModelError(
            f"{type(model).__name__} does not compute its layers one after the other ({calls}), so it cannot be spread "
            f"over processes. Set train.shard: none."
        )


@contextmanager
def ends_together(root: nn.Module) -> Iterator[None]:
    """Within this, what lies outside the layers is whole, so that the model inside `root` can be called by itself."""
    if not isinstance(root, FSDPModule):
        yield
        return
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


@contextmanager
def in_company(model: PreTrainedModel, ranks: Ranks) -> Iterator[None]:
    """Within this each process calls `model` as often as it needs, without gradients; it ends when all are done.

    Before each call all tell each other who calls. Those that are done hand over their parts of the layers until nobody
    does any more.
    """
    layers = _spread_layers(model)
    if not layers:
        yield
        return

    def tell(_module: nn.Module, _inputs: object) -> None:  # what a hook returns would take the inputs' place
        _tell(ranks, 1)

    hook = model.get_decoder().register_forward_pre_hook(tell)
    try:
        yield
    finally:
        hook.remove()
    while _tell(ranks, 0):
        for layer in layers:
            layer.unshard()
            layer.reshard()


def _tell(ranks: Ranks, calls: int) -> bool:
    """Whether any process calls the model."""
    return bool(ranks.add(torch.tensor(calls)))


def _spread_layers(model: PreTrainedModel) -> list[FSDPModule]:
    return [module for module in model.get_decoder().modules() if isinstance(module, FSDPModule)]


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """The norm of all gradients of `parameters`, which are scaled down to `limit`; each is spread, or all are whole."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(parameters, limit, whole)
    return whole


def whole_weights(model: PreTrainedModel, ranks: Ranks) -> dict[str, Tensor] | None:
    """The spread weights that learn, put together on the CPU of the first process, in the dtype that they compute in.

    None where none are spread; empty in the other processes. One tensor at a time is whole on the device.
    """
    changed, dtype = changed_weights_of(model), computing_dtype(model)
    if changed is None or not learns_spread(model):
        return None
    found = {}
    own = {name.replace("parametrizations.", "").removesuffix(".original"): p for name, p in model.named_parameters()}
    for name in changed.names:
        parameter = own[name]
        assert isinstance(parameter, DTensor)
        tensor = parameter.full_tensor().detach()
        if ranks.is_first:
            found[name] = tensor.to(dtype).cpu()
    return found


def is_spread(module: nn.Module) -> bool:
    """Whether weights of `module` are spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def learns_spread(module: nn.Module) -> bool:
    """Whether weights of `module` that learn are spread over processes, and not an adapter's alone, which are whole."""
    return any(isinstance(parameter, DTensor) and parameter.requires_grad for parameter in module.parameters())
