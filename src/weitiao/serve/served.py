"""A model as it is served: which task a request belongs to, the form its answer is held to, its prompt and limits.

A tuned model is asked exactly as evaluation asks it: a conversation in a wording that its rows had is of their task,
the text is found where theirs stood, and the task's form is the default `response_format`. Knows no HTTP and runs
nothing.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from ..apply import RunInUse, read_calibration
from ..data.prompts import split_prompt
from ..data.record import Record
from ..errors import DataError, FormError, GrammarError, ModelError, RenderError
from ..evaluate.calibration import RunCalibration
from ..generate.constraint import Constraint, ConstraintCompiler, compiler_of
from ..generate.sampling import Sampling
from ..messages import Message, ToolCall, write_calls
from ..models.opening import OpenModel
from ..render.base import Tools
from ..tasks.base import Task, assign_task
from ..tasks.grammar import form_grammar
from ..tasks.schema import check_schema, rule_of_schema
from .conversations import read_conversation
from .problems import RefusedError, bad_request
from .protocol import ChatRequest, JsonObjectFormat, JsonSchemaFormat, NamedFunction, NamedTool, TextFormat

_COMPILING = threading.Lock()
"""The engine's compilers are made once per vocabulary and shared."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request, ready for the worker."""

    prompt_ids: tuple[int, ...]
    tools: Tools
    """Those on offer: the reply is read with them."""
    constraint: Constraint | None
    limit: int
    """Most tokens of the answer."""
    task: Task | None
    """The task it was recognised as; None for free conversation."""
    record: Record
    """The request as a row without an answer."""
    as_evaluated: bool
    """Whether it is asked as evaluation asks rows of `task`, so that the answer is one of the task's."""
    notes: tuple[str, ...] = ()
    """What was done to the request, as sentences."""
    grammar: str | None = None
    """What `constraint` was compiled from."""
    before: str = ""
    """What the answer's tokens spell before the text of `grammar`."""


@dataclass(kw_only=True)
class ServedModel:
    """One name under which a model answers."""

    name: str
    opened: OpenModel
    adapter: str | None = None
    """The worker's name for the adapter; None: the base model as it is."""
    run: RunInUse | None = None
    """The run it was tuned in; None for a base model."""
    decoding: Sampling
    """How tokens are chosen where the request says nothing; its limit is that of requests without a task."""
    max_context: int
    """Most tokens of prompt and answer together."""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.tasks: tuple[Task, ...] = self.run.tasks if self.run is not None else ()
        self.calibration: RunCalibration | None = read_calibration(self.run.folder) if self.run is not None else None

    def task_named(self, name: str) -> Task:
        """The task called `name`. Raises RefusedError (404) naming those there are."""
        for task in self.tasks:
            if task.name == name:
                return task
        there = ", ".join(task.name for task in self.tasks) or "none: it is a base model"
        raise RefusedError(
            404, f"{self.name} has no task {name[:80]!r}. Its tasks: {there}.", param="task", code="task_not_found"
        )

    def ask(self, request: ChatRequest) -> Ask:
        """What a request of the protocol asks for. Raises RefusedError for what cannot be answered."""
        conversation = read_conversation(request)
        record, task = self._recognise(conversation.messages, conversation.tools, request.task)
        formed = request.response_format
        chosen = request.tool_choice or request.function_call
        forced = conversation.tools and chosen not in (None, "auto", "none")
        if conversation.tools and isinstance(formed, JsonObjectFormat | JsonSchemaFormat):
            raise bad_request(
                "response_format asks for JSON and tools are on offer: an answer cannot be held to both. Leave one "
                'out, or set tool_choice to "none".',
                param="response_format",
            )
        grammar: str | None = None
        if forced:
            name = chosen.function.name if isinstance(chosen, NamedTool) else None
            name = chosen.name if isinstance(chosen, NamedFunction) else name
            single = name is not None or request.one_call
            grammar = self._calls_grammar(conversation.tools, name, single=single)
        elif isinstance(formed, JsonObjectFormat):
            grammar = _schema_grammar({"type": "object"})
        elif isinstance(formed, JsonSchemaFormat):
            grammar = _schema_grammar(_checked(formed.json_schema.schema_))
        elif formed is None and task is not None and not conversation.tools:
            return self.ask_record(record, task, most_tokens=request.most_tokens)
        else:
            assert formed is None or isinstance(formed, TextFormat)
        return self._ask(record, task, grammar, as_evaluated=False, most_tokens=request.most_tokens)

    def ask_text(self, text: str, task: Task, *, most_tokens: int | None = None) -> Ask:
        """What asking `task` of a bare `text` comes to, in the wording that most of its rows had."""
        if task.phrasings:
            phrasing = task.phrasings[0]
            messages, start = phrasing.ask(text), len(phrasing.before)
        else:
            messages, start = (Message(role="user", text=text),), 0
        record = _record(messages, (), task.name, text, (start, start + len(text)))
        return self.ask_record(record, task, most_tokens=most_tokens)

    def ask_record(self, record: Record, task: Task, *, most_tokens: int | None = None) -> Ask:
        """What a row of `task` asks for, as evaluation asks it."""
        assert self.run is not None, "a base model has no tasks"
        told = io.StringIO()
        try:
            prepared = self.run.prepare([record], [task], Console(file=told, width=1000, color_system=None))[0]
            grammar = form_grammar(task.form, prepared.text) if self._constrains else None
        except DataError as error:
            raise bad_request(str(error), param="messages", code="context_length_exceeded") from None
        except FormError as error:
            raise bad_request(str(error), param="messages") from None
        notes = tuple(line.removeprefix("note: ") for line in told.getvalue().splitlines())
        return self._ask(prepared, task, grammar, as_evaluated=True, most_tokens=most_tokens, notes=notes)

    def plain_record(self, text: str) -> Record:
        """A plain text that is to go on, as a row."""
        return _record([Message(role="user", text=text)], (), None, text, None)

    @property
    def _constrains(self) -> bool:
        return self.run is not None and self.run.contract.constrain

    def _ask(
        self,
        record: Record,
        task: Task | None,
        grammar: str | None,
        *,
        as_evaluated: bool,
        most_tokens: int | None,
        notes: tuple[str, ...] = (),
    ) -> Ask:
        renderer = self.opened.renderer
        try:
            prompt_ids = renderer.render_prompt(record.messages, record.tools)
        except RenderError as error:
            raise bad_request(str(error), param="messages") from None
        room = self.max_context - len(prompt_ids)
        if room < (most_tokens or 1):
            raise bad_request(
                f"The prompt has {len(prompt_ids)} tokens"
                + (f" and {most_tokens} more are asked for" if most_tokens else "")
                + f", but {self.name} takes {self.max_context} together. Shorten the messages"
                + (" or ask for fewer." if most_tokens else "."),
                param="messages",
                code="context_length_exceeded",
            )
        usual = self.decoding.max_new_tokens
        if task is not None and self.run is not None:
            usual = self.run.contract.answer_limits.get(task.name, usual)
        return Ask(
            prompt_ids=prompt_ids,
            tools=record.tools,
            constraint=None if grammar is None else self._compile(grammar, record.tools),
            limit=most_tokens if most_tokens is not None else min(usual, room),
            task=task,
            record=record,
            as_evaluated=as_evaluated,
            notes=notes,
            grammar=grammar,
            before=renderer.before_answer(record.tools),
        )

    def _compile(self, grammar: str, tools: Tools) -> Constraint:
        renderer = self.opened.renderer
        try:
            with _COMPILING:
                compiler = self._compiler()
            return compiler.compile(grammar, before=renderer.before_answer(tools))
        except GrammarError as error:
            raise bad_request(str(error), param="response_format") from None

    def _recognise(self, messages: tuple[Message, ...], tools: Tools, named: str | None) -> tuple[Record, Task | None]:
        """The conversation as a row, and its task: the one that is named, else by its wording, else none."""
        tasks = self.tasks if named is None else (self.task_named(named),)
        found = [
            (len(phrasing.before) + len(phrasing.after), len(phrasing.turns), place, phrasing, text)
            for place, task in enumerate(tasks)
            for phrasing in task.phrasings
            if not tools and (text := phrasing.find_text(messages)) is not None
        ]
        if found:
            _, _, place, phrasing, text = max(found, key=lambda one: (one[0], one[1], -one[2]))
            start = len(phrasing.before)
            return _record(messages, tools, tasks[place].name, text, (start, start + len(text))), tasks[place]
        system = messages[0].text if messages[0].role == "system" else ""
        prompt = messages[-1].text
        parts = split_prompt(prompt, 0, len(prompt), instruction=system)
        record = _record(
            messages, tools, named, parts.text, parts.text_span, question=parts.question, instruction=system
        )
        if not tasks:
            return record, None
        task = assign_task(record, tasks)
        return record, task if isinstance(task, Task) else None

    def calls_in_tags(self, tools: Tools) -> bool:
        """Whether the chat format writes calls as `messages.write_calls` does, not in words of its own."""
        renderer = self.opened.renderer
        tried = ToolCall(name=tools[0]["name"], arguments={})
        asked = [Message(role="user", text="?")]
        spelled = renderer.render_reply(asked, Message(role="assistant", text="", calls=(tried,)), tools)
        return spelled == renderer.render_reply(asked, Message(role="assistant", text=write_calls("", [tried])), tools)

    def spell(self, token: int) -> bytes:
        """The bytes that a token writes; of a token that is no text, its name."""
        try:
            with _COMPILING:
                spelled = self._compiler().text_bytes([token])
        except ModelError:  # a vocabulary that cannot be read as bytes
            spelled = self.opened.renderer.show_tokens([token])[0].encode()
        return spelled or str(self.opened.tokenizer.convert_ids_to_tokens(token)).encode()

    def _compiler(self) -> ConstraintCompiler:
        return compiler_of(self.opened.renderer, self.opened.model.config.get_text_config().vocab_size)

    def _calls_grammar(self, tools: Tools, name: str | None, *, single: bool) -> str:
        """The grammar of one call or, unless `single`, more of `tools`, or of the one called `name`."""
        if not self.calls_in_tags(tools):
            raise bad_request(
                f"{self.name} writes calls in words of its own, to which answers cannot be held yet. Set tool_choice "
                'to "auto".',
                param="tool_choice",
            )
        offered = [tool for tool in tools if name is None or tool["name"] == name]
        calls = []
        for place, tool in enumerate(offered):
            problems = check_schema(tool["parameters"])
            if problems:
                raise bad_request(f"{tool['name']}: {' '.join(problems)}", param=f"tools[{place}].function.parameters")
            opening = json.dumps(f'<tool_call>\n{{"name": {json.dumps(tool["name"])}, "arguments": ')
            spaced = rule_of_schema(tool["parameters"], item_separator=", ", key_separator=": ")
            calls.append(f"{opening} {spaced} {json.dumps('}' + chr(10) + '</tool_call>')}")
        one = " | ".join(f"call_{place}" for place in range(len(calls)))
        rules = [f"call_{place}: {call}" for place, call in enumerate(calls)]
        several = "(" + one + ') ("\\n" (' + one + ")){0,7}"
        return "\n".join([f"start: {one if single else several}", *rules])


def _record(
    messages: Sequence[Message],
    tools: Tools,
    task: str | None,
    text: str,
    span: tuple[int, int] | None,
    *,
    question: str = "",
    instruction: str = "",
) -> Record:
    return Record(
        messages=tuple(messages),
        target=None,
        source="request",
        task=task,
        instruction=instruction,
        question=question,
        text=text,
        text_span=span,
        raw={},
        tools=tuple(tools),
    )


def _checked(schema: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """`schema` where answers can be held to it. Raises RefusedError with everything that stands against that."""
    if schema is None:
        raise bad_request("json_schema has no schema. Give one.", param="response_format.json_schema.schema")
    problems = check_schema(schema)
    if problems:
        raise bad_request(" ".join(problems), param="response_format.json_schema.schema", code="invalid_schema")
    return schema


def _schema_grammar(schema: Mapping[str, Any]) -> str:
    return f"start: answer\nanswer: {rule_of_schema(schema)}"
