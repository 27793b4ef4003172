"""Models held packed, for tests: the ways that can be had here, and tiny models whose sizes all of them can take."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    GlmForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from conftest import CHATML_TEMPLATE, make_tokenizer, save_model
from prefix_models import EOP, GMASK, MASK, SOP, VOCABULARY
from weitiao.models.glm.chatglm import ChatGlmForCausalLM
from weitiao.models.glm.chatglm_config import ChatGlmConfig
from weitiao.models.quantizing import PACKINGS, pack_model

FOREIGN = tuple(name for name, packing in PACKINGS.items() if packing.library != "weitiao")
ROW = torch.tensor([[4, 17, 33, 8, 61, 20, 5, 44, 9, 3, 71]])
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip


def packings(*names: str) -> list[Any]:
    """Parameters for a test over `names`, those of libraries that are not installed skipped with a reason.

    Those of torchao are slow: its import takes seconds, in every process of a test run that has it.
    """
    found = []
    for name in names:
        library = PACKINGS[name].library
        lacks = library != "weitiao" and importlib.util.find_spec(library) is None
        marks = [pytest.mark.slow] if library == "torchao" else []
        marks += [pytest.mark.skip(reason=f"{library} is not installed")] if lacks else []
        found.append(pytest.param(name, marks=marks))
    return found


def plain(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model, the same at every call; rows of 64 and 128 numbers, blocks of four bits being of 64."""
    none: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: PreTrainedModel
        if family == "chatglm":
            ids = {"mask_token_id": MASK, "gmask_token_id": GMASK, "bos_token_id": SOP, "eos_token_id": EOP}
            sizes: dict[str, Any] = {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4}
            config = ChatGlmConfig(
                vocab_size=VOCABULARY, max_sequence_length=256, inner_hidden_size=128, tie_word_embeddings=False,
                initializer_range=0.2, **sizes, **ids,
            )  # fmt: skip
            model = ChatGlmForCausalLM(config)
        elif family == "gemma3":
            layers = ["sliding_attention", "full_attention"]
            model = Gemma3ForCausalLM(
                Gemma3TextConfig(
                    **SIZES, **none, vocab_size=VOCABULARY, head_dim=16, sliding_window=6, layer_types=layers
                )
            )
        elif family == "glm":
            model = GlmForCausalLM(
                GlmConfig(**SIZES, **none, vocab_size=VOCABULARY, head_dim=16, partial_rotary_factor=0.5)
            )
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **none, vocab_size=VOCABULARY))
    return model.to(dtype).eval()


def packed(family: str, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model of `family` with its layers packed."""
    model = plain(family, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # bitsandbytes and torchao use what torch deprecates
        pack_model(model, PACKINGS[name])
    return model


def write_instruct_folder(folder: Path) -> Path:
    """A tiny instruct model that can be asked, as `tiny_qwen2_folder`, in sizes that all packings take."""
    tokenizer = make_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], bos=None, eos="<|im_end|>", template=CHATML_TEMPLATE
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = Qwen2Config(
            **SIZES,
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
        model = Qwen2ForCausalLM(config)
    return save_model(folder, model, tokenizer)


@torch.no_grad()
def logits(model: Any, row: Tensor = ROW) -> Tensor:
    """Float32 logits ``[T, V]`` of one row."""
    found: Tensor = model(row).logits[0].float()
    return found
