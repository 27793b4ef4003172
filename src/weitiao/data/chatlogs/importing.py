"""Exported chats → train.jsonl, dev.jsonl, summary.json and canaries.json in one folder.

    summary = import_chats(["聊天记录"], "chats", ImportSettings(assistant="me"))

Reads (`folder.py`), cuts into conversations (`turns.py`), replaces personal data (`data/redaction.py`), splits
(`splitting.py`) and writes. Each file appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weitiao.data.leaks import canaries_to_json, collect_canaries
from weitiao.data.privacy import KnownData
from weitiao.data.redaction import CHINESE, Redactor
from weitiao.errors import DataError

from .folder import ChatSet, read_chats
from .messages import ChatLog
from .settings import ImportSettings
from .splitting import ChatSplit, split_chat
from .summary import MADE_BY, ContactSummary, ImportSummary
from .turns import Conversation, Tally, build_conversations

TRAIN, DEV, SUMMARY, CANARIES = "train.jsonl", "dev.jsonl", "summary.json", "canaries.json"


def import_chats(
    paths: Sequence[str | Path],
    out: str | Path,
    settings: ImportSettings | None = None,
    *,
    overwrite: bool = False,
    salt: str | None = None,
) -> ImportSummary:
    """Write the conversations of the chats at `paths` into the folder `out`, and return what was done.

    Args:
        paths: files and folders of exports.
        out: the folder for train.jsonl, dev.jsonl, summary.json and canaries.json.
        settings: of the import.
        overwrite: replace an earlier result.
        salt: of the hashes in canaries.json; drawn anew when None.

    Raises:
        DataError: with every row that cannot be understood; when a result is there already; when the system prompt
            needs a name that the exports do not say; when no conversation is left.
    """
    settings = settings or ImportSettings()
    folder = Path(out)
    there = [name for name in (TRAIN, DEV, SUMMARY, CANARIES) if (folder / name).exists()]
    if there and not overwrite:
        raise DataError(f"{folder} already holds {', '.join(there)}. Give another folder, or --force to replace them.")
    chats = read_chats(paths, settings)
    tally = Tally(dropped=Counter(chats.dropped))
    notes = list(chats.notes)
    redacted: Counter[str] = Counter()
    contacts = []
    train: list[dict[str, Any]] = []
    dev: list[dict[str, Any]] = []
    labels = _label_contacts(chats.logs)
    for log, label in zip(chats.logs, labels, strict=True):
        conversations = build_conversations(log, settings, tally)
        split = split_chat(conversations, held_out=settings.held_out, tally=tally)
        if split.train and not split.dev and settings.held_out > 0:
            notes.append(f"{label}: all is one session or connected, so nothing of it was held out.")
        _check_names(split, settings)
        known = KnownData.collect((message.text for message in log.messages), kinds=settings.redact_kinds)
        for rows, side in ((train, split.train), (dev, split.dev)):
            rows += [_to_row(each, label, settings, known, redacted) for each in side]
        contacts.append(_summarise(log, label, split))
    if not train:
        why = ", ".join(f"{reason} {count}" for reason, count in tally.dropped.most_common() if count)
        raise DataError(f"No conversation is left of {tally.total} messages. Dropped: {why}.")
    texts = ([log.contact, *(message.text for message in log.messages)] for log in chats.logs)
    canaries = collect_canaries(texts, salt=salt)
    summary = ImportSummary(
        messages=_count_messages(chats),
        used=tally.used,
        merged=tally.merged,
        dropped={reason: count for reason, count in tally.dropped.most_common() if count},
        train=len(train),
        dev=len(dev),
        redacted=dict(redacted.most_common()),
        canaries=len(canaries),
        contacts=contacts,
        files=[{**asdict(file), "path": _hide(file.path), "note": _hide(file.note)} for file in chats.files],
        notes=[_hide(note) for note in notes],
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in ((TRAIN, train), (DEV, dev)):
            _write_whole(folder / name, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for name, value in (
            (CANARIES, canaries_to_json(canaries, made_by=MADE_BY)),
            (SUMMARY, summary.to_json()),
        ):
            _write_whole(folder / name, [json.dumps(value, ensure_ascii=False, indent=2) + "\n"])
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be written: {error.strerror or error}.") from error
    return summary


def _count_messages(chats: ChatSet) -> int:
    """All messages that were read, those of logs that were left out included."""
    return sum(file.messages for file in chats.files)


def _check_names(split: ChatSplit, settings: ImportSettings) -> None:
    """Raise DataError when the system prompt names somebody whose name is not known."""
    for conversation in (*split.train, *split.dev):
        for placeholder, name in (("name", conversation.name), ("remark", conversation.remark)):
            if not name and settings.mentions(placeholder):
                raise DataError(
                    f"The exports of {_hide(conversation.contact)} do not say what you are called, which the system "
                    f"prompt puts for {{{{{placeholder}}}}}. Give your name with --me, or another prompt with --system."
                )


def _to_row(
    conversation: Conversation, label: str, settings: ImportSettings, known: KnownData | None, counts: Counter[str]
) -> dict[str, Any]:
    """The row of a conversation; what was replaced in it is added to `counts`."""
    style = settings.redaction
    redactor = Redactor(
        style=style or CHINESE, kinds=settings.redact_kinds if style else (), known=known if style else None
    )
    messages = []
    if settings.system:
        name, remark = redactor.redact(conversation.name), redactor.redact(conversation.remark)
        messages.append({"role": "system", "content": settings.write_system(name=name, remark=remark)})
    messages += [{"role": turn.role, "content": redactor.redact(turn.text)} for turn in conversation.turns]
    counts.update(redactor.counts)
    start, end = conversation.start, conversation.end
    return {
        "messages": messages,
        "contact": label,
        "start": start.isoformat() if start else None,
        "end": end.isoformat() if end else None,
    }


def _label_contacts(logs: Sequence[ChatLog]) -> list[str]:
    """The names of the chats without personal data, each another: two numbers would else look the same."""
    labels: list[str] = []
    for log in logs:
        label = hidden = _hide(log.contact)
        number = 1
        while label in labels:
            number += 1
            label = f"{hidden} {number}"
        labels.append(label)
    return labels


def _hide(text: str) -> str:
    """`text` without personal data: people write numbers into names, and names become file names."""
    return Redactor().redact(text)


def _summarise(log: ChatLog, label: str, split: ChatSplit) -> ContactSummary:
    times = [message.time for message in log.messages if message.time is not None]
    return ContactSummary(
        contact=label,
        is_group=log.is_group,
        messages=len(log.messages),
        train=len(split.train),
        dev=len(split.dev),
        replies=sum(conversation.num_replies for conversation in (*split.train, *split.dev)),
        start=min(times).isoformat() if times else None,
        end=max(times).isoformat() if times else None,
    )


def _write_whole(path: Path, lines: Iterable[str]) -> None:
    """Write `path` whole or not at all: temporary name, flushed, renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(lines)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o600)  # private talk
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
