"""What is wrong with the facts of an answer, one by one: missing, spurious, of the wrong type, of the wrong extent.

Every labelled fact that the answer lacks, and every fact that the label lacks, is counted once, and a pair of the two
that means the same thing is one error instead of two::

    label   (父亲, 北京大学) (母亲, 丙) (国籍, 中国)
    answer  (父亲, 北京)     (姐姐, 丙)              (生日, 五月)

    boundary    (父亲, 北京大学) → (父亲, 北京)       the same kind, an overlapping value
    wrong type  (母亲, 丙) → (姐姐, 丙)              the same value, another kind
    missing     (国籍, 中国)
    spurious    (生日, 五月)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from .facts import Fact, facts, type_places
from .forms import Answer, AnswerForm
from .relaxed import alike, match, normalise

ErrorKind = Literal["missing", "spurious", "wrong type", "boundary"]

ERROR_KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)


@dataclass(frozen=True, slots=True)
class FactError:
    """One difference between label and answer; facts with their types, in the order of the form's fields."""

    kind: ErrorKind
    gold: Fact | None
    """The labelled fact; None for a spurious one."""
    given: Fact | None
    """The answered fact; None for a missing one."""


def error_kinds(form: AnswerForm, gold: Answer, answer: Answer | None) -> list[FactError]:
    """The errors of a parsed `answer`, labelled facts first; of a refused one (None) every labelled fact is missing."""
    wanted = facts(form, gold, typed=True)
    given = facts(form, answer, typed=True) if answer is not None else set()
    types = type_places(form)
    wanted, given = wanted - given, given - wanted
    pairs: dict[Fact, FactError] = {}
    if wanted and given:
        for fact, other, _ in match(wanted, given, lambda a, b: alike(a, b, types)):
            pairs[fact] = FactError("boundary", fact, other)
        left = given - {error.given for error in pairs.values() if error.given is not None}
        for fact, other, _ in match(wanted - set(pairs), left, lambda a, b: _same_values(a, b, types)):
            pairs[fact] = FactError("wrong type", fact, other)
    found = [pairs.get(fact, FactError("missing", fact, None)) for fact in sorted(wanted)]
    used = {error.given for error in found}
    return found + [FactError("spurious", None, fact) for fact in sorted(given) if fact not in used]


def count_errors(form: AnswerForm, gold: Answer, answer: Answer | None) -> dict[str, float]:
    """Additive counts ``err:KIND`` of one row; a kind that does not occur is left out."""
    counts: dict[str, float] = {}
    for error in error_kinds(form, gold, answer):
        counts[f"err:{error.kind}"] = counts.get(f"err:{error.kind}", 0.0) + 1
    return counts


def errors_of(counts: Mapping[str, float]) -> dict[ErrorKind, int]:
    """How many errors of each kind summed `counts` hold."""
    return {kind: int(counts.get(f"err:{kind}", 0.0)) for kind in ERROR_KINDS}


def _same_values(gold: Fact, given: Fact, types: frozenset[int]) -> float:
    """1 when the facts differ in types only; 0 where a fact has no types that could be wrong."""
    if not types:
        return 0.0
    return float(all(normalise(a) == normalise(b) for n, (a, b) in enumerate(zip(gold, given)) if n not in types))
