"""tiktoken vocabulary files: a line for each token, its bytes in base64 and its rank, which is also its id."""

from __future__ import annotations

import base64
from pathlib import Path

from transformers.convert_slow_tokenizer import bytes_to_unicode

from ...errors import ModelError


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken file as bytes, each with its id.

    Raises:
        ModelError: the file cannot be read or is no tiktoken vocabulary.
    """
    ranks: dict[bytes, int] = {}
    num_lines = 0
    try:
        for line in path.read_bytes().splitlines():
            num_lines += 1
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as error:
        raise ModelError(f"{path}: the vocabulary cannot be read: {error.strerror or error}.") from None
    except ValueError:
        raise ModelError(
            f"{path}: line {num_lines} is no token of a tiktoken vocabulary. Take the file of the checkpoint that "
            "config.json describes; a file of some hundred bytes is a Git LFS pointer, not the file."
        ) from None
    if sorted(ranks.values()) != list(range(num_lines)):
        raise ModelError(
            f"{path}: {num_lines} lines do not number {num_lines} different tokens from 0. Download the file again."
        )
    return ranks


def as_byte_level(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The same vocabulary for byte-level BPE: tokens in its spelling of bytes, and the merges in the order of ranks.

    tiktoken joins the two neighbours whose bytes together have the lowest rank, however the pair is cut; so every cut
    of a token into two others is a merge, and all cuts of one token come before those of the next.
    """
    letters = bytes_to_unicode()
    spelt = {token: "".join([letters[byte] for byte in token]) for token in ranks}
    merges = sorted(
        (rank, ranks[token[:at]], spelt[token[:at]], spelt[token[at:]])
        for token, rank in ranks.items()
        for at in range(1, len(token))
        if token[:at] in ranks and token[at:] in ranks
    )
    return {spelt[token]: rank for token, rank in ranks.items()}, [(left, right) for *_, left, right in merges]
