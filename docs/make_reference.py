"""Write the reference pages from the code: the recipe's keys, its JSON Schema, the commands.

    python docs/make_reference.py            write docs/reference/
    python docs/make_reference.py --check    write nothing; exit with 1 when a page differs from the code

The words on the pages are those of `recipe/` and `cli/`; this script knows their layout only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperArgument, TyperOption

from weitiao.cli import app
from weitiao.recipe import recipe_schema

FOLDER = Path(__file__).parent / "reference"

Schema = Mapping[str, Any]

_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
_KINDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}


def pages() -> dict[str, str]:
    """The text of every reference page by its file name."""
    schema = recipe_schema()
    return {
        "recipe.schema.json": json.dumps(schema, ensure_ascii=False, indent=2) + "\n",
        "recipe.md": recipe_page(schema),
        "commands.md": commands_page(),
    }


# ---- the recipe ---------------------------------------------------------------------------------------------------


def recipe_page(schema: Schema) -> str:
    """The page of recipe keys: one table for the recipe itself and one for each of its parts."""
    parts = [
        "# The recipe",
        "Written by `docs/make_reference.py` from `src/weitiao/recipe/`; do not edit.",
        "A recipe is one YAML file. `weitiao init` writes one; `weitiao check` reads one strictly: an unknown key or a "
        "wrong value is an error, and all of them are named at once. Only required keys must be given; in a file, "
        "`name` may be left out too and is then the file's name. "
        "Any key can be changed on the command line by its dotted name: `weitiao train recipe.yaml train.epochs=5`. "
        "Where a part has a `path`, a plain text in its place is that path, and one file needs no list around it: "
        "`model: starter`, `train: rows.jsonl`.",
        "The [JSON Schema](recipe.schema.json) of this page lets an editor complete and check recipes "
        "(`weitiao schema` prints it).",
        "## recipe",
        _table(schema, schema["required"], schema["$defs"]),
    ]
    for name in _parts_in_order(schema, schema["$defs"]):
        part = schema["$defs"][name]
        parts += [f"## {_anchor(name)}", part["description"], _table(part, part.get("required", ()), schema["$defs"])]
    return "\n\n".join(parts) + "\n"


def _parts_in_order(part: Schema, definitions: Schema) -> list[str]:
    """The names of the parts that `part` refers to, each once and followed by those it refers to itself."""
    names: list[str] = []
    for entry in part["properties"].values():
        for choice in (entry, entry.get("items", {}), *entry.get("anyOf", ())):
            for reference in (choice, choice.get("items", {})):
                if "$ref" in reference:
                    name = reference["$ref"].rpartition("/")[2]
                    names += [name, *_parts_in_order(definitions[name], definitions)]
    return list(dict.fromkeys(names))


def _table(part: Schema, required: Any, definitions: Schema) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, entry in part["properties"].items():
        meaning = entry.get("description") or _described_part(entry, definitions)
        default = "*required*" if key in required else _default(entry.get("default"))
        lines.append(f"| `{key}` | {_value(entry)} | {default} | {_cell(meaning)} |")
    return "\n".join(lines)


def _value(entry: Schema) -> str:
    """What may stand under a key, in words: ``text``, ``number > 0``, ``list of [source](#source)`` …"""
    if "$ref" in entry:
        name = _anchor(entry["$ref"].rpartition("/")[2])
        return f"[{name}](#{name})"
    if "anyOf" in entry:
        return " or ".join(_value(choice) for choice in entry["anyOf"])
    if "enum" in entry or "const" in entry:
        return ", ".join(f"`{choice}`" for choice in entry.get("enum", [entry.get("const")]))
    if entry["type"] == "array":
        return f"list of {_value(entry['items'])}"
    if "additionalProperties" in entry:
        inner = entry["additionalProperties"]
        return f"{'anything' if inner is True else _value(inner)} by name"
    bounds = [f"{sign} {entry[key]:g}" for key, sign in _BOUNDS if key in entry]
    return " ".join([_KINDS[entry["type"]], ", ".join(bounds)]).strip()


def _default(value: Any) -> str:
    if value in ([], {}, None):
        return "none"
    if isinstance(value, dict):
        return "as below"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _described_part(entry: Schema, definitions: Schema) -> str:
    """The descriptions of the parts that `entry` refers to; empty when it refers to none."""
    names = [choice["$ref"].rpartition("/")[2] for choice in (entry, *entry.get("anyOf", ())) if "$ref" in choice]
    return " ".join(str(definitions[name]["description"]) for name in names)


def _anchor(name: str) -> str:
    """The heading of a part: ``DeclaredTask`` → ``declared-task``."""
    return "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in name).removeprefix("-")


# ---- the commands -------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """The page of commands: for each verb its usage, what it does, its arguments and options."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup), "the command line has verbs"
    parts = [
        "# The commands",
        "Written by `docs/make_reference.py` from `src/weitiao/cli/`; do not edit.",
        "Verbs about rows come first, then verbs about models. A user's mistake is printed as a sentence and ends with "
        "code 2, Ctrl-C with code 130. A Python traceback is a fault of weitiao's own: please report it. "
        "`weitiao VERB --help` prints the same as this page.",
    ]
    for name, command in group.commands.items():
        arguments = [param for param in command.params if isinstance(param, TyperArgument)]
        options = [param for param in command.params if isinstance(param, TyperOption)]
        usage = " ".join(["weitiao", name, *map(_argument, arguments), *(["[OPTIONS]"] if options else [])])
        first, *more = (command.help or "").split("\n\n")
        parts += [f"## {name}", f"```sh\n{usage}\n```", _one_line(first)]
        parts += [f"```text\n{text}\n```" for text in more]
        rows = [(f"`{param.name.upper()}`", param) for param in arguments if param.name is not None]
        rows += [(_option(param), param) for param in options]
        if rows:
            parts.append("\n".join(["| argument or option | default | meaning |", "|---|---|---|", *map(_row, rows)]))
    return "\n\n".join(parts) + "\n"


def _argument(param: TyperArgument) -> str:
    assert param.name is not None, "arguments have names"
    name = param.name.upper() + (" …" if param.nargs == -1 else "")
    return name if param.required else f"[{name}]"


def _option(param: TyperOption) -> str:
    """``-o, --output OUTPUT``, or ``--base / --no-base``."""
    assert param.name is not None, "options have names"
    names = ", ".join(param.opts) + (f" / {', '.join(param.secondary_opts)}" if param.secondary_opts else "")
    return f"`{names}`" if param.is_flag else f"`{names} {param.name.upper()}`"


def _row(row: tuple[str, TyperArgument | TyperOption]) -> str:
    shown, param = row
    default = "*required*" if param.required else "" if param.default in (None, False) else f"`{param.default}`"
    again = " May be given several times." if isinstance(param, TyperOption) and param.multiple else ""
    return f"| {shown} | {default} | {_cell(param.help or '')}{again} |"


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ---- writing and checking -----------------------------------------------------------------------------------------


def outdated() -> list[Path]:
    """The pages whose file differs from what the code says, or is missing."""
    return [
        path
        for name, text in pages().items()
        if not (path := FOLDER / name).is_file() or path.read_text(encoding="utf-8") != text
    ]


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page differs")
    if parser.parse_args().check:
        stale = outdated()
        for path in stale:
            print(f"{path} differs from the code. Write it anew with: make docs", file=sys.stderr)
        raise SystemExit(1 if stale else 0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
