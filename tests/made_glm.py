"""Tokenizers of the ChatGLM family's four formats: small ones made here, and the real vocabularies where they are.

The made ones have the family's control tokens and its two ways with text: a blank before every text and bytes for rare
characters (ChatGLM-6B, ChatGLM2, ChatGLM3), or bytes throughout (GLM-4).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conftest import CORPUS
from weitiao.models.glm.layouts import GlmLayout
from weitiao.models.glm.tokenizers import glm_tokenizer
from weitiao.render.glm import glm_renderer

LAYOUTS: tuple[GlmLayout, ...] = ("chatglm", "chatglm2", "chatglm3", "glm4")
_FOLDERS = {"chatglm": "chatglm_v1", "chatglm2": "chatglm2", "chatglm3": "chatglm3", "glm4": "glm4"}
_ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
_CONTROL = {
    "chatglm": ["<unk>", "[MASK]", "[gMASK]", "<sop>", "<eop>"],
    "chatglm2": ["<unk>", "</s>", "[gMASK]", "sop", "eop"],
    "chatglm3": ["<unk>", "</s>", "[gMASK]", "sop", "eop", *_ROLES],
    "glm4": ["<|endoftext|>", "[gMASK]", "<sop>", "<eop>", *_ROLES],
}


@cache
def made_tokenizer(layout: GlmLayout) -> PreTrainedTokenizerBase:
    """A tokenizer of about a thousand tokens for the format of `layout`."""
    control = _CONTROL[layout]
    if layout == "glm4":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(CORPUS, trainer)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Prepend(" ")
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=1100, special_tokens=["<unk>", *bytes_], show_progress=False)
        backend.train_from_iterator([line.replace("\n", " ") for line in CORPUS], trainer)
        state = json.loads(backend.to_str())
        state["added_tokens"] = []  # the bytes are tokens like others
        backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    names = {"eos_token": "<|endoftext|>"} if layout == "glm4" else {"unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=control[0], **names)


@cache
def real_tokenizer(layout: GlmLayout, shared: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the original checkpoint."""
    return glm_tokenizer(vocabulary_folder(layout, shared), layout)


def vocabulary_folder(layout: GlmLayout, shared: Path) -> Path:
    """Where the real vocabulary and its golden ids are."""
    return shared / "golden" / "tokenizers" / _FOLDERS[layout]


@cache
def made_renderer(layout: GlmLayout) -> Any:
    """The format of `layout` over the made tokenizer."""
    return glm_renderer(layout, made_tokenizer(layout))


@cache
def real_renderer(layout: GlmLayout, shared: Path) -> Any:
    """The format of `layout` over the real vocabulary."""
    return glm_renderer(layout, real_tokenizer(layout, shared))


def renderer_named(name: str, request: pytest.FixtureRequest) -> Any:
    """The renderer of ``LAYOUT made`` or ``LAYOUT real``; the test is skipped where the real vocabulary is absent."""
    layout, kind = name.split()
    if kind == "made":
        return made_renderer(layout)  # type: ignore[arg-type]
    return real_renderer(layout, request.getfixturevalue("shared_or_skip"))  # type: ignore[arg-type]
