"""Who may ask: API keys, kept as hashes, compared in constant time.

A file of keys has one line for each: a name, a blank, and the SHA-256 of the key, as `weitiao serve --new-key NAME`
writes it; the key itself is shown once and kept nowhere. Keys of 128 random bits need no slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import RunError

ENVIRONMENT = "WEITIAO_API_KEY"
"""Where one key may stand in the environment, in clear."""
_LINE = re.compile(r"(?P<name>\S+)\s+sha256:(?P<digest>[0-9a-f]{64})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """The keys that are let in; none at all: everyone is."""

    digests: Mapping[str, bytes]
    """SHA-256 of each key by the name of who has it."""

    @property
    def needed(self) -> bool:
        """Whether a request must bring a key."""
        return bool(self.digests)

    def owner(self, key: str) -> str | None:
        """The name of who has `key`; None for a key that is not known. Takes as long for the one as for the other."""
        digest = _digest(key)
        found = None
        for name, known in self.digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of `file` and the one in the environment.

    Raises:
        RunError: the file cannot be read, or a line of it is no key.
    """
    digests: dict[str, bytes] = {}
    if key := environment.get(ENVIRONMENT, ""):
        digests[ENVIRONMENT] = _digest(key)
    if file is None:
        return Keys(digests=digests)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"The file of API keys {file} cannot be read: {error}.") from None
    wrong = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        if (found := _LINE.fullmatch(line.strip())) is None:
            wrong.append(f"{file}:{number}")
        else:
            digests[found["name"]] = bytes.fromhex(found["digest"])
    if wrong:
        raise RunError(
            f"No key, but something else, stands in {', '.join(wrong)}: a line is a name and sha256:DIGEST. "
            f"Add one with: weitiao serve --new-key NAME --keys {file}"
        )
    if not digests:
        raise RunError(f"{file} holds no key, so nobody could ask. Add one with: weitiao serve --new-key NAME")
    return Keys(digests=digests)


def add_key(file: Path, name: str) -> str:
    """A new key for `name`, of which `file` gets the hash; the file is the owner's alone to read.

    Raises:
        RunError: the name has blanks or is there already, or the file cannot be written.
    """
    if not name or re.search(r"\s|^#", name):
        raise RunError(f"{name!r} is no name for a key: it must be one word, such as lab or alice.")
    if file.exists() and name in read_keys(file, {}).digests:
        raise RunError(f"{file} has a key for {name} already. Take another name, or remove that line first.")
    key = f"wt-{secrets.token_urlsafe(24)}"
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as stream:
            stream.write(f"{name} sha256:{_digest(key).hex()}\n")
    except OSError as error:
        raise RunError(f"The file of API keys {file} cannot be written: {error}.") from None
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()
