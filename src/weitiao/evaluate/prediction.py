"""What a model answered to one labelled row, and the file of such lines that scores and comparisons start from.

Knows the line; knows nothing of what an answer is worth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, Problem
from ..runs import write_bytes

Finish = Literal["stop", "length", "refused"]

_TEXTS = ("source", "task", "prompt", "gold", "answer", "finish")
_OPTIONAL = ("before", "refusal", "confidence", "fields", "loss", "length", "origin")


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldConfidence:
    """How sure a model was of one value of its answer."""

    path: str
    """Where in the answer the value stands, such as ``[0].subject``; empty for an answer that is one value."""
    value: str
    confidence: float
    """0–1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a model answered to one row: one line of the predictions file."""

    source: str
    """Where the row came from, such as ``dev.jsonl:37``."""
    task: str
    prompt: str
    """The input as the model was asked it."""
    gold: str
    """The labelled answer as the model was trained to write it."""
    answer: str
    finish: Finish = "stop"
    """`stop`: the model ended its answer; `length`: the answer was cut at the token limit; `refused`: the engine gave
    no answer, and `answer` holds what there was of one. A refused answer earns nothing, whatever it holds."""
    before: tuple[tuple[str, str], ...] = ()
    """What the model was shown before `prompt`, as (speaker, text): the tools on offer, the system message, the earlier
    turns."""
    refusal: str = ""
    """Why the engine refused, in its words; empty unless `finish` is `refused`."""
    confidence: float | None = None
    """How sure the model was of its answer (0–1); None when that was not measured."""
    fields: tuple[FieldConfidence, ...] = ()
    """How sure it was of the single values, where that was measured."""
    loss: float | None = None
    """Mean negative log-likelihood per token (nats) of the gold answer under the model; None when not measured."""
    length: int = 0
    """Characters of the input; 0 when not given, and then `prompt` is counted."""
    origin: str = ""
    """Name of the file the row came from; empty when not given, and then `source` tells it."""

    @property
    def num_characters(self) -> int:
        """How long the input is."""
        return self.length or len(self.prompt)

    @property
    def file(self) -> str:
        """The file the row came from, without folder and line.

        >>> Prediction(source="/data/dev.jsonl:37", task="t", prompt="…", gold="a", answer="a").file
        'dev.jsonl'
        """
        if self.origin:
            return self.origin
        path, colon, place = self.source.rpartition(":")
        return Path(path if colon and place.isdigit() else self.source).name

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; `from_json` reads it back equal. Optional fields stand in it only where they are given."""
        fields = [{"path": one.path, "value": one.value, "confidence": one.confidence} for one in self.fields]
        optional = {
            "before": [list(turn) for turn in self.before],
            "refusal": self.refusal,
            "confidence": self.confidence,
            "fields": fields,
            "loss": self.loss,
            "length": self.length,
            "origin": self.origin,
        }
        given = {
            name: value for name, value in optional.items() if value not in ([], "", 0) or isinstance(value, float)
        }
        return {**{name: getattr(self, name) for name in _TEXTS}, **{k: v for k, v in given.items() if v is not None}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Prediction:
        """The prediction that `to_json` wrote. Raises ValueError, in a sentence, for anything else."""
        if not isinstance(data, Mapping) or set(data) - set(_OPTIONAL) != set(_TEXTS):
            raise ValueError(
                f"A prediction is an object with exactly the keys {', '.join(_TEXTS)}, "
                f"and maybe {', '.join(_OPTIONAL)}."
            )
        wrong = [name for name in (*_TEXTS, "refusal", "origin") if not isinstance(data.get(name, ""), str)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} must be text.")
        if data["finish"] not in ("stop", "length", "refused"):
            raise ValueError(f'finish is "stop", "length" or "refused", not {data["finish"]!r}.')
        before = data.get("before", [])
        if not (isinstance(before, list) and all(_is_turn(turn) for turn in before)):
            raise ValueError("before must be a list of pairs: who speaks, and the text.")
        confidence, loss, length = (data.get(name) for name in ("confidence", "loss", "length"))
        if confidence is not None and not _is_share(confidence):
            raise ValueError(f"confidence must be a number from 0 to 1, not {confidence!r}.")
        if loss is not None and (isinstance(loss, bool) or not isinstance(loss, int | float)):
            raise ValueError(f"loss must be a number, not {loss!r}.")
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 0):
            raise ValueError(f"length must be a count of characters, not {length!r}.")
        fields = data.get("fields", [])
        if not (isinstance(fields, list) and all(_is_field(one) for one in fields)):
            raise ValueError("fields must be a list of objects with path, value and a confidence from 0 to 1.")
        own = {"before": tuple((speaker, text) for speaker, text in before), "length": length or 0}
        return cls(**{**data, **own, "fields": tuple(FieldConfidence(**one) for one in fields)})


def _is_turn(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_field(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) == {"path", "value", "confidence"}
        and isinstance(value["path"], str)
        and isinstance(value["value"], str)
        and _is_share(value["confidence"])
    )


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Write one JSON line per prediction; the file appears whole or not at all."""
    lines = (json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in predictions)
    # A lone surrogate cannot be UTF-8; as the escape \udXXX it is JSON and reads back equal.
    write_bytes(path, "".join(lines).encode("utf-8", "backslashreplace"))


def read_predictions(path: Path) -> tuple[Prediction, ...]:
    """The predictions in `path`. Raises DataError naming every line that is not one."""
    rows: list[Prediction] = []
    problems: list[Problem] = []
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(Prediction.from_json(json.loads(line)))
            except ValueError as error:
                fix = "Predict again, or remove the line."
                problems.append(Problem(source=f"{path.name}:{number}", field="row", message=f"{error}", fix=fix))
    if problems:
        raise DataError(f"{len(problems)} line(s) of {path} are not predictions.", problems)
    return tuple(rows)
