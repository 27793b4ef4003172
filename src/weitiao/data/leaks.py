"""Secrets of a chat log as canaries: which of them does a model repeat that was tuned on it?

    collect_canaries(conversations)      the personal data of the log; each with a salted hash
    find_leaks(replies, canaries)        the canaries that the replies repeat, however they are written
    report_leaks(answers, file)          the same for a file of answers and the file of hashes of an import

A file of canaries holds no secret in clear. Telephone numbers are few enough to be tried one after another by who has
hash and salt, so the hash is a slow one, and the file is still no file to publish.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weitiao.data.formats import row_to_record
from weitiao.data.privacy import USUAL_KINDS, Kind, find_personal_data, fold_text, normalise_personal_data
from weitiao.data.record import Record
from weitiao.errors import DataError

_SCRYPT = {"n": 1024, "r": 8, "p": 1, "dklen": 16}
_PIECES = (
    re.compile(r"[!-~]*[0-9][!-~]*"),  # a word with a digit
    re.compile(r"[A-Za-z0-9_]*[0-9][A-Za-z0-9_]*"),  # the same without the signs around it
    re.compile(r"[0-9](?:[ \-.·]{0,2}[0-9]){4,}"),  # digits in groups
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Canary:
    """A secret that stands in a chat log."""

    kind: Kind
    digest: str
    """A hash of its normalised spelling with the salt."""
    salt: str
    """The same for all canaries of an import."""
    text: str | None = field(default=None, repr=False)
    """The normalised spelling; None for a canary that was read from a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leak:
    """A secret of the log that replies repeat."""

    canary: Canary
    replies: tuple[int, ...]
    """Which replies, counted from 0, or for a file which lines, counted from 1."""
    echoed: tuple[int, ...] = ()
    """Those of them whose prompt holds the secret already: read there, not remembered."""

    @property
    def remembered(self) -> tuple[int, ...]:
        """The replies that repeat the secret though nothing in their prompt says it."""
        return tuple(number for number in self.replies if number not in self.echoed)


@dataclass(frozen=True, kw_only=True, slots=True)
class LeakReport:
    """Which of a log's secrets the answers of a file repeat."""

    answers: int
    """How many answers were looked at."""
    secrets: Mapping[str, int]
    """How many secrets of each kind the log holds."""
    leaks: tuple[Leak, ...]

    @property
    def remembered(self) -> tuple[Leak, ...]:
        """The secrets that at least one answer repeats from memory."""
        return tuple(leak for leak in self.leaks if leak.remembered)

    def count(self, kind: str) -> tuple[int, int, int]:
        """Of one kind: the log's secrets, those remembered, those only read in a prompt and repeated."""
        found = [leak for leak in self.leaks if leak.canary.kind == kind]
        remembered = sum(bool(leak.remembered) for leak in found)
        return self.secrets.get(kind, 0), remembered, len(found) - remembered

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; it holds no secret."""
        kinds = {kind: dict(zip(("secrets", "remembered", "read"), self.count(kind))) for kind in self.secrets}
        leaks = [
            {"kind": leak.canary.kind, "remembered": list(leak.remembered), "read": list(leak.echoed)}
            for leak in self.leaks
        ]
        return {"ok": not self.remembered, "answers": self.answers, "kinds": kinds, "leaks": leaks}


def collect_canaries(conversations: Iterable[Iterable[str]], *, salt: str | None = None) -> list[Canary]:
    """Each different piece of personal data in the texts of `conversations`, once, in the order of first sight.

    `salt` is drawn anew when None. A secret takes about 3 ms, which its slow hash costs.
    """
    salt = secrets.token_hex(16) if salt is None else salt
    found: dict[str, Kind] = {}
    for texts in conversations:
        for text in texts:
            for piece in find_personal_data(text, kinds=USUAL_KINDS):
                found.setdefault(normalise_personal_data(text[piece.start : piece.end]), piece.kind)
    return [
        Canary(kind=kind, digest=_hash(value, salt), salt=salt, text=value) for value, kind in found.items() if value
    ]


def find_leaks(replies: Sequence[str], canaries: Sequence[Canary]) -> list[Leak]:
    """The canaries that `replies` repeat, in their order.

    Spelling does not matter: separators, full-width digits, a country code, capitals. With canaries read from a file,
    only what looks like personal data in a reply, or is a word with a digit in it, can be compared.
    """
    index = _Index(canaries)
    seen: dict[str, list[int]] = {}
    for number, reply in enumerate(replies):
        for digest in index.find(reply):
            seen.setdefault(digest, []).append(number)
    return [Leak(canary=canary, replies=tuple(seen[canary.digest])) for canary in canaries if canary.digest in seen]


def report_leaks(predictions: str | Path, canaries: str | Path) -> LeakReport:
    """Which secrets the answers of a file repeat: JSON lines with ``prediction``, as `weitiao predict` writes them.

    Raises:
        DataError: a file cannot be read, is not what it should be, or holds nothing.
    """
    known = read_canaries(canaries)
    index = _Index(known)
    seen: dict[str, list[int]] = {}
    echoed: dict[str, list[int]] = {}
    answers = 0
    for number, line in enumerate(_read(predictions).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{predictions}:{number} is not JSON: {error}.") from None
        if not isinstance(row, dict) or not isinstance(row.get("prediction"), str):
            raise DataError(
                f"{predictions}:{number} has no text under prediction. Write the file with: weitiao predict"
            )
        answers += 1
        found = index.find(row["prediction"])
        asked = index.find("\n".join(_prompt_texts(row))) if found else set()
        for digest in found:
            seen.setdefault(digest, []).append(number)
            if digest in asked:
                echoed.setdefault(digest, []).append(number)
    if not answers:
        raise DataError(f"{predictions} holds no answers. Write the file with: weitiao predict")
    return LeakReport(
        answers=answers,
        secrets=dict(Counter(canary.kind for canary in known).most_common()),
        leaks=tuple(
            Leak(canary=canary, replies=tuple(seen[canary.digest]), echoed=tuple(echoed.get(canary.digest, ())))
            for canary in known
            if canary.digest in seen
        ),
    )


def check_predictions(predictions: str | Path, canaries: str | Path) -> list[Leak]:
    """The leaks of `report_leaks` alone. Raises as it does."""
    return list(report_leaks(predictions, canaries).leaks)


def _prompt_texts(row: Mapping[str, Any]) -> list[str]:
    """What the model was shown: the messages before the last reply. All texts of a row that is of no known format."""
    record = row_to_record(row, "", require_target=False)
    if isinstance(record, Record):
        return [message.text for message in record.messages]
    return [value for key, value in row.items() if isinstance(value, str) and key not in ("prediction", "answer")]


# --- Files -----------------------------------------------------------------------------------------------------------


def canaries_to_json(canaries: Sequence[Canary], *, made_by: str) -> dict[str, Any]:
    """What a file of canaries holds: salt, kinds and hashes, no secret."""
    return {
        "made_by": made_by,
        "salt": canaries[0].salt if canaries else "",
        "hash": _SCRYPT,
        "canaries": [{"kind": canary.kind, "digest": canary.digest} for canary in canaries],
    }


def read_canaries(path: str | Path) -> list[Canary]:
    """The canaries of a file that an import wrote. Raises DataError when it is none."""
    try:
        value = json.loads(_read(path))
        salt, settings = value["salt"], value["hash"]
        canaries = [Canary(kind=each["kind"], digest=each["digest"], salt=salt) for each in value["canaries"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of canaries ({error}). Import the chats again to get one.") from None
    if settings != _SCRYPT:
        raise DataError(f"{path} was hashed in another way, {settings}. Import the chats again.")
    return canaries


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None


# --- Comparing -------------------------------------------------------------------------------------------------------


def _hash(value: str, salt: str) -> str:
    return hashlib.scrypt(value.encode(), salt=salt.encode(), **_SCRYPT).hex()


class _Index:
    """Finds canaries in texts; each candidate is hashed once, and not at all where the secrets are known in clear."""

    def __init__(self, canaries: Sequence[Canary]) -> None:
        self._digests = {canary.digest for canary in canaries}
        self._salt = canaries[0].salt if canaries else ""
        assert all(canary.salt == self._salt for canary in canaries), "canaries of one import share their salt"
        self._by_text = {canary.text: canary.digest for canary in canaries if canary.text is not None}
        self._in_clear = len(self._by_text) == len(canaries)
        self._hashes: dict[str, str] = {}

    def find(self, text: str) -> set[str]:
        """The digests of the canaries in `text`."""
        if not self._digests:
            return set()
        found = {self._digest_of(candidate) for candidate in _candidates(text)} & self._digests
        if self._in_clear:
            plain = fold_text(text).lower()
            found |= {digest for value, digest in self._by_text.items() if _holds(plain, value)}
        return found

    def _digest_of(self, candidate: str) -> str:
        if self._in_clear:
            return self._by_text.get(candidate, "")
        if candidate not in self._hashes:
            self._hashes[candidate] = _hash(candidate, self._salt)
        return self._hashes[candidate]


def _candidates(text: str) -> set[str]:
    """What in `text` may be a secret, normalised."""
    folded = fold_text(text)
    pieces = [folded[piece.start : piece.end] for piece in find_personal_data(folded, kinds=USUAL_KINDS)]
    pieces += [match[0] for pattern in _PIECES for match in pattern.finditer(folded) if len(match[0]) >= 4]
    return {normalise_personal_data(piece) for piece in pieces}


def _holds(text: str, value: str) -> bool:
    """Whether `value` stands in `text` as a word of its own."""
    return value in text and re.search(rf"(?<![a-z0-9]){re.escape(value)}(?![a-z0-9])", text) is not None
