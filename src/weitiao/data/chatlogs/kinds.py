"""What an export calls a message → its kind and its words.

type numbers of the database     (49, 57)            → quote
type names of later tables       引用消息             → quote
what stands for it in a text     【语音】我到了        → voice, "我到了"
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping

from .messages import MessageKind

_BY_TYPE: Mapping[int, MessageKind] = {
    1: "text",
    3: "image",
    34: "voice",
    42: "card",
    43: "video",
    47: "sticker",
    48: "location",
    49: "unknown",
    50: "call",
    66: "card",
    10000: "system",
    10002: "system",
}
_BY_SUBTYPE_OF_49: Mapping[int, MessageKind] = {
    1: "text",
    3: "music",
    4: "link",
    5: "link",
    6: "file",
    8: "sticker",
    17: "system",
    19: "forwarded",
    24: "note",
    33: "mini_program",
    36: "mini_program",
    40: "note",
    51: "link",
    57: "quote",
    62: "pat",
    63: "link",
    68: "link",
    74: "file",
    76: "music",
    87: "system",
    88: "link",
    92: "music",
    2000: "transfer",
    2001: "red_packet",
    2003: "red_packet",
}
_BY_NAME: Mapping[str, MessageKind] = {
    "文本": "text",
    "图片": "image",
    "视频": "video",
    "语音": "voice",
    "表情包": "sticker",
    "动画表情": "sticker",
    "音视频通话": "call",
    "文件": "file",
    "位置分享": "location",
    "位置": "location",
    "分享链接": "link",
    "链接": "link",
    "红包": "red_packet",
    "转账": "transfer",
    "引用消息": "quote",
    "引用": "quote",
    "合并转发的聊天记录": "forwarded",
    "小程序": "mini_program",
    "视频号": "link",
    "音乐分享": "music",
    "音乐": "music",
    "收藏笔记": "note",
    "个人/公众号名片": "card",
    "企业微信名片": "card",
    "名片": "card",
    "系统消息": "system",
    "拍一拍": "pat",
    "未知类型": "unknown",
}
_LABELS: Mapping[str, MessageKind] = {
    **{name: kind for name, kind in _BY_NAME.items() if kind not in ("text", "quote", "system", "unknown")},
    "笔记": "note",
    "发起转账": "transfer",
    "已收款": "transfer",
    "已退还": "transfer",
    "非实时转账收款": "transfer",
    "发起非实时转账": "transfer",
}

_OLD_LABEL = re.compile(r"\[(图片|语音|视频|表情包|文件|音乐分享)\]")
_OLD_CARD = re.compile(r"\s*\[链接\]:title:")
_NEW_LABEL = re.compile(rf"【({'|'.join(map(re.escape, _LABELS))})】[:：]?[ ]?")
_QUOTED = re.compile(r"\n引用[:：].*", re.DOTALL)
_TITLE = re.compile(r"<title>(?:<!\[CDATA\[)?(.*?)(?:\]\]>)?</title>", re.DOTALL)


def read_numbered(kind: int, subtype: int, content: str) -> tuple[MessageKind, str]:
    """Kind and words of a message by the numbers of the database; `content` may be the XML of an application message.

    (1, 0, "在吗")                                       → ("text", "在吗")
    (49, 57, "<msg><title>好的</title>…</msg>")          → ("quote", "好的")
    (10000, 0, "你撤回了一条消息")                         → ("recall", "")
    """
    if kind == 49:
        found = _BY_SUBTYPE_OF_49.get(subtype, "unknown")
        if content.lstrip().startswith(("<?xml", "<msg")):
            title = _TITLE.search(content)
            content = html.unescape(title[1]).strip() if title else ""
    elif kind == 10000 and subtype == 4:
        found = "pat"
    else:
        found = _BY_TYPE.get(kind, "unknown")
    return _with_words(found, content)


def read_named(name: str, content: str) -> tuple[MessageKind, str] | None:
    """Kind and words of a message by the name of its type, as later tables write it; None for an unknown name."""
    found = _BY_NAME.get(name.strip())
    return None if found is None else _with_words(found, content)


def read_labelled(content: str) -> tuple[MessageKind, str]:
    """Kind and words of a message by what stands in its place in a text.

    "[图片]"                → ("image", "")
    "【语音】我到了"         → ("voice", "我到了")
    "好的\\n引用:小红:在吗"   → ("quote", "好的")
    "晚上吃什么"            → ("text", "晚上吃什么")
    """
    old = _OLD_LABEL.fullmatch(content)
    if old:
        return _LABELS[old[1]], ""
    if _OLD_CARD.match(content):
        return "link", ""
    new = _NEW_LABEL.match(content)
    if new:
        return _with_words(_LABELS[new[1]], content)
    return _with_words("quote" if _QUOTED.search(content) else "text", content)


def _with_words(kind: MessageKind, content: str) -> tuple[MessageKind, str]:
    """The kind, and what the sender said in words: nothing for what was shown rather than said."""
    if kind == "quote":
        return kind, _QUOTED.sub("", content)
    if kind == "voice":
        label = _NEW_LABEL.match(content)
        return kind, content[label.end() :].strip() if label else ""
    if kind == "system" and ("撤回" in content or "revokemsg" in content):
        return "recall", ""
    return kind, content if kind == "text" else ""
