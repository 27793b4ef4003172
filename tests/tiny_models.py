"""Tiny random models and chat formats of every kind of vocabulary, for tests of generation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from conftest import CHATML_TEMPLATE, make_tokenizer
from test_render import INST_TEMPLATE, metaspace_tokenizer
from weitiao.generate.chat import Reply
from weitiao.generate.constraint import compiler_of
from weitiao.generate.engine import Generation
from weitiao.messages import Message
from weitiao.render.base import Renderer
from weitiao.render.template import TemplateRenderer

TOKENIZERS = ("chatml", "metaspace", "inst", "byte fallback")
WORDS = (
    "你好",
    "world",
    "书",
    "🙂",
    "é",
    "a b",
    '"]',
    '"}',
    "```",
    "\\n",
    "\n",
    "<|im_end|>",
    "</s>",
    "[INST]",
    "<0x0A>",
)


@cache
def renderer_of(name: str) -> Renderer:
    """`chatml`: bytes, as Qwen; `metaspace` and `inst`: blanks before texts, as Llama 2; `byte fallback`: as Gemma."""
    if name == "chatml":
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        return TemplateRenderer(make_tokenizer(special, bos=None, eos="<|im_end|>", template=CHATML_TEMPLATE))
    tokenizer = metaspace_tokenizer("first", INST_TEMPLATE if name == "inst" else None, newlines=True)
    if name == "byte fallback":
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        state["pre_tokenizer"] = None
        state["decoder"]["decoders"].pop()  # the blank before a text, which there is none of
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", pad_token="<unk>"
        )
    return TemplateRenderer(tokenizer)


@cache
def model_of(family: str, vocab_size: int, seed: int = 0) -> PreTrainedModel:
    """A tiny random model whose scores are wide apart; its vocabulary is larger than the tokenizer's."""
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.6,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "gemma3":
            layers = ["sliding_attention", "full_attention"]
            config = Gemma3TextConfig(**shared, head_dim=16, sliding_window=7, layer_types=layers)
            return Gemma3ForCausalLM(config).float().eval()
        if family == "glm":
            return GlmForCausalLM(GlmConfig(**shared, head_dim=8, pad_token_id=0)).float().eval()
        if family == "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**shared)).float().eval()
        return LlamaForCausalLM(LlamaConfig(**shared)).float().eval()


def setting(tokenizer: str, family: str = "llama", seed: int = 0) -> tuple[PreTrainedModel, Renderer, Compile]:
    renderer = renderer_of(tokenizer)
    vocab_size = len(renderer.tokenizer) + 13
    return model_of(family, vocab_size, seed), renderer, compiler_of(renderer, vocab_size).compile


Compile = Any


def ask(text: str) -> list[Message]:
    return [Message(role="user", text=text)]


def in_order(generations: Iterator[Generation] | Iterator[Reply]) -> list[Any]:
    return sorted(generations, key=lambda each: each.index)
