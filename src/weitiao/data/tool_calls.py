"""Tools and tool calls as others write them → plain schemas and `ToolCall`s.

    OpenAI, Zhipu   tools [{"type": "function", "function": {…}}], calls {"function": {"name", "arguments": "{…}"}}
    sharegpt        tools as JSON in a text, calls {"name", "arguments"} as JSON in a text, one or a list
    ChatGLM3        calls as Python: tool_call(city="北京"), read as literals and never run

Every function adds a finding for what it cannot read. Knows neither turns nor formats.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from weitiao.data.json_values import parse_inner
from weitiao.data.record import RowFindings, kind_of, shown
from weitiao.messages import ToolCall

_CODE = re.compile(r"\A\s*```(?:python)?[ \t]*\r?\n(?P<code>.*?)\s*```\s*\Z", re.DOTALL)


def read_tools(value: object, place: str, findings: RowFindings) -> tuple[Mapping[str, Any], ...]:
    """The tools on offer under `place`: a list, one tool, or either as JSON in a text; none for null, "" and []."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    if isinstance(value, str):
        try:
            value = parse_inner(value)
        except ValueError as error:
            findings.add(place, f"is a text, but not JSON: {error}.", "Write a list of tools, or that list as JSON.")
            return ()
    entries = value if isinstance(value, list) else [value]
    tools = [_read_tool(entry, f"{place}[{index}]", findings) for index, entry in enumerate(entries)]
    return tuple(tool for tool in tools if tool is not None)


def _read_tool(entry: object, place: str, findings: RowFindings) -> Mapping[str, Any] | None:
    fix = 'Write {"name": …, "description": …, "parameters": {…}}.'
    if isinstance(entry, dict) and isinstance(entry.get("function"), dict):
        entry, place = entry["function"], f"{place}.function"
    if not isinstance(entry, dict):
        findings.add(place, f"is {kind_of(entry)}, not a tool.", fix)
    elif not isinstance(entry.get("name"), str) or not entry["name"].strip():
        kind = entry.get("type")
        seen = f"is a tool of type {shown(kind)}" if kind not in (None, "function") else "has no name"
        findings.add(place, f"{seen}; only functions with a name are understood.", fix)
    elif not isinstance(entry.get("parameters"), dict | None):
        seen = kind_of(entry["parameters"])
        findings.add(f"{place}.parameters", f"is {seen}, not a JSON Schema.", 'Write {"type": "object", …}.')
    elif not isinstance(entry.get("description"), str | None):
        findings.add(f"{place}.description", f"is {kind_of(entry['description'])}, not text.", "Write it as a string.")
    else:
        return entry
    return None


def read_calls(value: object, place: str, findings: RowFindings) -> tuple[ToolCall, ...]:
    """The calls under `place`: one object or a list of them, each with its name and arguments."""
    entries = value if isinstance(value, list) else [value]
    if not entries:
        findings.add(place, "is an empty list, not a tool call.", 'Write {"name": …, "arguments": {…}}.')
    calls = []
    for index, entry in enumerate(entries):
        call = _read_call(entry, f"{place}[{index}]" if isinstance(value, list) else place, findings)
        calls += [call] if call is not None else []
    return tuple(calls)


def _read_call(entry: object, place: str, findings: RowFindings) -> ToolCall | None:
    if isinstance(entry, dict) and isinstance(entry.get("function"), dict):
        entry, place = entry["function"], f"{place}.function"
    if not isinstance(entry, dict):
        findings.add(place, f"is {kind_of(entry)}, not a tool call.", 'Write {"name": …, "arguments": {…}}.')
        return None
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        findings.add(f"{place}.name", "is missing or no text.", "Name the tool that is called.")
        return None
    key = "parameters" if "arguments" not in entry and "parameters" in entry else "arguments"
    arguments = read_arguments(entry.get(key), f"{place}.{key}", findings)
    return ToolCall(name=name, arguments=arguments) if arguments is not None else None


def read_arguments(value: object, place: str, findings: RowFindings) -> dict[str, Any] | None:
    """The arguments by name: an object, or one as JSON in a text; none of them for null and ""."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        try:
            value = parse_inner(value)
        except ValueError as error:
            findings.add(place, f"is {shown(value)}, which is not JSON: {error}.", "Write the arguments as an object.")
            return None
    if not isinstance(value, dict):
        findings.add(place, f"is {kind_of(value)}, not arguments by name.", 'Write an object such as {"city": "北京"}.')
        return None
    return value


def read_calls_in_text(text: str, place: str, findings: RowFindings) -> tuple[ToolCall, ...]:
    """The calls that a text is, as JSON: one object with a name and arguments, or a list of them."""
    try:
        value = parse_inner(text)
    except ValueError as error:
        findings.add(place, f"is {shown(text)}, not a tool call: {error}.", 'Write {"name": …, "arguments": {…}}.')
        return ()
    return read_calls(value, place, findings)


def looks_like_calls(text: str) -> bool:
    """Whether a text is JSON with the name and arguments of a call, as GLM-4's rows write one in a reply's content."""
    if '"arguments"' not in text or not text.lstrip().startswith(("{", "[")):
        return False
    try:
        value = parse_inner(text)
    except ValueError:
        return False
    entries = value if isinstance(value, list) else [value]
    return bool(entries) and all(isinstance(entry, dict) and {"name", "arguments"} <= entry.keys() for entry in entries)


def read_chatglm3_call(name: str, content: str, place: str, findings: RowFindings) -> tuple[ToolCall, ...]:
    r"""The call of a ChatGLM3 reply whose metadata names the tool.

    "```python\ntool_call(city='北京')\n```"     → arguments {"city": "北京"}
    '{"city": "北京"}'                           → the same, as GLM-4 writes it
    interpreter and "```python\nprint(1)\n```"  → arguments {"code": "print(1)"}
    """
    fenced = _CODE.match(content)
    code = fenced["code"] if fenced else content.strip()
    if name == "interpreter":
        return (ToolCall(name=name, arguments={"code": code}),)
    if code.startswith("{"):
        arguments = read_arguments(code, place, findings)
        return () if arguments is None else (ToolCall(name=name, arguments=arguments),)
    try:
        return (ToolCall(name=name, arguments=_literal_arguments(code)),)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        findings.add(
            place,
            f"calls {shown(name)} with {shown(code)}, which cannot be read: {reason}.",
            'Write tool_call(city="北京"): arguments by name, each a literal.',
        )
        return ()


def _literal_arguments(code: str) -> dict[str, Any]:
    """The keyword arguments of one call of ``tool_call``, each a literal that JSON can say too."""
    with warnings.catch_warnings():  # a doubtful backslash in someone's data is no matter for our user's terminal
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        call = ast.parse(code, mode="eval").body
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tool_call"):
        raise ValueError("it is no call of tool_call")
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError("it has arguments without a name")
    arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    value = parse_inner(json.dumps(arguments, allow_nan=False))
    assert isinstance(value, dict)
    return value
