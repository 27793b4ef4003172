"""ChatGLM3's and GLM-4's fine-tuning configurations: ``lora.yaml``, ``ptuning_v2.yaml``, ``sft.yaml``.

``python finetune_hf.py DATA_DIR MODEL_DIR CONFIG [RESUME]``. Source: THUDM/ChatGLM3 finetune_demo, THUDM/GLM-4
finetune. The loss counts the reply and the role token behind it, which is weitiao's ``loss_mask: family``.
"""

from __future__ import annotations

from .ledger import DEFAULT, Ledger, Wishes
from .methods import choose_method
from .rows import carry_rows
from .targets import carry_model, carry_targets, layout_of
from .training import carry_training_arguments

TOLD = "ChatGLM3's or GLM-4's finetune_demo"
_SCORED_ROWS = 50
"""finetune_hf.py scores the first 50 dev rows while training."""


def carry_finetune_demo(ledger: Ledger, wishes: Wishes, *, devices: int) -> None:
    """Write down what becomes of every setting, nested ones by dotted names: ``training_args.max_steps``.

    The command line that named the configuration gives ``DATA_DIR``, ``MODEL_DIR`` and ``RESUME`` beside them.
    """
    carry_model(ledger, wishes, ("MODEL_DIR",), ledger.text("MODEL_DIR"))
    folder = ledger.text("DATA_DIR")
    if folder is None and not wishes.data:
        ledger.ask("The configuration names files without their folder. Say where they are: --data FOLDER.")
    _carry_rows(ledger, wishes, folder)
    carry_training_arguments(
        ledger, wishes, devices=devices, key=lambda name: f"training_args.{name}", swanlab_mode="swanlab"
    )
    ledger.imply("train.gradient_checkpointing", True, "finetune_hf.py switches it on")
    if ledger.lines["train.evaluate_every"].value != "never":
        ledger.imply("train.evaluate_rows", _SCORED_ROWS, "finetune_hf.py scores the first 50 dev rows while training")
    _carry_lengths(ledger)
    _carry_method(ledger, wishes)
    tokens = ledger.whole("training_args.generation_config.max_new_tokens")
    if tokens is not None:
        ledger.carry("training_args.generation_config.max_new_tokens", "generate.max_new_tokens", tokens)
    _carry_rest(ledger)


def _carry_rows(ledger: Ledger, wishes: Wishes, folder: str | None) -> None:
    names = {which: ledger.text(f"data_config.{which}_file") for which in ("train", "val", "test")}

    def paths(which: str) -> list[str]:
        name = names[which]
        return [f"{folder.rstrip('/')}/{name}" if folder and name else name] if name else []

    train, dev = paths("train"), paths("val")
    carry_rows(
        ledger,
        wishes,
        train=("data_config.train_file", "DATA_DIR"),
        train_paths=train,
        dev=("data_config.val_file",),
        dev_paths=dev,
    )
    if "data.dev" not in ledger.lines:
        ledger.imply("data.held_out", 0.0, "the original keeps no rows apart")
    ledger.needs_no_key("data_config.num_proc", "rows are prepared on all cores")
    ledger.leave("data_config.test_file", "after training: weitiao evaluate runs/NAME --data FILE")


def _carry_lengths(ledger: Ledger) -> None:
    keys = ("max_input_length", "max_output_length")
    given = [ledger.whole(key) for key in keys]
    if None not in given:
        total = sum(length or 0 for length in given) + 1
        ledger.carry(keys, "data.max_length", total, "finetune_hf.py adds a token")
        ledger.imply("data.overlong", "shorten_input", "the original cut the end of every longer row, answers too")
        ledger.note(
            f"Rows longer than {total} tokens: the original cut their end, so that the answer was lost first. weitiao "
            f"never cuts an answer: shorten_input cuts the text of a question, and names the rows."
        )


def _carry_method(ledger: Ledger, wishes: Wishes) -> None:
    kind = (ledger.text("peft_config.peft_type") or "full").lower()
    method = choose_method(ledger, wishes, {"prefix_tuning": "ptuning_v2"}.get(kind, kind))
    layout = layout_of(ledger, hint="glm4" if ledger.has("combine") or ledger.has("freezeV") else "chatglm3")
    if kind in ("lora", "prefix_tuning"):
        ledger.carry("peft_config.peft_type", "method.name", method)
    if method == "lora":
        for name, place in (("r", "rank"), ("lora_alpha", "alpha")):
            if (number := ledger.whole(f"peft_config.{name}")) is not None:
                ledger.carry(f"peft_config.{name}", f"method.{place}", number)
        if (dropout := ledger.number("peft_config.lora_dropout")) is not None:
            ledger.carry("peft_config.lora_dropout", "method.dropout", dropout)
        for name in ("rslora", "dora"):
            if (wanted := ledger.flag(f"peft_config.use_{name}")) is not None:
                ledger.carry(f"peft_config.use_{name}", f"method.{name}", wanted)
        names = ledger.settings.get("peft_config.target_modules")
        if names:
            listed = [names] if isinstance(names, str) else [str(name) for name in names]
            carry_targets(ledger, ("peft_config.target_modules",), listed, layout)
        elif kind == "lora":
            carry_targets(ledger, (), ["query_key_value"], layout, note="peft's default for ChatGLM")
        if kind == "lora":  # peft's own defaults
            for place, value in (("rank", 8), ("alpha", 8), ("dropout", 0.0)):
                ledger.imply(f"method.{place}", value, DEFAULT)
    elif method == "ptuning_v2":
        if (length := ledger.whole("peft_config.num_virtual_tokens")) is not None:
            ledger.carry("peft_config.num_virtual_tokens", "method.num_virtual_tokens", length)
        if (projected := ledger.flag("peft_config.prefix_projection")) is not None:
            ledger.carry("peft_config.prefix_projection", "method.projection", projected)


def _carry_rest(ledger: Ledger) -> None:
    if (last := ledger.flag("combine")) is not None:
        note = "the last reply alone is learnt" if last else "every reply is learnt"
        ledger.carry("combine", "data.turns", "last" if last else "flagged", note)
    ledger.needs_no_key("freezeV", "weitiao tunes the language model alone")
    ledger.needs_no_key("peft_config.task_type", "causal language models are what weitiao tunes")
    ledger.leave("peft_config.inference_mode", "an adapter is made to be tuned")
    ledger.leave("peft_config.bias", "biases are not tuned")
    ledger.leave("peft_config.modules_to_save", "no whole layer is tuned beside the adapter")
    resume = ledger.text("auto_resume_from_checkpoint")
    if resume is not None and resume.lower() != "yes" and not resume.isdecimal():
        ledger.note(f"The original reads {resume} as the checkpoint to go on from, finds none, and trains nothing.")
    ledger.leave("auto_resume_from_checkpoint", "a checkpoint of another program cannot be gone on with; an adapter "
                 "can be a start: model.adapter")  # fmt: skip
    for key in ledger.settings:
        if key.startswith("training_args.generation_config."):
            _carry_generation(ledger, key)


def _carry_generation(ledger: Ledger, key: str) -> None:
    name = key.rpartition(".")[2]
    if name in ("temperature", "top_p") and (value := ledger.number(key)) is not None:
        ledger.carry(key, f"generate.{name}", value)
    elif name == "top_k" and (count := ledger.whole(key)) is not None:
        ledger.carry(key, "generate.top_k", count)
    elif name == "do_sample":
        ledger.leave(key, "scoring is greedy, so that figures can be repeated; generate.temperature samples")
