"""``train.py`` of liucongg's ChatGLM-Finetuning: ChatGLM-6B, 2 and 3 by LoRA, P-Tuning, frozen layers or all."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from .ledger import DEFAULT, Ledger, Wishes
from .methods import choose_method
from .rows import carry_rows
from .several_processes import carry_sharding
from .targets import carry_model, carry_targets, layout_of
from .training import carry_batch

if TYPE_CHECKING:
    from ..models.glm.layouts import GlmLayout

TOLD = "liucongg's train.py"
_MODES: dict[str, GlmLayout] = {"glm": "chatglm", "glm2": "chatglm2", "glm3": "chatglm3"}
_ENCODER = re.compile(r"^(transformer\.)?encoder\.")
"""What stands before the layers in the originals of ChatGLM2 and ChatGLM3, and is called otherwise here."""
_METHODS: dict[str, Literal["lora", "ptuning_v2", "freeze", "full"]] = {
    "lora": "lora",
    "ptuning": "ptuning_v2",
    "freeze": "freeze",
    "all": "full",
}


def carry_glm_finetuning(ledger: Ledger, wishes: Wishes, *, devices: int) -> None:
    """Write down what becomes of every flag."""
    carry_model(ledger, wishes, ("model_name_or_path",), ledger.text("model_name_or_path"))
    ledger.needs_no_key("mode", "the model's own config.json says what it is")
    train = ledger.text("train_path")
    carry_rows(ledger, wishes, train=("train_path",), train_paths=[train] if train else [])
    if "data.dev" not in ledger.lines:
        ledger.imply("data.held_out", 0.0, "the original keeps no rows apart and scores none")
    _carry_lengths(ledger)
    _carry_method(ledger, wishes)
    _carry_training(ledger, devices=devices)


def _carry_lengths(ledger: Ledger) -> None:
    ledger.carry("max_len", "data.max_length", ledger.whole("max_len") or 1024)
    ledger.leave("max_src_len", "there is one limit, over prompt and answer together: data.max_length")
    skips = ledger.flag("is_skip") or False
    policy = "drop" if skips else "shorten_input"
    ledger.carry("is_skip", "data.overlong", policy, "" if skips else "the original cut longer prompts and answers")
    if not skips:
        ledger.note(
            "Rows over the limits: the original cut prompts before their last three tokens, and the end of answers. "
            "weitiao never cuts an answer: shorten_input cuts the text of a question, and names the rows."
        )


def _carry_method(ledger: Ledger, wishes: Wishes) -> None:
    said = ledger.text("train_type") or "lora"
    own = _METHODS.get(said, said)
    method = choose_method(ledger, wishes, own)
    if method == own:
        ledger.carry("train_type", "method.name", method)
    ledger.leave("train_type", f"the recipe tunes by {method}")
    prefix, lora = ("pre_seq_len", "prefix_projection"), ("lora_dim", "lora_alpha", "lora_dropout", "lora_module_name")
    if method == "lora":
        for key, place, default in (("lora_dim", "rank", 8), ("lora_alpha", "alpha", 30)):
            ledger.carry(key, f"method.{place}", ledger.whole(key) or default)
        dropout = ledger.number("lora_dropout")
        ledger.carry("lora_dropout", "method.dropout", 0.1 if dropout is None else dropout)
        names = ledger.text("lora_module_name") or "query_key_value"
        layout = layout_of(ledger, hint=_MODES.get(ledger.text("mode") or "glm2", "chatglm2"))
        carry_targets(ledger, ("lora_module_name",), [name.strip() for name in names.split(",")], layout)
    elif method == "ptuning_v2":
        ledger.carry("pre_seq_len", "method.num_virtual_tokens", ledger.whole("pre_seq_len") or 16)
        projected = ledger.flag("prefix_projection")
        if projected is False:
            ledger.note(
                f"{ledger.spelled('prefix_projection')} is read as it is meant; the original took any word for True."
            )
        ledger.carry("prefix_projection", "method.projection", True if projected is None else projected)
    elif method == "freeze":
        _carry_learning_layers(ledger)
    for key in (*prefix, *lora):
        ledger.leave(key, f"the recipe tunes by {method}, which has no such thing", even_off=True)
    ledger.leave("freeze_module_name", f"the recipe tunes by {method}", even_off=True)


def _carry_learning_layers(ledger: Ledger) -> None:
    """``method.parameters`` from ``--freeze_module_name``, which names the weights that are *not* frozen."""
    names = [name.strip() for name in (ledger.text("freeze_module_name") or "layers.27.").split(",")]
    layout = layout_of(ledger, hint=_MODES.get(ledger.text("mode") or "glm2", "chatglm2"))
    here = [name if layout == "chatglm" else _ENCODER.sub("", name) for name in names if name]
    ledger.carry("freeze_module_name", "method.parameters", here, "these learn, all others are frozen")
    ledger.imply("method.layers", 0, "the weights that are named, no others")


def _carry_training(ledger: Ledger, *, devices: int) -> None:
    carry_batch(ledger, ("per_device_train_batch_size",), "gradient_accumulation_steps", default=16, devices=devices)
    epochs, rate, warmup = (ledger.number(key) for key in ("num_train_epochs", "learning_rate", "warmup_ratio"))
    ledger.carry("num_train_epochs", "train.epochs", 1 if epochs is None else epochs)
    ledger.carry("learning_rate", "train.learning_rate", 1e-3 if rate is None else rate)
    ledger.carry("warmup_ratio", "train.warmup", 0.1 if warmup is None else warmup)
    ledger.imply("train.schedule", "linear", "as the original's DeepSpeed configuration has it")
    decay = ledger.number("weight_decay")
    ledger.imply("train.weight_decay", 0.1, "written in the original's code, whatever --weight_decay says")
    if decay == 0.1:
        ledger.needs_no_key("weight_decay", "as written")
    ledger.leave("weight_decay", "without an effect in the original, which always takes 0.1: so does the recipe",
                 even_off=True)  # fmt: skip
    ledger.imply("train.max_grad_norm", 1.0, "as the original's DeepSpeed configuration has it")
    if (every := ledger.whole("show_loss_step")) is not None:
        ledger.carry("show_loss_step", "train.log_every", every)
    if (saves := ledger.whole("save_model_step")) is not None:
        ledger.carry("save_model_step", "train.save_every", saves)
    ledger.imply("train.save_every", "epoch", "the original saves after every pass")
    ledger.imply("train.evaluate_every", "never", "the original scores nothing while training")
    checkpointing = ledger.flag("gradient_checkpointing") or False
    ledger.carry("gradient_checkpointing", "train.gradient_checkpointing", checkpointing)
    seed = ledger.whole("seed")
    ledger.carry("seed", "train.seed", 1234 if seed is None else seed, "" if seed is not None else DEFAULT)
    ledger.imply("train.row_balance", 0.0, "every learnt token counts the same, as in the original")
    carry_sharding(ledger, ("ds_file", "deepspeed"), with_numbers=True)
    ledger.needs_no_key("local_rank", "torchrun tells it")
    ledger.needs_no_key("output_dir", "a run's folder is runs/NAME, by the recipe's name")
