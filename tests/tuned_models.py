"""Every way of tuning on tiny random models of four families, for tests: methods, rows to learn, steps to take."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from prefix_models import a_row, tiny
from weitiao.recipe import AnyMethod, Freeze, Full, Ia3, Lora, PromptTuning, PTuning, PTuningV1, Train
from weitiao.render.base import Example
from weitiao.train.step import Setup, set_up, step_batches, take_step

FAMILIES = ("qwen2", "gemma3", "chatglm", "glm")
METHODS: dict[str, AnyMethod] = {
    "lora": Lora(rank=8),
    "rslora": Lora(rank=8, alpha=8, rslora=True),
    "dora": Lora(rank=8, dora=True),
    "pissa": Lora(rank=8, alpha=8, init="pissa"),
    "lora_plus": Lora(rank=8, b_learning_rate=4.0),
    "some_layers": Lora(rank=16, layers=(0, -1), targets=r".*\.(?:mlp|self_attn|attention)\..*"),
    "ptuning_v2": PTuning(num_virtual_tokens=32, dropout=0.0),
    "projected": PTuning(num_virtual_tokens=32, projection=True, dropout=0.0),
    "ptuning_v1": PTuningV1(num_virtual_tokens=32),
    "mlp": PTuningV1(num_virtual_tokens=32, encoder="mlp", encoder_size=32),
    "prompt_tuning": PromptTuning(num_virtual_tokens=32),
    "freeze": Freeze(layers=1, parameters=("norm",)),
    "full": Full(),
    "ia3": Ia3(),
}
RATES = {
    "lora": 2e-2, "rslora": 2e-2, "dora": 2e-2, "pissa": 2e-2, "lora_plus": 1e-2, "some_layers": 2e-2,
    "ptuning_v2": 0.2, "projected": 2e-2, "ptuning_v1": 0.2, "mlp": 0.2, "prompt_tuning": 0.2,
    "freeze": 1e-2, "full": 6e-3, "ia3": 0.1,
}  # fmt: skip
LEARNT_TOKENS = ("ptuning_v1", "mlp", "prompt_tuning")
MERGING = tuple(name for name, method in METHODS.items() if isinstance(method, Lora | Ia3 | Freeze | Full))


def settings_for(name: str, *, checkpointing: bool = False) -> Train:
    """What the method `name` learns eight short rows by."""
    return Train(
        learning_rate=RATES[name],
        schedule="constant",
        warmup=0,
        batch_size=8,
        row_balance=0,
        gradient_checkpointing=checkpointing,
    )


def eight_rows(family: str, *, answer: int = 2) -> list[Example]:
    """Eight rows of seven to eleven tokens of context and `answer` learnt ones."""
    draw = random.Random(5)
    rows = []
    for context in (6, 7, 8, 9, 10, 6, 8, 10):
        tokens = a_row(draw, family, context=context, answer=answer)
        rows.append(Example(token_ids=tuple(tokens), loss_mask=(False,) * (context + 1) + (True,) * answer))
    return rows


def set_up_for(model: PreTrainedModel | PeftModel, settings: Train) -> Setup:
    """`model` ready to learn, in training mode."""
    setup = set_up(model, settings, steps=1000)
    setup.trained.train()
    return setup


def learn(setup: Setup, rows: Sequence[Example], settings: Train, *, steps: int) -> list[float]:
    """The losses of so many steps over all `rows`."""
    batches = step_batches(rows, [""] * len(rows), settings, torch.device("cpu"), row_prefix=setup.trained.row_prefix)
    return [take_step(setup, batches, settings)[0] for _ in range(steps)]


def gradients(setup: Setup, rows: Sequence[Example], settings: Train) -> dict[str, Tensor]:
    """The gradient of every parameter that learns, of one pass over all `rows`."""
    batches = step_batches(rows, [""] * len(rows), settings, torch.device("cpu"), row_prefix=setup.trained.row_prefix)
    for batch in batches:
        setup.trained(batch).backward()
    return {name: p.grad for name, p in setup.trained.named_parameters() if p.requires_grad and p.grad is not None}


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel, rows: Sequence[Example]) -> Tensor:
    """The logits of every row alone, end to end ``[T, V]``."""
    return torch.cat([model(torch.tensor([row.token_ids])).logits[0] for row in rows])


def fresh(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The base model of `family`, the same at every call."""
    return tiny(family).to(dtype)
