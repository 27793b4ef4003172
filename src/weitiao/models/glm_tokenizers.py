"""The vocabularies of the GLM family's original checkpoints as fast tokenizers with the original ids.

    ChatGLM-6B     ice_text.model     SentencePiece, unigram     a [gMASK] <sop> b <eop>
    ChatGLM2, 3    tokenizer.model    SentencePiece, BPE         [gMASK] sop a b </s>
    GLM-4          tokenizer.model    tiktoken ranks             [gMASK] <sop> a

Everything that the originals do in Python is written into the tokenizer itself, so a saved one works without weitiao.

Which texts become control tokens is as in the originals. Called on a text, ChatGLM-6B's tokenizer reads ``<sop>``,
``<eop>``, ``<unk>``, ``<pad>`` and ``[MASK]`` as control tokens, GLM-4's reads all of its own, those of ChatGLM2 and
ChatGLM3 none. Chat templates need them all the same: they write ``▁`` (U+2581, SentencePiece's own sign for a blank)
directly before a token, and that is read. With ``tokenizer.backend_tokenizer.encode_special_tokens = True`` nothing is
read as a control token, and every text has the ids that the original's vocabulary gives it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..errors import ModelError
from . import glm_templates
from .charsmap import normalizer_steps
from .layouts import GlmLayout
from .sentencepiece_file import Piece, PieceType, SentencePieceModel, read_sentencepiece
from .sources import read_json

_BLANK = "▁"
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
"""The score of a piece that text cannot spell: below that of any text."""


def glm_tokenizer(folder: Path, layout: GlmLayout) -> PreTrainedTokenizerFast:
    """The tokenizer of an original checkpoint: ids, control tokens, padding and chat template as its own code has them.

    Args:
        folder: where the vocabulary file and, for GLM-4, tokenizer_config.json are.
        layout: which model it is.

    Raises:
        ModelError: the vocabulary is missing, is no vocabulary, or is that of another model.
    """
    if layout == "chatglm":
        return _chatglm(_pieces(folder / "ice_text.model", "unigram", "ChatGLM-6B"))
    if layout == "glm4":
        return _glm4(folder)
    return _chatglm2(_pieces(folder / "tokenizer.model", "bpe", "ChatGLM2 and ChatGLM3"), roles=layout == "chatglm3")


def _pieces(path: Path, algorithm: str, model: str) -> SentencePieceModel:
    _must_exist(path, model)
    vocabulary = read_sentencepiece(path)
    if vocabulary.algorithm != algorithm or not vocabulary.byte_fallback:
        raise ModelError(
            f"{path}: this vocabulary is of the kind {vocabulary.algorithm} with {len(vocabulary.pieces)} pieces, "
            f"that of {model} is of the kind {algorithm}. Take the file of the checkpoint that config.json describes."
        )
    return vocabulary


def _must_exist(path: Path, model: str) -> None:
    if not path.is_file():
        raise ModelError(
            f"{path.parent}: the vocabulary of {model}, {path.name}, is missing. Copy it from the original checkpoint."
        )


def _chatglm(vocabulary: SentencePieceModel) -> PreTrainedTokenizerFast:
    pieces = [replace(p, text=_GMASK) if p.text == "[gMASK]" else p for p in vocabulary.pieces]
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    user_defined = [piece.text for piece in pieces if piece.type is PieceType.USER_DEFINED]
    best = max(piece.score for piece in pieces if piece.type is PieceType.NORMAL)
    backend = Tokenizer(Unigram([(p.text, _unigram_score(p, best)) for p in pieces], ids["<unk>"], byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Replace("\n", "<n>"),
            normalizers.Replace("\t", "<|tab|>"),
            *(normalizers.Replace(" " * k, f"<|blank_{k}|>") for k in range(_MOST_BLANKS, 1, -1)),
            *normalizer_steps(vocabulary.charsmap, kept=user_defined),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex(r"\A +"), ""),
            normalizers.Prepend(" "),
            normalizers.Replace(Regex(rf"[ {_BLANK}]+\z"), ""),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_BLANK, prepend_scheme="never", split=False)
    controls = [p.text for p in pieces if p.type is PieceType.CONTROL]
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_whole("", controls), ""),
            decoders.Replace(_whole("", ["<unk>"]), " ⁇ "),
            decoders.Replace(_BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
            decoders.Replace("<n>", "\n"),
            decoders.Replace("<|tab|>", "\t"),
            *(decoders.Replace(f"<|blank_{k}|>", " " * k) for k in range(2, _MOST_BLANKS + 1)),
        ]
    )
    backend.add_special_tokens([_token(t) for t in ("<sop>", "<eop>", "<unk>", "<pad>", "[MASK]", _GMASK)])
    backend.post_processor = _template(f"$A {_GMASK} <sop>", f"$A {_GMASK} <sop> $B <eop>", backend)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_token("<sop>"),
        eos_token=_token("<eop>"),
        unk_token=_token("<unk>"),
        pad_token=_token("<pad>"),
        mask_token=_token("[MASK]"),
        extra_special_tokens=[_token(_GMASK)],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=glm_templates.CHATGLM,
    )


def _token(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=True)


def _unigram_score(piece: Piece, best: float) -> float:
    """The score with which the best path is looked for; a user-defined piece outweighs its bytes."""
    if piece.type is PieceType.NORMAL:
        return piece.score
    if piece.type is PieceType.USER_DEFINED:
        return len(piece.text.encode()) * best - 0.1
    return _NEVER


def _chatglm2(vocabulary: SentencePieceModel, *, roles: bool) -> PreTrainedTokenizerFast:
    pieces = vocabulary.pieces
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    specials = [*_CHATGLM2_SPECIALS, *(_ROLES if roles else ())]
    ids |= {token: len(pieces) + i for i, token in enumerate(specials)}
    backend = Tokenizer(BPE(ids, _merges(pieces), unk_token="<unk>", byte_fallback=True))
    named = ["<unk>", "<s>", "</s>"]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(" "), *_hidden([*named, *specials])])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_BLANK, prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_whole(f"{_BLANK}?", named if roles else [*named, *specials]), ""),
            decoders.Replace(Regex(rf"\A{_BLANK}(?=(?:{_any_of(specials)})\z)"), ""),
            decoders.Replace(_BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([_hidden_token(token) for token in [*named, *specials]])
    backend.post_processor = _template("[gMASK] sop $A", "[gMASK] sop $A $B </s>", backend)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_hidden_token("<s>"),
        eos_token=_hidden_token("</s>"),
        unk_token=_hidden_token("<unk>"),
        pad_token=_hidden_token("<unk>"),
        extra_special_tokens=[_hidden_token(token) for token in specials],
        padding_side="left",
        model_max_length=8192 if roles else 32768,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=glm_templates.CHATGLM3 if roles else glm_templates.CHATGLM2,
    )


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece; those that make a better one first."""
    normal = {piece.text: piece.score for piece in pieces if piece.type is PieceType.NORMAL}
    merges: list[tuple[str, str]] = []
    for text in sorted(normal, key=lambda text: -normal[text]):
        merges += [(text[:at], text[at:]) for at in range(1, len(text)) if text[:at] in normal and text[at:] in normal]
    return merges


def _hidden_token(token: str) -> AddedToken:
    # looked for in normalised text, where only ▁ directly before it tells it from text; [gMASK] opens templates and
    # takes the blank that is put before every text
    return AddedToken(token, normalized=True, special=True, lstrip=token == "[gMASK]")


def _hidden(tokens: Sequence[str]) -> list[normalizers.Normalizer]:
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
    ranks = _read_ranks(path)
    characters = bytes_to_unicode()
    spelling = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = sorted(
        (rank, ranks[token[:at]], ranks[token[at:]], spelling[token[:at]], spelling[token[at:]])
        for token, rank in ranks.items()
        for at in range(1, len(token))
        if token[:at] in ranks and token[at:] in ranks
    )
    backend = Tokenizer(
        BPE({spelling[token]: rank for token, rank in ranks.items()}, [m[3:] for m in merges], ignore_merges=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_GLM4_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_token(token) for token in _GLM4_SPECIALS])
    backend.post_processor = _template("[gMASK] <sop> $A", "[gMASK] <sop> $A $B", backend)
    config = read_json(folder / "tokenizer_config.json")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=_token("<|endoftext|>"),
        pad_token=_token("<|endoftext|>"),
        extra_special_tokens=[_token(token) for token in _GLM4_SPECIALS[1:]],
        padding_side="left",
        model_max_length=config.get("model_max_length", 128000),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=config.get("chat_template"),
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken file as bytes, each with its id."""
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as error:
        raise ModelError(f"{path}: the vocabulary cannot be read: {error.strerror or error}.") from None
    except (ValueError, binascii.Error):
        raise ModelError(
            f"{path}: line {len(ranks) + 1} is no token of a tiktoken vocabulary, which is what GLM-4 has. "
            "Take the file of the checkpoint that config.json describes."
        ) from None
    return ranks
