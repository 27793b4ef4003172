"""``/v1/tasks``: text in, typed answer out, with how sure the model is of each value."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from pydantic import Field

from ..tasks.base import Task
from ..tasks.form_schema import answer_schema
from .choices import Ended, follow_all
from .problems import bad_request
from .protocol import Shape
from .requests import Ticket
from .served import Ask, ServedModel
from .server import Server
from .writing import Heading, usage_shape


class TaskRequest(Shape):
    """``POST /v1/tasks/{task}``."""

    text: str = Field(min_length=1, description="The text to work on; it is asked as the labelled rows were.")
    model: str | None = Field(None, description="Which served model; may be left out where one has the task.")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens of the answer.")


class FieldShape(Shape):
    """One value of an answer."""

    path: str = Field(description="Where it stands, such as [0].subject; empty for an answer that is one value.")
    value: str
    confidence: float = Field(ge=0, le=1, description="Calibrated on the dev rows where `calibrated` says so.")


def describe_task(model: ServedModel, task: Task) -> dict[str, Any]:
    """What ``GET /v1/tasks`` says of a task."""
    wording = task.phrasings[0] if task.phrasings else None
    return {
        "id": task.name,
        "object": "task",
        "model": model.name,
        "kind": task.kind,
        "description": task.form.describe(),
        "schema": answer_schema(task.form),
        "wording": wording.to_json() if wording is not None else None,
        "calibrated": model.calibration is not None and task.name in model.calibration.answers,
    }


def answer_shape(task: Task) -> dict[str, Any]:
    """The JSON Schema of a reply about `task`, for the OpenAPI description."""
    return {
        "type": "object",
        "required": ["id", "object", "model", "task", "valid", "answer", "confidence", "fields", "text", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "task.answer"},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "task": {"const": task.name},
            "valid": {"type": "boolean"},
            "answer": {"anyOf": [answer_schema(task.form), {"type": "null"}]},
            "reason": {"type": "string"},
            "confidence": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}]},
            "calibrated": {"type": "boolean"},
            "fields": {"type": "array", "items": FieldShape.model_json_schema()},
            "text": {"type": "string"},
            "finish": {"enum": ["stop", "length"]},
            "notes": {"type": "array", "items": {"type": "string"}},
            "latency_ms": {"type": "integer"},
            "usage": {"type": "object"},
        },
    }


def model_for(server: Server, task: str, name: str | None) -> ServedModel:
    """The model that is to answer. Raises RefusedError when it is not told and not plain which."""
    if name is not None:
        return server.model(name)
    having = [model for model in server.models.values() if any(one.name == task for one in model.tasks)]
    if len(having) > 1:
        names = ", ".join(model.name for model in having)
        raise bad_request(f"Several models have the task {task}: say which with model: {names}.", param="model")
    return having[0] if having else next(iter(server.models.values()))


async def answer_task(
    server: Server, model: ServedModel, ask: Ask, tickets: Sequence[Ticket], heading: Heading
) -> dict[str, Any]:
    """The typed answer to one text. Raises RefusedError when the model could not finish it."""
    assert ask.task is not None, "a task was asked"
    started = time.monotonic()
    async with aclosing(follow_all(tickets, ask, model.opened.renderer, stops=())) as events:
        async for event in events:
            if isinstance(event, Ended):
                break
    assert isinstance(event, Ended) and event.reply is not None, "without stop texts every answer is whole"
    server.note_answer(heading.id, model, ask, event, ticket=tickets[0])
    line = server.read_answer(model, ask, event.reply)
    return {
        **heading.shape("task.answer"),
        "task": ask.task.name,
        "valid": line["valid"],
        "answer": line["answer"],
        "reason": line["reason"],
        "confidence": line["confidence"],
        "calibrated": model.calibration is not None and ask.task.name in model.calibration.answers,
        "fields": line["value_confidence"],
        "text": line["prediction"],
        "finish": event.finish,
        "notes": list(ask.notes),
        "latency_ms": round(1000 * (time.monotonic() - started)),
        "usage": usage_shape([event.usage]),
    }
