"""Which parameters learn: a loaded model in, the same model with a method's trainable parameters out (PEFT)."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from ..errors import RecipeError
from ..models.adapters import ignoring_peft_warnings, use_lean_layers
from ..recipe import Lora


def add_adapter(model: PreTrainedModel, method: Lora, *, seed: int) -> PeftModel:
    """`model` with fresh trainable LoRA layers in float32, everything else frozen.

    The adapter starts from `seed` alone, whatever random numbers were drawn before.

    Raises:
        RecipeError: no layer of the model matches `method.targets`.
    """
    targets = method.targets if isinstance(method.targets, str) else list(method.targets)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=targets,
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


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of `model`; tied weights count once."""
    parameters = {id(p): p for p in model.parameters()}.values()
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
