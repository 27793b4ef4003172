"""The grammar of an answer form: what a model may write, token by token, when it is held to the form.

`form_grammar` returns text in llguidance's dialect of Lark; this module imports no engine and knows no tokens. The
grammar accepts the one spelling that the labels have: their fence, separators, indentation, key order and escapes.
There is no free white space in it, and every list, string and number has a greatest length (where no label shows one,
that of `schema.py`), so no answer goes on without end. What the grammar accepts, `AnswerForm.parse` reads and
`AnswerForm.write` writes back byte for byte; only the numbers of a user's own JSON Schema may be spelled otherwise.

    >>> form = AnswerForm(shape="label list", labels=("a", "b"), min_items=1, max_items=1)
    >>> print(form_grammar(form))
    start: "[" VALUE_0 "]"
    VALUE_0: "\\"a\\"" | "\\"b\\""
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..errors import FormError
from . import lexemes
from .fields import MAX_LABELS, Bounds, Field
from .forms import AnswerForm, JsonStyle
from .rules import rule_of_pattern
from .schema import MAX_ITEMS, MAX_LENGTH, rule_of_schema

MAX_DEPTH = 3
"""Deepest nesting of lists and objects where no label shows one."""
LEXER_FUEL = 100_000_000
"""What an engine must be allowed to spend on reading a grammar and on one mask (`LLParserLimits`): with its default of
200,000 the first mask of a value copied from a text of 1,500 characters fails."""
LEAST_SLACK = 16
"""A string may be twice as long as the longest labelled one, and at least so many characters longer."""
MORE_DIGITS = 2
"""A number may have so many digits before its point more than the longest labelled one."""
EXACT_DIGITS = 15
"""Every decimal of so many digits is read and written back alike."""


def form_grammar(form: AnswerForm, text: str = "", *, ground: bool = True) -> str | None:
    """The grammar of `form` as llguidance's Lark; None for free text, which has none.

    Args:
        text: the row's text, which values are copied from.
        ground: whether the values of a field that every label copied from its text must be pieces of `text` (or the
            form's word for absence). Such a field is no closed set, even where its labelled values are few: what is
            copied is as open as the texts are.

    Raises:
        FormError: no answer of this form can be given for `text`, because a value must be copied and there is nothing
            to copy; or a label holds half of a surrogate pair.
    """
    if form.shape == "text":
        return None
    if form.shape == "pattern":
        return rule_of_pattern(form.definition)
    if form.shape == "grammar":
        return form.definition
    writer = _Writer(style=form.style, text=text if ground and form.ground else None)
    body = _body(form, writer)
    if body is None:
        keys = ", ".join(one.key for one in form.fields if one.copied) or "a string"
        raise FormError(
            f"No answer of this form can be copied from the text {text[:40]!r}: {keys} must be a piece of the text, "
            "and the form has no word for absence. Ask with a text, or switch grounding off for the task."
        )
    opening, closing = (lexemes.literal(fence) if fence else "" for fence in (form.fence_open, form.fence_close))
    writer.rules["start"] = " ".join(part for part in (opening, body, closing) if part)
    return writer.lark()


def _body(form: AnswerForm, writer: _Writer) -> str | None:
    """The answer without its fence; None when the text allows none."""
    most = form.max_items or MAX_ITEMS
    if form.shape == "json":
        separators = {"item_separator": form.style.item_separator, "key_separator": form.style.key_separator}
        schema = json.loads(form.definition)
        return writer.rule(rule_of_schema(schema, **separators, ensure_ascii=form.style.ensure_ascii), "answer")
    if form.shape == "label":
        return writer.terminal(lexemes.one_of(form.labels))
    if form.shape == "object":
        return writer.object_of(form.fields, level=0)
    if form.shape == "object list":
        item = writer.object_of(form.fields, level=1)
        return writer.list_of(None if item is None else writer.rule(item), form.min_items, most, level=0)
    if form.shape == "string list":
        item = writer.string(form.item or Field(key="", kind="string"))
        return writer.list_of(item, form.min_items, most, level=0)
    labels = [form.style.dumps(label) for label in form.labels]
    if most > 1 and not form.repeats and len(labels) <= MAX_LABELS:
        choices = [lexemes.literal(label) for label in labels]
        return writer.distinct(choices, "[]", form.min_items, min(most, len(labels)), level=0)
    return writer.list_of(writer.terminal(lexemes.one_of(labels)), form.min_items, most, level=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Writer:
    """Collects rules. Its methods return what may stand inside a rule; None for a value that the text cannot give."""

    style: JsonStyle
    text: str | None
    """What values are copied from; None where they need not be."""
    rules: dict[str, str] = field(default_factory=lambda: {"start": ""})
    names: dict[str, str] = field(default_factory=dict)
    """Each rule's name by what it stands for, so that equal rules are one."""

    def lark(self) -> str:
        """All rules, a line each, the first one first."""
        return "\n".join(f"{name}: {body}" for name, body in self.rules.items())

    def rule(self, body: str, kind: str = "part") -> str:
        """The name of a rule for `body`."""
        if body not in self.names:
            self.names[body] = f"{kind}_{len(self.names)}"
            self.rules[self.names[body]] = body
        return self.names[body]

    def terminal(self, body: str) -> str:
        """The name of a terminal for `body`: read as one word, which is what keeps masks cheap."""
        return self.rule(body, "VALUE")

    # ---- lists and objects -----------------------------------------------------------------------------------

    def list_of(self, item: str | None, least: int, most: int, *, level: int) -> str | None:
        """A list of `least` to `most` of `item`, in the style's spelling, `level` lists and objects deep."""
        if item is None:
            return lexemes.literal("[]") if least == 0 else None
        opening, between, closing = self._around("[]", level)
        more = f" ({between} {item}){{{max(0, least - 1)},{most - 1}}}" if most > 1 else ""
        filled = f"{opening} {item}{more} {closing}"
        return filled if least else f"({filled} | {lexemes.literal('[]')})"

    def distinct(self, items: Sequence[str], brackets: str, least: int, most: int, *, level: int) -> str:
        """A list or object of `least` to `most` different ones of at most 64 `items`, which stand as in a rule.

        A bit for each item tells whether it was written.
        """
        opening, between, closing = self._around(brackets, level)
        some, more = f"some_{len(self.rules)}", f"more_{len(self.rules)}"
        self.rules[f"{some}::_"] = " | ".join(
            f"{item} {more}::set_bit({bit}) %if bit_clear({bit})" for bit, item in enumerate(items)
        )
        self.rules[f"{more}::_"] = (
            f"{closing} %if bit_count_ge(_, {max(1, least)}) | {between} {some}::_ %if bit_count_lt(_, {most})"
        )
        filled = f"{opening} {some}::0x0"
        return filled if least else f"({filled} | {lexemes.literal(brackets)})"

    def object_of(self, fields: Sequence[Field], *, level: int) -> str | None:
        """An object with exactly these keys in this order."""
        newline = self._newline(level + 1)
        parts = []
        for number, one in enumerate(fields):
            value = self.value(one, level=level + 1)
            if value is None:
                return None
            before = self.style.item_separator if number else "{"
            parts += [lexemes.literal(f"{before}{newline}{self._quoted(one.key)}{self.style.key_separator}"), value]
        return " ".join([*parts, lexemes.literal(self._newline(level) + "}")])

    def _around(self, brackets: str, level: int) -> tuple[str, str, str]:
        """What stands before, between and after the items of a list or object."""
        inside = self._newline(level + 1)
        return (
            lexemes.literal(brackets[0] + inside),
            lexemes.literal(self.style.item_separator + inside),
            lexemes.literal(self._newline(level) + brackets[1]),
        )

    def _newline(self, level: int) -> str:
        return "" if self.style.indent is None else "\n" + " " * (self.style.indent * level)

    def _quoted(self, text: str) -> str:
        return self.style.dumps(text)

    # ---- values ----------------------------------------------------------------------------------------------

    def value(self, one: Field, *, level: int) -> str | None:
        """A value of any of the field's kinds."""
        kinds = one.kind.split("|")
        bounds = one.bounds
        choices: list[str | None] = []
        if "string" in kinds:
            choices.append(self.string(one))
        if "list of strings" in kinds:
            alone = one.absent is not None and one.absent_alone
            item = self.string(replace(one, absent=None) if alone else one)
            choices.append(self.list_of(item, bounds.min_items, bounds.max_items or MAX_ITEMS, level=level))
            if alone and one.absent is not None:
                only = self.terminal(lexemes.literal(self._quoted(one.absent)))
                choices.append(self.list_of(only, 1, 1, level=level))
        choices += self._scalars(bounds, kinds)
        if "list" in kinds or "object" in kinds:
            choices += self._nested(bounds, kinds, level=level, depth=bounds.depth or MAX_DEPTH)
        possible = [choice for choice in choices if choice is not None]
        if not possible:
            return None
        return possible[0] if len(possible) == 1 else self.rule(" | ".join(possible))

    def string(self, one: Field) -> str | None:
        """A string as the field's labels are: copied, one of a set, or free."""
        if self.text is not None and one.copied:
            piece = lexemes.copied(self.text, trimmed=one.bounds.trimmed, ensure_ascii=self.style.ensure_ascii)
            kinds = [] if piece is None else [f'"\\"" ({piece}) "\\""']
            kinds += [] if one.absent is None else [lexemes.literal(self._quoted(one.absent))]
            kinds += [] if one.bounds.min_length else [lexemes.literal('""')]
            return self.terminal(" | ".join(kinds)) if kinds else None
        others = [] if one.absent is None else [one.absent]
        if one.values:
            return self.terminal(lexemes.one_of(map(self._quoted, [*one.values, *others])))
        free = self._free_string(one.bounds)
        if one.pattern and (one.pattern.isascii() or not self.style.ensure_ascii):  # it has no quotes and no escapes
            free = lexemes.regex(f'"(?:{one.pattern})"')
            others += [] if one.bounds.min_length else [""]
        return self.terminal(" | ".join([free, *map(lexemes.literal, map(self._quoted, others))]))

    def _free_string(self, bounds: Bounds) -> str:
        seen = bounds.max_length
        return lexemes.string(
            min_length=min(1, bounds.min_length),
            max_length=max(2 * seen, seen + LEAST_SLACK) if seen else MAX_LENGTH,
            trimmed=bounds.trimmed,
            ensure_ascii=self.style.ensure_ascii,
        )

    def _scalars(self, bounds: Bounds, kinds: Sequence[str]) -> list[str | None]:
        choices: list[str | None] = []
        if "number" in kinds:
            whole, fraction = bounds.whole_digits, bounds.fraction_digits
            slack = min(MORE_DIGITS, max(0, EXACT_DIGITS - whole - fraction))
            digits = lexemes.number(bounds.numbers, whole_digits=whole and whole + slack, fraction_digits=fraction)
            choices.append(self.terminal(digits))
        choices += [lexemes.literal(word) for word in ("true", "false") if "boolean" in kinds]
        return choices + ([lexemes.literal("null")] if "null" in kinds else [])

    def _nested(self, bounds: Bounds, kinds: Sequence[str], *, level: int, depth: int) -> list[str | None]:
        """Lists and objects of anything, at most `depth` deep: finite, and in the style's spelling."""
        anything = [self.terminal(self._free_string(bounds)), *self._scalars(bounds, ("number", "boolean", "null"))]
        if depth > 1:
            anything += self._nested(bounds, ("list", "object"), level=level + 1, depth=depth - 1)
        item = self.rule(" | ".join(choice for choice in anything if choice is not None))
        most = bounds.max_items or MAX_ITEMS
        choices: list[str | None] = []
        if "list" in kinds:
            choices.append(self.list_of(item, 0, most, level=level))
        if "object" in kinds and bounds.keys:
            members = [f"{lexemes.literal(self._quoted(key) + self.style.key_separator)} {item}" for key in bounds.keys]
            choices.append(self.distinct(members, "{}", 0, min(most, len(members)), level=level))
        elif "object" in kinds:  # with keys unknown, one that stands twice is refused only when the answer is read
            opening, between, closing = self._around("{}", level)
            member = f"{self.terminal(self._free_string(bounds))} {lexemes.literal(self.style.key_separator)} {item}"
            more = f" ({between} {member}){{0,{most - 1}}}" if most > 1 else ""
            choices.append(f"({opening} {member}{more} {closing} | {lexemes.literal('{}')})")
        return choices
