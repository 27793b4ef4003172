"""Multiple-choice questions of a forgetting probe: one JSON object a line, every bad line named.

A line has a question, its choices and the right one, in one of three spellings::

    {"question": "7 × 8 = ?", "choices": ["54", "56"], "answer": 1}       or "B", or "56": a number counts from 0
    {"question": "7 × 8 = ?", "A": "54", "B": "56", "answer": "B"}        as tables of C-Eval and CMMLU
    {"question": "7 × 8 = ?\\nA. 54\\nB. 56\\nAnswer:", "answer": "B"}     choices inside the question

A ``category``, ``subject`` or ``source``, the first of them there is, groups the questions; other fields are free.

Questions whose choices have letters are asked with the choices shown and answered by a letter; those with `choices`
alone are asked as they are, and each choice is an answer of its own. The question's text is never changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from ..errors import DataError, Problem
from ..tasks.strict_json import loads

CATEGORY_FIELDS = ("category", "subject", "source")
NO_CATEGORY = "all"

_LETTERED = re.compile(r"(?:^|\n|\\n)[ \t\u3000]*[(（]?([A-Z])[.．、:：)）]")
"""A choice on a line of its own; some sets write their line breaks as a backslash and an n."""
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question as it is asked."""

    source: str
    """Where it came from, such as ``questions.jsonl:12``."""
    category: str
    text: str
    """What the model is asked."""
    choices: tuple[str, ...]
    """The answers it may give: letters, or the choices themselves."""
    right: int
    """Place of the right one among them."""


def read_probe(path: str | Path) -> tuple[Question, ...]:
    """The questions in the file `path`.

    Raises:
        DataError: it cannot be read or holds none, or names every line that is no question, with field and fix.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The probe {path} cannot be read: {error}.") from None
    questions: list[Question] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        source = f"{path.name}:{number}"
        try:
            questions.append(_question(loads(line), source))
        except _FieldError as error:
            problems.append(Problem(source=source, field=error.field, message=error.message, fix=error.fix))
        except ValueError as error:
            problems.append(Problem(source=source, field="row", message=f"{error}.", fix="Write one JSON object."))
    if problems:
        raise DataError(f"{len(problems)} lines of the probe {path} are no multiple-choice questions.", problems)
    if not questions:
        raise DataError(f"The probe {path} holds no questions.")
    return tuple(questions)


class _FieldError(Exception):
    def __init__(self, field: str, message: str, fix: str) -> None:
        self.field, self.message, self.fix = field, message, fix
        super().__init__(message)


def _question(row: Any, source: str) -> Question:
    if not isinstance(row, Mapping):
        raise _FieldError("row", f"It is {row!r:.40} and no object.", 'Write {"question", "choices", "answer"}.')
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise _FieldError("question", f"It is {text!r:.40}.", "Give the question as text.")
    if "answer" not in row:
        raise _FieldError("answer", "It is missing.", "Give the right choice: its letter, its number or its text.")
    if "choices" in row:
        choices = _choices(row["choices"])
        right = _place(row["answer"], choices)
        return Question(source=source, category=_category(row), text=text, choices=choices, right=right)
    named = _run_of_letters([letter for letter in ascii_uppercase if letter in row])
    letters = named or _run_of_letters(_LETTERED.findall(text))
    if len(letters) < 2:
        raise _FieldError(
            "choices",
            "There are none: no choices, no A and B, and no lines A. and B. in the question.",
            'Give "choices": ["…", "…"].',
        )
    if named:
        text = _with_choices(text, {letter: row[letter] for letter in named})
    answer = row["answer"]
    if not isinstance(answer, str) or answer.strip() not in letters:
        raise _FieldError("answer", f"It is {answer!r:.40}.", f"Give the letter of a choice: {', '.join(letters)}.")
    right = letters.index(answer.strip())
    return Question(source=source, category=_category(row), text=text, choices=tuple(letters), right=right)


def _choices(value: Any) -> tuple[str, ...]:
    fix = "Give a list of at least two different texts."
    if not isinstance(value, list) or len(value) < 2:
        raise _FieldError("choices", f"It is {value!r:.60}.", fix)
    for choice in value:
        if not isinstance(choice, str) or not choice.strip():
            raise _FieldError("choices", f"It holds {choice!r:.40}.", fix)
    if len({choice.strip() for choice in value}) < len(value):
        raise _FieldError("choices", "It holds a choice twice.", fix)
    return tuple(choice.strip() for choice in value)


def _place(answer: Any, choices: tuple[str, ...]) -> int:
    """Which of `choices` is right, by number from 0, letter or text; what may be read in two ways is refused."""
    letters = ascii_uppercase[: len(choices)]
    fix = f"Give its text, its letter ({letters[0]}–{letters[-1]}) or its number from 0 (at most {len(choices) - 1})."
    places: set[int] = set()
    if isinstance(answer, int) and not isinstance(answer, bool):
        places = {answer} & set(range(len(choices)))
    elif isinstance(answer, str):
        text = answer.strip()
        places = {letters.index(text)} if len(text) == 1 and text in letters else set()
        places |= {choices.index(text)} if text in choices else set()
    if len(places) != 1:
        why = "may mean two of the choices" if places else "is none of the choices"
        raise _FieldError("answer", f"{answer!r:.40} {why}.", fix)
    return places.pop()


def _run_of_letters(found: list[str]) -> list[str]:
    """A, B, C … as far as they stand in `found` in this order."""
    letters: list[str] = []
    for letter in found:
        if len(letters) < len(ascii_uppercase) and letter == ascii_uppercase[len(letters)]:
            letters.append(letter)
    return letters


def _with_choices(text: str, choices: Mapping[str, Any]) -> str:
    for letter, choice in choices.items():
        if not isinstance(choice, str | int | float) or isinstance(choice, bool) or not str(choice).strip():
            raise _FieldError(letter, f"It is {choice!r:.40}.", "Give the choice as text.")
    lines = [f"{letter}. {choice}" for letter, choice in choices.items()]
    return "\n".join([text, *lines, "答案：" if _CJK.search(text) else "Answer:"])


def _category(row: Mapping[str, Any]) -> str:
    for field in CATEGORY_FIELDS:
        if row.get(field) not in (None, ""):
            return str(row[field])
    return NO_CATEGORY
