"""The vocabularies of the GLM family's original checkpoints as fast tokenizers with the original ids.

    ChatGLM-6B     ice_text.model     SentencePiece, unigram     a [gMASK] <sop> b <eop>
    ChatGLM2, 3    tokenizer.model    SentencePiece, BPE         [gMASK] sop a b </s>
    GLM-4          tokenizer.model    tiktoken ranks             [gMASK] <sop> a

Everything that the originals do in Python is written into the tokenizer itself, so a saved one works without weitiao.

Which texts become control tokens is as in the originals. Called on a text, ChatGLM-6B's tokenizer reads ``<sop>``,
``<eop>``, ``<unk>``, ``<pad>`` and ``[MASK]`` as control tokens, GLM-4's reads all of its own, those of ChatGLM2 and
ChatGLM3 none, but for a text that is one and nothing else. Chat templates need them all the same: they write ``▁``
(U+2581, SentencePiece's own sign for a blank) directly before a token, and that is read. ChatGLM-6B's [gMASK] is
therefore named ``▁[gMASK]`` in its vocabulary. With ``tokenizer.backend_tokenizer.encode_special_tokens = True``, or
called with ``split_special_tokens=True``, nothing is read as a control token, and every text has the ids that the
original's vocabulary gives it.

The one difference: where two ways to cut a text are equally good (-- - and - -- for three dashes), or nearly so after
thousands of tokens, ChatGLM-6B's SentencePiece decides by what float32 makes of the sum of all scores before. Here sums
are exact, and of equals the first is taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from ...errors import ModelError
from ..sources import read_json
from . import templates
from .charsmap import normalizer_steps
from .layouts import GlmLayout
from .sentencepiece_file import Piece, PieceType, SentencePieceModel, read_sentencepiece
from .tiktoken_file import as_byte_level, read_tiktoken

_BLANK = "▁"
_CHATGLM_NAMED = (
    ("bos_token", "<sop>"),
    ("eos_token", "<eop>"),
    ("unk_token", "<unk>"),
    ("pad_token", "<pad>"),
    ("mask_token", "[MASK]"),
)
_CHATGLM2_SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_GLM4_SPECIALS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *_ROLES,
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
_GLM4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GMASK = f"{_BLANK}[gMASK]"
"""How ChatGLM-6B's vocabulary names its [gMASK] here: the original never reads it from a text, and templates must."""

_MOST_BLANKS = 80
"""The longest run of blanks that ChatGLM-6B has a piece for."""

_NEVER = -1000.0
"""The score of a piece that text cannot spell: below that of its characters, each of which is a piece of its own."""


def glm_tokenizer(folder: Path, layout: GlmLayout) -> PreTrainedTokenizerFast:
    """The tokenizer of an original checkpoint: ids, control tokens, padding and chat template as its own code has them.

    It can take seconds; whoever opens a model often keeps it.

    Args:
        folder: where the vocabulary file is. Of the files beside it, tokenizer_config.json is read for GLM-4's chat
            template and config.json for the greatest length.
        layout: which model it is.

    Raises:
        ModelError: the vocabulary is missing, is no vocabulary, or is that of another model.
    """
    if layout == "glm4":
        return _glm4(folder)
    config_file = folder / "config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    if layout == "chatglm":
        vocabulary = _pieces(folder / "ice_text.model", "unigram", "ChatGLM-6B", 130_344)
        return chatglm_tokenizer(vocabulary, max_length=config.get("max_sequence_length", 2048))
    vocabulary = _pieces(folder / "tokenizer.model", "bpe", "ChatGLM2 and ChatGLM3", 64_789)
    roles = layout == "chatglm3"
    return chatglm2_tokenizer(vocabulary, roles=roles, max_length=config.get("seq_length", 8192 if roles else 32_768))


def _pieces(path: Path, algorithm: str, model: str, count: int) -> SentencePieceModel:
    _must_exist(path, model)
    vocabulary = read_sentencepiece(path)
    if vocabulary.algorithm != algorithm or not vocabulary.byte_fallback:
        raise ModelError(
            f"{path}: the pieces of this vocabulary are found by {vocabulary.algorithm}, those of {model} by "
            f"{algorithm} and else by bytes. Take the file of the checkpoint that config.json describes."
        )
    _must_count(path, len(vocabulary.pieces), model, count)
    return vocabulary


def _must_exist(path: Path, model: str) -> None:
    if not path.is_file():
        raise ModelError(
            f"{path.parent}: the vocabulary of {model}, {path.name}, is missing. Copy it from the original checkpoint."
        )


def _must_count(path: Path, found: int, model: str, expected: int) -> None:
    if found != expected:
        raise ModelError(
            f"{path}: this vocabulary has {found} tokens, that of {model} has {expected}. It belongs to another model: "
            "take the file of the checkpoint that config.json describes."
        )


def chatglm_tokenizer(vocabulary: SentencePieceModel, *, max_length: int) -> PreTrainedTokenizerFast:
    """ChatGLM-6B's tokenizer over `vocabulary`."""
    pieces = [replace(p, text=_GMASK) if p.text == "[gMASK]" else p for p in vocabulary.pieces]
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    blanks = [k for k in range(2, _MOST_BLANKS + 1) if f"<|blank_{k}|>" in ids]
    user_defined = [piece.text for piece in pieces if piece.type is PieceType.USER_DEFINED]
    best = max(piece.score for piece in pieces if piece.type is PieceType.NORMAL)
    backend = Tokenizer(Unigram([(p.text, _unigram_score(p, best)) for p in pieces], ids["<unk>"], byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Replace("\n", "<n>"),
            normalizers.Replace("\t", "<|tab|>"),
            *(normalizers.Replace(" " * k, f"<|blank_{k}|>") for k in reversed(blanks)),
            *_rules(vocabulary.charsmap, kept=user_defined),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex(r"\A +"), ""),
            normalizers.Prepend(" "),
            normalizers.Replace(Regex(r" +\z"), ""),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_BLANK, prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_whole("", [p.text for p in pieces if p.type is PieceType.CONTROL]), ""),
            decoders.Replace(_whole("", ["<unk>"]), " ⁇ "),
            decoders.Replace(_BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
            decoders.Replace("<n>", "\n"),
            decoders.Replace("<|tab|>", "\t"),
            *(decoders.Replace(f"<|blank_{k}|>", " " * k) for k in blanks),
        ]
    )
    # the original takes the blanks around a control token in a text away
    named = {name: AddedToken(token, lstrip=True, rstrip=True, normalized=False) for name, token in _CHATGLM_NAMED}
    backend.add_special_tokens([*named.values(), _spelt(_GMASK)])
    backend.post_processor = _template(f"$A {_GMASK} <sop>", f"$A {_GMASK} <sop> $B <eop>", backend)
    return _fast_tokenizer(
        backend, max_length=max_length, chat_template=templates.CHATGLM, named=named, others=[_spelt(_GMASK)]
    )


def _rules(charsmap: bytes, *, kept: Sequence[str]) -> list[normalizers.Normalizer]:
    try:
        return normalizer_steps(charsmap, kept=kept)
    except ValueError as error:
        raise ModelError(
            f"The rules by which this vocabulary normalises texts cannot be used: {error}. "
            "Take the ice_text.model of the original checkpoint."
        ) from None


def _spelt(token: str) -> AddedToken:
    """A control token that is read wherever a text spells it."""
    return AddedToken(token, normalized=False, special=True)


def _unigram_score(piece: Piece, best: float) -> float:
    """The score with which the best path is looked for; a user-defined piece outweighs its bytes."""
    if piece.type is PieceType.NORMAL:
        return piece.score
    if piece.type is PieceType.USER_DEFINED:
        return len(piece.text.encode()) * best - 0.1
    return _NEVER


def chatglm2_tokenizer(vocabulary: SentencePieceModel, *, roles: bool, max_length: int) -> PreTrainedTokenizerFast:
    """ChatGLM2's tokenizer over `vocabulary`; ChatGLM3's with `roles`."""
    pieces = vocabulary.pieces
    others = [*_CHATGLM2_SPECIALS, *(_ROLES if roles else ())]
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    ids |= {token: len(pieces) + i for i, token in enumerate(others)}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    controls = [*dict.fromkeys(named.values()), *others]
    backend = Tokenizer(BPE(ids, _merges(pieces), unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(" "), *_told_apart(controls)])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_BLANK, prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_whole(f"{_BLANK}?", list(named.values()) if roles else controls), ""),
            decoders.Replace(Regex(rf"\A{_BLANK}(?=(?:{_any_of(others)})\z)"), ""),
            decoders.Replace(_BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([_unspelt(token) for token in controls])
    backend.post_processor = _template("[gMASK] sop $A", "[gMASK] sop $A $B </s>", backend)
    return _fast_tokenizer(
        backend,
        max_length=max_length,
        chat_template=templates.CHATGLM3 if roles else templates.CHATGLM2,
        named={name: _unspelt(token) for name, token in named.items()},
        others=[_unspelt(token) for token in others],
    )


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece; those that make a better one first."""
    normal = {piece.text: piece.score for piece in pieces if piece.type is PieceType.NORMAL}
    merges: list[tuple[str, str]] = []
    for text in sorted(normal, key=lambda text: -normal[text]):
        merges += [(text[:at], text[at:]) for at in range(1, len(text)) if text[:at] in normal and text[at:] in normal]
    return merges


def _unspelt(token: str) -> AddedToken:
    """A control token that is read only behind ``▁``."""
    # looked for in normalised text, where only ▁ directly before it tells it from text; [gMASK] opens templates and
    # takes the blank that is put before every text
    return AddedToken(token, normalized=True, special=True, lstrip=token == "[gMASK]")


def _told_apart(tokens: Sequence[str]) -> list[normalizers.Normalizer]:
    """Normalisation after which ``▁`` stands before one of the tokens only where the text had it there.

    Every other blank, however it was written, is a blank; the pre-tokeniser makes both the same again. A text that is
    a token and nothing else is how the tokenizer looks up its own control tokens.
    """
    token = _any_of(tokens)
    return [
        normalizers.Replace(Regex(f"{_BLANK}(?!{token})"), " "),
        normalizers.Replace(Regex(rf"\A (?=(?:{token})\z)"), _BLANK),
    ]


def _any_of(tokens: Sequence[str]) -> str:
    return "|".join(re.escape(token) for token in tokens)


def _whole(before: str, tokens: Sequence[str]) -> Regex:
    return Regex(rf"\A{before}(?:{_any_of(tokens)})\z")


def _template(single: str, pair: str, backend: Tokenizer) -> processors.PostProcessor:
    names = {name for name in f"{single} {pair}".split() if not name.startswith("$")}
    return processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, backend.token_to_id(name)) for name in names]
    )


def _glm4(folder: Path) -> PreTrainedTokenizerFast:
    path = folder / "tokenizer.model"
    _must_exist(path, "GLM-4")
    ranks = read_tiktoken(path)
    _must_count(path, len(ranks), "GLM-4", 151_329)
    vocabulary, merges = as_byte_level(ranks)
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_GLM4_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_spelt(token) for token in _GLM4_SPECIALS])
    backend.post_processor = _template("[gMASK] <sop> $A", "[gMASK] <sop> $A $B", backend)
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    return _fast_tokenizer(
        backend,
        max_length=config.get("model_max_length", 131_072),
        chat_template=config.get("chat_template", templates.GLM4),
        named={"eos_token": _spelt("<|endoftext|>"), "pad_token": _spelt("<|endoftext|>")},
        others=[_spelt(token) for token in _GLM4_SPECIALS[1:]],
    )


def _fast_tokenizer(
    backend: Tokenizer,
    *,
    max_length: int,
    chat_template: str,
    named: dict[str, AddedToken],
    others: Sequence[AddedToken],
) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **named,
        extra_special_tokens=list(others),
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=chat_template,
    )
