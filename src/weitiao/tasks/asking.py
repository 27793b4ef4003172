"""An answer form in words: the instruction that a model needs which was never tuned to the form.

Written from the form alone, so that what a model is told, what it is held to and how it is read cannot drift apart.
Knows nothing of models, chat formats or examples.

    >>> form = AnswerForm(shape="label list", labels=("手机", "水果"), min_items=1, max_items=1)
    >>> print(describe_answer(form, "zh"))
    只输出一个 JSON 列表，前后不写别的文字。
    列表里正好有 1 个标签，只能从这些里选：手机、水果。
    格式：
    ["…"]
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..data.record import Record
from .fields import Field
from .forms import AnswerForm

Language = Literal["zh", "en"]

PLACEHOLDER = "…"
"""Stands for a value in the skeleton of an answer."""

_MANY_KINDS = 4
"""A field of this many kinds of value or more may hold any."""
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_LATIN_WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Words:
    """What is said, in one language."""

    comma: str
    semicolon: str
    object: str
    list: str
    fenced: str
    nothing_else: str
    items: str
    empty: str
    one: str
    several: str
    between: str
    from_labels: str
    label: str
    strings: str
    copied: str
    one_of: str
    absent: str
    any: str
    either: str
    like: str
    json: str
    text: str
    schema: str
    pattern: str
    grammar: str
    colon: str
    form: str
    kinds: Mapping[str, str]


_WORDS: Mapping[Language, _Words] = {
    "zh": _Words(
        comma="、",
        semicolon="；",
        object="只输出一个 JSON 对象",
        list="只输出一个 JSON 列表",
        fenced="，写在代码块里",
        nothing_else="，前后不写别的文字。",
        items="每一项是一个对象。",
        empty="没有可写的就输出 []。",
        one="列表里正好有 1 个标签",
        several="列表里正好有 {least} 个标签",
        between="列表里有 {least} 到 {most} 个标签",
        from_labels="，只能从这些里选：{labels}。",
        label="只输出下面标签中的一个，不写别的文字：{labels}。",
        strings="每一项是一个字符串{copied}。",
        copied="，照抄原文里的字句",
        one_of="，只能是：{values}",
        absent="原文没有时写 {absent}",
        any="任意 JSON 值",
        either="或",
        like="，须匹配正则表达式 {pattern}",
        json="只输出 JSON",
        text="只输出答案本身",
        schema="须符合这个 JSON Schema：",
        pattern="须匹配这个正则表达式：",
        grammar="须符合这个 Lark 语法：",
        colon="：",
        form="格式：",
        kinds={
            "string": "字符串",
            "number": "数字",
            "boolean": "true 或 false",
            "null": "null",
            "list of strings": "字符串列表",
            "list": "列表",
            "object": "对象",
        },
    ),
    "en": _Words(
        comma=", ",
        semicolon="; ",
        object="Write one JSON object",
        list="Write one JSON list",
        fenced=" in a code fence",
        nothing_else=", and nothing before or after it.",
        items="Each item is an object.",
        empty="Write [] where there is nothing to list.",
        one="The list holds exactly 1 label",
        several="The list holds exactly {least} labels",
        between="The list holds {least} to {most} labels",
        from_labels=", out of: {labels}.",
        label="Write one of these labels and nothing else: {labels}.",
        strings="Each item is a string{copied}.",
        copied=", copied word for word from the text",
        one_of=", one of: {values}",
        absent="{absent} where the text says nothing of it",
        any="any JSON value",
        either=" or ",
        like=", matching the regular expression {pattern}",
        json="Write JSON",
        text="Write the answer itself",
        schema="It follows this JSON Schema:",
        pattern="It matches this regular expression:",
        grammar="It follows this Lark grammar:",
        colon=": ",
        form="The form:",
        kinds={
            "string": "a string",
            "number": "a number",
            "boolean": "true or false",
            "null": "null",
            "list of strings": "a list of strings",
            "list": "a list",
            "object": "an object",
        },
    ),
}


def describe_answer(form: AnswerForm, language: Language = "zh") -> str:
    """What an answer of `form` looks like, as an instruction with a skeleton; empty for free text.

    A form that the user defined, by a schema, an expression or a grammar, is told by that definition. Closed sets are
    listed, except for fields whose values are copied: what can be copied is as open as the texts are.
    """
    words = _WORDS[language]
    if form.shape == "text":
        return ""
    if form.shape == "label":
        return words.label.format(labels=_join(form.labels, words))
    fenced = words.fenced if form.fence_open else ""
    rule = {"json": words.schema, "pattern": words.pattern, "grammar": words.grammar}.get(form.shape)
    if rule is not None:
        what = words.json if form.shape == "json" else words.text
        return "\n".join([what + fenced + words.nothing_else, rule, form.definition])
    opening = (words.object if form.shape == "object" else words.list) + fenced + words.nothing_else
    skeleton = f"{form.fence_open}{form.style.dumps(_skeleton(form))}{form.fence_close}"
    return "\n".join([opening, *_rules(form, words), words.form, skeleton])


def language_of(record: Record) -> Language:
    """The language that `record` is asked in: Chinese unless its question has more Latin words than Han characters."""
    asked = record.question or record.instruction or record.prompt
    return "en" if len(_LATIN_WORD.findall(asked)) > len(_HAN.findall(asked)) else "zh"


def _rules(form: AnswerForm, words: _Words) -> list[str]:
    """What holds of the answer beside its skeleton, a line each."""
    empty = [words.empty] if form.shape != "object" and form.min_items == 0 else []
    if form.shape == "label list":
        same = form.min_items == form.max_items
        bounds = words.one if same and form.max_items == 1 else words.several if same else words.between
        count = bounds.format(least=form.min_items, most=form.max_items)
        return [count + words.from_labels.format(labels=_join(form.labels, words)), *empty]
    if form.shape == "string list":
        copied = words.copied if form.item is not None and form.item.copied and form.ground else ""
        return [words.strings.format(copied=copied), *empty]
    items = [words.items] if form.shape == "object list" else []
    return [*items, *_field_rules(form, words), *empty]


def _field_rules(form: AnswerForm, words: _Words) -> list[str]:
    """One line for all fields of which the same is to be said."""
    keys: dict[str, list[str]] = {}
    for field in form.fields:
        keys.setdefault(_describe_field(field, form, words), []).append(json.dumps(field.key, ensure_ascii=False))
    return [f"- {words.comma.join(named)}{words.colon}{told}" for told, named in keys.items()]


def _describe_field(field: Field, form: AnswerForm, words: _Words) -> str:
    kinds = field.kind.split("|")
    known = [words.kinds[kind] for kind in kinds]
    told = words.any if len(kinds) >= _MANY_KINDS else words.either.join(known)
    if field.copied and form.ground:
        told += words.copied
    elif field.values:
        told += words.one_of.format(values=_join(field.values, words))
    elif field.pattern:
        told += words.like.format(pattern=field.pattern)
    if field.absent is not None:
        absent = form.style.dumps([field.absent] if "string" not in kinds else field.absent)
        told += words.semicolon + words.absent.format(absent=absent)
    return told


def _join(values: Sequence[str], words: _Words) -> str:
    """`values` in a row, in quotes where it could not be seen otherwise where one ends."""
    unclear = any(value != value.strip() or not value or words.comma.strip() in value for value in values)
    return words.comma.join(json.dumps(value, ensure_ascii=False) if unclear else value for value in values)


def _skeleton(form: AnswerForm) -> Any:
    """An answer of the form with a placeholder in the place of every value."""
    if form.shape in ("label list", "string list"):
        return [PLACEHOLDER]
    item = {field.key: _placeholder(field.kind.split("|")) for field in form.fields}
    return item if form.shape == "object" else [item]


def _placeholder(kinds: Sequence[str]) -> Any:
    if "string" in kinds or len(kinds) >= _MANY_KINDS:
        return PLACEHOLDER
    values: Mapping[str, Any] = {
        "list of strings": [PLACEHOLDER], "number": 0, "boolean": True, "list": [], "object": {}, "null": None
    }  # fmt: skip
    return next(value for kind, value in values.items() if kind in kinds)
