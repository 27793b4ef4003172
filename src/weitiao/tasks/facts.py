"""What an answer states, as facts that can be compared: triples, entities, list items, attributes.

A fact of a list of objects is the tuple of its content fields; "typed" facts add the ``…_type`` fields. A fact of a
list of strings is a string. A fact of one object of attributes is a (key, value) pair, one of any other JSON a (path,
value) pair. Absence is no fact: null, an empty text, an empty list, and the placeholder that the labels have for "not
in the text".

Every fact has a name of its kind, where the form has one: the predicate of a triple, the type of an entity, the key of
an attribute, the path of other JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .forms import Answer, AnswerForm

Fact = tuple[str, ...]

_NAMING_KEYS = ("predicate", "relation", "type", "label", "关系", "类型")


def facts(form: AnswerForm, answer: Answer, *, typed: bool) -> set[Fact]:
    """The facts of a parsed `answer`; types of subject and object count only when `typed`."""
    if form.shape == "object":
        return {
            (field.key, str(value))
            for field in form.fields
            for value in _values(answer[field.key])
            if not _is_absent(value, field.absent)
        }
    if form.shape == "string list":
        return {(item,) for item in answer}
    if form.shape == "json":
        return set(_leaves(answer, ""))
    return {tuple(str(item[key]) for key in fact_keys(form, typed=typed)) for item in answer}


def absent_keys(form: AnswerForm, answer: Answer) -> set[str]:
    """The keys of one object of attributes for which `answer` gives no value."""
    return {
        field.key
        for field in form.fields
        if all(_is_absent(value, field.absent) for value in _values(answer[field.key]))
    }


def fact_keys(form: AnswerForm, *, typed: bool) -> list[str]:
    """For a list of objects, the fields that make up a fact, in order."""
    return [field.key for field in form.fields if typed or not field.key.endswith("_type")]


def naming_key(form: AnswerForm) -> str | None:
    """The field of a list's objects that names their kind (the predicate), for the table of scores by kind."""
    keys = [field.key for field in form.fields]
    named = [key for key in _NAMING_KEYS if key in keys]
    closed = [field.key for field in form.fields if field.values and not field.key.endswith("_type")]
    return next(iter([*named, *closed]), None)


def naming_place(form: AnswerForm, *, typed: bool) -> int | None:
    """Where in a fact the name of its kind stands; None where facts have no kind."""
    if form.shape in ("object", "json"):
        return 0
    key = naming_key(form) if form.shape == "object list" else None
    return None if key is None else fact_keys(form, typed=typed).index(key)


def type_places(form: AnswerForm) -> frozenset[int]:
    """Where in a typed fact kinds and types stand rather than values."""
    place = naming_place(form, typed=True)
    named = frozenset() if place is None else frozenset({place})
    if form.shape != "object list":
        return named
    return named | {n for n, key in enumerate(fact_keys(form, typed=True)) if key.endswith("_type")}


def _leaves(answer: Answer, path: str) -> Iterator[Fact]:
    """The values inside an answer of any shape, each with the keys that lead to it; places in lists do not count."""
    if isinstance(answer, Mapping):
        for key, value in answer.items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    elif isinstance(answer, list):
        for item in answer:
            yield from _leaves(item, f"{path}[]")
    elif not _is_absent(answer, None):
        yield (path, str(answer))


def _values(value: Answer) -> list[Answer]:
    return value if isinstance(value, list) else [value]


def _is_absent(value: Answer, placeholder: str | None) -> bool:
    return value is None or value == placeholder or (isinstance(value, str) and not value.strip())
