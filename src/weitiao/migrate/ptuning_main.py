"""``ptuning/main.py`` of THUDM's ChatGLM-6B and ChatGLM2-6B: P-Tuning v2 where ``--pre_seq_len`` is given, else full.

The loss counts ``<sop>`` and the answer, which is weitiao's ``loss_mask: family``.
"""

from __future__ import annotations

from ..errors import RecipeError
from .ledger import DEFAULT, Ledger, Wishes
from .methods import choose_method
from .rows import carry_rows
from .targets import carry_model, carry_targets, layout_of
from .training import carry_training_arguments

TOLD = "ptuning/main.py"

_FORMATS = (("content", "summary"), ("prompt", "response"))
"""Columns for question and answer that weitiao knows."""


def carry_ptuning_main(ledger: Ledger, wishes: Wishes, *, devices: int) -> None:
    """Write down what becomes of every flag.

    Raises:
        RecipeError: the command predicts and trains nothing.
    """
    if not ledger.flag("do_train") and ledger.flag("do_predict"):
        raise RecipeError(
            "This command of ptuning/main.py answers rows and trains nothing (--do_predict without --do_train). "
            "Migrate the command that trains, then: weitiao evaluate runs/NAME --data FILE"
        )
    model = ledger.text("model_name_or_path")
    carry_model(ledger, wishes, ("model_name_or_path",), model)
    if (start := ledger.text("ptuning_checkpoint")) is not None:
        ledger.carry("ptuning_checkpoint", "model.adapter", start, "training starts from it")
    bits = ledger.whole("quantization_bit")
    if bits in (4, 8):
        ledger.carry("quantization_bit", "model.quantize", f"int{bits}")
    ledger.leave("quantization_bit", "weights are held in 4 or 8 bits")
    _carry_rows(ledger, wishes)
    carry_training_arguments(ledger, wishes, devices=devices)
    _carry_lengths(ledger)
    _carry_method(ledger, wishes)
    _carry_rest(ledger)


def _carry_rows(ledger: Ledger, wishes: Wishes) -> None:
    named = {which: [path] if (path := ledger.text(f"{which}_file")) else [] for which in ("train", "validation")}
    if not named["train"] and ledger.has("dataset_name"):
        owner = f"hf:{ledger.text('dataset_name')}"
        named = {which: [f"{owner}:{which}"] for which in named}
    options = _source_options(ledger)
    carry_rows(
        ledger,
        wishes,
        train=("train_file", "dataset_name"),
        train_paths=named["train"],
        dev=("validation_file",),
        dev_paths=named["validation"],
        options=options,
    )
    for name, place in (("max_train_samples", "data.train"), ("max_eval_samples", "data.dev")):
        limit = ledger.whole(name)
        if limit is not None and place in ledger.lines:
            for source in ledger.lines[place].value:
                source["limit"] = limit
            ledger.carry_into(name, place, "limit of every source: rows chosen by the seed, not the first")
    if "data.dev" not in ledger.lines:
        ledger.imply("data.held_out", 0.0, "the original keeps no rows apart")
    ledger.leave("dataset_config_name", "data sets of several configurations: convert them to a file first")
    ledger.leave("test_file", "after training: weitiao evaluate runs/NAME --data FILE")


def _source_options(ledger: Ledger) -> dict[str, str]:
    """How the rows are asked: by their own columns, with a text before every question where there is one."""
    columns = (ledger.text("prompt_column"), ledger.text("response_column"))
    prefix = ledger.text("source_prefix")
    if columns in _FORMATS or columns == (None, None):
        for key in ("prompt_column", "response_column"):
            ledger.needs_no_key(key, "rows are told by their keys")
    else:
        for key in ("prompt_column", "response_column"):
            ledger.leave(key, "weitiao tells rows by their keys: rename the columns to prompt and response")
    if ledger.text("history_column") == "history":
        ledger.needs_no_key("history_column", "rows are told by their keys")
    ledger.leave("history_column", "weitiao tells rows by their keys: rename the column to history")
    if prefix and columns[0] is not None and not ledger.has("history_column") and not {"{", "}"} & set(prefix):
        ledger.carry_into("source_prefix", "data.train", "the prompt of every source")
        return {"prompt": f"{prefix}{{{columns[0]}}}"}
    ledger.leave("source_prefix", "a prompt of data.train asks with a text before every question; see docs/formats.md")
    return {}


def _carry_lengths(ledger: Ledger) -> None:
    keys = ("max_source_length", "max_target_length")
    lengths = (ledger.whole(keys[0]) or 1024, ledger.whole(keys[1]) or 128)
    ledger.carry(keys, "data.max_length", sum(lengths), f"{lengths[0]} + {lengths[1]}")
    ledger.imply("data.overlong", "shorten_input", "the original cut the end of prompts and answers")
    ledger.note(
        "Rows over the limits: the original cut the end of prompts, in a long chat the latest question, and of "
        "answers. weitiao never cuts an answer: shorten_input cuts the text of a question, and names the rows."
    )


def _carry_method(ledger: Ledger, wishes: Wishes) -> None:
    length = ledger.whole("pre_seq_len")
    method = choose_method(ledger, wishes, "full" if length is None else "ptuning_v2")
    if method == "ptuning_v2" and length is not None:
        ledger.carry("pre_seq_len", "method.num_virtual_tokens", length)
        projected = ledger.flag("prefix_projection")
        if projected is not None:
            ledger.carry("prefix_projection", "method.projection", projected)
        ledger.imply("method.projection", False, DEFAULT)
    elif method == "lora":
        if length is None:
            carry_targets(ledger, (), ["all-linear"], layout_of(ledger, hint=None), note="--method lora")
        for key in ("pre_seq_len", "prefix_projection"):
            ledger.leave(key, "the recipe tunes by lora, which has no prefix", even_off=True)


def _carry_rest(ledger: Ledger) -> None:
    ledger.needs_no_key("ignore_pad_token_for_loss", "nothing is padded")
    ledger.needs_no_key("pad_to_max_length", "nothing is padded")
    ledger.needs_no_key("use_fast_tokenizer", "the vocabulary is always read into a fast tokenizer")
    ledger.settle(
        {
            "config_name": "the configuration is that of the model's folder",
            "tokenizer_name": "the tokenizer is that of the model's folder",
            "cache_dir": "models are kept where the Hugging Face hub keeps them; HF_HOME moves that",
            "model_revision": "the latest revision is taken; download another one to a folder",
            "use_auth_token": "log in with hf auth login",
            "resize_position_embeddings": "positions are rotary: there is no table to resize",
            "lang": "it asks for mBART's languages",
            "forced_bos_token": "it asks for mBART's languages",
            "num_beams": "an answer is written token by token, without beams",
            "val_max_target_length": "generate.max_new_tokens is auto: half as long again as the longest label",
            "max_predict_samples": "weitiao predict answers every row that it is given",
            "do_predict": "weitiao evaluate and weitiao predict do so after training",
        },
        needless=False,
    )
