"""Rows that are whole conversations → `Record`: one function per format, named by both ends.

    messages        {"messages": [{"role": "user", "content": "…"}, …], "tools": […]}          OpenAI, Zhipu
    conversations   {"conversations": [{"role", "content", "loss"?, "metadata"?}, …], "tools"}  ChatGLM3
    sharegpt        {"conversations": [{"from": "human", "value": "…"}, …], "system", "tools"}
    turn_pairs      {"conversation": [{"system", "input", "output"}, …]}                        EmoLLM
    client_dialogue {"dialogue": [{"role": "client", "content"}, {"role": "counselor", …}]}

How a conversation becomes a record, and which reply is its target, is decided in turns.py for all of them alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from weitiao.data.options import ReadOptions
from weitiao.data.record import Record, RowFindings, did_you_mean, kind_of, nearest, read_text, shown
from weitiao.data.tool_calls import read_arguments, read_calls, read_calls_in_text, read_chatglm3_call
from weitiao.data.turns import Turn, Turns, read_plain, turns_to_record
from weitiao.errors import Problem
from weitiao.messages import Role, ToolCall

Row = Mapping[str, Any]

_Who = TypeVar("_Who", bound=str)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Naming(Generic[_Who]):
    """How a format says who speaks."""

    key: str
    known: Mapping[str, _Who]
    elsewhere: Mapping[str, str]
    """What other formats write, and what it is here."""
    user: str
    usual: str
    example: str


_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
_ROLES_ELSEWHERE = {
    "human": "user",
    "client": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "counselor": "assistant",
    "developer": "system",
}
_BY_ROLE = _Naming(
    key="role",
    known=_ROLES,
    elsewhere=_ROLES_ELSEWHERE,
    user="user, for one",
    usual="system, user, assistant or tool",
    example='{"role": "user", "content": "…"}',
)


def messages_to_record(row: Row, source: str, options: ReadOptions, *, require_target: bool) -> Record | list[Problem]:
    """The record of a ``{"messages": [{"role", "content"}, …][, "tools"][, "task"]}`` row, or all its problems.

    The last reply's content may be text, or a list or an object where the answer is one. Other keys of the row
    (``label``, ``record_id``) stay in `raw` only.
    """
    return _roles_to_record(row, "messages", source, options, require_target=require_target)


def conversations_to_record(
    row: Row, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of a ChatGLM3 ``{"conversations": [{"role", "content"}, …][, "tools"]}`` row, or all its problems.

    ``loss: false`` on a reply keeps it from being learnt. A ``tool`` turn with name, parameters and observation is a
    call and its result.
    """
    return _roles_to_record(row, "conversations", source, options, require_target=require_target)


def _roles_to_record(
    row: Row, key: str, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    conversation = Turns.start(row, key, source)
    findings = conversation.findings
    entries = _read_entries(row, key, '{"role": …, "content": …}', findings)
    conversation.offer_tools(row.get("tools"), "tools")
    known_ids: set[str] = set()
    for index, entry in enumerate(entries):
        place = f"{key}[{index}]"
        role = _read_who(entry, place, findings, _BY_ROLE)
        if not isinstance(entry, dict):
            continue
        if role == "assistant" or role is None:  # a role that cannot be read is reported; the rest is still looked at
            may_lack_text = index == len(entries) - 1 and index > 0 and not require_target
            _add_reply(conversation, entry, place, may_lack_text=may_lack_text)
            known_ids |= _call_ids(entry)
        elif role == "tool":
            _add_tool_turn(conversation, entry, place, known_ids)
        else:
            _add_question_or_system(conversation, entry, place, role)
    return turns_to_record(conversation, row, source, options, require_target=require_target)


def _read_entries(row: Row, key: str, shape: str, findings: RowFindings) -> list[Any]:
    entries = row.get(key)
    if isinstance(entries, list) and entries:
        return entries
    seen = "an empty list" if isinstance(entries, list) else kind_of(entries)
    findings.add(key, f"is {seen}, not a conversation.", f"Write a list of {shape}.")
    return []


def _read_who(entry: object, place: str, findings: RowFindings, naming: _Naming[_Who]) -> _Who | None:
    """Who speaks in `entry`; None after a finding when that cannot be told."""
    if not isinstance(entry, dict):
        findings.add(place, f"is {kind_of(entry)}, not an object.", f"Write {naming.example}.")
        return None
    key, said = naming.key, entry.get(naming.key)
    if isinstance(said, str) and said in naming.known:
        return naming.known[said]
    if key not in entry:
        findings.add(f"{place}.{key}", "is missing.", did_you_mean(key, entry) or f"Add who speaks: {naming.user}.")
    else:
        near = naming.elsewhere.get(str(said).lower()) or nearest(str(said), naming.known)
        fix = f"Did you mean `{near}`?" if near else f"Write {naming.usual}."
        findings.add(f"{place}.{key}", f"is {shown(said)}, not {naming.usual}.", fix)
    return None


def _add_question_or_system(conversation: Turns, entry: Row, place: str, role: Role) -> None:
    findings = conversation.findings
    for key in ("loss", "weight"):
        if entry.get(key):
            fix = f'Remove "{key}" here, or set it to false.'
            findings.add(f"{place}.{key}", f"is set on the {role}'s turn, but only replies can be learnt.", fix)
    if role == "system" and entry.get("tools") is not None:
        conversation.offer_tools(entry["tools"], f"{place}.tools")
        if _is_absent(entry.get("content")):  # the message only brings the tools
            return
    conversation.add(Turn(place=place, role=role, text=_read_content(entry, place, findings)))


def _read_content(entry: Row, place: str, findings: RowFindings) -> str:
    """The text of a turn; a list of ``{"type": "text", "text"}`` parts is its texts, one after the other."""
    content = entry.get("content")
    if _is_parts(content):
        return "".join(part["text"] for part in content or ())
    return read_text(entry, "content", f"{place}.content", findings)


def _is_absent(value: object) -> bool:
    """Whether a text that a turn may lack is not there: null, or blank."""
    return value is None or (isinstance(value, str) and not value.strip())


def _is_parts(content: object) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(part, dict) and part.keys() == {"type", "text"} for part in content)
        and all(part["type"] == "text" and isinstance(part["text"], str) for part in content)
        and any(part["text"].strip() for part in content)
    )


# --- Replies and tools -----------------------------------------------------------------------------------------------


def _add_reply(conversation: Turns, entry: Row, place: str, *, may_lack_text: bool) -> None:
    """Add an assistant's turn: text, a value, calls, or text before calls."""
    findings = conversation.findings
    if entry.get("reasoning_content"):
        fix = 'Remove "reasoning_content", or set it to null.'
        findings.add(f"{place}.reasoning_content", "cannot be learnt from yet.", fix)
    learn = _read_learn(entry, place, findings)
    content, metadata = entry.get("content"), entry.get("metadata")
    if not _is_absent(metadata):
        name = read_text(entry, "metadata", f"{place}.metadata", findings).strip()
        code = read_text(entry, "content", f"{place}.content", findings)
        calls = read_chatglm3_call(name, code, f"{place}.content", findings) if name and code else ()
        conversation.add_calls(calls, place=place, learn=learn)
        return
    calls = _read_openai_calls(entry, place, findings)
    turn = Turn(place=place, role="assistant", text="", calls=calls, learn=learn is not False)
    if _is_absent(content):
        if may_lack_text and not calls:
            return  # a place kept free for the answer
        turn.text = "" if calls else read_text(entry, "content", f"{place}.content", findings)
    elif isinstance(content, list | dict) and not _is_parts(content):
        turn.answer = content
        if calls:
            fix = "Write what is said before the calls as a string."
            findings.add(f"{place}.content", f"is {kind_of(content)}, not text.", fix)
    else:
        turn.text = _read_content(entry, place, findings)
    conversation.add(turn)


def _read_learn(entry: Row, place: str, findings: RowFindings) -> bool | None:
    """The turn's own flag, ``loss`` (ChatGLM3) or ``weight`` (OpenAI): true or false, 1 or 0; None when it has none."""
    flags: dict[str, bool] = {}
    for key in ("loss", "weight"):
        value = entry.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
            flags[key] = bool(value)
        else:
            message = f"is {shown(value)}, not true or false."
            findings.add(f"{place}.{key}", message, "Write true where the reply is to be learnt, else false.")
    if len(set(flags.values())) > 1:
        findings.add(f"{place}.weight", "says the opposite of loss.", "Keep one of the two.")
    return next(iter(flags.values()), None)


def _read_openai_calls(entry: Row, place: str, findings: RowFindings) -> tuple[ToolCall, ...]:
    calls: tuple[ToolCall, ...] = ()
    if entry.get("tool_calls") not in (None, []):
        calls = read_calls(entry["tool_calls"], f"{place}.tool_calls", findings)
    if entry.get("function_call") is not None:
        calls += read_calls(entry["function_call"], f"{place}.function_call", findings)
    return calls


def _call_ids(entry: Row) -> set[str]:
    calls = entry.get("tool_calls")
    found = [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return {call_id for call_id in found if isinstance(call_id, str)}


def _add_tool_turn(conversation: Turns, entry: Row, place: str, known_ids: set[str]) -> None:
    """Add a tool's result; ChatGLM3's ``{"role": "tool", "name", "parameters", "observation"}`` is its call as well."""
    findings = conversation.findings
    call_id = entry.get("tool_call_id")
    if known_ids and isinstance(call_id, str) and call_id not in known_ids:
        findings.add(
            f"{place}.tool_call_id", f"is {shown(call_id)}, which no call before has.", "Write that call's id."
        )
    if "parameters" not in entry:
        if _read_learn(entry, place, findings):
            findings.add(
                f"{place}.loss", "is set on a tool's result, but only replies can be learnt.", "Set it to false."
            )
        key = "observation" if "observation" in entry and "content" not in entry else "content"
        if key not in entry:
            findings.add(f"{place}.content", "is missing.", "Add what the tool gave back; an empty text where nothing.")
        text = "".join(p["text"] for p in entry[key]) if _is_parts(entry.get(key)) else None
        text = text if text is not None else read_plain(entry.get(key), f"{place}.{key}", findings)
        conversation.add(Turn(place=place, role="tool", text=text))
        return
    name = entry.get("name")
    arguments = read_arguments(entry["parameters"], f"{place}.parameters", findings)
    if not isinstance(name, str) or not name.strip():
        findings.add(f"{place}.name", "is missing or no text.", "Name the tool that is called.")
    elif arguments is not None:
        learn = _read_learn(entry, place, findings)
        conversation.add_calls((ToolCall(name=name, arguments=arguments),), place=place, learn=learn)
        if "observation" in entry:
            text = read_plain(entry["observation"], f"{place}.observation", findings)
            conversation.add(Turn(place=place, role="tool", text=text))


# --- {"conversations": [{"from", "value"}, …]} -----------------------------------------------------------------------

_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "calls",
    "tool_call": "calls",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_BY_SPEAKER = _Naming(
    key="from",
    known=_SPEAKERS,
    elsewhere={},
    user="human, for one",
    usual="system, human, gpt, function_call or observation",
    example='{"from": "human", "value": "…"}',
)


def sharegpt_to_record(row: Row, source: str, options: ReadOptions, *, require_target: bool) -> Record | list[Problem]:
    """The record of a ``{"conversations": [{"from", "value"}, …][, "system"][, "tools"]}`` row, or all its problems.

    ``human`` and ``gpt`` speak; ``function_call`` holds calls as JSON, ``observation`` what a tool gave back.
    """
    conversation = Turns.start(row, "conversations", source)
    findings = conversation.findings
    conversation.offer_tools(row.get("tools"), "tools")
    entries = _read_entries(row, "conversations", '{"from": …, "value": …}', findings)
    if not _is_absent(row.get("system")):
        conversation.add(Turn(place="system", role="system", text=read_text(row, "system", "system", findings)))
    for index, entry in enumerate(entries):
        place = f"conversations[{index}]"
        speaker = _read_who(entry, place, findings, _BY_SPEAKER)
        if not isinstance(entry, dict):
            continue
        value = entry.get("value")
        if speaker == "calls" and isinstance(value, list | dict):
            conversation.add_calls(read_calls(value, f"{place}.value", findings), place=place, learn=None)
        elif speaker == "calls":
            text = read_text(entry, "value", f"{place}.value", findings)
            calls = read_calls_in_text(text, f"{place}.value", findings) if text else ()
            conversation.add_calls(calls, place=place, learn=None)
        elif speaker == "tool":
            if "value" not in entry:
                fix = "Add what the tool gave back; an empty text where nothing."
                findings.add(f"{place}.value", "is missing.", did_you_mean("value", entry) or fix)
            conversation.add(Turn(place=place, role="tool", text=read_plain(value, f"{place}.value", findings)))
        elif speaker == "assistant" and isinstance(value, list | dict):
            conversation.add(Turn(place=place, role="assistant", text="", answer=value))
        else:
            learn = _read_learn(entry, place, findings) is not False
            text = read_text(entry, "value", f"{place}.value", findings)
            role: Role = "user" if speaker == "user" else "system" if speaker == "system" else "assistant"
            conversation.add(Turn(place=place, role=role, text=text, learn=learn))
    return turns_to_record(conversation, row, source, options, require_target=require_target)


# --- {"conversation": [{"system", "input", "output"}, …]} ------------------------------------------------------------


def turn_pairs_to_record(
    row: Row, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of a ``{"conversation": [{"input", "output"[, "system"]}, …]}`` row, or all its problems.

    The system message stands in the first pair; a later pair may repeat it, not change it.
    """
    conversation = Turns.start(row, "conversation", source)
    findings = conversation.findings
    entries = _read_entries(row, "conversation", '{"input": …, "output": …}', findings)
    system = None
    for index, entry in enumerate(entries):
        place = f"conversation[{index}]"
        if not isinstance(entry, dict):
            findings.add(place, f"is {kind_of(entry)}, not an object.", 'Write {"input": "…", "output": "…"}.')
            continue
        if not _is_absent(entry.get("system")) and entry["system"] != system:
            if index == 0:
                system = read_text(entry, "system", f"{place}.system", findings)
                conversation.add(Turn(place=f"{place}.system", role="system", text=system))
            else:
                fix = "Keep one system message, in the first pair."
                findings.add(f"{place}.system", "is another system message than the first pair's.", fix)
        text = read_text(entry, "input", f"{place}.input", findings)
        conversation.add(Turn(place=f"{place}.input", role="user", text=text))
        output = entry.get("output")
        if isinstance(output, list | dict):
            conversation.add(Turn(place=f"{place}.output", role="assistant", text="", answer=output))
        elif output or require_target or index < len(entries) - 1:
            text = read_text(entry, "output", f"{place}.output", findings)
            conversation.add(Turn(place=f"{place}.output", role="assistant", text=text))
    return turns_to_record(conversation, row, source, options, require_target=require_target)


# --- {"dialogue": [{"role": "client", "content"}, …]} ----------------------------------------------------------------

_COUNSELLING: dict[str, Role] = {
    "system": "system",
    "client": "user",
    "user": "user",
    "seeker": "user",
    "counselor": "assistant",
    "counsellor": "assistant",
    "assistant": "assistant",
    "supporter": "assistant",
}


def client_dialogue_to_record(
    row: Row, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of a ``{"dialogue": [{"role": "client", "content"}, {"role": "counselor", …}, …]}`` row.

    A dialogue that ends with the client's words has them left out: no reply follows them.
    """
    conversation = Turns.start(row, "dialogue", source)
    findings = conversation.findings
    for index, entry in enumerate(_read_entries(row, "dialogue", '{"role": "client", "content": …}', findings)):
        place = f"dialogue[{index}]"
        if not isinstance(entry, dict):
            findings.add(place, f"is {kind_of(entry)}, not an object.", 'Write {"role": "client", "content": "…"}.')
            continue
        speaker = entry.get("role")
        role = _COUNSELLING.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            near = nearest(str(speaker), _COUNSELLING)
            fix = f"Did you mean `{near}`?" if near else "Write client or counselor."
            seen = f"is {shown(speaker)}, not client or counselor." if "role" in entry else "is missing."
            findings.add(f"{place}.role", seen, fix)
        text = read_text(entry, "content", f"{place}.content", findings)
        conversation.add(Turn(place=place, role=role or "assistant", text=text))
    return turns_to_record(conversation, row, source, options, require_target=require_target)
