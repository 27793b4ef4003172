r"""Tools in the words of ChatGLM3 and GLM-4: the offer in the system's turn, and the content of a call's turn.

    ChatGLM3   <|assistant|>get_weather\n ```python\ntool_call(city="北京")\n```
    GLM-4      <|assistant|>get_weather\n{"city": "北京"}

Calls are read as literals; nothing that a model wrote is ever run. ChatGLM3's code interpreter is a tool of the name
``interpreter`` whose one argument, ``code``, stands in the fence as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from ..data.record import RowFindings
from ..data.tool_calls import read_arguments, read_chatglm3_call
from ..messages import ToolCall
from .base import Tools

Dialect = Literal["chatglm3", "glm4"]

_INTERPRETER = "interpreter"
_OPEN, _CLOSE = "```python\n", "\n```"

# What the models were trained with, word for word: another wording is another prompt.
_CHATGLM3_OFFER = "Answer the following questions as best as you can. You have access to the following tools:"
_GLM4_OFFER = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
_GLM4_HOW = "在调用上述函数时，请使用 Json 格式表示调用的参数。"


def offer_tools(system: str, tools: Tools, dialect: Dialect) -> list[str]:
    """The texts of the system's turns that offer `tools`, where the conversation's own system message says `system`.

    ChatGLM3 has one: that message, or a sentence of its own where there is none, then the tools as JSON. GLM-4 has one
    for the tools, and another for the message where there is one.
    """
    if dialect == "chatglm3":
        written = json.dumps([dict(tool) for tool in tools], indent=4, ensure_ascii=False)
        return [f"{system or _CHATGLM3_OFFER}\n{written}"]
    described = [
        f"\n## {tool['name']}\n\n{json.dumps(dict(tool), indent=4, ensure_ascii=False)}\n{_GLM4_HOW}" for tool in tools
    ]
    return [_GLM4_OFFER + "".join(described), *([system] if system else [])]


def write_call(call: ToolCall, dialect: Dialect) -> str:
    """The content of the turn that calls; `read_call` reads it back equal.

    ChatGLM3's is Python where Python can name the arguments, else their JSON.
    """
    as_json = json.dumps(call.arguments, ensure_ascii=False)
    if dialect == "glm4":
        return as_json
    if call.name == _INTERPRETER:
        code = call.arguments.get("code")
        return f"{_OPEN}{code}{_CLOSE}" if isinstance(code, str) and len(call.arguments) == 1 else as_json
    said = ", ".join(f"{name}={_literal(value)}" for name, value in call.arguments.items())
    python = f"{_OPEN}tool_call({said}){_CLOSE}"
    read = read_call(call.name, python, dialect)  # an argument called `from` or `user-id` is no Python
    same = read is not None and json.dumps(read.arguments, ensure_ascii=False) == as_json
    return python if same else as_json


def _literal(value: Any) -> str:
    """A JSON value as Python; texts in double quotes, as in the models' own description of the format."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # every escape of JSON is one of Python
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)


def read_call(name: str, content: str, dialect: Dialect) -> ToolCall | None:
    """The call of a turn with this name and content; None where it cannot be read."""
    findings = RowFindings("reply")
    if dialect == "glm4":
        arguments = read_arguments(content, "content", findings)
        return None if arguments is None else ToolCall(name=name, arguments=arguments)
    if name == _INTERPRETER:
        if content.startswith(_OPEN) and content.endswith(_CLOSE) and len(content) >= len(_OPEN) + len(_CLOSE):
            return ToolCall(name=name, arguments={"code": content[len(_OPEN) : -len(_CLOSE)]})
        if content.startswith("{"):
            arguments = read_arguments(content, "content", findings)
            if arguments is not None:
                return ToolCall(name=name, arguments=arguments)
    calls = read_chatglm3_call(name, content, "content", findings)
    return calls[0] if calls else None
