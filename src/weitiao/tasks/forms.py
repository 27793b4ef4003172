"""What an answer looks like: inferred once from the labels, then used to check, write, parse and describe answers.

The form is the one place that knows the answer's shape. It knows nothing of prompts, tokens, models or scores.

    >>> form = AnswerForm.infer(['["水果"]', '["手机"]', '["水果"]'] * 2, texts=[""] * 6)
    >>> form.shape, form.labels
    ('label list', ('手机', '水果'))
    >>> form.parse('["水果"]')
    ['水果']
    >>> form.parse('["飞机"]')
    Traceback (most recent call last):
    weitiao.errors.FormError: "飞机" is not one of the 2 labels. Labels: 手机, 水果.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Literal

from ..errors import FormError
from .fields import MAX_LABEL_LENGTH as MAX_LABEL_LENGTH
from .fields import MAX_LABELS as MAX_LABELS
from .fields import Answer as Answer
from .fields import Field as Field
from .fields import infer_field, infer_fields
from .fields import is_closed_set as is_closed_set
from .fields import kind_of as kind_of
from .rules import check_text
from .schema import ordered, validate
from .strict_json import loads

Shape = Literal["object list", "object", "label list", "string list", "label", "text", "json", "pattern", "grammar"]

_FENCE = re.compile(r"\A(?P<open>```[A-Za-z0-9_-]*\r?\n)(?P<body>.*?)(?P<close>(?:\r?\n)?```)\Z", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonStyle:
    """How JSON was spelled in the labels: the arguments of `json.dumps` that give the same bytes."""

    item_separator: str = ", "
    key_separator: str = ": "
    indent: int | None = None
    ensure_ascii: bool = False

    def dumps(self, value: Answer) -> str:
        """JSON text of `value` in this spelling."""
        return _encoder(self).encode(value)


@cache
def _encoder(style: JsonStyle) -> json.JSONEncoder:
    """Made once for each style: json.dumps would make one for every answer, which costs as much as writing it."""
    return json.JSONEncoder(
        ensure_ascii=style.ensure_ascii,
        indent=style.indent,
        separators=(style.item_separator, style.key_separator),
    )


STYLES = tuple(
    JsonStyle(item_separator=item, key_separator=key, indent=indent, ensure_ascii=ascii_only)
    for indent, (item, key), ascii_only in product(
        (None, 2, 4, 1, 3), ((", ", ": "), (",", ":"), (",", ": "), (", ", ":")), (False, True)
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerForm:
    """The shape, spelling and vocabulary of one task's answers. `parse(write(x)) == x` always holds."""

    shape: Shape
    style: JsonStyle = JsonStyle()
    fence_open: str = ""
    fence_close: str = ""
    fields: tuple[Field, ...] = ()
    """Keys in label order, for shapes made of objects."""
    labels: tuple[str, ...] = ()
    """The closed set, sorted, for label shapes."""
    min_items: int = 0
    max_items: int = 0
    """Bounds on the number of list items seen in the labels."""
    repeats: bool = True
    """Whether one label list may hold an item twice; false when no labelled list does."""
    item: Field | None = None
    """What the strings of a string list are like; its key is empty."""
    definition: str = ""
    """The user's own description of an answer: the JSON text of a JSON Schema for the shape json, a regular
    expression for pattern, a Lark grammar for grammar."""
    ground: bool = True
    """Whether fields whose labels are copied from the text must be copied in answers too."""

    @property
    def is_plain(self) -> bool:
        """Whether an answer is plain text rather than JSON."""
        return self.shape in ("text", "label", "pattern", "grammar")

    # ---- inferring -------------------------------------------------------------------------------------------

    @classmethod
    def infer(cls, targets: Sequence[Answer], *, texts: Sequence[str]) -> AnswerForm:
        """The form shared by `targets` (strings as labelled, or already lists and objects).

        Args:
            targets: at least one label of one task; their shapes must agree (`tasks.base.infer_tasks` groups them).
            texts: for each target, the input text its values may be copied from.
        """
        split = [split_fence(target) if isinstance(target, str) else ("", None, "") for target in targets]
        values = [loads(body) if body is not None else target for target, (_, body, _) in zip(targets, split)]
        shape = common_shape(values)
        strings = [target for target in targets if isinstance(target, str)]
        if shape == "text":
            if is_closed_set(strings):
                return cls(shape="label", labels=tuple(sorted(set(strings))))
            return cls(shape="text")
        fences = Counter((opening, closing) for opening, body, closing in split if body is not None)
        fence_open, fence_close = fences.most_common(1)[0][0] if fences else ("", "")
        style = _spelling([(body, value) for (_, body, _), value in zip(split, values) if body is not None])
        lengths = [len(value) for value in values if isinstance(value, list)] or [0]
        form = cls(
            shape=shape,
            style=style,
            fence_open=fence_open,
            fence_close=fence_close,
            min_items=min(lengths),
            max_items=max(lengths),
        )
        if shape == "label list":
            items = [item for value in values for item in value]
            if not is_closed_set(items):
                places = [(item, text, row) for row, (value, text) in enumerate(zip(values, texts)) for item in value]
                return replace(form, shape="string list", item=infer_field("", places) if places else None)
            repeats = any(len(set(value)) < len(value) for value in values)
            return replace(form, labels=tuple(sorted(set(items))), repeats=repeats)
        return replace(form, fields=infer_fields(values, texts))

    # ---- writing and parsing ---------------------------------------------------------------------------------

    def write(self, answer: Answer) -> str:
        """The canonical text of `answer`: for every label that follows the form, the very bytes labelled.

        Raises:
            FormError: `answer` does not fit the form.
        """
        self._check(answer)
        if self.is_plain:
            return str(answer)
        return f"{self.fence_open}{self.style.dumps(self._ordered(answer))}{self.fence_close}"

    def parse(self, text: str) -> Answer:
        """The answer that `text` holds. Spacing and key order inside JSON are free; everything else must match.

        Raises:
            FormError: says where and why `text` is not an answer of this form.
        """
        if self.shape == "text":
            return text
        if self.shape == "label":
            label = text if text in self.labels else text.strip()
            self._check_label(label)
            return label
        if self.is_plain:
            self._check(text)
            return text
        body = self._unfence(text.strip())
        try:
            answer = loads(body)
        except json.JSONDecodeError as error:
            raise FormError(_json_complaint(body, error)) from None
        except ValueError as error:
            raise FormError(f"{error}") from None
        self._check(answer)
        return self._ordered(answer)

    def read_target(self, target: Answer) -> Answer:
        """The parsed gold answer of a row, whose target may be text or already a list or an object.

        Raises:
            FormError: the target does not fit the form.
        """
        if isinstance(target, str):
            return self.parse(target)
        if self.is_plain:
            raise FormError(
                f"The target is a JSON {kind_of(target)}, but the other targets of its task are plain text."
            )
        self._check(target)
        return self._ordered(target)

    def _unfence(self, text: str) -> str:
        if not self.fence_open:
            return text
        opening, closing = self.fence_open.strip(), self.fence_close.strip()
        if not text.startswith(opening):
            raise FormError(f"The answer must open with {opening!r} but starts with {text[:20]!r}.")
        if not text.endswith(closing) or len(text) < len(opening) + len(closing):
            raise FormError(
                f"The code fence is never closed: the answer must end with {closing!r}, not {text[-20:]!r}."
            )
        return text[len(opening) : len(text) - len(closing)].strip()

    def _ordered(self, answer: Answer) -> Answer:
        """`answer` with the keys of its objects in label order."""
        if self.shape == "object":
            return {field.key: answer[field.key] for field in self.fields}
        if self.shape == "object list":
            return [{field.key: item[field.key] for field in self.fields} for item in answer]
        return ordered(self.definition, answer) if self.shape == "json" else answer

    def _check(self, answer: Answer) -> None:
        """Raise FormError unless `answer` has this form."""
        if self.is_plain:
            if not isinstance(answer, str):
                raise FormError(f"The answer must be plain text but is a JSON {kind_of(answer)}.")
            if self.shape == "label":
                self._check_label(answer)
            if self.shape in ("pattern", "grammar"):
                check_text(self.shape, self.definition, answer)
            return
        if self.shape == "json":
            validate(self.definition, answer)
            return
        if self.shape == "object":
            self._check_object(answer, where="The answer")
            return
        if not isinstance(answer, list):
            raise FormError(f"The answer must be a list but is a JSON {kind_of(answer)}.")
        for number, item in enumerate(answer, start=1):
            if self.shape in ("label list", "string list"):
                if not isinstance(item, str):
                    raise FormError(f"Item {number} must be a string but is a JSON {kind_of(item)}.")
                if self.shape == "label list":
                    self._check_label(item)
            else:
                self._check_object(item, where=f"Item {number}")

    def _check_label(self, label: str) -> None:
        if label not in self.labels:
            raise FormError(
                f'"{label[:60]}" is not one of the {len(self.labels)} labels. Labels: {", ".join(self.labels)}.'
            )

    def _check_object(self, item: Answer, *, where: str) -> None:
        if not isinstance(item, Mapping):
            raise FormError(f"{where} must be an object but is a JSON {kind_of(item)}.")
        keys = [field.key for field in self.fields]
        missing = [key for key in keys if key not in item]
        extra = [key for key in item if key not in keys]
        if missing or extra:
            parts = [f"lacks {', '.join(missing)}"] if missing else []
            parts += [f"has the unknown key {', '.join(map(str, extra))}"] if extra else []
            raise FormError(f"{where} {' and '.join(parts)}. Keys of the form: {', '.join(keys)}.")
        for field in self.fields:
            kinds = field.kind.split("|")
            if (kind := kind_of(item[field.key])) not in kinds and not ("list" in kinds and kind == "list of strings"):
                raise FormError(f"{where}: {field.key} must be a {field.kind.replace('|', ' or ')} but is a {kind}.")

    # ---- describing and storing ------------------------------------------------------------------------------

    def describe(self) -> str:
        """One line for people: what the labels look like."""
        fence = " in a code fence" if self.fence_open else ""
        if self.shape == "text":
            return "free text"
        if self.shape in ("json", "pattern", "grammar"):
            what = {"json": "JSON", "pattern": "text", "grammar": "text"}[self.shape]
            rule = {"json": "the schema", "pattern": "the pattern", "grammar": "the grammar"}[self.shape]
            return f"{what}{fence} that follows {rule} {' '.join(self.definition.split())}"
        if self.shape == "string list":
            return f"a JSON list{fence} of {self._bounds()} string(s)"
        if self.shape in ("label", "label list"):
            what = "one label" if self.shape == "label" else f"a JSON list of {self._bounds()} label(s)"
            return f"{what} out of {len(self.labels)}{fence}: {', '.join(self.labels)}"
        keys = ", ".join(f"{one.key} (like {one.pattern})" if one.pattern else one.key for one in self.fields)
        if self.shape == "object":
            return f"a JSON object{fence} with the keys {keys}"
        return f"a JSON list{fence} of {self._bounds()} object(s) with the keys {keys}"

    def _bounds(self) -> str:
        return str(self.min_items) if self.min_items == self.max_items else f"{self.min_items}–{self.max_items}"

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; `from_json` reads it back equal."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AnswerForm:
        """The form that `to_json` wrote."""
        values = dict(data)
        values["style"] = JsonStyle(**values["style"])
        values["fields"] = tuple(map(Field.from_json, values["fields"]))
        values["item"] = Field.from_json(values["item"]) if values.get("item") else None
        values["labels"] = tuple(values["labels"])
        return cls(**values)


def split_fence(text: str) -> tuple[str, str | None, str]:
    """``("```json\\n", body, "\\n```")`` of a fenced text; empty fences around JSON without one; body None otherwise.

    A body is only given when it is a JSON list or object: a fenced program is plain text to us.
    """
    match = _FENCE.match(text)
    opening, body, closing = match.group("open", "body", "close") if match else ("", text, "")
    if not body.lstrip().startswith(("[", "{")):
        return "", None, ""
    try:
        loads(body)
    except ValueError:
        return "", None, ""
    return opening, body, closing


def shape_of(value: Answer) -> tuple[Shape, tuple[str, ...]]:
    """The shape of one answer and, for objects, its sorted keys: what decides which rows belong together."""
    if isinstance(value, Mapping):
        return "object", tuple(sorted(value))
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        keys = {tuple(sorted(item)) for item in value}
        return ("object list", keys.pop()) if len(keys) == 1 else ("text", ())
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "label list", ()
    return "text", ()


def common_shape(values: Iterable[Answer]) -> Shape:
    """The one shape of `values`; an empty list fits either list shape; anything mixed is text."""
    shapes = {shape_of(value) for value in values if value != []}
    if not shapes:
        return "label list"
    return shapes.pop()[0] if len(shapes) == 1 else "text"


def _spelling(pairs: Sequence[tuple[str, Answer]]) -> JsonStyle:
    """The JSON style that reproduces the most bodies byte for byte (the first such style on a tie)."""
    if not pairs:
        return JsonStyle()
    values, counts = dict(pairs), Counter(body for body, _ in pairs)
    best, most = STYLES[0], -1
    for style in STYLES:
        reproduced = sum(count for body, count in counts.items() if style.dumps(values[body]) == body)
        if reproduced > most:
            best, most = style, reproduced
        if reproduced == len(pairs):  # as a rule the first style does: trying all forty would take a minute per million
            break
    return best


def _json_complaint(body: str, error: json.JSONDecodeError) -> str:
    if not body.strip():
        return "The answer is empty."
    if error.pos >= len(body.rstrip()) or error.msg.startswith("Unterminated"):
        return f"The JSON is never closed: it breaks off after {body[-20:]!r} ({error.msg})."
    seen = body[max(0, error.pos - 12) : error.pos + 12]
    return f"Not JSON at character {error.pos + 1}, near {seen!r}: {error.msg}."
