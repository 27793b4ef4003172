"""A ledger → the recipe's text: what was carried, each key with where it comes from, and what was left, at the end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..recipe import Recipe
from .ledger import Entry, Ledger

_WIDTH = 120


def recipe_values(ledger: Ledger, name: str) -> dict[str, Any]:
    """The recipe as plain values, its parts nested."""
    values: dict[str, Any] = {"name": name}
    for place, line in ledger.lines.items():
        part, _, key = place.partition(".")
        if key:
            values.setdefault(part, {})[key] = line.value
        else:
            values[part] = line.value
    return values


def recipe_text(ledger: Ledger, name: str, *, file: Path, told: str) -> str:
    """The recipe as YAML, its keys in the order of the recipe's own pages."""
    lines = [
        f"# From {file}: {told}.",
        "# Beside every key stands where it comes from; what could not be carried stands at the end.",
        f"name: {_scalar(name)}",
    ]
    for part in Recipe.model_fields:
        keys = [place for place in ledger.lines if place.partition(".")[0] == part]
        if keys:
            lines += ["", *([f"{part}:"] if keys != [part] else [])]
            for place in _in_order(keys):
                written = _key(place.rpartition(".")[2], ledger.lines[place].value, _comment(ledger, place))
                lines += written if place != part else [line.removeprefix("  ") for line in written]
    lines += _listed("Could not be carried:", ledger.left)
    lines += _listed("Needs no key:", ledger.needless)
    if ledger.notes:
        lines += ["", "# Different from the original:"]
        for note in ledger.notes:
            lines += _wrapped(note)
    return "\n".join(lines) + "\n"


def _comment(ledger: Ledger, place: str) -> str:
    """What stands beside the key `place`: where it comes from, and the settings that became a part of it."""
    told = ledger.lines[place].comment
    parts = [f"{entry.setting} ({entry.words})" for entry in ledger.carried if entry.place == place]
    return "; ".join([told, *(part for part in parts if part.partition(" (")[0] not in told)])


_ORDER = ("path", "name", "train", "dev")


def _in_order(places: Sequence[str]) -> list[str]:
    return sorted(places, key=lambda place: (_rank(place.partition(".")[2]), places.index(place)))


def _rank(key: str) -> int:
    return _ORDER.index(key) if key in _ORDER else len(_ORDER)


def shown(value: Any) -> str:
    """`value` for people: the paths of sources, and everything else as YAML on one line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(str(source.get("path", source.get("name"))) for source in value)
    return _scalar(value)


def _key(key: str, value: Any, comment: str) -> list[str]:
    told = f"   # {comment}" if comment else ""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        lines = [f"  {key}:{told}"]
        for source in value:
            first, *rest = source.items()
            lines.append(f"    - {first[0]}: {_scalar(first[1])}")
            lines += [f"      {name}: {_scalar(one)}" for name, one in rest]
        return lines
    return [f"  {key}: {_scalar(value)}{told}"]


def _scalar(value: Any) -> str:
    """`value` as YAML on one line."""
    text = yaml.safe_dump(value, allow_unicode=True, width=100_000, default_flow_style=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _listed(title: str, entries: Iterable[Entry]) -> list[str]:
    lines = [line for entry in entries for line in _wrapped(f"{entry.setting} — {entry.words}")]
    return ["", f"# {title}", *lines] if lines else []


def _wrapped(text: str) -> list[str]:
    """`text` as comment lines; a line end in it never ends the comment."""
    words = re.sub(r"\s+", " ", text).split(" ")
    lines, line = [], "#   -"
    for word in words:
        if len(line) + len(word) >= _WIDTH and line.strip("# -"):
            lines.append(line)
            line = "#    "
        line += f" {word}"
    return [*lines, line]
