"""What users think of answers, kept as rows that training reads.

A right answer, or a wrong one with its correction, becomes a row ``{"messages": […, reply], "task", "feedback"}`` of
the file that the server was given; a wrong one without a correction teaches nothing yet and goes to ``….wrong.jsonl``
beside it, for people to correct. Nothing is kept on disk of answers that nobody rates.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..data.record import Record
from ..errors import FormError, RunError
from ..messages import write_calls
from ..tasks.base import Task
from .problems import RefusedError, bad_request
from .protocol import Shape

REMEMBERED = 1000
"""So many last answers can be rated."""


class FeedbackRequest(Shape):
    """``POST /v1/feedback``."""

    id: str = Field(description="The id of the answer, as the reply gave it.")
    thumb: Literal["up", "down"]
    correction: Any = Field(None, description="What the answer should have been, in the task's form.")
    comment: str | None = Field(None, max_length=10_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """An answer that was given."""

    model: str
    record: Record
    task: Task | None
    text: str


class Feedback:
    """The last answers, and the file that ratings of them go to."""

    def __init__(self, file: Path | None) -> None:
        """
        Args:
            file: a JSONL file, made when it is not there; None: no ratings are taken and no answers remembered.

        Raises:
            RunError: the file cannot be written.
        """
        self.file = file
        self._given: OrderedDict[str, Given] = OrderedDict()
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a", encoding="utf-8"):
                    pass
            except OSError as error:
                raise RunError(f"The feedback file {file} cannot be written: {error}.") from None

    def remember(self, answer_id: str, given: Given) -> None:
        """Keep an answer in memory, so that it can be rated; the oldest is forgotten."""
        if self.file is not None:
            self._given[answer_id] = given
            if len(self._given) > REMEMBERED:
                self._given.popitem(last=False)

    def take(self, rating: FeedbackRequest) -> Given:
        """Write a rating down; returns the answer it is about.

        Raises:
            RefusedError: no ratings are taken, the answer is not remembered, or the correction has another form.
        """
        if self.file is None:
            raise RefusedError(
                403, "No feedback is kept here. Start the server with --feedback FILE.jsonl.", code="no_feedback"
            )
        given = self._given.get(rating.id)
        if given is None:
            raise RefusedError(
                404,
                f"The answer {rating.id[:60]!r} is not known: the last {REMEMBERED} can be rated, until the server "
                "ends.",
                param="id",
                code="answer_not_found",
            )
        corrected = "correction" in rating.model_fields_set and rating.correction is not None
        if corrected and rating.thumb == "up":
            raise bad_request("An answer that is right needs no correction. Send thumb: down.", param="correction")
        text = _text_of(rating.correction, given.task) if corrected else given.text
        learnable = corrected or rating.thumb == "up"
        if learnable and given.task is not None and not corrected:
            text = _text_of(given.text, given.task)
        path = self.file if learnable else self.file.with_suffix(".wrong.jsonl")
        line = json.dumps(_row(given, text, rating), ensure_ascii=False)
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise RefusedError(500, f"The feedback could not be written: {error}.", kind="server_error") from None
        return given


def _text_of(answer: Any, task: Task | None) -> str:
    """`answer` as training would have it written. Raises RefusedError when it has another form."""
    if task is None:
        if not isinstance(answer, str) or not answer:
            raise bad_request("The correction of a reply must be a text.", param="correction")
        return answer
    try:
        return task.form.write(task.form.read_target(answer))
    except FormError as error:
        raise bad_request(f"That is no answer of {task.name}: {error}", param="correction") from None


def _row(given: Given, text: str, rating: FeedbackRequest) -> Mapping[str, Any]:
    record = given.record
    messages = [
        {"role": turn.role, "content": write_calls(turn.text, turn.calls) if turn.calls else turn.text}
        for turn in record.messages
    ]
    told = {"thumb": rating.thumb, "model": given.model, "time": int(time.time())}
    if rating.comment:
        told["comment"] = rating.comment
    if text != given.text:
        told["answered"] = given.text
    return {
        "messages": [*messages, {"role": "assistant", "content": text}],
        **({"tools": list(record.tools)} if record.tools else {}),
        **({"task": given.task.name} if given.task is not None else {}),
        "feedback": told,
    }
