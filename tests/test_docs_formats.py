"""docs/formats.md shows every format of the table, with its keys and a row that is read as said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from weitiao.data.formats import FORMATS, recognise_format, row_to_record
from weitiao.data.options import ReadOptions
from weitiao.data.record import Record
from weitiao.recipe import make_recipe

PAGE = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL))


def test_the_table_is_that_of_the_code() -> None:
    lines = [line for line in PAGE.splitlines() if re.match(r"\| `\w+` \|", line)][: len(FORMATS)]
    told = {
        one.name: " ".join(f"`{key}`" for key in one.keys) + " | " + " ".join(f"`{key}`" for key in _asking(one.name))
        for one in FORMATS
    }
    assert lines == [f"| `{name}` | {keys} |" for name, keys in told.items()]


def _asking(name: str) -> tuple[str, ...]:
    one = next(one for one in FORMATS if one.name == name)
    return one.ask or one.keys[:1]


def test_every_format_has_its_section_in_the_order_of_the_table() -> None:
    assert list(SECTIONS) == [one.name for one in FORMATS]


@pytest.mark.parametrize("name", [one.name for one in FORMATS])
def test_the_row_shown_is_recognised_and_read(name: str) -> None:
    [line] = re.findall(r"^```json\n(.*)\n```$", SECTIONS[name], re.MULTILINE)
    row = json.loads(line)
    record = row_to_record(row, "formats.md:1", require_target=True)
    assert isinstance(record, Record), record
    assert recognise_format(row) == name and record.target not in (None, "", [])
    assert row_to_record(row, "formats.md:1", ReadOptions(format=name), require_target=True) == record


def test_the_recipe_shown_can_be_used() -> None:
    [block] = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    recipe = make_recipe(yaml.safe_load(block))
    assert recipe.data.train[0].prompt == "这条评论说的是什么？\n\n{text}"
    assert recipe.data.placeholders == {"name": "小微", "author": None}


def test_the_choices_of_turns_are_those_of_the_recipe() -> None:
    shown = re.findall(r"^\| `(\w+)` \| (?:every|the last)", PAGE, re.MULTILINE)
    assert [make_recipe({"name": "n", "model": "starter", "data": {"train": "a", "turns": turns}}).data.turns
            for turns in shown] == ["flagged", "all", "last"]  # fmt: skip
