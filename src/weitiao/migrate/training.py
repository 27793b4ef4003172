"""How an original learns, said by the arguments of transformers' Trainer → the recipe's part ``train``."""

from __future__ import annotations

from collections.abc import Callable

from .ledger import DEFAULT, Ledger, Wishes
from .monitors import carry_monitors
from .optimisers import carry_optimiser
from .rows import carry_steps, carry_warmup
from .several_processes import carry_sharding
from .trainer_arguments import LEFT, NEEDLESS

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
Key = Callable[[str], str]
"""An argument's name → its key in the original's settings, such as ``training_args.max_steps``."""


def carry_training_arguments(
    ledger: Ledger, wishes: Wishes, *, devices: int, key: Key = str, swanlab_mode: str = "swanlab_mode"
) -> None:
    """Everything that transformers' Trainer takes but its paths: ``train.*`` and what belongs to it.

    Args:
        ledger: holds ``data.train`` already, since steps are counted by rows.
        wishes: what the user says.
        devices: on how many the original ran.
        key: where an argument stands in the original's settings.
        swanlab_mode: the setting that says how SwanLab runs.
    """
    sizes = (key("per_device_train_batch_size"), key("per_gpu_train_batch_size"))
    carry_batch(ledger, sizes, key("gradient_accumulation_steps"), default=8, devices=devices)
    _carry_epochs(ledger, wishes, key)
    rate = ledger.number(key("learning_rate"))
    if rate is not None:
        ledger.carry(key("learning_rate"), "train.learning_rate", rate)
    ledger.imply("train.learning_rate", 5e-5, DEFAULT)
    _carry_schedule(ledger, key)
    carry_warmup_settings(ledger, wishes, key)
    _carry_decay_and_norm(ledger, key)
    carry_optimiser(ledger, key)
    _carry_logging(ledger, key)
    _carry_saving(ledger, key)
    _carry_scoring(ledger, key)
    _carry_precision(ledger, key)
    carry_monitors(ledger, key("report_to"), swanlab_mode=swanlab_mode)
    if (seed := ledger.whole(key("seed"))) is not None:
        ledger.carry(key("seed"), "train.seed", seed)
    ledger.imply("train.seed", 42, DEFAULT)
    ledger.imply("train.row_balance", 0.0, "every learnt token counts the same, as in the original")
    carry_sharding(ledger, (key("deepspeed"), key("fsdp")))
    ledger.settle({key(name): why for name, why in NEEDLESS.items()}, needless=True)
    ledger.settle({key(name): why for name, why in LEFT.items()}, needless=False)


def carry_batch(ledger: Ledger, sizes: tuple[str, ...], passes: str, *, default: int, devices: int) -> None:
    """``train.batch_size``: rows of an optimiser step, over all its passes and devices."""
    rows = next((count for name in sizes if (count := ledger.whole(name)) is not None), default)
    times = ledger.whole(passes) or 1
    factors = [f"{rows} a device"]
    factors += [f"{times} passes"] if times > 1 else []
    factors += [f"{devices} devices"] if devices > 1 else []
    note = " × ".join(factors) if len(factors) > 1 else ""
    ledger.carry((*sizes, passes), "train.batch_size", rows * times * devices, note)


def _carry_epochs(ledger: Ledger, wishes: Wishes, key: Key) -> None:
    steps, epochs = ledger.whole(key("max_steps")), ledger.number(key("num_train_epochs"))
    if steps is not None and steps > 0:
        carry_steps(ledger, wishes, key("max_steps"), steps)
        ledger.leave(key("num_train_epochs"), "max_steps overrides it")
        return
    ledger.needs_no_key(key("max_steps"), "off: passes are counted")
    if epochs is not None:
        ledger.carry(key("num_train_epochs"), "train.epochs", epochs)
    ledger.imply("train.epochs", 3.0, DEFAULT)


def _carry_schedule(ledger: Ledger, key: Key) -> None:
    name = ledger.text(key("lr_scheduler_type"))
    if name in _SCHEDULES:
        ledger.carry(key("lr_scheduler_type"), "train.schedule", _SCHEDULES[name])
    ledger.leave(key("lr_scheduler_type"), "schedules are linear, cosine and constant; the recipe has linear")
    ledger.imply("train.schedule", "linear", DEFAULT)


def carry_warmup_settings(ledger: Ledger, wishes: Wishes, key: Key) -> None:
    """``train.warmup`` from a share of the steps or from their number; the number counts where both are given."""
    names = (key("warmup_steps"), key("warmup_ratio"))
    if ledger.text(key("lr_scheduler_type")) == "constant":
        for name in names:
            ledger.leave(name, "without an effect on the schedule constant")
    else:
        steps, share = (ledger.number(name) for name in names)
        if steps is not None and steps >= 1:
            carry_warmup(ledger, wishes, names[0], round(steps))
            ledger.leave(names[1], "warmup_steps overrides it")
        elif steps is not None or share is not None:
            ledger.carry(names, "train.warmup", steps or share or 0.0)
    ledger.imply("train.warmup", 0.0, DEFAULT)


def _carry_decay_and_norm(ledger: Ledger, key: Key) -> None:
    decay, norm = ledger.number(key("weight_decay")), ledger.number(key("max_grad_norm"))
    if decay is not None:
        ledger.carry(key("weight_decay"), "train.weight_decay", decay)
    if key("max_grad_norm") in ledger.settings:
        none = norm is None or norm <= 0
        ledger.carry(key("max_grad_norm"), "train.max_grad_norm", None if none else norm)
    ledger.imply("train.weight_decay", 0.0, DEFAULT)
    ledger.imply("train.max_grad_norm", 1.0, DEFAULT)


def _carry_logging(ledger: Ledger, key: Key) -> None:
    every = ledger.number(key("logging_steps"))
    if every is not None and every >= 1:
        ledger.carry(key("logging_steps"), "train.log_every", round(every))
    ledger.leave(key("logging_steps"), "a share of the training, where train.log_every counts steps")


def _carry_saving(ledger: Ledger, key: Key) -> None:
    strategy, every = ledger.text(key("save_strategy")) or "steps", ledger.number(key("save_steps"))
    names = (key("save_strategy"), key("save_steps"))
    if strategy == "epoch":
        ledger.carry(names, "train.save_every", "epoch")
    elif strategy == "steps" and (every is None or every >= 1):
        ledger.carry(names, "train.save_every", round(every or 500), "" if every else DEFAULT)
    why = "a run can always be gone on with; train.save_every says from where"
    ledger.leave(names[0], why, even_off=True)
    ledger.leave(names[1], "a share of the training, where train.save_every counts steps")
    kept = ledger.whole(key("save_total_limit"))
    if kept is not None:
        ledger.carry(key("save_total_limit"), "train.keep_checkpoints", max(1, kept))


def _carry_scoring(ledger: Ledger, key: Key) -> None:
    """How often the dev rows are scored: never, where no strategy is set."""
    names = (key("eval_strategy"), key("evaluation_strategy"))
    strategy = next((found for name in names if (found := ledger.text(name))), "no")
    every = ledger.number(key("eval_steps"))
    if strategy == "epoch":
        ledger.carry((*names, key("eval_steps")), "train.evaluate_every", "epoch")
    elif strategy == "steps" and (every is None or every >= 1):
        period = every or ledger.number(key("logging_steps")) or 500
        ledger.carry((*names, key("eval_steps")), "train.evaluate_every", round(period))
    else:
        ledger.leave(key("eval_steps"), "no strategy: the original scores nothing while training")
        ledger.carry(names, "train.evaluate_every", "never", "the original scores nothing while training")
    ledger.needs_no_key(key("do_eval"), "train.evaluate_every says how often; weitiao evaluate scores at the end")
    rows = ledger.whole(key("per_device_eval_batch_size"))
    if rows is not None:
        ledger.carry(key("per_device_eval_batch_size"), "generate.batch_rows", rows)


def _carry_precision(ledger: Ledger, key: Key) -> None:
    for name, dtype in (("bf16", "bfloat16"), ("pure_bf16", "bfloat16"), ("fp16", "float16")):
        if ledger.flag(key(name)):
            ledger.carry(key(name), "model.dtype", dtype)
        ledger.leave(key(name), "off")
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        wanted = ledger.flag(key(name))
        if wanted is not None:
            ledger.carry(key(name), "train.gradient_checkpointing", wanted)
    compiled = ledger.flag(key("torch_compile"))
    if compiled is not None:
        ledger.carry(key("torch_compile"), "train.compile", "always" if compiled else "never")
