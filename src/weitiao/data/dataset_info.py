"""LLaMA-Factory's list of data sets, ``dataset_info.json``: an entry → a file, its format and the names of its columns.

    data/dataset_info.json#my_set    with    {"my_set": {"file_name": "my.json", "formatting": "sharegpt",
                                              "columns": {"messages": "talk", "system": "sys"},
                                              "tags": {"role_tag": "who", "user_tag": "Q", "assistant_tag": "A"}}}

An entry that asks for what is not done here (preference pairs, images, scripts) is an error, never half obeyed. What
the rows are is read from the entry; the rows themselves are then read like any others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weitiao.data.json_values import parse_inner
from weitiao.data.record import kind_of, nearest, shown
from weitiao.errors import DataError, Problem

MARK = "dataset_info.json#"

_SOURCES = ("file_name", "hf_hub_url", "ms_hub_url")
_KEYS = (*_SOURCES, "formatting", "columns", "tags", "split", "file_sha1", "ranking")
_COLUMNS = {
    "alpaca": ("prompt", "query", "response", "system", "history"),
    "sharegpt": ("messages", "system", "tools"),
}
_ALPACA_KEYS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "history": "history",
}
_SPEAKER_TAGS = {
    "user_tag": ("human", "human"),
    "assistant_tag": ("gpt", "gpt"),
    "observation_tag": ("observation", "observation"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}
_TAGS = ("role_tag", "content_tag", *_SPEAKER_TAGS)


@dataclass(frozen=True, kw_only=True, slots=True)
class InfoEntry:
    """One data set of the list: where its rows are and what their keys mean."""

    path: str
    formatting: str
    columns: Mapping[str, str]
    tags: Mapping[str, str]

    @property
    def format(self) -> str:
        """The name of the row format after `rename`."""
        return "alpaca" if self.formatting == "alpaca" else "sharegpt"

    def rename(self, row: dict[str, Any], source: str) -> dict[str, Any] | list[Problem]:
        """The row under the keys of alpaca or sharegpt; or the problem of a speaker that the tags do not know."""
        if self.formatting == "alpaca":
            return _rename_columns(row, {ours: self.columns.get(theirs, ours) for theirs, ours in _ALPACA_KEYS.items()})
        conversation_key = self.columns.get("messages", "conversations")
        plain = {"conversations": conversation_key, "system": self.columns.get("system", "system")}
        renamed = _rename_columns(row, {**plain, "tools": self.columns.get("tools", "tools")})
        entries = renamed.get("conversations")
        if isinstance(entries, list):
            renamed["conversations"] = [
                self._rename_turn(entry) if isinstance(entry, dict) else entry for entry in entries
            ]
            problems = [
                Problem(
                    source=source,
                    field=f"{conversation_key}[{index}]",
                    message=f"has the speaker {shown(turn['from'])}, which the entry's tags do not name.",
                    fix="Add it to the tags of the entry in dataset_info.json.",
                )
                for index, turn in enumerate(renamed["conversations"])
                if isinstance(turn, dict) and turn.get("from") not in _speakers(self.tags).values() and "from" in turn
            ]
            return problems or renamed
        return renamed

    def _rename_turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        role_tag, content_tag = self.tags.get("role_tag", "from"), self.tags.get("content_tag", "value")
        renamed = {key: value for key, value in turn.items() if key not in (role_tag, content_tag)}
        if content_tag in turn:
            renamed["value"] = turn[content_tag]
        if role_tag in turn:
            role = turn[role_tag]
            renamed["from"] = _speakers(self.tags).get(role, role) if isinstance(role, str) else role
        return renamed


def _speakers(tags: Mapping[str, str]) -> dict[str, str]:
    """Each speaker as the rows write it → as sharegpt writes it."""
    return {tags.get(tag, default): ours for tag, (default, ours) in _SPEAKER_TAGS.items()}


def _rename_columns(row: dict[str, Any], ours_to_theirs: Mapping[str, str]) -> dict[str, Any]:
    taken = {theirs: ours for ours, theirs in ours_to_theirs.items()}
    renamed = {key: value for key, value in row.items() if key not in taken and key not in ours_to_theirs}
    return renamed | {ours: row[theirs] for theirs, ours in taken.items() if theirs in row}


def is_info_entry(name: str) -> bool:
    """Whether a source's path names an entry of a list of data sets, or the list itself."""
    return MARK in name or Path(name).name == MARK.removesuffix("#")


def read_info_entry(name: str) -> InfoEntry:
    """The entry that ``…/dataset_info.json#NAME`` names. Raises DataError with what is wrong and what is known."""
    path, _, key = name.partition("#")
    try:
        entries = parse_inner(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Check the path before the #.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}.") from None
    if not isinstance(entries, dict):
        raise DataError(f"{path} is {kind_of(entries)}, not an object of data sets by name.")
    if key not in entries:
        near = nearest(key, map(str, entries))
        known = f"Did you mean #{near}?" if near else f"Its entries: {', '.join(list(entries)[:20]) or 'none'}."
        raise DataError(f"{path} has no entry {key!r}. {known}" if key else f"Name an entry: {path}#NAME. {known}")
    return _read_entry(entries[key], Path(path).parent, where=name)


def _read_entry(entry: object, folder: Path, *, where: str) -> InfoEntry:
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {kind_of(entry)}, not an object.")
    if entry.get("ranking"):
        raise DataError(
            f"{where} asks for ranking: preference pairs cannot be learnt from. Give it one answer per row."
        )
    _refuse_unknown(entry, _KEYS, where)
    formatting = entry.get("formatting") or "alpaca"
    if formatting not in _COLUMNS:
        raise DataError(f"{where} has the formatting {formatting!r}, not alpaca or sharegpt.")
    columns, tags = (_read_names(entry.get(key), f"{where}: {key}") for key in ("columns", "tags"))
    _refuse_unknown(columns, _COLUMNS[formatting], f"{where}: columns")
    _refuse_unknown(tags, _TAGS if formatting == "sharegpt" else (), f"{where}: tags")
    given = [key for key in _SOURCES if entry.get(key)]
    if len(given) != 1 or not isinstance(entry[given[0]], str):
        raise DataError(f"{where} must say where its rows are by one of {', '.join(_SOURCES)}.")
    split = entry.get("split")
    if given[0] == "file_name":
        if split not in (None, "train"):
            raise DataError(f"{where} names the split {split!r}, which a file does not have. Remove it.")
        path = os.fspath(folder / entry["file_name"])
        _check_sha1(path, entry.get("file_sha1"), where)
    else:
        prefix = "hf:" if given[0] == "hf_hub_url" else "modelscope:"
        path = f"{prefix}{entry[given[0]]}" + (f":{split}" if split else "")
    return InfoEntry(path=path, formatting=formatting, columns=columns, tags=tags)


def _refuse_unknown(given: Mapping[str, object], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            near = nearest(str(key), known)
            hint = f"Did you mean {near}?" if near else f"What is read: {', '.join(known) or 'nothing'}."
            raise DataError(f"{where} has {shown(key)}, which cannot be honoured here. {hint}")


def _read_names(value: object, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value.values()):
        raise DataError(f"{where} is {shown(json.dumps(value, ensure_ascii=False))}, not names by name.")
    return value


def _check_sha1(path: str, stated: object, where: str) -> None:
    """Refuse a file that is not the one the entry was written for."""
    if not stated or not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha1").hexdigest()
    if found != stated:
        raise DataError(f"{where} is written for a file with the SHA-1 {stated}, but {path} has {found}.")
