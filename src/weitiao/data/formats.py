"""The table of row formats, and the one that a row has: told by its own keys, or by name.

A new format is one function (in dialogues.py, instructions.py, annotations.py, label_studio.py) and one entry in
`FORMATS`. Each function reports *all* problems of its row. Nothing here knows of files (files.py), of tokens, or of
what an answer looks like (tasks/forms.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from weitiao.data.annotations import (
    doccano_entities_to_record,
    doccano_relations_to_record,
    spo_list_to_record,
    text_entities_to_record,
    text_label_to_record,
    text_spans_to_record,
    uie_to_record,
)
from weitiao.data.dialogues import (
    client_dialogue_to_record,
    conversations_to_record,
    messages_to_record,
    sharegpt_to_record,
    turn_pairs_to_record,
)
from weitiao.data.instructions import (
    alpaca_to_record,
    content_summary_to_record,
    context_target_to_record,
    prompt_response_to_record,
    question_answer_to_record,
    text_category_output_to_record,
)
from weitiao.data.label_studio import label_studio_to_record
from weitiao.data.options import DEFAULT_OPTIONS, ReadOptions
from weitiao.data.record import Record, RowFindings, did_you_mean, kind_of, nearest, shown
from weitiao.errors import DataError, Problem

Row = Mapping[str, Any]


class RowReader(Protocol):
    """What every format function is."""

    def __call__(
        self, row: Row, source: str, options: ReadOptions, *, require_target: bool
    ) -> Record | list[Problem]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFormat:
    """One row of the table: a row with all `keys` has this format; so has one that can `ask`, if no other fits."""

    name: str
    keys: tuple[str, ...]
    """The keys of a labelled row."""
    to_record: RowReader
    ask: tuple[str, ...] = ()
    """The keys that a row without its answer has; the first of `keys` where none are given."""
    fits: Callable[[Row], bool] | None = None
    """Where several formats share their keys: whether the values are this one's."""


def _first_entry_has(key: str, inside: str) -> Callable[[Row], bool]:
    def fits(row: Row) -> bool:
        entries = row.get(key)
        return isinstance(entries, list) and any(isinstance(entry, dict) and inside in entry for entry in entries)

    return fits


_from_value = _first_entry_has("conversations", "from")
_with_offsets = _first_entry_has("entities", "start_offset")


def _has_relations(row: Row) -> bool:
    return bool(row.get("relations")) or not row.get("entities")


def _has_spans(row: Row) -> bool:
    label = row.get("label")
    return isinstance(label, list) and (not label or any(isinstance(entry, list | dict) for entry in label))


def _has_labels(row: Row) -> bool:
    label = row.get("label")
    return not (isinstance(label, list) and any(isinstance(entry, list | dict) for entry in label))


FORMATS: tuple[RowFormat, ...] = (
    # one question, one answer
    RowFormat(name="context_target", keys=("context", "target"), to_record=context_target_to_record),
    RowFormat(name="alpaca", keys=("instruction", "output"), to_record=alpaca_to_record),
    RowFormat(name="prompt_response", keys=("prompt", "response"), to_record=prompt_response_to_record),
    RowFormat(name="content_summary", keys=("content", "summary"), to_record=content_summary_to_record),
    RowFormat(
        name="text_category_output",
        keys=("text", "category", "output"),
        ask=("text", "category"),
        to_record=text_category_output_to_record,
    ),
    RowFormat(name="question_answer", keys=("question", "answer"), to_record=question_answer_to_record),
    # conversations
    RowFormat(name="messages", keys=("messages",), to_record=messages_to_record),
    RowFormat(
        name="conversations",
        keys=("conversations",),
        to_record=conversations_to_record,
        fits=lambda row: not _from_value(row),
    ),
    RowFormat(name="sharegpt", keys=("conversations",), to_record=sharegpt_to_record, fits=_from_value),
    RowFormat(name="turn_pairs", keys=("conversation",), to_record=turn_pairs_to_record),
    RowFormat(name="client_dialogue", keys=("dialogue",), to_record=client_dialogue_to_record),
    # annotations
    RowFormat(
        name="doccano_relations",
        keys=("text", "relations"),
        to_record=doccano_relations_to_record,
        fits=_has_relations,
    ),
    RowFormat(
        name="doccano_entities",
        keys=("text", "entities"),
        to_record=doccano_entities_to_record,
        fits=lambda row: _with_offsets(row) and not row.get("relations"),
    ),
    RowFormat(
        name="text_entities",
        keys=("text", "entities"),
        to_record=text_entities_to_record,
        fits=lambda row: not _with_offsets(row) and "relations" not in row,
    ),
    RowFormat(name="text_spans", keys=("text", "label"), to_record=text_spans_to_record, fits=_has_spans),
    RowFormat(name="text_label", keys=("text", "label"), to_record=text_label_to_record, fits=_has_labels),
    RowFormat(name="uie", keys=("content", "result_list"), ask=("content", "prompt"), to_record=uie_to_record),
    RowFormat(name="spo_list", keys=("text", "spo_list"), to_record=spo_list_to_record),
    RowFormat(name="label_studio", keys=("data", "annotations"), to_record=label_studio_to_record),
)

_BY_NAME = {one.name: one for one in FORMATS}


def recognise_format(row: Row) -> str | None:
    """The name of the one format that the row's keys fit; None when none fits, or several do equally well."""
    fitting = _fitting_formats(row)
    return fitting[0].name if len(fitting) == 1 else None


def check_format_name(name: str | None) -> None:
    """Return when `name` is a format's or None. Raises DataError with the nearest name."""
    if name is not None and name not in _BY_NAME:
        near = nearest(name, _BY_NAME)
        hint = f"Did you mean {near}?" if near else f"Known formats: {', '.join(_BY_NAME)}."
        raise DataError(f"There is no row format {shown(name)}. {hint}")


def row_to_record(
    row: object, source: str, options: ReadOptions = DEFAULT_OPTIONS, *, require_target: bool
) -> Record | list[Problem]:
    """The record of a row in the format that `options` name, else in any known one; or all its problems.

    `row` is any JSON value.
    """
    if not isinstance(row, dict):
        findings = RowFindings(source)
        findings.add("row", f"is {kind_of(row)}, not an object.", "Write one object with the keys of a known format.")
        return findings.problems
    if options.format is not None:
        return _BY_NAME[options.format].to_record(row, source, options, require_target=require_target)
    fitting = _fitting_formats(row)
    if len(fitting) == 1:
        return fitting[0].to_record(row, source, options, require_target=require_target)
    return _explain_no_format(row, source, fitting)


def _fitting_formats(row: Row) -> tuple[RowFormat, ...]:
    complete, asking = _formats_by_keys(tuple(row)) if len(row) <= 64 else _find_formats_by_keys(tuple(row))
    for group in (complete, asking):
        fitting = tuple(one for one in group if one.fits is None or one.fits(row))
        if fitting:
            return fitting
    return ()


def _find_formats_by_keys(keys: tuple[str, ...]) -> tuple[tuple[RowFormat, ...], tuple[RowFormat, ...]]:
    """The formats that a labelled row with these keys may have, and those it may have without its answer."""
    complete = tuple(one for one in FORMATS if all(key in keys for key in one.keys))
    asking = tuple(one for one in FORMATS if all(key in keys for key in one.ask or one.keys[:1]))
    most = max((len(one.ask) for one in asking), default=0)  # text + category says more than text alone
    return complete, tuple(one for one in asking if len(one.ask) == most)


# The rows of a file have the same keys over and over; asking the whole table for each would cost as much as the rest.
_formats_by_keys = lru_cache(maxsize=1024)(_find_formats_by_keys)


def _explain_no_format(row: Row, source: str, fitting: tuple[RowFormat, ...]) -> list[Problem]:
    findings = RowFindings(source)
    if fitting:
        names = " and ".join(one.name for one in fitting)
        misspelt = [did_you_mean(key, row) for one in fitting for key in one.keys if key not in row]
        fix = f"Keep the keys of one of them, or name one in the recipe: format: {fitting[0].name}."
        findings.add("row", f"fits several formats: {names}.", next(filter(None, misspelt), fix))
        return findings.problems
    expected = "; ".join(f"{one.name} ({' + '.join(f'`{key}`' for key in one.keys)})" for one in FORMATS)
    keys = ", ".join(shown(key) for key in list(row)[:12]) + (", …" if len(row) > 12 else "")
    seen = f"has the keys {keys}" if row else "has no keys"
    advice = [did_you_mean(key, row) for one in FORMATS for key in one.keys if key not in row]
    fix = next(filter(None, advice), "Rename the keys, or convert the file.")
    findings.add("row", f"{seen}, which fit no known format: {expected}.", fix)
    return findings.problems
