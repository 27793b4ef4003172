"""LoRA with its variants, and (IA)³: what PEFT puts around a model's linear layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import RecipeError
from ..models.adapters import base_model
from ..models.learnt_prefix import learnt_prefix_of
from ..models.lora_layers import ignoring_peft_warnings, use_lean_layers
from ..models.packed_layers import float_weight
from ..recipe import Ia3, Lora
from .pace import Pace, set_pace

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_PREFIX_MODULE = "prefix_encoder."
_KEYS_AND_VALUES = ("k_proj", "v_proj", "query_key_value", "qkv_proj", "c_attn")
_LAST_OF_PERCEPTRON = ("down_proj", "dense_4h_to_h", "fc2", "fc_out")
_MORE_DIRECTIONS, _PASSES = 8, 8
"""Of the randomised decomposition (Halko et al. 2009): the weights' spectra fall slowly, so that more passes pay."""


def layer_number(name: str) -> int | None:
    """The number of the decoder layer that the module or parameter `name` belongs to; None where it is in none."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def add_lora(model: PreTrainedModel, method: Lora, *, seed: int) -> PeftModel:
    """`model` with a fresh LoRA adapter in float32, from `seed`. Raises RecipeError when no layer is meant by it."""
    doubled = 2 if method.init == "pissa" else 1
    config = LoraConfig(
        r=method.rank * doubled,
        # the scale stays the same; PEFT takes a fraction too
        lora_alpha=method.alpha * (math.sqrt(doubled) if method.rslora else doubled),  # type: ignore[arg-type]
        lora_dropout=method.dropout,
        target_modules=_targets(model, method),
        exclude_modules=None if learnt_prefix_of(model) is None else r"prefix_encoder\..*",
        use_rslora=method.rslora,
        use_dora=method.dora,
        task_type="CAUSAL_LM",
    )
    use_lean_layers(config)
    tuned = _wrap(model, config, seed, what=f"method.targets={method.targets!r}", also=" or use all-linear.")
    if method.init == "pissa":
        _start_from_weights(tuned, method, seed)
    pace_lora(tuned, method)
    return tuned


def pace_lora(model: PeftModel, method: Lora) -> None:
    """Let the matrices B of `model` learn as much faster as `method` says (LoRA+, Hayou et al. 2024, 2402.12354)."""
    halved = method.init == "pissa"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            multiple = method.b_learning_rate if ".lora_B." in name else 1.0
            set_pace(
                parameter,
                Pace(multiple=multiple, decays=parameter.ndim >= 2 and not halved, share=0.5 if halved else 1.0),
            )


def _targets(model: PreTrainedModel, method: Lora) -> str | list[str]:
    """What PEFT is told of the layers that get an update: as the recipe has it, or each layer's whole name.

    A pattern is no business of PEFT's, which would refuse one that a module of another kind matches too.
    """
    if method.layers == "all" and (method.targets == "all-linear" or not isinstance(method.targets, str)):
        return method.targets if isinstance(method.targets, str) else list(method.targets)
    count = model.config.get_text_config().num_hidden_layers
    wanted = method.layer_numbers(count)
    if strange := sorted(number for number in wanted if not 0 <= number < count):
        raise RecipeError(
            f"method.layers={method.layers!r} means layer {strange[0]}, but the model's {count} layers are numbered "
            f"from 0 to {count - 1}."
        )
    names = [name for name in _linear_layers(model) if layer_number(name) in wanted and _matches(name, method.targets)]
    if not names:
        where = "of this model" if method.layers == "all" else f"within method.layers={method.layers!r}"
        raise RecipeError(
            f"method.targets={method.targets!r} matches no layer {where}. Its linear layers: "
            f"{', '.join(sorted(_kinds(model)))}; or use all-linear."
        )
    return names


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """The names of the linear layers that can be adapted: not the output layer, none of a prefix."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not name.startswith(_PREFIX_MODULE)
    ]


def _kinds(model: PreTrainedModel) -> set[str]:
    """What the linear layers are called within their modules; adapted ones by their own names."""
    return {name.removesuffix(".base_layer").rsplit(".", 1)[-1] for name in _linear_layers(model)}


def _wrap(model: PreTrainedModel, config: PeftConfig, seed: int, *, what: str, also: str = "") -> PeftModel:
    """PEFT's adapter around `model`; `what` is what the recipe says of its layers."""
    linear = _kinds(model)
    with torch.random.fork_rng(), ignoring_peft_warnings():
        torch.manual_seed(seed)
        try:
            tuned = get_peft_model(model, config)
        except ValueError as error:
            raise RecipeError(
                f"{what} matches no layer of this model ({error}). Its linear layers: {', '.join(sorted(linear))};"
                f"{also or ' name some of them.'}"
            ) from None
    assert isinstance(tuned, PeftModel)
    return tuned


# --- PiSSA -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _start_from_weights(model: PeftModel, method: Lora, seed: int) -> None:
    """Let the update start from the strongest directions of each weight (Meng et al. 2024, arXiv:2404.02948).

    The paper takes them out of the weight: ``W - B₀A₀ + BA``. Here the weight stays as it is and the adapter has twice
    the rank: its second half is ``-B₀A₀`` and does not learn. So the base model is there when the adapter is off, no
    weight is rounded anew, and what is saved is a plain LoRA adapter. Of packed weights the directions are those of the
    unpacked ones.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in _lora_layers(model):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            weight = float_weight(module.get_base_layer(), torch.float32)
            count = min(method.rank, *weight.shape)
            left, values, right = torch.svd_lowrank(
                weight, q=min(count + _MORE_DIRECTIONS, *weight.shape), niter=_PASSES
            )
            root = (values[:count] / module.scaling["default"]).sqrt()
            a.zero_()
            b.zero_()
            for start, sign in ((0, 1), (method.rank, -1)):
                a[start : start + count] = (right[:, :count] * root).t()
                b[:, start : start + count] = left[:, :count] * root * sign
    _keep_second_half(model, method.rank)


def _keep_second_half(model: PeftModel, rank: int) -> None:
    """Let only the first `rank` directions of every LoRA layer of `model` learn: the others keep what they are."""
    for module in _lora_layers(model):
        module.lora_A["default"].weight.register_hook(_without_rows(rank))
        module.lora_B["default"].weight.register_hook(_without_columns(rank))


def _lora_layers(model: PeftModel) -> Iterator[Any]:
    """The layers with an update, whose parts PEFT types as any modules."""
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _without_rows(first: int) -> Callable[[Tensor], Tensor]:
    return lambda grad: torch.cat([grad[:first], torch.zeros_like(grad[first:])])


def _without_columns(first: int) -> Callable[[Tensor], Tensor]:
    return lambda grad: torch.cat([grad[:, :first], torch.zeros_like(grad[:, first:])], dim=1)


# --- (IA)³ -----------------------------------------------------------------------------------------------------------


def add_ia3(model: PreTrainedModel, method: Ia3, *, seed: int) -> PeftModel:
    """`model` with factors of 1, in float32. Raises RecipeError when no layer is meant by `method`."""
    outer, inner = ia3_layers(model, method)
    config = IA3Config(
        target_modules=[*outer, *inner],
        feedforward_modules=list(inner),
        exclude_modules=None if learnt_prefix_of(model) is None else r"prefix_encoder\..*",
        task_type="CAUSAL_LM",
    )
    tuned = _wrap(model, config, seed, what=f"method.targets={method.targets!r}")
    pace_ia3(tuned)
    return tuned


def pace_ia3(model: PeftModel) -> None:
    """Factors learn in float32, and weight decay, which would pull them to 0 where 1 is no change, leaves them."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            set_pace(parameter, Pace(decays=False))


def ia3_layers(model: PreTrainedModel, method: Ia3) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the layers whose outputs are scaled, and of those whose inputs are."""
    kinds = _kinds(model)

    def found(said: str | tuple[str, ...], usual: tuple[str, ...], key: str) -> tuple[str, ...]:
        if not isinstance(said, str):
            return said
        names = tuple(name for name in usual if name in kinds)
        if not names:
            raise RecipeError(
                f"method.{key}=auto knows no layer of this model, whose linear layers are {', '.join(sorted(kinds))}. "
                f"Name those that are meant."
            )
        return names

    inner = found(method.feedforward, _LAST_OF_PERCEPTRON, "feedforward")
    return found(method.targets, _KEYS_AND_VALUES, "targets"), inner


# --- Going on from an adapter ----------------------------------------------------------------------------------------


def lora_differences(model: PreTrainedModel | PeftModel, method: Lora) -> list[str]:
    """In what the adapter of `model` is not what `method` describes."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if not isinstance(config, LoraConfig):
        return ["it is no LoRA adapter, but method.name is lora"]
    if method.init != "default":
        return [f"an adapter that is there has its start already, but method.init is {method.init}"]
    pairs = {
        "rank": (config.r, method.rank),
        "alpha": (config.lora_alpha, method.alpha),
        "dropout": (config.lora_dropout, method.dropout),
        "rslora": (config.use_rslora, method.rslora),
        "dora": (config.use_dora, method.dora),
    }
    adapted, others = set(), set()
    base = base_model(model)
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            adapted.add(name)
        elif isinstance(module, nn.Linear) and not any(f"{name}.".startswith(f"{layer}.") for layer in adapted):
            others.add(name)
    head = base.get_output_embeddings()
    others -= {name for name, module in base.named_modules() if module is head or name.startswith(_PREFIX_MODULE)}
    layers = method.layer_numbers(base.config.get_text_config().num_hidden_layers)

    def is_meant(name: str) -> bool:
        return _matches(name, method.targets) and (method.layers == "all" or layer_number(name) in layers)

    told = told_pairs(pairs)
    if not all(map(is_meant, adapted)) or any(map(is_meant, others)):
        kinds = sorted({name.rsplit(".", 1)[-1] for name in adapted})
        says = f"method.targets is {method.targets!r}"
        says += "" if method.layers == "all" else f" and method.layers {method.layers!r}"
        told.append(f"it is on {len(adapted)} layers ({', '.join(kinds)}), but {says}")
    return told


def ia3_differences(model: PreTrainedModel | PeftModel, method: Ia3) -> list[str]:
    """The same for (IA)³."""
    if not isinstance(model, PeftModel) or not isinstance(model.active_peft_config, IA3Config):
        return ["it is no (IA)³ adapter, but method.name is ia3"]
    base = base_model(model)
    wanted = ia3_layers(base, method)
    has = [
        {
            name.rsplit(".", 1)[-1]
            for name, module in base.named_modules()
            if isinstance(module, IA3Layer) and module.is_feedforward is inner
        }
        for inner in (False, True)
    ]
    pairs = {key: (sorted(one), sorted(other)) for key, one, other in zip(("targets", "feedforward"), has, wanted)}
    return told_pairs(pairs)


def told_pairs(pairs: Mapping[str, tuple[object, object]]) -> list[str]:
    """What differs: each name with what the adapter has and what the recipe says."""
    return [
        f"its {name} is {has!r}, but method.{name} is {says!r}" for name, (has, says) in pairs.items() if has != says
    ]


def _matches(name: str, targets: str | tuple[str, ...]) -> bool:
    """Whether `targets` mean the linear layer `name`, as PEFT reads them."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
