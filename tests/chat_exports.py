"""Invented chats as every generation of export would write them, and what the tests of their import share."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from weitiao.data.chatlogs import ImportSettings, ImportSummary, import_chats

OLD = ["localId", "TalkerId", "Type", "SubType", "IsSender", "CreateTime", "Status", "StrContent", "StrTime"]
NAMES = ["Remark", "NickName", "Sender"]
LATER = ["消息ID", "类型", "发送人", "时间", "内容", "备注", "昵称", "更多信息"]
START = datetime(2023, 5, 1, 20)
PLAIN = ImportSettings(system="", held_out=0, redaction=None)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue()


def at(minutes: float) -> str:
    return str(START + timedelta(minutes=minutes))


def old_row(
    minutes: float,
    me: bool,
    text: str,
    *,
    type_: int = 1,
    sub: int = 0,
    talker: int = 7,
    names: Sequence[str] | None = ("", "", ""),
) -> list[object]:
    """A row of the first generation; `names` None for the oldest tables, which have no such columns."""
    time = START + timedelta(minutes=minutes)
    seconds = int(time.timestamp() - datetime(1970, 1, 1).timestamp()) - 8 * 3600
    row = [int(minutes * 10), talker, type_, sub, int(me), seconds, 2, text, str(time)]
    if names is None:
        return row
    return [
        *row,
        *(names if any(names) else (("小明", "小明", "wxid_me00000") if me else ("小红", "红红", "wxid_red0000"))),
    ]


def write(folder: Path, name: str, text: str, encoding: str = "utf-8-sig") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def rows_of(folder: Path, name: str = "train.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def turns_of(row: dict[str, Any]) -> list[str]:
    return [f"{message['role'][0]}:{message['content']}" for message in row["messages"]]


def convert(
    tmp_path: Path, files: dict[str, str], options: ImportSettings = PLAIN
) -> tuple[ImportSummary, list[list[str]]]:
    """The summary of an import of `files`, and the turns of its conversations to learn from."""
    for name, text in files.items():
        write(tmp_path / "in", name, text)
    summary = import_chats([tmp_path / "in"], tmp_path / "out", options, overwrite=True, salt="s")
    return summary, [turns_of(row) for row in rows_of(tmp_path / "out")]


DIALOGUE = [
    (0, False, "在吗"),
    (1, False, "周末去爬山吗"),
    (2, True, "去啊"),
    (3, False, "几点"),
    (4, True, "八点吧\n别迟到"),
]
TURNS = ["u:在吗\n周末去爬山吗", "a:去啊", "u:几点", "a:八点吧\n别迟到"]


def old_table(names: bool = True, *, talker: int = 7) -> str:
    rows = [old_row(m, me, text, talker=talker, names=("", "", "") if names else None) for m, me, text in DIALOGUE]
    return table([*OLD, *NAMES] if names else OLD, rows)


def later_table(me: str = "小明") -> str:
    rows = [
        [100 + index, "文本", me if mine else "小红", at(minutes), text, "备注", "昵称", "more"]
        for index, (minutes, mine, text) in enumerate(DIALOGUE)
    ]
    return table(LATER, rows)


def text_export(*, old: bool) -> str:
    entries = [f"{at(minutes)} {'小明' if me else '小红'}\n{text}" for minutes, me, text in DIALOGUE]
    if old:
        return "".join(entry + "\n\n" for entry in [*entries, f'{at(5)} "小红" 拍了拍我'])
    return "\n\n".join([*entries, f'{at(5)}\n"小红" 拍了拍我'])


def ai_text(*, old: bool) -> str:
    head = f"\n\n{'*' * 20}2023-05-01{'*' * 20}\n"
    body = ["\n小红:在吗", "周末去爬山吗", "\n小明:去啊", "\n小红:几点", "\n小明:八点吧\n别迟到"]
    return head + ("".join(piece + " " for piece in body) if old else "\n".join(body))


def samples(kind: str) -> str:
    turns = [
        {"role": "system", "content": "你是小明，一个聪明、热情、善良的人，后面的对话来自你的朋友，你要认真地回答他"},
        {"role": "user", "content": "在吗\n周末去爬山吗"},
        {"role": "assistant", "content": "去啊"},
        {"role": "user", "content": "几点"},
        {"role": "assistant", "content": "八点吧\n别迟到"},
    ]
    row: dict[str, Any] = {kind: turns}
    if kind == "alpaca":
        row = {
            "system": turns[0]["content"],
            "instruction": "几点",
            "input": "",
            "output": "八点吧\n别迟到",
            "history": [["在吗\n周末去爬山吗", "去啊"]],
        }
    return json.dumps([row], ensure_ascii=False, indent=4)


def chat(*entries: tuple[float, str]) -> str:
    """A table of (minutes, text); a text that begins with > is mine."""
    return table([*OLD, *NAMES], [old_row(m, text[0] == ">", text.lstrip(">")) for m, text in entries])


MIXED = table(
    [*OLD, *NAMES],
    [
        old_row(0, False, "<img/>", type_=3),
        old_row(1, False, "好看吗"),
        old_row(2, True, "<img/>", type_=3),
        old_row(3, True, "好看"),
        old_row(4, False, "撤回了一条消息", type_=10000),
        old_row(5, False, "", type_=47),
        old_row(6, False, "  "),
        old_row(7, True, "<msg><title>哈哈</title><refermsg/></msg>", type_=49, sub=57),
    ],
)
