"""Which parameters learn: a loaded model in, the same model with a method's trainable parameters out."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import RecipeError
from ..models.adapters import load_adapter
from ..models.learnt_prefix import learnt_prefix_of
from ..models.own_weights import changed_weights_of, learn_weights
from ..models.packed_layers import num_weights
from ..models.prompt_tuning import attach_prompt, prompt_encoder_of
from ..models.ptuning import attach_prefix, prefix_encoder_of
from ..recipe import AnyMethod, Freeze, Full, Ia3, Lora, PromptTuning, PTuning, PTuningV1
from .low_rank import (
    add_ia3,
    add_lora,
    ia3_differences,
    layer_number,
    lora_differences,
    pace_ia3,
    pace_lora,
    told_pairs,
)
from .pace import Pace, pace_of, set_pace

_NETWORKS_PACE = 1 / 60
"""Of the rate at which tokens learn, that of the network which P-Tuning makes them by."""


def add_adapter(model: PreTrainedModel, method: AnyMethod, *, seed: int) -> PreTrainedModel | PeftModel:
    """`model` with fresh trainable parameters in float32, everything else frozen.

    LoRA and (IA)³: a `PeftModel` around it. Otherwise the model itself: with something learnt before its rows, or with
    weights of its own that learn. The parameters start from `seed` alone, whatever random numbers were drawn before.

    Raises:
        RecipeError: nothing in the model is what `method` means, or the model has a prefix that another one would take
            the place of.
        ModelError: the model cannot take a prefix, or weights that would learn are packed.
    """
    if isinstance(method, PTuning | PTuningV1 | PromptTuning):
        return _add_prefix(model, method, seed=seed)
    if isinstance(method, Freeze | Full):
        return learn_weights(model, learning_names(model, method))
    if isinstance(method, Ia3):
        return add_ia3(model, method, seed=seed)
    return add_lora(model, method, seed=seed)


def _add_prefix(model: PreTrainedModel, method: PTuning | PTuningV1 | PromptTuning, *, seed: int) -> PreTrainedModel:
    own = learnt_prefix_of(model)
    if own is not None:
        raise RecipeError(
            f"The model has a P-Tuning prefix of {own.num_virtual_tokens} tokens, which a fresh one would take the "
            f"place of. Name the model's folder as model.adapter too, to tune that prefix on; or tune by LoRA."
        )
    count = method.num_virtual_tokens
    if isinstance(method, PTuning):
        return attach_prefix(
            model,
            num_virtual_tokens=count,
            projection=method.projection,
            dropout=method.dropout,
            vocabulary=method.init == "vocabulary",
            seed=seed,
        )
    if isinstance(method, PromptTuning):
        return attach_prompt(model, num_virtual_tokens=count, vocabulary=method.init == "vocabulary", seed=seed)
    attach_prompt(
        model,
        num_virtual_tokens=count,
        network=method.encoder,
        network_size=method.encoder_size,
        vocabulary=method.init == "vocabulary",
        seed=seed,
    )
    prompt = prompt_encoder_of(model)
    assert prompt is not None
    for name, parameter in prompt.named_parameters():
        if not name.startswith("embedding."):
            set_pace(parameter, Pace(multiple=_NETWORKS_PACE, decays=parameter.ndim >= 2))
    return model


def learning_names(model: PreTrainedModel, method: Freeze | Full) -> list[str]:
    """The names of the parameters of `model` that learn by `method`; tied weights have one name.

    Raises:
        RecipeError: the model has fewer layers, or no parameter of such a name; nothing is left out in silence.
    """
    names = [name for name, _ in model.named_parameters() if not name.startswith("prefix_encoder.")]
    if isinstance(method, Full):
        return names
    count = model.config.get_text_config().num_hidden_layers
    if method.layers > count:
        raise RecipeError(f"method.layers is {method.layers}, but the model has {count} layers. Set method.name: full.")
    if strange := [part for part in method.parameters if not any(part in name for name in names)]:
        kinds = sorted({name.rpartition(".")[0].rpartition(".")[2] or name for name in names})
        raise RecipeError(
            f"method.parameters: no parameter of this model has {strange[0]!r} in its name. Names are such as "
            f"{names[-1]}; their modules: {', '.join(kinds)}."
        )
    last = range(count - method.layers, count)
    return [name for name in names if layer_number(name) in last or any(part in name for part in method.parameters)]


def resume_adapter(model: PreTrainedModel, method: AnyMethod, folder: Path) -> PreTrainedModel | PeftModel:
    """`model` with the adapter in `folder` on it, trainable; everything else is frozen.

    Raises:
        ModelError: the folder holds no adapter of this model.
        RecipeError: the adapter is not of the kind that `method` describes; every difference is named.
    """
    tuned = load_adapter(model, folder)
    differences = _differences(tuned, method)
    if differences:
        raise RecipeError(
            f"The adapter in {folder} cannot be tuned further as the recipe's method says: {'; '.join(differences)}. "
            f"Change the recipe's method, or leave model.adapter out to start afresh."
        )
    if isinstance(tuned, PeftModel):
        tuned.set_requires_grad("default", True)
        if isinstance(method, Lora):
            pace_lora(tuned, method)
        else:
            pace_ia3(tuned)
        return tuned
    if isinstance(method, Freeze | Full):
        return learn_weights(tuned, learning_names(tuned, method))
    encoder = prefix_encoder_of(tuned)
    if encoder is not None and isinstance(method, PTuning):
        encoder.dropout = method.dropout
        encoder.take_units()
    prefix = learnt_prefix_of(tuned)
    assert prefix is not None
    prefix.requires_grad_(True)
    return tuned


def _differences(tuned: PreTrainedModel | PeftModel, method: AnyMethod) -> list[str]:
    """In what the adapter of `tuned` is not what `method` describes."""
    if isinstance(method, Lora):
        return lora_differences(tuned, method)
    if isinstance(method, Ia3):
        return ia3_differences(tuned, method)
    if isinstance(method, Freeze | Full):
        return _weight_differences(tuned, method)
    if isinstance(method, PTuning):
        encoder = prefix_encoder_of(tuned)
        if isinstance(tuned, PeftModel) or encoder is None:
            return ["it is no P-Tuning prefix, but method.name is ptuning_v2"]
        pairs = {
            "num_virtual_tokens": (encoder.num_virtual_tokens, method.num_virtual_tokens),
            "projection": (encoder.projection, method.projection),
        }
        return told_pairs(pairs)
    prompt = prompt_encoder_of(tuned)
    if isinstance(tuned, PeftModel) or prompt is None:
        return [f"it holds no learnt tokens, but method.name is {method.name}"]
    if isinstance(method, PTuningV1):
        return [
            "the network of P-Tuning is not kept with its tokens, which alone are needed in use; tune the tokens "
            "themselves further: method.name is to be prompt_tuning"
        ]
    return told_pairs({"num_virtual_tokens": (prompt.num_virtual_tokens, method.num_virtual_tokens)})


def _weight_differences(tuned: PreTrainedModel | PeftModel, method: Freeze | Full) -> list[str]:
    changed = changed_weights_of(tuned)
    if isinstance(tuned, PeftModel) or changed is None:
        return [f"it holds no weights of the model's own, but method.name is {method.name}"]
    wanted, has = set(learning_names(tuned, method)), set(changed.names)
    if wanted == has:
        return []
    some = sorted(wanted ^ has)[0]
    return [
        f"it holds {len(has)} of the model's parameters and the method means {len(wanted)}; {some} is one that differs"
    ]


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of `model`; tied weights count once, packed ones as the numbers they stand for."""
    learning = {id(p): p for p in model.parameters() if p.requires_grad}.values()
    return sum(round(p.numel() * pace_of(p).share) for p in learning), num_weights(model)
