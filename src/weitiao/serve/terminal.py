"""A conversation in a terminal: lines in, text out as it comes. The same path as the server's, without HTTP.

Knows the worker and the models; reading lines and printing is the caller's business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..generate.chat import reply_of
from ..runs import write_text
from .problems import RefusedError, from_complaints
from .protocol import ChatRequest
from .requests import Done, Failed, Piece
from .served import Ask, ServedModel
from .server import Server
from .streaming import TextStream

HELP = """\
What you write is said to the model; its reply comes as it is written. Ctrl-C stops a reply.

  /task NAME TEXT   ask one of its tasks about a text: the answer with how sure the model is of each value
  /tasks            the tasks, their forms and how they are asked
  /system TEXT      set the system message; /system alone takes it away
  /set KEY VALUE    temperature, top_p, max_tokens, seed, presence_penalty, frequency_penalty; VALUE - takes it back
  /free             replies without a form from here on, or with their task's again
  /undo             forget the last question and its reply
  /new              forget the whole conversation
  /save FILE        write the conversation as a row that training reads
  /help             this
  /exit             end; so does Ctrl-D

A line that ends in \\ goes on in the next one."""

_SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "max_tokens": int,
    "seed": int,
    "presence_penalty": float,
    "frequency_penalty": float,
}


@dataclass(kw_only=True)
class TerminalChat:
    """One conversation."""

    server: Server
    model: ServedModel
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    free: bool = False
    over: bool = False
    """Whether the user has said /exit."""

    def say(self, line: str) -> Generator[str]:
        """Yield what is to be printed in answer to a line, piece by piece.

        Closing the iterator stops a reply; what was written of it stays in the conversation.
        """
        try:
            if line.startswith("/"):
                name, _, rest = line[1:].partition(" ")
                yield from self._command(name, rest.strip())
            elif line.strip():
                yield from self._reply(line)
        except RefusedError as refused:
            yield f"{refused.message}\n"

    def _reply(self, text: str) -> Iterator[str]:
        asked = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        fields = {"response_format": {"type": "text"}} if self.free else {}
        try:
            request = ChatRequest.model_validate(
                {"model": self.model.name, "messages": [*system, *self.turns, asked], **self.settings, **fields}
            )
        except ValidationError as error:
            raise from_complaints(error.errors()) from None
        ask = self.model.ask(request)
        ticket = self.server.submit(ask, request, self.model, key="")[0]
        stream = TextStream(self.model.opened.renderer, tools=ask.tools, held=ask.constraint is not None)
        parts: list[str] = []
        end = ""
        try:
            for event in ticket:
                if isinstance(event, Failed):
                    raise RefusedError(500, event.reason, kind="server_error")
                text = stream.push([one.token for one in event.tokens]) if isinstance(event, Piece) else ""
                if isinstance(event, Done):
                    text = stream.finish(event.generation)
                    end = _ending(event, ask)
                if text:
                    parts.append(text)
                    yield text
        finally:
            ticket.cancel()
            if parts:
                self.turns += [asked, {"role": "assistant", "content": "".join(parts)}]
        yield f"{end}\n"

    def _command(self, name: str, rest: str) -> Iterator[str]:
        if name == "help":
            yield f"{HELP}\n"
        elif name == "exit":
            self.over = True
        elif name == "tasks":
            yield from self._tasks()
        elif name == "task":
            yield from self._task(*rest.partition(" ")[::2])
        elif name == "system":
            self.system = rest
            yield "The system message is set.\n" if rest else "There is no system message now.\n"
        elif name == "set":
            yield self._set(*rest.partition(" ")[::2])
        elif name == "free":
            self.free = not self.free
            yield f"Replies are {'free' if self.free else 'held to the form of their task'} from here on.\n"
        elif name == "undo":
            del self.turns[-2:]
            yield f"{len(self.turns) // 2} questions with their replies are left.\n"
        elif name == "new":
            self.turns.clear()
            yield "A new conversation.\n"
        elif name == "save":
            yield self._save(rest)
        else:
            yield f"There is no /{name}. Type /help for what there is.\n"

    def _tasks(self) -> Iterator[str]:
        if not self.model.tasks:
            yield f"{self.model.name} is a base model: it was tuned to no task.\n"
        for task in self.model.tasks:
            yield f"{task.name}: {task.form.describe()}\n"
            for phrasing in task.phrasings[:1]:
                yield f"  asked as: {phrasing.before}…{phrasing.after}\n"

    def _task(self, name: str, text: str) -> Iterator[str]:
        task = self.model.task_named(name)
        if not text.strip():
            raise RefusedError(400, f"Say what text: /task {name} TEXT")
        ask = self.model.ask_text(text, task)
        done = self.server.submit(ask, None, self.model, key="")[0].wait()
        if isinstance(done, Failed):
            raise RefusedError(500, done.reason, kind="server_error")
        reply = reply_of(done.generation, self.model.opened.renderer, ask.tools, held=ask.constraint is not None)
        line = self.server.read_answer(self.model, ask, reply)
        for note in ask.notes:
            yield f"note: {note}\n"
        if not line["valid"]:
            yield f"No answer in the form: {line['reason']}\n"
            return
        yield f"{json.dumps(line['answer'], ensure_ascii=False, indent=2)}\n"
        for one in line["value_confidence"]:
            yield f"  {one['confidence']:.2f}  {one['path'] or 'answer'} = {one['value']}\n"
        yield f"  {line['confidence']:.2f}  the whole\n"

    def _set(self, key: str, value: str) -> str:
        if key not in _SETTINGS:
            return f"There is no setting {key!r}. There are: {', '.join(_SETTINGS)}.\n"
        if value.strip() == "-":
            self.settings.pop(key, None)
            return f"{key} is as the model was scored again.\n"
        try:
            self.settings[key] = _SETTINGS[key](value)
        except ValueError:
            return f"{value!r} is no number.\n"
        return f"{key} is {self.settings[key]} now.\n"

    def _save(self, path: str) -> str:
        if not path or not self.turns:
            return "There is nothing to save yet.\n" if path else "Say where: /save FILE\n"
        system = [{"role": "system", "content": self.system}] if self.system else []
        row = json.dumps({"messages": [*system, *self.turns]}, ensure_ascii=False)
        old = Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""
        write_text(Path(path), f"{old}{row}\n")
        return f"Added to {path}.\n"


def _ending(done: Done, ask: Ask) -> str:
    if done.finish == "refused":
        return f" [no answer: {done.generation.reason}]"
    return f" [cut at {ask.limit} tokens]" if done.finish == "length" else ""
