"""How a source of rows is to be read, as far as the rows themselves do not say it.

Knows no format by name; `data/formats.py` checks the name given here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from weitiao.errors import Problem

Encoding = Literal["utf-8", "gb18030"]
"""gb18030 also reads GBK and GB2312, of which it is the superset."""

Rename = Callable[[dict[str, Any], str], dict[str, Any] | list[Problem]]
"""A row and its source → the row under the keys its format knows, or its problems."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """What the user says of a source; the default leaves everything to the rows.

    ReadOptions(format="alpaca", placeholders={"name": "小微", "author": "我们"})
    """

    format: str | None = None
    """Name of the rows' format, one of `FORMATS`; None: recognised row by row."""
    prompt: str | None = None
    """How the user's message is written from a row's fields, such as ``"{question}\\n\\n{text}"``; None: as the format
    does. A row that holds a conversation has its messages already and is refused."""
    system: str | None = None
    """The system message of rows that have none."""
    encoding: Encoding = "utf-8"
    """How the bytes of a text file are to be read."""
    sheet: str | None = None
    """Name of the sheet of a spreadsheet; None: the first."""
    placeholders: Mapping[str, str | None] = field(default_factory=dict)
    """What stands for ``{{name}}``, ``<NAME>`` and their like; None: the placeholder is text and stays."""
    rename: Rename | None = None
    """How the rows' keys are brought under the names their format knows; made from a ``dataset_info.json`` entry."""


DEFAULT_OPTIONS = ReadOptions()
