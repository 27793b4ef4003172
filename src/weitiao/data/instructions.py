r"""Rows that ask once and answer once → `Record`: one function per format, named by both ends.

    context_target        {"context": "Instruction: …\nInput: question\n\ntext\nAnswer: ", "target": "…"}
    alpaca                {"instruction", "input", "output", "system"?, "history"?: [[question, answer], …]}
    prompt_response       {"prompt", "response", "history"?}                          ChatGLM-6B, ChatGLM2
    content_summary       {"content", "summary"}                                      AdvertiseGen
    text_category_output  {"text", "category", "output"}                              a text and its possible classes
    question_answer       {"question", "answer"}

The source's `prompt` template takes the place of the format's own way to ask. Nothing here knows files or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weitiao.data.options import ReadOptions
from weitiao.data.prompts import fill_template, split_prompt
from weitiao.data.record import (
    Parts,
    Record,
    RowFindings,
    Target,
    build_record,
    kind_of,
    read_target,
    read_task,
    read_text,
    shown,
)
from weitiao.errors import Problem
from weitiao.messages import Message

Row = Mapping[str, Any]


# --- {"context", "target"} -------------------------------------------------------------------------------------------


def context_target_to_record(
    row: Row, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of a ``{"context", "target"[, "task"]}`` row, or all its problems.

    The context becomes one user message, verbatim. A context that does not follow `split_context`'s grammar is
    accepted whole, with `text_span` None.
    """
    findings = RowFindings(source)
    context = read_text(row, "context", "context", findings)
    target = read_target(row, "target", "target", findings, require_target=require_target)
    task = read_task(row, findings)
    messages: tuple[Message, ...] = ()
    if options.system is not None:
        messages = (Message(role="system", text=options.system),)
    if options.prompt is not None:
        context, parts = fill_template(
            options.prompt, row, main="context", instruction=options.system or "", findings=findings
        )
    else:
        parts = split_context(context)
    if findings.problems:
        return findings.problems
    return build_record((*messages, Message(role="user", text=context)), parts, target, task, row, source)


def split_context(context: str) -> Parts:
    r"""The parts of ``Instruction: …\nInput: question\n\ntext\nAnswer: ``.

    The Input line is optional (the instruction then says everything, `text` is "" and nothing may be shortened).
    The first ``\nInput:`` and the last ``\nAnswer:`` count, so the text may hold either, and blank lines too.

        "Instruction: I\nInput: Q1\nQ2\n\nT1\n\nT2\nAnswer: "   → instruction "I", question "Q1\nQ2", text "T1\n\nT2"
        "Instruction: I\nInput: T\nAnswer: "                    → instruction "I", question "",       text "T"
        "Instruction: I\nAnswer: "                              → instruction "I", question "",       text ""
        "Tell me a story"                                       → instruction "",  question "",       text is all of it
    """
    opening, input_line, cue = "Instruction:", "\nInput:", "\nAnswer:"
    end = context.rfind(cue)
    if not context.startswith(opening) or end < 0 or context[end + len(cue) :].strip():
        return Parts(instruction="", question="", text=context, text_span=None)
    if context[end - 1] == "\r":  # a context written with Windows line ends
        end -= 1
    input_at = context.find(input_line, 0, end)
    if input_at < 0:
        return Parts(instruction=context[len(opening) : end].strip(), question="", text="", text_span=None)
    start = input_at + len(input_line)
    if context.startswith(" ", start, end):
        start += 1
    return split_prompt(context, start, end, instruction=context[len(opening) : input_at].strip())


# --- One question with what stands before it -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How a format asks when the source's recipe says nothing."""

    main: str
    """The field that is the text proper: what may be shortened and what values are copied from."""
    template: str | None = None
    """The prompt; None: `main` as it stands."""


def answer_record(
    row: Row,
    source: str,
    options: ReadOptions,
    *,
    asking: Asking,
    fields: Row,
    target: Target | None,
    findings: RowFindings,
    own_system: str = "",
    history: tuple[Message, ...] = (),
) -> Record | list[Problem]:
    """The record of one question made of `fields`, once `target` is read; or all of the row's problems."""
    task = read_task(row, findings)
    system = own_system or options.system or ""
    template = options.prompt or asking.template
    if template is not None:
        prompt, parts = fill_template(template, fields, main=asking.main, instruction=system, findings=findings)
    else:
        prompt = read_text(fields, asking.main, asking.main, findings)
        parts = split_prompt(prompt, 0, len(prompt), instruction=system)
    if findings.problems:
        return findings.problems
    before = (Message(role="system", text=system),) if system else ()
    return build_record((*before, *history, Message(role="user", text=prompt)), parts, target, task, row, source)


def alpaca_to_record(row: Row, source: str, options: ReadOptions, *, require_target: bool) -> Record | list[Problem]:
    r"""The record of an ``{"instruction", "input", "output"[, "system"][, "history"]}`` row, or all its problems.

    With an input the prompt is ``instruction\ninput``: the instruction is the question, the input the text.
    """
    findings = RowFindings(source)
    target = read_target(row, "output", "output", findings, require_target=require_target)
    given = read_optional(row, "input", findings)
    if options.prompt is None or row.get("instruction") is None:
        read_text(row, "instruction", "instruction", findings)
    asking = Asking(main="input", template="{instruction}\n{input}") if given else Asking(main="instruction")
    return answer_record(
        row,
        source,
        options,
        asking=asking,
        fields={"input": "", **row},
        target=target,
        findings=findings,
        own_system=read_optional(row, "system", findings),
        history=read_history(row, findings),
    )


def prompt_response_to_record(
    row: Row, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of a ``{"prompt", "response"[, "history"]}`` row, or all its problems."""
    findings = RowFindings(source)
    target = read_target(row, "response", "response", findings, require_target=require_target)
    return answer_record(
        row,
        source,
        options,
        asking=Asking(main="prompt"),
        fields=row,
        target=target,
        findings=findings,
        own_system=read_optional(row, "system", findings),
        history=read_history(row, findings),
    )


def content_summary_to_record(
    row: Row, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of a ``{"content", "summary"}`` row: the content is the whole prompt."""
    return _pair_to_record(row, ("content", "summary"), source, options, require_target=require_target)


def question_answer_to_record(
    row: Row, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of a ``{"question", "answer"}`` row: the question is the whole prompt."""
    return _pair_to_record(row, ("question", "answer"), source, options, require_target=require_target)


def _pair_to_record(
    row: Row, keys: tuple[str, str], source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    findings = RowFindings(source)
    target = read_target(row, keys[1], keys[1], findings, require_target=require_target)
    return answer_record(
        row, source, options, asking=Asking(main=keys[0]), fields=row, target=target, findings=findings
    )


TEXT_CATEGORY = "判断下面的文本属于哪一类，只回答类名。\n可选的类别：{category}\n\n{text}"
"""How a text with its possible classes is asked when the recipe gives no prompt."""


def text_category_output_to_record(
    row: Row, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of a ``{"text", "category", "output"}`` row: which of the classes in `category` the text has."""
    findings = RowFindings(source)
    target = read_target(row, "output", "output", findings, require_target=require_target)
    read_text(row, "text", "text", findings)
    if options.prompt is None or "{category}" in options.prompt:
        _check_category(row.get("category"), findings)
    return answer_record(
        row,
        source,
        options,
        asking=Asking(main="text", template=TEXT_CATEGORY),
        fields=row,
        target=target,
        findings=findings,
    )


def _check_category(category: object, findings: RowFindings) -> None:
    if category in (None, "", []):
        findings.add(
            "category", "is missing or empty.", "List the classes to choose from, or give a prompt without it."
        )
        return
    names = category if isinstance(category, list) else [category]
    if not all(isinstance(name, str) and name.strip() for name in names):
        findings.add("category", f"is {shown(category)}, not the classes' names.", "Write a text or a list of texts.")


# --- Fields that may be absent ---------------------------------------------------------------------------------------


def read_optional(row: Row, key: str, findings: RowFindings) -> str:
    """The text under `key`; "" when it is absent, null or blank."""
    value = row.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return read_text(row, key, key, findings)


def read_history(row: Row, findings: RowFindings) -> tuple[Message, ...]:
    """The earlier turns of ``"history": [[question, answer], …]``; none when it is absent, null, "" or []."""
    history = row.get("history")
    if history in (None, "", []):
        return ()
    fix = "Write pairs of texts: [[question, answer], …]."
    if not isinstance(history, list):
        findings.add("history", f"is {kind_of(history)}, not a list of pairs.", fix)
        return ()
    messages: list[Message] = []
    for index, pair in enumerate(history):
        place = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            seen = f"has {len(pair)} entries" if isinstance(pair, list) else f"is {kind_of(pair)}"
            findings.add(place, f"{seen}, not a question and its answer.", fix)
            continue
        for number, text in enumerate(pair):
            if not isinstance(text, str) or not text.strip():
                seen = "is empty" if isinstance(text, str) else f"is {kind_of(text)}, not text"
                findings.add(f"{place}[{number}]", f"{seen}.", fix)
                continue
            messages.append(Message(role="assistant" if number else "user", text=text))
    return tuple(messages)
