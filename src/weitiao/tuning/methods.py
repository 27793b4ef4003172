"""Which parameters learn: a loaded model in, the same model with a method's trainable parameters out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from ..errors import RecipeError
from ..models.adapters import base_model, load_adapter
from ..models.lora_layers import ignoring_peft_warnings, use_lean_layers
from ..models.ptuning import attach_prefix, prefix_encoder_of
from ..models.quantized import QuantizedLinear
from ..recipe import Lora, PTuning


def add_adapter(model: PreTrainedModel, method: Lora | PTuning, *, seed: int) -> PreTrainedModel | PeftModel:
    """`model` with fresh trainable parameters in float32, everything else frozen.

    LoRA: a `PeftModel` around it. P-Tuning: the model itself, with a prefix. The parameters start from `seed` alone,
    whatever random numbers were drawn before.

    Raises:
        RecipeError: no layer of the model matches `method.targets`, or the model has a prefix that another one would
            take the place of.
        ModelError: the model cannot take a prefix.
    """
    own = prefix_encoder_of(model)
    if isinstance(method, PTuning):
        if own is not None:
            raise RecipeError(
                f"The model has a P-Tuning prefix of {own.num_virtual_tokens} tokens, which a fresh one would take the "
                f"place of. Name the model's folder as model.adapter too, to tune that prefix on; or tune by LoRA."
            )
        return attach_prefix(
            model,
            num_virtual_tokens=method.num_virtual_tokens,
            projection=method.projection,
            dropout=method.dropout,
            seed=seed,
        )
    targets = method.targets if isinstance(method.targets, str) else list(method.targets)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=targets,
        exclude_modules=None if own is None else r"prefix_encoder\..*",
        use_rslora=method.rslora,
        use_dora=method.dora,
        task_type="CAUSAL_LM",
    )
    use_lean_layers(config)
    with torch.random.fork_rng(), ignoring_peft_warnings():
        torch.manual_seed(seed)
        try:
            tuned = get_peft_model(model, config)
        except ValueError as error:
            linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
            raise RecipeError(
                f"method.targets={method.targets!r} matches no layer of this model ({error}). "
                f"Its linear layers: {', '.join(sorted(linear))}; or use all-linear."
            ) from None
    return tuned


def resume_adapter(model: PreTrainedModel, method: Lora | PTuning, folder: Path) -> PreTrainedModel | PeftModel:
    """`model` with the adapter in `folder` on it, trainable; everything else is frozen.

    Raises:
        ModelError: the folder holds no adapter of this model.
        RecipeError: the adapter is not of the kind that `method` describes; every difference is named.
    """
    tuned = load_adapter(model, folder)
    differences = (
        _prefix_differences(tuned, method) if isinstance(method, PTuning) else _lora_differences(tuned, method)
    )
    if differences:
        raise RecipeError(
            f"The adapter in {folder} cannot be tuned further as the recipe's method says: {'; '.join(differences)}. "
            f"Change the recipe's method, or leave model.adapter out to start afresh."
        )
    encoder = prefix_encoder_of(tuned) if isinstance(method, PTuning) else None
    if encoder is not None:
        encoder.dropout = method.dropout
        encoder.requires_grad_(True)
    else:
        assert isinstance(tuned, PeftModel)
        tuned.set_requires_grad("default", True)
    return tuned


def _prefix_differences(model: PreTrainedModel | PeftModel, method: PTuning) -> list[str]:
    encoder = prefix_encoder_of(model)
    if isinstance(model, PeftModel) or encoder is None:
        return ["it is no P-Tuning prefix, but method.name is ptuning_v2"]
    pairs = {
        "num_virtual_tokens": (encoder.num_virtual_tokens, method.num_virtual_tokens),
        "projection": (encoder.projection, method.projection),
    }
    return _told(pairs)


def _lora_differences(model: PreTrainedModel | PeftModel, method: Lora) -> list[str]:
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if not isinstance(config, LoraConfig):
        return ["it is no LoRA adapter, but method.name is lora"]
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
        elif isinstance(module, torch.nn.Linear) and not any(f"{name}.".startswith(f"{layer}.") for layer in adapted):
            others.add(name)
    head = base.get_output_embeddings()
    others -= {name for name, module in base.named_modules() if module is head or name.startswith("prefix_encoder.")}
    wrong = [name for name in adapted if not _matches(name, method.targets)]
    wrong += [name for name in others if _matches(name, method.targets)]
    told = _told(pairs)
    if wrong:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in adapted})
        told.append(f"it is on {len(adapted)} layers ({', '.join(kinds)}), but method.targets is {method.targets!r}")
    return told


def _told(pairs: Mapping[str, tuple[object, object]]) -> list[str]:
    """What differs: each name with what the adapter has and what the recipe says."""
    return [
        f"its {name} is {has!r}, but method.{name} is {says!r}" for name, (has, says) in pairs.items() if has != says
    ]


def _matches(name: str, targets: str | tuple[str, ...]) -> bool:
    """Whether `targets` mean the linear layer `name`, as PEFT reads them."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of `model`; tied weights count once, packed ones as the numbers they stand for."""
    parameters = {id(p): p for p in model.parameters()}.values()
    total = sum(p.numel() for p in parameters) + sum(
        module.in_features * module.out_features - module.weight.numel()
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
    )
    return sum(p.numel() for p in parameters if p.requires_grad), total
