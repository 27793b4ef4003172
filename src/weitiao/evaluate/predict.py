"""Rows in, predictions out: written to disk as they come, in the rows' order in the end, resumable.

Knows records, tasks and how to ask a model; knows nothing of scores or pages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from ..data.records import Record
from ..errors import FormError
from ..generate.chat import Reply, reply_all
from ..generate.engine import Sampling
from ..render.base import Renderer
from ..runs import write_text, writing
from ..tasks.base import Task

OnReply = Callable[[int, int], None]
"""Called with (replies so far, replies in all)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answerer:
    """A model with all that is needed to ask it."""

    model: PreTrainedModel | PeftModel
    renderer: Renderer
    sampling: Sampling
    answer_limits: Mapping[str, int]
    """For each task, the most tokens of an answer."""
    batch_rows: int

    def answer(self, records: Sequence[Record], tasks: Sequence[Task]) -> Iterator[Reply]:
        """Yield the reply to each record, whose tasks are `tasks`, as it is done."""
        return reply_all(
            self.model,
            self.renderer,
            [record.messages for record in records],
            sampling=self.sampling,
            tools=[record.tools for record in records],
            limits=[self.answer_limits[task.name] for task in tasks],
            max_rows=self.batch_rows,
        )


def predict_rows(
    answerer: Answerer,
    records: Sequence[Record],
    tasks: Sequence[Task],
    path: Path,
    *,
    key: str,
    on_reply: OnReply | None = None,
) -> list[dict[str, Any]]:
    """Answer every record; `path` then holds one JSON line per record, in order.

    Lines appear in ``path.partial`` as they come. When a run was broken off, the answers already there are kept,
    provided they were made under the same `key`.

    Args:
        answerer: the model to ask.
        records: rows to answer; a row's own fields are echoed.
        tasks: for each record, its task.
        path: the file of predictions.
        key: identifies model, data and decoding; partial answers made under another key are thrown away.
        on_reply: told of the progress.

    Returns:
        The lines as written: the row, ``task``, ``prediction`` (the text), ``answer`` (parsed, null when the form
        refuses it), ``valid``, ``reason``, ``finish``.
    """
    partial = path.with_name(path.name + ".partial")
    done = _read_partial(partial, key)
    todo = [place for place in range(len(records)) if place not in done]
    with writing(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        if not done:
            partial.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
        with partial.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            for reply in answerer.answer([records[place] for place in todo], [tasks[place] for place in todo]):
                place = todo[reply.index]
                done[place] = _line(records[place], tasks[place], reply)
                stream.write(json.dumps({"place": place, "line": done[place]}, ensure_ascii=False) + "\n")
                stream.flush()
                if on_reply is not None:
                    on_reply(len(done), len(records))
    lines = [done[place] for place in range(len(records))]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    partial.unlink()
    return lines


def _line(record: Record, task: Task, reply: Reply) -> dict[str, Any]:
    try:
        answer, reason = task.form.parse(reply.text), ""
    except FormError as error:
        answer, reason = None, str(error)
    return {
        **record.raw,
        "source": record.source,
        "task": task.name,
        "prediction": reply.text,
        "answer": answer,
        "valid": not reason,
        "reason": reason,
        "finish": reply.finish,
    }


def _read_partial(partial: Path, key: str) -> dict[int, dict[str, Any]]:
    """Answers of a broken-off run by place; empty when there are none or they belong to something else."""
    if not partial.exists():
        return {}
    done: dict[int, dict[str, Any]] = {}
    stored = partial.read_text(encoding="utf-8", errors="replace")  # the last line may be cut inside a character
    for number, text in enumerate(stored.removesuffix("\n").split("\n")):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # the line being written when the run was broken off
        if number == 0 and line.get("key") != key:
            return {}
        if number > 0:
            done[line["place"]] = line["line"]
    whole = [json.dumps({"key": key})] + [
        json.dumps({"place": place, "line": line}, ensure_ascii=False) for place, line in done.items()
    ]
    write_text(partial, "".join(text + "\n" for text in whole))
    return done
