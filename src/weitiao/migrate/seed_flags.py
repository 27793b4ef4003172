"""``train.py`` of HarderThenHarder's ``LLM/chatglm_finetune``, and the ProjectConfig class of the course made from it.

Both tune ChatGLM-6B on rows of context and target. What the programs hold without a flag: alpha 32, dropout 0.1, the
layer query_key_value, a linear schedule, no clipping of gradients, ``<sop>`` learnt with the answer.
"""

from __future__ import annotations

from .ledger import DEFAULT, Ledger, Wishes
from .methods import choose_method
from .rows import carry_rows
from .targets import carry_model, carry_targets, layout_of
from .training import carry_batch

TOLD = "the seeds' train.py"
_OWN_MODEL = "THUDM/chatglm-6b"
_CUT_ANYWHERE = (
    "Rows over the limits: the original cut the end of prompts (and with it `Answer: `) and of answers, JSON too. "
    "weitiao never cuts an answer: shorten_input cuts the text of a question, and a row whose answer alone is too long "
    "is an error. Longer rows cost nothing to the others, for nothing is padded: data.max_length=2048 takes nearly all."
)


def carry_seed_flags(ledger: Ledger, wishes: Wishes, *, devices: int, config_class: bool) -> None:
    """Write down what becomes of every flag, or of every attribute of a ``ProjectConfig`` class."""
    own = "" if config_class else _OWN_MODEL
    carry_model(ledger, wishes, ("pre_model",), ledger.text("pre_model"), own=own)
    paths = {which: [path] if (path := ledger.text(f"{which}_path")) else [] for which in ("train", "dev")}
    carry_rows(
        ledger, wishes, train=("train_path",), train_paths=paths["train"], dev=("dev_path",), dev_paths=paths["dev"]
    )
    _carry_method(ledger, wishes)
    _carry_training(ledger, devices=devices, config_class=config_class)
    _carry_lengths(ledger, config_class=config_class)
    bits = ledger.whole("quantization_bit")
    if bits is not None and bits in (4, 8):
        ledger.carry("quantization_bit", "model.quantize", f"int{bits}")
    ledger.leave("quantization_bit", "weights are held in 4 or 8 bits")
    ledger.needs_no_key("preprocessing_num_workers", "rows are prepared on all cores")
    ledger.needs_no_key("save_dir", "a run's folder is runs/NAME, by the recipe's name")
    ledger.needs_no_key("device", "the GPU is used where there is one")
    for key in ("img_log_dir", "img_log_name"):
        ledger.needs_no_key(key, "every run draws curve.png in its folder")
    ledger.leave("mixed_precision", "precision is that of model.dtype: auto takes bfloat16 where the GPU has it")


def _carry_method(ledger: Ledger, wishes: Wishes) -> None:
    lora, prefix = (ledger.flag(key) or False for key in ("use_lora", "use_ptuning"))
    for key in ("use_lora", "use_ptuning"):
        if ledger.flag(key) is False and isinstance(ledger.settings[key], str):
            ledger.note(f"{ledger.spelled(key)} is read as it is meant; the original took any word for True.")
    own = "both" if lora and prefix else "lora" if lora else "ptuning_v2" if prefix else "full"
    method = choose_method(ledger, wishes, own)
    chosen = {"lora": "use_lora", "ptuning_v2": "use_ptuning"}
    for name, key in chosen.items():
        if name == method and ledger.flag(key):
            ledger.carry(key, "method.name", method)
        ledger.leave(key, f"the recipe tunes by {method}")
    if method == "lora":
        if (rank := ledger.whole("lora_rank")) is not None:
            ledger.carry("lora_rank", "method.rank", rank)
        ledger.imply("method.rank", 8, DEFAULT)
        ledger.imply("method.alpha", 32, "written in the original's code")
        ledger.imply("method.dropout", 0.1, "written in the original's code")
        if lora:
            layout = layout_of(ledger, hint="chatglm")
            carry_targets(ledger, (), ["query_key_value"], layout, note="peft's default for ChatGLM")
        for key in ("pre_seq_len", "prefix_projection"):
            ledger.leave(key, "the recipe tunes by lora, which has no prefix", even_off=True)
    elif method == "ptuning_v2":
        if (length := ledger.whole("pre_seq_len")) is not None:
            ledger.carry("pre_seq_len", "method.num_virtual_tokens", length)
        ledger.imply("method.num_virtual_tokens", 128, DEFAULT)
        if (projected := ledger.flag("prefix_projection")) is not None:
            ledger.carry("prefix_projection", "method.projection", projected, "P-Tuning v2 either way")
        ledger.leave("lora_rank", "the recipe tunes by ptuning_v2, which has no rank", even_off=True)


def _carry_training(ledger: Ledger, *, devices: int, config_class: bool) -> None:
    carry_batch(ledger, ("batch_size",), "", default=16, devices=devices)
    epochs = next((key for key in ("num_train_epochs", "epochs") if ledger.has(key)), None)
    if epochs is not None:
        ledger.carry(epochs, "train.epochs", ledger.number(epochs))
    ledger.imply("train.epochs", 10, DEFAULT)
    for key, default in (("learning_rate", 5e-5), ("weight_decay", 0.0), ("warmup_ratio", 0.0)):
        place = f"train.{'warmup' if key == 'warmup_ratio' else key}"
        if (value := ledger.number(key)) is not None:
            ledger.carry(key, place, value)
        ledger.imply(place, default, DEFAULT)
    ledger.imply("train.schedule", "linear", "written in the original's code")
    if (every := ledger.whole("logging_steps")) is not None:
        ledger.carry("logging_steps", "train.log_every", every)
    if config_class:
        ledger.leave("save_freq", "without an effect in the original, which scores and saves after every pass")
        ledger.imply("train.save_every", "epoch", "the original scores and saves after every pass")
        ledger.imply("train.evaluate_every", "epoch", "the original scores and saves after every pass")
    else:
        every = ledger.whole("save_freq") or 200
        ledger.carry("save_freq", "train.save_every", every)
        ledger.imply("train.evaluate_every", every, "as often as it saves, as in the original")
        ledger.note(
            f"The original saved and scored every {every} steps and never at the end: the last steps were lost. "
            f"weitiao always keeps and scores the end."
        )
    if (seed := ledger.whole("seed")) is not None:
        ledger.carry("seed", "train.seed", seed)
    ledger.imply("train.gradient_checkpointing", True, "written in the original's code")
    ledger.imply("train.row_balance", 0.0, "every learnt token counts the same, as in the original")
    ledger.note("The original clips no gradients; weitiao scales them down to the norm 1.0 (train.max_grad_norm).")
    ledger.note("The original scores the loss of the dev rows; weitiao scores their answers too.")


def _carry_lengths(ledger: Ledger, *, config_class: bool) -> None:
    keys = ("max_source_seq_len", "max_target_seq_len")
    lengths = [ledger.whole(key) or 512 for key in keys]
    ledger.carry(keys, "data.max_length", sum(lengths), f"{lengths[0]} + {lengths[1]}")
    ledger.imply("data.overlong", "shorten_input", "the original cut the end of prompts and answers")
    ledger.note(_CUT_ANYWHERE)
