"""Rows in, predictions out: written to disk as they come, in the rows' order in the end, resumable.

Knows records, tasks and how to ask a model; knows nothing of scores or pages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from ..data.records import Record
from ..errors import DataError, FormError
from ..generate.chat import Reply, reply_all
from ..generate.engine import Sampling
from ..messages import write_calls
from ..render.base import Renderer
from ..runs import write_text, writing
from ..tasks.base import Task
from ..tasks.grammar import form_grammar
from .confidence import answer_confidence, field_confidences
from .prediction import FieldConfidence, Prediction

OWN_KEYS = frozenset(
    {"prediction", "answer", "valid", "reason", "finish", "confidence", "value_confidence", "source", "route"}
)
"""What a line of answers says; ``task`` aside, which is the row's own where it has one."""

CHUNK_ROWS = 4096
"""So many rows are made ready together: each has a grammar of its own, of the size of its text."""
_SEED_STEP = 1_000_003
"""Between the seeds of two such parts, so that their rows draw differently."""

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
    constrain: bool = True
    """Whether answers are held to their task's form while they are written."""

    def answer(self, records: Sequence[Record], tasks: Sequence[Task]) -> Iterator[Reply]:
        """Yield the reply to each record, whose tasks are `tasks`, as it is done.

        A record whose text allows no answer of the form is refused without being asked.
        """
        for number, start in enumerate(range(0, len(records), CHUNK_ROWS)):
            part = slice(start, start + CHUNK_ROWS)
            sampling = replace(self.sampling, seed=self.sampling.seed + number * _SEED_STEP)
            for reply in self._answer_part(records[part], tasks[part], sampling):
                yield replace(reply, index=start + reply.index)

    def _answer_part(self, records: Sequence[Record], tasks: Sequence[Task], sampling: Sampling) -> Iterator[Reply]:
        asked: list[int] = []
        grammars: list[str | None] = []
        for place, (record, task) in enumerate(zip(records, tasks, strict=True)):
            try:
                grammars.append(form_grammar(task.form, record.text) if self.constrain else None)
                asked.append(place)
            except FormError as error:
                yield Reply(index=place, text="", finish="refused", num_tokens=0, logprob=0.0, refusal=str(error))
        try:
            replies = reply_all(
                self.model,
                self.renderer,
                [records[place].messages for place in asked],
                sampling=sampling,
                tools=[records[place].tools for place in asked],
                limits=[self.answer_limits[tasks[place].name] for place in asked],
                grammars=grammars,
                max_rows=self.batch_rows,
            )
            for reply in replies:
                yield replace(reply, index=asked[reply.index])
        except DataError as error:  # which knows prompts by their numbers alone
            sources = {f"prompt {number}": records[place].source for number, place in enumerate(asked)}
            problems = [replace(one, source=sources.get(one.source, one.source)) for one in error.problems]
            raise DataError(str(error).partition("\n")[0], problems) from None


def predict_rows(
    answerer: Answerer,
    records: Sequence[Record],
    tasks: Sequence[Task],
    path: Path,
    *,
    key: str,
    finish: Callable[[dict[str, Any]], dict[str, Any]] = lambda line: line,
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
        finish: makes of each line what the file holds; what it adds may differ between the sittings of one `key`.
        on_reply: told of the progress.

    Returns:
        The lines as written: the row, ``task``, ``prediction`` (the text), ``answer`` (parsed, null when the form
        refuses it), ``valid``, ``reason``, ``finish``; of valid answers the model's ``confidence`` in the whole and
        in each of its values (``value_confidence``), as probabilities that nothing has calibrated yet.
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
                done[place] = read_reply(records[place], tasks[place], reply)
                stream.write(json.dumps({"place": place, "line": done[place]}, ensure_ascii=False) + "\n")
                stream.flush()
                if on_reply is not None:
                    on_reply(len(done), len(records))
    lines = [finish(done[place]) for place in range(len(records))]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    partial.unlink()
    return lines


def read_reply(record: Record, task: Task, reply: Reply) -> dict[str, Any]:
    """The line of a file of predictions that says what `reply` is worth as an answer to `record`."""
    answer, reason, confidence = None, reply.refusal, None
    fields: tuple[FieldConfidence, ...] = ()
    if not reason:
        try:
            answer = task.form.parse(reply.text)
            confidence = answer_confidence(reply.tokens)
            fields = field_confidences(task.form, reply.text, reply.tokens)
        except FormError as error:
            reason = str(error)
    return {
        **record.raw,
        "source": record.source,
        "task": task.name,
        "prediction": reply.text,
        "answer": answer,
        "valid": not reason,
        "reason": reason,
        "finish": reply.finish,
        "confidence": confidence,
        "value_confidence": [asdict(one) for one in fields],
    }


def as_prediction(record: Record, task: Task, line: Mapping[str, Any]) -> Prediction:
    """The labelled `record` and its `line` of a file of predictions, ready to be scored."""
    return Prediction(
        source=record.source,
        task=task.name,
        prompt=record.prompt,
        before=_before_prompt(record),
        gold=task.write_target(record),
        answer=line["prediction"],
        finish=line["finish"],
        refusal=line["reason"] if line["finish"] == "refused" else "",
        confidence=line["confidence"],
        fields=tuple(FieldConfidence(**one) for one in line["value_confidence"]),
        length=len(record.text),
    )


def _before_prompt(record: Record) -> tuple[tuple[str, str], ...]:
    """What the model is shown before the last message, as (speaker, text)."""
    offer = (
        (("tools", "\n".join(json.dumps(tool, ensure_ascii=False) for tool in record.tools)),) if record.tools else ()
    )
    turns = record.messages[:-1]
    return (*offer, *((turn.role, write_calls(turn.text, turn.calls) if turn.calls else turn.text) for turn in turns))


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
