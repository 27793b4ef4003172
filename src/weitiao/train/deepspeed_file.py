"""The DeepSpeed configuration that a user has, as `train.deepspeed` names it: what of it is taken, and what is told.

The recipe says how a step is made: its rows and passes, the norm of its gradient, the optimiser and its schedule, and
what numbers are computed in. Where the file says "auto" of these, that is what it becomes; where it says something
else, that is refused, as is whatever would be ignored. The rest, how ZeRO-1 and ZeRO-2 send and keep what learns
(Rajbhandari et al. 2020, arXiv:1910.02054), is DeepSpeed's to read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError
from ..recipe import Train
from .ranks import Ranks

_AUTO = "auto"
_PLAIN = ("steps_per_print", "wall_clock_breakdown", "dump_state", "communication_data_type")
_NO_MATTER = ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
"""Asked of DeepSpeed's own optimisers; torch's AdamW, which moves the weights, is one that it knows."""

_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_OFFLOADING = ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param", "zenflow")
_OF_OFFLOADING = "round_robin_gradients"
"""Spreads copying into the machine's memory over processes; without offloading it does nothing, but DeepSpeed 0.19.8
then finds a parameter's part of the state in the wrong place."""

_OTHERWISE = "Spread the weights with train.shard: fsdp instead"


def divides(settings: Train, ranks: Ranks) -> bool:
    """Whether DeepSpeed divides what a training by `ranks` learns: a process alone has nobody to share with."""
    return settings.deepspeed is not None and ranks.size > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedFile:
    """A configuration that was read and agrees with the recipe."""

    path: str
    stage: int
    """1: each process keeps a part of the optimiser's state. 2: and of the gradients."""
    engine: Mapping[str, Any]
    """What DeepSpeed's engine is given."""
    dtypes: frozenset[torch.dtype]
    """What the model may compute in."""

    def require_dtype(self, dtype: torch.dtype, device: torch.device) -> None:
        """Raise RunError when the model computes in a `dtype` that the file does not say, or that needs scaling."""
        if dtype not in self.dtypes:
            wanted = " or ".join(sorted(_name(one) for one in self.dtypes))
            raise RunError(
                f"{self.path} says by bf16 and fp16 that the model computes in {wanted}, but it computes in "
                f'{_name(dtype)} (model.dtype). Write "auto" as enabled there, or set model.dtype to the same.'
            )
        if dtype == torch.float16 and device.type == "cuda":
            raise RunError(
                f"Learning in float16 needs a loss scale, which is not kept where DeepSpeed divides what learns "
                f"({self.path}). Set model.dtype: bfloat16, or take train.deepspeed out."
            )


def read_deepspeed(settings: Train, ranks: Ranks) -> DeepSpeedFile | None:
    """What the file of ``train.deepspeed`` says, for `ranks`; None where the recipe names none.

    Raises:
        RunError: it cannot be read, contradicts the recipe, or says something that is not done; or deepspeed, which
            several processes need, is not installed.
    """
    if settings.deepspeed is None:
        return None
    path = settings.deepspeed
    config = _read(path)
    _require_plain(path, config, settings)
    wrong = list(_contradictions(config, settings))
    if wrong:
        told = "; ".join(wrong)
        raise RunError(f'{path} contradicts the recipe: {told}. Write "auto" in the file, or say the same.')
    zero = config.get("zero_optimization", {})
    if divides(settings, ranks) and find_spec("deepspeed") is None:
        raise RunError("train.deepspeed needs deepspeed, which is not installed: pip install 'weitiao[deepspeed]'.")
    engine = {name: config[name] for name in _PLAIN if config.get(name, _AUTO) != _AUTO}
    taken = {name: value for name, value in zero.items() if value != _AUTO and name != _OF_OFFLOADING}
    engine["zero_optimization"] = taken
    engine["train_micro_batch_size_per_gpu"] = 1  # passes are made of tokens; what DeepSpeed counts is not used
    engine["gradient_clipping"] = settings.max_grad_norm or 0.0
    return DeepSpeedFile(path=path, stage=zero["stage"], engine=engine, dtypes=_dtypes(config))


def _read(path: str) -> dict[str, Any]:
    which = f"The DeepSpeed configuration {path} (train.deepspeed)"
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{which} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise RunError(f"{which} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise RunError(f"{which} is no JSON object, but {config!r:.80}.")
    return config


def _require_plain(path: str, config: Mapping[str, Any], settings: Train) -> None:
    """Raise RunError for what is not done here, whatever its value."""
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    if stage == 3:
        raise RunError(
            f"{path} says ZeRO-3, which spreads the weights themselves; weitiao takes ZeRO-1 and ZeRO-2 of DeepSpeed. "
            f"{_OTHERWISE}, which does what ZeRO-3 does, and take train.deepspeed out."
        )
    if not isinstance(zero, Mapping) or stage not in (1, 2):
        raise RunError(
            f"{path} says zero_optimization.stage {stage!r}; weitiao takes 1 and 2. Without ZeRO, take train.deepspeed "
            f"out: each process then keeps all."
        )
    if found := [name for name in _OFFLOADING if _is_on(zero.get(name))]:
        raise RunError(
            f"{path} says zero_optimization.{found[0]}, which is not done here. {_OTHERWISE}, or train with "
            f"train.optimiser: paged_adamw and without train.deepspeed, whose moments leave the GPU when it is full."
        )
    known = {*_PLAIN, *_NO_MATTER, "zero_optimization", "gradient_clipping", "bf16", "fp16", "optimizer", "scheduler"}
    known |= {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    others = [name for name in config if name not in known and _is_on(config[name])]
    if others:
        raise RunError(
            f"{path} says {', '.join(others)}, which weitiao does not take from a DeepSpeed configuration and would "
            f"ignore. Take it out of the file."
        )
    if settings.optimiser != "adamw":
        raise RunError(
            f"train.optimiser={settings.optimiser} does not go with train.deepspeed. Set train.optimiser: adamw, whose "
            f"state is divided, or take train.deepspeed out."
        )
    if settings.compile == "always":
        raise RunError(
            "train.compile=always does not go with train.deepspeed, which takes each gradient as it is made. Set "
            "train.compile: never, or take train.deepspeed out."
        )


def _contradictions(config: Mapping[str, Any], settings: Train) -> Iterator[str]:
    """What the file says of things that the recipe decides, where that is not the same."""
    if (rows := config.get("train_batch_size", _AUTO)) not in (_AUTO, settings.batch_size):
        yield f"train_batch_size is {rows!r}, train.batch_size {settings.batch_size} rows, those of all processes"
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if (count := config.get(name, _AUTO)) != _AUTO:
            yield f"{name} is {count!r}, and train.tokens_per_pass ({settings.tokens_per_pass}) makes a step's passes"
    if (norm := config.get("gradient_clipping", _AUTO)) not in (_AUTO, settings.max_grad_norm or 0):
        yield f"gradient_clipping is {norm!r}, train.max_grad_norm {settings.max_grad_norm}"
    yield from _of_optimiser(config.get("optimizer", {}), settings)
    yield from _of_scheduler(config.get("scheduler", {}), settings)


def _of_optimiser(optimiser: Mapping[str, Any], settings: Train) -> Iterator[str]:
    if (kind := optimiser.get("type", "AdamW")).lower() != "adamw":
        yield f"optimizer.type is {kind!r}, train.optimiser {settings.optimiser}"
    same = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "torch_adam": True,
        "adam_w_mode": True,
    }
    for name, value in optimiser.get("params", {}).items():
        if value != _AUTO and (name not in same or value != same[name]):
            yield f"optimizer.params.{name} is {value!r}, in the recipe {same.get(name, 'nothing')!r}"


def _of_scheduler(scheduler: Mapping[str, Any], settings: Train) -> Iterator[str]:
    kind = scheduler.get("type")
    if kind is not None and _SCHEDULES.get(kind) != settings.schedule:
        yield f"scheduler.type is {kind!r}, train.schedule {settings.schedule}"
    for name, value in scheduler.get("params", {}).items():
        if value != _AUTO:
            yield f"scheduler.params.{name} is {value!r}, and train.warmup and train.epochs make the schedule's steps"


def _dtypes(config: Mapping[str, Any]) -> frozenset[torch.dtype]:
    named = {"bf16": torch.bfloat16, "fp16": torch.float16}
    said = {named[name]: config.get(name, {}).get("enabled", _AUTO) for name in named}
    chosen = {dtype for dtype, enabled in said.items() if enabled is True}
    return frozenset(chosen or {torch.float32, *(dtype for dtype, enabled in said.items() if enabled is not False)})


def _is_on(value: object) -> bool:
    if isinstance(value, Mapping):
        return bool(value.get("enabled", True)) and value.get("device") != "none"
    return bool(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
