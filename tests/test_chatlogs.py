"""Exported chats of every generation become conversations: read whole, counted, split by time, never read twice.

Every person, message and number here is invented.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from weitiao.cli import app
from weitiao.data.chatlogs import ImportSettings, ImportSummary, import_chats
from weitiao.data.chatlogs.folder import read_chats, recognise_export
from weitiao.data.chatlogs.kinds import read_labelled, read_named, read_numbered
from weitiao.data.chatlogs.settings import change_rules
from weitiao.data.chatlogs.splitting import split_chat
from weitiao.data.chatlogs.turns import Tally, build_conversations
from weitiao.data.records import read_records
from weitiao.errors import DataError

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


# --- Every generation of export --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "kind", "contact"),
    [
        ("小红_utf8.csv", old_table(), "table", "小红"),
        ("小红_utf8.csv", old_table(names=False), "table", "小红"),
        ("messages.csv", old_table(), "table", "小红"),
        ("小红.csv", later_table(), "later table", "小红"),
        ("我的导出.csv", later_table(me="我"), "later table", "小红"),
        ("小红.txt", text_export(old=True), "text", "小红"),
        ("小红.txt", text_export(old=False), "text", "小红"),
        ("小红.txt", text_export(old=False).replace("\n", "\r\n"), "text", "小红"),
        ("小红_chat.txt", ai_text(old=False), "AI text", "小红"),
        ("小红_train.json", samples("conversations"), "samples", "小红"),
        ("小红.json", samples("messages"), "samples", "小红"),
        ("小红(1).json", samples("alpaca"), "samples", "小红"),
    ],
)
def test_every_export_gives_the_same_conversation(
    tmp_path: Path, name: str, text: str, kind: str, contact: str
) -> None:
    assert recognise_export(text) == kind
    summary, conversations = convert(tmp_path, {name: text})
    assert conversations == [TURNS]
    assert [each.contact for each in summary.contacts] == [contact]
    assert [file["kind"] for file in summary.files] == [kind]
    (row,) = rows_of(tmp_path / "out")
    assert row["contact"] == contact
    timed = kind not in ("samples", "AI text")
    day = "2023-05-01T00:00:00+08:00" if kind == "AI text" else None
    assert (row["start"], row["end"]) == (
        ("2023-05-01T20:00:00+08:00", "2023-05-01T20:04:00+08:00") if timed else (day, day)
    )


def test_the_old_ai_text_parts_messages_by_blanks(tmp_path: Path) -> None:
    _, conversations = convert(tmp_path, {"小红_chat.txt": ai_text(old=True)})
    assert conversations == [["u:在吗 周末去爬山吗", "a:去啊", "u:几点", "a:八点吧\n别迟到"]]


def test_in_an_ai_text_the_speaker_goes_on_over_midnight_and_colons_are_no_names(tmp_path: Path) -> None:
    stars = "*" * 20
    text = (
        f"\n\n{stars}2023-05-01{stars}\n\n小红:在吗\n明天:三点\n\n小明:在"
        f"\n\n{stars}2023-05-02{stars}\n还没睡\n\n小红:记得\n\n地址:老地方\n\n小明:好"
    )
    summary, conversations = convert(
        tmp_path, {"小红_chat.txt": text}, ImportSettings(system="", held_out=0, me=["小明"])
    )
    assert conversations == [["u:在吗\n明天:三点", "a:在"], ["u:记得\n地址:老地方", "a:好"]]
    assert summary.dropped == {"leading reply": 1}
    with pytest.raises(DataError, match=r"these stand where names do: .*地址.*--members"):
        convert(tmp_path, {}, ImportSettings(system=""))


def test_a_table_of_all_chats_is_told_apart_by_talker(tmp_path: Path) -> None:
    blue = ("小蓝", "蓝", "wxid_blue000")
    rows = [
        old_row(0, False, "在吗"),
        old_row(1, False, "你好", talker=8, names=blue),
        old_row(2, True, "在"),
        old_row(3, True, "好", talker=8),
    ]
    summary, conversations = convert(tmp_path, {"messages.csv": table([*OLD, *NAMES], rows)})
    assert conversations == [["u:在吗", "a:在"], ["u:你好", "a:好"]]
    assert [each.contact for each in summary.contacts] == ["小红", "小蓝"]
    nameless = [row[:9] for row in rows]
    summary, _ = convert(tmp_path, {"messages.csv": table(OLD, nameless)})
    assert [each.contact for each in summary.contacts] == ["联系人7", "联系人8"]


def test_the_table_of_contacts_names_who_has_no_name(tmp_path: Path) -> None:
    rows = [old_row(0, False, "在吗", names=("", "", "wxid_red0000")), old_row(1, True, "在")]
    rows[0][9:] = ["", "", "wxid_red0000"]
    contacts = table(
        [
            "UserName",
            "Alias",
            "Type",
            "Remark",
            "NickName",
            "PYInitial",
            "RemarkPYInitial",
            "smallHeadImgUrl",
            "bigHeadImgUrl",
        ],
        [["wxid_red0000", "", 3, "小红同学", "红红", "", "", "", ""]],
    )
    summary, _ = convert(tmp_path, {"a.csv": table([*OLD, *NAMES], rows), "contacts.csv": contacts})
    assert [each.contact for each in summary.contacts] == ["小红同学"]
    assert [(file["kind"], file["note"]) for file in summary.files] == [("contacts", "1 names"), ("table", "")]


@pytest.mark.parametrize("me", [[], ["小明"]])
def test_who_is_me_must_be_known(tmp_path: Path, me: list[str]) -> None:
    path = write(tmp_path, "export.txt", text_export(old=False))
    if me:
        assert not read_chats([path], ImportSettings(me=me)).logs[0].is_group
    else:
        with pytest.raises(DataError, match=r"does not say which speaker you are; there are: 小红, 小明.*--me NAME"):
            read_chats([path], ImportSettings())
    with pytest.raises(DataError, match="has no speaker named 小强"):
        read_chats([path], ImportSettings(me=["小强"]))


def test_gb18030_is_read_when_it_is_declared(tmp_path: Path) -> None:
    path = write(tmp_path, "小红_utf8.csv", old_table(), "gb18030")
    assert read_chats([path], ImportSettings(encoding="gb18030")).logs[0].contact == "小红"
    with pytest.raises(DataError, match=r"小红_utf8.csv:2.*is not utf-8-sig.*--encoding gb18030"):
        read_chats([path], ImportSettings())


# --- Times -----------------------------------------------------------------------------------------------------------


def test_the_written_time_counts_and_seconds_are_beijing_time(tmp_path: Path) -> None:
    rows = [old_row(0, False, "在吗"), old_row(1, True, "在")]
    rows[1][8] = ""
    convert(tmp_path, {"a.csv": table([*OLD, *NAMES], rows)})
    (row,) = rows_of(tmp_path / "out")
    assert (row["start"], row["end"]) == ("2023-05-01T20:00:00+08:00", "2023-05-01T20:01:00+08:00")
    rows[0][8] = "2023-05-01 12:00:00"  # written by a clock at UTC
    rows[1][8] = "2023-05-01 12:01:00"
    summary, _ = convert(tmp_path, {"a.csv": table([*OLD, *NAMES], rows)})
    assert rows_of(tmp_path / "out")[0]["start"] == "2023-05-01T12:00:00+08:00"
    assert any("differ by -8 h" in note for note in summary.notes)
    utc = ImportSettings(system="", held_out=0, utc_offset=0)
    summary, _ = convert(tmp_path, {"a.csv": table([*OLD, *NAMES], rows)}, utc)
    assert not summary.notes


def test_messages_are_put_in_order_of_time(tmp_path: Path) -> None:
    rows = [old_row(m, me, text) for m, me, text in reversed(DIALOGUE)]
    assert convert(tmp_path, {"a.csv": table([*OLD, *NAMES], rows)})[1] == [TURNS]


# --- Bad rows --------------------------------------------------------------------------------------------------------


def test_all_bad_rows_are_reported_at_once_with_file_and_line(tmp_path: Path) -> None:
    good = old_row(0, False, "两行\n的消息")
    text = table([*OLD, *NAMES], [good, good[:-1], [*old_row(1, True, "x")[:8], "gestern", "", "", ""]])
    text += table([*OLD, *NAMES], [[1, 7, "文本", "", 2, "", 2, "x", "", "", "", ""]]).partition("\n")[2]
    write(tmp_path, "a.csv", text)
    write(tmp_path, "b.csv", later_table().replace("文本", "诗", 1).replace(at(1), "2023-13-01 20:00:00"))
    write(tmp_path, "c.csv", table([*OLD, *NAMES], [good]) + '1,7,1,0,0,1,2,"offen')
    write(tmp_path, "d.txt", f"{at(0)} 小红\n在\n\n2023-02-30 20:00:00 小明\n在")
    write(tmp_path, "e.json", '[{"messages": [{"role": "user", "content": "在"}]}, 3, {"messages": [{"role": "x"}]}]')
    with pytest.raises(DataError) as raised:
        read_chats([tmp_path], ImportSettings(me=["小明"]))
    found = {(problem.source.removeprefix(f"{tmp_path}/"), problem.field) for problem in raised.value.problems}
    assert found == {
        ("a.csv:4", "row"),
        ("a.csv:6", "StrTime"),
        ("a.csv:7", "Type"),
        ("a.csv:7", "IsSender"),
        ("a.csv:7", "CreateTime"),
        ("b.csv:2", "类型"),
        ("b.csv:3", "时间"),
        ("c.csv:4", "row"),
        ("d.txt:4", "time"),
        ("e.json:row 2", "row"),
        ("e.json:row 3", "messages[0]"),
    }


def test_what_is_no_export_is_named_and_an_error_when_given_by_name(tmp_path: Path) -> None:
    write(tmp_path, "in/小红.csv", later_table())
    write(tmp_path, "in/readme.txt", "hello")
    write(tmp_path, "in/empty.csv", "")
    write(tmp_path, "in/photo.jpg", "x")
    chats = read_chats([tmp_path / "in"], ImportSettings())
    notes = {Path(file.path).name: file.note for file in chats.files if file.note}
    assert notes == {
        "readme.txt": "is no chat log that is known",
        "empty.csv": "is empty",
        "photo.jpg": "is no .csv, .txt, .json, .jsonl file",
    }
    with pytest.raises(DataError, match=r"readme.txt cannot be imported: it is no chat log that is known"):
        read_chats([tmp_path / "in/readme.txt"], ImportSettings())
    with pytest.raises(DataError, match="does not exist"):
        read_chats([tmp_path / "nowhere"], ImportSettings())
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="There are no messages in"):
        read_chats([tmp_path / "bare"], ImportSettings())


# --- Kinds of messages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (read_numbered(1, 0, "在吗"), ("text", "在吗")),
        (read_numbered(3, 0, "<msg><img/></msg>"), ("image", "")),
        (read_numbered(49, 57, "<?xml?><msg><title>好&amp;行</title><refermsg/></msg>"), ("quote", "好&行")),
        (read_numbered(49, 57, ""), ("quote", "")),
        (read_numbered(49, 999, "?"), ("unknown", "")),
        (read_numbered(10000, 0, '"小红" 撤回了一条消息'), ("recall", "")),
        (read_numbered(10000, 0, "以上是打招呼的内容"), ("system", "")),
        (read_numbered(10000, 4, "拍了拍"), ("pat", "")),
        (read_named("引用消息", "好的\n引用：小红: 在吗\n在"), ("quote", "好的")),
        (read_named("语音", "【语音】我到了"), ("voice", "我到了")),
        (read_named("诗", "x"), None),
        (read_labelled("[图片]"), ("image", "")),
        (read_labelled("[图片]好看吗"), ("text", "[图片]好看吗")),
        (read_labelled("好的\n引用:小红:在吗"), ("quote", "好的")),
        (read_labelled("            [链接]:title:标题\n            url:x"), ("link", "")),
        (read_labelled("【分享链接】\n标题：x\n描述：y"), ("link", "")),
        (read_labelled("【红包】: 恭喜发财"), ("red_packet", "")),
        (read_labelled("【表情包】 开心"), ("sticker", "")),
        (read_labelled("【重要】明天开会"), ("text", "【重要】明天开会")),
    ],
)
def test_what_was_sent_is_told_from_the_names_of_each_export(read: object, expected: object) -> None:
    assert read == expected


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


def test_the_rules_say_what_becomes_of_each_kind_and_all_are_counted(tmp_path: Path) -> None:
    summary, conversations = convert(tmp_path, {"a.csv": MIXED})
    assert conversations == [["u:[图片]\n好看吗", "a:好看", "u:[表情]", "a:哈哈"]]
    assert summary.dropped == {"image": 1, "recall": 1, "empty": 1}
    assert (summary.messages, summary.used, summary.merged) == (8, 4, 1)


def test_rules_can_be_changed(tmp_path: Path) -> None:
    rules = change_rules(["image=〔图〕", "recall=[撤回]"], ["sticker", "quote"])
    options = ImportSettings(system="", held_out=0, rules=rules)
    summary, conversations = convert(tmp_path, {"a.csv": MIXED}, options)
    assert conversations == [["u:〔图〕\n好看吗", "a:〔图〕\n好看"]]
    assert summary.dropped == {"empty": 1, "sticker": 1, "quote": 1, "trailing question": 1}
    with pytest.raises(DataError, match=r"'foto=x' does not map.*'lied' is no kind.*The kinds are: text, quote"):
        change_rules(["foto=x"], ["lied"])


# --- Conversations ---------------------------------------------------------------------------------------------------


def chat(*entries: tuple[float, str]) -> str:
    """A table of (minutes, text); a text that begins with > is mine."""
    return table([*OLD, *NAMES], [old_row(m, text[0] == ">", text.lstrip(">")) for m, text in entries])


def test_silence_ends_a_conversation_also_before_my_own_messages(tmp_path: Path) -> None:
    text = chat((0, "在吗"), (5, ">在"), (66, ">忘了说"), (67, "什么"), (68, ">没事"), (400, "早"), (401, ">早"))
    summary, conversations = convert(tmp_path, {"a.csv": text})
    assert conversations == [["u:在吗", "a:在"], ["u:什么", "a:没事"], ["u:早", "a:早"]]
    assert summary.dropped == {"leading reply": 1}
    _, conversations = convert(tmp_path, {}, ImportSettings(system="", held_out=0, gap_minutes=61))
    assert conversations == [["u:在吗", "a:在\n忘了说", "u:什么", "a:没事"], ["u:早", "a:早"]]


def test_leading_replies_and_trailing_questions_are_dropped_and_counted(tmp_path: Path) -> None:
    summary, conversations = convert(
        tmp_path, {"a.csv": chat((0, ">早"), (1, "在吗"), (2, ">在"), (3, "哦"), (4, "好"))}
    )
    assert conversations == [["u:在吗", "a:在"]]
    assert summary.dropped == {"leading reply": 1, "trailing question": 2}


def test_length_has_limits_and_long_conversations_go_on_in_another(tmp_path: Path) -> None:
    entries = [(number, f"{'>' if number % 2 else ''}第{number}句") for number in range(12)]
    options = ImportSettings(system="", held_out=0, min_turns=4, max_turns=4)
    summary, conversations = convert(tmp_path, {"a.csv": chat(*entries, (200, "在吗"), (201, ">在"))}, options)
    assert [len(each) for each in conversations] == [4, 4, 4]
    assert conversations[1][0] == "u:第4句"
    assert summary.dropped == {"too short": 2}
    _, conversations = convert(tmp_path, {"a.csv": chat(*entries[:10])}, options)
    assert [len(each) for each in conversations] == [4, 6]  # two turns alone would be too short
    _, conversations = convert(tmp_path, {}, ImportSettings(system="", held_out=0, max_turns=0))
    assert [len(each) for each in conversations] == [10]


def test_merged_messages_are_joined_as_asked(tmp_path: Path) -> None:
    _, conversations = convert(tmp_path, {"a.csv": old_table()}, ImportSettings(system="", held_out=0, joiner="，"))
    assert conversations[0][0] == "u:在吗，周末去爬山吗"


def test_the_contact_may_be_the_assistant(tmp_path: Path) -> None:
    system = "你是{{name}}，在和{{ remark }}说话"
    options = ImportSettings(assistant="contact", system=system, held_out=0)
    for name, text in (("小红.csv", old_table()), ("小红.json", samples("messages"))):
        folder = tmp_path / name
        summary, conversations = convert(folder, {name: text}, options)
        assert conversations == [["s:你是小红，在和小明说话", "u:去啊", "a:几点"]]
        assert summary.dropped["trailing question"] == 1
        assert summary.dropped["leading reply"] >= 1


def test_the_default_system_prompt_names_both(tmp_path: Path) -> None:
    _, conversations = convert(tmp_path, {"小红_utf8.csv": old_table()}, ImportSettings(held_out=0))
    assert conversations[0][0].startswith("s:你是小明，正在微信上和小红聊天。")
    with pytest.raises(DataError, match=r"\{\{name\}\}.*--me"):
        convert(tmp_path / "x", {"小红_utf8.csv": old_table(names=False)}, ImportSettings(held_out=0))


def test_settings_that_make_no_sense_are_named_together() -> None:
    with pytest.raises(DataError) as raised:
        ImportSettings(gap_minutes=0, held_out=1, min_turns=1, max_turns=3, encoding="latin-1", system="{{you}}")
    for word in ("gap", "held_out", "min_turns", "max_turns", "encoding", "{{you}}"):
        assert word in str(raised.value)


# --- Groups ----------------------------------------------------------------------------------------------------------

GROUP = table(
    [*OLD, *NAMES],
    [
        old_row(0, False, "今晚聚吗", names=("小红", "红", "wxid_red0000")),
        old_row(1, False, "去哪", names=("小蓝", "蓝", "wxid_blue000")),
        old_row(2, False, "我都行", names=("小蓝", "蓝", "wxid_blue000")),
        old_row(3, True, "老地方"),
        old_row(4, False, "好", names=("小红", "红", "wxid_red0000")),
        old_row(5, True, "七点"),
    ],
)


def test_in_a_group_the_others_are_named(tmp_path: Path) -> None:
    options = ImportSettings(system="{{name}}在{{remark}}", held_out=0)
    summary, conversations = convert(tmp_path, {"饭友_utf8.csv": GROUP}, options)
    assert conversations == [
        ["s:小明在饭友", "u:小红：今晚聚吗\n小蓝：去哪\n我都行", "a:老地方", "u:小红：好", "a:七点"]
    ]
    assert summary.contacts[0].is_group
    _, conversations = convert(tmp_path, {}, ImportSettings(system="", held_out=0, group_names=False))
    assert conversations[0][0] == "u:今晚聚吗\n去哪\n我都行"


def test_a_member_of_a_group_may_be_the_assistant(tmp_path: Path) -> None:
    options = ImportSettings(system="{{name}}", held_out=0, member="小红")
    summary, conversations = convert(tmp_path, {"饭友_utf8.csv": GROUP}, options)
    assert conversations == [["s:小红", "u:小蓝：去哪\n我都行\n小明：老地方", "a:好"]]
    assert summary.dropped == {"leading reply": 1, "trailing question": 1}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (ImportSettings(system="", assistant="contact"), "group chat, no member chosen"),
        (ImportSettings(system="", member="小绿"), "group chat without the chosen member"),
        (ImportSettings(system="", contacts=["小红"]), "chat not asked for"),
    ],
)
def test_groups_and_chats_that_are_left_out_are_counted(tmp_path: Path, options: ImportSettings, reason: str) -> None:
    files = {"饭友_utf8.csv": GROUP, "小红_utf8.csv": old_table()}
    summary, _ = convert(tmp_path, files, options)
    assert summary.dropped[reason] == 6
    assert summary.messages == 11


# --- Several exports -------------------------------------------------------------------------------------------------


def test_a_chat_exported_in_many_ways_is_read_once(tmp_path: Path) -> None:
    files = {
        "小红/小红_utf8.csv": old_table(),
        "messages.csv": old_table(),
        "小红/小红.txt": text_export(old=True),
        "小红/小红_chat.txt": ai_text(old=True),
        "小红/小红_train.json": samples("conversations"),
        "train.json": samples("conversations"),
    }
    summary, conversations = convert(tmp_path, files)
    assert conversations == [TURNS]
    assert summary.messages == 5 + 5 + 6 + 5 + 4 + 4
    assert summary.dropped == {
        "in a fuller export of the chat": 15,
        "repeated": 5,
        "in a merged file beside its chats": 4,
    }
    assert sum("was left out" in note for note in summary.notes) == 4


def test_exports_of_one_chat_that_overlap_in_time_are_joined_without_repeats(tmp_path: Path) -> None:
    entries = [(0, "在吗"), (1, ">在"), (2, "哈哈"), (2, "哈哈"), (3, ">笑啥"), (4, "没啥"), (5, ">哦")]
    summary, conversations = convert(tmp_path, {"2023.csv": chat(*entries[:5]), "2024.csv": chat(*entries[2:])})
    assert conversations == [["u:在吗", "a:在", "u:哈哈\n哈哈", "a:笑啥", "u:没啥", "a:哦"]]
    assert summary.dropped == {"repeated": 3}


def test_merged_files_of_ready_made_conversations_count_once(tmp_path: Path) -> None:
    summary, conversations = convert(
        tmp_path, {"小红_train.json": samples("conversations"), "train.json": samples("conversations")}
    )
    assert conversations == [TURNS]
    assert summary.dropped == {"repeated": 4}


def test_its_own_output_is_never_read_again(tmp_path: Path) -> None:
    write(tmp_path, "小红_utf8.csv", old_table() + chat((500, "早"), (501, ">早")).partition("\n")[2])
    options = ImportSettings()
    first = import_chats([tmp_path], tmp_path / "chats", options, salt="s")
    before = {path.name: path.read_bytes() for path in (tmp_path / "chats").iterdir()}
    assert set(before) == {"train.jsonl", "dev.jsonl", "summary.json", "canaries.json"}
    again = import_chats([tmp_path], tmp_path / "chats", options, overwrite=True, salt="s")
    assert (again.messages, again.train, again.dev) == (first.messages, first.train, first.dev) == (7, 1, 1)
    skipped = {Path(file["path"]).name for file in again.files if file["note"] == "is the result of an earlier import"}
    assert skipped == set(before)
    for name in ("train.jsonl", "dev.jsonl", "canaries.json"):
        assert (tmp_path / "chats" / name).read_bytes() == before[name]
    with pytest.raises(DataError, match=r"already holds train.jsonl.*--force"):
        import_chats([tmp_path], tmp_path / "chats", options)
    with pytest.raises(DataError, match="result of an earlier import"):
        import_chats([tmp_path / "chats/train.jsonl"], tmp_path / "other", options)


# --- Splitting -------------------------------------------------------------------------------------------------------


def test_the_latest_part_of_each_chat_is_held_out(tmp_path: Path) -> None:
    blue = ("小蓝", "蓝", "wxid_blue000")
    rows = []
    for day in range(20):
        rows += [old_row(day * 1440, False, f"红{day}"), old_row(day * 1440 + 1, True, "嗯")]
        if day < 10:
            rows += [
                old_row(day * 1440, False, f"蓝{day}", talker=8, names=blue),
                old_row(day * 1440 + 1, True, "哦", talker=8),
            ]
    summary, _ = convert(
        tmp_path, {"messages.csv": table([*OLD, *NAMES], rows)}, ImportSettings(system="", held_out=0.2)
    )
    train, dev = rows_of(tmp_path / "out"), rows_of(tmp_path / "out", "dev.jsonl")
    assert (len(train), len(dev)) == (summary.train, summary.dev) == (24, 6)
    for contact, num_dev in (("小红", 4), ("小蓝", 2)):
        ends = [row["end"] for row in train if row["contact"] == contact]
        starts = [row["start"] for row in dev if row["contact"] == contact]
        assert len(starts) == num_dev
        assert max(ends) < min(starts)


def test_a_session_is_never_cut_by_the_split(tmp_path: Path) -> None:
    entries = [(number, f"{'>' if number % 2 else ''}第{number}句") for number in range(40)]
    options = ImportSettings(system="", held_out=0.1, max_turns=4)
    summary, _ = convert(tmp_path, {"a.csv": chat(*entries)}, options)
    assert (summary.train, summary.dev) == (10, 0)
    assert any("nothing of it was held out" in note for note in summary.notes)
    summary, _ = convert(tmp_path, {"a.csv": chat(*entries, *((m + 900, text) for m, text in entries))}, options)
    assert (summary.train, summary.dev) == (10, 10)


def windows(num: int, size: int = 10, step: int = 3) -> list[dict[str, Any]]:
    """Windows over a chat as the exporters' sliding strategy cuts it, turns merged by commas."""
    said = [("user" if number % 3 else "assistant", f"第{number}句") for number in range(num)]
    made = []
    for start in range(0, num - size, step):
        turns: list[dict[str, str]] = []
        for role, text in said[start : start + size]:
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += "，" + text
            elif turns or role == "user":
                turns.append({"role": role, "content": text})
        while turns[-1]["role"] == "user":
            turns.pop()
        made.append({"messages": turns})
    return made


@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_windows_that_overlap_never_stand_on_both_sides(tmp_path: Path, order: str) -> None:
    rows = windows(300)
    if order == "shuffled":
        rows = [rows[index * 37 % len(rows)] for index in range(len(rows))]
    summary, _ = convert(
        tmp_path, {"小红.json": json.dumps(rows, ensure_ascii=False)}, ImportSettings(system="", held_out=0.1)
    )

    def pieces(name: str) -> set[str]:
        return {
            piece
            for row in rows_of(tmp_path / "out", name)
            for message in row["messages"]
            for piece in message["content"].split("，")
        }

    assert summary.dev >= 9
    assert summary.train >= 70
    shared = pieces("train.jsonl") & pieces("dev.jsonl")
    assert len(shared) <= 2, "two windows may touch in a message at their edge, not in more"
    assert summary.dropped["shares messages with the held-out part"] > 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 1, 2, 30, 61, 500]), st.booleans(), st.sampled_from([1, 1, 1, 3, 47, 10000, 49])
        ),
        min_size=1,
        max_size=60,
    ),
    st.sampled_from(["me", "contact"]),
    st.sampled_from([2, 4]),
    st.sampled_from([0, 4, 6]),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_every_message_is_accounted_for_whatever_the_chat(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[int, bool, int]],
    assistant: Any,
    min_turns: int,
    max_turns: int,
    held_out: float,
) -> None:
    options = ImportSettings(
        system="", assistant=assistant, min_turns=min_turns, max_turns=max_turns, held_out=held_out
    )
    minutes, rows = 0, []
    for number, (wait, me, type_) in enumerate(entries):
        minutes += wait
        rows.append(old_row(minutes, me, f"第{number}句", type_=type_))
    path = write(tmp_path_factory.mktemp("chat"), "a.csv", table([*OLD, *NAMES], rows))
    (log,) = read_chats([path], options).logs
    tally = Tally()
    conversations = build_conversations(log, options, tally)
    split = split_chat(conversations, held_out=held_out, tally=tally)
    assert tally.total == len(rows)
    assert tally.used == sum(len(each.turns) for each in conversations)
    assert [*split.train, *split.dev] == conversations
    for each in conversations:
        assert [turn.role for turn in each.turns] == ["user", "assistant"] * (len(each.turns) // 2)
        assert len(each.turns) >= min_turns
    if split.train and split.dev:
        assert split.train[-1].end < split.dev[0].start


# --- Privacy ---------------------------------------------------------------------------------------------------------

SECRETS = ["13812345678", "138-1234-5678", "zhang.san@example.com", "110101199003071234", "qwe12345", "13900001111"]


def test_personal_data_is_replaced_consistently_and_nowhere_in_clear(tmp_path: Path) -> None:
    text = chat(
        (0, "我的电话13812345678，邮箱zhang.san@example.com"),
        (1, ">记下138-1234-5678了"),
        (2, "身份证 110101199003071234，wifi密码是qwe12345"),
        (3, ">qwe12345对吧"),
        (500, "在吗"),
        (501, ">在，qwe12345"),
    ).replace("小红", "小红13900001111")
    summary, conversations = convert(tmp_path, {"13900001111_utf8.csv": text}, ImportSettings(held_out=0.3))
    assert conversations[0][0].startswith("s:你是小明，正在微信上和小红[电话1]聊天。")
    assert conversations[0][1:] == [
        "u:我的电话[电话2]，邮箱[邮箱1]",
        "a:记下[电话2]了",
        "u:身份证 [身份证1]，wifi密码是[密码1]",
        "a:[密码1]对吧",
    ]
    assert turns_of(rows_of(tmp_path / "out", "dev.jsonl")[0])[1:] == ["u:在吗", "a:在，[密码1]"]
    assert summary.redacted == {"phone": 4, "password": 3, "email": 1, "id_card": 1}
    assert summary.canaries == 5
    for path in (tmp_path / "out").iterdir():
        written = path.read_text(encoding="utf-8")
        assert not [secret for secret in SECRETS if secret in written]
        assert path.stat().st_mode & 0o077 == 0


def test_without_redaction_only_the_conversations_hold_secrets(tmp_path: Path) -> None:
    text = chat((0, "我的电话13812345678"), (1, ">好"))
    _, conversations = convert(tmp_path, {"小红13900001111.csv": text})
    assert conversations == [["u:我的电话13812345678", "a:好"]]
    for name in ("summary.json", "canaries.json"):
        written = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert not [secret for secret in SECRETS if secret in written]


# --- What comes out --------------------------------------------------------------------------------------------------


def test_the_output_can_be_trained_on(tmp_path: Path) -> None:
    convert(tmp_path, {"小红_utf8.csv": old_table()}, ImportSettings(held_out=0))
    records = read_records(tmp_path / "out/train.jsonl")
    assert records[-1].target == "八点吧\n别迟到"
    assert [message.role for message in records[-1].messages] == ["system", "user", "assistant", "user"]


def test_the_summary_on_disk_is_the_one_returned(tmp_path: Path) -> None:
    summary, _ = convert(tmp_path, {"小红_utf8.csv": old_table()}, ImportSettings(held_out=0))
    on_disk = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert on_disk == summary.to_json()
    assert on_disk["messages"] == on_disk["used"] + on_disk["merged"] + sum(on_disk["dropped"].values())


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No conversation is left of 2 messages. Dropped: trailing question 2"):
        convert(tmp_path, {"小红.csv": chat((0, "在吗"), (1, "喂"))})
    assert not (tmp_path / "out").exists()


# --- The command -----------------------------------------------------------------------------------------------------


def run_cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["import-chats", *(str(each) for each in arguments)], catch_exceptions=False)


def test_the_command_prints_the_counts_and_the_files_it_skipped(tmp_path: Path) -> None:
    write(tmp_path, "in/小红_utf8.csv", MIXED)
    write(tmp_path, "in/readme.txt", "hello")
    result = run_cli(tmp_path / "in", "-o", tmp_path / "out", "--held-out", "0", "--map", "image=〔图〕", "--join", "/")
    assert result.exit_code == 0, result.stderr
    counts = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in result.stdout.splitlines() if "│" in line
    }
    assert counts == {
        "messages read": "8",
        "used": "4",
        "merged": "2",
        "dropped: recall": "1",
        "dropped: empty": "1",
        "conversations to learn from": "1",
        "conversations held out": "0",
    }
    assert "readme.txt: is no chat log that is known" in result.stdout
    assert turns_of(rows_of(tmp_path / "out")[0])[1:] == ["u:〔图〕/好看吗", "a:〔图〕/好看", "u:[表情]", "a:哈哈"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--assistant", "you"], "assistant is 'you'; choose me or contact."),
        (["--redact", "fr"], "redact is 'fr'; choose zh, en or off."),
        (["--gap", "0"], "the gap is 0.0 minutes"),
        (["--drop", "lied"], "'lied' is no kind of message."),
        (["--encoding", "gb18030"], "not gb18030"),
    ],
)
def test_the_command_refuses_what_makes_no_sense_in_a_sentence(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    write(tmp_path, "小红_utf8.csv", old_table() + "\u20ac\u2028\U0001f600")
    result = run_cli(tmp_path, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_the_example_of_the_page_comes_out_as_shown(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs/chat-logs.md").read_text(encoding="utf-8")
    cells = [
        line.strip("| ").split(" | ")
        for line in page.split("## An example")[1].split("\n")
        if line[:3] in ("| 0", "| 1")
    ]
    rows = []
    for mine, type_, when, content in cells:
        row = old_row(0, mine == "1", content.strip("`"), type_=int(type_))
        row[5], row[8] = "", when
        rows.append(row)
    options = ImportSettings(system="你是{{name}}", held_out=0)
    summary, _ = convert(tmp_path, {"小红_utf8.csv": table([*OLD, *NAMES], rows)}, options)
    shown = page.split("```json\n")[1].split("```")[0]
    assert (tmp_path / "out/train.jsonl").read_text(encoding="utf-8") == shown
    assert (summary.messages, summary.used, summary.merged) == (6, 2, 2)
    assert summary.dropped == {"leading reply": 1, "trailing question": 1}
