"""LLaMA-Factory: YAML and JSON files, command lines of ``llamafactory-cli`` and ``llmtuner``, saved LLaMA Boards.

Keys from v0.2 (``llmtuner``) to 0.9. Source: hiyouga/LLaMA-Factory src/llamafactory/hparams; what is left, and why,
stands in llama_factory_keys.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError
from .ledger import DEFAULT, Ledger, Wishes
from .llama_factory_keys import LEFT, NEEDLESS
from .methods import choose_method
from .rows import carry_rows, count_rows
from .targets import carry_model, carry_targets, layout_of
from .training import carry_training_arguments

TOLD = "LLaMA-Factory"

_BOARD_NAMES = {
    "batch_size": "per_device_train_batch_size",
    "model_path": "model_name_or_path",
    "checkpoint_path": "adapter_name_or_path",
    "training_stage": "stage",
    "neftune_alpha": "neftune_noise_alpha",
    "visual_inputs": "freeze_vision_tower",
    "num_layer_trainable": "freeze_trainable_layers",
    "name_module_trainable": "freeze_trainable_modules",
}
_OLD_NAMES = {"cutoff_length": "cutoff_len", "checkpoint_dir": "adapter_name_or_path"}
_SUPERVISED = ("sft", "supervised fine-tuning")


def board_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a LLaMA Board saved (``top.model_path``, ``train.batch_size``) by the names of the command line."""
    settings: dict[str, Any] = {}
    for key, value in saved.items():
        name = key.rpartition(".")[2]
        settings[_BOARD_NAMES.get(name, name)] = value
    if (kind := settings.pop("compute_type", None)) is not None:
        settings[str(kind)] = True
    return settings


def carry_llama_factory(ledger: Ledger, wishes: Wishes, *, devices: int) -> None:
    """Write down what becomes of every key.

    Raises:
        RecipeError: the file asks for something else than supervised fine-tuning.
    """
    _require_training(ledger)
    carry_model(ledger, wishes, ("model_name_or_path",), ledger.text("model_name_or_path"))
    adapters = ledger.settings.get("adapter_name_or_path")
    if isinstance(adapters, str) and adapters and "," not in adapters:
        ledger.carry("adapter_name_or_path", "model.adapter", adapters, "training starts from it")
    ledger.leave("adapter_name_or_path", "a model starts from one adapter; merge the others first")
    _carry_rows(ledger, wishes)
    _carry_length(ledger)
    ledger.imply("data.overlong", "shorten_input", "the original cut prompts and answers in proportion")
    ledger.note(
        "Rows longer than cutoff_len: the original cut prompts and answers in proportion. weitiao never cuts an "
        "answer: shorten_input cuts the text of a question, and names the rows."
    )
    last = ledger.flag("mask_history")
    if last:
        ledger.carry("mask_history", "data.turns", "last", "the last reply alone is learnt")
    ledger.needs_no_key("mask_history", "every reply is learnt")
    carry_training_arguments(ledger, wishes, devices=devices)
    _carry_checkpointing(ledger)
    _carry_quantization(ledger)
    _carry_method(ledger, wishes)
    _carry_generation(ledger)
    ledger.settle(NEEDLESS, needless=True)
    ledger.settle(LEFT, needless=False)


def _carry_length(ledger: Ledger) -> None:
    old = ("max_source_length", "max_target_length")
    lengths = [ledger.whole(key) for key in old]
    if (cutoff := ledger.whole("cutoff_len")) is not None:
        ledger.carry("cutoff_len", "data.max_length", cutoff)
    elif None not in lengths:
        ledger.carry(old, "data.max_length", sum(length or 0 for length in lengths))
    for key in old:
        ledger.leave(key, "cutoff_len overrides it")
    ledger.imply("data.max_length", 2048, DEFAULT)


def _require_training(ledger: Ledger) -> None:
    stage = (ledger.text("stage") or "sft").lower()
    if stage not in _SUPERVISED:
        raise RecipeError(
            f"{ledger.spelled('stage')} cannot be migrated: weitiao learns from labelled answers alone so far."
        )
    if ledger.has("export_dir") and not ledger.has("dataset"):
        raise RecipeError("This file of LLaMA-Factory merges and exports a model; it trains nothing to be migrated.")
    if ledger.flag("do_train") is False and (ledger.flag("do_predict") or ledger.flag("do_eval")):
        raise RecipeError("This file of LLaMA-Factory scores a model; it trains nothing (do_train is false).")
    ledger.needs_no_key("stage", "weitiao learns from labelled answers")


def _carry_rows(ledger: Ledger, wishes: Wishes) -> None:
    keys = ("dataset", "dataset_dir")
    folder = ledger.text("dataset_dir") or "data"
    train, dev = (_data_sets(ledger.settings.get(name), folder) for name in ("dataset", "eval_dataset"))
    carry_rows(ledger, wishes, train=keys, train_paths=train, dev=("eval_dataset",), dev_paths=dev)
    limit = ledger.whole("max_samples")
    if limit is not None and "data.train" in ledger.lines:
        for place in ("data.train", "data.dev"):
            for source in ledger.lines[place].value if place in ledger.lines else ():
                source["limit"] = limit
        ledger.carry_into("max_samples", "data.train", "limit of every source: rows chosen by the seed, not the first")
    _carry_share(ledger, wishes)
    mixing = ledger.text("mix_strategy") or "concat"
    if mixing == "concat":
        ledger.needs_no_key("mix_strategy", "sources lie end to end")
    ledger.leave("mix_strategy", "sources lie end to end; the weight of each source in data.train mixes them")
    ledger.leave("interleave_probs", "the weight of each source in data.train says how often its rows are seen")


def _data_sets(names: Any, folder: str) -> list[str]:
    """``identity,alpaca_zh`` → an entry of dataset_info.json each; files are taken as they are."""
    listed = names.split(",") if isinstance(names, str) else list(names or ())
    found = []
    for name in (str(one).strip() for one in listed):
        if name and not os.path.isfile(os.path.join(folder, name)):
            found.append(f"{folder.rstrip('/')}/dataset_info.json#{name}")
        elif name:
            found.append(os.path.join(folder, name))
    return found


def _carry_share(ledger: Ledger, wishes: Wishes) -> None:
    """``data.held_out`` from a share or a number of rows."""
    size = ledger.number("val_size")
    if "data.dev" in ledger.lines:
        ledger.leave("val_size", "there are dev rows of their own")
    elif size is not None and size < 1:
        ledger.carry("val_size", "data.held_out", size)
    elif size is not None and (rows := count_rows(ledger, wishes)):
        if size >= rows:
            raise RecipeError(f"{ledger.spelled('val_size')} is more than the {rows:,} rows. Lower it.")
        ledger.carry("val_size", "data.held_out", round(size / rows, 6), f"of {rows:,} rows")
    elif size is not None:
        ledger.ask(
            f"{ledger.spelled('val_size')} counts rows, weitiao keeps a share of them apart, and the rows do not lie "
            f"here. Say where they are (--data FILE), or how many (--rows N)."
        )
    if "data.dev" not in ledger.lines:
        ledger.imply("data.held_out", 0.0, "the original keeps no rows apart")
        if not size:
            ledger.note(
                "No row is kept apart, so that nothing tells when tuning does harm: data.held_out=0.1 is better."
            )


def _carry_checkpointing(ledger: Ledger) -> None:
    off = ledger.flag("disable_gradient_checkpointing")
    if off is not None:
        ledger.carry("disable_gradient_checkpointing", "train.gradient_checkpointing", not off)
    ledger.imply("train.gradient_checkpointing", True, "LLaMA-Factory switches it on")


def _carry_quantization(ledger: Ledger) -> None:
    bits = ledger.whole("quantization_bit")
    if bits in (4, 8):
        ledger.carry("quantization_bit", "model.quantize", f"int{bits}", "weights by rows, not bitsandbytes' types")
    ledger.leave("quantization_bit", "weights are held in 4 or 8 bits")
    for key in ("quantization_method", "quantization_type", "double_quantization", "quantization_device_map"):
        if not ledger.has("quantization_bit"):
            ledger.needs_no_key(key, "nothing is quantised")
        ledger.leave(key, "model.quantize has one way: a scale for every row of a matrix")


def _carry_method(ledger: Ledger, wishes: Wishes) -> None:
    own = (ledger.text("finetuning_type") or "lora").lower()
    own = "ptuning_v2" if own == "p_tuning" else own
    method = choose_method(ledger, wishes, own)
    if method == own:
        ledger.carry("finetuning_type", "method.name", method)
    ledger.leave("finetuning_type", f"the recipe tunes by {method}")
    if method == "freeze" and own == "freeze":
        _carry_learning_layers(ledger)
    if method != "lora":
        for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_rslora", "use_dora"):
            ledger.leave(key, f"the recipe tunes by {method}")
        return
    if own == "lora":
        rank = ledger.whole("lora_rank") or 8
        ledger.carry("lora_rank", "method.rank", rank)
        alpha = ledger.number("lora_alpha")
        ledger.carry("lora_alpha", "method.alpha", round(alpha) if alpha else 2 * rank, "" if alpha else "2 × rank")
        ledger.carry("lora_dropout", "method.dropout", ledger.number("lora_dropout") or 0.0)
        target = ledger.settings.get("lora_target") or "all"
        names = [str(name).strip() for name in (target.split(",") if isinstance(target, str) else target)]
        carry_targets(ledger, ("lora_target",), names, layout_of(ledger, hint=None))
    for name in ("rslora", "dora"):
        if (wanted := ledger.flag(f"use_{name}")) is not None:
            ledger.carry(f"use_{name}", f"method.{name}", wanted)
    if ratio := ledger.number("loraplus_lr_ratio"):
        ledger.carry("loraplus_lr_ratio", "method.b_learning_rate", ratio)
    if ledger.flag("pissa_init") and not ledger.flag("use_dora"):  # with DoRA there is one start
        ledger.carry("pissa_init", "method.init", "pissa")


def _carry_learning_layers(ledger: Ledger) -> None:
    """``method.layers`` and ``method.parameters``: the last layers, or with a negative number the first ones."""
    count = ledger.whole("freeze_trainable_layers")
    count = 2 if count is None else count
    extra = ledger.settings.get("freeze_extra_modules") or ()
    names = [str(name).strip() for name in (extra.split(",") if isinstance(extra, str) else extra)]
    if count < 0:
        first = [f"layers.{number}." for number in range(-count)]
        ledger.carry("freeze_trainable_layers", "method.parameters", [*first, *names], "the first layers")
        ledger.imply("method.layers", 0, "the weights that are named, no others")
        ledger.carry_into("freeze_extra_modules", "method.parameters", "beside the layers")
    else:
        ledger.carry("freeze_trainable_layers", "method.layers", count)
        if names:
            ledger.carry("freeze_extra_modules", "method.parameters", names, "beside the layers")
    if (ledger.text("freeze_trainable_modules") or "all") == "all":
        ledger.needs_no_key("freeze_trainable_modules", "layers learn whole")
    ledger.leave("freeze_trainable_modules", "layers learn whole here; name their weights in method.parameters instead")


def _carry_generation(ledger: Ledger) -> None:
    tokens = ledger.whole("max_new_tokens")
    if tokens:
        ledger.carry("max_new_tokens", "generate.max_new_tokens", tokens)
    if ledger.flag("do_sample") is False:
        ledger.carry("do_sample", "generate.temperature", 0.0, "greedy")
    else:
        ledger.leave("do_sample", "scoring is greedy, so that figures can be repeated; generate.temperature samples")
        for name in ("temperature", "top_p"):
            if (value := ledger.number(name)) is not None:
                ledger.carry(name, f"generate.{name}", value)
        if (count := ledger.whole("top_k")) is not None:
            ledger.carry("top_k", "generate.top_k", count)
    for name in ("temperature", "top_p", "top_k"):
        ledger.needs_no_key(name, "without an effect on greedy answers")


def old_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` by today's names where a key was renamed since."""
    return {_OLD_NAMES.get(key, key): value for key, value in settings.items()}
