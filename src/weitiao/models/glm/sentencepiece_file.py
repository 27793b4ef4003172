"""SentencePiece model files (``*.model``), read as what they are: a protocol buffer of pieces and settings.

Knows the file format (google/sentencepiece: src/sentencepiece_model.proto) and nothing of what is made of it. The few
fields that tokenisation depends on are read straight from the wire format, so neither `sentencepiece` nor `protobuf`
has to be installed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Literal

from ...errors import ModelError


class PieceType(IntEnum):
    """What a piece is to the tokeniser; the numbers are those of the file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the file."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """What a SentencePiece file says about how text becomes ids."""

    pieces: tuple[Piece, ...] = field(repr=False)
    algorithm: Literal["unigram", "bpe", "word", "char"]
    byte_fallback: bool
    """Whether a character without a piece becomes its UTF-8 bytes rather than the unknown token."""
    charsmap: bytes = field(repr=False)
    """The compiled normalisation rules (double array and texts); empty where text is taken as it is."""
    add_dummy_prefix: bool
    """Whether a blank is put before every text."""
    remove_extra_whitespaces: bool
    """Whether blanks at both ends go and runs of them become one."""


_ALGORITHMS: dict[int, Literal["unigram", "bpe", "word", "char"]] = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The pieces and settings of a SentencePiece file.

    Raises:
        ModelError: the file is missing, cannot be read, or is no SentencePiece model.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: the vocabulary cannot be read: {error.strerror or error}.") from None
    try:
        model = _model(content)
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ModelError(
            f"{path}: this is no SentencePiece model ({error}; {len(content)} bytes that begin {content[:24]!r}). "
            "Download the file again; a file of some hundred bytes is a Git LFS pointer, not the file."
        ) from None
    return model


def _model(content: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] | None = None
    for number, value in _fields(content):
        if number == 1:
            pieces.append(_piece(_bytes(value)))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    if not trainer or normalizer is None:
        raise ValueError("it ends before its settings")
    if not normalizer.get(5, 1) or trainer.get(24, 0):
        raise ValueError("it keeps blanks as they are or puts them behind words, which no GLM vocabulary does")
    algorithm = trainer.get(3, 1)
    return SentencePieceModel(
        pieces=tuple(pieces),
        algorithm=_ALGORITHMS[algorithm] if isinstance(algorithm, int) else "unigram",
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _piece(content: bytes) -> Piece:
    fields = dict(_fields(content))
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    kind = fields.get(3, 1)
    return Piece(_bytes(fields[1]).decode(), score, PieceType(kind if isinstance(kind, int) else 1))


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    raise TypeError("a number stands where text belongs")


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one message as numbers and values; a number of fixed width stays bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(content, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(content, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"byte {at} opens no field")
        if number == 0 or at + size > len(content):
            raise ValueError(f"the field at byte {at} does not fit the file")
        yield number, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"the number before byte {at} has no end")
